//! A stop takes every vCPU out of guest mode wherever it is, or none.
// Helpers that fail are tests that fail.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use support::{
    CODE, MMIO, Mode, START_OTHERS, Shared, eventually, guest, guest_in, kvm, recorder, start,
};
use vmpatch_introspect::address::Gpa;
use vmpatch_introspect::target::{PhysicalMemory, StopError};
use vmpatch_introspect::vcpu::{Activity, Vcpu};
use vmpatch_vmm::vm::{Options, Running, State};

const DEADLINE: Duration = Duration::from_secs(2);
/// Where string instructions read from or write to.
const BUFFER: u64 = 0x8000;
/// A counter that a second vCPU raises.
const COUNTER: Gpa = Gpa(0x9000);

const RCX: usize = 1;
const RSI: usize = 6;
const RDI: usize = 7;

#[test]
fn a_thousand_stops_of_a_tight_loop() {
    let Some(kvm) = kvm() else { return };
    // inc eax; jmp back
    let machine = guest(&kvm, &[0x66, 0x40, 0xeb, 0xfc], 1, recorder());
    for _ in 0..1000 {
        let stopped = machine.stop(DEADLINE).unwrap();
        let vcpu = stopped.vcpus()[0];
        assert!((CODE..CODE + 4).contains(&vcpu.rip.0), "{vcpu:?}");
        assert_eq!(vcpu.activity, Activity::Running);
        let report = stopped.resume();
        assert!(
            report.window >= report.kick + report.registers,
            "{report:?}"
        );
    }
}

#[test]
fn a_guest_that_is_stopped_does_not_move() {
    let Some(kvm) = kvm() else { return };
    // inc word [0x9000]; jmp back
    let machine = guest(&kvm, &[0xff, 0x06, 0x00, 0x90, 0xeb, 0xfa], 1, recorder());
    eventually(|| counter(&machine) != 0);
    let stopped = machine.stop(DEADLINE).unwrap();
    let before = counter(&machine);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(counter(&machine), before);
    let _ = stopped.resume();
    eventually(|| counter(&machine) != before);
}

#[test]
fn a_halted_vcpu_is_seen_as_halted_and_sleeps_on() {
    let Some(kvm) = kvm() else { return };
    // hlt; jmp back
    let machine = guest(&kvm, &[0xf4, 0xeb, 0xfd], 1, recorder());
    eventually(|| halted(&machine));
    let stopped = machine.stop(DEADLINE).unwrap();
    assert_eq!(stopped.vcpus()[0].rip.0, CODE + 1);
    let _ = stopped.resume();
    assert!(halted(&machine));
}

fn halted(machine: &Arc<Running>) -> bool {
    let stopped = machine.stop(DEADLINE).unwrap();
    stopped.vcpus()[0].activity == Activity::Halted
}

#[test]
fn a_string_port_write_is_completed_before_registers_are_read() {
    let Some(kvm) = kvm() else { return };
    let count: u16 = 3000;
    // mov si, BUFFER; mov cx, count; mov dx, 0x80; cld; rep outsb; hlt; jmp back
    let mut code = vec![0xbe, 0x00, 0x80, 0xb9];
    code.extend(count.to_le_bytes());
    code.extend([0xba, 0x80, 0x00, 0xfc, 0xf3, 0x6e, 0xf4, 0xeb, 0xfd]);
    let (devices, pause) = pausing(recorder(), 10);
    let machine = guest(&kvm, &code, 1, devices.clone());
    let stopped = stop_in_the_middle(&machine, &pause);
    let vcpu = stopped.vcpus()[0];
    let written = devices.lock().unwrap().written.len() as u64;
    assert!(written >= 10 && written < u64::from(count), "{written}");
    assert_eq!(vcpu.general[RSI], BUFFER + written, "{vcpu:?}");
    assert_eq!(vcpu.general[RCX], u64::from(count) - written, "{vcpu:?}");
    let _ = stopped.resume();
    eventually(|| devices.lock().unwrap().written.len() == usize::from(count));
    eventually(|| halted(&machine));
    assert_eq!(devices.lock().unwrap().written.len(), usize::from(count));
}

