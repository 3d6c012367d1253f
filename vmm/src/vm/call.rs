//! A call of a guest function on a vCPU that stands: everything it holds is saved, the call's registers are set, it runs until
//! a gate or the end of its time, and everything is set back. Owns what is saved and in which order it is set; does not own
//! when ([`super::gate`]) nor what is called.
//!
//! A vCPU is taken only where it would take an interrupt: then nothing that the CPU itself holds is half done, and an
//! interrupt that comes in the call (whoever is called had switched them on) can be handed to the guest afterwards.
#![allow(unsafe_code)]

use std::time::Instant;

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Error, VcpuFd};
use vmpatch_introspect::address::{Gpa, Gva};
use vmpatch_introspect::call::{
    CODE_SELECTOR, Call, CallError, Called, DATA_SELECTOR, TSS_SELECTOR,
};

use vmpatch_introspect::target::{MemoryError, PhysicalMemory};

use super::exit::{self, Came};
use super::outcome::Fault;
use super::registers;
use crate::bus::Bus;
use crate::memory::GuestMemory;

/// A call and until when it may run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Order {
    pub(super) call: Call,
    pub(super) until: Instant,
}

/// MSRs that a call, or KVM's reset of a vCPU after a triple fault, can change (AMD64 Architecture Programmer's Manual vol. 2
/// appendix A; Linux v6.12 arch/x86/kvm/svm/svm.c, `init_vmcb`).
const MSRS: [u32; 13] = [
    0x48,        // SPEC_CTRL
    0x174,       // SYSENTER_CS
    0x175,       // SYSENTER_ESP
    0x176,       // SYSENTER_EIP
    0x1d9,       // DEBUGCTL
    0x277,       // PAT
    0x6a2,       // S_CET
    0xc000_0081, // STAR
    0xc000_0082, // LSTAR
    0xc000_0083, // CSTAR
    0xc000_0084, // SFMASK
    0xc000_0102, // KERNEL_GS_BASE
    0xc000_0103, // TSC_AUX
];

const CR0_PROTECTED_AND_PAGED: u64 = 1 << 31 | 1;
const EFER_LONG_MODE: u64 = 1 << 10;
const RFLAGS_ALWAYS: u64 = 1 << 1;
const RFLAGS_INTERRUPTS: u64 = 1 << 9;
/// DR7: breakpoint 0 is on for good and strikes when its instruction is to be executed (Intel SDM vol. 3 section 18.2.4); bit
/// 10 is always set.
const DR7_EXECUTE_0: u64 = 1 << 10 | 1 << 1;
/// DR6 without a reason (section 18.2.3).
const DR6_NONE: u64 = 0xffff_0ff0;
/// Vector of an NMI.
const NMI: u8 = 2;
/// The first vector that is no exception.
const FIRST_INTERRUPT: u8 = 32;

/// What one vCPU holds.
struct Saved {
    activity: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    msrs: Vec<kvm_msr_entry>,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
    /// Only a reset changes it.
    lapic: Box<kvm_lapic_state>,
}

/// Makes a call. `wanted` says whether it is still wanted, whenever the guest was left.
pub(super) fn call(
    fd: &mut VcpuFd,
    (bus, memory): (&Bus, &GuestMemory),
    order: &Order,
    wanted: impl Fn() -> bool,
    leave_at_once: impl Fn(bool),
) -> Result<Called, CallError> {
    let call = &order.call;
    let unfit = |why: String| CallError::Unfit {
        vcpu: call.vcpu,
        why,
    };
    let saved =
        Saved::of(fd).map_err(|error| unfit(format!("its state cannot be read: {error}")))?;
    if let Some(why) = saved.in_the_way(fd) {
        return Err(unfit(why.to_owned()));
    }
    let count =
        PreemptCount::read(memory, call.preempt_count).map_err(|error| unfit(error.to_string()))?;
    let mut run = Run {
        fd,
        bus,
        order,
        was_reset: false,
    };
    let called = match saved.enter(run.fd, call) {
        Ok(()) => Ok(run.until_the_end(wanted, &leave_at_once)),
        Err((operation, error)) => Err(unfit(format!("{operation}: {error}"))),
    };
    let taken = called.as_ref().ok().and_then(taken);
    let was_reset = run.was_reset;
    saved
        .restore(fd, taken, was_reset)
        .map_err(|(operation, error)| CallError::NotRestored {
            vcpu: call.vcpu,
            why: format!("{operation}: {error}"),
        })?;
    if let (Ok(outcome), Some(count)) = (&called, count)
        && !matches!(outcome, Called::Returned(_))
    {
        count
            .put_back(memory)
            .map_err(|error| CallError::NotRestored {
                vcpu: call.vcpu,
                why: error.to_string(),
            })?;
    }
    called
}

