//! `vmpatch build` from a source and a diff, by the real source and configuration of a stock kernel.
#![allow(clippy::unwrap_used, reason = "tests fail by it")]

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Source, configuration and compiled samples of one kernel, made ready by `cargo xtask test`.
struct Kernel {
    source: PathBuf,
    config: PathBuf,
    samples: PathBuf,
    out: tempfile::TempDir,
}

/// What a call said.
struct Answer {
    code: Option<i32>,
    json: Value,
}

impl Answer {
    fn files(&self) -> &[Value] {
        self.json["files"].as_array().unwrap()
    }
}

impl Kernel {
    fn given() -> Option<Self> {
        let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let (Some(kernel), Some(samples)) =
            (variable("VMPATCH_SOURCE"), variable("VMPATCH_SAMPLES"))
        else {
            println!("SKIPPED: VMPATCH_SOURCE or VMPATCH_SAMPLES is not set (cargo xtask test)");
            return None;
        };
        Some(Self {
            source: kernel.join("linux"),
            config: kernel.join("config"),
            samples,
            out: tempfile::tempdir().unwrap(),
        })
    }

    fn made(&self) -> PathBuf {
        self.out.path().join("fix.vmpatch")
    }

    fn build<A: AsRef<OsStr>>(&self, words: &[A]) -> Answer {
        let output = Command::new(env!("CARGO_BIN_EXE_vmpatch"))
            .args(["--json", "build", "--output"])
            .arg(self.made())
            .args(words)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        Answer {
            code: output.status.code(),
            json: serde_json::from_str(&said).unwrap_or(Value::Null),
        }
    }

    /// Words that give the objects of samples.
    fn objects(&self, samples: &[&str]) -> Vec<PathBuf> {
        let pairs = samples.iter().map(|sample| self.samples.join(sample));
        let words = pairs.map(|pair| {
            let (old, new) = (pair.join("old.o"), pair.join("new.o"));
            ["--old".into(), old, "--new".into(), new]
        });
        words.flatten().collect()
    }

    fn compile(&self, config: &Path, diff: &Path) -> Answer {
        let words = [
            OsStr::new("--source"),
            self.source.as_ref(),
            OsStr::new("--config"),
            config.as_ref(),
            OsStr::new("--diff"),
            diff.as_ref(),
        ];
        self.build(&words)
    }

    /// That a diff is refused for a reason with these words, and nothing written.
    fn refuses(&self, config: &str, diff: &str, words: &[&str]) {
        let (config_at, diff_at) = (
            self.out.path().join("config"),
            self.out.path().join("a.patch"),
        );
        fs::write(&config_at, config).unwrap();
        fs::write(&diff_at, diff).unwrap();
        let answer = self.compile(&config_at, &diff_at);
        let reason = answer.json["reason"].as_str().unwrap_or_default();
        assert_eq!(answer.code, Some(3), "{}", answer.json);
        assert!(words.iter().all(|word| reason.contains(word)), "{reason}");
        assert!(!self.made().exists());
    }
}

fn patch(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("guest-images/patches/{name}.patch"))
}

