//! `cargo xtask objects GUEST PATCH`: the pair of objects that a test patch is made from, for people who develop vmpatch.

use anyhow::Result;
use clap::Args;

use super::setup;
use crate::objects;

/// Options of the command.
#[derive(Debug, Args)]
pub(crate) struct ObjectsArgs {
    /// Guest of the manifest
    guest: String,
    /// Name of a file in guest-images/patches/, without .patch
    patch: String,
}

/// Compiles both and prints their folder.
pub(crate) fn run(args: &ObjectsArgs) -> Result<i32> {
    let manifest = setup::tools()?;
    let pair = objects::make(&manifest, &args.guest, &args.patch)?;
    println!("{}", pair.dir().display());
    Ok(0)
}
