//! Quiescence: nothing of the guest stands in the code that is about to change. Asks a [`Witness`] what is
//! there, lets the [`gate`] judge, and reports what is in the way. Stops and writes nothing.

pub mod busy;
pub mod gate;
pub mod ranges;
pub mod witness;

use vmpatch_introspect::{AttachError, Deadline, PhysicalMemory, Vcpu};

pub use busy::{Busy, Elsewhere, Evidence, Finding, TaskName, Who};
pub use ranges::BusyRanges;
pub use witness::{LiveKernel, Witness};

/// Why a stopped guest is not quiet.
#[derive(Debug, thiserror::Error)]
pub enum NotQuiet {
    /// Something is in the way now and may be gone later.
    #[error("{0}")]
    Busy(Busy),
    /// The guest has booted anew since the change was made for it.
    #[error("the guest has booted anew since it was looked at")]
    OtherBoot,
    /// Not enough of the guest can be read to say.
    #[error("the stopped guest cannot be examined: {0}")]
    Unknown(#[from] AttachError),
}

/// What was looked at and found quiet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Examined {
    /// How many stacks.
    pub stacks: usize,
    /// How many of them could not be followed to their end and were searched word by word.
    pub scanned: usize,
}

/// Examines a stopped guest: same boot, every vCPU in that kernel, no text patching in flight, the same modules, those to be
/// changed live, nothing in the busy ranges. All of it before `deadline`, the end of what the stop's lease
/// leaves for it.
///
/// # Errors
/// [`NotQuiet`].
pub fn examine(
    witness: &dyn Witness,
    memory: &dyn PhysicalMemory,
    vcpus: &[Vcpu],
    ranges: &BusyRanges,
    deadline: &Deadline,
) -> Result<Examined, NotQuiet> {
    if !witness.same_boot(memory) {
        return Err(NotQuiet::OtherBoot);
    }
    let mut busy = foreign_vcpus(witness, vcpus);
    if let Some(what) = witness.text_patching(memory)? {
        busy.add(Finding::TextPatching { what });
    }
    if !witness.same_modules(memory, deadline)? {
        busy.add(Finding::ModulesChanged);
    }
    for claim in ranges
        .modules()
        .iter()
        .filter(|it| !witness.is_live(it, memory))
    {
        let module = claim.name.clone();
        busy.add(Finding::ModuleLeaves { module });
    }
    if !busy.is_empty() {
        return Err(NotQuiet::Busy(busy));
    }
    let stacks = witness.stacks(memory, vcpus, deadline)?;
    let read = witness.reader(memory);
    gate::examine_stacks(&stacks, ranges, &*read, deadline, &mut busy)?;
    gate::examine_vcpus(vcpus, &stacks, ranges, &mut busy);
    if !busy.is_empty() {
        return Err(NotQuiet::Busy(busy));
    }
    let scanned = stacks
        .iter()
        .filter(|stack| stack.trace.unreliable.is_some())
        .count();
    Ok(Examined {
        stacks: stacks.len(),
        scanned,
    })
}

/// The vCPUs whose registers say nothing of the guest's kernel.
fn foreign_vcpus(witness: &dyn Witness, vcpus: &[Vcpu]) -> Busy {
    let mut busy = Busy::default();
    for vcpu in vcpus {
        if let Some(what) = witness.elsewhere(vcpu) {
            let vcpu = vcpu.index;
            busy.add(Finding::Elsewhere { vcpu, what });
        }
    }
    busy
}
