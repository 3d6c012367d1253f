//! The grammar of the command line and its help. Owns no behaviour.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

/// Patch the kernel of a running virtual machine from the hypervisor.
///
/// No agent in the guest, no module loaded, no reboot. A patch file is made from two objects (`build`),
/// tried without writing anything (`check`), put into the running kernel (`apply`), looked at (`status`)
/// and taken out again (`rollback`).
#[derive(Parser, Debug)]
#[command(name = "vmpatch", version, max_term_width = 100, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    /// Answer with one JSON document on standard output.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Tell more of what is done, on standard error.
    #[arg(long, short, global = true)]
    pub(crate) verbose: bool,
    /// What to do.
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  anything not foreseen
  2  the call makes no sense as given
  3  refused, with the reason; nothing was written, but by callbacks of the patch that ran
  4  busy until the timeout: some task stood in the code to be replaced; nothing was written
  5  the VM cannot be reached

A patch, from first to last:
  vmpatch run --id web1 --kernel vmlinuz --initrd initrd.img --vcpus 2 --memory 512M --detach
  vmpatch build --old old.o --new new.o -o fix.vmpatch
  vmpatch check --vm web1 fix.vmpatch
  vmpatch apply --vm web1 fix.vmpatch
  vmpatch status --vm web1
  vmpatch rollback --vm web1 fix";

/// The verbs.
#[derive(Subcommand, Debug)]
pub(crate) enum Verb {
    /// Start a virtual machine.
    Run(Run),
    /// List the virtual machines that run.
    List,
    /// Hold all vCPUs of a VM until `resume`.
    Pause(OneVm),
    /// Let a paused VM run on.
    Resume(OneVm),
    /// End a VM at once, as pulling its plug would.
    Stop(OneVm),
    /// Look into a guest kernel from outside, without its help.
    Inspect(Inspect),
    /// Make a patch file from the diff of a fix, or from two objects: before it and after it.
    Build(Box<Build>),
    /// Go through every gate of an apply, and write nothing.
    Check(Change),
    /// Put a patch into the running kernel; one for a module that is not loaded is held until `reconcile`.
    Apply(Apply),
    /// Put in the patches that were held for a module which is loaded now.
    Reconcile(Reconcile),
    /// Tell which patches a VM has, and whether its memory agrees.
    Status(OneVm),
    /// Take a patch out again, or let go of one that is held.
    Rollback(Rollback),
}

/// A verb that needs nothing but a VM.
#[derive(Args, Debug)]
pub(crate) struct OneVm {
    /// The VM, as `vmpatch list` names it.
    #[arg(long = "vm", value_name = "ID")]
    pub(crate) vm: String,
}

/// `vmpatch run`.
#[derive(Args, Debug)]
#[command(after_help = "\
The kernel is a bzImage (as distributions ship it) or a vmlinux ELF. Memory takes K, M or G.
Examples:
  vmpatch run --id web1 --kernel vmlinuz --initrd initrd.img --cmdline 'console=ttyS0' --memory 512M
  vmpatch run --id web1 --kernel vmlinuz --console file:/tmp/web1.log --detach")]
pub(crate) struct Run {
    /// Name of the new VM: letters, digits, `.`, `_` and `-`.
    #[arg(long)]
    pub(crate) id: String,
    /// Kernel: bzImage or vmlinux.
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: PathBuf,
    /// Initial RAM disk.
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// Kernel command line.
    #[arg(long, default_value = "console=ttyS0 panic=-1")]
    pub(crate) cmdline: String,
    /// Number of vCPUs, 1 to 8.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub(crate) vcpus: u8,
    /// Guest RAM, such as 512M or 4G.
    #[arg(long, default_value = "256M", value_parser = parse_size)]
    pub(crate) memory: u64,
    /// Where COM1 goes: `stdio`, `pty` or `file:PATH`. Default: `stdio`, or `pty` with `--detach`.
    #[arg(long, value_name = "WHERE")]
    pub(crate) console: Option<String>,
    /// Go to the background once the VM runs.
    #[arg(long)]
    pub(crate) detach: bool,
    /// Boot even on a KVM that emulates every kernel-mode instruction, and help it over those it cannot
    /// (slow: for measuring host-side costs only).
    #[arg(long)]
    pub(crate) assist_emulation: bool,
}

/// `vmpatch inspect`.
#[derive(Args, Debug)]
pub(crate) struct Inspect {
    /// What to look at.
    #[command(subcommand)]
    pub(crate) what: InspectWhat,
}

/// What `vmpatch inspect` can show.
#[derive(Subcommand, Debug)]
pub(crate) enum InspectWhat {
    /// Which kernel runs and where it lies.
    Kernel(OneVm),
    /// Symbols, as /proc/kallsyms has them.
    Symbols(Symbols),
    /// Loaded modules.
    Modules(OneVm),
    /// Every task, idle and exiting ones included.
    Tasks(OneVm),
    /// Kernel stacks, each with whether it could be unwound reliably.
    Stacks(Stacks),
    /// The kernel's log.
    Dmesg(OneVm),
    /// Registers of every vCPU.
    Vcpus(OneVm),
}

