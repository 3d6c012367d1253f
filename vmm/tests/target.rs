//! A machine as the command line sees it: over its control socket and the shared page.

mod support;

use std::time::Duration;

use support::{CODE, Served, eventually, guest, kvm, recorder};
use vmpatch_introspect::address::Gpa;
use vmpatch_introspect::target::{
    Edit, PhysicalMemory, ResumeError, StopError, StopRequest, SwitchError, Target, WriteError,
};
use vmpatch_introspect::vcpu::Activity;
use vmpatch_vmm::client;
use vmpatch_vmm::vm::State;

/// inc eax; jmp back
const LOOP: [u8; 4] = [0x66, 0x40, 0xeb, 0xfc];
/// An address of RAM that no guest here uses.
const DATA: Gpa = Gpa(0x8000);

fn request(lease_ms: u64) -> StopRequest {
    StopRequest {
        deadline: Duration::from_secs(2),
        lease: Duration::from_millis(lease_ms),
        ..StopRequest::default()
    }
}

fn edit(at: Gpa, old: &[u8], new: &[u8]) -> Edit {
    Edit {
        at,
        old: old.to_vec(),
        new: new.to_vec(),
    }
}

fn holds(memory: &dyn PhysicalMemory, at: Gpa, expected: &[u8]) -> bool {
    let mut found = vec![0; expected.len()];
    memory.read(at, &mut found).is_ok() && found == expected
}

#[test]
fn a_guest_is_stopped_written_and_resumed() {
    let Some(kvm) = kvm() else { return };
    let served = Served::new(guest(&kvm, &LOOP, 1, recorder()));
    let target = served.target();
    assert_eq!((target.name(), target.vcpu_count()), ("test", 1));
    let mut stopped = target.stop(request(5000)).unwrap();
    assert!((CODE..CODE + 4).contains(&stopped.vcpus()[0].rip.0));
    assert!(holds(stopped.memory(), Gpa(CODE), &LOOP));
    stopped.write(&[edit(DATA, &[0; 5], b"after")]).unwrap();
    let report = stopped.resume().unwrap();
    assert!(report.window >= report.kick + report.registers + report.write);
    assert!(holds(&target, DATA, b"after"));
    assert!(served.machine.memory().written_by_vmm(DATA));
    assert_eq!(served.machine.state(), State::Running);
}

/// By what a change asks for: of a vCPU without paging the registers do not tell whether it runs.
#[test]
fn a_vcpu_that_never_started_is_told_from_one_that_runs_also_in_the_shortest_stop() {
    let Some(kvm) = kvm() else { return };
    let served = Served::new(guest(&kvm, &LOOP, 2, recorder()));
    let target = served.target();
    let stopped = target.stop(StopRequest::for_change()).unwrap();
    let activities: Vec<_> = stopped.vcpus().iter().map(|vcpu| vcpu.activity).collect();
    assert_eq!(activities, [Activity::Running, Activity::WaitingForSipi]);
}

#[test]
fn a_dropped_stop_is_undone() {
    let Some(kvm) = kvm() else { return };
    let served = Served::new(guest(&kvm, &LOOP, 1, recorder()));
    let target = served.target();
    let mut stopped = target.stop(request(5000)).unwrap();
    stopped.write(&[edit(DATA, &[0; 2], b"no")]).unwrap();
    drop(stopped);
    assert!(holds(&target, DATA, &[0; 2]));
    assert_eq!(served.machine.state(), State::Running);
}

#[test]
fn a_batch_that_does_not_match_says_what_is_there_and_writes_nothing() {
    let Some(kvm) = kvm() else { return };
    let served = Served::new(guest(&kvm, &LOOP, 1, recorder()));
    let target = served.target();
    let mut stopped = target.stop(request(5000)).unwrap();
    let other = Gpa(CODE);
    let batch = [edit(DATA, &[0; 2], b"no"), edit(other, b"abcd", b"efgh")];
    match stopped.write(&batch).unwrap_err() {
        WriteError::Differs {
            at,
            expected,
            found,
        } => assert_eq!(
            (at, expected, found),
            (other, b"abcd".to_vec(), LOOP.to_vec())
        ),
        error => panic!("{error}"),
    }
    let error = stopped
        .write(&[edit(Gpa(0x8fff), &[0; 2], b"no")])
        .unwrap_err();
    assert!(
        matches!(
            error,
            WriteError::Malformed {
                at: Gpa(0x8fff),
                ..
            }
        ),
        "{error}"
    );
    stopped.resume().unwrap();
    assert!(holds(&target, DATA, &[0; 2]));
    assert!(holds(&target, other, &LOOP));
}

