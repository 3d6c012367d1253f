//! The whole way on stock kernels: real patches, real guests from dumps, every phase from link to commit
//! and back. Only the machine is made of plain bytes.
#![allow(clippy::unwrap_used, clippy::panic)]

mod guests;

use std::path::Path;
use std::time::Duration;

use guests::sleeper;
use tempfile::TempDir;
use vmpatch_introspect::modules::ModulePlace;
use vmpatch_introspect::stacks::{self, Stack};
use vmpatch_introspect::target::StopRequest;
use vmpatch_introspect::unwind::{Unreliable, Unwinder};
use vmpatch_introspect::{Deadline, Dump, Kernel, PhysicalMemory, Target};
use vmpatch_patcher::apply::{Attempted, Change, Failure, Schedule, Unobserved};
use vmpatch_patcher::arena::{Arena, Loaded, Manifest};
use vmpatch_patcher::link::layers::{Layers, Stacking};
use vmpatch_patcher::link::{self, Live, Plan};
use vmpatch_patcher::patch::file::PatchFile;
use vmpatch_patcher::quiescence::LiveKernel;
use vmpatch_patcher::rollback;
use vmpatch_patcher::status::{self, Known, Ledger, State};
use vmpatch_patcher::testing::Machine;
use vmpatch_patcher::unwind;
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

    fn places(&self) -> Vec<ModulePlace> {
        let no_end = Deadline::none();
        self.kernel.module_places(&self.machine, &no_end).unwrap()
    }

    fn loaded<'a>(&self, places: &'a [ModulePlace]) -> Loaded<'a> {
        let space = Some(self.kernel.layout.space);
        Loaded { places, space }
    }

    fn ledger(&self) -> Ledger {
        let places = self.places();
        let loaded = self.loaded(&places);
        Ledger::open(self.folder.path(), &self.machine, self.boot(), loaded).unwrap()
    }

    fn report(&self) -> status::Report {
        let places = self.places();
        let loaded = self.loaded(&places);
        status::report(self.folder.path(), &self.machine, self.boot(), loaded)
    }

    fn apply(&self, file: &PatchFile) -> Result<Attempted, Failure> {
        self.apply_as(Stacking::Upon, file)
    }

    /// Tables that cover the arena too.
    fn covered(&self) -> Unwinder {
        let places = self.places();
        let mut unwinder = Unwinder::load(&self.kernel, &self.machine, &places).unwrap();
        let slot = self.machine.arena().unwrap();
        unwind::cover(&mut unwinder, &self.kernel, &self.machine, slot);
        unwinder
    }

    fn stacks(&self, unwinder: &Unwinder) -> Vec<Stack> {
        let stopped = self.machine.stop(StopRequest::default()).unwrap();
        let no_end = Deadline::none();
        stacks::all(
            &self.kernel,
            unwinder,
            stopped.memory(),
            stopped.vcpus(),
            &no_end,
        )
        .unwrap()
    }

    fn apply_by(&self, unwinder: &Unwinder, file: &PatchFile) -> Result<Attempted, Failure> {
        let ledger = self.ledger();
        let change = self.change(file, &ledger.layers(Stacking::Upon).unwrap());
        self.make(ledger, change, unwinder)
    }

    fn apply_as(&self, stacking: Stacking, file: &PatchFile) -> Result<Attempted, Failure> {
        let ledger = self.ledger();
        ledger
            .admit(&file.patch().name, &file.digest().to_string(), stacking)
            .unwrap();
        let change = self.change(file, &ledger.layers(stacking).unwrap());
        self.make(ledger, change, &self.unwinder)
    }

    /// The change that applies a patch.
    fn change(&self, file: &PatchFile, layers: &Layers) -> Change {
        let modules = self.kernel.modules(&self.machine).unwrap();
        let places = self.places();
        let guest = link::Guest::new(&self.kernel, &self.machine)
            .with_modules(&modules)
            .with_places(&places);
        let slot = self.machine.arena().unwrap();
        let arena = Arena::open(&self.kernel, &self.machine, slot).unwrap();
        let plan = Plan::link(file, &guest, &arena, layers).unwrap();
        let verified = verify(plan, &guest, &arena).unwrap();
        Change::apply(&verified, &self.machine).unwrap()
    }

    fn rollback(&self, name: &str) -> Result<Attempted, Failure> {
        let ledger = self.ledger();
        let change = rollback::change(&ledger, name).unwrap();
        self.make(ledger, change, &self.unwinder)
    }

    fn make(
        &self,
        ledger: Ledger,
        change: Change,
        unwinder: &Unwinder,
    ) -> Result<Attempted, Failure> {
        let witness = LiveKernel {
            kernel: &self.kernel,
            unwinder,
            sleepers: None,
        };
        let intent = ledger.begin(change, &Unobserved)?;
        let placed = intent.place(&self.machine)?;
        let attempted = Schedule::until(Duration::ZERO).run(&Unobserved, || {
            let stopped = placed.stop(StopRequest::default())?;
            let quiet = stopped.check_stacks(&witness)?;
            quiet.switch()
        });
        intent.conclude(&self.machine, attempted)
    }

    /// The text of the kernel and its modules as it runs.
    fn text(&self) -> Vec<u8> {
        let modules = self.places().into_iter().map(|module| module.text);
        let memory = self.kernel.memory(&self.machine);
        let mut all = Vec::new();
        for range in std::iter::once(self.kernel.layout.text).chain(modules) {
            let mut text = vec![0; usize::try_from(range.size()).unwrap()];
            memory.read(range.start, &mut text).unwrap();
            all.extend(text);
        }
        all
    }

    /// Takes a module off the guest's list, as unloading it does.
    fn unload(&self, name: &str) {
        let modules = self.kernel.modules(&self.machine).unwrap();
        let module = modules.iter().find(|module| module.name == name).unwrap();
        let list = self.kernel.types.offset_of("module", "list").unwrap();
        let memory = self.kernel.memory(&self.machine);
        let links = module.at.wrapping_add(list);
        let next = memory.read_pointer(links).unwrap();
        let previous = memory.read_pointer(links.wrapping_add(8)).unwrap();
        for (at, value) in [(previous, next), (next.wrapping_add(8), previous)] {
            let space = self.kernel.layout.space;
            let place = space.translate(&self.machine, at).unwrap().unwrap().at;
            self.machine.set(place, &value.0.to_le_bytes());
        }
    }

    fn manifest(&self) -> Manifest {
        let slot = self.machine.arena().unwrap();
        let arena = Arena::open(&self.kernel, &self.machine, slot).unwrap();
        arena.manifest().clone()
    }

    fn state(&self, name: &str) -> Option<State> {
        let report = self.report();
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

#[test]
fn a_patch_of_a_module_goes_with_it_and_what_it_does_elsewhere_stays() {
    each(|vm, samples| {
        let named = |name: &str| samples.iter().find(|it| it.patch().name == name).unwrap();
        let (of_module, other) = (named("dummy-length"), named("proc-version"));
        vm.apply(of_module).unwrap();
        vm.apply(other).unwrap();
        vm.unload("dummy");
        assert_eq!(vm.state("dummy-length"), Some(State::NotApplied));
        assert_eq!(vm.state("proc-version"), Some(State::Applied));
        let gone = rollback::change(&vm.ledger(), "dummy-length").unwrap_err();
        let gone = gone.to_string();
        assert!(gone.contains("it went with module dummy"), "{gone}");
        let unwinder = Unwinder::load(&vm.kernel, &vm.machine, &vm.places()).unwrap();
        let ledger = vm.ledger();
        let change = rollback::change(&ledger, "proc-version").unwrap();
        vm.make(ledger, change, &unwinder).unwrap();
        assert_eq!(vm.state("proc-version"), Some(State::NotApplied));
    });
}

#[test]
fn a_module_that_leaves_between_linking_and_the_stop_is_not_touched() {
    each(|vm, samples| {
        let of_module = samples
            .iter()
            .find(|it| it.patch().name == "dummy-length")
            .unwrap();
        let layers = vm.ledger().layers(Stacking::Upon).unwrap();
        let change = vm.change(of_module, &layers);
        vm.unload("dummy");
        let text = vm.text();
        let unwinder = Unwinder::load(&vm.kernel, &vm.machine, &vm.places()).unwrap();
        let edits = change.edits().to_vec();
        let failed = vm.make(vm.ledger(), change, &unwinder).unwrap_err();
        assert!(failed.to_string().contains("module dummy"), "{failed}");
        assert!(vm.text() == text);
        for edit in edits {
            let mut now = vec![0; edit.old.len()];
            vm.machine.read(edit.at, &mut now).unwrap();
            assert_eq!(now, edit.old);
        }
    });
}

/// The patch of that name.
fn sample<'a>(samples: &'a [PatchFile], name: &str) -> &'a PatchFile {
    samples
        .iter()
        .find(|file| file.patch().name == name)
        .unwrap()
}

