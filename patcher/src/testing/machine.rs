//! A machine of plain bytes: RAM, an arena slot, vCPUs that are numbers, and faults that strike once.
//!
//! ```text
//!   running ── stop ──▶ stopped ── resume ──▶ running, writes kept
//!                          │
//!                          └── drop ─▶ running, writes undone     (stuck, if the undo failed)
//! ```

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use vmpatch_introspect::target::{
    ArenaError, Edit, MemoryError, ResumeError, StopError, StopReport, StopRequest, WriteError,
};
use vmpatch_introspect::{
    Activity, Call, CallError, Called, Gpa, GpaRange, Gva, PhysicalMemory, StoppedTarget, Target,
    Vcpu,
};

/// Size of the RAM, from guest-physical zero.
pub const RAM: u64 = 1 << 20;
/// Where the arena slot lies: far above the RAM.
pub const SLOT: Gpa = Gpa(1 << 32);
/// Size of the arena slot.
pub const SLOT_SIZE: u64 = 4 << 20;

/// What goes wrong, once, at the next occasion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A vCPU does not leave guest mode in time.
    StopDeadline,
    /// The machine does not answer a stop.
    StopUnreachable,
    /// The arena cannot be written.
    ArenaUnreachable,
    /// The arena keeps its old bytes when written.
    ArenaReadBack,
    /// The n-th edit of the batch, from 0, does not read back.
    ReadBack(usize),
    /// The n-th edit does not read back, and the undo fails too.
    UndoFailed(usize),
    /// The lease ends when the batch is to be written.
    LeaseAtWrite,
    /// The machine dies when the batch is to be written; its lease has undone everything.
    UnreachableAtWrite,
    /// The lease ends when the guest is to be resumed.
    LeaseAtResume,
    /// The guest is resumed with the change, but the answer is lost.
    AnswerLostAtResume,
    /// The machine does not answer a resume; its lease undoes everything.
    UnreachableAtResume,
}

/// One write that reached guest memory or the arena.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteSeen {
    /// Where.
    pub at: Gpa,
    /// What was there.
    pub old: Vec<u8>,
    /// What was written.
    pub new: Vec<u8>,
    /// Whether it takes back an earlier one.
    pub undo: bool,
}

type Watcher = Box<dyn Fn(&WriteSeen)>;
type Callee = Box<dyn Fn(&Call) -> Result<Called, CallError>>;

