//! What the stack gate costs inside a stop: `cargo run --release --example gate DUMP_FOLDER [FUNCTION…]`.
//! Prints the median over many stops, in microseconds, and what is in the way of replacing the functions.

use std::error::Error;
use std::path::Path;
use std::time::{Duration, Instant};

use vmpatch_introspect::unwind::Unwinder;
use vmpatch_introspect::{Deadline, Dump, GvaRange, Kernel};
use vmpatch_patcher::arena::{BusyKind, BusyRange};
use vmpatch_patcher::quiescence::{self, BusyRanges, LiveKernel, Witness, gate};

const STOPS: usize = 501;

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

fn busy_range(kernel: &Kernel, function: &str) -> Result<BusyRange, Box<dyn Error>> {
    let start = kernel.symbols.unique(function)?;
    let (_, end) = kernel
        .symbols
        .containing(start)
        .ok_or("no symbol after it")?;
    Ok(BusyRange {
        range: GvaRange { start, end },
        function: function.to_owned(),
        kind: BusyKind::Old,
    })
}

fn show(what: &str, took: Duration) {
    println!("{what}: {:.1} us", took.as_secs_f64() * 1e6);
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments
        .next()
        .ok_or("usage: gate DUMP_FOLDER [FUNCTION…]")?;
    let functions: Vec<String> = match arguments.collect::<Vec<_>>() {
        none if none.is_empty() => vec![
            "version_proc_show".to_owned(),
            "meminfo_proc_show".to_owned(),
        ],
        some => some,
    };
    let dump = Dump::open(Path::new(&folder))?;
    let kernel = Kernel::attach(&dump, dump.vcpus())?;
    let modules = kernel.module_places(&dump, &Deadline::none())?;
    let unwinder = Unwinder::load(&kernel, &dump, &modules)?;
    let witness = LiveKernel {
        kernel: &kernel,
        unwinder: &unwinder,
        sleepers: None,
    };
    let busy: Vec<_> = functions
        .iter()
        .map(|function| busy_range(&kernel, function))
        .collect::<Result<_, _>>()?;
    let ranges = BusyRanges::new(busy.iter(), &[]);

    show("same boot", median(|| witness.same_boot(&dump)).1);
    show("text patching", median(|| witness.text_patching(&dump)).1);
    let none = Deadline::none();
    let (stacks, took) = median(|| witness.stacks(&dump, dump.vcpus(), &none));
    let stacks = stacks?;
    show(&format!("{} stacks read", stacks.len()), took);
    let read = witness.reader(&dump);
    let judge = || {
        let mut busy = quiescence::Busy::default();
        let judged = gate::examine_stacks(&stacks, &ranges, &*read, &none, &mut busy);
        gate::examine_vcpus(dump.vcpus(), &stacks, &ranges, &mut busy);
        judged.map(|()| busy)
    };
    show("judged", median(judge).1);
    let look = || quiescence::examine(&witness, &dump, dump.vcpus(), &ranges, &none);
    let (verdict, took) = median(look);
    show("all of it", took);
    match verdict {
        Ok(examined) => println!("quiet: {examined:?}"),
        Err(why) => println!("not quiet: {why}"),
    }
    Ok(())
}
