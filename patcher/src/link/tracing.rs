//! Whether the guest's own ftrace leads calls of a function elsewhere, so that a jump after ftrace's bytes would
//! never be reached: its own livepatch, or a direct call. Owns reading ftrace's record of one site. It is read while the
//! patch is linked: what is attached later, while a change waits for a quiet guest or after it, is not seen.
//!
//! Linux v6.12 kernel/trace/ftrace.c: each site has a `struct dyn_ftrace`, in arrays that `ftrace_pages_start` lists;
//! its `flags` count the attached ops and hold what any of them demands. `FTRACE_FL_IPMODIFY`: one may return to
//! another address (livepatch, and a kprobe with a post handler, which does not, but nothing tells it apart).
//! `FTRACE_FL_DIRECT`: one is a trampoline of its own (BPF), which need not enter the function at all. Plain tracers,
//! the function graph and other kprobes go on after ftrace's bytes, where our jump is. Which trampoline the site calls
//! tells nothing: handlers of `ftrace_caller` may change the return address too (arch/x86/kernel/ftrace_64.S).

use vmpatch_introspect::types::{TypeError, Types};
use vmpatch_introspect::{Gva, ReadError};

use super::boot::nops::NOP5;
use super::live::{Guest, Live};

/// Arrays looked through: one a module and a few of vmlinux. A hostile list may never end.
const MOST_ARRAYS: usize = 1 << 16;
/// Most records of one array: 2 MiB hold half as many.
const MOST_RECORDS: u64 = 1 << 18;

/// Why the jump after a function's call to ftrace would not be reached, or might not.
#[derive(Debug, thiserror::Error)]
pub enum TracingError {
    /// Something attached may return elsewhere.
    #[error(
        "the guest itself leads its calls elsewhere: {by} is attached to it by ftrace, and the new code might never run; \
         detach that in the guest (disable its livepatch, end the BPF program or probe) and try again"
    )]
    Diverted {
        /// What is attached.
        by: &'static str,
    },
    /// Something is attached, and it cannot be told what.
    #[error(
        "ftrace is attached to it, and whether that leads its calls elsewhere cannot be told: {why}; end tracing in the \
         guest and try again"
    )]
    Unknown {
        /// What is not known.
        why: String,
    },
    /// Its code cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// Checks the site of a function's call to ftrace. Without a record that can be read, a site that is a nop is taken
/// for unused, and one that is not for diverted.
///
/// # Errors
/// [`TracingError`].
pub fn check(site: Gva, guest: &Guest<'_>) -> Result<(), TracingError> {
    let head = guest.kernel().place("ftrace_pages_start");
    let flags = head
        .map_err(|error| error.to_string())
        .and_then(|head| Records::of(&guest.kernel().types, head).map_err(|e| e.to_string()))
        .and_then(|records| records.verdict(guest, site));
    judge(&guest.bytes(site, NOP5.len())?, flags)
}

fn judge(
    running: &[u8],
    verdict: Result<Option<&'static str>, String>,
) -> Result<(), TracingError> {
    match verdict {
        Ok(Some(by)) => Err(TracingError::Diverted { by }),
        Err(why) if running != NOP5 => Err(TracingError::Unknown { why }),
        Ok(None) | Err(_) => Ok(()),
    }
}

/// Layout of ftrace's records.
struct Records {
    /// Address of the variable that holds the first array.
    head: Gva,
    /// Offsets in `struct ftrace_page`.
    next: u64,
    records: u64,
    index: u64,
    /// Offsets in `struct dyn_ftrace`, and its size.
    ip: u64,
    flags: u64,
    size: u64,
}

impl Records {
    fn of(types: &Types, head: Gva) -> Result<Self, TypeError> {
        Ok(Self {
            head,
            next: types.offset_of("ftrace_page", "next")?,
            records: types.offset_of("ftrace_page", "records")?,
            index: types.offset_of("ftrace_page", "index")?,
            ip: types.offset_of("dyn_ftrace", "ip")?,
            flags: types.offset_of("dyn_ftrace", "flags")?,
            size: types.size_of("dyn_ftrace")?,
        })
    }

