//! From nothing to all symbols, types and tasks of a guest: what every look at a guest begins with. Over
//! the dumps in the folder that `VMPATCH_DUMPS` names.
#![allow(missing_docs, reason = "criterion makes public functions")]
#![allow(
    clippy::unwrap_used,
    reason = "a bench that cannot attach has nothing to measure"
)]

use std::fs;
use std::hint::black_box;
use std::path::PathBuf;

use criterion::{Criterion, criterion_group, criterion_main};
use vmpatch_introspect::{Dump, Kernel};

fn dumps() -> Vec<PathBuf> {
    let Some(folder) = std::env::var_os("VMPATCH_DUMPS") else {
        eprintln!("SKIPPED: VMPATCH_DUMPS names no folder of guest dumps; nothing was measured");
        return Vec::new();
    };
    let mut folders: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("ram.bin").exists())
        .collect();
    folders.sort();
    folders
}

fn attach(criterion: &mut Criterion) {
    for folder in dumps() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let dump = Dump::open(&folder).unwrap();
        criterion.bench_function(&format!("attach/{name}"), |bencher| {
            bencher.iter(|| {
                let kernel = Kernel::attach(&dump, dump.vcpus()).unwrap();
                let tasks = kernel.tasks(&dump).unwrap();
                black_box((kernel, tasks))
            });
        });
        let kernel = Kernel::attach(&dump, dump.vcpus()).unwrap();
        criterion.bench_function(&format!("tasks/{name}"), |bencher| {
            bencher.iter(|| black_box(kernel.tasks(&dump).unwrap()));
        });
    }
}

criterion_group!(benches, attach);
criterion_main!(benches);
