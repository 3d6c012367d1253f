//! Dumps of guests that have all symbols, attached to as if they had text symbols only: what is then
//! found by evidence must equal what the symbols say. Skipped, loudly, without `VMPATCH_DUMPS`; with it, one of
//! the dumps must be of a kernel with symbols of data.

use std::fs;

use super::{Given, Places};
use crate::dump::Dump;
use crate::find;
use crate::image;
use crate::kernel::Kernel;
use crate::paging::KernelMemory;
use crate::symbols::Symbols;

/// What every kernel must show, and what those must that have it at all.
const ALWAYS: [&str; 4] = ["init_task", "__per_cpu_offset", "prb", "boot_cpu_data"];
const IF_THERE: [&str; 4] = ["text_mutex", "ftrace_lock", "tp_vec_nr", "bp_desc"];

/// The symbols that scripts/kallsyms keeps without --all-symbols: those in text.
fn text_only(kernel: &Kernel) -> Symbols {
    let within = |start, end| {
        Some((
            kernel.symbols.unique(start).ok()?,
            kernel.symbols.unique(end).ok()?,
        ))
    };
    let ranges = [
        within("_stext", "_etext"),
        within("_sinittext", "_einittext"),
    ];
    let kept = kernel.symbols.iter().filter(|symbol| {
        ranges
            .iter()
            .flatten()
            .any(|(start, end)| *start <= symbol.at && symbol.at <= *end)
    });
    Symbols::from_list(kept.map(|symbol| (symbol.name, symbol.at, symbol.kind)))
}

fn each_dump(check: impl Fn(&str, &Dump, &Kernel, &Kernel)) {
    let Some(folder) = std::env::var_os("VMPATCH_DUMPS") else {
        eprintln!("SKIPPED: VMPATCH_DUMPS names no folder of guest dumps; nothing was compared");
        return;
    };
    let mut compared = 0;
    let entries = fs::read_dir(&folder).unwrap();
    let folders = entries.map(|entry| entry.unwrap().path());
    for folder in folders.filter(|folder| folder.join("ram.bin").exists()) {
        let dump = Dump::open(&folder).unwrap();
        let whole = Kernel::attach(&dump, dump.vcpus()).unwrap();
        if whole.symbols.unique("init_task").is_err() {
            let name = folder.display();
            eprintln!("not compared: {name} is of a kernel without symbols of data");
            continue;
        }
        compared += 1;
        let found = find::find(&dump, dump.vcpus()).unwrap();
        let memory = KernelMemory::new(&dump, found.space);
        let regions = image::regions(&memory, found.page_fault).unwrap();
        let lean = Kernel::of_symbols(&dump, &found, &regions, text_only(&whole)).unwrap();
        check(&folder.display().to_string(), &dump, &whole, &lean);
    }
    let folder = folder.display();
    assert!(
        compared > 0,
        "no dump in {folder} is of a kernel with symbols of data"
    );
}

#[test]
fn evidence_finds_what_symbols_tell() {
    each_dump(|name, dump, whole, lean| {
        let memory = whole.memory(dump);
        let found = find::find(dump, dump.vcpus()).unwrap();
        let regions = image::regions(&memory, found.page_fault).unwrap();
        let given = Given {
            memory: &memory,
            regions: &regions,
            symbols: &lean.symbols,
            types: &lean.types,
        };
        let places = Places::by_evidence(&given).unwrap();
        for wanted in ALWAYS.iter().chain(&IF_THERE) {
            let known = whole.symbols.unique(wanted).ok();
            assert!(
                known.is_some() || IF_THERE.contains(wanted),
                "{name}: {wanted}"
            );
            assert_eq!(places.get(wanted), known, "{name}: {wanted}");
        }
    });
}

#[test]
fn a_kernel_without_data_symbols_shows_the_same_guest() {
    each_dump(|name, dump, whole, lean| {
        assert_eq!(
            lean.layout.per_cpu_offset, whole.layout.per_cpu_offset,
            "{name}"
        );
        assert_eq!(lean.layout.direct_map, whole.layout.direct_map, "{name}");
        assert_eq!(lean.layout.space, whole.layout.space, "{name}");
        assert_eq!(lean.identity, whole.identity, "{name}");
        assert_eq!(
            lean.tasks(dump).unwrap(),
            whole.tasks(dump).unwrap(),
            "{name}"
        );
        assert_eq!(lean.log(dump).unwrap(), whole.log(dump).unwrap(), "{name}");
        let modules = |kernel: &Kernel| {
            let modules = kernel.modules(dump).unwrap().into_iter();
            modules
                .map(|module| (module.name, module.text))
                .collect::<Vec<_>>()
        };
        assert_eq!(modules(lean), modules(whole), "{name}");
        assert_eq!(lean.text_patching(dump).unwrap(), None, "{name}");
        assert_eq!(
            lean.cpu_features(dump).unwrap(),
            whole.cpu_features(dump).unwrap()
        );
    });
}
