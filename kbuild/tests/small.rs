//! Builds from a source of a few files, whose makefiles answer as the kernel's do.
#![allow(clippy::unwrap_used, reason = "tests fail by it")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use vmpatch_kbuild::fix::{Built, Why};
use vmpatch_kbuild::{BuildError, Diff, Tree};

/// A source, a configuration and a cache.
struct Small {
    folder: tempfile::TempDir,
    config: String,
}

impl Small {
    fn of(files: &[(&str, &str)]) -> Self {
        let gcc = Command::new("gcc").arg("--version").output().unwrap();
        let said = String::from_utf8(gcc.stdout).unwrap();
        let version = said.lines().next().unwrap();
        let small = Self {
            folder: tempfile::tempdir().unwrap(),
            config: format!("CONFIG_CC_VERSION_TEXT=\"{version}\"\n"),
        };
        small.write("Makefile", include_str!("small/Makefile"));
        let build = include_str!("small/Makefile.build");
        small.write("scripts/Makefile.build", build);
        small.write("Kbuild", "obj-y := fs/\n");
        small.write("fs/Makefile", "obj-y := a.o\n");
        small.write("include/trace/define_trace.h", "");
        for (name, text) in files {
            small.write(name, text);
        }
        small
    }

    fn source(&self) -> PathBuf {
        self.folder.path().join("linux")
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("cache")
    }

    fn write(&self, name: &str, text: &str) {
        let at = self.source().join(name);
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        fs::write(at, text).unwrap();
    }

    fn tree(&self) -> Tree {
        Tree::ready(&self.source(), &self.config, &self.cache(), &|_| {}).unwrap()
    }

    fn build(&self, diff: &str) -> Result<Built, BuildError> {
        let diff = Diff::parse(diff.as_bytes()).unwrap();
        self.tree().compile_both(&diff, 9, &|_| {})
    }

    fn why(&self, diff: &str) -> String {
        self.build(diff).unwrap_err().to_string()
    }
}

/// A diff of one line of a file.
fn diff(file: &str, at: usize, old: &str, new: &str) -> String {
    format!("--- a/{file}\n+++ b/{file}\n@@ -{at} +{at} @@\n-{old}\n+{new}\n")
}

fn has(object: &[u8], text: &str) -> bool {
    memchr::memmem::find(object, text.as_bytes()).is_some()
}

const A: (&str, &str) = ("fs/a.c", "const char a[] = \"before\";\n");

fn change_a() -> String {
    let [before, after] = ["before", "after"].map(|it| format!("const char a[] = \"{it}\";"));
    diff("fs/a.c", 1, &before, &after)
}

#[test]
fn a_changed_file_is_compiled_without_and_with_the_change() {
    let small = Small::of(&[A]);
    let built = small.build(&change_a()).unwrap();
    let pair = &built.pairs[0];
    assert!(has(&pair.old, "before") && has(&pair.new, "after"));
    assert!(built.moved.is_empty() && built.left_out.is_empty());
    let source = fs::read_to_string(small.source().join("fs/a.c")).unwrap();
    assert_eq!(source, A.1);
}

#[test]
fn a_hunk_that_stands_elsewhere_is_told() {
    let small = Small::of(&[("fs/a.c", &format!("int x;\nint y;\n{}", A.1))]);
    let built = small.build(&change_a()).unwrap();
    let moved = &built.moved[0];
    assert_eq!(
        (&*moved.file, moved.line, moved.by),
        (Path::new("fs/a.c"), 1, 2)
    );
    assert!(has(&built.pairs[0].new, "after"));
}

