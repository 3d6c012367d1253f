//! Patch files made with `vmpatch build` from the objects that xtask compiled.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::Tool;

/// Which object is taken for the old one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// As it is: from old to new.
    Forward,
    /// The other way round: claims that the guest runs what it does not run.
    Backward,
}

/// Folder with `old.o` and `new.o` of a patch for a guest, below `VMPATCH_OBJECTS`.
///
/// # Errors
/// The variable is not set or there is no such pair.
pub fn objects(guest: &str, patch: &str) -> Result<PathBuf> {
    let root = std::env::var_os("VMPATCH_OBJECTS")
        .context("VMPATCH_OBJECTS is not set; run this by `cargo xtask`")?;
    let dir = PathBuf::from(root).join(guest).join(patch);
    dir.canonicalize()
        .with_context(|| format!("no objects in {}", dir.display()))
}

/// What a guest has besides its image, below `VMPATCH_EXTRAS`: a file of that name.
///
/// # Errors
/// The variable is not set or there is no such file.
pub fn extra(guest: &str, name: &str) -> Result<PathBuf> {
    let root = std::env::var_os("VMPATCH_EXTRAS")
        .context("VMPATCH_EXTRAS is not set; run this by `cargo xtask`")?;
    let file = PathBuf::from(root).join(guest).join(name);
    file.canonicalize()
        .with_context(|| format!("no {}", file.display()))
}

/// Builds a patch file in `dir` from the pair in `objects`.
///
/// # Errors
/// `vmpatch build` refuses; the message holds its words.
pub fn patch_file(
    tool: &Tool,
    objects: &Path,
    patch: &str,
    side: Side,
    dir: &Path,
) -> Result<PathBuf> {
    let (old, new) = match side {
        Side::Forward => ("old.o", "new.o"),
        Side::Backward => ("new.o", "old.o"),
    };
    let file = dir.join(format!("{patch}.vmpatch"));
    let mut words: Vec<std::ffi::OsString> = ["build", "--name", patch, "--old"]
        .iter()
        .map(Into::into)
        .collect();
    let object = fs::read_to_string(objects.join("object"))
        .with_context(|| format!("{} names no object", objects.display()))?;
    words.extend([
        objects.join(old).into(),
        "--new".into(),
        objects.join(new).into(),
        "--object".into(),
        object.into(),
        "--output".into(),
        file.clone().into(),
    ]);
    tool.call(words)?
        .expect_code(0)
        .with_context(|| format!("cannot build {patch} from {}", objects.display()))?;
    Ok(file)
}
