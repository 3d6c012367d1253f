//! Callbacks: functions of a patch that one vCPU executes within the stop, while all others stand. Owns on which vCPU, and
//! what its end means; the machine makes the call, and the [`stage`] is what it stands on.
//!
//! Why this vCPU and not that one. A callback runs as an interrupt handler would: interrupts off, on the CPU's own per-CPU
//! area, `current` being whoever was interrupted. So it must be a vCPU that would take an interrupt now, and the less its
//! CPU is in the middle of, the better: in user mode it holds no lock and reads nothing under RCU; in the idle loop it holds
//! none either, but RCU does not watch it, which is harmless as long as no other CPU runs; elsewhere in the kernel it may hold
//! a lock that the callback wants, and the callback's time then ends without it.

use std::fmt;
use std::time::Duration;

use vmpatch_introspect::call::{Call, CallError, Called};
use vmpatch_introspect::target::MemoryError;
use vmpatch_introspect::{
    Activity, AddressSpace, Gpa, GpaRange, Gva, GvaRange, Kernel, PhysicalMemory, StoppedTarget,
    Target, Vcpu,
};

use crate::arena::{CallbackRecord, PatchRecord, stage};
use crate::patch::CallbackKind;

/// How long a callback may take, unless another time is asked for.
pub const BUDGET: Duration = Duration::from_millis(10);
/// RFLAGS.IF.
const INTERRUPTS: u64 = 1 << 9;
/// Vectors of #DB and #PF.
const DEBUG: u8 = 1;
const PAGE_FAULT: u8 = 14;
/// The function that a kernel gives a CPU away by; all that sleeps comes to it (Linux v6.12 kernel/sched/core.c).
const SCHEDULER: &str = "__schedule";
/// What the idle loop halts in (Linux v6.12 include/linux/cpu.h, `cpu_in_idle`).
const IDLE_TEXT: [&str; 2] = ["__cpuidle_text_start", "__cpuidle_text_end"];

/// What calls need to know of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The arena's slot.
    pub slot: GpaRange,
    /// Top of the kernel's own page tables, which map no user memory, and whether they have five levels.
    pub page_tables: (Gpa, bool),
    /// Per-CPU areas.
    pub per_cpu: Vec<Gva>,
    /// The entry of [`SCHEDULER`].
    pub scheduler: Gva,
    /// Per-CPU address of the count of preemption switched off; `None` on a kernel that does not count.
    pub preempt_count: Option<Gva>,
    /// The idle loop's own text, where it is known.
    pub idle: Option<GvaRange>,
    /// How long one call may take.
    pub budget: Duration,
}

/// Why no callback can be called in a guest.
#[derive(Debug, thiserror::Error)]
pub enum CallerError {
    /// Its machine cannot.
    #[error("the patch has callbacks, and this kind of VM cannot call functions of its guest")]
    Machine,
    /// A callback that sleeps could not be told.
    #[error("the patch has callbacks, and the guest's `{SCHEDULER}` was not found")]
    Scheduler,
    /// There is no place for it.
    #[error(transparent)]
    Arena(#[from] vmpatch_introspect::target::ArenaError),
}

/// A callback, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// When it is called.
    pub kind: CallbackKind,
    /// Its function.
    pub function: String,
}

/// An address of code, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The address.
    pub at: Gva,
    /// Function and offset, where known.
    pub name: Option<String>,
}

