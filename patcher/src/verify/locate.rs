//! Which of the guest's functions is the one to be replaced: by its position where the patch says it, else
//! the one function of its name that matches.

use vmpatch_introspect::{Gva, GvaRange};

use super::run_pre::{Matcher, Mismatch};
use crate::link::names::Learned;
use crate::patch::{Code, Part, Patch, Replacement, VMLINUX};

/// A function to look for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The file that it is of, by its index in the patch.
    pub unit: u32,
    /// The object that it is linked into.
    pub object: &'a str,
    /// Its symbol.
    pub name: &'a str,
    /// Which of several of that name, from 1.
    pub sympos: Option<u32>,
    /// Its code as the object has it.
    pub code: &'a Code,
    /// Its split-off parts.
    pub parts: &'a [Part],
}

impl<'a> Wanted<'a> {
    /// What a patch replaces.
    #[must_use]
    pub fn of(patch: &'a Patch, it: &'a Replacement) -> Self {
        let unit = patch.units.get(it.unit as usize);
        Self {
            unit: it.unit,
            object: unit.map_or(VMLINUX, |unit| &unit.object),
            name: &it.name,
            sympos: it.sympos,
            code: &it.old,
            parts: &it.old_parts,
        }
    }
}

/// An old function as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// The function.
    pub range: GvaRange,
    /// Its split-off parts, in the order of the patch.
    pub parts: Vec<GvaRange>,
}

/// Why a function was not found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LocateError {
    /// No symbol of that name, or not so many.
    #[error("the guest has no function `{name}`{}", position(*.sympos))]
    Absent {
        /// The function.
        name: String,
        /// Position asked for.
        sympos: Option<u32>,
    },
    /// Several functions of that name match alike.
    #[error("{count} functions named `{name}` match; the patch must say which by its position")]
    Several {
        /// The function.
        name: String,
        /// How many match.
        count: usize,
    },
    /// None of that name matches.
    #[error("`{name}` at {at} is not what the patch was made for: at +{:#x} {}", .mismatch.offset, .mismatch.reason)]
    Differs {
        /// The function or part.
        name: String,
        /// The one that matches furthest.
        at: Gva,
        /// Where and why it does not.
        mismatch: Box<Mismatch>,
    },
}

fn position(sympos: Option<u32>) -> String {
    sympos.map_or_else(String::new, |at| format!(" at position {at}"))
}

impl Matcher<'_> {
    /// Finds the old function and its parts. Adds to `learned` what open symbols of its code are.
    ///
    /// # Errors
    /// [`LocateError`]; `learned` is then as before.
    pub fn locate(
        &self,
        wanted: Wanted<'_>,
        learned: &mut Learned,
    ) -> Result<Located, LocateError> {
        let mut tried = learned.clone();
        let at = self.find(wanted, &mut tried)?;
        let range = sized(wanted.name, at, wanted.code)?;
        let mut parts = Vec::with_capacity(wanted.parts.len());
        for part in wanted.parts {
            parts.push(self.part(wanted, part, &mut tried)?);
        }
        *learned = tried;
        Ok(Located { range, parts })
    }

    /// A part: where the function's own branches lead to it, if they told.
    fn part(
        &self,
        whole: Wanted<'_>,
        part: &Part,
        learned: &mut Learned,
    ) -> Result<GvaRange, LocateError> {
        let known = self.names.learned_as(learned, (whole.unit, &part.name));
        let wanted = Wanted {
            name: &part.name,
            sympos: None,
            code: &part.code,
            parts: &[],
            ..whole
        };
        let at = match known {
            Some(at) => self.hold(&part.name, at, &part.code, learned)?,
            None => self.find(wanted, learned)?,
        };
        sized(&part.name, at, &part.code)
    }

    /// The one candidate that matches.
    fn find(&self, wanted: Wanted<'_>, learned: &mut Learned) -> Result<Gva, LocateError> {
        let Wanted {
            unit,
            object,
            name,
            sympos,
            code,
            ..
        } = wanted;
        let absent = || LocateError::Absent {
            name: name.to_owned(),
            sympos,
        };
        let mut candidates = self.live.defined_in(object, name);
        if let Some(position) = sympos {
            let index = position.checked_sub(1).ok_or_else(absent)? as usize;
            candidates = candidates.get(index).copied().into_iter().collect();
        }
        let mut matching: Vec<(Gva, Learned)> = Vec::new();
        let mut nearest: Option<LocateError> = None;
        for at in candidates {
            let mut trial = learned.clone();
            self.names.presume(&mut trial, (unit, name), at);
            match self.hold(name, at, code, &mut trial) {
                Ok(at) => matching.push((at, trial)),
                Err(error)
                    if error.reached() >= nearest.as_ref().map_or(0, LocateError::reached) =>
                {
                    nearest = Some(error);
                }
                Err(_) => {}
            }
        }
        match (matching.pop(), matching.len()) {
            (Some((at, trial)), 0) => {
                *learned = trial;
                Ok(at)
            }
            (Some(_), others) => Err(LocateError::Several {
                name: name.to_owned(),
                count: others + 1,
            }),
            (None, _) => Err(nearest.unwrap_or_else(absent)),
        }
    }

    fn hold(
        &self,
        name: &str,
        at: Gva,
        code: &Code,
        learned: &mut Learned,
    ) -> Result<Gva, LocateError> {
        match self.compare(code, at, learned) {
            Ok(()) => Ok(at),
            Err(mismatch) => {
                let mismatch = Box::new(mismatch);
                Err(LocateError::Differs {
                    name: name.to_owned(),
                    at,
                    mismatch,
                })
            }
        }
    }
}

impl LocateError {
    /// Both versions of the code side by side, one line each, where it is the code that differs.
    #[must_use]
    pub fn difference(&self) -> &[String] {
        match self {
            Self::Differs { mismatch, .. } => &mismatch.lines,
            Self::Absent { .. } | Self::Several { .. } => &[],
        }
    }

    /// How far the comparison came.
    const fn reached(&self) -> usize {
        match self {
            Self::Differs { mismatch, .. } => mismatch.offset,
            _ => 0,
        }
    }
}

fn sized(name: &str, at: Gva, code: &Code) -> Result<GvaRange, LocateError> {
    let absent = LocateError::Absent {
        name: name.to_owned(),
        sympos: None,
    };
    GvaRange::sized(at, code.bytes.len() as u64).ok_or(absent)
}