#[test]
fn a_lease_that_runs_out_undoes_and_resumes() {
    let Some(kvm) = kvm() else { return };
    let served = Served::new(guest(&kvm, &LOOP, 1, recorder()));
    let target = served.target();
    let mut stopped = target.stop(request(50)).unwrap();
    stopped.write(&[edit(DATA, &[0; 2], b"no")]).unwrap();
    eventually(|| served.machine.state() == State::Running);
    assert!(holds(&target, DATA, &[0; 2]));
    let error = stopped.write(&[edit(DATA, &[0; 2], b"no")]).unwrap_err();
    assert!(matches!(error, WriteError::LeaseExpired), "{error}");
    let error = stopped.resume().unwrap_err();
    assert!(matches!(error, ResumeError::LeaseExpired), "{error}");
    assert!(holds(&target, DATA, &[0; 2]));
    target.stop(request(5000)).unwrap().resume().unwrap();
}

#[test]
fn a_switch_writes_and_resumes_as_one() {
    let Some(kvm) = kvm() else { return };
    let served = Served::new(guest(&kvm, &LOOP, 1, recorder()));
    let target = served.target();
    let stopped = target.stop(request(5000)).unwrap();
    let report = stopped.switch(&[edit(DATA, &[0; 5], b"after")]).unwrap();
    assert!(report.window >= report.kick + report.registers + report.write + report.resume);
    assert_eq!(served.machine.state(), State::Running);
    assert!(holds(&target, DATA, b"after"));
    target.stop(request(5000)).unwrap().resume().unwrap();
}

#[test]
fn a_switch_that_cannot_write_lets_the_guest_run_as_before() {
    let Some(kvm) = kvm() else { return };
    let served = Served::new(guest(&kvm, &LOOP, 1, recorder()));
    let target = served.target();
    let batch = [
        edit(DATA, &[0; 2], b"no"),
        edit(Gpa(CODE), b"abcd", b"efgh"),
    ];
    let error = target.stop(request(5000)).unwrap().switch(&batch);
    assert!(
        matches!(
            error,
            Err(SwitchError::Write(WriteError::Differs {
                at: Gpa(CODE),
                ..
            }))
        ),
        "{error:?}"
    );
    assert_eq!(served.machine.state(), State::Running);
    assert!(holds(&target, DATA, &[0; 2]));
    let late = target.stop(request(50)).unwrap();
    eventually(|| served.machine.state() == State::Running);
    let error = late.switch(&[edit(DATA, &[0; 2], b"no")]);
    assert!(
        matches!(error, Err(SwitchError::Write(WriteError::LeaseExpired))),
        "{error:?}"
    );
    assert!(holds(&target, DATA, &[0; 2]));
    target.stop(request(5000)).unwrap().resume().unwrap();
}

#[test]
fn the_arena_is_written_while_the_guest_runs() {
    let Some(kvm) = kvm() else { return };
    let served = Served::new(guest(&kvm, &LOOP, 1, recorder()));
    let target = served.target();
    let arena = target.arena().unwrap();
    let bytes: Vec<u8> = (0..600_000u32).map(|n| n as u8).collect();
    target.write_arena(Gpa(arena.start.0 + 5), &bytes).unwrap();
    assert!(holds(&target, Gpa(arena.start.0 + 5), &bytes));
    assert!(served.machine.memory().written_by_vmm(arena.start));
    assert!(target.write_arena(Gpa(arena.end.0 - 1), b"xy").is_err());
    assert!(target.write_arena(DATA, b"x").is_err());
}

#[test]
fn one_session_at_a_time() {
    let Some(kvm) = kvm() else { return };
    let served = Served::new(guest(&kvm, &LOOP, 1, recorder()));
    let first = served.target();
    assert!(client::status(&served.path()).unwrap().session);
    let error = client::KvmTarget::connect(&served.path()).unwrap_err();
    assert!(error.to_string().contains("another session"), "{error}");
    drop(first);
    eventually(|| client::KvmTarget::connect(&served.path()).is_ok());
}

#[test]
fn the_owners_pause_is_not_a_patchs_stop() {
    let Some(kvm) = kvm() else { return };
    let served = Served::new(guest(&kvm, &LOOP, 1, recorder()));
    let (path, target) = (served.path(), served.target());
    client::pause(&path).unwrap();
    assert!(client::pause(&path).is_err());
    let error = target.stop(request(5000)).err().unwrap();
    assert!(
        error.to_string().contains("its owner has paused it"),
        "{error}"
    );
    client::resume(&path).unwrap();
    let stopped = target.stop(request(5000)).unwrap();
    assert!(client::resume(&path).is_err());
    assert!(client::pause(&path).is_err());
    stopped.resume().unwrap();
    client::terminate(&path).unwrap();
    served.machine.wait();
    let error = target.stop(request(5000)).err().unwrap();
    assert!(matches!(error, StopError::NotRunning(_)), "{error}");
}
