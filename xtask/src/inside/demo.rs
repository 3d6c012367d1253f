//! The demo: a user-space loop shows what a patch does to the kernel below it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use vmpatch_testkit::{Answer, Boot, Guest, Image, Side, Tool, objects, patch_file};

/// The patch of the demo and what the loop shows while it is in.
const PATCH: &str = "proc-version";
const CHANGED: &str = "patched while it runs";
const VCPUS: u32 = 2;
const SOON: Duration = Duration::from_secs(60);

/// The last line. `apply_ms` is the whole command, from its start to its end.
#[derive(Serialize)]
struct Report {
    demo: &'static str,
    kernel: String,
    vcpus: u32,
    stop_window_us: f64,
    apply_ms: u128,
    rollback_stop_window_us: f64,
    r#where: String,
}

/// Boots, patches, shows, rolls back.
pub(super) fn run(name: &str) -> Result<i32> {
    let (tool, image) = (Tool::from_env()?, Image::named(name)?);
    let dir = std::env::temp_dir();
    let file = patch_file(&tool, &objects(name, PATCH)?, PATCH, Side::Forward, &dir)?;
    let file = file.to_str().context("a path that is not UTF-8")?;
    say(&format!(
        "booting {} with {VCPUS} vCPUs; a loop in it prints /proc/version",
        image.release()?
    ));
    let mut guest = Boot::new("web1")
        .vcpus(VCPUS)
        .cmdline("vmpatch.loop=/proc/version")
        .start(&tool, &image)?;
    say(&format!("up after {:.1} s", guest.boot_time.as_secs_f64()));
    show_loop(&guest, |line| line.contains("Linux version"))?;
    step(&guest, &["check", file])?;
    let applied = step(&guest, &["apply", file])?;
    show_loop(&guest, |line| line.contains(CHANGED))?;
    step(&guest, &["status"])?;
    let back = step(&guest, &["rollback", PATCH])?;
    show_loop(&guest, |line| line.contains("Linux version"))?;
    let troubles = guest.troubles();
    ensure!(
        troubles.is_empty(),
        "the guest's kernel complains: {troubles:#?}"
    );
    guest.console.type_line("poweroff -f")?;
    guest.wait_end(SOON)?;
    let report = Report {
        demo: "pass",
        kernel: image.release()?,
        vcpus: VCPUS,
        stop_window_us: applied.number("stop_window_us")?,
        apply_ms: applied.time.as_millis(),
        rollback_stop_window_us: back.number("stop_window_us")?,
        r#where: super::place(),
    };
    println!("{}", serde_json::to_string(&report)?);
    Ok(0)
}

fn say(text: &str) {
    println!("# {text}");
}

/// One call of the tool, shown as a person would type it.
fn step(guest: &Guest, words: &[&str]) -> Result<Answer> {
    println!("\n$ vmpatch {} --vm {} --json", words.join(" "), guest.id);
    let answer = guest.call(words)?;
    let answer = answer
        .expect_code(0)
        .with_context(|| format!("vmpatch {}", words[0]))?;
    println!("{}", answer.stdout.trim());
    Ok(answer)
}

/// Waits until the guest's loop prints such a line, and shows it.
fn show_loop(guest: &Guest, wanted: impl Fn(&str) -> bool) -> Result<()> {
    let mark = guest.console.mark();
    let (line, _) = guest.console.wait(mark, SOON, |line| {
        line.starts_with("@loop ") && wanted(line)
    })?;
    let text: String = line
        .trim_start_matches("@loop ")
        .chars()
        .take(100)
        .collect();
    println!("guest: {text}…");
    Ok(())
}
