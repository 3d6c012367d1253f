//! The work tree over the real source and configuration of a stock kernel.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by it")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use object::{Object, ObjectSection, SectionKind};
use vmpatch_kbuild::{Diff, Orc, Tree};
use vmpatch_testkit::Kernel;

/// Work trees may be kept where the command line keeps them.
fn tree(kernel: &Kernel) -> Tree {
    let config = fs::read_to_string(&kernel.config).unwrap();
    let cache = vmpatch_kbuild::cache::dir().unwrap();
    Tree::ready(&kernel.source, &config, &cache, &|_| {}).unwrap()
}

/// A change of one line.
fn changed(kernel: &Kernel, file: &str, old: &str, new: &str) -> Diff {
    let diff = kernel.changed(file, old, new).unwrap();
    Diff::parse(diff.as_bytes()).unwrap()
}

fn patch(name: &str) -> Diff {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-images/patches");
    Diff::parse(&fs::read(folder.join(name)).unwrap()).unwrap()
}

/// Sizes of what is neither code nor about the debugger.
fn data(object: &[u8]) -> BTreeMap<String, u64> {
    let file = object::File::parse(object).unwrap();
    let kinds = [
        SectionKind::Data,
        SectionKind::ReadOnlyData,
        SectionKind::ReadOnlyString,
    ];
    file.sections()
        .filter(|section| kinds.contains(&section.kind()))
        .map(|section| (section.name().unwrap().to_owned(), section.size()))
        .collect()
}

/// The code of each function's section.
fn code(object: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let file = object::File::parse(object).unwrap();
    file.sections()
        .filter(|section| section.kind() == SectionKind::Text)
        .map(|section| {
            (
                section.name().unwrap().to_owned(),
                section.data().unwrap().to_vec(),
            )
        })
        .collect()
}

#[test]
fn wide_branches_change_nothing_else() {
    let Some(kernel) = Kernel::given() else {
        return;
    };
    let tree = tree(&kernel);
    let diff = patch("dev-valid-name.patch");
    let pairs = tree.compile_both(&diff, 0, &|_| {}).unwrap().pairs;
    let wide = pairs[0].wide.as_ref().unwrap();
    assert_eq!(data(wide), data(&pairs[0].new));
    let (short, wide) = (code(&pairs[0].new), code(wide));
    assert!(short.keys().eq(wide.keys()));
    let same = short
        .iter()
        .filter(|(name, code)| wide[*name] == **code)
        .count();
    // Most functions have no static branch; those that have some are longer.
    assert!(
        same > short.len() / 2 && same < short.len(),
        "{same} of {}",
        short.len()
    );
    let again = tree.compile(&["net/core/dev.c".into()]).unwrap();
    assert!(again[0].object == pairs[0].old);
}

#[test]
fn unwind_data_is_made_of_what_new_code_is_taken_from_and_its_code_stays_as_it_is() {
    let Some(kernel) = Kernel::given() else {
        return;
    };
    let tree = tree(&kernel);
    for name in ["dev-valid-name.patch", "proc-version.patch"] {
        let pairs = tree.compile_both(&patch(name), 0, &|_| {}).unwrap().pairs;
        let from = pairs[0].wide.as_ref().unwrap_or(&pairs[0].new);
        let Orc::Copy(copy) = &pairs[0].orc else {
            panic!("{name}: {:?}", pairs[0].orc)
        };
        assert!(code(copy) == code(from), "{name}");
        assert!(copy.len() > from.len(), "{name}");
        assert_eq!(tree.orc(copy).unwrap(), Orc::Within, "{name}");
    }
}

/// The kernel for programs of 32 bits includes the whole file.
#[test]
fn a_source_that_another_includes_changes_both() {
    let Some(kernel) = Kernel::given() else {
        return;
    };
    let line = "\tif (memcmp(elf_ex->e_ident, ELFMAG, SELFMAG) != 0)";
    let other = line.replace("!= 0", "> 0");
    let diff = changed(&kernel, "fs/binfmt_elf.c", line, &other);
    let built = tree(&kernel).compile_both(&diff, 1, &|_| {}).unwrap();
    let files: Vec<_> = built
        .pairs
        .iter()
        .map(|pair| pair.file.to_str().unwrap())
        .collect();
    assert_eq!(files, ["fs/binfmt_elf.c", "fs/compat_binfmt_elf.c"]);
}

/// By a way up, which a link to a whole folder would lead into the unchanged source.
#[test]
fn what_the_makefile_of_another_folder_builds_is_compiled_as_changed() {
    let Some(kernel) = Kernel::given() else {
        return;
    };
    let file = "virt/kvm/binary_stats.c";
    let diff = changed(&kernel, file, "\tssize_t len;", "\tvolatile ssize_t len;");
    let built = tree(&kernel).compile_both(&diff, 0, &|_| {}).unwrap();
    assert_eq!(built.pairs[0].module.as_deref(), Some("kvm"));
    assert!(code(&built.pairs[0].old) != code(&built.pairs[0].new));
}

/// In a folder that the kernel's makefiles reach in two ways, which got in each other's way.
#[test]
fn assembly_of_an_architecture_is_compiled() {
    let Some(kernel) = Kernel::given() else {
        return;
    };
    let file = "arch/x86/lib/clear_page_64.S";
    let diff = changed(&kernel, file, "\trep stosq", "\trep stosq\n\tnop");
    let built = tree(&kernel).compile_both(&diff, 0, &|_| {}).unwrap();
    let (old, new) = (code(&built.pairs[0].old), code(&built.pairs[0].new));
    assert!(old[".text"] != new[".text"]);
}

/// `include/trace/define_trace.h` includes it once more, by a way up from its own folder.
#[test]
fn a_header_with_trace_points_is_compiled_as_changed() {
    let Some(kernel) = Kernel::given() else {
        return;
    };
    let file = "drivers/net/hyperv/netvsc_trace.h";
    let line = "       TP_printk(\"dev=%s q=%u req=%#x type=%s msg_len=%u\",";
    let diff = changed(&kernel, file, line, &line.replace("dev=", "device="));
    let built = tree(&kernel).compile_both(&diff, 9, &|_| {}).unwrap();
    let has = |object: &[u8]| memchr::memmem::find(object, b"device=%s q=%u").is_some();
    assert!(built.pairs.iter().any(|pair| has(&pair.new)));
    assert!(!built.pairs.iter().any(|pair| has(&pair.old)));
}

#[test]
fn a_change_of_how_the_kernel_is_linked_is_refused() {
    let Some(kernel) = Kernel::given() else {
        return;
    };
    let file = "arch/x86/include/asm/orc_lookup.h";
    let line = "#define LOOKUP_BLOCK_ORDER\t8";
    let diff = changed(&kernel, file, line, &line.replace('8', "9"));
    let why = tree(&kernel).compile_both(&diff, 9, &|_| {}).unwrap_err();
    assert!(why.to_string().contains("vmlinux.lds"), "{why}");
}
