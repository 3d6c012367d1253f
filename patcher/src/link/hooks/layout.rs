//! Whether the guest looks up as the hooks presume: through the hooked function, in tables of entries that begin
//! with the distance to the instruction. Told by its types; where it has none, by entries of its own tables. Owns
//! the proof.

use iced_x86::{Decoder, DecoderOptions};
use vmpatch_introspect::types::TypeError;
use vmpatch_introspect::{Gva, GvaRange, ReadError};

use super::super::boot::Facts;
use super::super::live::{Guest, Live};
use super::site;
use crate::arena::fixed::{ENTRY, Table};

/// Entries of the kernel's own table that are looked at.
const SAMPLE: u64 = 64;

/// Why it is not known that the guest looks up so.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// The function that the CPU's trap ends in does not ask it.
    #[error("`{by}` does not call it, so that a jump there would not be met")]
    NotAsked {
        /// The function.
        by: &'static str,
    },
    /// The type has another layout.
    #[error("`struct {0}` of this kernel has a layout that this program does not write")]
    Type(&'static str),
    /// The type has no such member.
    #[error(transparent)]
    Member(#[from] TypeError),
    /// Neither types nor symbols of data.
    #[error(
        "the guest has neither BTF nor symbols of its data, so that the form of `{0}` cannot be told"
    )]
    Untold(&'static str),
    /// An entry of the kernel's table says what none can.
    #[error("entry {index} of the guest's `{table}` is not of the form that this program writes")]
    Entry {
        /// The table.
        table: &'static str,
        /// Which.
        index: u64,
    },
    /// Guest memory cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// Checks what is presumed of a table that is looked up by the function at `at`.
///
/// # Errors
/// [`LayoutError`].
pub fn check(table: Table, at: Gva, guest: &Guest<'_>, facts: &Facts) -> Result<(), LayoutError> {
    if table == Table::Bugs {
        is_asked(at, "report_bug", guest, facts)?;
    }
    let form = Form::of(table);
    let bounds = guest.unique(form.start).zip(guest.unique(form.stop));
    let types = &guest.kernel().types;
    match (types.is_empty(), bounds) {
        (true, None) => Err(LayoutError::Untold(form.name)),
        (true, Some(bounds)) => form.entries_fit(guest, guest.kernel().layout.text, bounds),
        (false, _) => form.type_fits(guest),
    }
}

/// Whether a function calls the one at `at`, or what call-depth tracking put before it.
fn is_asked(
    at: Gva,
    by: &'static str,
    guest: &Guest<'_>,
    facts: &Facts,
) -> Result<(), LayoutError> {
    let not_asked = LayoutError::NotAsked { by };
    let Some(start) = guest.unique(by) else {
        return Err(not_asked);
    };
    let extent = site::extent(start, guest);
    let running = guest.bytes(start, extent.size() as usize)?;
    let entries = GvaRange {
        start: Gva(at.0.saturating_sub(facts.call_padding.unwrap_or(0))),
        end: at.wrapping_add(1),
    };
    let decoder = Decoder::with_ip(64, &running, start.0, DecoderOptions::NONE);
    let mut calls = decoder
        .into_iter()
        .filter(|it| it.is_call_near())
        .map(|it| Gva(it.near_branch_target()));
    if calls.any(|to| entries.contains(to)) {
        Ok(())
    } else {
        Err(not_asked)
    }
}

/// What is presumed of one table.
struct Form {
    table: Table,
    /// Section of the kernel.
    name: &'static str,
    start: &'static str,
    stop: &'static str,
    of: &'static str,
    /// Members with offset and size in bytes.
    members: &'static [(&'static str, u64, u64)],
}

impl Form {
    const fn of(table: Table) -> Self {
        match table {
            Table::Bugs => Self {
                table,
                name: "__bug_table",
                start: "__start___bug_table",
                stop: "__stop___bug_table",
                of: "bug_entry",
                members: &[
                    ("bug_addr_disp", 0, 4),
                    ("file_disp", 4, 4),
                    ("line", 8, 2),
                    ("flags", 10, 2),
                ],
            },
            Table::Faults => Self {
                table,
                name: "__ex_table",
                start: "__start___ex_table",
                stop: "__stop___ex_table",
                of: "exception_table_entry",
                members: &[("insn", 0, 4), ("fixup", 4, 4), ("data", 8, 4)],
            },
        }
    }

