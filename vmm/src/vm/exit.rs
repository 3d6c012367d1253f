//! One entry into the guest and what comes back: accesses are served, everything else is sorted into
//! "go on", "the machine ends" and "this vCPU cannot go on". Does not own the loop ([`super::vcpu`]).
#![allow(unsafe_code)]

use kvm_bindings::{KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmpatch_introspect::call::CALL_PORT;

use super::outcome::Fault;
use super::registers::ioctl;
use crate::bus::{Bus, Effect};

/// Rounds of `KVM_RUN` that may be needed to complete pending I/O. KVM re-enters the guest, and sees
/// `immediate_exit`, at least after each 1024 repetitions of a string instruction (Linux
/// arch/x86/kvm/emulate.c, x86_emulate_insn); each can take several exits.
pub(super) const DRAIN_ROUNDS: usize = 16 * 1024;

/// What one entry into the guest came to.
#[derive(Debug)]
pub(super) enum Came {
    /// A call has come to a gate ([`enter_for_call`] alone).
    Gate,
    /// An access was served, or nothing is to be done: enter again.
    Back,
    /// A signal or `immediate_exit` ended it. No I/O is pending.
    Interrupted,
    /// A device says that the machine ends.
    Off(Effect),
    /// The vCPU cannot go on.
    Stuck(Fault),
}

/// Enters the guest once and serves the exit.
pub(super) fn enter(vcpu: &mut VcpuFd, bus: &Bus) -> Came {
    enter_but(vcpu, bus, None)
}

/// The same in a call, which ends at a gate.
pub(super) fn enter_for_call(vcpu: &mut VcpuFd, bus: &Bus) -> Came {
    enter_but(vcpu, bus, Some(CALL_PORT.into()))
}

fn enter_but(vcpu: &mut VcpuFd, bus: &Bus, gate: Option<u16>) -> Came {
    let (port, direction) = match vcpu.run() {
        Ok(VcpuExit::IoOut(port, data)) if Some(port) == gate && data.len() == 4 => {
            return Came::Gate;
        }
        Ok(VcpuExit::IoIn(port, data)) => (port, Direction::In(Buffer::of(data))),
        Ok(VcpuExit::IoOut(port, data)) => (port, Direction::Out(Buffer::of_const(data))),
        Ok(exit) => return serve(exit, bus),
        // EAGAIN: a vCPU that waited for its start-up IPI has had it, or was woken without.
        Err(error) if error.errno() == libc::EAGAIN => return Came::Back,
        Err(error) if error.errno() == libc::EINTR => return Came::Interrupted,
        Err(error) => return Came::Stuck(ioctl("KVM_RUN", error)),
    };
    let size = access_size(vcpu);
    match direction {
        Direction::In(mut buffer) => {
            for access in buffer.bytes().chunks_mut(size) {
                // What no device answers reads as ones; the page still holds the last access.
                access.fill(0xff);
                bus.read_port(port, access);
            }
            Came::Back
        }
        Direction::Out(mut buffer) => buffer
            .bytes()
            .chunks(size)
            .map(|access| came(bus.write_port(port, access)))
            .find(|came| !matches!(came, Came::Back))
            .unwrap_or(Came::Back),
    }
}

fn serve(exit: VcpuExit<'_>, bus: &Bus) -> Came {
    match exit {
        VcpuExit::MmioRead(at, data) => {
            data.fill(0xff);
            bus.read_mmio(at, data);
            Came::Back
        }
        VcpuExit::MmioWrite(at, data) => came(bus.write_mmio(at, data)),
        VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::IoapicEoi(_) => Came::Back,
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => Came::Off(Effect::PowerOff),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Came::Off(Effect::Reset),
        other => Came::Stuck(fault(&other)),
    }
}

fn fault(exit: &VcpuExit<'_>) -> Fault {
    match *exit {
        VcpuExit::Shutdown => Fault::TripleFault,
        // The kind of error is in the kvm_run page, which the caller can read once `exit` is gone.
        VcpuExit::InternalError => Fault::Internal { suberror: 0 },
        VcpuExit::FailEntry(reason, cpu) => Fault::FailEntry { reason, cpu },
        VcpuExit::MemoryFault { flags, gpa, size } => Fault::Memory { gpa, size, flags },
        VcpuExit::SystemEvent(kind, _) => Fault::SystemEvent(kind),
        ref other => Fault::Unexpected(format!("{other:?}")),
    }
}

const fn came(effect: Effect) -> Came {
    match effect {
        Effect::None => Came::Back,
        off => Came::Off(off),
    }
}

enum Direction {
    In(Buffer),
    Out(Buffer),
}

/// The data of a port exit in the shared `kvm_run` mapping, apart from the borrow of the vCPU: the
/// size of one access can only be read from the same mapping.
struct Buffer {
    start: *mut u8,
    len: usize,
}

impl Buffer {
    const fn of(data: &mut [u8]) -> Self {
        Self {
            start: data.as_mut_ptr(),
            len: data.len(),
        }
    }

    const fn of_const(data: &[u8]) -> Self {
        Self {
            start: data.as_ptr().cast_mut(),
            len: data.len(),
        }
    }

    const fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: made from a slice of the vCPU's mapping, which lives as long as the vCPU that `enter`
        // borrows, and KVM does not touch it before the next KVM_RUN.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

/// Bytes of one access of the port exit that has just happened: 1, 2 or 4.
fn access_size(vcpu: &mut VcpuFd) -> usize {
    // SAFETY: `enter` calls this after a KVM_EXIT_IO only, for which the kernel fills this member.
    let io = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.io };
    usize::from(io.size).max(1)
}

/// The kind of the internal error that has just come back.
pub(super) fn internal_suberror(vcpu: &mut VcpuFd) -> u32 {
    // SAFETY: called after a KVM_EXIT_INTERNAL_ERROR only, for which the kernel fills this member; it is
    // a plain number.
    unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror }
}
