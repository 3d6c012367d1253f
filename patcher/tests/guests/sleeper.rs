//! A task made to sleep in new code: a frame put between two of those it has, as a call would have. Nothing but its stack and
//! its saved stack pointer is written.

use iced_x86::{Decoder, DecoderOptions, Mnemonic};
use vmpatch_introspect::stacks::Stack;
use vmpatch_introspect::unwind::orc::{Base, Entry};
use vmpatch_introspect::unwind::{FrameKind, Unwinder};
use vmpatch_introspect::{Gva, GvaRange, Kernel};
use vmpatch_patcher::testing::Machine;

/// Size of `struct inactive_task_frame`, which lies below the first frame (Linux v6.12 arch/x86/include/asm/switch_to.h).
const INACTIVE: u64 = 56;
/// Which frame calls the new one: the scheduler's own are inside.
const CALLER: usize = 2;

/// A place in new code to sleep at: behind a call, with what holds there.
pub(crate) fn behind_a_call(
    kernel: &Kernel,
    machine: &Machine,
    unwinder: &Unwinder,
    function: GvaRange,
) -> (Gva, Entry) {
    let mut code = vec![0; usize::try_from(function.size()).unwrap()];
    kernel
        .memory(machine)
        .read(function.start, &mut code)
        .unwrap();
    let decoder = Decoder::with_ip(64, &code, function.start.0, DecoderOptions::NONE);
    let calls = decoder
        .into_iter()
        .filter(|it| it.mnemonic() == Mnemonic::Call);
    let mut places = calls.filter_map(|call| {
        let entry = unwinder.entry_at(Gva(call.ip()))?;
        (entry.sp == Base::Sp).then_some((Gva(call.next_ip()), entry))
    });
    places.next().unwrap()
}

/// Puts the frame in, of a function that is returned to at `at`, and `stale` in a word of its caller that holds nothing of use, as
/// a deeper call may have left it. Returns the task.
pub(crate) fn puts(
    kernel: &Kernel,
    machine: &Machine,
    stacks: &[Stack],
    (at, entry): (Gva, Entry),
    stale: Gva,
) -> i32 {
    let sleeps = |stack: &&Stack| {
        let frames = &stack.trace.frames;
        let calls = frames.iter().all(|frame| frame.kind == FrameKind::Call);
        // Every CPU's idle task has number 0, so that is no way to find one again.
        let task = stack.task.as_ref();
        let kthread = task.is_some_and(|task| task.kernel_thread && task.pid > 0);
        let has_locals = || frames[CALLER + 1].sp.0 - frames[CALLER].sp.0 >= 64;
        kthread
            && calls
            && stack.vcpu.is_none()
            && stack.trace.unreliable.is_none()
            && frames.len() > CALLER + 1
            && has_locals()
    };
    let stack = stacks.iter().find(sleeps).unwrap();
    let task = stack.task.as_ref().unwrap();
    // A return address lies right below the frame that it returns to.
    let slot = stack.trace.frames[CALLER].sp.wrapping_sub(8);
    let saved = stack.trace.frames[0].sp.wrapping_sub(INACTIVE);
    assert_eq!(saved, task.saved_sp);
    let size = u64::try_from(entry.sp_offset).unwrap();
    let write = |place: Gva, word: u64| {
        let space = kernel.layout.space;
        let place = space.translate(machine, place).unwrap().unwrap().at;
        machine.set(place, &word.to_le_bytes());
    };
    for from in (saved.0..slot.0).step_by(8) {
        let word = kernel.memory(machine).read_pointer(Gva(from)).unwrap().0;
        // Frame pointers go along.
        let moved = match (saved.0..slot.0).contains(&word) {
            true => word - size,
            false => word,
        };
        write(Gva(from - size), moved);
    }
    write(Gva(slot.0 - size), at.0);
    write(stack.trace.frames[CALLER].sp, stale.0);
    let thread = kernel.types.offset_of("task_struct", "thread").unwrap();
    let sp = kernel.types.offset_of("thread_struct", "sp").unwrap();
    write(task.at.wrapping_add(thread + sp), saved.0 - size);
    task.pid
}