#[test]
fn a_hunk_that_fits_at_two_places_and_not_where_it_says_is_refused() {
    let function = |name: &str| format!("int {name}(int a)\n{{\n\treturn a;\n}}\n");
    let text = function("f") + &function("g");
    let small = Small::of(&[("fs/a.c", &text)]);
    let hunk = |at| diff("fs/a.c", at, "\treturn a;", "\treturn a + 1;");
    small.build(&hunk(7)).unwrap();
    let why = small.why(&hunk(5));
    assert!(
        why.contains("line 5 of fs/a.c") && why.contains("2 other places"),
        "{why}"
    );
    // Nothing of it is left.
    assert!(small.build(&hunk(3)).unwrap().moved.is_empty());
}

#[test]
fn a_file_that_the_source_lacks_is_told_before_anything_is_asked() {
    let small = Small::of(&[A]);
    let why = small.why(&diff("fs/none/b.c", 1, "a", "b"));
    assert!(why.contains("it has no fs/none/b.c"), "{why}");
}

#[test]
fn make_holds_the_lock_of_its_tree() {
    let small = Small::of(&[A]);
    small.build(&change_a()).unwrap();
    let trees = fs::read_dir(small.cache().join("kbuild")).unwrap();
    let tree = trees.map(|it| it.unwrap().path()).next().unwrap();
    let input = fs::read_to_string(tree.join("out/stdin")).unwrap();
    assert_eq!(Path::new(input.trim_end()), tree.join("lock"));
}

#[test]
fn nothing_to_compile_is_nothing_done() {
    assert_eq!(Small::of(&[A]).tree().compile(&[]).unwrap(), []);
}

#[test]
fn a_tree_that_was_refused_leaves_nothing_but_its_lock() {
    let mut small = Small::of(&[A]);
    small.config.push_str("CONFIG_BAD=y\n");
    let refused = Tree::ready(&small.source(), &small.config, &small.cache(), &|_| {});
    let why = refused.unwrap_err().to_string();
    assert!(why.contains("CONFIG_WORSE"), "{why}");
    let trees = fs::read_dir(small.cache().join("kbuild")).unwrap();
    for tree in trees {
        let left = fs::read_dir(tree.unwrap().path()).unwrap();
        let left: Vec<_> = left.map(|it| it.unwrap().file_name()).collect();
        assert_eq!(left, ["lock"]);
    }
}

/// `include/trace/define_trace.h` includes them once more, by a way up from where it is itself.
#[test]
fn a_header_with_trace_points_is_compiled_as_changed() {
    let trace = "#ifdef AGAIN\nconst char t[] = \"before\";\n#else\n#define AGAIN\n\
                 #define TRACE_INCLUDE_PATH ../../fs\n#include <trace/define_trace.h>\n#endif\n";
    let define = "#define STRING(x) #x\n#define INCLUDE(path) STRING(path/trace.h)\n\
                  #include INCLUDE(TRACE_INCLUDE_PATH)\n";
    let small = Small::of(&[
        ("fs/trace.h", trace),
        ("include/trace/define_trace.h", define),
        ("fs/a.c", "#include \"trace.h\"\n"),
    ]);
    let [before, after] = ["before", "after"].map(|it| format!("const char t[] = \"{it}\";"));
    let built = small.build(&diff("fs/trace.h", 2, &before, &after));
    assert!(has(&built.unwrap().pairs[0].new, "after"));
}

#[test]
fn what_the_source_has_become_is_compiled_and_what_includes_it_found() {
    let small = Small::of(&[A]);
    small.build(&change_a()).unwrap();
    small.write(
        "fs/a.c",
        &format!("{}const char own[] = \"edited\";\n", A.1),
    );
    small.write("fs/b.c", "#include \"a.c\"\n");
    small.write("fs/Makefile", "obj-y := a.o b.o\n");
    let built = small.build(&change_a()).unwrap();
    for (pair, file) in built.pairs.iter().zip(["fs/a.c", "fs/b.c"]) {
        assert_eq!(pair.file, Path::new(file));
        assert!(
            has(&pair.old, "edited") && has(&pair.new, "after"),
            "{file}"
        );
    }
    assert_eq!(built.pairs.len(), 2);
}

