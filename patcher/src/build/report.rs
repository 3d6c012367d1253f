//! What a build found and did, for people and for JSON. Owns the records and their text, no decision.

use std::fmt;

use serde::Serialize;

use super::ObjectPair;
use crate::patch::CallbackKind;

/// The outcome of comparing the objects of all files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BuildReport {
    /// One for each file, in the order they were given.
    pub files: Vec<FileReport>,
}

/// The outcome of comparing the two objects of a file. Nothing that differs is missing from it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FileReport {
    /// The file.
    pub file: String,
    /// What it is linked into: `vmlinux` or a module's name.
    pub object: String,
    /// Functions whose new body replaces the old one.
    pub replaced: Vec<Replaced>,
    /// What the patch brings that the old object has not.
    pub new: Vec<Brought>,
    /// Functions that are called when the patch is applied or rolled back.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub callbacks: Vec<CalledBack>,
    /// Differences that do not matter, with the reason.
    pub ignored: Vec<Ignored>,
    /// Differences that cannot be patched, with the reason. If there is one there is no patch.
    pub refused: Vec<Refused>,
    /// Functions of the new object that are as before.
    pub unchanged: usize,
    /// Structures whose layout was compared; `None`: the objects have no debug information to tell it.
    pub layouts: Option<usize>,
    /// Why stacks cannot be followed through new code of this file; `None`: they can, or it brings none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_unwind_data: Option<String>,
}

/// A function that is replaced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Replaced {
    /// Its name.
    pub function: String,
    /// In what it differs.
    pub difference: String,
    /// Size of the old body in bytes.
    pub old_bytes: u64,
    /// Size of the new body in bytes.
    pub new_bytes: u64,
}

/// A function, constant or variable that is new.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Brought {
    /// Its name, or the text of a string.
    pub name: String,
    /// What it is.
    pub kind: &'static str,
    /// Size in bytes.
    pub bytes: u64,
}

/// A function that is called when the patch is applied or rolled back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CalledBack {
    /// When.
    pub kind: CallbackKind,
    /// Its name.
    pub function: String,
}

/// A difference that does not matter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Ignored {
    /// Function, variable or section.
    pub what: String,
    /// Why it does not matter.
    pub reason: String,
}

/// A difference that cannot be patched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refused {
    /// The function that needs it, or the variable; empty where neither is the reason.
    pub name: String,
    /// The section that cannot be treated.
    pub section: String,
    /// Offset from the start of the function or variable, where it is a place in one.
    pub offset: Option<u64>,
    /// Why not, and what to do where something can be done.
    pub reason: String,
}

impl FileReport {
    pub(super) fn new(pair: &ObjectPair<'_>) -> Self {
        Self {
            file: pair.file.to_owned(),
            object: pair.object.to_owned(),
            ..Self::default()
        }
    }

    pub(super) fn brings_code(&self) -> bool {
        !self.replaced.is_empty() || self.new.iter().any(|it| it.kind == "function")
    }

    fn is_empty(&self) -> bool {
        self.replaced.is_empty() && self.new.is_empty() && self.refused.is_empty()
    }
}

/// What differs; the alternate form (`{:#}`) also tells how many functions are as before.
impl fmt::Display for FileReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for it in &self.replaced {
            let (old, new) = (it.old_bytes, it.new_bytes);
            writeln!(
                f,
                "replaced  {} ({old} to {new} bytes): {}",
                it.function, it.difference
            )?;
        }
        for it in &self.new {
            writeln!(f, "new       {} {} ({} bytes)", it.kind, it.name, it.bytes)?;
        }
        for it in &self.callbacks {
            writeln!(f, "callback  {}: {}", it.kind, it.function)?;
        }
        for it in &self.ignored {
            writeln!(f, "ignored   {}: {}", it.what, it.reason)?;
        }
        for it in &self.refused {
            writeln!(f, "refused   {it}")?;
        }
        if self.layouts.is_none() {
            writeln!(
                f,
                "note      no debug information, so layouts of types were not compared"
            )?;
        }
        if let Some(why) = &self.no_unwind_data {
            writeln!(f, "note      no unwind data for new code: {why}")?;
        }
        match f.alternate() {
            true => writeln!(f, "unchanged {} functions", self.unchanged),
            false => Ok(()),
        }
    }
}

impl BuildReport {
    /// Whether the objects of every file do the same.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.files.iter().all(FileReport::is_empty)
    }

    /// How many functions are as before.
    #[must_use]
    pub fn unchanged(&self) -> usize {
        self.files.iter().map(|file| file.unchanged).sum()
    }

    /// Every difference that cannot be patched, as text that names the file where there are several.
    pub fn refused(&self) -> impl Iterator<Item = String> + '_ {
        self.files.iter().flat_map(|file| {
            let name = match self.files.len() {
                0 | 1 => String::new(),
                _ => format!("{}: ", file.file),
            };
            file.refused.iter().map(move |it| format!("{name}{it}"))
        })
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.section)?;
        if !self.name.is_empty() {
            write!(f, " in {}", self.name)?;
        }
        if let Some(offset) = self.offset {
            write!(f, "+{offset:#x}")?;
        }
        write!(f, ": {}", self.reason)
    }
}
