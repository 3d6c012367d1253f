//! A few cycles of the soak, so that every run has some. `cargo xtask soak` does many.

use std::path::Path;

use vmpatch_testkit::{Side, Soak};

use crate::support::{VERSION, patch, shared};

#[test]
#[ignore = "needs guests: cargo xtask test"]
fn ten_cycles_under_load_leave_no_trace() {
    let mut shared = shared();
    let guest = shared.as_mut().unwrap();
    let patch = patch(VERSION, Side::Forward);
    let soak = Soak {
        patch: Path::new(patch.path()),
        name: VERSION,
        cycles: 10,
        progress: |_| {},
    };
    let report = soak.run(guest).unwrap();
    assert_eq!(report.cycles, 10);
    assert_eq!(report.troubles, Vec::<String>::new());
    assert!(report.text_equal);
}
