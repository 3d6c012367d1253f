//! A VM reached by the name the user gave, and the kernel found in it.

use std::path::PathBuf;
use std::time::Duration;

use vmpatch_introspect::modules::{Module, ModulePlace};
use vmpatch_introspect::stacks::Sleepers;
use vmpatch_introspect::target::{StopError, StopRequest, StoppedTarget};
use vmpatch_introspect::unwind::Unwinder;
use vmpatch_introspect::{AttachError, Deadline, GpaRange, Gva, Kernel, Roots, Target, Vcpu};
use vmpatch_patcher::arena::{Arena, Loaded, PatchRecord};
use vmpatch_patcher::quiescence::{self, BusyRanges, LiveKernel};
use vmpatch_patcher::unwind;
use vmpatch_vmm::client::{self, KvmTarget};

use crate::exit::Failure;
use crate::held::Held;

/// How often a stop is tried, and how long the guest runs in between.
const STOP_TRIES: u32 = 20;
const STOP_PAUSE: Duration = Duration::from_millis(50);

/// How often modules are read, and how long the guest is left alone in between.
const LOAD_TRIES: u32 = 5;
const LOAD_PAUSE: Duration = Duration::from_millis(20);

/// Connects to a running VM.
pub(crate) fn connect(id: &str) -> Result<KvmTarget, Failure> {
    Ok(KvmTarget::connect(id)?)
}

/// The folder of a running VM.
fn folder(id: &str) -> Result<PathBuf, Failure> {
    Ok(client::folder(id)?)
}

/// Patches that wait for a module of a running VM.
pub(crate) fn held(id: &str) -> Result<Held, Failure> {
    Ok(Held::of(&folder(id)?))
}

/// Registers of every vCPU, by a stop as short as can be.
pub(crate) fn registers(vm: &dyn Target) -> Result<Vec<Vcpu>, Failure> {
    at_one_moment(vm, |stopped| stopped.vcpus().to_vec())
}

/// What is seen in a stop in which nothing else is done.
fn at_one_moment<T>(
    vm: &dyn Target,
    see: impl FnOnce(&dyn StoppedTarget) -> T,
) -> Result<T, Failure> {
    let stopped = patient_stop(vm)?;
    let seen = see(&*stopped);
    stopped
        .resume()
        .map_err(|error| Failure::Unreachable(error.to_string()))?;
    Ok(seen)
}

/// A stop that nothing is written in. One vCPU that is late, as on a host with more to do than it has cores, is no reason to give
/// up what the user asked for: the guest is let go and stopped again, a few times.
pub(crate) fn patient_stop(vm: &dyn Target) -> Result<Box<dyn StoppedTarget + '_>, StopError> {
    for _ in 1..STOP_TRIES {
        match vm.stop(StopRequest::default()) {
            Err(StopError::Deadline { .. }) => std::thread::sleep(STOP_PAUSE),
            other => return other,
        }
    }
    vm.stop(StopRequest::default())
}

/// A VM with the kernel found in it.
pub(crate) struct Live {
    vm: KvmTarget,
    folder: PathBuf,
    /// Its vCPUs when it was found.
    vcpus: Vec<Vcpu>,
    /// Its kernel.
    pub(crate) kernel: Kernel,
}

impl Live {
    /// Connects, reads the registers, and finds the kernel while the guest runs on, by way of the page tables that
    /// its vCPUs used at one moment.
    pub(crate) fn attach(id: &str) -> Result<Self, Failure> {
        let vm = connect(id)?;
        let (vcpus, roots) = at_one_moment(&vm, |stopped| {
            let vcpus = stopped.vcpus().to_vec();
            let roots = Roots::copy(stopped.memory(), &vcpus);
            (vcpus, roots)
        })?;
        let kernel = Kernel::attach(&roots.over(&vm), &vcpus)?;
        Ok(Self {
            vm,
            folder: folder(id)?,
            vcpus,
            kernel,
        })
    }

    /// The machine.
    pub(crate) fn vm(&self) -> &KvmTarget {
        &self.vm
    }

    /// Which boot of the guest this is.
    pub(crate) fn boot(&self) -> &str {
        &self.kernel.identity.boot
    }

    /// An address in the kernel's own text, as function and offset.
    pub(crate) fn name(&self, at: Gva) -> Option<String> {
        let symbols = &self.kernel.symbols;
        let text = self.kernel.layout.text.contains(at);
        let (symbol, _) = symbols.containing(at).filter(|_| text)?;
        let offset = at.0.wrapping_sub(symbol.at.0);
        Some(format!("{}+{offset:#x}", symbol.name))
    }

    /// Loaded modules.
    pub(crate) fn modules(&self) -> Result<Vec<Module>, Failure> {
        Ok(patiently(|| self.kernel.modules(&self.vm))?)
    }

