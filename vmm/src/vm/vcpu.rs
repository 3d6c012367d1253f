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
use kvm_ioctls::{SyncReg, VcpuFd};
use vmpatch_introspect::address::Gpa;
use vmpatch_introspect::target::PhysicalMemory;
use vmpatch_introspect::vcpu::Vcpu;

use super::exit::{self, Came};
use super::gate::{Kind, Post, Wish};
use super::outcome::{Crash, Fault, Outcome};
use super::registers::{self, Core, MsrReader};
use super::{Shared, assist};
use crate::bus::Effect;

/// Rounds of `KVM_RUN` that may be needed to complete pending I/O. KVM re-enters the guest, and sees
/// `immediate_exit`, at least after each 1024 repetitions of a string instruction (Linux
/// arch/x86/kvm/emulate.c, x86_emulate_insn); each can take several exits.
const DRAIN_ROUNDS: usize = 16 * 1024;

/// Up to this many bytes of code are put into a crash report.
const CODE_BYTES: u64 = 16;

/// A vCPU and what its thread needs.
pub(super) struct Runner {
    index: u32,
    fd: VcpuFd,
    shared: Arc<Shared>,
    msrs: MsrReader,
    /// Whether KVM stores all core registers by itself on exit (KVM_CAP_SYNC_REGS).
    sync: bool,
}

impl Runner {
    pub(super) fn new(index: u32, fd: VcpuFd, shared: Arc<Shared>, sync_bits: i32) -> Self {
        let wanted = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
        let sync = u32::try_from(sync_bits).is_ok_and(|bits| bits & wanted == wanted);
        let msrs = MsrReader::new();
        Self {
            index,
            fd,
            shared,
            msrs,
            sync,
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
        post.kicker.arm(&mut self.fd);
        if let Err(outcome) = self.turns(post) {
            shared.finish(*outcome);
        }
        post.kicker.disarm();
    }

    /// Turns until the machine ends. `Ok` where somebody else ended it.
    fn turns(&mut self, post: &Post) -> Result<(), Box<Outcome>> {
        loop {
            // Cleared before the wish is read: a kick after that sets it again.
            post.kicker.set_immediate_exit(false);
            let wish = self.shared.gate.wish();
            match wish.kind() {
                Kind::Run => {
                    self.turn()?;
                }
                Kind::Stop => self.stand(post, wish)?,
                Kind::End => return Ok(()),
            }
        }
    }

    /// Enters the guest once.
    fn turn(&mut self) -> Result<Turned, Box<Outcome>> {
        match exit::enter(&mut self.fd, &self.shared.bus) {
            Came::Back => Ok(Turned::Served),
            Came::Interrupted => Ok(Turned::Interrupted),
            Came::Off(Effect::Reset) => Err(Box::new(Outcome::Reset)),
            Came::Off(_) => Err(Box::new(Outcome::PowerOff)),
            Came::Stuck(fault) => self.stuck(fault),
        }
    }

    fn stand(&mut self, post: &Post, wish: Wish) -> Result<(), Box<Outcome>> {
        self.shared.gate.left_guest(post);
        post.kicker.set_immediate_exit(true);
        let Some(registers) = self.drain(wish)? else {
            return Ok(());
        };
        self.shared.gate.stand(post, wish, registers);
        // EINVAL until the guest has a kvmclock (Linux arch/x86/kvm/x86.c, kvm_set_guest_paused);
        // without one there is no watchdog of the guest's to tell either.
        let _ = self.fd.kvmclock_ctrl();
        self.shared.gate.go(post);
        Ok(())
    }

    /// Completes pending I/O and reads the registers. `None` where the wish changed meanwhile, or the
    /// I/O went on and on: the vCPU does not stand then.
    fn drain(&mut self, wish: Wish) -> Result<Option<Vcpu>, Box<Outcome>> {
        let activity = registers::activity(&self.fd).map_err(|fault| self.crash(fault))?;
        self.sync_registers(true);
        for _ in 0..DRAIN_ROUNDS {
            match self.turn()? {
                Turned::Interrupted => {
                    let core = self.core()?;
                    self.sync_registers(false);
                    let (msrs, fd) = (&mut self.msrs, &self.fd);
                    let vcpu = registers::vcpu(self.index, activity, &core, msrs, fd);
                    return Ok(Some(vcpu));
                }
                Turned::Served if self.shared.gate.wish() != wish => break,
                Turned::Served => {}
            }
        }
        self.sync_registers(false);
        Ok(None)
    }

    fn sync_registers(&mut self, on: bool) {
        if !self.sync {
            return;
        }
        for register in [SyncReg::Register, SyncReg::SystemRegister] {
            if on {
                self.fd.set_sync_valid_reg(register);
            } else {
                self.fd.clear_sync_valid_reg(register);
            }
        }
    }

    /// Registers after an interrupted `KVM_RUN`: already in the shared page where KVM stores them itself.
    fn core(&mut self) -> Result<Core, Box<Outcome>> {
        if !self.sync {
            return registers::core(&mut self.fd).map_err(|fault| self.crash(fault));
        }
        let smm = registers::in_smm(&mut self.fd);
        let stored = self.fd.sync_regs();
        Ok(Core {
            regs: stored.regs,
            sregs: stored.sregs,
            smm,
        })
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

/// What one entry came to, of what a loop can go on after.
enum Turned {
    Served,
    Interrupted,
}
