//! `cargo xtask images`: guest images into the cache.

use anyhow::Result;
use clap::Args;

use super::setup;
use crate::images;

/// Options of the command.
#[derive(Debug, Args)]
pub(crate) struct ImagesArgs {
    /// Guests to make [default: all of the manifest]
    names: Vec<String>,
}

/// Makes the images and prints their folders.
pub(crate) fn run(args: &ImagesArgs) -> Result<i32> {
    let manifest = setup::tools()?;
    let all = images::names(&manifest);
    let wanted: Vec<&str> = if args.names.is_empty() {
        all
    } else {
        args.names.iter().map(String::as_str).collect()
    };
    for name in wanted {
        let image = images::make(&manifest, name)?;
        println!(
            "{}\t{}\t{}",
            image.name,
            image.release()?,
            image.dir.display()
        );
    }
    Ok(0)
}