#[test]
fn a_string_copy_from_a_device_is_completed_before_registers_are_read() {
    let Some(kvm) = kvm() else { return };
    // mov esi, MMIO; mov edi, BUFFER; mov ecx, 100; cld; rep movsb; hlt; jmp back
    let mut code = vec![0xbe];
    code.extend((MMIO as u32).to_le_bytes());
    code.extend([0xbf, 0x00, 0x80, 0x00, 0x00, 0xb9, 100, 0, 0, 0]);
    code.extend([0xfc, 0xf3, 0xa4, 0xf4, 0xeb, 0xfd]);
    let (devices, pause) = pausing(recorder(), 4);
    let machine = guest_in(&kvm, Mode::Protected, &code, devices.clone());
    let stopped = stop_in_the_middle(&machine, &pause);
    let vcpu = stopped.vcpus()[0];
    let reads = u64::from(devices.lock().unwrap().reads);
    assert_copied(&machine, &vcpu, reads);
    let _ = stopped.resume();
    eventually(|| halted(&machine));
    let stopped = machine.stop(DEADLINE).unwrap();
    assert_copied(&machine, &stopped.vcpus()[0], 100);
}

/// The device answers each read with the count of reads before it: what is copied tells them all.
fn assert_copied(machine: &Running, vcpu: &Vcpu, reads: u64) {
    assert!(reads >= 4, "{reads}");
    assert_eq!(vcpu.general[RDI], BUFFER + reads, "{vcpu:?}");
    assert_eq!(vcpu.general[RCX], 100 - reads, "{vcpu:?}");
    let mut copied = [0; 101];
    machine.memory().read(Gpa(BUFFER), &mut copied).unwrap();
    for (at, byte) in copied.iter().enumerate() {
        let expected = if at < reads as usize { at as u8 } else { 0 };
        assert_eq!(*byte, expected, "at {at}");
    }
}

/// The test's end of a device that stands still.
struct Pause {
    reached: Receiver<()>,
    go_on: Sender<()>,
}

/// Makes the device stand still in its `nth` access until the test lets it go on.
fn pausing(devices: Shared, nth: u32) -> (Shared, Pause) {
    let (tell, reached) = channel();
    let (go_on, wait) = channel();
    let mut count = 0;
    devices.lock().unwrap().on_access = Some(Box::new(move || {
        count += 1;
        if count == nth {
            tell.send(()).unwrap();
            wait.recv().unwrap();
        }
    }));
    (devices, Pause { reached, go_on })
}

/// Stops the machine while its vCPU is in the device; the device goes on once the kick is out.
fn stop_in_the_middle(machine: &Arc<Running>, pause: &Pause) -> vmpatch_vmm::vm::Stopped {
    pause.reached.recv().unwrap();
    std::thread::scope(|scope| {
        let stopping = scope.spawn(|| machine.stop(DEADLINE));
        eventually(|| matches!(machine.state(), State::Stopping(_)));
        std::thread::sleep(Duration::from_millis(5));
        pause.go_on.send(()).unwrap();
        stopping.join().unwrap().unwrap()
    })
}

#[test]
fn vcpus_that_wait_for_their_start_are_stopped_as_such_and_start_later() {
    let Some(kvm) = kvm() else { return };
    // in al, 0x80 (stands still); start the others; jmp self
    let mut code = vec![0xe4, 0x80];
    code.extend(START_OTHERS);
    code.extend([0xeb, 0xfe]);
    let (devices, pause) = pausing(recorder(), 1);
    let machine = with_others(&kvm, &code, 3, devices);
    pause.reached.recv().unwrap();
    let error = machine.stop(Duration::from_millis(20)).unwrap_err();
    assert!(
        matches!(error, StopError::Deadline { vcpu: 0, .. }),
        "{error}"
    );
    pause.go_on.send(()).unwrap();
    eventually(|| counter(&machine) != 0);
    let stopped = machine.stop(DEADLINE).unwrap();
    for vcpu in &stopped.vcpus()[1..] {
        assert_eq!(vcpu.activity, Activity::Running, "{vcpu:?}");
        assert_eq!((vcpu.cs, vcpu.rip.0 & !0xf), (0x200, 0), "{vcpu:?}");
    }
}

#[test]
fn vcpus_that_never_start_do_not_hold_up_a_stop() {
    let Some(kvm) = kvm() else { return };
    let machine = guest(&kvm, &[0xeb, 0xfe], 3, recorder());
    for _ in 0..20 {
        let stopped = machine.stop(DEADLINE).unwrap();
        let activities: Vec<_> = stopped.vcpus().iter().map(|vcpu| vcpu.activity).collect();
        let waits = Activity::WaitingForSipi;
        assert_eq!(activities, [Activity::Running, waits, waits]);
        let _ = stopped.resume();
    }
}