/// Also after calls that were refused, which leave the source as it was.
#[test]
fn a_diff_gives_the_patch_that_its_objects_give() {
    let Some(kernel) = Kernel::given() else {
        return;
    };
    let config = fs::read_to_string(&kernel.config).unwrap();
    let head = "--- a/fs/proc/version.c\n+++ b/fs/proc/version.c\n";
    let elsewhere = format!("{head}@@ -3,1 +3,2 @@\n no such line\n+int x;\n");
    kernel.refuses(&config, &elsewhere, &["does not fit the source", "FAILED"]);
    let nothing = format!(
        "{head}@@ -1,2 +1,3 @@\n // SPDX-License-Identifier: GPL-2.0\n+\n #include <linux/fs.h>\n"
    );
    kernel.refuses(&config, &nothing, &["nothing changed"]);
    // In a large file whose functions tell their lines in warnings and in messages.
    let moved = "\
--- a/fs/ext4/super.c
+++ b/fs/ext4/super.c
@@ -18,4 +18,6 @@
  */
 
+/* Moved. */
+
 #include <linux/module.h>
 #include <linux/string.h>
";
    kernel.refuses(&config, moved, &["nothing changed"]);
    let other = config.replace("gcc-12 (Debian", "gcc-12 (other");
    kernel.refuses(&other, &nothing, &["gcc-12 (other", "here is"]);
    let older = config.replace("# Linux/x86 6.", "# Linux/x86 5.");
    kernel.refuses(&older, &nothing, &["of Linux 5.", "the source of 6."]);
    let strange = config.clone() + "CONFIG_NO_SUCH_OPTION=y\n";
    kernel.refuses(
        &strange,
        &nothing,
        &["CONFIG_NO_SUCH_OPTION is y and becomes absent"],
    );
    let wrong = nothing.replace("+\n", "+no C\n");
    kernel.refuses(
        &config,
        &wrong,
        &["does not compile", "fs/proc/version.c", "error:"],
    );
    let arm = moved.replace("fs/ext4/super.c", "arch/x86/boot/main.c");
    kernel.refuses(
        &config,
        &arm,
        &["arch/x86/boot/main.c", "before the kernel"],
    );
    let absent = moved.replace("fs/ext4/super.c", "drivers/net/hamradio/6pack.c");
    kernel.refuses(
        &config,
        &absent,
        &["nothing that this configuration builds", "6pack.c"],
    );
    let everywhere = moved.replace("fs/ext4/super.c", "include/linux/list.h");
    kernel.refuses(
        &config,
        &everywhere,
        &["include/linux/list.h", "more than 64"],
    );
    for samples in [&["proc-version"][..], &["loadavg-format", "proc-version"]] {
        let given = kernel.build(&kernel.objects(samples));
        assert_eq!(given.code, Some(0), "{}", given.json);
        fs::remove_file(kernel.made()).unwrap();
        let diff = kernel.out.path().join("all.patch");
        let texts = samples
            .iter()
            .map(|it| fs::read_to_string(patch(it)).unwrap());
        fs::write(&diff, texts.collect::<String>()).unwrap();
        let compiled = kernel.compile(&kernel.config, &diff);
        assert_eq!(compiled.code, Some(0), "{}", compiled.json);
        assert!(kernel.made().exists());
        fs::remove_file(kernel.made()).unwrap();
        let (given, compiled) = (given.files(), compiled.files());
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
    let header = fs::read_to_string(kernel.source.join("fs/fat/fat.h")).unwrap();
    let line = "\tunsigned char s = name[0];\n";
    let (before, _) = header.split_once(line).unwrap();
    let number = before.lines().count() + 1;
    let hunk = format!(
        "@@ -{number} +{number} @@\n-{line}+{}",
        line.replace(";", " ^ 1;")
    );
    let diff = kernel.out.path().join("header.patch");
    let head = "--- a/fs/fat/fat.h\n+++ b/fs/fat/fat.h\n";
    fs::write(&diff, format!("{head}{hunk}")).unwrap();
    let answer = kernel.compile(&kernel.config, &diff);
    let files = answer
        .json
        .pointer("/report/files")
        .unwrap_or(&answer.json["files"]);
    let files = files.as_array().unwrap().iter();
    let files: Vec<_> = files.map(|file| (&file["file"], &file["object"])).collect();
    assert_eq!(files[0], (&"fs/fat/dir.c".into(), &"fat".into()));
    assert_eq!(files[1], (&"fs/fat/namei_vfat.c".into(), &"vfat".into()));
    assert_eq!(files.len(), 2, "{files:?}");
}

/// An ELF that shows a kernel's banner where a vmlinux does.
fn vmlinux(folder: &Path, banner: &str) -> PathBuf {
    let (source, made) = (folder.join("banner.c"), folder.join("vmlinux"));
    fs::write(
        &source,
        format!("const char linux_banner[] = \"{banner}\\n\";\n"),
    )
    .unwrap();
    let mut gcc = Command::new("gcc");
    gcc.args(["-fno-zero-initialized-in-bss", "-c", "-o"]);
    assert!(gcc.arg(&made).arg(&source).status().unwrap().success());
    made
}

#[test]
fn a_kernel_that_is_not_the_compiled_one_is_refused_by_what_differs() {
    let Some(kernel) = Kernel::given() else {
        return;
    };
    let config = fs::read_to_string(&kernel.config).unwrap();
    let compiler = config
        .lines()
        .find_map(|line| line.strip_prefix("CONFIG_CC_VERSION_TEXT="));
    let compiler = compiler.unwrap().trim_matches('"');
    let head = config
        .lines()
        .find_map(|line| line.strip_prefix("# Linux/x86 "))
        .unwrap();
    let version = head.strip_suffix(" Kernel Configuration").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let build = |release: &str, compiler: &str| {
        let banner = format!("Linux version {release} (a@b) ({compiler}, GNU ld 2.40) #1 SMP");
        let shown = vmlinux(folder.path(), &banner);
        let diff = patch("proc-version");
        let words: [&OsStr; 8] = [
            "--vmlinux".as_ref(),
            shown.as_ref(),
            "--source".as_ref(),
            kernel.source.as_ref(),
            "--config".as_ref(),
            kernel.config.as_ref(),
            "--diff".as_ref(),
            diff.as_ref(),
        ];
        kernel.build(&words)
    };
    let another = build("9.9.9-other", "gcc 1.0");
    assert_eq!(another.code, Some(3), "{}", another.json);
    let reason = another.json["reason"].as_str().unwrap();
    for word in ["9.9.9-other", version, "gcc 1.0", compiler] {
        assert!(reason.contains(word), "{word}: {reason}");
    }
    assert!(!kernel.made().exists());
    let same = build(&format!("{version}-cloud"), compiler);
    assert_eq!(same.code, Some(0), "{}", same.json);
}
