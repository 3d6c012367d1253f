//! Run-pre matching: whether a function of the old object is what runs at an address. The object's code
//! is taken through the kernel's own boot and then compared, byte for byte but for the places that
//! [`tolerance`] names; fields are checked by what they name, and tell what open symbols are.

use vmpatch_introspect::{Gva, ReadError};

use super::{disassembly, tolerance};
use crate::link::boot::{self, BootError, Facts, Image};
use crate::link::live::Live;
use crate::link::names::{Disagreement, Learned, Names};
use crate::link::relocate;
use crate::patch::{Code, Relocation, Site, SiteKind};

/// Everything one guest is compared with.
pub struct Matcher<'a> {
    /// The guest.
    pub live: &'a dyn Live,
    /// What its boot decided.
    pub facts: &'a Facts,
    /// The patch's symbols in it.
    pub names: &'a Names<'a>,
}

/// Where and why the function that runs is another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Offset of the first byte that differs.
    pub offset: usize,
    /// Why it counts as different.
    pub reason: Reason,
    /// Both versions around it, as text.
    pub lines: Vec<String>,
}

/// Why code counts as different.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// The bytes are others.
    #[error("the bytes differ")]
    Bytes,
    /// A field names something else.
    #[error("the field names another thing: {0}")]
    Field(#[from] Disagreement),
    /// A place the kernel may rewrite holds what it would not write.
    #[error("the kernel would not have made this of a {0}")]
    Site(&'static str),
    /// The old code could not be taken through the kernel's boot.
    #[error("what boot made of it cannot be told: {0}")]
    Boot(#[from] BootError),
    /// The guest's text cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// Longest function compared.
const LONGEST: usize = 1 << 20;

impl Matcher<'_> {
    /// Compares `code` with what runs at `at`. What open symbols turn out to be is added to `learned`;
    /// where the code does not match, `learned` may hold part of it.
    ///
    /// # Errors
    /// [`Mismatch`].
    pub fn compare(&self, code: &Code, at: Gva, learned: &mut Learned) -> Result<(), Mismatch> {
        let length = code.bytes.len();
        let running = match self.live.bytes(at, length.min(LONGEST)) {
            Ok(bytes) if bytes.len() == length => bytes,
            Ok(_) => return Err(Mismatch::bare(Reason::Bytes)),
            Err(error) => return Err(Mismatch::bare(error.into())),
        };
        let mut image = Image {
            at,
            bytes: code.bytes.clone(),
        };
        let trial = Trial {
            matcher: self,
            code,
            running: &running,
        };
        match trial.run(&mut image, learned) {
            Ok(()) => Ok(()),
            Err((offset, reason)) => {
                let lines = disassembly::side_by_side(at, &image.bytes, &running, offset);
                Err(Mismatch {
                    offset,
                    reason,
                    lines,
                })
            }
        }
    }
}

impl Mismatch {
    fn bare(reason: Reason) -> Self {
        Self {
            offset: 0,
            reason,
            lines: Vec::new(),
        }
    }
}

type Outcome = Result<(), (usize, Reason)>;

/// One comparison under way.
struct Trial<'a> {
    matcher: &'a Matcher<'a>,
    code: &'a Code,
    running: &'a [u8],
}

impl Trial<'_> {
    fn run(&self, image: &mut Image, learned: &mut Learned) -> Outcome {
        let rewritten = self.rewritten();
        let fixed = |field: &&Relocation| {
            !rewritten
                .get(field.offset as usize)
                .copied()
                .unwrap_or_default()
        };
        for field in self.code.relocations.iter().filter(fixed) {
            self.field(image, field, learned)?;
        }
        self.fields_in_sites(image, &rewritten, learned)?;
        let resolve = |index| self.matcher.names.value(learned, index);
        let Matcher { live, facts, .. } = self.matcher;
        boot::run(image, &self.code.sites, facts, *live, &resolve)
            .map_err(|error| (error.offset() as usize, error.into()))?;
        for site in &self.code.sites {
            self.tolerate(image, site, learned)?;
        }
        match image
            .bytes
            .iter()
            .zip(self.running)
            .position(|(built, runs)| built != runs)
        {
            Some(offset) => Err((offset, Reason::Bytes)),
            None => Ok(()),
        }
    }

    /// Which bytes the kernel rewrites as a whole: fields there are not what the object has.
    fn rewritten(&self) -> Vec<bool> {
        let mut rewritten = vec![false; self.code.bytes.len()];
        let whole = |site: &&Site| !matches!(site.kind, SiteKind::LockPrefix | SiteKind::Endbr);
        for site in self.code.sites.iter().filter(whole) {
            let from = site.offset as usize;
            if let Some(part) = rewritten.get_mut(from..from.saturating_add(site.len.into())) {
                part.fill(true);
            }
        }
        rewritten
    }

    /// A field that runs as it was linked: what it names must be the symbol.
    fn field(&self, image: &mut Image, field: &Relocation, learned: &mut Learned) -> Outcome {
        let offset = field.offset as usize;
        let at = image.address(field.offset);
        let bytes = offset
            .checked_add(relocate::field_size(field.kind))
            .and_then(|end| self.running.get(offset..end))
            .ok_or((offset, Reason::Bytes))?;
        let found =
            relocate::decode(field.kind, bytes, field.addend, at).ok_or((offset, Reason::Bytes))?;
        let names = self.matcher.names;
        let agreed = match names.agree(learned, field.symbol, found) {
            Err(error) => match self.behind_padding(field, found) {
                Some(function) => names.agree(learned, field.symbol, function),
                None => Err(error),
            },
            agreed => agreed,
        };
        agreed.map_err(|error| (offset, error.into()))?;
        image
            .write(field.offset, bytes)
            .map_err(|error| (offset, error.into()))
    }

    /// With call-depth tracking a call leads to the padding before its function (Linux v6.12
    /// arch/x86/kernel/callthunks.c): the function then, if this is such a call.
    fn behind_padding(&self, field: &Relocation, found: Gva) -> Option<Gva> {
        let padding = self.matcher.facts.call_padding?;
        let opcode = field.offset.checked_sub(1)? as usize;
        (self.running.get(opcode) == Some(&0xe8)).then(|| found.wrapping_add(padding))
    }

    /// Fields within rewritten places: filled in where the symbol is known, for the re-enacted boot.
    fn fields_in_sites(&self, image: &mut Image, rewritten: &[bool], learned: &Learned) -> Outcome {
        let inside = |field: &&Relocation| {
            rewritten
                .get(field.offset as usize)
                .copied()
                .unwrap_or_default()
        };
        let fields: Vec<_> = self
            .code
            .relocations
            .iter()
            .filter(inside)
            .cloned()
            .collect();
        let resolve = |index| self.matcher.names.value(learned, index);
        match image.relocate(&fields, &resolve) {
            Ok(_) => Ok(()),
            Err(error) => Err((error.offset() as usize, error.into())),
        }
    }

    /// Takes over what runs at a place that changes after boot, if the kernel could have written it.
    fn tolerate(&self, image: &mut Image, site: &Site, learned: &Learned) -> Outcome {
        let offset = site.offset as usize;
        let part = offset..offset.saturating_add(site.len.into());
        let running = self
            .running
            .get(part)
            .ok_or((offset, Reason::Site("site")))?;
        let at = image.address(site.offset);
        let (what, tolerated) = match &site.kind {
            SiteKind::Fentry => ("call to ftrace", tolerance::fentry(running)),
            SiteKind::Endbr => ("landing mark", tolerance::landing_mark(running)),
            SiteKind::LockPrefix => return self.lock_prefix(image, site, running),
            SiteKind::JumpLabel { target, .. } => {
                let target = self
                    .matcher
                    .names
                    .value(learned, target.symbol)
                    .map(|symbol| symbol.wrapping_add(target.addend.cast_unsigned()));
                (
                    "static-key branch",
                    tolerance::jump_label(running, at, target),
                )
            }
            SiteKind::StaticCall => ("static call", self.static_call(site, at, running)),
            SiteKind::Retpoline { register, call } => {
                let Matcher { live, facts, .. } = self.matcher;
                let nameless =
                    tolerance::nameless_thunk(running, at, *register, *call, facts, *live);
                if !nameless {
                    return Ok(());
                }
                ("retpoline", true)
            }
            SiteKind::Alternative { .. } => return self.padded_call(image, site, running),
            SiteKind::Return | SiteKind::RuntimeConstant { .. } | SiteKind::Paravirt { .. } => {
                return Ok(());
            }
        };
        if !tolerated {
            return Err((offset, Reason::Site(what)));
        }
        image
            .write(site.offset, running)
            .map_err(|error| (offset, error.into()))
    }

    /// The prefix may lie in an alternative that has taken its place: then the alternative decides.
    fn lock_prefix(&self, image: &mut Image, site: &Site, running: &[u8]) -> Outcome {
        let offset = site.offset as usize;
        if image.bytes.get(offset) == Some(&0xf0) && tolerance::lock_prefix(running) {
            return image
                .write(site.offset, running)
                .map_err(|error| (offset, error.into()));
        }
        Ok(())
    }

    /// With call-depth tracking a call that an alternative begins with leads to the padding before its
    /// function (Linux v6.12 arch/x86/kernel/callthunks.c, `patch_alt_call_sites`).
    fn padded_call(&self, image: &mut Image, site: &Site, running: &[u8]) -> Outcome {
        let offset = site.offset as usize;
        let (Some(padding), Some(call)) = (self.matcher.facts.call_padding, running.first_chunk())
        else {
            return Ok(());
        };
        let built = image
            .bytes
            .get(offset..)
            .and_then(|rest| rest.first_chunk());
        if built.is_some_and(|built| tolerance::padded_call(built, call, padding)) {
            return image
                .write(site.offset, call)
                .map_err(|error| (offset, error.into()));
        }
        Ok(())
    }

    fn static_call(&self, site: &Site, at: Gva, running: &[u8]) -> bool {
        let end = site.offset.saturating_add(site.len.into());
        let within = |field: &&Relocation| (site.offset..end).contains(&field.offset);
        let Some(field) = self.code.relocations.iter().find(within) else {
            return false;
        };
        let Some(key) = self
            .matcher
            .names
            .name(field.symbol)
            .strip_prefix("__SCT__")
        else {
            return false;
        };
        let live = self.matcher.live;
        let object = self.matcher.names.object(field.symbol);
        let only = |name: &str| match *live.named_in(object, name) {
            [at] => Some(at),
            _ => None,
        };
        let Some(trampoline) = only(&format!("__SCT__{key}")) else {
            return false;
        };
        let function = only(&format!("__SCK__{key}")).and_then(|key| live.read_u64(key).ok());
        let call = tolerance::StaticCall {
            at,
            trampoline,
            function: function.map(Gva),
            return_zero: live.unique("__static_call_return0"),
        };
        call.accepts(running, self.matcher.facts)
    }
}

#[cfg(test)]
mod tests;
