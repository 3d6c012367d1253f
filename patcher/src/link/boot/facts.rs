//! What this boot of this kernel decided, as far as code depends on it. Read once, while the guest runs.

use vmpatch_introspect::features::CpuFeatures;
use vmpatch_introspect::{Gva, ReadError};

use super::retpolines::Indirect;
use super::returns::Returns;
use super::{Rules, features};
use crate::link::live::Live;

/// Decisions of one boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Which generation of text patching.
    pub rules: Rules,
    /// CPU features, where the kernel tells.
    pub features: Option<CpuFeatures>,
    /// How functions return.
    pub returns: Returns,
    /// How indirect branches are made; `None` for a kernel built without retpolines.
    pub indirect: Option<Indirect>,
    /// With call-depth tracking, calls go to this many bytes before a function.
    pub call_padding: Option<u64>,
    /// Indirect branch tracking is on.
    pub ibt: bool,
    /// Page-table isolation is on or may be.
    pub isolated: bool,
    /// `nop_func` (6.12) or `_paravirt_nop` (6.1): a paravirt call to it becomes a nop.
    pub paravirt_nop: Option<Gva>,
    /// `BUG_func` (6.12) or `paravirt_BUG` (6.1): a paravirt call to nothing becomes a call to it.
    pub paravirt_bug: Option<Gva>,
}

/// Why the decisions of a boot cannot be told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FactsError {
    /// A kernel generation whose rules are not known.
    #[error("kernel {release}: how it patches its own text is not known to this program")]
    Generation {
        /// `uname -r`.
        release: String,
    },
    /// A feature word decides and cannot be read.
    #[error("{what} depends on CPU features, and this kernel does not tell them (no {missing})")]
    Features {
        /// What depends on it.
        what: &'static str,
        /// Symbol or type that is missing.
        missing: &'static str,
    },
    /// A symbol that must be there with the feature is not.
    #[error("the guest has {feature} but no single symbol `{symbol}`")]
    Symbol {
        /// Feature.
        feature: &'static str,
        /// Symbol.
        symbol: &'static str,
    },
    /// Memory cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Functions of this boot return through the thunk that only warns.
    #[error("the guest returns through `__x86_return_thunk`, which must not be used after boot")]
    WarningThunk,
}

impl Facts {
    /// Reads them. `features` is what the kernel tells of its CPU, if it tells.
    ///
    /// # Errors
    /// [`FactsError`].
    pub fn read(
        release: &str,
        features: Option<CpuFeatures>,
        live: &dyn Live,
    ) -> Result<Self, FactsError> {
        let rules = rules(release)?;
        let reader = Reader {
            live,
            rules,
            features: features.as_ref(),
        };
        Ok(Self {
            rules,
            returns: reader.returns()?,
            indirect: reader.indirect()?,
            call_padding: reader.call_padding()?,
            ibt: reader.ibt()?,
            isolated: reader.has(features::PTI).unwrap_or(true),
            paravirt_nop: live
                .unique("nop_func")
                .or_else(|| live.unique("_paravirt_nop")),
            paravirt_bug: live
                .unique("BUG_func")
                .or_else(|| live.unique("paravirt_BUG")),
            features,
        })
    }

    /// Whether a feature is there.
    #[must_use]
    pub fn has(&self, feature: u16) -> Option<bool> {
        self.features.as_ref()?.has(feature)
    }
}

/// The generation, by release: what lies between the two changed step by step and is not known well enough
/// to re-enact.
fn rules(release: &str) -> Result<Rules, FactsError> {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(6)), Some(Ok(1))) => Ok(Rules::Rows),
        (Some(Ok(6)), Some(Ok(12))) => Ok(Rules::Single),
        _ => Err(FactsError::Generation {
            release: release.to_owned(),
        }),
    }
}

struct Reader<'a> {
    live: &'a dyn Live,
    rules: Rules,
    features: Option<&'a CpuFeatures>,
}

impl Reader<'_> {
    fn has(&self, feature: u16) -> Option<bool> {
        self.features?.has(feature)
    }

    fn must_know(&self, feature: u16, what: &'static str) -> Result<bool, FactsError> {
        self.has(feature).ok_or(FactsError::Features {
            what,
            missing: "boot_cpu_data",
        })
    }

    fn symbol(&self, feature: &'static str, symbol: &'static str) -> Result<Gva, FactsError> {
        self.live
            .unique(symbol)
            .ok_or(FactsError::Symbol { feature, symbol })
    }

    fn returns(&self) -> Result<Returns, FactsError> {
        let Some(warning) = self.live.unique("__x86_return_thunk") else {
            return Ok(Returns::Plain);
        };
        if !self.must_know(features::RETHUNK, "how functions return")? {
            return Ok(Returns::Plain);
        }
        let variable = self.symbol("return thunks", "x86_return_thunk")?;
        let thunk = Gva(self.live.read_u64(variable)?);
        // Since v6.9 the default thunk warns once alternatives are in place (arch/x86/lib/retpoline.S).
        if thunk == warning && self.rules == Rules::Single {
            return Err(FactsError::WarningThunk);
        }
        match self.live.unique("its_return_thunk") {
            Some(its) if its == thunk => Ok(Returns::LowerHalf(thunk)),
            _ => Ok(Returns::Thunk(thunk)),
        }
    }

    fn indirect(&self) -> Result<Option<Indirect>, FactsError> {
        let Some(thunks) = self.live.unique("__x86_indirect_thunk_array") else {
            return Ok(None);
        };
        let what = "how indirect branches are made";
        let lfence = self.must_know(features::RETPOLINE_LFENCE, what)?;
        if self.must_know(features::RETPOLINE, what)? && !lfence {
            return Ok(Some(match self.call_padding()? {
                None => Indirect::Thunk(thunks),
                Some(_) => Indirect::Counted {
                    calls: self.symbol("call-depth tracking", "__x86_indirect_call_thunk_array")?,
                    jumps: self.symbol("call-depth tracking", "__x86_indirect_jump_thunk_array")?,
                },
            }));
        }
        Ok(Some(Indirect::Direct {
            lfence,
            its: self.its(what)?,
            otherwise: thunks,
        }))
    }

    fn its(&self, what: &'static str) -> Result<Option<Gva>, FactsError> {
        let Some(array) = self.live.unique("__x86_indirect_its_thunk_array") else {
            return Ok(None);
        };
        let feature = match self.rules {
            Rules::Rows => features::ITS_6_1,
            Rules::Single => features::ITS_6_12,
        };
        Ok(self.must_know(feature, what)?.then_some(array))
    }

    fn call_padding(&self) -> Result<Option<u64>, FactsError> {
        if self
            .live
            .unique("__x86_indirect_call_thunk_array")
            .is_none()
        {
            return Ok(None);
        }
        let feature = "call-depth tracking";
        if !self.must_know(features::CALL_DEPTH, "where calls lead")? {
            return Ok(None);
        }
        // The template copied before each function (Linux v6.12 arch/x86/kernel/callthunks.c).
        let start = self.symbol(feature, "skl_call_thunk_template")?;
        let end = self.symbol(feature, "skl_call_thunk_tail")?;
        Ok(Some(end.0.wrapping_sub(start.0)))
    }

    /// Off for certain where the kernel has no code to switch it.
    fn ibt(&self) -> Result<bool, FactsError> {
        if self.live.unique("ibt_restore").is_none() {
            return Ok(false);
        }
        self.must_know(features::IBT, "whether indirect calls need a landing mark")
    }
}
