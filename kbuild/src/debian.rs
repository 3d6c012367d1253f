//! Debian's kernels: source and configuration of a version, fetched by apt into the cache. Installs nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt::{self, Package};
use crate::command;
use crate::error::{At, BuildError};
use crate::lock::Lock;
use crate::publish::Staging;

/// What a kernel for this processor is called by.
const ARCHITECTURE: &str = "amd64";

/// The flavour if none is named.
pub const FLAVOUR: &str = "amd64";

/// What one of Debian's kernels was made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Debian {
    /// Its unpacked source.
    pub source: PathBuf,
    /// Its configuration.
    pub config: String,
    /// `uname -r`.
    pub release: String,
    /// The version of its packages.
    pub version: String,
}

/// Why source and configuration are not to be had.
#[derive(Debug, thiserror::Error)]
pub enum DebianError {
    /// Neither a version nor a release.
    #[error(
        "{0:?} is no kernel of Debian: a version such as 6.12.107-1~deb12u1 or a release (`uname -r`) such as \
         6.12.107+deb12-cloud-amd64"
    )]
    Name(String),
    /// A release has its flavour in it.
    #[error("{release} is not of the flavour {flavour}")]
    Flavour {
        /// The release.
        release: String,
        /// The flavour asked for.
        flavour: String,
    },
    /// No apt.
    #[error("there is no apt here to fetch Debian's packages with: give --source and --config")]
    NoApt,
    /// The archive has other versions, or none.
    #[error("the archive that apt reads here has no {wanted}{}", others(has))]
    Gone {
        /// Package and version.
        wanted: String,
        /// What it has of the kind.
        has: Vec<String>,
    },
    /// A package has not in it what it should have.
    #[error("{package} has no {file}")]
    Lacks {
        /// The package.
        package: String,
        /// The file.
        file: String,
    },
    /// Fetching or unpacking failed.
    #[error("{0}")]
    Failed(BuildError),
}

impl From<BuildError> for DebianError {
    fn from(error: BuildError) -> Self {
        match &error {
            BuildError::NotStarted { program, why }
                if program.starts_with("apt") && why.kind() == std::io::ErrorKind::NotFound =>
            {
                Self::NoApt
            }
            _ => Self::Failed(error),
        }
    }
}

fn others(has: &[String]) -> String {
    match has {
        [] => String::new(),
        has => format!("; it has {}", has.join(", ")),
    }
}

/// Which kernel is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Asked {
    Version { version: String, flavour: String },
    Release(String),
}

