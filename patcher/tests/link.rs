//! Real patches placed for real guests, from memory dumps.

#![allow(clippy::unwrap_used, reason = "only tests are here")]

mod guests;

use guests::{Guest, samples};
use vmpatch_patcher::arena::Arena;
use vmpatch_patcher::link::{self, Plan};
use vmpatch_patcher::verify::verify;

#[test]
fn every_sample_links_and_its_old_functions_are_found_running() {
    let Some(guest) = Guest::open("debian-6.12") else {
        return;
    };
    let view = link::Guest::new(&guest.kernel, &guest);
    for sample in samples() {
        let name = sample.patch().name.clone();
        let arena = Arena::open(&guest.kernel, &guest, guest.slot()).unwrap();
        let plan = match Plan::link(&sample, &view, &arena) {
            Ok(plan) => plan,
            Err(error) => {
                println!("{name}: {error}");
                if let link::LinkError::Locate(
                    vmpatch_patcher::verify::locate::LocateError::Differs { mismatch, .. },
                ) = &error
                {
                    for line in &mismatch.lines {
                        println!("    {line}");
                    }
                }
                continue;
            }
        };
        let verified = verify(plan, &view, &arena).unwrap();
        println!("{name}: {:#?}", verified.functions);
    }
}
