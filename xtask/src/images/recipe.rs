//! What is needed to compile one file of a guest's kernel the way it was compiled: source and configuration.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::{debian, lean};
use crate::manifest::Manifest;
use crate::{packages, source};

/// Source and configuration of a guest's kernel.
#[derive(Debug)]
pub(crate) struct Recipe {
    /// Unpacked source, to be left as it is.
    pub source: PathBuf,
    /// Content of `.config`.
    pub config: String,
    /// Names the exact version and configuration.
    pub identity: String,
}

/// The recipe of a guest.
pub(crate) fn recipe(manifest: &Manifest, name: &str) -> Result<Recipe> {
    let lean = manifest.leans.iter().find(|l| l.name == name);
    let guest = packages::settle(manifest.guest(lean.map_or(name, |l| &l.source))?)?;
    let source = source::unpacked(&guest)?;
    let (config, identity) = match lean {
        Some(lean) => {
            let built = lean::built(manifest, lean)?;
            (built.dir.join(".config"), built.identity)
        }
        None => (
            debian::build_tree(&guest)?.join(".config"),
            format!("{} {}", guest.name, guest.version),
        ),
    };
    let config =
        fs::read_to_string(&config).with_context(|| format!("cannot read {}", config.display()))?;
    Ok(Recipe {
        source,
        config,
        identity,
    })
}