/// How a callback failed, or why it was not called.
#[derive(Debug, thiserror::Error)]
pub enum CallbackError {
    /// It said no.
    #[error("{callback} refused: it returned {}{}", returned(*value), hint(callback))]
    Refused {
        /// Which.
        callback: Named,
        /// What it returned.
        value: i32,
    },
    /// An exception or interrupt came.
    #[error("{callback} was ended by {what} at {at}{}{}", kept(), hint(callback))]
    Trapped {
        /// Which.
        callback: Named,
        /// What the CPU met, for people.
        what: String,
        /// Where.
        at: Place,
    },
    /// It took too long.
    #[error(
        "{callback} did not return within {budget:?}, it was at {at}{}{}",
        kept(),
        hint(callback)
    )]
    Late {
        /// Which.
        callback: Named,
        /// What it had.
        budget: Duration,
        /// Where it was.
        at: Place,
    },
    /// The vCPU could not go on.
    #[error("{callback} ended at {at}: {what}{}{}", kept(), hint(callback))]
    Stuck {
        /// Which.
        callback: Named,
        /// Where it was.
        at: Place,
        /// What the machine says.
        what: String,
    },
    /// No vCPU was in a state for it.
    #[error("no vCPU can be made to call {callback} now: {why}")]
    NoVcpu {
        /// Which.
        callback: Named,
        /// What the last one was in.
        why: String,
    },
    /// Nobody has found out what calls need.
    #[error("{callback} cannot be called: nothing is known of the guest that calls need")]
    Unprepared {
        /// Which.
        callback: Named,
    },
    /// The guest has changed what a call stands on.
    #[error("{callback} cannot be called: the arena's pages for it are not as they were written")]
    Stage {
        /// Which.
        callback: Named,
    },
    /// The arena cannot be read.
    #[error("arena: {0}")]
    Read(#[from] MemoryError),
    /// The machine failed.
    #[error(transparent)]
    Machine(#[from] CallError),
}

impl Caller {
    /// Finds out what calls need.
    ///
    /// # Errors
    /// [`CallerError`].
    pub fn of(kernel: &Kernel, vm: &dyn Target, budget: Duration) -> Result<Self, CallerError> {
        if !vm.can_call() {
            return Err(CallerError::Machine);
        }
        let symbol = |name| kernel.symbols.unique(name).ok();
        let idle = IDLE_TEXT.map(symbol);
        let idle = match idle {
            [Some(start), Some(end)] => Some(GvaRange { start, end }),
            _ => None,
        };
        let space = kernel.layout.space;
        Ok(Self {
            slot: vm.arena()?,
            page_tables: (space.root.page_base(), space.five_level),
            per_cpu: kernel
                .layout
                .per_cpu_offset
                .iter()
                .copied()
                .map(Gva)
                .collect(),
            scheduler: symbol(SCHEDULER).ok_or(CallerError::Scheduler)?,
            idle,
            preempt_count: preempt_count(kernel),
            budget,
        })
    }

    /// vCPUs that may be asked, with their per-CPU areas, the best first.
    fn candidates(&self, vcpus: &[Vcpu]) -> Vec<(u32, Gva)> {
        let fit = |vcpu: &&Vcpu| {
            vcpu.activity != Activity::WaitingForSipi
                && !vcpu.smm
                && !vcpu.nested_guest
                && vcpu.rflags & INTERRUPTS != 0
                && vcpu.five_level_paging() == self.page_tables.1
        };
        let mut fit: Vec<_> = vcpus
            .iter()
            .filter(fit)
            .filter_map(|vcpu| Some((self.occupation(vcpu), vcpu.index, self.area(vcpu)?)))
            .collect();
        fit.sort_by_key(|(occupation, index, _)| (*occupation, *index));
        fit.into_iter()
            .map(|(_, index, area)| (index, area))
            .collect()
    }

    /// How much of a vCPU's own doing a callback would be in the middle of.
    fn occupation(&self, vcpu: &Vcpu) -> u8 {
        let idles = self.idle.is_some_and(|idle| idle.contains(vcpu.rip));
        match (vcpu.in_kernel(), idles) {
            (false, _) => 0,
            (true, true) => 1,
            (true, false) => 2,
        }
    }

    /// The per-CPU area that a vCPU uses in the kernel: one of the two GS bases, by where it is.
    fn area(&self, vcpu: &Vcpu) -> Option<Gva> {
        let bases = [Some(vcpu.gs_base), vcpu.kernel_gs_base];
        let mut bases = bases.into_iter().flatten();
        bases.find(|base| self.per_cpu.contains(base))
    }

    /// Whether a vCPU can be asked.
    ///
    /// # Errors
    /// [`CallbackError::NoVcpu`].
    pub(super) fn is_ready(
        &self,
        vcpus: &[Vcpu],
        callback: &CallbackRecord,
    ) -> Result<(), CallbackError> {
        match self.candidates(vcpus).is_empty() {
            true => Err(no_vcpu(callback, "none would take an interrupt")),
            false => Ok(()),
        }
    }

    /// Calls a callback of a patch.
    ///
    /// # Errors
    /// [`CallbackError`].
    pub(super) fn call(
        &self,
        target: &mut dyn StoppedTarget,
        patch: &PatchRecord,
        callback: &CallbackRecord,
    ) -> Result<(), CallbackError> {
        if !stage::is_set(target.memory(), self.slot)? {
            let callback = callback.into();
            return Err(CallbackError::Stage { callback });
        }
        let mut why = no_vcpu(callback, "none would take an interrupt");
        for (vcpu, area) in self.candidates(target.vcpus()) {
            let mut call = self.prepared(vcpu, area, callback.at);
            call.preempt_count = self.preempt_count_of(area, target.memory());
            match target.call(&call) {
                Ok(called) => return self.judge(called, target.memory(), patch, callback),
                Err(CallError::Unfit { why: it, .. }) => why = no_vcpu(callback, &it),
                Err(error) => return Err(error.into()),
            }
        }
        Err(why)
    }

    const fn prepared(&self, vcpu: u32, area: Gva, function: Gva) -> Call {
        let nowhere = Gva(0);
        let mut call = Call {
            vcpu,
            function,
            stack: nowhere,
            page_tables: self.page_tables.0,
            gs_base: area,
            gates: nowhere,
            idt: nowhere,
            gdt: nowhere,
            tss: nowhere,
            forbidden: self.scheduler,
            preempt_count: None,
            budget: self.budget,
        };
        stage::put_on(&mut call);
        call
    }

    /// Where the count of a CPU lies.
    fn preempt_count_of(&self, area: Gva, memory: &dyn PhysicalMemory) -> Option<Gpa> {
        let at = area.wrapping_add(self.preempt_count?.0);
        let (root, five_level) = self.page_tables;
        let space = AddressSpace { root, five_level };
        space.translate(memory, at).ok().flatten().map(|it| it.at)
    }

    fn judge(
        &self,
        called: Called,
        memory: &dyn PhysicalMemory,
        patch: &PatchRecord,
        callback: &CallbackRecord,
    ) -> Result<(), CallbackError> {
        let (named, place) = (Named::from(callback), |at| Place::of(patch, at));
        Err(match called {
            Called::Returned(value) => {
                // An `int`: the upper half of the register says nothing.
                let value = value as i32;
                if value == 0 || !callback.kind.may_refuse() {
                    return Ok(());
                }
                let callback = named;
                CallbackError::Refused { callback, value }
            }
            Called::Trapped { vector, frame, cr2 } => {
                let at = stage::trapped_at(memory, self.slot, vector, frame).unwrap_or_default();
                CallbackError::Trapped {
                    callback: named,
                    what: self.trap(vector, at, cr2),
                    at: place(at),
                }
            }
            Called::Late { at } => CallbackError::Late {
                callback: named,
                budget: self.budget,
                at: place(at),
            },
            Called::Stuck { at, what } => CallbackError::Stuck {
                callback: named,
                at: place(at),
                what,
            },
        })
    }

    fn trap(&self, vector: u8, at: Gva, cr2: u64) -> String {
        match vector {
            DEBUG if at == self.scheduler => {
                "an attempt to sleep, which no callback may,".to_owned()
            }
            PAGE_FAULT => format!("a page fault (on {cr2:#x})"),
            32.. => format!("interrupt {vector}, which it had let in,"),
            _ => match EXCEPTIONS.get(usize::from(vector)) {
                Some(name) => format!("exception {vector} ({name})"),
                None => format!("exception {vector}"),
            },
        }
    }
}

/// A variable of its own (Linux v6.1 arch/x86/include/asm/preempt.h), or a member of `pcpu_hot` (v6.12
/// arch/x86/include/asm/current.h).
fn preempt_count(kernel: &Kernel) -> Option<Gva> {
    let own = kernel.symbols.unique("__preempt_count").ok();
    own.or_else(|| {
        let hot = kernel.symbols.unique("pcpu_hot").ok()?;
        let member = kernel.types.member("pcpu_hot", "preempt_count").ok()?;
        Some(hot.wrapping_add(member.offset))
    })
}

/// Names of exceptions (Intel SDM vol. 3 section 6.3.1, table 6-1).
const EXCEPTIONS: [&str; 20] = [
    "divide error",
    "debug",
    "NMI",
    "breakpoint",
    "overflow",
    "bound range",
    "invalid opcode, as of WARN and BUG",
    "no floating point",
    "double fault",
    "coprocessor overrun",
    "invalid TSS",
    "segment not present",
    "stack fault",
    "general protection",
    "page fault",
    "reserved",
    "floating point error",
    "alignment check",
    "machine check",
    "SIMD error",
];

/// Names of error numbers (Linux v6.12 include/uapi/asm-generic/errno-base.h), from 1.
const ERRNOS: [&str; 34] = [
    "EPERM", "ENOENT", "ESRCH", "EINTR", "EIO", "ENXIO", "E2BIG", "ENOEXEC", "EBADF", "ECHILD",
    "EAGAIN", "ENOMEM", "EACCES", "EFAULT", "ENOTBLK", "EBUSY", "EEXIST", "EXDEV", "ENODEV",
    "ENOTDIR", "EISDIR", "EINVAL", "ENFILE", "EMFILE", "ENOTTY", "ETXTBSY", "EFBIG", "ENOSPC",
    "ESPIPE", "EROFS", "EMLINK", "EPIPE", "EDOM", "ERANGE",
];

/// A value that was returned, by the name of the error it stands for.
fn returned(value: i32) -> String {
    let index = value.checked_neg().and_then(|it| usize::try_from(it).ok());
    match index.and_then(|it| ERRNOS.get(it.checked_sub(1)?)) {
        Some(name) => format!("-{name} ({value})"),
        None => value.to_string(),
    }
}

/// What is said of every callback that was begun and not ended.
const fn kept() -> &'static str {
    "; the kernel's text is as before, what it wrote until then stays"
}

