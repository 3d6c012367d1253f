//! One vCPU's thread: enter the guest, serve what comes back, stand when a stop is wished. Owns the
//! vCPU's descriptor: nobody else makes ioctls on it while the thread runs.
//!
//! ```text
//!   entering ──exit served──▶ entering
//!      │ wish = Stop
//!      ▼
//!   draining: KVM_RUN with immediate_exit, serving every exit, until EINTR
//!      │ registers stored
//!      ▼
//!   standing ──wish = Run──▶ entering (KVM_KVMCLOCK_CTRL first)
//!
//!   any of them ──wish = End, device says off, vCPU stuck──▶ gone
//! ```

use std::sync::Arc;

use kvm_bindings::{KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS};
use kvm_ioctls::VcpuFd;
use vmpatch_introspect::address::Gpa;
use vmpatch_introspect::call::{CallError, Called};
use vmpatch_introspect::target::{Detail, PhysicalMemory};
use vmpatch_introspect::vcpu::{Activity, Vcpu};

use super::call::{self, Order};
use super::exit::{self, Came};
use super::gate::{Kind, Post, Wish};
use super::kick::ImmediateExit;
use super::outcome::{Crash, Fault, Outcome};
use super::registers::{self, Core, MsrReader};
use super::{Shared, assist};
use crate::bus::Effect;

/// Up to this many bytes of code are put into a crash report.
const CODE_BYTES: u64 = 16;

/// A vCPU and what its thread needs.
pub(super) struct Runner {
    index: u32,
    fd: VcpuFd,
    shared: Arc<Shared>,
    msrs: MsrReader,
    /// What KVM can store by itself on exit (KVM_SYNC_X86_*): all core registers, or 0.
    sync: u64,
    exit: ImmediateExit,
}

impl Runner {
    pub(super) fn new(index: u32, mut fd: VcpuFd, shared: Arc<Shared>, sync_bits: i32) -> Self {
        let wanted = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
        let can = u32::try_from(sync_bits).is_ok_and(|bits| bits & wanted == wanted);
        let sync = if can { wanted.into() } else { 0 };
        // SAFETY: it is kept beside the vCPU, and armed only until `Leaving` is dropped, which is before the vCPU is.
        #[allow(unsafe_code)]
        let exit = unsafe { ImmediateExit::of(&mut fd, sync) };
        Self {
            index,
            fd,
            shared,
            msrs: MsrReader::new(),
            sync,
            exit,
        }
    }