/// How deep the guest has switched preemption off on the CPU: what a function that did not return had entered it never leaves.
struct PreemptCount {
    at: Gpa,
    value: [u8; 4],
}

impl PreemptCount {
    fn read(memory: &GuestMemory, at: Option<Gpa>) -> Result<Option<Self>, MemoryError> {
        let Some(at) = at else { return Ok(None) };
        let mut value = [0; 4];
        memory.read(at, &mut value)?;
        Ok(Some(Self { at, value }))
    }

    fn put_back(&self, memory: &GuestMemory) -> Result<(), MemoryError> {
        memory.write(self.at, &self.value)
    }
}

/// An event of the guest's own that a call has taken, so that it must be given again.
fn taken(called: &Called) -> Option<u8> {
    match called {
        Called::Trapped { vector, .. } => {
            Some(*vector).filter(|it| *it == NMI || *it >= FIRST_INTERRUPT)
        }
        _ => None,
    }
}

type Refused = (&'static str, Error);

fn refused(operation: &'static str) -> impl Fn(Error) -> Refused {
    move |error| (operation, error)
}

impl Saved {
    fn of(fd: &VcpuFd) -> Result<Self, Error> {
        // The multiprocessing state first, the events last (Linux Documentation/virt/kvm/api.rst, KVM_GET_VCPU_EVENTS).
        let activity = fd.get_mp_state()?;
        Ok(Self {
            activity,
            regs: fd.get_regs()?,
            sregs: fd.get_sregs()?,
            msrs: MSRS.into_iter().filter_map(|it| read_msr(fd, it)).collect(),
            xsave: Box::new(fd.get_xsave()?),
            xcrs: fd.get_xcrs()?,
            debug: fd.get_debug_regs()?,
            lapic: Box::new(fd.get_lapic()?),
            events: fd.get_vcpu_events()?,
        })
    }

    /// Why a call cannot be made now, if so.
    fn in_the_way(&self, fd: &mut VcpuFd) -> Option<&'static str> {
        let events = &self.events;
        let excepted = events.exception.injected | events.exception.pending;
        let injected = excepted | events.interrupt.injected | events.nmi.injected;
        let runs = [KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_HALTED];
        let long = self.sregs.cr0 & CR0_PROTECTED_AND_PAGED == CR0_PROTECTED_AND_PAGED
            && self.sregs.efer & EFER_LONG_MODE != 0;
        let checks = [
            (!runs.contains(&self.activity.mp_state), "it is not started"),
            (!long, "it is not in 64-bit mode"),
            (registers::in_smm(fd), "it is in system-management mode"),
            (
                registers::runs_nested_guest(fd, &self.sregs),
                "it runs a guest of the guest",
            ),
            (injected != 0, "an event is just being delivered to it"),
            (events.nmi.masked != 0, "it handles an NMI"),
            (
                self.regs.rflags & RFLAGS_INTERRUPTS == 0 || events.interrupt.shadow != 0,
                "it takes no interrupts",
            ),
        ];
        checks
            .into_iter()
            .find_map(|(is_so, why)| is_so.then_some(why))
    }

    /// Sets the registers of a call.
    fn enter(&self, fd: &VcpuFd, call: &Call) -> Result<(), Refused> {
        fd.set_sregs(&self.sregs_of(call))
            .map_err(refused("KVM_SET_SREGS"))?;
        fd.set_regs(&regs_of(call))
            .map_err(refused("KVM_SET_REGS"))?;
        let debug = kvm_debugregs {
            db: [call.forbidden.0, 0, 0, 0],
            dr6: DR6_NONE,
            dr7: DR7_EXECUTE_0,
            ..self.debug
        };
        fd.set_debug_regs(&debug)
            .map_err(refused("KVM_SET_DEBUGREGS"))?;
        // NMIs wait: one that comes in the call is still pending afterwards.
        let mut events = self.events;
        events.nmi.masked = 1;
        fd.set_vcpu_events(&events)
            .map_err(refused("KVM_SET_VCPU_EVENTS"))?;
        set_activity(fd, KVM_MP_STATE_RUNNABLE)
    }

    fn sregs_of(&self, call: &Call) -> kvm_sregs {
        let mut sregs = self.sregs;
        sregs.cs = segment(CODE_SELECTOR, 0xb);
        (sregs.cs.l, sregs.cs.db) = (1, 0);
        sregs.ss = segment(DATA_SELECTOR, 0x3);
        sregs.tr = kvm_segment {
            base: call.tss.0,
            limit: 103,
            selector: TSS_SELECTOR,
            type_: 0xb,
            present: 1,
            ..Default::default()
        };
        sregs.gs.base = call.gs_base.0;
        sregs.cr3 = call.page_tables.0;
        (sregs.idt.base, sregs.idt.limit) = (call.idt.0, 256 * 16 - 1);
        (sregs.gdt.base, sregs.gdt.limit) = (call.gdt.0, 10 * 8 - 1);
        sregs
    }

    /// Sets everything back. A vector that the call has taken is given to the guest once more.
    fn restore(&self, fd: &VcpuFd, taken: Option<u8>, was_reset: bool) -> Result<(), Refused> {
        // NMIs that came meanwhile are pending still.
        let now = fd
            .get_vcpu_events()
            .map_err(refused("KVM_GET_VCPU_EVENTS"))?;
        let mut events = self.events;
        events.nmi.pending |= now.nmi.pending | u8::from(taken == Some(NMI));
        if let Some(vector) = taken.filter(|it| *it >= FIRST_INTERRUPT) {
            // Its bit in the local APIC's in-service register is set, as between acknowledging and delivering it.
            (events.interrupt.injected, events.interrupt.nr) = (1, vector);
        }
        // SREGS before REGS, REGS before the events: each of the first two drops events.
        fd.set_sregs(&self.sregs)
            .map_err(refused("KVM_SET_SREGS"))?;
        if was_reset {
            fd.set_lapic(&self.lapic)
                .map_err(refused("KVM_SET_LAPIC"))?;
        }
        for msr in &self.msrs {
            write_msr(fd, *msr)?;
        }
        fd.set_xcrs(&self.xcrs).map_err(refused("KVM_SET_XCRS"))?;
        set_xsave(fd, &self.xsave).map_err(refused("KVM_SET_XSAVE"))?;
        fd.set_debug_regs(&self.debug)
            .map_err(refused("KVM_SET_DEBUGREGS"))?;
        fd.set_regs(&self.regs).map_err(refused("KVM_SET_REGS"))?;
        fd.set_vcpu_events(&events)
            .map_err(refused("KVM_SET_VCPU_EVENTS"))?;
        // What wakes a halted vCPU wakes it by itself, but for what the call has taken.
        let activity = match taken {
            Some(_) => KVM_MP_STATE_RUNNABLE,
            None => self.activity.mp_state,
        };
        set_activity(fd, activity)
    }
}

