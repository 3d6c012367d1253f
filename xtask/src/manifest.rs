//! `guest-images/manifest.toml` as data. Does not fetch or build anything.

use std::fs;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::paths;

/// The whole manifest.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Manifest {
    /// Packages that this machine must have.
    #[serde(rename = "tool")]
    pub tools: Vec<Tool>,
    /// Distribution kernels.
    #[serde(rename = "guest")]
    pub guests: Vec<Guest>,
    /// Kernels built here.
    #[serde(rename = "lean")]
    pub leans: Vec<Lean>,
    /// What emulates machines.
    pub emulator: Emulator,
    /// The stand-in for hardware virtualisation.
    pub test_host: TestHost,
}

/// A QEMU new enough, and where a newer one is had on a system whose own is not.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Emulator {
    /// The oldest that will do: "8.1".
    pub at_least: String,
    /// Version of its packages in the backports of this system's distribution.
    pub version: String,
    /// Its packages.
    #[serde(rename = "package")]
    pub packages: Vec<EmulatorPackage>,
}

/// One package of the emulator.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct EmulatorPackage {
    /// Its name.
    pub name: String,
    /// Its version, where that is not the emulator's.
    pub version: Option<String>,
    /// Digest of the package file.
    pub sha256: String,
}

impl Emulator {
    /// The version of one of its packages.
    pub(crate) fn version_of(&self, package: &EmulatorPackage) -> String {
        package.version.as_ref().unwrap_or(&self.version).clone()
    }
}

/// One package of this machine, with what shows that it is installed.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Tool {
    /// Name for the package manager.
    pub package: String,
    /// A program on the path.
    pub program: Option<String>,
    /// Or a file.
    pub file: Option<String>,
    /// Or the same file elsewhere.
    pub or: Option<String>,
    /// Comes with one of the others on some systems: to be looked for once they are installed.
    #[serde(default)]
    pub late: bool,
}

/// A distribution kernel and the packages around it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Guest {
    /// Name in our commands and folders.
    pub name: String,
    /// What `{abi}` stands for in package names.
    pub abi: String,
    /// Version of every package.
    pub version: String,
    /// Which image packages may stand in when the pinned version is gone; the first group is the ABI.
    pub substitute: String,
    /// The kernel itself.
    pub image: Package,
    /// Headers of this flavour.
    pub headers: Package,
    /// Headers of all flavours.
    pub common: Package,
    /// Build programs (modpost, objtool).
    pub kbuild: Package,
    /// The source it was built from.
    pub source: Package,
}

/// One package of a guest.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Package {
    /// Name, with `{abi}`.
    pub package: String,
    /// Digest of the package file; absent for a substitute.
    pub sha256: Option<String>,
}

/// A kernel built here from a guest's source.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Lean {
    /// Name in our commands and folders.
    pub name: String,
    /// The guest whose source it is built from.
    pub source: String,
    /// File of configuration lines in `guest-images/`.
    pub fragment: String,
    /// How the planted kthreads come into it.
    pub planted: Planted,
}

/// How a guest has the planted kthreads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Planted {
    /// Its init loads a module.
    Module,
    /// They are part of the kernel.
    LinkedIn,
}

/// What the test host runs.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TestHost {
    /// The guest whose kernel it is.
    pub guest: String,
    /// Modules to load, in order, as paths below `kernel/` without suffix.
    pub modules: Vec<String>,
}

impl Manifest {
    /// Reads the manifest of this clone.
    pub(crate) fn load() -> Result<Self> {
        let path = paths::guest_images().join("manifest.toml");
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        toml::from_str(&text).with_context(|| format!("cannot understand {}", path.display()))
    }

    /// The distribution kernel of that name.
    pub(crate) fn guest(&self, name: &str) -> Result<&Guest> {
        self.guests
            .iter()
            .find(|g| g.name == name)
            .with_context(|| format!("the manifest has no guest {name}"))
    }
}

impl Guest {
    /// Kernel release as `uname -r` prints it.
    pub(crate) fn release(&self) -> String {
        format!("{}-cloud-amd64", self.abi)
    }

    /// Full name of one of its packages.
    pub(crate) fn package_name(&self, package: &Package) -> String {
        package.package.replace("{abi}", &self.abi)
    }

    /// The same guest at another version: no digest holds any more.
    pub(crate) fn substituted(&self, abi: &str, version: &str) -> Self {
        let mut other = self.clone();
        abi.clone_into(&mut other.abi);
        version.clone_into(&mut other.version);
        for package in [
            &mut other.image,
            &mut other.headers,
            &mut other.common,
            &mut other.kbuild,
            &mut other.source,
        ] {
            package.sha256 = None;
        }
        other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifest_of_this_clone_is_understood() {
        let manifest = Manifest::load().unwrap();
        let host = manifest.guest(&manifest.test_host.guest).unwrap();
        assert_eq!(
            host.package_name(&host.image),
            format!("linux-image-{}", host.release())
        );
        for lean in &manifest.leans {
            manifest.guest(&lean.source).unwrap();
        }
    }

    #[test]
    fn every_pinned_package_has_a_whole_digest() {
        for guest in Manifest::load().unwrap().guests {
            for package in [
                &guest.image,
                &guest.headers,
                &guest.common,
                &guest.kbuild,
                &guest.source,
            ] {
                let digest = package.sha256.as_deref().unwrap();
                assert!(
                    digest.len() == 64 && digest.bytes().all(|b| b.is_ascii_hexdigit()),
                    "{}",
                    package.package
                );
            }
        }
    }
}
