//! Every way a machine ends is told apart, and none hangs.

mod support;

use support::{CODE, Mode, guest, guest_in, kvm, recorder, start};
use vmpatch_vmm::vm::{Fault, Options, Outcome};

#[test]
fn power_off_and_reset_are_told_apart() {
    let Some(kvm) = kvm() else { return };
    // out 0xf4, al / out 0xf5, al
    for (port, outcome) in [(0xf4, Outcome::PowerOff), (0xf5, Outcome::Reset)] {
        let machine = guest(&kvm, &[0xe6, port], 1, recorder());
        assert_eq!(machine.wait(), outcome);
    }
}

#[test]
fn a_terminated_machine_leaves_its_loop() {
    let Some(kvm) = kvm() else { return };
    // jmp $
    let machine = guest(&kvm, &[0xeb, 0xfe], 2, recorder());
    machine.terminate();
    assert_eq!(machine.wait(), Outcome::Terminated);
}

#[test]
fn a_triple_fault_ends_in_a_message_with_registers_and_code() {
    let Some(kvm) = kvm() else { return };
    // mov eax, 0x12345678; ud2, with an empty interrupt table
    let code = [0xb8, 0x78, 0x56, 0x34, 0x12, 0x0f, 0x0b];
    let machine = guest_in(&kvm, Mode::Protected, &code, recorder());
    let Outcome::Crashed(crash) = machine.wait() else {
        panic!("{:?}", machine.outcome());
    };
    let text = crash.to_string();
    assert_eq!(crash.fault, Fault::TripleFault);
    assert!(text.contains("triple fault"), "{text}");
    if std::path::Path::new("/sys/module/kvm_amd").exists() {
        assert!(text.contains("AMD CPU loses the registers"), "{text}");
        assert!(text.contains("rip 0x000000000000fff0"), "{text}");
        return;
    }
    assert!(text.contains("rax 0000000012345678"), "{text}");
    assert!(text.contains("rip 0x0000000000001005"), "{text}");
    assert!(text.contains("[0f, 0b, 00"), "{text}");
}

#[test]
fn an_instruction_that_kvm_cannot_emulate_ends_in_a_message() {
    let Some(kvm) = kvm() else { return };
    // jmp to where no memory is: KVM cannot fetch the instruction to emulate
    let code = [0xe9, 0xfb, 0xef, 0xff, 0x3f];
    let machine = guest_in(&kvm, Mode::Protected, &code, recorder());
    let Outcome::Crashed(crash) = machine.wait() else {
        panic!("{:?}", machine.outcome());
    };
    let text = crash.to_string();
    assert_eq!(crash.fault, Fault::Internal { suberror: 1 }, "{text}");
    assert!(text.contains("code at rip: not readable"), "{text}");
}

#[test]
fn a_breakpoint_reaches_its_handler_on_every_kvm() {
    let Some(kvm) = kvm() else { return };
    // int3; then what is only reached by returning. At 0x10: mov al, 1; out 0xf4, al
    let mut code = vec![0xcc, 0x0f, 0x0b];
    code.resize(0x10, 0x90);
    code.extend([0xb0, 0x01, 0xe6, 0xf4]);
    let options = Options { assist_int3: true };
    let mode = Mode::Breakpoint(CODE as u16 + 0x10);
    let machine = start(&kvm, mode, &code, 1, recorder(), options);
    assert_eq!(machine.wait(), Outcome::PowerOff);
}

#[test]
fn a_device_that_panics_ends_the_machine_and_hangs_nobody() {
    let Some(kvm) = kvm() else { return };
    let devices = recorder();
    devices.lock().unwrap().on_access = Some(Box::new(|| panic!("as the test wants")));
    // out 0x80, al
    let machine = guest(&kvm, &[0xe6, 0x80], 2, devices);
    let Outcome::Crashed(crash) = machine.wait() else {
        panic!("{:?}", machine.outcome());
    };
    assert!(crash.to_string().contains("panicked"), "{crash}");
    assert!(machine.stop(std::time::Duration::from_secs(1)).is_err());
}
