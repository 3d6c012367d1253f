//! The modules of a stock kernel by name: where each lies in its package, and which others it wants loaded first. Read from the
//! modules themselves, because Debian's package has no `modules.dep`: that is made where it is installed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::manifest::Guest;
use crate::packages;

/// The modules of one kernel.
#[derive(Debug)]
pub(crate) struct Modules<'a> {
    guest: &'a Guest,
    tree: PathBuf,
    /// Path below `kernel/`, without its ending, of each name.
    places: BTreeMap<String, String>,
    /// Names of what would be modules and is linked into the kernel (`modules.builtin`).
    linked_in: BTreeSet<String>,
}

/// A module, uncompressed.
#[derive(Clone, Debug)]
pub(crate) struct Module {
    /// Name as `lsmod` shows it.
    pub name: String,
    /// Its file.
    pub bytes: Vec<u8>,
}

impl<'a> Modules<'a> {
    /// Lists those of the guest's image package, unpacked at `tree`.
    pub(crate) fn of(guest: &'a Guest, tree: PathBuf) -> Result<Self> {
        let home = tree.join(format!("lib/modules/{}", guest.release()));
        let root = home.join("kernel");
        let builtin = home.join("modules.builtin");
        let builtin = fs::read_to_string(&builtin)
            .with_context(|| format!("cannot read {}", builtin.display()))?;
        let linked_in = builtin
            .lines()
            .filter_map(|line| named(Path::new(""), Path::new(line)));
        let linked_in = linked_in.map(|(name, _)| name).collect();
        let mut places = BTreeMap::new();
        list(&root, &root, &mut places)?;
        Ok(Self {
            guest,
            tree,
            places,
            linked_in,
        })
    }

    /// These modules and all that they want, each after what it wants. What the kernel has linked in is left out.
    ///
    /// # Errors
    /// A name that is neither of a module nor of what is linked in.
    pub(crate) fn with_dependencies(&self, names: &[String]) -> Result<Vec<Module>> {
        let mut order = Vec::new();
        for name in names {
            let is_known = self.places.contains_key(name) || self.linked_in.contains(name);
            ensure!(is_known, "{} has no module `{name}`", self.guest.release());
            self.add(name, &mut order)?;
        }
        Ok(order)
    }

    fn add(&self, name: &str, order: &mut Vec<Module>) -> Result<()> {
        let Some(place) = self.places.get(name) else {
            return Ok(());
        };
        if order.iter().any(|module| module.name == name) {
            return Ok(());
        }
        let bytes = packages::module(self.guest, &self.tree, place)?;
        // The kernel's build lets no circle through (Linux v6.12 scripts/depmod.sh).
        for wanted in depends(&bytes) {
            self.add(&wanted, order)?;
        }
        order.push(Module {
            name: name.to_owned(),
            bytes,
        });
        Ok(())
    }
}

fn list(root: &Path, dir: &Path, places: &mut BTreeMap<String, String>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            list(root, &path, places)?;
        } else if let Some((name, place)) = named(root, &path) {
            places.insert(name, place);
        }
    }
    Ok(())
}

/// The module's name and its place, if this is one.
fn named(root: &Path, path: &Path) -> Option<(String, String)> {
    let place = path.strip_prefix(root).ok()?.to_str()?;
    let place = place
        .strip_suffix(".xz")
        .unwrap_or(place)
        .strip_suffix(".ko")?;
    let name = place.rsplit('/').next()?.replace('-', "_");
    Some((name, place.to_owned()))
}

/// What stands behind `depends=` in a module's own description (Linux v6.12 scripts/mod/modpost.c, `add_depends`).
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module.get(at + KEY.len()..).unwrap_or_default();
    let value = value.split(|byte| *byte == 0).next().unwrap_or_default();
    let names = value
        .split(|byte| *byte == b',')
        .filter(|name| !name.is_empty());
    names
        .map(|name| String::from_utf8_lossy(name).replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_off_the_module() {
        assert_eq!(
            depends(b"..\0license=GPL\0depends=xor,raid6-pq\0name=btrfs\0"),
            ["xor", "raid6_pq"]
        );
        assert!(depends(b"\0depends=\0name=xor\0").is_empty());
        assert!(depends(b"").is_empty());
    }

    #[test]
    fn a_module_has_the_name_that_the_kernel_gives_it() {
        let root = Path::new("/k");
        let found = named(root, Path::new("/k/net/xt-a.ko.xz"));
        assert_eq!(found, Some(("xt_a".to_owned(), "net/xt-a".to_owned())));
        assert_eq!(named(root, Path::new("/k/modules.order")), None);
    }
}
