//! What the tests share: calls of `vmpatch build`, from the source of a stock kernel or from objects that are compiled here.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use vmpatch_testkit::{Answer, Kernel, Tool};

/// All compile in one work tree, one after another.
const LIMIT: Duration = Duration::from_secs(30 * 60);

/// A folder for what is built, and where it is built from.
pub(crate) struct Bench {
    folder: TempDir,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// Where the patch file is to be.
    pub(crate) fn made(&self) -> PathBuf {
        self.at("fix.vmpatch")
    }

    /// A file beside it.
    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes one, and says where.
    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.at(name);
        fs::write(&path, text).unwrap();
        path
    }

    /// `vmpatch build` with these words.
    pub(crate) fn build<A: AsRef<OsStr>>(&self, words: &[A]) -> Answer {
        let made = self.made();
        let own = ["build".as_ref(), "--output".as_ref(), made.as_os_str()];
        let words = words.iter().map(AsRef::as_ref);
        let tool = Tool::at(env!("CARGO_BIN_EXE_vmpatch")).within(LIMIT);
        tool.call(own.into_iter().chain(words)).unwrap()
    }

    /// The same from a diff of a kernel's source.
    pub(crate) fn compile(&self, kernel: &Kernel, config: &Path, diff: &Path) -> Answer {
        self.build(&[
            OsStr::new("--source"),
            kernel.source.as_ref(),
            OsStr::new("--config"),
            config.as_ref(),
            OsStr::new("--diff"),
            diff.as_ref(),
        ])
    }

    /// The same from a source before and after, compiled here as a kernel's would be.
    pub(crate) fn compare(&self, before: &str, after: &str) -> Answer {
        let object = |name: &str, text: &str| {
            let (source, made) = (self.write("a.c", text), self.at(name));
            let mut gcc = Command::new("gcc");
            gcc.args([
                "-O2",
                "-g",
                "-ffreestanding",
                "-fno-pic",
                "-fcf-protection=none",
            ]);
            gcc.args([
                "-mcmodel=kernel",
                "-ffunction-sections",
                "-fdata-sections",
                "-c",
                "-o",
            ]);
            assert!(gcc.arg(&made).arg(&source).status().unwrap().success());
            made
        };
        let (old, new) = (object("old.o", before), object("new.o", after));
        self.build(&[
            "--old".as_ref(),
            old.as_os_str(),
            "--new".as_ref(),
            new.as_ref(),
        ])
    }

    /// That this is a refusal whose reason has these words, and that nothing was written.
    #[track_caller]
    pub(crate) fn refuses(&self, answer: &Answer, words: &[&str]) {
        let said = format!("{}{}", answer.stdout, answer.stderr);
        assert_eq!(answer.code, Some(3), "{said}");
        let reason = answer.json["reason"].as_str().unwrap_or_default();
        for word in words {
            assert!(reason.contains(word), "{word:?} is not in: {said}");
        }
        assert!(!self.made().exists());
    }
}

/// What is said of each file.
pub(crate) fn files(answer: &Answer) -> &[Value] {
    let refused = answer.json.pointer("/report/files");
    refused.unwrap_or(&answer.json["files"]).as_array().unwrap()
}

/// The diff of a change for tests.
pub(crate) fn patch(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("guest-images/patches/{name}.patch"))
}