#[test]
fn a_hook_is_placed_once_and_goes_with_the_last_patch_that_needs_it() {
    each(|vm, samples| {
        let text = vm.text();
        let changes = |now: &[u8]| now.iter().zip(&text).filter(|(a, b)| a != b).count();
        let warns = sample(samples, "loadavg-warn");
        let faults = sample(samples, "uptime-fault");
        vm.apply(warns).unwrap();
        let one = changes(&vm.text());
        vm.apply(faults).unwrap();
        let both = changes(&vm.text());
        vm.rollback("loadavg-warn").unwrap();
        let hooks: Vec<_> = vm.manifest().patches[1].hooks.clone();
        let names: Vec<_> = hooks.iter().map(|hook| hook.function.as_str()).collect();
        assert_eq!(names, ["find_bug", "search_exception_tables"]);
        for hook in &hooks {
            assert!(hook.is_in_place(&vm.machine).unwrap(), "{}", hook.function);
        }
        assert!(one > 5 && both > one && changes(&vm.text()) < both);
        // The way in again is as the first time, with the hook of the other.
        vm.apply(warns).unwrap();
        assert_eq!(changes(&vm.text()), both);
        assert_eq!(vm.manifest().patches.len(), 2);
        vm.rollback("uptime-fault").unwrap();
        assert!(hooks[0].is_in_place(&vm.machine).unwrap());
        assert!(!hooks[1].is_in_place(&vm.machine).unwrap());
        assert_eq!(changes(&vm.text()), one);
        vm.rollback("loadavg-warn").unwrap();
        assert!(vm.text() == text);
    });
}