#[test]
fn one_late_vcpu_lets_all_others_go() {
    let Some(kvm) = kvm() else { return };
    // start the others; in al, 0x80 (stands still); jmp self
    let mut code = START_OTHERS.to_vec();
    code.extend([0xe4, 0x80, 0xeb, 0xfe]);
    let (devices, pause) = pausing(recorder(), 1);
    let machine = with_others(&kvm, &code, 2, devices);
    pause.reached.recv().unwrap();
    eventually(|| counter(&machine) != 0);
    for _ in 0..3 {
        let error = machine.stop(Duration::from_millis(30)).unwrap_err();
        assert!(
            matches!(error, StopError::Deadline { vcpu: 0, .. }),
            "{error}"
        );
        assert_eq!(machine.state(), State::Running);
        let before = counter(&machine);
        eventually(|| counter(&machine) != before);
    }
    pause.go_on.send(()).unwrap();
    let _ = machine.stop(DEADLINE).unwrap().resume();
}

/// A guest in 32-bit mode whose other vCPUs, once started, raise a counter.
fn with_others(kvm: &kvm_ioctls::Kvm, code: &[u8], vcpus: u32, devices: Shared) -> Arc<Running> {
    // At 0x2000, in 16-bit code with DS = 0: inc word [0x9000]; jmp back
    let mut whole = code.to_vec();
    whole.resize(0x1000, 0);
    whole.extend([0xff, 0x06, 0x00, 0x90, 0xeb, 0xfa]);
    start(
        kvm,
        Mode::Protected,
        &whole,
        vcpus,
        devices,
        Options::default(),
    )
}

fn counter(machine: &Running) -> u16 {
    let mut word = [0; 2];
    machine.memory().read(COUNTER, &mut word).unwrap();
    u16::from_le_bytes(word)
}

#[test]
fn two_cannot_stop_at_once() {
    let Some(kvm) = kvm() else { return };
    let machine = guest(&kvm, &[0xeb, 0xfe], 1, recorder());
    let first = machine.stop(DEADLINE).unwrap();
    let error = machine.stop(DEADLINE).unwrap_err();
    assert!(matches!(error, StopError::NotRunning(_)), "{error}");
    drop(first);
    assert!(machine.stop(DEADLINE).is_ok());
}

#[test]
fn a_machine_that_ends_while_it_is_stopped_hangs_nobody() {
    let Some(kvm) = kvm() else { return };
    let machine = guest(&kvm, &[0xeb, 0xfe], 2, recorder());
    let stopped = machine.stop(DEADLINE).unwrap();
    machine.terminate();
    machine.wait();
    let _ = stopped.resume();
    let error = machine.stop(DEADLINE).unwrap_err();
    assert!(error.to_string().contains("terminated"), "{error}");
}

#[test]
fn eight_busy_vcpus_are_all_stopped_every_time() {
    let Some(kvm) = kvm() else { return };
    // start the others; jmp self
    let mut code = START_OTHERS.to_vec();
    code.extend([0xeb, 0xfe]);
    let machine = with_others(&kvm, &code, 8, recorder());
    eventually(|| counter(&machine) != 0);
    let all_run = |vcpus: &[Vcpu]| vcpus.iter().all(|vcpu| vcpu.activity == Activity::Running);
    eventually(|| all_run(machine.stop(DEADLINE).unwrap().vcpus()));
    for _ in 0..50 {
        let stopped = machine.stop(DEADLINE).unwrap();
        let indices: Vec<_> = stopped.vcpus().iter().map(|vcpu| vcpu.index).collect();
        assert_eq!(indices, [0, 1, 2, 3, 4, 5, 6, 7]);
        let before = counter(&machine);
        std::thread::yield_now();
        assert_eq!(counter(&machine), before);
        let _ = stopped.resume();
    }
}

#[test]
fn stops_pauses_and_the_end_race_without_a_hang() {
    let Some(kvm) = kvm() else { return };
    for milliseconds in 0..20 {
        let machine = guest(&kvm, &[0xe6, 0x80, 0xeb, 0xfc], 2, recorder());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while machine.outcome().is_none() {
                    // Refused while another holds the machine.
                    let _ = machine.pause(DEADLINE).and_then(|()| machine.unpause());
                }
            });
            for _ in 0..2 {
                scope.spawn(|| {
                    while machine.outcome().is_none() {
                        let _ = machine.stop(DEADLINE).map(vmpatch_vmm::vm::Stopped::resume);
                    }
                });
            }
            std::thread::sleep(Duration::from_millis(milliseconds));
            machine.terminate();
        });
        machine.wait();
    }
}