impl Asked {
    fn read(text: &str, flavour: Option<&str>) -> Result<Self, DebianError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || ".+~:-".contains(c);
        let begins = text.starts_with(|c: char| c.is_ascii_digit());
        if !begins || !text.contains('-') || !text.chars().all(plain) {
            return Err(DebianError::Name(text.to_owned()));
        }
        let of_release = text.ends_with(&format!("-{ARCHITECTURE}"));
        match (of_release, flavour) {
            (true, Some(flavour)) if abi(text, flavour).is_none() => Err(DebianError::Flavour {
                release: text.to_owned(),
                flavour: flavour.to_owned(),
            }),
            (true, _) => Ok(Self::Release(text.to_owned())),
            (false, flavour) => Ok(Self::Version {
                version: text.to_owned(),
                flavour: flavour.unwrap_or(FLAVOUR).to_owned(),
            }),
        }
    }

    /// The package with the configuration: that for building modules, which is the smallest.
    fn headers(&self, trees: &Path) -> Result<Package, DebianError> {
        let kept = kept(trees)?.into_iter();
        let mut kept = kept.filter(|package| self.is_met_by(package));
        if let Some(package) = kept.next() {
            return Ok(package);
        }
        match self.in_archive()? {
            Some(package) => Ok(package),
            None => {
                // For whoever may not read them anew, what was read before counts.
                let _ = apt::update();
                self.in_archive()?.ok_or_else(|| self.gone())
            }
        }
    }

    fn in_archive(&self) -> Result<Option<Package>, DebianError> {
        let names = match self {
            Self::Release(release) => vec![format!("linux-headers-{release}")],
            Self::Version { version, flavour } => {
                let series = series(version).replace('.', "[.]");
                apt::names(&format!("^linux-headers-{series}[.].*-{flavour}$"))?
            }
        };
        let mut there = apt::versions(&names)?.into_iter();
        Ok(there.find(|package| self.is_met_by(package)))
    }

    fn is_met_by(&self, package: &Package) -> bool {
        let Some(of) = package.name.strip_prefix("linux-headers-") else {
            return false;
        };
        match self {
            Self::Release(release) => of == release,
            Self::Version { version, flavour } => {
                package.version == *version && abi(of, flavour).is_some()
            }
        }
    }

    /// What to say if there is none: the versions that there are of the source, or the kernels of that version.
    fn gone(&self) -> DebianError {
        let (wanted, names) = match self {
            Self::Release(release) => {
                let series = series(release).replace('.', "[.]");
                let names = apt::names(&format!("^linux-headers-{series}[.].*-{ARCHITECTURE}$"));
                (format!("linux-headers-{release}"), names)
            }
            Self::Version { version, flavour } => {
                let names = Ok(vec![source_package(version)]);
                (format!("kernel {version} of the flavour {flavour}"), names)
            }
        };
        let has = names
            .and_then(|names| apt::versions(&names))
            .unwrap_or_default();
        let has = has.into_iter().map(|package| match self {
            Self::Release(_) => package.name.replace("linux-headers-", ""),
            Self::Version { .. } => package.version,
        });
        DebianError::Gone {
            wanted,
            has: has.collect(),
        }
    }
}

/// Source and configuration of a kernel, named by the version of its packages or by its release; from the cache, or fetched
/// into it. `step` is told what takes long.
///
/// # Errors
/// [`DebianError`].
pub fn fetch(
    name: &str,
    flavour: Option<&str>,
    cache: &Path,
    step: &dyn Fn(&str),
) -> Result<Debian, DebianError> {
    let asked = Asked::read(name, flavour)?;
    let trees = cache.join("tree");
    fs::create_dir_all(&trees).at(&trees)?;
    let headers = asked.headers(&trees)?;
    let release = headers.name.replace("linux-headers-", "");
    let config = unpacked(&headers, &trees, step)?
        .join("usr/src")
        .join(&headers.name)
        .join(".config");
    if !config.is_file() {
        return Err(DebianError::Lacks {
            package: headers.name,
            file: config.display().to_string(),
        });
    }
    let source = Package {
        name: source_package(&headers.version),
        version: headers.version,
    };
    Ok(Debian {
        source: unpacked_source(&source, &trees, step)?,
        config: String::from_utf8_lossy(&fs::read(&config).at(&config)?).into_owned(),
        release,
        version: source.version,
    })
}

/// What a release of this flavour begins with: `6.1.0-56` of `6.1.0-56-cloud-amd64`. Not of another flavour that ends alike.
fn abi<'a>(release: &'a str, flavour: &str) -> Option<&'a str> {
    let abi = release.strip_suffix(flavour)?.strip_suffix('-')?;
    let other = |part: &str| part.starts_with(|c: char| c.is_ascii_alphabetic());
    (!abi.is_empty() && !abi.split('-').any(other)).then_some(abi)
}

/// The first two numbers of a version.
fn series(version: &str) -> String {
    let digits = |c: char| !c.is_ascii_digit();
    let mut numbers = version.split(digits);
    let (first, second) = (numbers.next().unwrap_or_default(), numbers.next());
    format!("{first}.{}", second.unwrap_or_default())
}

fn source_package(version: &str) -> String {
    format!("linux-source-{}", series(version))
}

/// Packages unpacked in the cache.
fn kept(trees: &Path) -> Result<Vec<Package>, BuildError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(trees).at(trees)? {
        let name = entry.at(trees)?.file_name().to_string_lossy().into_owned();
        // What begins with a dot is a lock, or not finished.
        let package = name.split_once('_').filter(|_| !name.starts_with('.'));
        if let Some((name, version)) = package {
            let (name, version) = (name.to_owned(), version.to_owned());
            found.push(Package { name, version });
        }
    }
    found.sort_by(|a, b| b.version.cmp(&a.version));
    Ok(found)
}

