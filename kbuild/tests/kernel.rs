//! The work tree over the real source and configuration of a stock kernel.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by it")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use object::{Object, ObjectSection, SectionKind};
use vmpatch_kbuild::{Diff, Orc, Tree};

/// Source and configuration, made ready by `cargo xtask test`, and where work trees may be kept.
struct Kernel {
    source: PathBuf,
    config: String,
    cache: PathBuf,
}

impl Kernel {
    fn given() -> Option<Self> {
        let Some(kernel) = std::env::var_os("VMPATCH_SOURCE").map(PathBuf::from) else {
            println!("SKIPPED: VMPATCH_SOURCE is not set (cargo xtask test)");
            return None;
        };
        Some(Self {
            source: kernel.join("linux"),
            config: fs::read_to_string(kernel.join("config")).unwrap(),
            cache: vmpatch_kbuild::cache::dir().unwrap(),
        })
    }

    fn tree(&self) -> Tree {
        Tree::ready(&self.source, &self.config, &self.cache, &|_| {}).unwrap()
    }
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
    let tree = kernel.tree();
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
    let tree = kernel.tree();
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
    let text = fs::read_to_string(kernel.source.join("fs/binfmt_elf.c")).unwrap();
    let line = "\tif (memcmp(elf_ex->e_ident, ELFMAG, SELFMAG) != 0)\n";
    let (before, _) = text.split_once(line).unwrap();
    let number = before.lines().count() + 1;
    let hunk = format!(
        "@@ -{number} +{number} @@\n-{line}+{}",
        line.replace("!= 0", "> 0")
    );
    let diff = format!("--- a/fs/binfmt_elf.c\n+++ b/fs/binfmt_elf.c\n{hunk}");
    let diff = Diff::parse(diff.as_bytes()).unwrap();
    let built = kernel.tree().compile_both(&diff, 1, &|_| {}).unwrap();
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
    let text = fs::read_to_string(kernel.source.join("virt/kvm/binary_stats.c")).unwrap();
    let line = "\tssize_t len;\n";
    let (before, _) = text.split_once(line).unwrap();
    let number = before.lines().count() + 1;
    let head = "--- a/virt/kvm/binary_stats.c\n+++ b/virt/kvm/binary_stats.c\n";
    let hunk = format!("@@ -{number} +{number} @@\n-{line}+\tvolatile ssize_t len;\n");
    let diff = Diff::parse(format!("{head}{hunk}").as_bytes()).unwrap();
    let built = kernel.tree().compile_both(&diff, 0, &|_| {}).unwrap();
    assert_eq!(built.pairs[0].module.as_deref(), Some("kvm"));
    assert!(code(&built.pairs[0].old) != code(&built.pairs[0].new));
}
