//! A function of the guest is called within a stop, and the vCPU that called it goes on as if nothing had been.
// Helpers that fail are tests that fail.
#![allow(clippy::unwrap_used)]

mod support;

use std::mem::ManuallyDrop;
use std::time::{Duration, Instant};

use support::{Mode, Served, eventually, guest_in, kvm, recorder};
use vmpatch_introspect::address::{Gpa, Gva};
use vmpatch_introspect::call::{CALL_PORT, Call, CallError, Called, GATE, GATES};
use vmpatch_introspect::target::{Edit, PhysicalMemory, StopRequest, Target};
use vmpatch_vmm::host::{Host, Kind};
use vmpatch_vmm::memory::GuestMemory;
use vmpatch_vmm::vm::State;

/// Page tables of the call: not those that the guest runs on.
const TABLES: u64 = 0x18000;
const GATES_AT: u64 = 0x20000;
const IDT: u64 = 0x21000;
const GDT: u64 = 0x22000;
const TSS: u64 = 0x22100;
const FAULT_STACK: u64 = 0x24000;
const STACK: u64 = 0x26000;
const FUNCTION: u64 = 0x28000;
/// A variable.
const DATA: Gpa = Gpa(0x30000);

/// Counts in a register, and every thousandth time also in memory: inc rbx; mov [0x31000], rbx; jmp back.
const COUNTING: [u8; 13] = [
    0x48, 0xff, 0xc3, 0x48, 0x89, 0x1c, 0x25, 0x00, 0x10, 0x03, 0x00, 0xeb, 0xf3,
];
const COUNT: Gpa = Gpa(0x31000);
/// The guest's count of preemption switched off.
const COUNT_WORD: Gpa = Gpa(0x32000);

/// A guest that counts in 64-bit code, with everything for a call of `function` in its memory.
fn served(code: &[u8], function: &[u8]) -> Option<Served> {
    let kvm = kvm()?;
    let served = Served::new(guest_in(&kvm, Mode::Long, code, recorder()));
    lay_out(served.machine.memory(), function);
    Some(served)
}

fn lay_out(memory: &GuestMemory, function: &[u8]) {
    let put = |at: u64, bytes: &[u8]| memory.write(Gpa(at), bytes).unwrap();
    let word = |at: u64, word: u64| put(at, &word.to_le_bytes());
    for (level, entry) in [(0, TABLES + 0x1003), (1, TABLES + 0x2003), (2, 0x83)] {
        word(TABLES + level * 0x1000, entry);
    }
    for gate in 0..GATES {
        put(GATES_AT + gate * GATE, &[0xe7, CALL_PORT, 0xeb, 0xfe]);
    }
    for vector in 0..256 {
        let to = GATES_AT + vector * GATE;
        // Present, interrupt gate, stack 1.
        word(
            IDT + vector * 16,
            (to & 0xffff) | 0x10 << 16 | 1 << 32 | 0x8e << 40 | (to >> 16 & 0xffff) << 48,
        );
        word(IDT + vector * 16 + 8, to >> 32);
    }
    word(GDT + 0x10, 0x00af_9b00_0000_ffff);
    word(GDT + 0x18, 0x00cf_9300_0000_ffff);
    word(TSS + 36, FAULT_STACK);
    word(STACK - 8, GATES_AT + 256 * GATE);
    put(FUNCTION, function);
}

fn call(budget_ms: u64) -> Call {
    Call {
        vcpu: 0,
        function: Gva(FUNCTION),
        stack: Gva(STACK - 8),
        page_tables: Gpa(TABLES),
        gs_base: Gva(DATA.0),
        gates: Gva(GATES_AT),
        idt: Gva(IDT),
        gdt: Gva(GDT),
        tss: Gva(TSS),
        forbidden: Gva(FUNCTION + 0x100),
        preempt_count: Some(COUNT_WORD),
        budget: Duration::from_millis(budget_ms),
    }
}

