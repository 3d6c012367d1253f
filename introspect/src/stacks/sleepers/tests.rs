//! A guest with one task that sleeps: what must not happen between the reading of its stack and the stop.

use std::cell::{Cell, RefCell};

use super::*;
use crate::address::{Gpa, GpaRange};
use crate::flat::{BASE, DATA, Flat, SPACE};
use crate::paging::KernelMemory;
use crate::target::MemoryError;
use crate::tasks::TaskKind;
use crate::tasks::fields::Leaving;
use crate::tasks::tests::fields;

/// Within the task, in words that nothing else uses.
const ON_CPU: u64 = 28;
const STATE: u64 = 0x80;
const CPU: u64 = 0x88;
const SAVED_SP: u64 = 0x90;
const CANARY: u64 = 0x98;
const STARTED: u64 = 0xa0;
const WANTED: u64 = 0xa8;
const UNWANTED: u64 = 0xb0;
const REFERENCES: u64 = 0xb8;
const STACK: u64 = 0xc0;
const EXECUTIONS: u64 = 0xc8;

/// Of the guest.
const TASK: u64 = 0x100;
const STACK_AT: u64 = 0x4000;
const STACK_END: u64 = 0x8000;

/// A task that sleeps, off its CPU. Its words are changed as the guest runs.
struct Guest {
    flat: RefCell<Flat>,
    fields: TaskFields,
    /// Once the word around the first of these offsets of the task is read, that at the second is another.
    changes_after: Cell<Option<(u64, u64)>>,
}

impl Guest {
    fn new() -> Self {
        let leaving = Leaving::Listed { head: 0, node: 0 };
        let guest = Self {
            flat: RefCell::new(Flat::new(&[0])),
            fields: TaskFields {
                state: STATE,
                cpu: CPU,
                stack: STACK,
                saved_sp: SAVED_SP,
                stack_refcount: Some(REFERENCES),
                stack_canary: Some(CANARY),
                start_boottime: Some(STARTED),
                exec_id: Some(EXECUTIONS),
                switches: Some([WANTED, UNWANTED]),
                ..fields(leaving)
            },
            changes_after: Cell::new(None),
        };
        for (offset, word) in [
            (STACK, BASE.0 + STACK_AT),
            (SAVED_SP, BASE.0 + STACK_END - 0x100),
            (CANARY, 0x1234_5600),
            (STARTED, 99),
            (EXECUTIONS, 5),
            (WANTED, 3),
            (UNWANTED, 4),
            (REFERENCES, 1),
            (STATE, 1),
        ] {
            guest.put(offset, word);
        }
        guest
    }

    fn put(&self, offset: u64, word: u64) {
        self.flat.borrow_mut().put(TASK + offset, word);
    }

    fn read_sleepers(&self) -> Sleepers {
        let unwinder = Unwinder::for_frame_pointers(self.flat.borrow().range());
        let at = Gva(BASE.0 + TASK);
        let listed = {
            let (flat, words) = (self.flat.borrow(), TaskWords::of(&self.fields));
            let memory = flat.memory();
            let read = words.read(&memory, at).unwrap();
            words.task(&memory, &read, at, TaskKind::Listed).unwrap()
        };
        let memory = KernelMemory::new(self, SPACE);
        let mut reader = Reader::new(None, &unwinder, memory, &[], &[]);
        Sleepers::of(&mut reader, &self.fields, &[listed], &Deadline::none())
    }

    /// What a stop finds in `sleepers`.
    fn take(&self, sleepers: &Sleepers) -> Option<(Task, Stack)> {
        let at = Gva(BASE.0 + TASK);
        let memory = KernelMemory::new(self, SPACE);
        let words = TaskWords::of(&self.fields).read(&memory, at).unwrap();
        let task = sleepers.take(at, &words);
        let stack = sleepers.take_stack(at);
        assert_eq!(task.is_some(), stack.is_some());
        task.zip(stack)
    }
}

impl PhysicalMemory for Guest {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        self.flat.borrow().read(at, into)?;
        let offset = at.0.checked_sub(DATA + TASK);
        if let Some((read, other)) = self.changes_after.get()
            && offset == Some(read & !7)
        {
            self.changes_after.set(None);
            self.put(other, 1000);
        }
        Ok(())
    }

    fn ram(&self) -> Vec<GpaRange> {
        self.flat.borrow().ram()
    }
}

#[test]
fn a_task_that_slept_on_is_known_with_its_state_and_cpu_of_now() {
    let guest = Guest::new();
    let sleepers = guest.read_sleepers();
    assert_eq!(sleepers.len(), 1);
    guest.put(STATE, 0);
    guest.put(CPU, 7);
    let (task, stack) = guest.take(&sleepers).unwrap();
    assert_eq!((task.state, task.cpu), (0, 7));
    assert_eq!(stack.memory[0].end, Gva(BASE.0 + STACK_END));
}