/// `vmpatch inspect symbols`.
#[derive(Args, Debug)]
pub(crate) struct Symbols {
    /// The VM.
    #[command(flatten)]
    pub(crate) vm: OneVm,
    /// Only symbols of this exact name.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Symbols of loaded modules too.
    #[arg(long)]
    pub(crate) modules: bool,
}

/// `vmpatch inspect stacks`.
#[derive(Args, Debug)]
pub(crate) struct Stacks {
    /// The VM.
    #[command(flatten)]
    pub(crate) vm: OneVm,
    /// Only the task with this thread id.
    #[arg(long)]
    pub(crate) pid: Option<i32>,
}

/// `vmpatch build`.
#[derive(Args, Debug)]
#[command(after_help = "\
From the diff of a fix, which compiles what it changes without and with it:
  vmpatch build --source linux --config /boot/config-6.12.1 --diff fix.patch -o fix.vmpatch
The source is that of the running kernel and is not changed. It is made ready once, which takes a
minute or so, in $VMPATCH_CACHE (by default ~/.cache/vmpatch); from then on a file takes seconds.
Needs what a kernel needs to be built, the compiler that the configuration names, and `patch`.

The diff may include <vmpatch/shadow.h>, which keeps data beside objects that live already.

Of one of Debian's kernels, whose source and configuration apt fetches into the same place:
  vmpatch build --debian 6.12.107+deb12-cloud-amd64 --diff fix.patch -o fix.vmpatch

From two objects, compiled with the flags of the running kernel and two more; the new one needs
unwind data too, for stacks to be followed through its code, if the kernel's build gives it none:
  make KCFLAGS='-ffunction-sections -fdata-sections' fs/proc/version.o
  tools/objtool/objtool --orc new.o
  vmpatch build --old old.o --new new.o -o fix.vmpatch
From those of several files, each with what it is linked into:
  vmpatch build --old a1.o --new a2.o --object vmlinux --old b1.o --new b2.o --object ext4 -o fix.vmpatch")]
pub(crate) struct Build {
    /// Object of a file before the fix. May be given several times, as `--new`.
    #[arg(long, value_name = "FILE", requires = "new", conflicts_with = "source")]
    pub(crate) old: Vec<PathBuf>,
    /// Object of the same file after the fix.
    #[arg(long, value_name = "FILE", requires = "old")]
    pub(crate) new: Vec<PathBuf>,
    /// What the file is linked into: `vmlinux` or the name of a module. Default: `vmlinux`.
    #[arg(long, value_name = "OBJECT", requires = "old", value_parser = parse_object)]
    pub(crate) object: Vec<String>,
    /// Source of the running kernel.
    #[arg(
        long,
        value_name = "DIR",
        requires_all = ["config", "diff"],
        required_unless_present_any = ["old", "debian"]
    )]
    pub(crate) source: Option<PathBuf>,
    /// Configuration that the running kernel was built with.
    #[arg(long, value_name = "FILE", requires = "source")]
    pub(crate) config: Option<PathBuf>,
    /// The running kernel is Debian's of this package version, or of this release (`uname -r`): source and configuration are
    /// fetched with apt.
    #[arg(long, value_name = "VERSION", requires = "diff", conflicts_with_all = ["source", "config", "old"])]
    pub(crate) debian: Option<String>,
    /// Flavour of Debian's kernel, such as `cloud-amd64`. Default: that of the release, else `amd64`.
    #[arg(long, requires = "debian", conflicts_with_all = ["source", "old"])]
    pub(crate) flavour: Option<String>,
    /// Kernel that the guest runs, as an ELF: what is compiled must be that, and so must be the guest.
    #[arg(long, value_name = "FILE", conflicts_with = "vm")]
    pub(crate) vmlinux: Option<PathBuf>,
    /// VM whose kernel is to be patched: what is compiled must be that kernel.
    #[arg(long = "vm", value_name = "ID")]
    pub(crate) vm: Option<String>,
    /// Diff of the fix, unified, with one folder before each path (`a/`, `b/`).
    #[arg(long, value_name = "FILE", conflicts_with = "old")]
    pub(crate) diff: Option<PathBuf>,
    /// How many files may be compiled because they include a header that the diff changes.
    #[arg(long, value_name = "N", default_value_t = 64, requires = "diff")]
    pub(crate) most_objects: usize,
    /// Structure whose layout may change, because none of the guest's outlives a call of the functions replaced; may be repeated.
    #[arg(long = "safe-type", value_name = "NAME")]
    pub(crate) safe_types: Vec<String>,
    /// Tell all that was seen, also what is as before.
    #[arg(long)]
    pub(crate) explain: bool,
    /// Patch file to write.
    #[arg(long, short, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// Name of the patch. Default: the output's file name without its ending.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Kernel release (`uname -r`) that the guest must have.
    #[arg(long)]
    pub(crate) release: Option<String>,
    /// Build id of the kernel that the guest must have, in hex.
    #[arg(long)]
    pub(crate) build_id: Option<String>,
}