fn request(lease_ms: u64) -> StopRequest {
    StopRequest {
        deadline: Duration::from_secs(2),
        lease: Duration::from_millis(lease_ms),
        ..StopRequest::default()
    }
}

/// Calls `function`, and makes sure that the vCPU is as before and the guest counts on.
fn called(function: &[u8], call: Call) -> Option<(Called, Served)> {
    let served = served(&COUNTING, function)?;
    let target = served.target();
    eventually(|| served.machine.memory().read_u64(COUNT).unwrap() > 100);
    let mut stopped = target.stop(request(5000)).unwrap();
    let before = stopped.vcpus()[0];
    let called = stopped.call(&call).unwrap();
    drop(stopped);
    let again = target.stop(request(5000)).unwrap();
    let after = again.vcpus()[0];
    assert_eq!(
        (
            after.gs_base,
            after.cr3,
            after.idt_base,
            after.tss_base,
            after.cs,
            after.efer
        ),
        (
            before.gs_base,
            before.cr3,
            before.idt_base,
            before.tss_base,
            before.cs,
            before.efer
        )
    );
    assert!(after.general[3] >= before.general[3], "rbx went back");
    assert_eq!((after.rflags & 0x200, after.rsp()), (0x200, before.rsp()));
    again.resume().unwrap();
    let count = served.machine.memory().read_u64(COUNT).unwrap();
    eventually(|| served.machine.memory().read_u64(COUNT).unwrap() > count);
    assert_eq!(served.machine.outcome(), None);
    drop(target);
    Some((called, served))
}

#[test]
fn a_function_returns_its_value_and_what_it_wrote_stays() {
    // mov qword gs:[0], 7; mov rbx, 1; mov eax, -16; ret
    let function = [
        0x65, 0x48, 0xc7, 0x04, 0x25, 0, 0, 0, 0, 7, 0, 0, 0, //
        0x48, 0xc7, 0xc3, 1, 0, 0, 0, 0xb8, 0xf0, 0xff, 0xff, 0xff, 0xc3,
    ];
    let Some((called, served)) = called(&function, call(1000)) else {
        return;
    };
    assert_eq!(called, Called::Returned(0xffff_fff0));
    assert_eq!(served.machine.memory().read_u64(DATA).unwrap(), 7);
}

#[test]
fn a_function_that_loops_is_ended_and_the_guest_goes_on() {
    let began = Instant::now();
    let Some((called, _)) = called(&[0xeb, 0xfe], call(30)) else {
        return;
    };
    assert_eq!(called, Called::Late { at: Gva(FUNCTION) });
    assert!(began.elapsed() >= Duration::from_millis(30));
}

#[test]
fn a_trap_is_told_with_its_vector_and_frame() {
    // nop; ud2
    let Some((called, served)) = called(&[0x90, 0x0f, 0x0b], call(1000)) else {
        return;
    };
    let Called::Trapped {
        vector: 6, frame, ..
    } = called
    else {
        panic!("{called:?}");
    };
    assert_eq!(frame, Gva(FAULT_STACK - 40));
    let rip = served.machine.memory().read_u64(Gpa(frame.0)).unwrap();
    assert_eq!(rip, FUNCTION + 1);
}

#[test]
fn the_count_of_preemption_is_put_back_where_a_function_does_not_return() {
    // inc dword [0x32000]; and then: ret, or jump to self, or ud2
    for (end, kept) in [(&[0xc3][..], 1), (&[0xeb, 0xfe], 0), (&[0x0f, 0x0b], 0)] {
        let function = [&[0xff, 0x04, 0x25, 0x00, 0x20, 0x03, 0x00], end].concat();
        let Some((_, served)) = called(&function, call(50)) else {
            return;
        };
        assert_eq!(served.machine.memory().read_u64(COUNT_WORD).unwrap(), kept);
    }
}