    /// What leads calls elsewhere at `site`, if anything does.
    fn verdict(&self, live: &dyn Live, site: Gva) -> Result<Option<&'static str>, String> {
        let flags = self.flags_of(live, site).map_err(|why| why.to_string())?;
        let flags = flags.ok_or_else(|| format!("ftrace has no record of {site}"))?;
        let set = DIVERTING.iter().find(|(flag, _)| flags & flag != 0);
        Ok(set.map(|(_, by)| *by))
    }

    /// The flags in the record of `site`.
    fn flags_of(&self, live: &dyn Live, site: Gva) -> Result<Option<u64>, ReadError> {
        let mut array = Gva(live.read_u64(self.head)?);
        for _ in 0..MOST_ARRAYS {
            if array == Gva(0) {
                break;
            }
            if let Some(record) = self.search(live, array, site)? {
                return live.read_u64(record.wrapping_add(self.flags)).map(Some);
            }
            array = Gva(live.read_u64(array.wrapping_add(self.next))?);
        }
        Ok(None)
    }

    /// The record of `site` in one array, which is sorted by address.
    fn search(&self, live: &dyn Live, array: Gva, site: Gva) -> Result<Option<Gva>, ReadError> {
        let first = Gva(live.read_u64(array.wrapping_add(self.records))?);
        let count = live.bytes(array.wrapping_add(self.index), 4)?;
        let count = count
            .iter()
            .rev()
            .fold(0, |n, byte| n << 8 | u64::from(*byte));
        let (mut from, mut to) = (0, count.min(MOST_RECORDS));
        while from < to {
            let middle = from.midpoint(to);
            let record = first.wrapping_add(middle.wrapping_mul(self.size));
            let ip = live.read_u64(record.wrapping_add(self.ip))?;
            match ip.cmp(&site.0) {
                std::cmp::Ordering::Equal => return Ok(Some(record)),
                std::cmp::Ordering::Less => from = middle + 1,
                std::cmp::Ordering::Greater => to = middle,
            }
        }
        Ok(None)
    }
}

/// Flags of a record, the same since Linux v5.5 (include/linux/ftrace.h), and who sets them.
const DIVERTING: [(u64, &str); 2] = [
    (
        1 << 26,
        "a livepatch, or a probe that may change where it returns to,",
    ),
    (1 << 24, "a direct call, as of a BPF program,"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::tests::Fake;

    const SITE: Gva = Gva(0xffff_ffff_8100_0004);
    const HEAD: Gva = Gva(0x1000);
    const ENABLED: u64 = 1 << 31;
    const REGS: u64 = 1 << 30 | 1 << 29;
    const TRAMPOLINE: u64 = 1 << 28 | 1 << 27;
    const IPMODIFY: u64 = 1 << 26;
    const DIRECT: u64 = 1 << 24;

    const RECORDS: Records = Records {
        head: HEAD,
        next: 0,
        records: 8,
        index: 16,
        ip: 0,
        flags: 8,
        size: 16,
    };

    /// Two arrays, the site in the middle of the second.
    fn guest(flags: u64) -> Fake {
        let mut guest = Fake::new();
        let mut word = |at: u64, value: u64| guest.put(Gva(at), &value.to_le_bytes());
        word(HEAD.0, 0x2000);
        for (at, next, records, count) in [(0x2000, 0x3000, 0x4000, 1), (0x3000, 0, 0x5000, 3)] {
            word(at, next);
            word(at + 8, records);
            word(at + 16, count);
        }
        let ips = [
            (0x4000, SITE.0 - 64),
            (0x5000, SITE.0 - 32),
            (0x5010, SITE.0),
            (0x5020, SITE.0 + 32),
        ];
        for (at, ip) in ips {
            word(at, ip);
            word(at + 8, 0);
        }
        word(0x5018, flags);
        guest
    }

    fn judged(running: &[u8], guest: &Fake) -> Result<(), TracingError> {
        judge(running, RECORDS.verdict(guest, SITE))
    }

    const CALL: [u8; 5] = [0xe8, 1, 2, 3, 4];

    #[test]
    fn a_function_that_a_livepatch_of_the_guest_holds_is_refused() {
        let flags = 1 | ENABLED | TRAMPOLINE | IPMODIFY;
        let error = judged(&CALL, &guest(flags)).unwrap_err();
        assert!(error.to_string().contains("livepatch"), "{error}");
        // Flags are set before the call is written.
        assert!(judged(&NOP5, &guest(IPMODIFY)).is_err());
    }

    #[test]
    fn a_function_with_a_direct_call_is_refused() {
        let error = judged(&CALL, &guest(1 | ENABLED | DIRECT)).unwrap_err();
        assert!(error.to_string().contains("direct call"), "{error}");
    }

    #[test]
    fn tracers_and_probes_that_return_to_the_function_are_no_reason_to_refuse() {
        for flags in [
            1 | ENABLED | TRAMPOLINE,
            2 | ENABLED,
            1 | ENABLED | REGS | TRAMPOLINE,
        ] {
            judged(&CALL, &guest(flags)).unwrap();
        }
        judged(&NOP5, &guest(0)).unwrap();
    }

    #[test]
    fn a_traced_function_without_a_record_is_refused_and_an_untraced_one_is_not() {
        let mut empty = Fake::new();
        empty.put(HEAD, &[0; 8]);
        assert!(matches!(
            judged(&CALL, &empty),
            Err(TracingError::Unknown { .. })
        ));
        judged(&NOP5, &empty).unwrap();
        assert!(judged(&CALL, &Fake::new()).is_err(), "unreadable");
    }

    #[test]
    fn a_list_of_arrays_that_never_ends_is_given_up() {
        let mut round = guest(0);
        round.put(Gva(0x3000), &0x2000_u64.to_le_bytes());
        round.put(Gva(0x5010), &(SITE.0 + 1).to_le_bytes());
        assert!(judged(&CALL, &round).is_err());
    }
}
