//! Why no objects were made.

use std::io;
use std::path::PathBuf;

use crate::config::Changed;
use crate::diff::{DiffError, Files};

/// Why no objects were made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The folder is no source of a kernel.
    #[error("{0} is no kernel source: it has no {1}")]
    NoSource(PathBuf, &'static str),
    /// The configuration says nothing of a compiler.
    #[error(
        "the configuration names no compiler (CONFIG_CC_VERSION_TEXT): take the one the kernel was built with, \
         such as /boot/config-RELEASE"
    )]
    NoCompilerNamed,
    /// The kernel was built by something else than gcc.
    #[error("the kernel was built by {0}: only gcc is known here so far")]
    OtherCompiler(String),
    /// The compiler is not installed.
    #[error("the kernel was built by {wanted}, and {program} is not installed here")]
    CompilerMissing {
        /// As the configuration names it.
        wanted: String,
        /// The program looked for.
        program: String,
    },
    /// The compiler is another version.
    #[error(
        "the kernel was built by {wanted}; {program} here is {found}: another compiler makes other code of the same \
         source"
    )]
    CompilerDiffers {
        /// As the configuration names it.
        wanted: String,
        /// What the program says.
        found: String,
        /// The program.
        program: String,
    },
    /// The configuration is of another version.
    #[error("the configuration is of Linux {config}, the source of {source_version}")]
    ConfigOfAnother {
        /// Of the configuration.
        config: String,
        /// Of the source.
        source_version: String,
    },
    /// The configuration is not one that this source can have here.
    #[error(
        "this is not the configuration of a kernel of this source as it would be built here, where {}: take the one \
         the kernel was built with, and install what it was built with, such as pahole for BTF",
        changes(.0)
    )]
    ConfigChanges(Vec<Changed>),
    /// What is compiled is not what runs.
    #[error("the kernel to be patched is another than the one that is compiled: {}", .0.join("; "))]
    OtherKernel(Vec<String>),
    /// The changed source does not compile.
    #[error("with the change the source does not compile:\n{0}")]
    DoesNotCompile(String),
    /// The diff cannot be read, or not be used.
    #[error("{0}")]
    Diff(#[from] DiffError),
    /// The diff does not fit the source.
    #[error(
        "the diff does not fit the source {source_dir}: take the fix as it was made for this version, or apply it there by \
         hand and give the diff of that\n{said}"
    )]
    DoesNotApply {
        /// The source.
        source_dir: PathBuf,
        /// What `patch` said.
        said: String,
    },
    /// A file was compiled as it is without the change.
    #[error(
        "{} includes {} by a way that leads past the change: it was compiled without it",
        by.display(),
        file.display()
    )]
    Unchanged {
        /// The file that the diff changes.
        file: PathBuf,
        /// What was compiled.
        by: PathBuf,
    },
    /// How the kernel is linked changes.
    #[error(
        "the diff changes {0}, by which the kernel is linked: that cannot change in one that runs"
    )]
    LinkedOtherwise(&'static str),
    /// Nothing that the diff changes is built.
    #[error("the diff changes nothing that this configuration builds, only {}", Files(.0))]
    NotBuilt(Vec<PathBuf>),
    /// More files include something than may be compiled.
    #[error(
        "{} may be included by {count} files ({}, …), more than {most}: --most-objects allows more",
        file.display(),
        Files(first)
    )]
    TooMany {
        /// What is included.
        file: PathBuf,
        /// How many include it, or may.
        count: usize,
        /// How many may be compiled.
        most: usize,
        /// Some of them.
        first: Vec<PathBuf>,
    },
    /// All includers come out the same.
    #[error("nothing changed: {0} files that include what the diff changes come out the same")]
    AllTheSame(usize),
    /// The layout of types changes that assembly knows.
    #[error("the diff changes {0}, from which all assembly of the kernel is made")]
    Offsets(&'static str),
    /// The kernel's header of static branches has no jump of a known form.
    #[error("{0} has no jump as it is known here: static branches of new code cannot be made wide")]
    NoBranches(PathBuf),
    /// A static branch did not become wide.
    #[error(
        "{file}: the static branch at {place} is not one of five bytes, though it was asked for"
    )]
    NotWide {
        /// The file.
        file: String,
        /// Where in its object.
        place: String,
    },
    /// Something of the kernel's own build failed.
    #[error("{what} failed:\n{said}")]
    Failed {
        /// The command.
        what: String,
        /// Its last lines.
        said: String,
    },
    /// A program could not be started.
    #[error("{program} cannot be started: {why}")]
    NotStarted {
        /// The program.
        program: String,
        /// Why.
        why: io::Error,
    },
    /// A file or folder of the work tree or the source.
    #[error("{}: {why}", at.display())]
    File {
        /// Which.
        at: PathBuf,
        /// Why.
        why: io::Error,
    },
}

/// The first few of the options.
fn changes(all: &[Changed]) -> String {
    let told = all.iter().take(5).map(ToString::to_string);
    let told: Vec<_> = told.collect();
    match all.len().saturating_sub(told.len()) {
        0 => told.join(", "),
        more => format!("{}, and {more} more", told.join(", ")),
    }
}

/// Tells where it happened.
pub(crate) trait At<T> {
    /// At this file or folder.
    fn at(self, at: impl Into<PathBuf>) -> Result<T, BuildError>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, at: impl Into<PathBuf>) -> Result<T, BuildError> {
        self.map_err(|why| BuildError::File { at: at.into(), why })
    }
}