#[test]
fn a_page_fault_is_told_with_its_address() {
    // mov rax, [0x40000000]
    let function = [0x48, 0x8b, 0x04, 0x25, 0x00, 0x00, 0x00, 0x40];
    let Some((called, served)) = called(&function, call(1000)) else {
        return;
    };
    let Called::Trapped {
        vector: 14,
        frame,
        cr2: 0x4000_0000,
    } = called
    else {
        panic!("{called:?}");
    };
    // An error code lies before the instruction pointer.
    let rip = served.machine.memory().read_u64(Gpa(frame.0 + 8)).unwrap();
    assert_eq!(rip, FUNCTION);
}

#[test]
fn a_function_that_lost_its_stack_is_a_trap_too() {
    // xor esp, esp; dec esp; push rax
    let function = [0x31, 0xe4, 0xff, 0xcc, 0x50];
    let Some((called, _)) = called(&function, call(1000)) else {
        return;
    };
    assert!(matches!(called, Called::Trapped { .. }), "{called:?}");
}

#[test]
fn code_that_must_not_be_reached_is_not_executed() {
    // A jump there.
    let function = [0xe9, 0xfb, 0x00, 0x00, 0x00];
    let Some((called, _)) = called(&function, call(100)) else {
        return;
    };
    if Host::open().unwrap().kind() == Kind::Software {
        return eprintln!("SKIPPED: a KVM that emulates kernel code knows no breakpoints");
    }
    assert!(
        matches!(called, Called::Trapped { vector: 1, .. }),
        "{called:?}"
    );
}

#[test]
fn a_vcpu_that_takes_no_interrupts_is_not_used() {
    // cli; then as ever
    let code = [&[0xfa][..], &COUNTING].concat();
    let Some(served) = served(&code, &[0xc3]) else {
        return;
    };
    let target = served.target();
    eventually(|| served.machine.memory().read_u64(COUNT).unwrap() > 100);
    let mut stopped = target.stop(request(5000)).unwrap();
    let error = stopped.call(&call(100)).unwrap_err();
    assert!(
        error.to_string().contains("it takes no interrupts"),
        "{error}"
    );
    let error = stopped
        .call(&Call {
            vcpu: 9,
            ..call(100)
        })
        .unwrap_err();
    assert!(matches!(error, CallError::Unreachable(_)), "{error}");
    stopped.resume().unwrap();
}

#[test]
fn a_session_that_dies_in_a_call_leaves_the_guest_running_as_before() {
    let Some(served) = served(&COUNTING, &[0xeb, 0xfe]) else {
        return;
    };
    let target = served.target();
    let mut stopped = target.stop(request(300)).unwrap();
    let edit = Edit {
        at: DATA,
        old: vec![0; 3],
        new: b"new".to_vec(),
    };
    stopped.write(&[edit]).unwrap();
    // The call asks for more time than the lease has.
    let called = stopped.call(&call(60_000)).unwrap();
    assert_eq!(called, Called::Late { at: Gva(FUNCTION) });
    // As if the process had died.
    let _ = ManuallyDrop::new(stopped);
    drop(target);
    eventually(|| served.machine.state() == State::Running);
    assert_eq!(served.machine.memory().read_u64(DATA).unwrap(), 0);
    let count = served.machine.memory().read_u64(COUNT).unwrap();
    eventually(|| served.machine.memory().read_u64(COUNT).unwrap() > count);
}

#[test]
fn a_machine_ends_while_a_function_is_called() {
    let Some(served) = served(&COUNTING, &[0xeb, 0xfe]) else {
        return;
    };
    let target = served.target();
    let mut stopped = target.stop(request(20_000)).unwrap();
    let machine = served.machine.clone();
    let ender = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        machine.terminate();
    });
    let began = Instant::now();
    let called = stopped.call(&call(15_000));
    assert!(began.elapsed() < Duration::from_secs(10), "{called:?}");
    ender.join().unwrap();
    served.machine.wait();
}
