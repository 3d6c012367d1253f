//! Objects compiled from a guest's kernel source with the guest's own configuration: pairs to make a patch from, one source file
//! before and after a fix, and whole files to find in the guest. What is new has unwind data. Kept in the cache.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use vmpatch_kbuild::tree::FLAGS;
use vmpatch_kbuild::{Diff, Orc, Tree, headers};

use crate::images::{self, Recipe};
use crate::manifest::Manifest;
use crate::publish::Staging;
use crate::{checksum, paths, progress};

/// What the folders hold and how: another with each change of it.
const LAYOUT: &[u8] = b"3";

/// Folder with `old.o`, `new.o` and `object`, the name of what they are linked into.
#[derive(Debug)]
pub(crate) struct Pair {
    dir: PathBuf,
}

impl Pair {
    /// Where both lie, as `old.o` and `new.o`.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }
}

/// Compiles the file that `guest-images/patches/<patch>.patch` changes, without and with it, for this guest.
pub(crate) fn make(manifest: &Manifest, guest: &str, patch: &str) -> Result<Pair> {
    let path = paths::guest_images()
        .join("patches")
        .join(format!("{patch}.patch"));
    let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let diff = Diff::parse(&text).with_context(|| path.display().to_string())?;
    let recipe = images::recipe(manifest, guest)?;
    let input = with_headers(&text);
    let dir = cached(guest, patch, &recipe, &input, |tree, into| {
        let mut pairs = tree.compile_both(&diff, 0, &|_| {})?.pairs;
        let (Some(pair), true) = (pairs.pop(), pairs.is_empty()) else {
            bail!("{patch} changes more than one file");
        };
        ensure!(
            pair.old != pair.new,
            "{patch} changes nothing in the object compiled for {guest}"
        );
        let home = pair.module.as_deref().unwrap_or("vmlinux");
        fs::write(into.join("object"), home)?;
        fs::write(into.join("old.o"), pair.old)?;
        Ok(fs::write(into.join("new.o"), unwindable(tree, pair.new)?)?)
    })?;
    Ok(Pair { dir })
}

/// A diff, and the headers that vmpatch brings if it includes one.
fn with_headers(diff: &[u8]) -> Vec<u8> {
    let mut input = diff.to_vec();
    if String::from_utf8_lossy(diff).contains(headers::INCLUDED) {
        input.extend(headers::HEADERS.iter().flat_map(|(_, text)| text.bytes()));
    }
    input
}

/// The object, or a copy of it that has unwind data where the object has none.
fn unwindable(tree: &Tree, object: Vec<u8>) -> Result<Vec<u8>> {
    Ok(match tree.orc(&object)? {
        Orc::Copy(copy) => copy,
        Orc::Within | Orc::Absent(_) => object,
    })
}

/// Compiles these files as they are for this guest; the folder of each has the name of what it is linked into.
pub(crate) fn whole(manifest: &Manifest, guest: &str, files: &[&str]) -> Result<Vec<PathBuf>> {
    let recipe = images::recipe(manifest, guest)?;
    let name = |file: &str| file.trim_end_matches(".c").replace('/', "-") + ".o";
    let input = files.join("\n");
    let dir = cached(guest, "files", &recipe, input.as_bytes(), |tree, into| {
        let paths: Vec<_> = files.iter().map(PathBuf::from).collect();
        for (file, made) in files.iter().zip(tree.compile(&paths)?) {
            let home = into.join(made.module.as_deref().unwrap_or("vmlinux"));
            fs::create_dir_all(&home)?;
            fs::write(home.join(name(file)), unwindable(tree, made.object)?)?;
        }
        Ok(())
    })?;
    let homes = fs::read_dir(&dir)?.map(|entry| Ok(entry?.path()));
    let homes = homes.collect::<Result<Vec<_>>>()?;
    let found = |file: &&str| {
        let objects = homes.iter().map(|home| home.join(name(file)));
        objects.into_iter().find(|object| object.exists())
    };
    let found: Option<Vec<_>> = files.iter().map(found).collect();
    found.with_context(|| format!("{} lacks an object", dir.display()))
}

/// The folder that `fill` filled, now or some time ago, from the same kernel and the same `input`.
fn cached(
    guest: &str,
    name: &str,
    recipe: &Recipe,
    input: &[u8],
    fill: impl FnOnce(&Tree, &Path) -> Result<()>,
) -> Result<PathBuf> {
    let digest = checksum::of_parts(&[recipe.identity.as_bytes(), input, FLAGS.as_bytes(), LAYOUT]);
    let root = paths::cache()?;
    let dir = root
        .join("objects")
        .join(guest)
        .join(format!("{name}-{}", &digest[..12]));
    if dir.exists() {
        return Ok(dir);
    }
    let step = progress::step(format!("compiling {name} for {guest}"));
    let tree = Tree::ready(&recipe.source, &recipe.config, &root, &progress::note)?;
    // Another command may have had the tree until now.
    if !dir.exists() {
        let staging = Staging::beside(&dir)?;
        fill(&tree, staging.dir())?;
        staging.publish()?;
    }
    step.done();
    Ok(dir)
}
