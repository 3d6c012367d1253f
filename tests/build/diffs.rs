//! What a diff becomes.

use std::fs;
use std::path::{Path, PathBuf};

use vmpatch_testkit::Kernel;

use crate::support::{Bench, files, patch};

/// Words that give the objects of samples, made ready by `cargo xtask test`.
fn objects(folder: &Path, samples: &[&str]) -> Vec<PathBuf> {
    let pairs = samples.iter().map(|sample| folder.join(sample));
    let words = pairs.map(|pair| {
        let (old, new) = (pair.join("old.o"), pair.join("new.o"));
        ["--old".into(), old, "--new".into(), new]
    });
    words.flatten().collect()
}

#[test]
fn a_diff_gives_the_patch_that_its_objects_give() {
    let Some(kernel) = Kernel::given() else {
        return;
    };
    // Made ready by the same command.
    let folder = PathBuf::from(std::env::var_os("VMPATCH_SAMPLES").unwrap());
    let bench = Bench::new();
    for samples in [&["proc-version"][..], &["loadavg-format", "proc-version"]] {
        let given = bench.build(&objects(&folder, samples));
        assert_eq!(given.code, Some(0), "{}", given.stdout);
        fs::remove_file(bench.made()).unwrap();
        let texts = samples
            .iter()
            .map(|it| fs::read_to_string(patch(it)).unwrap());
        let diff = bench.write("all.patch", &texts.collect::<String>());
        let compiled = bench.compile(&kernel, &kernel.config, &diff);
        assert_eq!(compiled.code, Some(0), "{}", compiled.stdout);
        assert!(bench.made().exists());
        fs::remove_file(bench.made()).unwrap();
        let (given, compiled) = (files(&given), files(&compiled));
        assert_eq!(
            (given.len(), compiled.len()),
            (samples.len(), samples.len())
        );
        for (given, compiled) in given.iter().zip(compiled) {
            let file = compiled["file"].as_str().unwrap();
            assert!(file.starts_with("fs/proc/"), "{file}");
            for same in ["object", "replaced", "new", "unchanged"] {
                assert_eq!(given[same], compiled[same], "{file}");
            }
        }
    }
}

/// Of the files that include the header two come out otherwise, each of another module. What the differ says of them is not
/// asked here.
#[test]
fn a_changed_header_is_followed_into_what_it_is_compiled_into() {
    let Some(kernel) = Kernel::given() else {
        return;
    };
    let bench = Bench::new();
    let line = "\tunsigned char s = name[0];";
    let other = line.replace(';', " ^ 1;");
    let diff = kernel.changed("fs/fat/fat.h", line, &other).unwrap();
    let diff = bench.write("header.patch", &diff);
    let answer = bench.compile(&kernel, &kernel.config, &diff);
    let files = files(&answer).iter();
    let files: Vec<_> = files.map(|file| (&file["file"], &file["object"])).collect();
    assert_eq!(files[0], (&"fs/fat/dir.c".into(), &"fat".into()));
    assert_eq!(files[1], (&"fs/fat/namei_vfat.c".into(), &"vfat".into()));
    assert_eq!(files.len(), 2, "{files:?}");
}

#[test]
fn a_function_in_assembly_is_replaced_as_any_other() {
    let source = "\
asm(\".text; .globl fast; .type fast, @function; fast: lea 1(%rdi), %rax; ret; .size fast, .-fast\");
int used(int n) { return n * 3; }
";
    let bench = Bench::new();
    let answer = bench.compare(source, &source.replace("lea 1(", "lea 2("));
    assert_eq!(answer.code, Some(0), "{}", answer.stdout);
    let replaced = &files(&answer)[0]["replaced"];
    assert_eq!(replaced[0]["function"], "fast", "{replaced}");
    assert_eq!(replaced.as_array().unwrap().len(), 1, "{replaced}");
}
