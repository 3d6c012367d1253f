//! State: what the guest has is taken for its own in the new version only where that is certain.
#![allow(clippy::unwrap_used, clippy::panic, reason = "only tests are here")]

mod objects;

use objects::{named, new_body, nothing, patch, refused};

const INIT: &str = "static section(\".init.data\") int table[2] = { 3, 4 };
    static noinline section(\".init.text\") int helper(int n) { return n * 5; }
    section(\".init.text\") int setup(int n) { return helper(n) + table[n]; }";

#[test]
fn init_code_that_becomes_plain_comes_along() {
    let old = format!("{INIT} int run(int n) {{ return n; }}");
    let new = INIT.replace("noinline section(\".init.text\")", "noinline");
    let (patch, _) = patch(
        &old,
        &format!("{new} int run(int n) {{ return helper(n); }}"),
    );
    let names = named(&patch, &new_body(&patch).relocations);
    assert!(names.contains(&"own helper".to_owned()), "{names:?}");
}

#[test]
fn data_that_the_guest_keeps_otherwise_than_the_new_version_does_is_refused() {
    let run = |body: &str| format!("int run(int n) {{ return {body}; }}");
    let init = format!("{INIT} {}", run("n"));
    let kept = INIT.replace("static section(\".init.data\")", "static");
    let kept = format!("{kept} {}", run("n + table[n]"));
    let plain = format!("int cnt = 1; {}", run("cnt += n"));
    let in_section = |name: &str| plain.replace("int cnt", &format!("section(\"{name}\") int cnt"));
    let (per_cpu, sealed) = (
        in_section(".data..percpu"),
        in_section(".data..ro_after_init"),
    );
    for (old, new, name, reason) in [
        (&init, &kept, "table", "freed"),
        (&plain, &per_cpu, "cnt", "per-CPU"),
        (&per_cpu, &plain, "cnt", "per-CPU"),
        (&sealed, &plain, "cnt", "no longer write"),
    ] {
        let report = refused(old, new);
        let mut said = report.refused.iter();
        assert!(
            said.any(|it| it.name == name && it.reason.contains(reason)),
            "{report}"
        );
    }
    nothing(&plain, &sealed);
}
