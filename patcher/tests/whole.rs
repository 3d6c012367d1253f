//! The whole way on stock kernels: real patches, real guests from dumps, every phase from link to commit
//! and back. Only the machine is made of plain bytes.
#![allow(clippy::unwrap_used, clippy::panic)]

mod guests;

use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;
use vmpatch_introspect::target::StopRequest;
use vmpatch_introspect::unwind::Unwinder;
use vmpatch_introspect::{Deadline, Dump, Kernel, PhysicalMemory, Target};
use vmpatch_patcher::apply::{Attempt, Attempted, Change, Failure, Schedule, Unobserved};
use vmpatch_patcher::arena::Arena;
use vmpatch_patcher::link::{self, Plan};
use vmpatch_patcher::patch::file::PatchFile;
use vmpatch_patcher::quiescence::LiveKernel;
use vmpatch_patcher::rollback;
use vmpatch_patcher::status::{self, Ledger, State};
use vmpatch_patcher::testing::Machine;
use vmpatch_patcher::verify::verify;

/// Guests that the samples are built for.
const DUMPS: [&str; 2] = ["debian-6.12", "debian-6.12-user"];

struct Vm {
    machine: Machine,
    kernel: Kernel,
    unwinder: Unwinder,
    folder: TempDir,
}

impl Vm {
    fn open(folder: &Path) -> Self {
        let dump = Dump::open(folder).unwrap();
        let end = dump.ram().iter().map(|range| range.end.0).max().unwrap();
        let mut ram = vec![0; usize::try_from(end).unwrap()];
        for range in dump.ram() {
            let place = range.start.0 as usize..range.end.0 as usize;
            dump.read(range.start, &mut ram[place]).unwrap();
        }
        let machine = Machine::with(ram, dump.vcpus().to_vec());
        let kernel = Kernel::attach(&machine, dump.vcpus()).unwrap();
        let modules = kernel.module_places(&machine, &Deadline::none()).unwrap();
        let unwinder = Unwinder::load(&kernel, &machine, &modules).unwrap();
        let folder = tempfile::tempdir_in("/dev/shm")
            .or_else(|_| tempfile::tempdir())
            .unwrap();
        Self {
            machine,
            kernel,
            unwinder,
            folder,
        }
    }

    fn boot(&self) -> &str {
        &self.kernel.identity.boot
    }

    fn ledger(&self) -> Ledger {
        Ledger::open(self.folder.path(), &self.machine, self.boot()).unwrap()
    }

    fn apply(&self, file: &PatchFile) -> Result<Attempted, Failure> {
        let ledger = self.ledger();
        ledger
            .admit(&file.patch().name, &file.digest().to_string())
            .unwrap();
        let guest = link::Guest::new(&self.kernel, &self.machine);
        let slot = self.machine.arena().unwrap();
        let arena = Arena::open(&self.kernel, &self.machine, slot).unwrap();
        let plan = Plan::link(file, &guest, &arena).unwrap();
        let verified = verify(plan, &guest, &arena).unwrap();
        self.make(ledger, Change::apply(&verified, &self.machine)?)
    }

    fn rollback(&self, name: &str) -> Result<Attempted, Failure> {
        let ledger = self.ledger();
        let change = rollback::change(&ledger, name).unwrap();
        self.make(ledger, change)
    }

    fn make(&self, ledger: Ledger, change: Change) -> Result<Attempted, Failure> {
        let witness = LiveKernel {
            kernel: &self.kernel,
            unwinder: &self.unwinder,
            sleepers: None,
        };
        let intent = ledger.begin(change, &Unobserved)?;
        let placed = intent.place(&self.machine)?;
        let attempted = Schedule::until(Duration::ZERO).run(&Unobserved, || {
            let stopped = placed.stop(StopRequest::default())?;
            let quiet = stopped.check_stacks(&witness)?;
            Ok::<_, Attempt>(quiet.switch()?)
        });
        intent.conclude(&self.machine, attempted)
    }

    /// The kernel's text as it runs.
    fn text(&self) -> Vec<u8> {
        let range = self.kernel.layout.text;
        let mut text = vec![0; usize::try_from(range.size()).unwrap()];
        self.kernel
            .memory(&self.machine)
            .read(range.start, &mut text)
            .unwrap();
        text
    }

    fn state(&self, name: &str) -> Option<State> {
        let report = status::report(self.folder.path(), &self.machine, self.boot());
        assert!(report.notes.is_empty(), "{:?}", report.notes);
        report
            .patches
            .iter()
            .find(|patch| patch.name == name)
            .map(|patch| patch.state)
    }
}

fn each(check: impl Fn(&Vm, &[PatchFile])) {
    let samples = guests::samples();
    let Some(folder) = std::env::var_os("VMPATCH_DUMPS") else {
        eprintln!("SKIPPED: VMPATCH_DUMPS names no folder of guest dumps; nothing was patched");
        return;
    };
    for name in DUMPS.iter().filter(|_| !samples.is_empty()) {
        check(&Vm::open(&Path::new(&folder).join(name)), samples);
    }
}

#[test]
fn every_sample_is_applied_to_a_stock_kernel_and_rolled_back_to_the_same_text() {
    each(|vm, samples| {
        let text = vm.text();
        for file in samples {
            let name = &file.patch().name;
            for _ in 0..2 {
                let attempted = vm.apply(file).unwrap_or_else(|why| panic!("{name}: {why}"));
                assert!(attempted.applied.examined.stacks > 50, "{name}");
                assert_eq!(vm.state(name), Some(State::Applied), "{name}");
                assert!(vm.text() != text, "{name}");
                vm.rollback(name)
                    .unwrap_or_else(|why| panic!("{name}: {why}"));
                assert_eq!(vm.state(name), Some(State::NotApplied), "{name}");
                assert!(vm.text() == text, "{name}");
            }
        }
    });
}

#[test]
fn patches_of_different_functions_are_rolled_back_in_any_order() {
    each(|vm, samples| {
        let text = vm.text();
        let replaced = |file: &PatchFile| -> Vec<String> {
            file.patch()
                .replaced
                .iter()
                .map(|function| function.name.clone())
                .collect()
        };
        let first = &samples[0];
        let apart = |file: &&PatchFile| {
            !replaced(file)
                .iter()
                .any(|name| replaced(first).contains(name))
        };
        let second = samples.iter().find(apart).unwrap();
        vm.apply(first).unwrap();
        vm.apply(second).unwrap();
        vm.rollback(&first.patch().name).unwrap();
        assert_eq!(vm.state(&second.patch().name), Some(State::Applied));
        vm.rollback(&second.patch().name).unwrap();
        assert!(vm.text() == text);
    });
}
