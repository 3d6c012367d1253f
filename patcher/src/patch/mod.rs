//! What a patch is, independent of any one guest: the functions it replaces, the sections it brings and
//! what they refer to. Owns the content; what makes it well formed is [`check`]'s business, the bytes on
//! disk are [`file`]'s.

pub mod check;
pub mod digest;
pub mod file;
#[cfg(test)]
pub(crate) mod sample;

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};
use vmpatch_introspect::unwind::orc::Entry;

/// A whole patch, as built.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Patch {
    /// Name: unique on one VM, from the file name unless given. Letters, digits, `.`, `_`, `-`.
    pub name: String,
    /// What the guest must be.
    pub requires: Requirement,
    /// The files compiled, and the objects of the guest that they are part of.
    pub units: Vec<Unit>,
    /// Functions that are replaced.
    pub replaced: Vec<Replacement>,
    /// Sections that go into the arena: new bodies of replaced functions, new functions, their data.
    pub sections: Vec<Section>,
    /// Everything that relocations name.
    pub symbols: Vec<Symbol>,
    /// Functions that are called when it is applied or rolled back, at most one of a kind.
    pub callbacks: Vec<Callback>,
}

/// A function of the patch that one vCPU executes within the stop, while all others stand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Callback {
    /// When it is called.
    pub kind: CallbackKind,
    /// Its symbol.
    pub name: String,
    /// Index into [`Patch::sections`] of its body, at whose start it begins.
    pub section: u32,
}

/// When a callback is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CallbackKind {
    /// Before the new functions are entered. It may refuse.
    PreApply,
    /// After that.
    PostApply,
    /// Before the old functions are entered again. It may refuse.
    PreRollback,
    /// After that.
    PostRollback,
}

impl CallbackKind {
    /// All, in the order in which they are called.
    pub const ALL: [Self; 4] = [
        Self::PreApply,
        Self::PostApply,
        Self::PreRollback,
        Self::PostRollback,
    ];

    /// Its name, in sources and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::PreApply => "pre_apply",
            Self::PostApply => "post_apply",
            Self::PreRollback => "pre_rollback",
            Self::PostRollback => "post_rollback",
        }
    }

    /// Whether what it returns decides if the change is made.
    #[must_use]
    pub const fn may_refuse(self) -> bool {
        matches!(self, Self::PreApply | Self::PreRollback)
    }
}

impl fmt::Display for CallbackKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which kernel the patch was built for. What is `None` is left to run-pre matching.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Requirement {
    /// `uname -r`.
    pub release: Option<String>,
    /// GNU build id of vmlinux, lower-case hex.
    pub build_id: Option<String>,
}

/// The name by which the kernel itself is an object.
pub const VMLINUX: &str = "vmlinux";

/// One file of the kernel: names that are local to it mean something only within it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unit {
    /// The file, for messages.
    pub file: String,
    /// The object that it is linked into: [`VMLINUX`] or a module's name.
    pub object: String,
}

impl Patch {
    /// The modules that the patch changes, each once, by name.
    #[must_use]
    pub fn modules(&self) -> BTreeSet<&str> {
        let objects = self.units.iter().map(|unit| unit.object.as_str());
        objects.filter(|object| *object != VMLINUX).collect()
    }
}

/// One function to be replaced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replacement {
    /// Index into [`Patch::units`] of the file it is defined in.
    pub unit: u32,
    /// Its symbol in the guest.
    pub name: String,
    /// Which of several symbols of that name, from 1 as livepatch counts; `None`: found by run-pre
    /// matching.
    pub sympos: Option<u32>,
    /// The function as the old object has it: what must be running now.
    pub old: Code,
    /// Cold parts the compiler split off (`name.cold`): verified and gated with it, never jumped to.
    pub old_parts: Vec<Part>,
    /// Index into [`Patch::sections`] of its new body, which starts at `new_offset`.
    pub new_section: u32,
    /// Offset of the new function's entry in that section.
    pub new_offset: u64,
}