#[test]
fn a_way_past_the_change_is_refused_by_both_names() {
    let small = Small::of(&[
        (
            "fs/Makefile",
            "obj-y := a.o\nccflags-y := -I$(srctree)/lib/deep/..\n",
        ),
        ("fs/a.c", "#include \"x.h\"\n"),
        ("lib/x.h", "const int x = 1;\n"),
        ("lib/deep/y.h", ""),
    ]);
    let why = small.why(&diff("lib/x.h", 1, "const int x = 1;", "const int x = 2;"));
    assert!(why.contains("fs/a.c includes lib/x.h"), "{why}");
}

#[test]
fn what_makes_other_files_of_the_kernel_is_refused_by_name() {
    let small = Small::of(&[
        A,
        ("Kbuild", "obj-y := fs/ lib/\n"),
        ("lib/Makefile", "obj-y := crc.o\nhostprogs := gen\n"),
        ("lib/crc.c", "#include \"poly.h\"\n"),
        (
            "lib/gen.c",
            "#include \"poly.h\"\n#include <limits.h>\nint one;\n",
        ),
        ("lib/poly.h", "int poly;\n"),
        ("include/linux/limits.h", "int limits;\n"),
    ]);
    for (file, line, text) in [("lib/gen.c", 3, "int one;"), ("lib/poly.h", 1, "int poly;")] {
        let why = small.why(&(change_a() + &diff(file, line, text, "int two;")));
        assert!(why.contains(file) && why.contains("runs this"), "{why}");
    }
    // That is the C library's.
    let of_kernel = diff("include/linux/limits.h", 1, "int limits;", "int two;");
    let built = small.build(&(change_a() + &of_kernel)).unwrap();
    let left: Vec<_> = built
        .left_out
        .iter()
        .map(|it| (&*it.file, it.why))
        .collect();
    let header = Path::new("include/linux/limits.h");
    assert_eq!(left, [(header, Why::NotIncluded)]);
}

#[test]
fn a_change_of_how_the_kernel_is_linked_is_refused() {
    let small = Small::of(&[
        A,
        ("arch/x86/kernel/Makefile", ""),
        (
            "arch/x86/kernel/vmlinux.lds.S",
            "#include <link.h>\nTHERE\n",
        ),
        ("include/link.h", "#define THERE 1\n#define NAME b\n"),
        ("fs/a.c", "#include <link.h>\nint NAME = THERE;\n"),
    ]);
    let why = small.why(&diff(
        "include/link.h",
        1,
        "#define THERE 1",
        "#define THERE 2",
    ));
    assert!(why.contains("vmlinux.lds"), "{why}");
    let hunk = diff("include/link.h", 2, "#define NAME b", "#define NAME c");
    assert_eq!(small.build(&hunk).unwrap().pairs.len(), 1);
}

#[test]
fn what_only_runs_apart_from_the_kernel_is_refused() {
    let vdso = "arch/x86/entry/vdso/v.c";
    let small = Small::of(&[
        A,
        ("lib/Makefile", ""),
        ("lib/vdso.c", "int v;\n"),
        (vdso, "#include \"../../../../lib/vdso.c\"\n"),
        ("fs/both.h", "int w;\n"),
        (
            "arch/x86/entry/vdso/w.c",
            "#include \"../../../../fs/both.h\"\n",
        ),
        (
            "fs/a.c",
            "const char a[] = \"before\";\n#include \"both.h\"\n",
        ),
    ]);
    let why = small.why(&(change_a() + &diff("lib/vdso.c", 1, "int v;", "int w;")));
    assert!(
        why.contains("lib/vdso.c") && why.contains("user space"),
        "{why}"
    );
    let built = small
        .build(&diff("fs/both.h", 1, "int w;", "int u;"))
        .unwrap();
    let left = &built.left_out[0];
    assert_eq!(left.file, Path::new("arch/x86/entry/vdso/w.c"));
    assert_eq!(left.why, Why::Apart);
}