    fn type_fits(&self, guest: &Guest<'_>) -> Result<(), LayoutError> {
        let types = &guest.kernel().types;
        let mut fits = types.size_of(self.of)? == ENTRY as u64;
        for (name, offset, size) in self.members {
            let member = types.member(self.of, name)?;
            fits &= (member.offset, member.size) == (*offset, *size);
        }
        if fits {
            Ok(())
        } else {
            Err(LayoutError::Type(self.of))
        }
    }

    /// Whether the first entries lead to what they are for.
    fn entries_fit(
        &self,
        live: &dyn Live,
        text: GvaRange,
        (start, stop): (Gva, Gva),
    ) -> Result<(), LayoutError> {
        let size = stop.0.saturating_sub(start.0);
        let wrong = |index| LayoutError::Entry {
            table: self.name,
            index,
        };
        if size == 0 || !size.is_multiple_of(ENTRY as u64) {
            return Err(wrong(size / ENTRY as u64));
        }
        for index in 0..SAMPLE.min(size / ENTRY as u64) {
            let entry = start.wrapping_add(index * ENTRY as u64);
            if !self.entry_fits(live, text, entry)? {
                return Err(wrong(index));
            }
        }
        Ok(())
    }

    fn entry_fits(&self, live: &dyn Live, text: GvaRange, entry: Gva) -> Result<bool, ReadError> {
        let instruction = followed(live, entry)?;
        let second = followed(live, entry.wrapping_add(4))?;
        match self.table {
            // Code that only ran at boot is gone, its entries are not.
            Table::Bugs => {
                let is_gone = !text.contains(instruction);
                let is_bug = || live.bytes(instruction, 2).map(|it| it == [0x0f, 0x0b]);
                let visible = live.bytes(second, 1)?;
                Ok((is_gone || is_bug()?) && visible.iter().all(u8::is_ascii_graphic))
            }
            Table::Faults => Ok(text.contains(instruction) == text.contains(second)),
        }
    }
}

/// Where a field of four bytes that holds a distance from itself leads.
fn followed(live: &dyn Live, field: Gva) -> Result<Gva, ReadError> {
    let mut bytes = [0; 4];
    live.read(field, &mut bytes)?;
    let distance = i64::from(i32::from_le_bytes(bytes));
    Ok(field.wrapping_add(distance.cast_unsigned()))
}

#[cfg(test)]
mod tests {
    use super::super::super::tests::Fake;
    use super::*;

    const TEXT: GvaRange = GvaRange {
        start: Gva(0xffff_ffff_8100_0000),
        end: Gva(0xffff_ffff_8200_0000),
    };
    const TABLE: Gva = Gva(0xffff_ffff_8300_0000);
    const NAME: Gva = Gva(0xffff_ffff_8280_0000);

    fn put_entry(live: &mut Fake, index: u64, first: Gva, second: Gva) {
        let entry = TABLE.wrapping_add(index * ENTRY as u64);
        for (field, to) in [(entry, first), (entry.wrapping_add(4), second)] {
            let distance = to.0.wrapping_sub(field.0) as u32;
            live.put(field, &distance.to_le_bytes());
        }
    }

    fn fits(table: Table, first: Gva, second: Gva) -> bool {
        let mut live = Fake::new();
        live.put(TEXT.start, &[0x0f, 0x0b, 0x90, 0x90]);
        live.put(NAME, b"fs/a.c\0");
        put_entry(&mut live, 0, first, second);
        let bounds = (TABLE, TABLE.wrapping_add(ENTRY as u64));
        Form::of(table).entries_fit(&live, TEXT, bounds).is_ok()
    }

    #[test]
    fn entries_of_a_kernel_without_types_tell_the_form_of_its_tables() {
        assert!(fits(Table::Bugs, TEXT.start, NAME));
        assert!(fits(Table::Bugs, TEXT.end, NAME), "boot code that is gone");
        assert!(!fits(Table::Bugs, TEXT.start.wrapping_add(2), NAME));
        assert!(!fits(Table::Bugs, TEXT.start, NAME.wrapping_add(6)));
        assert!(fits(Table::Faults, TEXT.start, TEXT.start.wrapping_add(9)));
        assert!(!fits(Table::Faults, TEXT.start, NAME));
    }

    #[test]
    fn a_table_of_entries_of_another_size_is_seen() {
        let live = Fake::new();
        let form = Form::of(Table::Bugs);
        for size in [0, 8, 16] {
            let bounds = (TABLE, TABLE.wrapping_add(size));
            let told = form.entries_fit(&live, TEXT, bounds);
            assert!(matches!(told, Err(LayoutError::Entry { .. })), "{told:?}");
        }
    }
}
