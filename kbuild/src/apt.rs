//! Packages of this machine's own archive, by its ordinary client: which there are, and their files fetched. Names no archive;
//! that is the machine's own configuration. Installs nothing; checksums are the client's business.

use std::path::Path;
use std::process::Command;
use std::sync::Once;

use crate::command;
use crate::error::BuildError;

/// A package at a version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// The version, as the package has it.
    pub version: String,
}

/// Fetches one package file of exactly this version into `dir`.
///
/// # Errors
/// [`BuildError`].
pub fn download(package: &Package, dir: &Path) -> Result<(), BuildError> {
    let spec = format!("{}={}", package.name, package.version);
    let fetch = || {
        let mut get = Command::new("apt-get");
        get.args(["download", "-q", &spec]).current_dir(dir);
        command::succeed(&format!("`apt-get download {spec}`"), &mut get).map(drop)
    };
    if fetch().is_ok() {
        return Ok(());
    }
    // Lists may be absent or old on a fresh machine: once anew, then the answer counts.
    update()?;
    fetch()
}

/// Package names that match an extended regular expression.
///
/// # Errors
/// [`BuildError`].
pub fn names(pattern: &str) -> Result<Vec<String>, BuildError> {
    let text = ask(&["search", "--names-only", pattern])?;
    let words = text
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    Ok(words.map(str::to_owned).collect())
}

/// All versions that the archive has of these packages, the newest of each first.
///
/// # Errors
/// [`BuildError`].
pub fn versions(names: &[String]) -> Result<Vec<Package>, BuildError> {
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let mut words = vec!["madison"];
    words.extend(names.iter().map(String::as_str));
    Ok(madison(&ask(&words)?))
}

/// The lines of `apt-cache madison`, without those of sources.
fn madison(text: &str) -> Vec<Package> {
    let lines = text.lines().filter(|line| !line.ends_with(" Sources"));
    let packages = lines.filter_map(|line| {
        let mut columns = line.split('|').map(str::trim);
        Some(Package {
            name: columns.next()?.to_owned(),
            version: columns.next()?.to_owned(),
        })
    });
    let mut packages: Vec<_> = packages.collect();
    // An archive may be listed twice.
    packages.dedup();
    packages
}

fn ask(words: &[&str]) -> Result<String, BuildError> {
    let what = format!("`apt-cache {}`", words.join(" "));
    let output = command::succeed(&what, Command::new("apt-cache").args(words))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Reads the package lists anew, once.
///
/// # Errors
/// [`BuildError`], as for whoever is not root.
pub fn update() -> Result<(), BuildError> {
    static UPDATED: Once = Once::new();
    let mut result = Ok(());
    UPDATED.call_once(|| {
        let mut get = Command::new("apt-get");
        let what = "`apt-get update` (to be run as root, with the network up)";
        result = command::succeed(what, get.args(["update", "-q"])).map(drop);
    });
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_sources_are_not() {
        let text = " linux-source-6.12 | 6.12.117-1~deb12u1 | http://archive.invalid a/main amd64 Packages\n\
            linux-source-6.12 | 6.12.107-1~deb12u1 | http://archive.invalid a/main amd64 Packages\n\
            linux-6.12 | 6.12.107-1 | http://archive.invalid a/main Sources\n";
        let versions: Vec<_> = madison(text).into_iter().map(|it| it.version).collect();
        assert_eq!(versions, ["6.12.117-1~deb12u1", "6.12.107-1~deb12u1"]);
    }
}