/// A call under way.
struct Run<'a> {
    fd: &'a mut VcpuFd,
    bus: &'a Bus,
    order: &'a Order,
    /// KVM may have reset the vCPU.
    was_reset: bool,
}

impl Run<'_> {
    /// Runs the guest until a gate, and completes what is pending then.
    fn until_the_end(
        &mut self,
        wanted: impl Fn() -> bool,
        leave_at_once: &impl Fn(bool),
    ) -> Called {
        let stuck = loop {
            // A kick that comes before the look is seen by it, one that comes after it by KVM.
            leave_at_once(false);
            if Instant::now() >= self.order.until || !wanted() {
                leave_at_once(true);
                return self.late();
            }
            match exit::enter_for_call(self.fd, self.bus) {
                Came::Gate => break None,
                Came::Back | Came::Interrupted => {}
                Came::Off(_) => break Some("it switched the machine off".to_owned()),
                Came::Stuck(fault) => {
                    self.was_reset = fault == Fault::TripleFault;
                    break Some(fault.to_string());
                }
            }
        };
        leave_at_once(true);
        match stuck {
            Some(what) => Called::Stuck {
                at: self.rip(),
                what,
            },
            None => self.through_a_gate(),
        }
    }

    /// The time is over; what is pending is completed, so that it does not go on in the registers that are set back.
    fn late(&mut self) -> Called {
        self.drain();
        Called::Late { at: self.rip() }
    }

    fn through_a_gate(&mut self) -> Called {
        self.drain();
        let (Ok(regs), Ok(sregs)) = (self.fd.get_regs(), self.fd.get_sregs()) else {
            let what = "its registers cannot be read".to_owned();
            return Called::Stuck { at: Gva(0), what };
        };
        match self.order.call.gate(Gva(regs.rip)) {
            Some(gate) => Called::through(gate, regs.rax, Gva(regs.rsp), sregs.cr2),
            None => Called::Stuck {
                at: Gva(regs.rip),
                what: "it wrote to the port of the gates".to_owned(),
            },
        }
    }

    fn drain(&mut self) {
        for _ in 0..exit::DRAIN_ROUNDS {
            match exit::enter(self.fd, self.bus) {
                Came::Back | Came::Gate => {}
                Came::Interrupted | Came::Off(_) | Came::Stuck(_) => return,
            }
        }
    }

    fn rip(&self) -> Gva {
        self.fd.get_regs().map_or(Gva(0), |regs| Gva(regs.rip))
    }
}