/// A package unpacked into a folder of its own.
fn unpacked(package: &Package, trees: &Path, step: &dyn Fn(&str)) -> Result<PathBuf, DebianError> {
    let target = trees.join(format!("{}_{}", package.name, package.version));
    in_place(package, &target, step, |deb, into| {
        let mut unpack = Command::new("dpkg-deb");
        unpack.arg("-x").arg(deb).arg(into);
        command::succeed("`dpkg-deb -x`", &mut unpack).map(drop)
    })?;
    Ok(target)
}

fn unpacked_source(
    package: &Package,
    trees: &Path,
    step: &dyn Fn(&str),
) -> Result<PathBuf, DebianError> {
    let target = trees.join(format!("{}-tree_{}", package.name, package.version));
    in_place(package, &target, step, |deb, into| {
        unpack_source(&package.name, deb, into)
    })?;
    Ok(target)
}

/// Fetches a package and has it unpacked, unless that was done before.
fn in_place(
    package: &Package,
    target: &Path,
    step: &dyn Fn(&str),
    unpack: impl FnOnce(&Path, &Path) -> Result<(), BuildError>,
) -> Result<(), DebianError> {
    if target.exists() {
        return Ok(());
    }
    let Package { name, version } = package;
    // Not a name that a package has.
    let lock = target.with_file_name(format!(".{name}_{version}.lock"));
    let _lock = Lock::take(&lock, &|| {
        step(&format!(
            "waiting until another build has fetched {name} {version}"
        ));
    })?;
    // It may have been done meanwhile, and somebody may work in it.
    if target.exists() {
        return Ok(());
    }
    step(&format!("fetching {name} {version}"));
    let fetched = Staging::beside(&target.with_added_extension("deb"))?;
    if let Err(error) = apt::download(package, fetched.dir()) {
        let there = apt::versions(std::slice::from_ref(name))?;
        if there.contains(package) {
            return Err(error.into());
        }
        return Err(DebianError::Gone {
            wanted: format!("{name} {version}"),
            has: there.into_iter().map(|package| package.version).collect(),
        });
    }
    let mut files = fs::read_dir(fetched.dir()).at(fetched.dir())?;
    let deb = files.next().ok_or_else(|| DebianError::Lacks {
        package: name.clone(),
        file: "package file".to_owned(),
    })?;
    let deb = deb.at(fetched.dir())?.path();
    step(&format!("unpacking {name} {version}"));
    let staging = Staging::beside(target)?;
    unpack(&deb, staging.dir())?;
    Ok(staging.publish()?)
}

