//! Every vCPU of a stopped guest shows the kernel that was found.

mod common;

use common::each_guest;
use vmpatch_introspect::{ForeignVcpu, Gva, Vcpu};

#[test]
fn every_vcpu_runs_the_kernel_that_was_found() {
    each_guest(|guest| {
        for vcpu in guest.dump.vcpus() {
            assert_eq!(guest.kernel.check_vcpu(vcpu), Ok(()));
        }
    });
}

#[test]
fn a_vcpu_with_another_interrupt_table_or_no_cpu_area_is_foreign() {
    each_guest(|guest| {
        let vcpu = guest.dump.vcpus()[0];
        let other = Vcpu {
            idt_base: Gva(0x1000),
            ..vcpu
        };
        assert!(matches!(
            guest.kernel.check_vcpu(&other),
            Err(ForeignVcpu::OtherTable { .. })
        ));
        let stray = Vcpu {
            gs_base: Gva(1),
            kernel_gs_base: Some(Gva(2)),
            ..vcpu
        };
        assert_eq!(
            guest.kernel.check_vcpu(&stray),
            Err(ForeignVcpu::OtherCpu(Gva(1)))
        );
    });
}