/// The way out for who rolls back.
const fn hint(callback: &Named) -> &'static str {
    match callback.kind {
        CallbackKind::PreApply | CallbackKind::PostApply => "",
        CallbackKind::PreRollback | CallbackKind::PostRollback => {
            "; `rollback --skip-callbacks` does without"
        }
    }
}

fn no_vcpu(callback: &CallbackRecord, why: &str) -> CallbackError {
    CallbackError::NoVcpu {
        callback: callback.into(),
        why: why.to_owned(),
    }
}

impl CallbackError {
    pub(super) fn unprepared(callback: &CallbackRecord) -> Self {
        let callback = callback.into();
        Self::Unprepared { callback }
    }

    /// Whether some of it was executed, so that something in the guest may know of the patch's code and data.
    #[must_use]
    pub const fn has_run(&self) -> bool {
        matches!(
            self,
            Self::Refused { .. }
                | Self::Trapped { .. }
                | Self::Late { .. }
                | Self::Stuck { .. }
                | Self::Machine(CallError::NotRestored { .. } | CallError::Unreachable(_))
        )
    }

    /// Names the place in the kernel that it tells of, if it is not one of the patch's.
    pub fn name_place(&mut self, name: impl Fn(Gva) -> Option<String>) {
        if let Self::Trapped { at, .. } | Self::Late { at, .. } | Self::Stuck { at, .. } = self
            && at.name.is_none()
        {
            at.name = name(at.at);
        }
    }
}