    /// Where the code of loaded modules lies. The guest may be changing its list just now: then once more, a few times.
    pub(crate) fn places(&self) -> Result<Vec<ModulePlace>, AttachError> {
        patiently(|| self.kernel.module_places(&self.vm, &as_in_a_stop()))
    }

    /// The unwind tables of the kernel, of these modules, and of all code in the arena.
    pub(crate) fn unwinder(&self, modules: &[ModulePlace]) -> Result<Unwinder, AttachError> {
        let mut unwinder = Unwinder::load(&self.kernel, &self.vm, modules)?;
        if let Ok(slot) = self.vm.arena() {
            unwind::cover(&mut unwinder, &self.kernel, &self.vm, slot);
        }
        Ok(unwinder)
    }

    /// What patches have put into the arena since the guest booted, applied or not; nothing where that cannot be read.
    pub(crate) fn placed(&self) -> Vec<PatchRecord> {
        let arena = self.vm.arena().ok();
        let arena = arena.and_then(|slot| Arena::open(&self.kernel, &self.vm, slot).ok());
        arena.map_or_else(Vec::new, |arena| arena.manifest().patches.clone())
    }

    /// The modules among whose places those of patches count.
    pub(crate) fn loaded<'a>(&self, places: &'a [ModulePlace]) -> Loaded<'a> {
        Loaded {
            places,
            space: Some(self.kernel.layout.space),
        }
    }

    /// Patches that wait for a module of this VM.
    pub(crate) fn held(&self) -> Held {
        Held::of(&self.folder)
    }

    /// Where this host keeps its journal of the VM. It outlives the VM's process; a later
    /// boot under the same id calls it stale.
    pub(crate) fn journal(&self) -> PathBuf {
        self.folder.join("journal")
    }

    /// The memory slot of the arena.
    pub(crate) fn arena(&self) -> Result<GpaRange, Failure> {
        self.vm.arena().map_err(Failure::refused)
    }
}

/// What the stack gate needs and can be had while the guest runs: unwind tables of the kernel and its modules, and the stacks of
/// the tasks that sleep.
pub(crate) struct Tables {
    unwinder: Unwinder,
    sleepers: Sleepers,
    practised: bool,
}

impl Tables {
    /// Copies the tables.
    pub(crate) fn load(live: &Live) -> Result<Self, Failure> {
        Ok(Self {
            unwinder: load(live)?,
            sleepers: Sleepers::default(),
            practised: false,
        })
    }

    /// Makes ready for a stop that follows at once, in which nothing may stand in the ranges. Stacks that cannot be read now,
    /// while the guest changes them, the stop itself will read.
    ///
    /// # Errors
    /// Unwind tables of a module that has come meanwhile cannot be read, and not only for a moment.
    pub(crate) fn refresh(&mut self, live: &Live, ranges: &BusyRanges) -> Result<(), AttachError> {
        let (kernel, vm) = (&live.kernel, live.vm());
        if !matches!(
            self.unwinder.is_current(kernel, vm, &as_in_a_stop()),
            Ok(true)
        ) {
            self.unwinder = load(live)?;
        }
        if !self.practised {
            self.practise(live, ranges);
            self.practised = true;
        }
        self.read_sleepers(live);
        Ok(())
    }

    /// Does once for nothing, on the running guest, what a stop will do: in a process that has just begun, what is done for the
    /// first time takes twice as long.
    fn practise(&mut self, live: &Live, ranges: &BusyRanges) {
        self.read_sleepers(live);
        let (witness, vm) = (self.witness(live), live.vm());
        let _ = quiescence::examine(&witness, vm, &live.vcpus, ranges, &as_in_a_stop());
    }

    fn read_sleepers(&mut self, live: &Live) {
        // Those before are dropped first: there may be many.
        self.sleepers = Sleepers::default();
        self.sleepers = Sleepers::read(&live.kernel, &self.unwinder, live.vm(), &as_in_a_stop());
    }

    /// What the stack gate asks.
    pub(crate) fn witness<'a>(&'a self, live: &'a Live) -> LiveKernel<'a> {
        LiveKernel {
            kernel: &live.kernel,
            unwinder: &self.unwinder,
            sleepers: Some(&self.sleepers),
        }
    }
}

/// As much time as a stop would have.
fn as_in_a_stop() -> Deadline {
    Deadline::within(StopRequest::for_change().examination())
}

fn load(live: &Live) -> Result<Unwinder, AttachError> {
    patiently(|| {
        let modules = live.kernel.module_places(live.vm(), &as_in_a_stop())?;
        live.unwinder(&modules)
    })
}

/// The guest may be changing its list of modules just now: then once more, a few times.
fn patiently<T>(once: impl Fn() -> Result<T, AttachError>) -> Result<T, AttachError> {
    for _ in 1..LOAD_TRIES {
        if let Ok(read) = once() {
            return Ok(read);
        }
        std::thread::sleep(LOAD_PAUSE);
    }
    once()
}
