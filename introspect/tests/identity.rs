//! Identity equals what the guest says of itself in `/proc/version` and `/sys/kernel/notes`.

mod common;

use std::collections::HashSet;
use std::sync::Mutex;

use common::each_guest;

#[test]
fn the_banner_equals_proc_version() {
    each_guest(|guest| {
        let identity = &guest.kernel.identity;
        assert_eq!(
            identity.banner,
            guest.answer("version.txt").unwrap().trim_end()
        );
        assert!(identity.banner.contains(&format!(" {} ", identity.release)));
    });
}

#[test]
fn the_build_id_is_that_of_the_notes() {
    each_guest(|guest| {
        let notes = guest.answer("notes.hex").unwrap().replace('\n', "");
        let note = format!(
            "040000001400000003000000474e5500{}",
            guest.kernel.identity.build_id.as_deref().unwrap()
        );
        assert!(notes.contains(&note));
    });
}

#[test]
fn the_image_lies_where_the_guest_shows_its_kernel_code() {
    each_guest(|guest| {
        let answer = guest.answer("iomem.txt").unwrap();
        let line = answer
            .lines()
            .find(|line| line.ends_with("Kernel code"))
            .unwrap();
        let start = u64::from_str_radix(line.trim().split('-').next().unwrap(), 16).unwrap();
        let kernel = &guest.kernel;
        let image = kernel.layout.text.start.0 - 0xffff_ffff_8000_0000;
        assert_eq!(image.wrapping_add(kernel.identity.phys_base), start);
        assert_eq!(kernel.identity.slide % (2 << 20), 0);
    });
}

#[test]
fn no_two_boots_have_the_same_identity() {
    let seen = Mutex::new(HashSet::new());
    each_guest(|guest| {
        let boot = guest.kernel.identity.boot.clone();
        assert_eq!(boot.len(), 32);
        assert!(seen.lock().unwrap().insert(boot), "{}", guest.name);
    });
}
