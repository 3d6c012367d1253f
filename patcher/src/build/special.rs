//! The tables beside the code through which a kernel rewrites or looks up places in it: which entry stands
//! for which place of which function. Owns their layouts; what becomes of an entry is for others.
//!
//! Layouts: Linux v6.12 and v6.1, arch/x86/include/asm/{alternative,jump_label,bug,extable,paravirt,
//! runtime-const}.h. Sizes that differ between versions are told by how far apart the relocations are.

use super::BuildError;
use super::inventory::Inventory;
use super::reference::{Reference, Target, references_in_code, target_of};
use crate::object::{Home, Object, Relocation, Section, SectionId};

/// One entry of one table.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// The table.
    pub(super) table: SectionId,
    /// Offset of the place it stands for, from its function's entry.
    pub(super) offset: u64,
    /// What it says.
    pub(super) special: Special,
}

/// What an entry says of its place.
#[derive(Clone, Debug)]
pub(super) enum Special {
    /// `.smp_locks`: a lock prefix.
    LockPrefix,
    /// `.altinstructions`.
    Alternative {
        /// CPU feature, 32 × word + bit.
        feature: u16,
        /// For CPUs without it.
        negated: bool,
        /// A call through `pv_ops`.
        direct_call: bool,
        /// Length in bytes of what is replaced.
        len: u8,
        /// The replacement.
        bytes: Vec<u8>,
        /// Its fields, offsets in `bytes`.
        references: Vec<Reference>,
    },
    /// `__jump_table`.
    JumpLabel {
        /// The key, its flags removed.
        key: Target,
        /// Where the branch leads.
        target: Target,
        /// Bit 0 of the key.
        inverted: bool,
    },
    /// `__bug_table`.
    Bug {
        /// Source file, where recorded.
        file: String,
        /// Source line.
        line: u16,
        /// `BUGFLAG_*`.
        flags: u16,
    },
    /// `__ex_table`.
    Exception {
        /// Where execution goes on after a fault.
        fixup: Target,
        /// Handler and its registers.
        data: u32,
    },
    /// `.parainstructions`, 6.1.
    Paravirt {
        /// Index in `pv_ops`.
        slot: u8,
        /// Length in bytes of the call.
        len: u8,
    },
    /// `runtime_ptr_NAME` and `runtime_shift_NAME`, 6.12.
    RuntimeConstant {
        /// The variable.
        name: String,
        /// A shift count of one byte; else a word of eight.
        shift: bool,
    },
    /// A table nothing is known of.
    Unknown,
}

/// Tables that only objtool, ftrace, modpost or a debugger reads, or that say nothing more than relocations
/// do: what they are for is done from the code itself.
const NEEDED_BY_NOBODY: [&str; 10] = [
    "__mcount_loc",
    "__patchable_function_entries",
    ".orc_",
    ".return_sites",
    ".retpoline_sites",
    ".call_sites",
    ".ibt_endbr_seal",
    ".static_call_sites",
    ".discard.",
    ".note",
];

/// The entries of each function, by offset.
pub(super) fn read(object: &Object, inventory: &Inventory) -> Result<Vec<Vec<Entry>>, BuildError> {
    let mut entries = vec![Vec::new(); inventory.functions.len()];
    for (id, section) in object.sections_with_ids() {
        if !section.flags.alloc || section.flags.exec {
            continue;
        }
        let table = Table {
            object,
            inventory,
            id,
            section,
        };
        for (function, entry) in table.entries()? {
            if let Some(list) = entries.get_mut(function) {
                list.push(entry);
            }
        }
    }
    // Stable: the order of entries for one place has a meaning.
    entries
        .iter_mut()
        .for_each(|list: &mut Vec<Entry>| list.sort_by_key(|it| it.offset));
    Ok(entries)
}

/// A section that may be a table.
struct Table<'a> {
    object: &'a Object,
    inventory: &'a Inventory,
    id: SectionId,
    section: &'a Section,
}

type Placed = (usize, Entry);