/// Its own frame is met either way; what else it has on its stack counts only where the stack cannot be followed.
#[test]
fn a_task_that_sleeps_in_new_code_hinders_only_what_it_stands_in() {
    each(|vm, samples| {
        let (slept_in, other) = (sample(samples, "proc-version"), sample(samples, "getuid"));
        vm.apply(slept_in).unwrap();
        let covered = vm.covered();
        let record = &vm.manifest().patches[0];
        let new = record.busy_for_rollback().next().unwrap();
        let place = sleeper::behind_a_call(&vm.kernel, &vm.machine, &covered, new.range);
        let replaced = &other.patch().replaced[0].name;
        let stale = vm.kernel.symbols.unique(replaced).unwrap();
        let stacks = vm.stacks(&covered);
        let stale = stale.wrapping_add(9);
        let pid = sleeper::puts(&vm.kernel, &vm.machine, &stacks, place, stale);

        let of_task = |unwinder: &Unwinder| {
            let mut stacks = vm.stacks(unwinder).into_iter();
            let is_its = |it: &Stack| it.task.as_ref().is_some_and(|task| task.pid == pid);
            stacks.find(is_its).unwrap().trace
        };
        let before = stacks
            .iter()
            .map(|it| it.task.as_ref().map(|task| (task.pid, &it.trace)));
        let (_, before) = before.flatten().find(|(it, _)| *it == pid).unwrap();
        let unknown = of_task(&vm.unwinder).unreliable;
        assert_eq!(unknown, Some(Unreliable::NoUnwindData(place.0)));
        let followed = of_task(&covered);
        assert_eq!(followed.unreliable, None);
        let (at, whole): (Vec<_>, Vec<_>) = followed.frames.iter().map(|it| (it.at, it)).unzip();
        assert_eq!(at.len(), before.frames.len() + 1);
        assert_eq!(at.iter().filter(|at| **at == place.0).count(), 1);
        assert_eq!(
            whole.last(),
            before.frames.iter().collect::<Vec<_>>().last()
        );

        let busy = vm.apply(other).unwrap_err().to_string();
        assert!(
            busy.contains(&format!("{pid}")) && busy.contains(replaced),
            "{busy}"
        );
        vm.apply_by(&covered, other).unwrap();
        let ledger = vm.ledger();
        let change = rollback::change(&ledger, "proc-version").unwrap();
        let busy = vm.make(ledger, change, &covered).unwrap_err().to_string();
        assert!(
            busy.contains(&format!("{pid}")) && busy.contains("version_proc_show"),
            "{busy}"
        );
    });
}

/// The same content under another name, which is another patch.
fn renamed(file: &PatchFile, name: &str) -> PatchFile {
    let mut patch = file.patch().clone();
    name.clone_into(&mut patch.name);
    PatchFile::new(patch).unwrap()
}