/// `vmpatch check` and `vmpatch apply`.
#[derive(Args, Debug)]
pub(crate) struct Change {
    /// The VM.
    #[command(flatten)]
    pub(crate) vm: OneVm,
    /// The patch file.
    pub(crate) patch: PathBuf,
    /// Undo all other patches in the same stop: the patch takes the place of them all, also of one of its own name.
    #[arg(long)]
    pub(crate) replace: bool,
    #[command(flatten)]
    pub(crate) limits: Limits,
}

/// How long things may take.
#[derive(Args, Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// How long to retry while a task stands in the code, such as 500ms, 10s or 2m; for each patch anew.
    #[arg(long, default_value = "10s", value_parser = parse_duration)]
    pub(crate) timeout: Duration,
    /// How long each callback of a patch may take, up to 10s: the guest stands still meanwhile.
    #[arg(long, value_name = "TIME", default_value = "10ms", value_parser = parse_callback_limit)]
    pub(crate) callback_limit: Duration,
}

/// `vmpatch apply`.
#[derive(Args, Debug)]
pub(crate) struct Apply {
    #[command(flatten)]
    pub(crate) change: Change,
    /// Refuse a patch for a module that is not loaded, rather than hold it. With --replace none is held.
    #[arg(long)]
    pub(crate) strict: bool,
}

/// `vmpatch reconcile`.
#[derive(Args, Debug)]
pub(crate) struct Reconcile {
    /// The VM.
    #[command(flatten)]
    pub(crate) vm: OneVm,
    #[command(flatten)]
    pub(crate) limits: Limits,
}

/// `vmpatch rollback`.
#[derive(Args, Debug)]
pub(crate) struct Rollback {
    /// The VM.
    #[command(flatten)]
    pub(crate) vm: OneVm,
    /// Name of the patch, as `vmpatch status` shows it.
    pub(crate) patch: String,
    /// Roll back the patches that lie upon it too, the uppermost first, each in a stop of its own.
    #[arg(long)]
    pub(crate) cascade: bool,
    /// Do not call the patch's callbacks `pre_rollback` and `post_rollback`. What its other callbacks did is not undone then.
    #[arg(long)]
    pub(crate) skip_callbacks: bool,
    #[command(flatten)]
    pub(crate) limits: Limits,
}

/// The kernel itself, or a module by a name that it can have.
fn parse_object(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    if text.is_empty() || !text.chars().all(plain) {
        return Err("an object is `vmlinux`, or a module as `lsmod` names it".to_owned());
    }
    // As the kernel writes it (Linux v6.12 scripts/Makefile.lib, `name-fix-token`).
    Ok(text.replace('-', "_"))
}

/// Bytes from `4096`, `512K`, `256M` or `4G`.
fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, unit) = split_unit(text);
    let factor = match unit
        .to_ascii_uppercase()
        .trim_end_matches("IB")
        .trim_end_matches('B')
    {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return Err(format!("unknown unit `{unit}`; use K, M or G")),
    };
    let count: u64 = digits
        .parse()
        .map_err(|_| format!("`{text}` is not a size such as 512M"))?;
    count
        .checked_mul(factor)
        .ok_or_else(|| format!("`{text}` is more than can be counted"))
}

/// A duration from `500ms`, `10s` or `2m`; a bare number is seconds.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let (digits, unit) = split_unit(text);
    let count: u32 = digits
        .parse()
        .map_err(|_| format!("`{text}` is not a duration such as 10s"))?;
    let one = match unit {
        "ms" => Duration::from_millis(1),
        "s" | "" => Duration::from_secs(1),
        "m" => Duration::from_mins(1),
        _ => return Err(format!("unknown unit `{unit}`; use ms, s or m")),
    };
    one.checked_mul(count)
        .ok_or_else(|| format!("`{text}` is more than can be counted"))
}

/// A duration for callbacks.
fn parse_callback_limit(text: &str) -> Result<Duration, String> {
    let limit = parse_duration(text)?;
    let most = Duration::from_secs(10);
    if limit.is_zero() || limit > most {
        return Err("a callback may take more than nothing, and 10s at most".to_owned());
    }
    Ok(limit)
}

fn split_unit(text: &str) -> (&str, &str) {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    text.split_at(end)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_grammar_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_take_binary_units() {
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("4GiB"), Ok(4 << 30));
        assert!(parse_size("4X").is_err());
        assert!(parse_size("99999999999G").is_err());
        assert!(parse_size("").is_err());
    }

    #[test]
    fn a_module_is_named_as_the_kernel_names_it() {
        assert_eq!(parse_object("virtio-net").as_deref(), Ok("virtio_net"));
        for bad in ["", "a/b", "ext4.ko", ".."] {
            assert!(parse_object(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_take_units_and_a_bare_number_is_seconds() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("10"), Ok(Duration::from_secs(10)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        assert!(parse_duration("2h").is_err());
        assert!(parse_duration("-1s").is_err());
    }
}