impl Table<'_> {
    fn entries(&self) -> Result<Vec<Placed>, BuildError> {
        let name = self.section.name.as_str();
        match name {
            ".smp_locks" => self.each(4, |_| Some(Special::LockPrefix)),
            ".altinstructions" => self.alternatives(),
            "__jump_table" => self.each(16, |at| self.jump_label(at)),
            "__bug_table" => self.each(12, |at| self.bug(at)),
            "__ex_table" => self.each(12, |at| self.exception(at)),
            ".parainstructions" => self.each(16, |at| self.paravirt(at)),
            _ if name.starts_with("runtime_ptr_") => self.runtime("runtime_ptr_", false),
            _ if name.starts_with("runtime_shift_") => self.runtime("runtime_shift_", true),
            // Constants with places of code in them are tables of switches: data that the code refers to.
            _ if name.starts_with(".rodata") => Ok(Vec::new()),
            _ if NEEDED_BY_NOBODY.iter().any(|it| name.starts_with(it)) => Ok(Vec::new()),
            _ => Ok(self.unknown()),
        }
    }

    /// Entries of a fixed size whose first field is the place; `special` gets each one's offset.
    fn each(
        &self,
        size: u64,
        special: impl Fn(u64) -> Option<Special>,
    ) -> Result<Vec<Placed>, BuildError> {
        if !self.section.size.is_multiple_of(size) {
            return Err(self.damaged(self.section.size));
        }
        let starts = (0..self.section.size / size).map(|index| index * size);
        starts
            .filter_map(|at| match (self.target(at), special(at)) {
                // What the compiler dropped along with its section may leave an entry without relocation.
                (Some(Target::Function { function, distance }), Some(special)) => {
                    let offset = u64::try_from(distance).ok();
                    Some(
                        offset
                            .ok_or(at)
                            .map(|offset| (function, self.entry(offset, special))),
                    )
                }
                (Some(Target::Place { .. }), _) => None,
                _ => Some(Err(at)),
            })
            .collect::<Result<_, u64>>()
            .map_err(|at| self.damaged(at))
    }

    fn entry(&self, offset: u64, special: Special) -> Entry {
        Entry {
            table: self.id,
            offset,
            special,
        }
    }

    fn damaged(&self, at: u64) -> BuildError {
        BuildError::Table {
            section: self.section.name.clone(),
            offset: at,
        }
    }

    fn relocation(&self, at: u64) -> Option<&Relocation> {
        self.section.relocation_at(at)
    }

    fn target(&self, at: u64) -> Option<Target> {
        Some(target_of(
            self.object,
            self.inventory,
            self.relocation(at)?,
            0,
        ))
    }

    fn number<const N: usize>(&self, at: u64) -> Option<[u8; N]> {
        self.section
            .range(at, at.checked_add(N as u64)?)?
            .try_into()
            .ok()
    }

    /// 12 bytes in 6.1 (`u16 cpuid` whose top bit negates), 14 in 6.12 (`u16 cpuid, u16 flags`).
    fn alternatives(&self) -> Result<Vec<Placed>, BuildError> {
        let count = self.section.relocations.len() as u64 / 2;
        match self.section.size.checked_div(count) {
            None => Ok(Vec::new()),
            Some(12) => self.each(12, |at| {
                let cpuid = u16::from_le_bytes(self.number(at + 8)?);
                self.alternative(at, cpuid & 0x7fff, u16::from(cpuid & 0x8000 != 0), at + 10)
            }),
            Some(14) => self.each(14, |at| {
                let feature = u16::from_le_bytes(self.number(at + 8)?);
                let flags = u16::from_le_bytes(self.number(at + 10)?);
                self.alternative(at, feature, flags, at + 12)
            }),
            Some(size) => Err(self.damaged(size)),
        }
    }

    fn alternative(&self, at: u64, feature: u16, flags: u16, lengths: u64) -> Option<Special> {
        let [len, replacement_len] = self.number(lengths)?;
        let relocation = self.relocation(at + 4)?;
        let (section, start) = self.section_place(relocation)?;
        let end = start.checked_add(u64::from(replacement_len))?;
        let bytes = self.object.section(section).range(start, end)?.to_vec();
        let references = references_in_code(self.object, self.inventory, section, (start, end));
        Some(Special::Alternative {
            feature,
            negated: flags & 1 != 0,
            direct_call: flags & 2 != 0,
            len,
            bytes,
            references,
        })
    }

    /// Section and offset a relocation leads to, whatever is there.
    fn section_place(&self, relocation: &Relocation) -> Option<(SectionId, u64)> {
        let Home::In { section, offset } = self.object.symbol(relocation.symbol).home else {
            return None;
        };
        Some((
            section,
            u64::try_from(offset.cast_signed().checked_add(relocation.addend)?).ok()?,
        ))
    }

    /// `s32 code, s32 target, long key`: the key's low bits are flags and stand in the addend.
    fn jump_label(&self, at: u64) -> Option<Special> {
        let target = self.target(at + 4)?;
        let mut key = *self.relocation(at + 8)?;
        let inverted = key.addend & 1 != 0;
        key.addend &= !3;
        let key = target_of(self.object, self.inventory, &key, 0).exact();
        Some(Special::JumpLabel {
            key,
            target,
            inverted,
        })
    }

    /// `s32 address, s32 file, u16 line, u16 flags`.
    fn bug(&self, at: u64) -> Option<Special> {
        let (section, offset) = self.section_place(self.relocation(at + 4)?)?;
        let bytes = &self.object.section(section).bytes;
        let rest = bytes.get(usize::try_from(offset).ok()?..)?;
        let file = rest.split(|byte| *byte == 0).next().unwrap_or_default();
        Some(Special::Bug {
            file: String::from_utf8_lossy(file).into_owned(),
            line: u16::from_le_bytes(self.number(at + 8)?),
            flags: u16::from_le_bytes(self.number(at + 10)?),
        })
    }

    /// `s32 insn, s32 fixup, s32 data`.
    fn exception(&self, at: u64) -> Option<Special> {
        let fixup = self.target(at + 4)?;
        Some(Special::Exception {
            fixup,
            data: u32::from_le_bytes(self.number(at + 8)?),
        })
    }

    /// `u8 *instr, u8 type, u8 len`, padded to 16.
    fn paravirt(&self, at: u64) -> Option<Special> {
        let [slot, len] = self.number(at + 8)?;
        Some(Special::Paravirt { slot, len })
    }

    fn runtime(&self, prefix: &str, shift: bool) -> Result<Vec<Placed>, BuildError> {
        let name = self.section.name.strip_prefix(prefix).unwrap_or_default();
        self.each(4, |_| {
            Some(Special::RuntimeConstant {
                name: name.to_owned(),
                shift,
            })
        })
    }

    /// Whatever else leads into the middle of a function. What leads to its entry is a function pointer.
    fn unknown(&self) -> Vec<Placed> {
        let relocations = self.section.relocations.iter();
        let targets = relocations.map(|it| target_of(self.object, self.inventory, it, 0));
        targets
            .filter_map(|target| match target {
                Target::Function {
                    function,
                    distance: distance @ 1..,
                } => Some((
                    function,
                    self.entry(distance.unsigned_abs(), Special::Unknown),
                )),
                _ => None,
            })
            .collect()
    }
}