/// Unpacks the kernel's source that a package `linux-source-…` holds into a folder.
///
/// # Errors
/// [`BuildError`].
pub fn unpack_source(name: &str, deb: &Path, into: &Path) -> Result<(), BuildError> {
    // Straight from the package into tar: the archive inside is 150 MB that nobody needs again.
    let packed = format!("./usr/src/{name}.tar.xz");
    let script = r#"set -e; dpkg-deb --fsys-tarfile "$1" | tar -xO "$2" | tar -xJ --strip-components=1 -C "$3""#;
    let mut unpack = Command::new("sh");
    unpack.args(["-c", script, "sh"]).arg(deb).arg(packed);
    command::succeed(&format!("unpacking {name}"), unpack.arg(into)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(release: &str, version: &str) -> Package {
        Package {
            name: format!("linux-headers-{release}"),
            version: version.to_owned(),
        }
    }

    #[test]
    fn a_version_is_met_by_its_own_flavour_alone() {
        let asked = Asked::read("6.12.107-1~deb12u1", None).unwrap();
        let met = |release| asked.is_met_by(&headers(release, "6.12.107-1~deb12u1"));
        assert!(met("6.12.107+deb12-amd64"));
        assert!(!met("6.12.107+deb12-cloud-amd64") && !met("6.12.107+deb12-rt-amd64"));
        assert!(!asked.is_met_by(&headers("6.12.107+deb12-amd64", "6.12.111-1~deb12u1")));
        let cloud = Asked::read("6.1.192-2", Some("cloud-amd64")).unwrap();
        assert!(cloud.is_met_by(&headers("6.1.0-56-cloud-amd64", "6.1.192-2")));
        assert!(!cloud.is_met_by(&headers("6.1.0-56-amd64", "6.1.192-2")));
    }

    #[test]
    fn a_release_has_its_flavour_in_it() {
        let release = "6.1.0-56-cloud-amd64";
        for flavour in [None, Some("cloud-amd64")] {
            let asked = Asked::read(release, flavour).unwrap();
            assert!(asked.is_met_by(&headers(release, "6.1.192-2")));
        }
        let refused = Asked::read(release, Some("amd64")).unwrap_err();
        assert!(matches!(refused, DebianError::Flavour { .. }));
    }

    #[test]
    fn what_is_no_version_is_told() {
        for bad in [
            "",
            "6.12",
            "-o=x-1",
            "6.12.1-1/../x",
            "bookworm-amd64",
            "6.12 -1",
        ] {
            let refused = Asked::read(bad, None).unwrap_err();
            assert!(matches!(refused, DebianError::Name(_)), "{bad}");
        }
    }

    #[test]
    fn the_source_is_that_of_the_series() {
        assert_eq!(source_package("6.12.107-1~deb12u1"), "linux-source-6.12");
        assert_eq!(source_package("6.1.192-2"), "linux-source-6.1");
    }

    #[test]
    fn what_the_cache_has_is_not_asked_for() {
        let cache = tempfile::tempdir().unwrap();
        let release = "6.99.1-cloud-amd64";
        let headers =
            format!("tree/linux-headers-{release}_6.99.1-1/usr/src/linux-headers-{release}");
        let headers = cache.path().join(headers);
        fs::create_dir_all(&headers).unwrap();
        fs::write(headers.join(".config"), "CONFIG_A=y\n").unwrap();
        let source = cache.path().join("tree/linux-source-6.99-tree_6.99.1-1");
        fs::create_dir_all(&source).unwrap();
        for (name, flavour) in [(release, None), ("6.99.1-1", Some("cloud-amd64"))] {
            let had = fetch(name, flavour, cache.path(), &|_| {}).unwrap();
            assert_eq!((had.source, &*had.config), (source.clone(), "CONFIG_A=y\n"));
            assert_eq!((&*had.release, &*had.version), (release, "6.99.1-1"));
        }
    }

    #[test]
    fn what_another_has_fetched_meanwhile_is_left_alone() {
        let cache = tempfile::tempdir().unwrap();
        let target = cache.path().join("linux-source-6.99-tree_6.99.1-1");
        let package = Package {
            name: "linux-source-6.99".to_owned(),
            version: "6.99.1-1".to_owned(),
        };
        let lock = cache.path().join(".linux-source-6.99_6.99.1-1.lock");
        let other = Lock::take(&lock, &|| panic!("nobody has it")).unwrap();
        std::thread::scope(|scope| {
            let (waits, waiting) = std::sync::mpsc::channel();
            let (package, target) = (&package, &target);
            let second = scope.spawn(move || {
                let step = |_: &str| waits.send(()).unwrap();
                in_place(package, target, &step, |_, _| panic!("it is there"))
            });
            waiting.recv().unwrap();
            fs::create_dir(target).unwrap();
            drop(other);
            second.join().unwrap().unwrap();
        });
        assert_eq!(
            kept(cache.path()).unwrap().len(),
            1,
            "the lock is no package"
        );
    }

    #[test]
    fn versions_that_there_are_are_named() {
        let gone = DebianError::Gone {
            wanted: "linux-source-6.12 6.12.1-1".to_owned(),
            has: vec!["6.12.2-1".to_owned(), "6.12.3-1".to_owned()],
        };
        assert!(
            gone.to_string().ends_with("it has 6.12.2-1, 6.12.3-1"),
            "{gone}"
        );
    }
}
