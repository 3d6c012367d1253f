//! A guest that says what it is told to: its stacks, its boot, what it is doing to its own text.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

use vmpatch_introspect::stacks::Stack;
use vmpatch_introspect::tasks::{Task, TaskKind};
use vmpatch_introspect::unwind::{Frame, FrameKind, Trace, Unreliable};
use vmpatch_introspect::{
    AttachError, Deadline, Gpa, Gva, GvaRange, PhysicalMemory, ReadError, Vcpu,
};

use crate::arena::ModuleClaim;
use crate::quiescence::gate::ReadStack;
use crate::quiescence::{Elsewhere, Witness};

/// Where the guest's kernel maps guest-physical zero.
pub const DIRECT_MAP: Gva = Gva(0xffff_8880_0000_0000);

/// Scripted answers. Each stop takes the next set of stacks; the last set stays.
#[derive(Debug)]
pub struct ScriptedGuest {
    stacks: RefCell<VecDeque<Vec<Stack>>>,
    same_boot: Cell<bool>,
    owns_vcpus: Cell<bool>,
    patching: RefCell<Option<String>>,
    unreadable: Cell<bool>,
    same_modules: Cell<bool>,
    slow: Cell<bool>,
}

impl Default for ScriptedGuest {
    fn default() -> Self {
        Self::with(Vec::new())
    }
}

impl ScriptedGuest {
    /// A guest with these stacks at every stop.
    #[must_use]
    pub fn with(stacks: Vec<Stack>) -> Self {
        Self::with_each(vec![stacks])
    }

    /// A guest with other stacks at each stop.
    #[must_use]
    pub fn with_each(stacks: Vec<Vec<Stack>>) -> Self {
        Self {
            stacks: RefCell::new(stacks.into()),
            same_boot: Cell::new(true),
            owns_vcpus: Cell::new(true),
            patching: RefCell::default(),
            unreadable: Cell::new(false),
            same_modules: Cell::new(true),
            slow: Cell::new(false),
        }
    }

    /// It has booted anew.
    pub fn reboot(&self) {
        self.same_boot.set(false);
    }

    /// Its vCPUs run with another interrupt table.
    pub fn lose_vcpus(&self) {
        self.owns_vcpus.set(false);
    }

    /// It is rewriting its own text.
    pub fn patch_text(&self, what: &str) {
        *self.patching.borrow_mut() = Some(what.to_owned());
    }

    /// It has loaded or unloaded a module since it was looked at.
    pub fn change_modules(&self) {
        self.same_modules.set(false);
    }

    /// Its task list leads nowhere.
    pub fn lose_tasks(&self) {
        self.unreadable.set(true);
    }

    /// Its stacks are not read before the deadline.
    pub fn be_slow(&self) {
        self.slow.set(true);
    }
}

impl Witness for ScriptedGuest {
    fn same_boot(&self, _memory: &dyn PhysicalMemory) -> bool {
        self.same_boot.get()
    }

    fn elsewhere(&self, vcpu: &Vcpu) -> Option<Elsewhere> {
        match (vcpu.smm, vcpu.nested_guest, self.owns_vcpus.get()) {
            (true, ..) => Some(Elsewhere::Smm),
            (_, true, _) => Some(Elsewhere::NestedGuest),
            (.., false) => Some(Elsewhere::NotThatKernel("lost".to_owned())),
            _ => None,
        }
    }

    fn text_patching(&self, _memory: &dyn PhysicalMemory) -> Result<Option<String>, AttachError> {
        Ok(self.patching.borrow().clone())
    }

    fn same_modules(
        &self,
        _memory: &dyn PhysicalMemory,
        _deadline: &Deadline,
    ) -> Result<bool, AttachError> {
        Ok(self.same_modules.get())
    }

    fn is_live(&self, _module: &ModuleClaim, _memory: &dyn PhysicalMemory) -> bool {
        self.same_modules.get()
    }

    fn stacks(
        &self,
        _memory: &dyn PhysicalMemory,
        _vcpus: &[Vcpu],
        deadline: &Deadline,
    ) -> Result<Vec<Stack>, AttachError> {
        if self.slow.get() {
            return Err(AttachError::Late {
                what: "stacks",
                done: 0,
                allowed: deadline.allowed(),
            });
        }
        if self.unreadable.get() {
            return Err(AttachError::NoKernel("task list".to_owned()));
        }
        let mut stacks = self.stacks.borrow_mut();
        match stacks.len() {
            0 | 1 => Ok(stacks.front().cloned().unwrap_or_default()),
            _ => Ok(stacks.pop_front().unwrap_or_default()),
        }
    }

    fn reader<'a>(&'a self, memory: &'a dyn PhysicalMemory) -> Box<ReadStack<'a>> {
        Box::new(move |at, into| {
            let physical = at.0.checked_sub(DIRECT_MAP.0);
            let physical = physical.ok_or(ReadError::NotMapped(at))?;
            Ok(memory.read(Gpa(physical), into)?)
        })
    }
}

/// A task that sleeps.
#[must_use]
pub fn task(comm: &str, pid: i32) -> Task {
    Task {
        at: Gva(0xffff_8880_0100_0000),
        pid,
        tgid: pid,
        comm: comm.to_owned(),
        kind: TaskKind::Listed,
        state: 1,
        on_cpu: false,
        cpu: 0,
        kernel_thread: true,
        stack: None,
        saved_sp: Gva(0),
    }
}

/// A reliable stack of a sleeping task with call frames that return to `returns`, innermost first.
#[must_use]
pub fn sleeping(comm: &str, pid: i32, returns: &[u64]) -> Stack {
    let frame = |&at: &u64| Frame {
        at: Gva(at),
        kind: FrameKind::Call,
        sp: Gva(0),
    };
    Stack {
        task: Some(task(comm, pid)),
        vcpu: None,
        trace: Trace {
            frames: returns.iter().map(frame).collect(),
            unreliable: None,
        },
        hidden_returns: Vec::new(),
        memory: Vec::new(),
    }
}

/// The same stack, but not to be relied on, its memory at guest-physical `at`.
#[must_use]
pub fn unreliable(mut stack: Stack, why: Unreliable, at: Gpa, size: u64) -> Stack {
    stack.trace.unreliable = Some(why);
    stack.memory = GvaRange::sized(DIRECT_MAP.wrapping_add(at.0), size)
        .into_iter()
        .collect();
    stack
}
