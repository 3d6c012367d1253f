//! What reading all stacks of a stopped guest costs: `cargo run --release --example stacks DUMP_FOLDER`.
//! Prints the median over many stops, in microseconds.

use std::path::Path;
use std::time::{Duration, Instant};

use vmpatch_introspect::stacks::{self, Sleepers};
use vmpatch_introspect::unwind::Unwinder;
use vmpatch_introspect::{Deadline, Dump, Kernel};

const STOPS: usize = 501;

/// The last result and the median time.
fn median<T>(mut work: impl FnMut() -> T) -> (T, Duration) {
    let mut times = Vec::with_capacity(STOPS);
    loop {
        let begin = Instant::now();
        let result = work();
        times.push(begin.elapsed());
        if times.len() == STOPS {
            times.sort_unstable();
            let middle = times.get(STOPS / 2).copied().unwrap_or_default();
            return (result, middle);
        }
    }
}

/// How many stacks were known before, and the median time that the others took.
fn after_sleepers(kernel: &Kernel, unwinder: &Unwinder, dump: &Dump) -> (usize, Duration) {
    let (none, mut times, mut slept) = (Deadline::none(), Vec::new(), 0);
    for _ in 0..STOPS {
        let sleepers = Sleepers::read(kernel, unwinder, dump, &none);
        slept = sleepers.len();
        let begin = Instant::now();
        let stacks = stacks::all_but(kernel, unwinder, dump, dump.vcpus(), &none, &sleepers);
        times.push(begin.elapsed());
        drop(stacks);
    }
    times.sort_unstable();
    (slept, times.get(STOPS / 2).copied().unwrap_or_default())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::args().nth(1).ok_or("usage: stacks DUMP_FOLDER")?;
    let dump = Dump::open(Path::new(&folder))?;
    let kernel = Kernel::attach(&dump, dump.vcpus())?;
    let modules = kernel.module_places(&dump, &Deadline::none())?;
    let begin = Instant::now();
    let unwinder = Unwinder::load(&kernel, &dump, &modules)?;
    let load = begin.elapsed();
    let (tasks, walk) = median(|| kernel.tasks(&dump));
    let (stacks, all) =
        median(|| stacks::all(&kernel, &unwinder, &dump, dump.vcpus(), &Deadline::none()));
    let (tasks, stacks) = (tasks?, stacks?);
    let (slept, in_stop) = after_sleepers(&kernel, &unwinder, &dump);
    let frames: usize = stacks.iter().map(|stack| stack.trace.frames.len()).sum();
    println!(
        "{}: {} ORC entries loaded in {:.1} ms",
        kernel.identity.release,
        unwinder.orc_entries(),
        load.as_secs_f64() * 1e3
    );
    println!(
        "{} tasks walked in {:.1} us",
        tasks.len(),
        walk.as_secs_f64() * 1e6
    );
    println!(
        "{} stacks, {frames} frames read in {:.1} us, the task walk included",
        stacks.len(),
        all.as_secs_f64() * 1e6
    );
    println!(
        "with {slept} of them read before the stop: {:.1} us",
        in_stop.as_secs_f64() * 1e6
    );
    Ok(())
}
