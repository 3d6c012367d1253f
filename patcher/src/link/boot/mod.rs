//! What the kernel's own boot makes of code: the same code has the same result at the same place, be it the
//! old function that runs (run-pre expects this text) or new code for the arena (linking writes it). Owns
//! the order of the steps; the steps are the files below. What the kernel changes *after* boot (static
//! keys, static calls, ftrace) is no business of this module.
//!
//! Order as in Linux v6.12 arch/x86/kernel/alternative.c, `alternative_instructions`: paravirt calls (6.1
//! only), retpolines, returns, alternatives. Runtime constants touch nothing that the others do.

pub mod alternatives;
pub mod facts;
pub mod features;
pub mod nops;
pub mod retpolines;
pub mod returns;

use vmpatch_introspect::{Gva, ReadError};

use super::live::Live;
use super::relocate::{self, OutOfReach};
use crate::patch::{Relocation, Site, SiteKind};
pub use facts::Facts;
use retpolines::IndirectSite;

/// The two generations of text patching that are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    /// Linux 6.1: `.parainstructions`, rows of nops, `recompute_jump`.
    Rows,
    /// Linux 6.12: `ALT_FLAG_DIRECT_CALL`, one effective nop.
    Single,
}

/// Code at the place it is to run, relocations applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Where it lies.
    pub at: Gva,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Gives the value of a symbol, by its index in the patch; `None` if it cannot be had.
pub type Resolve<'a> = &'a dyn Fn(u32) -> Option<Gva>;

/// Why the boot of code could not be re-enacted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BootError {
    /// A branch or field cannot reach its target.
    #[error(transparent)]
    OutOfReach(#[from] OutOfReach),
    /// Guest memory that decides the outcome cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The bytes are not what a site of that kind has.
    #[error("{what} at offset {offset:#x}: {why}")]
    Site {
        /// Which kind of site.
        what: &'static str,
        /// Offset in the code.
        offset: u64,
        /// What is wrong with it.
        why: String,
    },
    /// The code needs to know whether the CPU has a feature, and that cannot be told.
    #[error("{what} at offset {offset:#x} depends on a CPU feature that cannot be read")]
    UnknownFeature {
        /// Which kind of site.
        what: &'static str,
        /// Offset in the code.
        offset: u64,
    },
    /// A symbol that decides the outcome has no address.
    #[error("{what} at offset {offset:#x} names a symbol that was not found")]
    Unresolved {
        /// Which kind of site.
        what: &'static str,
        /// Offset in the code.
        offset: u64,
    },
}

impl BootError {
    /// Offset in the code, 0 where it is of no one place.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        match self {
            Self::Site { offset, .. }
            | Self::UnknownFeature { offset, .. }
            | Self::Unresolved { offset, .. } => *offset,
            Self::OutOfReach(_) | Self::Read(_) => 0,
        }
    }
}

impl Image {
    /// The part of a site.
    ///
    /// # Errors
    /// The site reaches outside.
    pub fn site(&self, site: &Site) -> Result<&[u8], BootError> {
        let from = usize::try_from(site.offset).unwrap_or(usize::MAX);
        let found = self
            .bytes
            .get(from..from.saturating_add(usize::from(site.len)));
        found.ok_or_else(|| BootError::Site {
            what: "site",
            offset: site.offset,
            why: "reaches outside its code".to_owned(),
        })
    }

    /// Where an offset lies.
    #[must_use]
    pub const fn address(&self, offset: u64) -> Gva {
        self.at.wrapping_add(offset)
    }

