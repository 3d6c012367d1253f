//! Whether the guest is changing its own text just now. The patcher must not write into the middle of
//! that: the guest would find bytes it does not expect (`__text_poke` BUGs) or overwrite ours.
//!
//! Linux v6.12 arch/x86/kernel/alternative.c: every change is made under `text_mutex`; several are
//! queued in `tp_vec` and may stay there with the mutex free (kernel/jump_label.c,
//! arch_jump_label_transform_queue); `bp_desc.refs` counts those whose int3 is in place. ftrace plans its
//! changes under `ftrace_lock`.

use crate::address::Gva;
use crate::kernel::{AttachError, Kernel};
use crate::paging::{KernelMemory, ReadError};
use crate::places::Lookup;
use crate::target::PhysicalMemory;
use crate::types::{TypeError, Types};

/// The low bits of `mutex.owner` are flags (Linux v6.12 kernel/locking/mutex.h, MUTEX_FLAGS).
const MUTEX_FLAGS: u64 = 7;

/// Locks that are held while text is changed or a change is planned.
const LOCKS: [&str; 2] = ["text_mutex", "ftrace_lock"];
/// Queue lengths, as variable, its struct and member: a plain counter to v6.15, then part of
/// `text_poke_array` (Linux v6.16 arch/x86/kernel/alternative.c).
const QUEUES: [(&str, Option<(&str, &str)>); 2] = [
    ("tp_vec_nr", None),
    (
        "text_poke_array",
        Some(("smp_text_poke_array", "nr_entries")),
    ),
];

/// What tells of text changes, looked up once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Signs {
    /// Mutexes by name.
    locks: Vec<(&'static str, Gva)>,
    /// 32-bit counters that are zero at rest, by name.
    counters: Vec<(&'static str, Gva)>,
    /// What the kernel should have and was not found.
    missing: Option<String>,
}

impl Signs {
    /// Looks them up.
    pub(crate) fn of(lookup: Lookup<'_>) -> Self {
        let types = lookup.types;
        let place = |name| lookup.get(name);
        let has_ftrace = lookup.symbols.unique("unregister_ftrace_function").is_ok();
        let mut signs = Self::default();
        let owner = types.offset_of("mutex", "owner").unwrap_or(0);
        for name in LOCKS {
            match place(name) {
                Some(at) => signs.locks.push((name, at.wrapping_add(owner))),
                // A kernel without ftrace has no such lock; all have the other.
                None if name == "ftrace_lock" && !has_ftrace => {}
                None => signs.missing = Some(name.to_owned()),
            }
        }
        for (name, member) in QUEUES {
            let offset = member.map_or(Ok(0), |(within, path)| types.offset_of(within, path));
            if let (Some(at), Ok(offset)) = (place(name), offset) {
                signs.counters.push((name, at.wrapping_add(offset)));
            }
        }
        if let (Some(at), Ok(refs)) = (place("bp_desc"), batch_references(types)) {
            signs.counters.push(("bp_desc.refs", at.wrapping_add(refs)));
        }
        if signs.counters.is_empty() && signs.missing.is_none() {
            signs.missing = Some("tp_vec_nr".to_owned());
        }
        signs
    }

    /// The first sign of a change in flight.
    fn in_flight(&self, memory: &KernelMemory<'_>) -> Result<Option<String>, ReadError> {
        for (name, owner) in &self.locks {
            let task = memory.read_u64(*owner)? & !MUTEX_FLAGS;
            if task != 0 {
                return Ok(Some(format!("{name} is held by the task at {task:#018x}")));
            }
        }
        for (name, at) in &self.counters {
            let count = memory.read_u32(*at)?;
            if count != 0 {
                return Ok(Some(format!("{name} is {count}: text changes are queued")));
            }
        }
        Ok(None)
    }
}

fn batch_references(types: &Types) -> Result<u64, TypeError> {
    types.offset_of("bp_patching_desc", "refs")
}

impl Kernel {
    /// What says that the guest is changing its own text, or `None` while it does not. To be asked
    /// inside a stop: the answer is past as soon as the guest runs.
    ///
    /// # Errors
    /// Memory that cannot be read, or a kernel whose signs are not known: it may then be patching.
    pub fn text_patching(
        &self,
        physical: &dyn PhysicalMemory,
    ) -> Result<Option<String>, AttachError> {
        let signs = self.patching_signs();
        if let Some(missing) = &signs.missing {
            return Err(AttachError::Unsupported {
                what: "text patching",
                why: format!(
                    "`{missing}` was not found, so it cannot be told whether the guest patches itself"
                ),
            });
        }
        Ok(signs.in_flight(&self.memory(physical))?)
    }
}
