//! The kernel that is compiled: the source and configuration that the call gives, or those of one of Debian's kernels.

use std::path::PathBuf;

use vmpatch_kbuild::debian;

use super::objects::read;
use crate::cli::Build;
use crate::exit::Failure;

/// What the running kernel was made of.
pub(super) struct Kernel {
    pub(super) source: PathBuf,
    pub(super) config: String,
    /// `uname -r`, where it is known.
    pub(super) release: Option<String>,
    /// Where it is compiled.
    pub(super) cache: PathBuf,
}

impl Kernel {
    pub(super) fn of(asked: &Build, step: &dyn Fn(&str)) -> Result<Self, Failure> {
        let cache =
            vmpatch_kbuild::cache::dir().map_err(|error| Failure::Usage(error.to_string()))?;
        if let Some(name) = &asked.debian {
            let debian = debian::fetch(name, asked.flavour.as_deref(), &cache, step)?;
            return Ok(Self {
                source: debian.source,
                config: debian.config,
                release: Some(debian.release),
                cache,
            });
        }
        match (&asked.source, &asked.config) {
            (Some(source), Some(config)) => Ok(Self {
                source: source.clone(),
                config: String::from_utf8_lossy(&read(config, "configuration")?).into_owned(),
                release: None,
                cache,
            }),
            _ => Err(Failure::Usage(
                "--diff needs --source and --config, or --debian".to_owned(),
            )),
        }
    }
}
