//! What can be brought into a running guest and what cannot yet, by section and by table. The one place to
//! change when a new kind can be treated.

use super::inventory::numbered_base;
use super::special::Special;

/// The section of the descriptors of pr_debug.
pub(super) const DYNAMIC_DEBUG: &str = "__dyndbg";
/// What a module says of itself.
pub(super) const MODULE_INFORMATION: &str = ".modinfo";
/// How the sections of per-CPU variables begin.
pub(super) const PER_CPU: &str = ".data..percpu";

/// What names callbacks: a section for each kind, by the macros of `vmpatch/callbacks.h`.
pub(super) const CALLBACKS: &str = ".vmpatch.callbacks.";

/// What `static_cpu_has` does before alternatives are applied (Linux v6.12
/// arch/x86/include/asm/cpufeature.h).
pub(super) const AUXILIARY: &str = ".altinstr_aux";

/// Whether code of a section can be replaced or brought.
pub(super) fn code(section: &str) -> Result<(), &'static str> {
    match section {
        ".text" | ".ref.text" | ".sched.text" => Ok(()),
        _ if section.starts_with(".text..") => Err("code of a special section cannot be moved"),
        _ if section.starts_with(".text.") => Ok(()),
        _ if section.starts_with(".init") || section.starts_with(".exit") => {
            Err("runs only at boot, so the change would have no effect on a running guest")
        }
        ".entry.text" => Err("entry code runs where the patch is not mapped"),
        ".noinstr.text" => Err("noinstr code cannot be moved yet"),
        _ => Err("code of this section cannot be moved yet"),
    }
}

/// Whether a new variable or constant of a section can be brought.
pub(super) fn new_data(section: &str) -> Result<(), &'static str> {
    const SPECIAL_BUT_PLAIN: [&str; 7] = [
        // Gathered for controls of the guest, which do not reach new ones: clear_warn_once, and that of pr_debug, whose messages
        // are then told or not as they were compiled.
        ".data..once",
        DYNAMIC_DEBUG,
        ".data..do_once",
        ".data..unlikely",
        ".data..read_mostly",
        ".data..ro_after_init",
        ".data..cacheline_aligned",
    ];
    match section {
        ".data" | ".bss" | ".rodata" => Ok(()),
        _ if SPECIAL_BUT_PLAIN.contains(&section) => Ok(()),
        _ if section.starts_with(PER_CPU) => Err("new per-CPU variables cannot be brought yet"),
        _ if section.starts_with(".data..") || section.starts_with(".bss..") => {
            Err("variables of this section cannot be brought yet")
        }
        _ if [".data.", ".bss.", ".rodata."]
            .iter()
            .any(|it| section.starts_with(it)) =>
        {
            Ok(())
        }
        _ if is_init(section) => Err("init data is gone after boot"),
        _ => Err("entries of this section cannot be brought yet"),
    }
}

/// Whether a variable may be new although it may be one of the guest's: all that depends on it is whether a message is told
/// (`pr_debug`; `WARN_ONCE` and its like, Linux v6.12 include/linux/once_lite.h; `printk_ratelimited`, include/linux/printk.h).
pub(super) fn is_about_messages(section: &str, name: &str) -> bool {
    section == DYNAMIC_DEBUG || matches!(numbered_base(name), Some("__already_done" | "_rs"))
}

/// Whether no one computes addresses in a section of several variables but those of their starts.
pub(super) fn is_addressed_exactly(section: &str) -> bool {
    [DYNAMIC_DEBUG, ".data..once", ".data..do_once"].contains(&section)
}

/// Sections that the guest freed when it had booted.
pub(super) fn is_init(section: &str) -> bool {
    section.starts_with(".init") || section.starts_with(".exit")
}

/// Why a difference in a section's content does not matter, if it does not.
pub(super) fn ignored_data(section: &str) -> Option<&'static str> {
    match section {
        DYNAMIC_DEBUG => Some("the guest's pr_debug control keeps the old lines and texts"),
        MODULE_INFORMATION => Some("what the guest says of the module stays as it was"),
        ".printk_index" => Some("the guest's printk index keeps the old entries"),
        _ if section.starts_with(".init.data") || section.starts_with(".init.rodata") => {
            Some("init data is gone after boot")
        }
        _ => None,
    }
}

/// Sections that are no data of the running kernel, or that are compared through the code they belong to.
pub(super) fn is_no_data(section: &str) -> bool {
    const TABLES: [&str; 10] = [
        ".altinstructions",
        "__jump_table",
        "__bug_table",
        "__ex_table",
        ".smp_locks",
        ".parainstructions",
        "__mcount_loc",
        "__patchable_function_entries",
        ".static_call_sites",
        ".altinstr_replacement",
    ];
    const PREFIXES: [&str; 10] = [
        CALLBACKS,
        "runtime_ptr_",
        "runtime_shift_",
        ".orc_",
        ".discard.",
        ".note",
        ".return_sites",
        ".retpoline_sites",
        ".call_sites",
        ".ibt_endbr_seal",
    ];
    TABLES.contains(&section) || PREFIXES.iter().any(|it| section.starts_with(it))
}

/// Why new code with such an entry cannot be brought yet, and what can be done; `None` if it can. `len` is
/// the length in bytes of the instruction the entry stands for.
pub(super) fn refused_entry(special: &Special, len: u64) -> Option<String> {
    match special {
        // The prefix stays, which is right on every machine; the rest is done by linking as boot does it, or found
        // by the kernel through a hook.
        Special::LockPrefix
        | Special::Bug { .. }
        | Special::Exception { .. }
        | Special::Alternative { .. }
        | Special::Paravirt { .. }
        | Special::RuntimeConstant { .. } => None,
        Special::JumpLabel { .. } if len == 5 => None,
        Special::JumpLabel { .. } => Some(
            "a static-key branch of two bytes in new code has no room for a jump; build the objects with \
             static-key branches of five bytes"
                .to_owned(),
        ),
        Special::Unknown => Some("nothing is known of this section".to_owned()),
    }
}
