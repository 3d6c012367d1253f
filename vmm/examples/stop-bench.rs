//! Measures stop, registers and resume of a machine as the command line does them, bare and with a write of
//! five bytes, on a guest that spins:
//! `cargo run --release -p vmpatch-vmm --example stop-bench -- [VCPUS] [ROUNDS]`. Ends with one JSON line.
//!
//! With two or more vCPUs the others wait for their start-up IPI.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use serde_json::json;
use vmpatch_introspect::address::Gpa;
use vmpatch_introspect::target::{Edit, StopReport, StopRequest, Target};
use vmpatch_vmm::bus::Bus;
use vmpatch_vmm::client::{Description, KvmTarget};
use vmpatch_vmm::control::{ControlServer, RunDir};
use vmpatch_vmm::memory::{GuestMemory, Layout};
use vmpatch_vmm::vm::{Options, Running, Vm};

/// Where the guest's loop lies.
const CODE: u64 = 0x1000;
/// `inc eax; jmp` back, in 16-bit code.
const LOOP: [u8; 4] = [0x66, 0x40, 0xeb, 0xfc];
/// Bytes that each stop changes and the next changes back.
const SITE: Gpa = Gpa(0x8000);
const RAM: u64 = 16 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default| arguments.next().map_or(Ok(default), |text| text.parse());
    let (vcpus, rounds) = (number(1)?, number(2000)?);
    let folder = std::env::temp_dir();
    let place = RunDir::claim(&folder, &format!("stop-bench-{}", std::process::id()))?;
    let path = place.path().to_string_lossy().into_owned();
    let machine = machine(vcpus)?;
    let description = Description {
        id: "stop-bench".into(),
        pid: std::process::id(),
        vcpus: machine.vcpu_count(),
        memory: RAM,
        kernel: None,
    };
    let _server = ControlServer::start(place, machine, description)?;
    let target = KvmTarget::connect(&path)?;
    let (mut bare, mut writing) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        bare.push(stop_once(&target, None)?);
        writing.push(stop_once(&target, Some(edit(round)))?);
    }
    let line = json!({
        "bench": "stop",
        "vcpus": vcpus,
        "rounds": rounds,
        "bare": summary(&bare),
        "with_write": summary(&writing),
    });
    println!("{line}");
    Ok(())
}

fn machine(vcpus: u64) -> Result<Arc<Running>, Box<dyn Error>> {
    let memory = GuestMemory::new(Layout::new(RAM, 40)?)?;
    memory.write(Gpa(CODE), &LOOP)?;
    let mut vm = Vm::new(&Kvm::new()?, memory, Options::default())?;
    for _ in 0..vcpus {
        vm.add_vcpu()?;
    }
    if let Some(vcpu) = vm.vcpus().first() {
        let mut sregs = vcpu.get_sregs()?;
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs)?;
        let mut regs = vcpu.get_regs()?;
        (regs.rip, regs.rflags) = (CODE, 2);
        vcpu.set_regs(&regs)?;
    }
    Ok(vm.start(Arc::new(Bus::default()))?)
}

/// Changes the site, or changes it back.
fn edit(round: u64) -> Edit {
    let (old, new) = if round.is_multiple_of(2) {
        ([0; 5], [1; 5])
    } else {
        ([1; 5], [0; 5])
    };
    Edit {
        at: SITE,
        old: old.to_vec(),
        new: new.to_vec(),
    }
}

/// One stop, and how long it took as the client saw it.
fn stop_once(
    target: &KvmTarget,
    edit: Option<Edit>,
) -> Result<(StopReport, Duration), Box<dyn Error>> {
    // Lets the guest run for a moment: a vCPU that has just been let go is not yet in the guest.
    std::thread::sleep(Duration::from_micros(200));
    let begin = Instant::now();
    let stopped = target.stop(StopRequest::for_change())?;
    let report = match edit {
        Some(edit) => stopped.switch(&[edit])?,
        None => stopped.resume()?,
    };
    Ok((report, begin.elapsed()))
}

type Part = fn(&(StopReport, Duration)) -> Duration;

fn summary(measured: &[(StopReport, Duration)]) -> serde_json::Value {
    let parts: [(&str, Part); 6] = [
        ("kick_us", |(report, _)| report.kick),
        ("registers_us", |(report, _)| report.registers),
        ("write_us", |(report, _)| report.write),
        ("resume_us", |(report, _)| report.resume),
        ("window_us", |(report, _)| report.window),
        ("round_trip_us", |(_, total)| *total),
    ];
    let mut line = json!({});
    for (name, part) in parts {
        let mut times: Vec<_> = measured.iter().map(part).collect();
        times.sort_unstable();
        let at = |share: usize| {
            let index = times.len().saturating_sub(1) * share / 1000;
            times
                .get(index)
                .map_or(0.0, |time| time.as_nanos() as f64 / 1000.0)
        };
        line[name] = json!({"median": at(500), "p99": at(990)});
    }
    line
}