/// A machine of plain bytes.
pub struct Machine {
    ram: RefCell<Vec<u8>>,
    slot: RefCell<Vec<u8>>,
    vcpus: RefCell<Vec<Vcpu>>,
    faults: RefCell<Vec<Fault>>,
    seen: RefCell<Vec<WriteSeen>>,
    watcher: RefCell<Option<Watcher>>,
    callee: RefCell<Option<Callee>>,
    running: Cell<bool>,
    stops: Cell<u32>,
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl Machine {
    /// Two vCPUs in user mode; RAM that differs from byte to byte; an empty slot.
    #[must_use]
    pub fn new() -> Self {
        let pattern = (0..RAM).map(|at| (at.wrapping_mul(31) >> 3) as u8);
        Self::with(
            pattern.collect(),
            vec![vcpu_in_user_mode(0), vcpu_in_user_mode(1)],
        )
    }

    /// RAM from guest-physical zero, and what the vCPUs' registers hold; an empty slot.
    #[must_use]
    pub fn with(ram: Vec<u8>, vcpus: Vec<Vcpu>) -> Self {
        Self {
            ram: RefCell::new(ram),
            slot: RefCell::new(vec![0; usize::try_from(SLOT_SIZE).unwrap()]),
            vcpus: RefCell::new(vcpus),
            faults: RefCell::default(),
            seen: RefCell::default(),
            watcher: RefCell::default(),
            callee: RefCell::default(),
            running: Cell::new(true),
            stops: Cell::new(0),
        }
    }

    /// Lets something go wrong once.
    pub fn inject(&self, fault: Fault) {
        self.faults.borrow_mut().push(fault);
    }

    /// Calls `watcher` at every write, before it takes effect.
    pub fn watch(&self, watcher: impl Fn(&WriteSeen) + 'static) {
        *self.watcher.borrow_mut() = Some(Box::new(watcher));
    }

    /// Lets calls be made: `callee` stands for every function of the guest.
    pub fn let_call(&self, callee: impl Fn(&Call) -> Result<Called, CallError> + 'static) {
        *self.callee.borrow_mut() = Some(Box::new(callee));
    }

    /// Sets the registers that the next stop finds.
    pub fn set_vcpus(&self, vcpus: Vec<Vcpu>) {
        *self.vcpus.borrow_mut() = vcpus;
    }

    /// Puts bytes into RAM or slot as the guest or an earlier boot would have: neither counted nor shown.
    pub fn set(&self, at: Gpa, bytes: &[u8]) {
        self.at(at, bytes.len(), |into| into.copy_from_slice(bytes))
            .unwrap();
    }

    /// Whether its vCPUs run.
    pub fn is_running(&self) -> bool {
        self.running.get()
    }

    /// How often it was stopped.
    pub fn stops(&self) -> u32 {
        self.stops.get()
    }

    /// Every write so far, undos included.
    pub fn writes(&self) -> Vec<WriteSeen> {
        self.seen.borrow().clone()
    }

    /// All bytes there are: RAM, then slot.
    pub fn image(&self) -> Rc<[u8]> {
        let both = [&self.ram.borrow()[..], &self.slot.borrow()[..]];
        both.concat().into()
    }

    /// The bytes of the RAM alone.
    pub fn ram_image(&self) -> Rc<[u8]> {
        self.ram.borrow()[..].into()
    }

    fn strikes(&self, matches: impl Fn(&Fault) -> bool) -> Option<Fault> {
        let mut faults = self.faults.borrow_mut();
        let at = faults.iter().position(matches)?;
        Some(faults.remove(at))
    }

    fn at<T>(
        &self,
        at: Gpa,
        len: usize,
        work: impl FnOnce(&mut [u8]) -> T,
    ) -> Result<T, MemoryError> {
        let unbacked = MemoryError::NotBacked { at, len };
        let (region, base) = if at < SLOT {
            (&self.ram, 0)
        } else {
            (&self.slot, SLOT.0)
        };
        let from = usize::try_from(at.0 - base).map_err(|_| unbacked.clone())?;
        let mut region = region.borrow_mut();
        let end = from.checked_add(len).ok_or_else(|| unbacked.clone())?;
        region.get_mut(from..end).map(work).ok_or(unbacked)
    }

    fn peek(&self, at: Gpa, len: usize) -> Result<Vec<u8>, MemoryError> {
        self.at(at, len, |bytes| bytes.to_vec())
    }

    fn put(&self, at: Gpa, new: &[u8], undo: bool) {
        let old = self.peek(at, new.len()).unwrap();
        let seen = WriteSeen {
            at,
            old,
            new: new.to_vec(),
            undo,
        };
        if let Some(watcher) = &*self.watcher.borrow() {
            watcher(&seen);
        }
        self.set(at, new);
        self.seen.borrow_mut().push(seen);
    }
}

/// A vCPU that runs user code: no kernel frame of its own.
#[must_use]
pub fn vcpu_in_user_mode(index: u32) -> Vcpu {
    Vcpu {
        index,
        activity: Activity::Running,
        general: [0; 16],
        rip: Gva(0x40_0000),
        rflags: 0x202,
        cs: 0x33,
        ss: 0x2b,
        cpl: 3,
        fs_base: Gva(0),
        gs_base: Gva(0),
        kernel_gs_base: None,
        cr0: 0x8005_0033,
        cr2: 0,
        cr3: 0x1000,
        cr4: 0x20,
        efer: 0xd01,
        idt_base: Gva(0xffff_fe00_0000_0000),
        gdt_base: Gva(0),
        tss_base: Gva(0),
        lstar: None,
        smm: false,
        nested_guest: false,
    }
}

/// A vCPU in the kernel at `rip`.
#[must_use]
pub fn vcpu_in_kernel(index: u32, rip: Gva) -> Vcpu {
    Vcpu {
        cpl: 0,
        cs: 0x10,
        ss: 0x18,
        rip,
        ..vcpu_in_user_mode(index)
    }
}

impl PhysicalMemory for Machine {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        self.at(at, into.len(), |bytes| into.copy_from_slice(bytes))
    }

    fn ram(&self) -> Vec<GpaRange> {
        let size = self.ram.borrow().len() as u64;
        GpaRange::sized(Gpa(0), size).into_iter().collect()
    }
}

impl Target for Machine {
    fn name(&self) -> &str {
        "bytes"
    }

    fn vcpu_count(&self) -> usize {
        self.vcpus.borrow().len()
    }

