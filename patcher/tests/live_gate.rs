//! The gate over dumps of stock kernels: whom it names is whom the guest's own `/proc/PID/stack` shows.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;
use std::path::PathBuf;

use vmpatch_introspect::unwind::Unwinder;
use vmpatch_introspect::{Deadline, Dump, GvaRange, Kernel};
use vmpatch_patcher::arena::{BusyKind, BusyRange};
use vmpatch_patcher::quiescence::{self, BusyRanges, Finding, LiveKernel, NotQuiet, Witness};

const DUMPS: [&str; 4] = [
    "debian-6.1",
    "debian-6.1-kernel",
    "debian-6.12",
    "debian-6.12-user",
];

/// The folder of dumps, if there is one.
fn folder() -> Option<PathBuf> {
    let folder = std::env::var_os("VMPATCH_DUMPS");
    if folder.is_none() {
        eprintln!("SKIPPED: VMPATCH_DUMPS names no folder of guest dumps; nothing was compared");
    }
    folder.map(PathBuf::from)
}

struct Guest {
    dump: Dump,
    kernel: Kernel,
    unwinder: Unwinder,
    proc_stacks: String,
}

impl Guest {
    fn open(folder: &std::path::Path) -> Self {
        let dump = Dump::open(folder).unwrap();
        let kernel = Kernel::attach(&dump, dump.vcpus()).unwrap();
        let modules = kernel.module_places(&dump, &Deadline::none()).unwrap();
        let unwinder = Unwinder::load(&kernel, &dump, &modules).unwrap();
        let proc_stacks = std::fs::read_to_string(folder.join("stacks.txt")).unwrap();
        Self {
            dump,
            kernel,
            unwinder,
            proc_stacks,
        }
    }

    fn witness(&self) -> LiveKernel<'_> {
        LiveKernel {
            kernel: &self.kernel,
            unwinder: &self.unwinder,
            sleepers: None,
        }
    }

    /// The tasks that the gate finds in a function.
    fn busy_in(&self, function: &str) -> BTreeSet<i32> {
        let start = self.kernel.symbols.unique(function).unwrap();
        let (_, end) = self.kernel.symbols.containing(start).unwrap();
        let range = GvaRange { start, end };
        let busy = BusyRange {
            range,
            function: function.to_owned(),
            kind: BusyKind::Old,
        };
        let ranges = BusyRanges::new([busy].iter(), &[]);
        let vcpus = self.dump.vcpus();
        let none = Deadline::none();
        match quiescence::examine(&self.witness(), &self.dump, vcpus, &ranges, &none) {
            Ok(_) => BTreeSet::new(),
            Err(NotQuiet::Busy(busy)) => {
                assert_eq!(busy.more, 0, "{busy}");
                busy.findings.iter().map(pid).collect()
            }
            Err(other) => panic!("{other}"),
        }
    }

    /// The tasks that the guest itself showed in a function.
    fn shown_in(&self, function: &str) -> BTreeSet<i32> {
        let blocks = self.proc_stacks.split("== ").skip(1);
        blocks
            .filter(|block| block.contains(&format!("] {function}+")))
            .map(|block| block.split_whitespace().next().unwrap().parse().unwrap())
            .collect()
    }
}

fn pid(finding: &Finding) -> i32 {
    match finding {
        Finding::InFunction {
            who,
            unreliable: None,
            ..
        } => who.task.as_ref().unwrap().pid,
        other => panic!("{other}"),
    }
}

#[test]
fn whom_the_gate_names_is_whom_the_guest_itself_shows() {
    let Some(folder) = folder() else { return };
    for name in DUMPS {
        let guest = Guest::open(&folder.join(name));
        for function in [
            "worker_thread",
            "rcu_gp_kthread",
            "kauditd_thread",
            "kcompactd",
        ] {
            let shown = guest.shown_in(function);
            assert_eq!(guest.busy_in(function), shown, "{function} in {name}");
        }
        assert!(guest.busy_in("worker_thread").len() > 5, "{name}");
    }
}

#[test]
fn a_function_that_nobody_is_in_is_quiet_and_every_stack_was_reliable() {
    let Some(folder) = folder() else { return };
    for name in DUMPS {
        let guest = Guest::open(&folder.join(name));
        assert_eq!(
            guest.busy_in("version_proc_show"),
            BTreeSet::new(),
            "{name}"
        );
    }
}

#[test]
fn another_boot_of_the_same_kernel_is_told_apart() {
    let Some(folder) = folder() else { return };
    let guests = DUMPS.map(|name| Guest::open(&folder.join(name)));
    for (one, guest) in guests.iter().enumerate() {
        for (other, memory) in guests.iter().enumerate() {
            let same = guest.witness().same_boot(&memory.dump);
            assert_eq!(same, one == other, "{} and {}", DUMPS[one], DUMPS[other]);
        }
    }
}