#[test]
fn a_task_is_given_to_one_stop_alone() {
    let guest = Guest::new();
    let sleepers = guest.read_sleepers();
    assert!(guest.take(&sleepers).is_some());
    assert!(sleepers.is_empty() && guest.take(&sleepers).is_none());
    // Also where the first stop could not have it.
    let sleepers = guest.read_sleepers();
    guest.put(WANTED, 4);
    assert!(guest.take(&sleepers).is_none());
    guest.put(WANTED, 3);
    assert!(guest.take(&sleepers).is_none());
}

#[test]
fn a_stack_that_a_stop_gave_up_after_taking_the_task_is_not_the_next_ones() {
    let guest = Guest::new();
    let sleepers = guest.read_sleepers();
    let at = Gva(BASE.0 + TASK);
    let words = || {
        let memory = KernelMemory::new(&guest, SPACE);
        TaskWords::of(&guest.fields).read(&memory, at).unwrap()
    };
    assert!(sleepers.take(at, &words()).is_some());
    guest.put(WANTED, 4);
    assert!(sleepers.take(at, &words()).is_none());
    assert!(sleepers.take_stack(at).is_none());
}

/// With this word of the task changed in between, the stop does not know it.
fn changed(offset: u64, word: u64) {
    let guest = Guest::new();
    let sleepers = guest.read_sleepers();
    guest.put(offset, word);
    assert!(guest.take(&sleepers).is_none());
}

#[test]
fn a_task_that_runs_in_the_stop_is_read_anew() {
    changed(ON_CPU, 1);
}

#[test]
fn a_task_whose_stack_was_freed_is_read_anew() {
    changed(REFERENCES, 0);
}

#[test]
fn a_task_with_another_stack_is_read_anew() {
    changed(STACK, BASE.0);
}

#[test]
fn a_task_with_another_stack_pointer_is_read_anew() {
    changed(SAVED_SP, BASE.0 + STACK_END - 0x108);
}

#[test]
fn a_task_that_was_switched_away_from_of_its_own_will_is_read_anew() {
    changed(WANTED, 4);
}

#[test]
fn a_task_that_was_preempted_is_read_anew() {
    changed(UNWANTED, 5);
}

#[test]
fn another_task_in_the_place_of_the_first_is_read_anew_even_with_its_start() {
    changed(CANARY, 0x1234_5700);
}

#[test]
fn a_kernel_without_canaries_tells_another_task_by_the_other_marks() {
    for (offset, word, same) in [
        (EXECUTIONS, 6, false),
        (STARTED, 100, false),
        (CANARY, 0, true),
    ] {
        let mut guest = Guest::new();
        guest.fields.stack_canary = None;
        let sleepers = guest.read_sleepers();
        guest.put(offset, word);
        assert_eq!(guest.take(&sleepers).is_some(), same, "{offset:#x}");
    }
}

#[test]
fn a_thread_that_took_over_the_start_of_the_first_is_read_anew() {
    changed(EXECUTIONS, 6);
}

#[test]
fn a_task_with_another_start_is_read_anew() {
    changed(STARTED, 100);
}

#[test]
fn a_task_that_runs_or_has_no_stack_when_sleepers_are_read_is_none_of_them() {
    for (offset, word) in [(ON_CPU, 1), (REFERENCES, 0)] {
        let guest = Guest::new();
        guest.put(offset, word);
        assert!(guest.read_sleepers().is_empty(), "{offset:#x}");
    }
}

#[test]
fn where_a_member_is_not_known_no_task_is() {
    let lacking: [fn(&mut TaskFields); 4] = [
        |fields| fields.exec_id = None,
        |fields| fields.start_boottime = None,
        |fields| fields.switches = None,
        |fields| {
            let (within, member) = ("task_struct".to_owned(), "on_cpu".to_owned());
            fields.on_cpu = Err(crate::types::TypeError::NoMember { within, member });
        },
    ];
    for lack in lacking {
        let mut guest = Guest::new();
        lack(&mut guest.fields);
        assert!(guest.read_sleepers().is_empty());
    }
}

/// It slept when `on_cpu` was read, then ran and was counted on its way out, and was out only after its stack
/// was read. With its counts read after `on_cpu`, nothing would tell.
#[test]
fn a_task_that_is_counted_once_it_was_seen_off_its_cpu_is_read_anew() {
    let guest = Guest::new();
    guest.changes_after.set(Some((ON_CPU, WANTED)));
    let sleepers = guest.read_sleepers();
    assert!(guest.take(&sleepers).is_none());
}

/// The counts would be those of the first, and the stack of the second be taken for as old as they are.
#[test]
fn a_task_whose_place_another_took_once_its_counts_were_read_is_read_anew() {
    let guest = Guest::new();
    guest.changes_after.set(Some((WANTED, CANARY)));
    let sleepers = guest.read_sleepers();
    assert!(guest.take(&sleepers).is_none());
}