    /// Writes over part of it.
    ///
    /// # Errors
    /// The bytes reach outside.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), BootError> {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let into = self.bytes.get_mut(from..from.saturating_add(bytes.len()));
        into.map(|it| it.copy_from_slice(bytes))
            .ok_or_else(|| BootError::Site {
                what: "bytes",
                offset,
                why: "reach outside their code".to_owned(),
            })
    }

    /// Fills in every field whose symbol has a value; returns the offsets of the others.
    ///
    /// # Errors
    /// A field that cannot reach its target.
    pub fn relocate(
        &mut self,
        relocations: &[Relocation],
        resolve: Resolve<'_>,
    ) -> Result<Vec<u64>, BootError> {
        let mut left = Vec::new();
        for field in relocations {
            let Some(symbol) = resolve(field.symbol) else {
                left.push(field.offset);
                continue;
            };
            let at = self.address(field.offset);
            let bytes = relocate::encode(field.kind, symbol, field.addend, at)?;
            self.write(field.offset, &bytes)?;
        }
        Ok(left)
    }
}

/// Does to `image` what boot would have done.
///
/// # Errors
/// [`BootError`].
pub fn run(
    image: &mut Image,
    sites: &[Site],
    facts: &Facts,
    live: &dyn Live,
    resolve: Resolve<'_>,
) -> Result<(), BootError> {
    for site in sites {
        match &site.kind {
            SiteKind::RuntimeConstant { symbol, .. } => {
                constant(image, site, live, resolve(*symbol))?;
            }
            SiteKind::Paravirt { slot } => alternatives::paravirt(image, site, *slot, facts, live)?,
            _ => {}
        }
    }
    for site in sites {
        match site.kind {
            SiteKind::Retpoline { register, call } => indirect(image, site, register, call, facts)?,
            SiteKind::Return => {
                let length = usize::from(site.len);
                let bytes = facts.returns.site(image.address(site.offset), length)?;
                written_in_place(image, site, "return", &bytes)?;
            }
            _ => {}
        }
    }
    for site in sites {
        if let SiteKind::Alternative { replacements } = &site.kind {
            alternatives::apply(image, site, replacements, facts, live, resolve)?;
        }
    }
    Ok(())
}

fn written_in_place(
    image: &mut Image,
    site: &Site,
    what: &'static str,
    bytes: &[u8],
) -> Result<(), BootError> {
    if bytes.len() != usize::from(site.len) {
        let why = format!("{} bytes do not fit {}", bytes.len(), site.len);
        return Err(BootError::Site {
            what,
            offset: site.offset,
            why,
        });
    }
    image.write(site.offset, bytes)
}

fn indirect(
    image: &mut Image,
    site: &Site,
    register: u8,
    call: bool,
    facts: &Facts,
) -> Result<(), BootError> {
    let text = image.site(site)?;
    let opcode = if call { 0xe8 } else { 0xe9 };
    let known = match *text {
        [first, ..] if text.len() == 5 => first == opcode,
        [0x2e, second, ..] if text.len() == 6 => second == opcode,
        _ => false,
    };
    // rsp holds no target (Linux v6.12 arch/x86/kernel/alternative.c, `patch_retpoline`).
    if !known || register == 4 || register > 15 {
        let why = format!("{text:02x?} is no branch to a thunk");
        return Err(BootError::Site {
            what: "retpoline",
            offset: site.offset,
            why,
        });
    }
    let form = facts.indirect.ok_or(BootError::Site {
        what: "retpoline",
        offset: site.offset,
        why: "this kernel has no retpoline thunks".to_owned(),
    })?;
    let at = image.address(site.offset);
    let length = text.len();
    let bytes = form.site(
        facts.rules,
        IndirectSite {
            at,
            length,
            register,
            call,
        },
    )?;
    written_in_place(image, site, "retpoline", &bytes)
}

/// The immediate becomes the value of a variable (Linux v6.12 arch/x86/include/asm/runtime-const.h).
fn constant(
    image: &mut Image,
    site: &Site,
    live: &dyn Live,
    variable: Option<Gva>,
) -> Result<(), BootError> {
    let what = "runtime constant";
    let variable = variable.ok_or(BootError::Unresolved {
        what,
        offset: site.offset,
    })?;
    let value = live.read_u64(variable)?.to_le_bytes();
    let bytes = value.get(..usize::from(site.len)).unwrap_or_default();
    written_in_place(image, site, what, bytes)
}