#[test]
fn a_patch_that_replaces_all_others_undoes_them_in_its_stop_and_is_rolled_back_to_the_kernels_own_text()
 {
    each(|vm, samples| {
        let text = vm.text();
        let upper = renamed(sample(samples, "proc-version"), "upper");
        let new = renamed(sample(samples, "proc-version"), "new");
        vm.apply(&new).unwrap();
        let alone = vm.text();
        vm.rollback("new").unwrap();
        let others = [
            "loadavg-warn",
            "uptime-fault",
            "dummy-length",
            "proc-version",
        ];
        for name in others {
            vm.apply(sample(samples, name)).unwrap();
        }
        vm.apply(&upper).unwrap();
        let stops = vm.machine.stops();
        vm.apply_as(Stacking::Replace, &new).unwrap();
        assert_eq!(vm.machine.stops(), stops + 1);
        assert_eq!(vm.state("new"), Some(State::Applied));
        for name in others.iter().chain(&["upper"]) {
            assert_eq!(vm.state(name), Some(State::NotApplied), "{name}");
            let said = vm.report().patches;
            let said = said.into_iter().find(|it| it.name == *name).unwrap();
            let by = said.last.unwrap().replaced_by;
            assert_eq!(by.as_deref(), Some("new"), "{name}");
        }
        // But for where the jumps lead.
        let changed = |now: &[u8]| -> Vec<usize> {
            let bytes = now.iter().zip(&text).enumerate();
            bytes
                .filter(|(_, (a, b))| a != b)
                .map(|(at, _)| at)
                .collect()
        };
        let (now, alone) = (changed(&vm.text()), changed(&alone));
        assert!(now.len() < 8 && now.iter().zip(&alone).all(|(a, b)| a.abs_diff(*b) < 5));
        vm.rollback("new").unwrap();
        assert!(vm.text() == text);
    });
}

#[test]
fn a_patch_that_replaces_others_keeps_the_hooks_that_it_needs_and_no_other() {
    each(|vm, samples| {
        let text = vm.text();
        vm.apply(sample(samples, "loadavg-warn")).unwrap();
        vm.apply(sample(samples, "uptime-fault")).unwrap();
        let new = renamed(sample(samples, "loadavg-warn"), "new");
        vm.apply_as(Stacking::Replace, &new).unwrap();
        let hooks = &vm.manifest().patches[1].hooks;
        let in_place = |at: usize| hooks[at].is_in_place(&vm.machine).unwrap();
        assert_eq!((in_place(0), in_place(1)), (true, false));
        vm.rollback("new").unwrap();
        assert!(vm.text() == text);
    });
}

#[test]
fn a_hook_that_somebody_took_out_is_told_of() {
    each(|vm, samples| {
        let text = vm.text();
        vm.apply(sample(samples, "loadavg-warn")).unwrap();
        assert!(!vm.report().needs_attention());
        let hook = vm.manifest().patches[0].hooks[0].clone();
        for edit in &hook.edits {
            vm.machine.set(edit.at, &edit.old);
        }
        let said = vm.report();
        assert!(said.needs_attention());
        assert_eq!(said.patches[0].state, State::Applied);
        assert_eq!(said.patches[0].damage[0].function, "find_bug");
        // The way out stays open.
        vm.rollback("loadavg-warn").unwrap();
        assert!(vm.text() == text);
    });
}

#[test]
fn a_look_up_that_the_guest_itself_has_changed_is_not_hooked() {
    each(|vm, samples| {
        let guest = link::Guest::new(&vm.kernel, &vm.machine);
        let at = vm.kernel.symbols.unique("find_bug").unwrap();
        let head = guest.bytes(at, 4).unwrap();
        let mark = [[0xf3, 0x0f, 0x1e, 0xfa], [0x66, 0x0f, 0x1f, 0x00]];
        let entry = if mark.iter().any(|it| head == it) {
            4
        } else {
            0
        };
        let place = guest.physical(at.wrapping_add(entry)).unwrap();
        // A breakpoint, and the jump that it becomes.
        for there in [&[0xcc][..], &[0xe9, 1, 2, 3, 4]] {
            let before = guest.bytes(at.wrapping_add(entry), there.len()).unwrap();
            vm.machine.set(place, there);
            let slot = vm.machine.arena().unwrap();
            let arena = Arena::open(&vm.kernel, &vm.machine, slot).unwrap();
            let layers = Layers::of(&Known::default(), Stacking::Upon).unwrap();
            let refused = Plan::link(sample(samples, "loadavg-warn"), &guest, &arena, &layers);
            let refused = refused.map(|_| ()).unwrap_err().to_string();
            assert!(refused.contains("`find_bug` cannot be hooked"), "{refused}");
            vm.machine.set(place, &before);
        }
    });
}