    fn stop(&self, request: StopRequest) -> Result<Box<dyn StoppedTarget + '_>, StopError> {
        if !self.running.get() {
            return Err(StopError::NotRunning("already stopped".to_owned()));
        }
        if self
            .strikes(|fault| *fault == Fault::StopDeadline)
            .is_some()
        {
            return Err(StopError::Deadline {
                vcpu: 1,
                deadline: request.deadline,
            });
        }
        if self
            .strikes(|fault| *fault == Fault::StopUnreachable)
            .is_some()
        {
            return Err(StopError::Unreachable("gone".to_owned()));
        }
        self.running.set(false);
        self.stops.set(self.stops.get() + 1);
        let vcpus = self.vcpus.borrow().clone();
        Ok(Box::new(Stop {
            machine: self,
            vcpus,
            undo: Vec::new(),
            stuck: false,
        }))
    }

    fn arena(&self) -> Result<GpaRange, ArenaError> {
        GpaRange::sized(SLOT, SLOT_SIZE).ok_or_else(|| ArenaError::Unsupported("size".to_owned()))
    }

    fn can_call(&self) -> bool {
        self.callee.borrow().is_some()
    }

    fn write_arena(&self, at: Gpa, bytes: &[u8]) -> Result<(), ArenaError> {
        let outside = || ArenaError::Outside {
            at,
            len: bytes.len(),
        };
        let range = GpaRange::sized(at, bytes.len() as u64).ok_or_else(outside)?;
        let slot = self.arena()?;
        if range.start < slot.start || range.end > slot.end {
            return Err(outside());
        }
        if self
            .strikes(|fault| *fault == Fault::ArenaUnreachable)
            .is_some()
        {
            return Err(ArenaError::Unreachable("gone".to_owned()));
        }
        if self
            .strikes(|fault| *fault == Fault::ArenaReadBack)
            .is_none()
        {
            self.put(at, bytes, false);
        }
        Ok(())
    }
}

struct Stop<'a> {
    machine: &'a Machine,
    vcpus: Vec<Vcpu>,
    undo: Vec<(Gpa, Vec<u8>)>,
    stuck: bool,
}

impl Stop<'_> {
    fn check(&self, edit: &Edit) -> Result<(), WriteError> {
        let malformed = |what: &str| WriteError::Malformed {
            at: edit.at,
            what: what.to_owned(),
        };
        if edit.old.len() != edit.new.len() {
            return Err(malformed("lengths"));
        }
        let found = self
            .machine
            .peek(edit.at, edit.old.len())
            .map_err(|why| malformed(&why.to_string()))?;
        if found == edit.old {
            return Ok(());
        }
        Err(WriteError::Differs {
            at: edit.at,
            expected: edit.old.clone(),
            found,
        })
    }

    fn take_back(&mut self) {
        while let Some((at, old)) = self.undo.pop() {
            self.machine.put(at, &old, true);
        }
    }

    fn let_go(&mut self) {
        self.undo.clear();
        self.machine.running.set(true);
    }
}

impl StoppedTarget for Stop<'_> {
    fn memory(&self) -> &dyn PhysicalMemory {
        self.machine
    }

    fn vcpus(&self) -> &[Vcpu] {
        &self.vcpus
    }

    fn write(&mut self, batch: &[Edit]) -> Result<(), WriteError> {
        if self
            .machine
            .strikes(|fault| *fault == Fault::LeaseAtWrite)
            .is_some()
        {
            return Err(WriteError::LeaseExpired);
        }
        if self
            .machine
            .strikes(|fault| *fault == Fault::UnreachableAtWrite)
            .is_some()
        {
            return Err(WriteError::Unreachable("gone".to_owned()));
        }
        batch.iter().try_for_each(|edit| self.check(edit))?;
        for (index, edit) in batch.iter().enumerate() {
            self.machine.put(edit.at, &edit.new, false);
            self.undo.push((edit.at, edit.old.clone()));
            let struck = |fault: &Fault| match fault {
                Fault::ReadBack(at) | Fault::UndoFailed(at) => *at == index,
                _ => false,
            };
            match self.machine.strikes(struck) {
                None => {}
                Some(Fault::UndoFailed(_)) => {
                    self.stuck = true;
                    return Err(WriteError::UndoFailed { at: edit.at });
                }
                Some(_) => {
                    self.take_back();
                    return Err(WriteError::ReadBack { at: edit.at });
                }
            }
        }
        Ok(())
    }

    fn call(&mut self, call: &Call) -> Result<Called, CallError> {
        match &*self.machine.callee.borrow() {
            Some(callee) => callee(call),
            None => Err(CallError::Unsupported("bytes execute nothing")),
        }
    }

    fn resume(mut self: Box<Self>) -> Result<StopReport, ResumeError> {
        let struck = self.machine.strikes(|fault| {
            let at_resume = [
                Fault::LeaseAtResume,
                Fault::AnswerLostAtResume,
                Fault::UnreachableAtResume,
            ];
            at_resume.contains(fault)
        });
        match struck {
            None => {
                self.let_go();
                let window = Duration::from_micros(40);
                Ok(StopReport {
                    window,
                    ..StopReport::default()
                })
            }
            Some(Fault::LeaseAtResume) => Err(ResumeError::LeaseExpired),
            Some(fault) => {
                if fault == Fault::AnswerLostAtResume {
                    self.let_go();
                }
                Err(ResumeError::Unreachable("gone".to_owned()))
            }
        }
    }
}

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        if !self.stuck {
            self.take_back();
            self.machine.running.set(true);
        }
    }
}
