//! Measures how long it takes from nothing to all symbols, types and tasks of a guest, on a dump of one:
//! `cargo run --release -p vmpatch-introspect --example attach -- FOLDER [ROUNDS]`. Ends with one JSON line.

use std::error::Error;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;
use vmpatch_introspect::{Dump, Kernel};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().ok_or("usage: attach FOLDER [ROUNDS]")?;
    let rounds = arguments.next().map_or(Ok(20), |text| text.parse())?;
    let mut times = Vec::new();
    let mut found = Found::default();
    for _ in 0..rounds {
        let (time, seen) = once(Path::new(&folder))?;
        times.push(time);
        found = seen;
    }
    times.sort();
    let at = |share: usize| {
        let index = (times.len() * share / 100).min(times.len().saturating_sub(1));
        times
            .get(index)
            .map_or(0.0, |time| time.as_secs_f64() * 1e3)
    };
    let Found {
        kernel,
        symbols,
        tasks,
    } = found;
    println!(
        "{}",
        json!({ "median_ms": at(50), "p99_ms": at(99), "kernel": kernel, "symbols": symbols, "tasks": tasks, "rounds": rounds })
    );
    Ok(())
}

/// What an attach found.
#[derive(Default)]
struct Found {
    kernel: String,
    symbols: usize,
    tasks: usize,
}

/// One attach.
fn once(folder: &Path) -> Result<(Duration, Found), Box<dyn Error>> {
    let since = Instant::now();
    let dump = Dump::open(folder)?;
    let kernel = Kernel::attach(&dump, dump.vcpus())?;
    let tasks = kernel.tasks(&dump)?.len();
    let time = since.elapsed();
    let symbols = kernel.symbols.iter().count();
    let found = Found {
        kernel: kernel.identity.release,
        symbols,
        tasks,
    };
    Ok((time, found))
}