/// A split-off part of an old function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Its symbol in the guest.
    pub name: String,
    /// Its bytes.
    pub code: Code,
}

/// Machine code as it stands in an object: bytes from the function's entry on, and what is to be filled
/// in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Code {
    /// The bytes, relocated fields as the object has them.
    pub bytes: Vec<u8>,
    /// Sorted by offset.
    pub relocations: Vec<Relocation>,
    /// Offsets the kernel may have rewritten: what run-pre tolerates there.
    pub sites: Vec<Site>,
}

/// A place in code that a kernel rewrites at boot or while it runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Site {
    /// Offset from the start of the code.
    pub offset: u64,
    /// Length in bytes as compiled.
    pub len: u8,
    /// Which kind.
    pub kind: SiteKind,
}

/// Kinds of rewritten places.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SiteKind {
    /// `call __fentry__`.
    Fentry,
    /// `ret`, or a jump to `__x86_return_thunk`.
    Return,
    /// Call or jump through `__x86_indirect_thunk_REG`, by the register's number in the x86 encoding.
    Retpoline {
        /// 0 rax to 15 r15.
        register: u8,
        /// A call; else a jump.
        call: bool,
    },
    /// A static-key branch (an entry of `__jump_table`, Linux v6.12 include/linux/jump_label.h). The
    /// branch goes to `target` iff `(key->enabled != 0) ^ inverted`; else it falls through.
    JumpLabel {
        /// The `struct static_key`, low bits of the entry's key masked.
        key: Reference,
        /// Where the branch leads.
        target: Reference,
        /// Bit 0 of the entry's key.
        inverted: bool,
    },
    /// Call or tail jump to a `__SCT__` trampoline.
    StaticCall,
    /// An alternative with its replacements, in table order: the kernel lets the later one win.
    Alternative {
        /// Each other text of the site.
        replacements: Vec<Alternative>,
    },
    /// An immediate that the kernel fills in at boot (6.12 `runtime_ptr_*`, `runtime_shift_*`, Linux
    /// v6.12 arch/x86/include/asm/runtime-const.h). `offset` and `len` are the immediate's own.
    RuntimeConstant {
        /// The variable whose value it becomes.
        symbol: u32,
        /// A one-byte shift count; else an eight-byte word.
        shift: bool,
    },
    /// A call through `pv_ops` of a kernel that patches it in place (6.1 `.parainstructions`).
    Paravirt {
        /// Index of the pointer in `pv_ops`, as the entry has it.
        slot: u8,
    },
    /// `endbr64`, sealed by the kernel where unused.
    Endbr,
    /// An `f0` prefix in `.smp_locks`.
    LockPrefix,
}

/// One other text of an alternative site (`struct alt_instr`, Linux v6.12
/// arch/x86/include/asm/alternative.h).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alternative {
    /// Number of the CPU feature, 32 times word plus bit, or of the bug after the feature words.
    pub feature: u16,
    /// Chosen where the feature is absent (`ALT_FLAG_NOT`).
    pub negated: bool,
    /// The replacement stands for a direct call to what `pv_ops` holds (`ALT_FLAG_DIRECT_CALL`).
    pub direct_call: bool,
    /// The replacement, at most as long as the site, fields as the object has them.
    pub code: Fragment,
}

/// Bytes with fields to fill in and no sites of their own: nothing can nest without end in a patch file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fragment {
    /// The bytes, relocated fields as the object has them.
    pub bytes: Vec<u8>,
    /// Sorted by offset.
    pub relocations: Vec<Relocation>,
}

/// A place that a symbol and a distance name: the symbol's value plus `addend`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reference {
    /// Index into [`Patch::symbols`].
    pub symbol: u32,
    /// Bytes from it.
    pub addend: i64,
}