impl From<&CallbackRecord> for Named {
    fn from(record: &CallbackRecord) -> Self {
        Self {
            kind: record.kind,
            function: record.function.clone(),
        }
    }
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "callback {} (`{}`)", self.kind, self.function)
    }
}

impl Place {
    /// An address in a patch's own code, by name; any other only as it is.
    fn of(patch: &PatchRecord, at: Gva) -> Self {
        let mut ranges = patch.busy_for_rollback();
        let found = ranges.find(|busy| busy.range.contains(at));
        let name = found.map(|busy| {
            let offset = at.0.wrapping_sub(busy.range.start.0);
            format!("{}+{offset:#x}", busy.function)
        });
        Self { at, name }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "{name}"),
            None => write!(f, "{}", self.at),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::machine::{vcpu_in_kernel, vcpu_in_user_mode};

    const AREAS: [Gva; 2] = [Gva(0xffff_8880_1000_0000), Gva(0xffff_8880_2000_0000)];
    const IDLE: GvaRange = GvaRange {
        start: Gva(0xffff_ffff_8200_0000),
        end: Gva(0xffff_ffff_8200_1000),
    };

    fn caller() -> Caller {
        Caller {
            slot: GpaRange::sized(Gpa(1 << 32), 4 << 20).unwrap(),
            page_tables: (Gpa(0x1000), false),
            per_cpu: AREAS.to_vec(),
            scheduler: Gva(0xffff_ffff_8100_0000),
            idle: Some(IDLE),
            preempt_count: None,
            budget: BUDGET,
        }
    }

