//! A stop takes every vCPU out of guest mode wherever it is, or none.

mod support;

use std::time::Duration;

use support::{CODE, guest, kvm, recorder};
use vmpatch_introspect::vcpu::Activity;

const DEADLINE: Duration = Duration::from_secs(2);

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