    /// The thread: returns when the vCPU is gone for good.
    pub(super) fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let Some(post) = usize::try_from(self.index)
            .ok()
            .and_then(|index| shared.gate.posts().get(index))
        else {
            return;
        };
        post.kicker.arm(self.exit);
        // Made after `self`, hence dropped before the vCPU's descriptor.
        let _leaving = Leaving {
            post,
            shared: &shared,
            index: self.index,
        };
        if let Err(outcome) = self.turns(post) {
            shared.finish(*outcome);
        }
    }

    /// Turns until the machine ends. `Ok` where somebody else ended it.
    fn turns(&mut self, post: &Post) -> Result<(), Box<Outcome>> {
        let mut last = Turned::Served;
        loop {
            // Cleared before the wish is read: a kick after that sets it again.
            self.exit.ask(false);
            let wish = self.shared.gate.wish();
            match wish.kind() {
                Kind::Run => last = self.turn()?,
                Kind::Stop(detail) => {
                    self.shared.gate.left_guest(post);
                    self.stand(post, wish, detail, last)?;
                    last = Turned::Served;
                }
                Kind::End => return Ok(()),
            }
        }
    }

    /// Enters the guest once.
    fn turn(&mut self) -> Result<Turned, Box<Outcome>> {
        self.forget_stored();
        match exit::enter(&mut self.fd, &self.shared.bus) {
            Came::Back | Came::Gate => Ok(Turned::Served),
            Came::Interrupted => Ok(Turned::Interrupted),
            Came::Off(Effect::Reset) => Err(Box::new(Outcome::Reset)),
            Came::Off(_) => Err(Box::new(Outcome::PowerOff)),
            Came::Stuck(fault) => self.stuck(fault),
        }
    }

    /// Stores the registers and stands until the wish changes. Comes back without where it changes before.
    fn stand(
        &mut self,
        post: &Post,
        wish: Wish,
        detail: Detail,
        last: Turned,
    ) -> Result<(), Box<Outcome>> {
        let stored = self.stored().filter(|_| last == Turned::Interrupted);
        let activity = match &stored {
            Some(core) if detail == Detail::Stacks && core.is_started() => Activity::Running,
            _ => registers::activity(&self.fd).map_err(|fault| self.crash(fault))?,
        };
        let core = match stored {
            // The kick itself ended the last entry, so no I/O is pending.
            Some(core) => Some(core),
            None => self.drain(wish)?,
        };
        let Some(core) = core else {
            return Ok(());
        };
        let (msrs, fd) = (&mut self.msrs, &self.fd);
        let vcpu = registers::vcpu(self.index, activity, &core, msrs, fd);
        self.shared.gate.stand(post, wish, vcpu);
        // Before the guest runs on, and while somebody else looks at it. EINVAL until it has a kvmclock
        // (Linux arch/x86/kvm/x86.c, kvm_set_guest_paused); without one there is nothing to tell.
        let _ = self.fd.kvmclock_ctrl();
        while let Some(order) = self.shared.gate.order(post, wish) {
            let called = self.call(&order, wish);
            self.shared.gate.called(post, called);
        }
        self.shared.gate.go(post);
        Ok(())
    }

    /// Makes a call of a guest function, and stands as before then.
    fn call(&mut self, order: &Order, wish: Wish) -> Result<Called, CallError> {
        let (gate, exit) = (&self.shared.gate, self.exit);
        let wanted = || gate.wish() == wish;
        let called = call::call(
            &mut self.fd,
            (&self.shared.bus, &self.shared.memory),
            order,
            wanted,
            |at_once| {
                exit.ask(at_once);
            },
        );
        self.forget_stored();
        called
    }

    /// Completes pending I/O and reads the registers. `None` where the wish changed meanwhile, or the
    /// I/O went on and on: the vCPU does not stand then.
    fn drain(&mut self, wish: Wish) -> Result<Option<Core>, Box<Outcome>> {
        self.exit.ask(true);
        for _ in 0..exit::DRAIN_ROUNDS {
            match self.turn()? {
                Turned::Interrupted => return self.core().map(Some),
                Turned::Served if self.shared.gate.wish() != wish => break,
                Turned::Served => {}
            }
        }
        Ok(None)
    }

    /// Registers after an interrupted `KVM_RUN`.
    fn core(&mut self) -> Result<Core, Box<Outcome>> {
        match self.stored() {
            Some(core) => Ok(core),
            None => registers::core(&mut self.fd).map_err(|fault| self.crash(fault)),
        }
    }

    /// The registers that KVM stored when it last left the guest, if it did: both marks that
    /// `forget_stored` leaves are bits that are always 1 on a real CPU.
    fn stored(&mut self) -> Option<Core> {
        if self.sync == 0 {
            return None;
        }
        let smm = registers::in_smm(&mut self.fd);
        let stored = self.fd.sync_regs_mut();
        let whole = stored.regs.rflags != 0 && stored.sregs.cr0 != 0;
        whole.then_some(Core {
            regs: stored.regs,
            sregs: stored.sregs,
            smm,
        })
    }

    /// Makes what KVM stores next tell itself from what it stored before: RFLAGS bit 1 and CR0.ET are
    /// always set (Intel SDM vol. 1 section 3.4.3, vol. 3 section 2.5).
    fn forget_stored(&mut self) {
        let stored = self.fd.sync_regs_mut();
        stored.regs.rflags = 0;
        stored.sregs.cr0 = 0;
    }

    /// A vCPU that KVM cannot run on: helped if it is the one case we know, else the machine's end.
    fn stuck(&mut self, fault: Fault) -> Result<Turned, Box<Outcome>> {
        let Fault::Internal { .. } = fault else {
            return Err(self.crash(fault));
        };
        let suberror = exit::internal_suberror(&mut self.fd);
        let code = self.code();
        if self.shared.options.assist_int3 && assist::help(&self.fd, suberror, &code) {
            return Ok(Turned::Served);
        }
        Err(self.crash(Fault::Internal { suberror }))
    }

    fn crash(&mut self, fault: Fault) -> Box<Outcome> {
        let registers = self.registers_as_they_are();
        let code = self.code();
        Box::new(Outcome::Crashed(Box::new(Crash {
            vcpu: self.index,
            fault,
            registers,
            code,
        })))
    }

    fn registers_as_they_are(&mut self) -> Option<Vcpu> {
        let activity = registers::activity(&self.fd).ok()?;
        let core = registers::core(&mut self.fd).ok()?;
        let (msrs, fd) = (&mut self.msrs, &self.fd);
        Some(registers::vcpu(self.index, activity, &core, msrs, fd))
    }

    /// Code from RIP on, to the end of its page at most; empty where it cannot be read.
    fn code(&self) -> Vec<u8> {
        self.read_code().unwrap_or_default()
    }

    fn read_code(&self) -> Option<Vec<u8>> {
        let (regs, sregs) = (self.fd.get_regs().ok()?, self.fd.get_sregs().ok()?);
        let linear = sregs.cs.base.wrapping_add(regs.rip);
        let at = self.fd.translate_gva(linear).ok()?;
        if at.valid == 0 {
            return None;
        }
        let to_page_end = 4096 - linear % 4096;
        let mut code = vec![0; usize::try_from(CODE_BYTES.min(to_page_end)).ok()?];
        let at = Gpa(at.physical_address);
        self.shared.memory.read(at, &mut code).ok()?;
        Some(code)
    }
}

/// What is due when a vCPU's thread ends, in whatever way.
struct Leaving<'a> {
    post: &'a Post,
    shared: &'a Shared,
    index: u32,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.post.kicker.disarm();
        if std::thread::panicking() {
            self.shared.finish(Outcome::Crashed(Box::new(Crash {
                vcpu: self.index,
                fault: Fault::Thread("it panicked, see the VMM's log".into()),
                registers: None,
                code: Vec::new(),
            })));
        }
    }
}

/// What one entry came to, of what a loop can go on after.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turned {
    Served,
    Interrupted,
}