    fn user(index: u32, area: Gva) -> Vcpu {
        Vcpu {
            kernel_gs_base: Some(area),
            ..vcpu_in_user_mode(index)
        }
    }

    fn kernel(index: u32, rip: Gva, area: Gva) -> Vcpu {
        Vcpu {
            gs_base: area,
            ..vcpu_in_kernel(index, rip)
        }
    }

    #[test]
    fn one_in_user_mode_is_asked_before_one_that_idles_and_that_before_one_at_work() {
        let at_work = kernel(0, Gva(0xffff_ffff_8100_1234), AREAS[0]);
        let idles = kernel(1, IDLE.start, AREAS[1]);
        let asked = |vcpus: &[Vcpu]| -> Vec<u32> {
            let candidates = caller().candidates(vcpus);
            candidates.into_iter().map(|(index, _)| index).collect()
        };
        assert_eq!(asked(&[at_work, idles]), [1, 0]);
        assert_eq!(asked(&[at_work, user(1, AREAS[1])]), [1, 0]);
        let idles = Vcpu { index: 0, ..idles };
        assert_eq!(asked(&[idles, user(1, AREAS[1])]), [1, 0]);
    }

    #[test]
    fn none_is_asked_that_takes_no_interrupt_or_whose_cpu_is_not_known() {
        let good = user(0, AREAS[0]);
        assert_eq!(caller().candidates(&[good]), [(0, AREAS[0])]);
        for bad in [
            Vcpu { rflags: 2, ..good },
            Vcpu { smm: true, ..good },
            Vcpu {
                nested_guest: true,
                ..good
            },
            Vcpu {
                activity: Activity::WaitingForSipi,
                ..good
            },
            Vcpu {
                kernel_gs_base: None,
                ..good
            },
            Vcpu {
                cr4: 1 << 12,
                ..good
            },
        ] {
            assert!(caller().candidates(&[bad]).is_empty(), "{bad:?}");
        }
    }

    #[test]
    fn what_is_returned_is_an_int_and_named_as_an_error() {
        for (value, said) in [
            (-16, "-EBUSY (-16)"),
            (-1, "-EPERM (-1)"),
            (-34, "-ERANGE (-34)"),
            (-35, "-35"),
            (1, "1"),
            (i32::MIN, "-2147483648"),
        ] {
            assert_eq!(returned(value), said);
        }
    }

    #[test]
    fn traps_are_named_for_what_a_callback_did() {
        let caller = caller();
        let trap = |vector, at| caller.trap(vector, at, 0x10);
        assert!(trap(1, caller.scheduler).contains("sleep"));
        assert!(trap(1, Gva(0)).contains("debug"));
        assert!(trap(6, Gva(0)).contains("WARN"));
        assert!(trap(14, Gva(0)).contains("0x10"));
        assert!(trap(31, Gva(0)).contains("31"));
        assert!(trap(236, Gva(0)).contains("interrupt 236"));
    }
}