/// Kinds of x86-64 relocations that kernel objects use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RelocationKind {
    /// R_X86_64_PC32 and R_X86_64_PLT32: 32-bit, from the field's own address.
    Relative32,
    /// R_X86_64_64.
    Absolute64,
    /// R_X86_64_32.
    Absolute32,
    /// R_X86_64_32S.
    Absolute32Signed,
}

/// One field to fill in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Relocation {
    /// Offset of the field in its section or code.
    pub offset: u64,
    /// How.
    pub kind: RelocationKind,
    /// Index into [`Patch::symbols`].
    pub symbol: u32,
    /// Addend (RELA).
    pub addend: i64,
}

/// A section of the new object that goes to the arena.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Section {
    /// Name in the object.
    pub name: String,
    /// What it holds.
    pub kind: SectionKind,
    /// Alignment in bytes, a power of two up to 4096.
    pub align: u64,
    /// Bytes; zeroes for bss.
    pub bytes: Vec<u8>,
    /// Sorted by offset.
    pub relocations: Vec<Relocation>,
    /// Sites of new code that linking must treat.
    pub sites: Vec<Site>,
    /// Places of new code where the CPU may trap, sorted by offset.
    pub traps: Vec<Trap>,
    /// How to unwind from new code, sorted by offset; empty where that is not known.
    pub unwind: Vec<Unwind>,
}

/// What holds of the stack from a place in code on, up to the next such place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unwind {
    /// Offset of the first instruction that it holds at; that of the end of the section for the last.
    pub offset: u32,
    /// What holds, whatever format the kernel it was made for stores it in.
    pub entry: Entry,
}

/// A place in code where the CPU traps, and what the kernel then looks up in a table of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trap {
    /// Offset of the instruction from the start of the section.
    pub offset: u64,
    /// What is looked up.
    pub kind: TrapKind,
}

/// Kinds of traps that are looked up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrapKind {
    /// `ud2` of a WARN or BUG (`struct bug_entry`, Linux v6.12 include/asm-generic/bug.h).
    Bug {
        /// Source file, as the kernel is to print it.
        file: String,
        /// Source line.
        line: u16,
        /// `BUGFLAG_*`.
        flags: u16,
    },
    /// An access that may fault (`struct exception_table_entry`, Linux v6.12
    /// arch/x86/include/asm/extable.h).
    Fault {
        /// Where execution goes on.
        fixup: Reference,
        /// Type of the handler and its parameters.
        data: u32,
    },
}

/// What a section holds, which decides how the arena maps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SectionKind {
    /// Code: read and execute.
    Text,
    /// Strings and constants: mapped like data, never executable.
    ReadOnly,
    /// New variables: read and write.
    Data,
}

/// Something a relocation names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Symbol {
    /// In the patch itself.
    Own {
        /// Name, for messages and `status`.
        name: String,
        /// Index into [`Patch::sections`].
        section: u32,
        /// Offset in it.
        offset: u64,
    },
    /// In the guest, by name.
    Guest {
        /// Index into [`Patch::units`] of the file that names it.
        unit: u32,
        /// Name in kallsyms.
        name: String,
        /// Which of several, from 1; `None`: unique, or read off the running code by run-pre matching.
        sympos: Option<u32>,
    },
    /// Data of the *old* object that has no name of its own in the guest (string pools, anonymous
    /// constants): only old code refers to it, and run-pre compares the bytes it names.
    OldBytes {
        /// The section's name in the object, for messages.
        section: String,
        /// What must be there at the symbol's address (addend 0); relocations of old code name it with
        /// the addend that leads from the field to it. Empty where nothing can be compared (pointers).
        bytes: Vec<u8>,
    },
    /// [`SHADOW_ROOT`], which lies in the arena for all patches of one boot.
    ShadowRoot,
}

/// The name by which new code that includes `vmpatch/shadow.h` refers to the root of all shadow data.
pub const SHADOW_ROOT: &str = "vmpatch_shadow_root";
