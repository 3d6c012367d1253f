//! Stock kernels boot in every shape a machine can have, and their end is seen for what it is.

use std::time::Duration;

use vmpatch_testkit::{Boot, Image};

use crate::support::{boot, guest_name, tool};

const SOON: Duration = Duration::from_secs(60);

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn a_guest_that_reboots_ends_its_process_with_a_reset() {
    let mut guest = boot("reset");
    let mark = guest.console.mark();
    guest.console.type_line("reboot -f").unwrap();
    guest
        .console
        .wait(mark, SOON, |l| l.contains("the guest asked to be reset"))
        .unwrap();
    assert_eq!(guest.wait_end(SOON).unwrap(), Some(0));
}

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn an_uncompressed_kernel_boots_with_four_vcpus_and_memory_on_both_sides_of_the_hole() {
    let image = Image::named(&guest_name()).unwrap();
    let mut shape = Boot::new("elf").vcpus(4);
    shape.elf = true;
    shape.memory = "4G".to_owned();
    let mut guest = shape.start(&tool(), &image).unwrap();
    let online = guest.ask("cat /sys/devices/system/cpu/online").unwrap();
    assert_eq!(online, ["0-3"]);
    let ram = guest.ask("grep 'System RAM' /proc/iomem").unwrap();
    let ram: Vec<&str> = ram.iter().map(|line| line.trim()).collect();
    assert!(ram.contains(&"00100000-bfffffff : System RAM"), "{ram:?}");
    assert!(ram.contains(&"100000000-13fffffff : System RAM"), "{ram:?}");
}