fn regs_of(call: &Call) -> kvm_regs {
    kvm_regs {
        rip: call.function.0,
        rsp: call.stack.0,
        rflags: RFLAGS_ALWAYS,
        ..Default::default()
    }
}

/// A flat segment of the kernel.
fn segment(selector: u16, kind: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

fn set_activity(fd: &VcpuFd, mp_state: u32) -> Result<(), Refused> {
    fd.set_mp_state(kvm_mp_state { mp_state })
        .map_err(refused("KVM_SET_MP_STATE"))
}

fn read_msr(fd: &VcpuFd, index: u32) -> Option<kvm_msr_entry> {
    let entry = kvm_msr_entry {
        index,
        ..Default::default()
    };
    let mut msrs = Msrs::from_entries(&[entry]).ok()?;
    let read = fd.get_msrs(&mut msrs).unwrap_or(0);
    msrs.as_slice().first().copied().filter(|_| read == 1)
}

/// Writes one that is no longer as it was: KVM lets some be read only.
fn write_msr(fd: &VcpuFd, entry: kvm_msr_entry) -> Result<(), Refused> {
    let now = read_msr(fd, entry.index);
    if now.is_some_and(|now| now.data == entry.data) {
        return Ok(());
    }
    let failed = || refused("KVM_SET_MSRS")(Error::new(libc::EINVAL));
    let msrs = Msrs::from_entries(&[entry]).map_err(|_| failed())?;
    match fd.set_msrs(&msrs).map_err(refused("KVM_SET_MSRS"))? {
        1 => Ok(()),
        _ => Err(failed()),
    }
}

fn set_xsave(fd: &VcpuFd, xsave: &kvm_xsave) -> Result<(), Error> {
    // SAFETY: KVM reads more than the struct only where the process has asked for dynamically enabled features
    // (ARCH_REQ_XCOMP_GUEST_PERM), which this one never does; `get_xsave` has just filled the same bytes.
    unsafe { fd.set_xsave(xsave) }
}
