//! Objects as a kernel build makes them, compiled from C at test time, and what a build makes of two.
#![allow(dead_code, reason = "each test uses its own part")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "only tests use it")]

use std::process::Command;

use vmpatch_patcher::build::{
    BuildError, BuildOptions, BuildReport, FileReport, ObjectPair, UnwindData, build,
};
use vmpatch_patcher::patch::file::{PatchFile, decode};
use vmpatch_patcher::patch::{Code, Patch, Relocation, Replacement, Section, Symbol};

/// The flags of Debian's kernels that shape code, and the two that every patch needs.
const FLAGS: [&str; 22] = [
    "-O2",
    "-std=gnu11",
    "-ffreestanding",
    "-fno-pic",
    "-mcmodel=kernel",
    "-mno-red-zone",
    "-mno-sse",
    "-fno-strict-aliasing",
    "-fno-common",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fno-jump-tables",
    "-pg",
    "-mfentry",
    "-mrecord-mcount",
    "-fcf-protection=branch",
    "-mfunction-return=thunk-extern",
    "-mindirect-branch=thunk-extern",
    "-mindirect-branch-register",
    "-ffunction-sections",
    "-fdata-sections",
    "-w",
];

/// What test sources take for granted.
const PRELUDE: &str = r#"
#define noinline __attribute__((noinline, noclone, noipa))
#define section(name) __attribute__((section(name)))
extern int printk(const char *text, ...);
extern void use(void *address);
#line 1 "drivers/test.c"
"#;

/// Compiles a source.
pub(crate) fn compile(source: &str) -> Vec<u8> {
    compile_with(source, &[])
}

/// Compiles a source with more flags.
pub(crate) fn compile_with(source: &str, flags: &[&str]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("test.c"), folder.path().join("test.o"));
    std::fs::write(&from, format!("{PRELUDE}{source}")).unwrap();
    let done = Command::new("gcc")
        .args(FLAGS)
        .args(flags)
        .args(["-c", "-o"])
        .args([&to, &from])
        .output()
        .expect("these tests need gcc");
    assert!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    std::fs::read(to).unwrap()
}

/// What a build makes of two objects. Whatever patch there is is a well-formed file too.
pub(crate) fn build_objects(old: &[u8], new: &[u8]) -> Result<(Patch, FileReport), BuildError> {
    let (patch, report) = build_pairs(&[pair("drivers/test.c", old, new)])?;
    Ok((patch, file_report(report)))
}

/// Two versions of a file of the kernel itself.
pub(crate) fn pair<'a>(file: &'a str, old: &'a [u8], new: &'a [u8]) -> ObjectPair<'a> {
    ObjectPair {
        file,
        object: "vmlinux",
        old,
        new,
        wide: None,
        unwind: UnwindData::Within,
    }
}

/// What a build makes of several files.
pub(crate) fn build_pairs(pairs: &[ObjectPair<'_>]) -> Result<(Patch, BuildReport), BuildError> {
    build_with(pairs, BuildOptions::default())
}

/// The same with other options than the name.
pub(crate) fn build_with(
    pairs: &[ObjectPair<'_>],
    options: BuildOptions,
) -> Result<(Patch, BuildReport), BuildError> {
    let options = BuildOptions {
        name: "test".to_owned(),
        ..options
    };
    let (patch, report) = build(pairs, &options)?;
    let file = PatchFile::new(patch).unwrap();
    let patch = decode(&file.encode()).unwrap().into_patch();
    Ok((patch, report))
}

/// The report on the only file.
fn file_report(report: BuildReport) -> FileReport {
    let [only] = <[FileReport; 1]>::try_from(report.files).unwrap();
    only
}

/// What a build makes of two sources that differ as they should.
pub(crate) fn patch(old: &str, new: &str) -> (Patch, FileReport) {
    build_objects(&compile(old), &compile(new)).unwrap_or_else(|error| panic!("{error}"))
}

/// The report on two sources that do the same.
pub(crate) fn nothing(old: &str, new: &str) -> FileReport {
    match build_objects(&compile(old), &compile(new)) {
        Err(BuildError::NothingChanged(report)) => file_report(*report),
        Err(error) => panic!("{error}"),
        Ok((_, report)) => panic!("{report:?}"),
    }
}

/// The report on two sources whose difference cannot be patched.
pub(crate) fn refused(old: &str, new: &str) -> FileReport {
    match build_objects(&compile(old), &compile(new)) {
        Err(BuildError::Refused(report)) => file_report(*report),
        Err(error) => panic!("{error}"),
        Ok((_, report)) => panic!("nothing was refused: {report:?}"),
    }
}

/// The one reason on which two sources are refused, as section, name and text.
pub(crate) fn refusal(old: &str, new: &str) -> (String, String, String) {
    let report = refused(old, new);
    let [only] = &report.refused[..] else {
        panic!("{report:?}")
    };
    (only.section.clone(), only.name.clone(), only.reason.clone())
}

/// The names of the replaced functions.
pub(crate) fn replaced(patch: &Patch) -> Vec<&str> {
    patch.replaced.iter().map(|it| it.name.as_str()).collect()
}

/// The one replacement.
pub(crate) fn only(patch: &Patch) -> &Replacement {
    let [only] = &patch.replaced[..] else {
        panic!("{:?}", replaced(patch))
    };
    only
}

/// The new body of the one replacement.
pub(crate) fn new_body(patch: &Patch) -> &Section {
    &patch.sections[only(patch).new_section as usize]
}

/// What relocations name: `guest NAME`, `own NAME`, `old TEXT`.
pub(crate) fn named(patch: &Patch, relocations: &[Relocation]) -> Vec<String> {
    relocations
        .iter()
        .map(|it| symbol(patch, it.symbol))
        .collect()
}

/// What a symbol is.
pub(crate) fn symbol(patch: &Patch, index: u32) -> String {
    match &patch.symbols[index as usize] {
        Symbol::Guest { name, .. } => format!("guest {name}"),
        Symbol::Own { name, .. } => format!("own {name}"),
        Symbol::OldBytes { bytes, .. } => {
            format!(
                "old {}",
                String::from_utf8_lossy(bytes).trim_end_matches('\0')
            )
        }
        Symbol::ShadowRoot => "shadow root".to_owned(),
    }
}

/// The section of the patch behind an own symbol.
pub(crate) fn own<'a>(patch: &'a Patch, wanted: &str) -> &'a Section {
    let found = patch.symbols.iter().find_map(|it| match it {
        Symbol::Own { name, section, .. } if name == wanted => Some(*section),
        _ => None,
    });
    &patch.sections[found.unwrap_or_else(|| panic!("no own {wanted}")) as usize]
}

/// The kinds of an old function's sites as they appear in JSON, with their offsets.
pub(crate) fn sites(code: &Code) -> Vec<(u64, u8, String)> {
    let of = |it: &vmpatch_patcher::patch::Site| {
        let text = format!("{:?}", it.kind);
        let end = text.find([' ', '{', '(']).unwrap_or(text.len());
        (it.offset, it.len, text[..end].to_owned())
    };
    code.sites.iter().map(of).collect()
}
