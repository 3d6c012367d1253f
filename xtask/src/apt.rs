//! This machine's package manager: tools installed, what its backports have. Names no archive; that is the machine's own
//! configuration. Does not know what the packages are for.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use vmpatch_kbuild::apt::update;

use crate::manifest::Tool;
use crate::{progress, run};

/// Installs what is missing of `tools`.
pub(crate) fn ensure_tools(tools: &[Tool]) -> Result<()> {
    for late in [false, true] {
        let missing: Vec<&str> = tools
            .iter()
            .filter(|t| t.late == late && !is_there(t))
            .map(|t| t.package.as_str())
            .collect();
        if !missing.is_empty() {
            install(&missing)?;
        }
    }
    Ok(())
}

fn install(missing: &[&str]) -> Result<()> {
    if !run::on_path("apt-get") {
        bail!(
            "missing packages and no apt-get to install them with: {}",
            missing.join(" ")
        );
    }
    let step = progress::step(format!("installing {}", missing.join(" ")));
    update()?;
    run::quiet(
        Command::new("apt-get")
            .args(["install", "-y", "-q", "--no-install-recommends"])
            .args(missing)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )
    .with_context(|| {
        format!(
            "cannot install {} (run as root, with the network up)",
            missing.join(" ")
        )
    })?;
    step.done();
    Ok(())
}

fn is_there(tool: &Tool) -> bool {
    let program = tool.program.as_deref().is_some_and(run::on_path);
    program
        || [&tool.file, &tool.or]
            .into_iter()
            .flatten()
            .any(|f| Path::new(f).exists())
}

/// The backports of this machine's distribution, read beside the machine's own configuration, which stays as it is.
#[derive(Debug)]
pub(crate) struct Backports {
    options: Vec<String>,
}

impl Backports {
    /// Reads their package lists into `dir`.
    pub(crate) fn of_this_machine(dir: &Path) -> Result<Self> {
        for sub in ["lists/partial", "archives/partial"] {
            let path = dir.join(sub);
            fs::create_dir_all(&path)
                .with_context(|| format!("cannot create {}", path.display()))?;
        }
        let sources = dir.join("sources.list");
        fs::write(
            &sources,
            source_line(&indexes()?, Path::new(KEYRING).exists())?,
        )
        .with_context(|| format!("cannot write {}", sources.display()))?;
        let option = |name: &str, at: &str| {
            [
                "-o".to_owned(),
                format!("{name}={}", dir.join(at).display()),
            ]
        };
        let options = [
            option("Dir::Etc::sourcelist", "sources.list"),
            option("Dir::Etc::sourceparts", "none"),
            option("Dir::State::lists", "lists"),
            option("Dir::Cache", ""),
        ];
        let archive = Self {
            options: options.concat(),
        };
        run::quiet(archive.apt_get().args(["update", "-q"]))
            .context("cannot read the list of backports")?;
        Ok(archive)
    }

    fn apt_get(&self) -> Command {
        let mut command = Command::new("apt-get");
        command.args(&self.options);
        command
    }

    /// Fetches one package file of exactly this version into `dir`, which is empty.
    pub(crate) fn download(&self, package: &str, version: &str, dir: &Path) -> Result<PathBuf> {
        let spec = format!("{package}={version}");
        run::quiet(
            self.apt_get()
                .args(["download", "-q", &spec])
                .current_dir(dir),
        )
        .with_context(|| format!("cannot fetch {spec} from the backports"))?;
        let mut files =
            fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
        let file = files
            .next()
            .with_context(|| format!("{spec} was fetched but is not there"))?;
        Ok(file?.path())
    }
}

/// The signing keys that Debian installs.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What this machine's package manager reads: release, code name and address of each index.
fn indexes() -> Result<String> {
    let format = "$(ORIGIN) $(RELEASE) $(CODENAME) $(REPO_URI)";
    run::stdout(Command::new("apt-get").args([
        "indextargets",
        "--format",
        format,
        "Created-By: Packages",
    ]))
}

/// The source of the backports: beside the main suite of the distribution, which is the one named like the code name.
fn source_line(indexes: &str, keyring: bool) -> Result<String> {
    let address = |line: &str| {
        let [origin, release, code, address] =
            line.split(' ').collect::<Vec<_>>().try_into().ok()?;
        let main = !code.contains('-')
            && (release == code || release == "stable" || release == "oldstable");
        (origin == "Debian" && main).then(|| (code.to_owned(), address.to_owned()))
    };
    let (code, address) = indexes
        .lines()
        .find_map(address)
        .context("this machine's package manager reads no main suite of Debian")?;
    let signed = match keyring {
        true => format!("[signed-by={KEYRING}] "),
        false => String::new(),
    };
    Ok(format!("deb {signed}{address} {code}-backports main\n"))
}

/// The newest version of a package that the archive has.
pub(crate) fn newest_version(package: &str) -> Result<String> {
    let text = run::stdout(Command::new("apt-cache").args(["show", "--no-all-versions", package]))?;
    let version = text.lines().find_map(|l| l.strip_prefix("Version: "));
    version
        .map(str::to_owned)
        .with_context(|| format!("the archive shows no version of {package}"))
}

/// Whether version `a` is newer than `b`, by dpkg's rules.
pub(crate) fn is_newer(a: &str, b: &str) -> bool {
    Command::new("dpkg")
        .args(["--compare-versions", a, "gt", b])
        .status()
        .is_ok_and(|s| s.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backports_lie_beside_the_main_suite() {
        let indexes = "Vendor vendor-bookworm vendor-bookworm http://vendor.invalid/apt/\n\
            Debian bookworm-updates bookworm-updates http://archive.invalid/updates/\n\
            Debian bookworm bookworm http://archive.invalid/debian/\n";
        assert_eq!(
            source_line(indexes, false).unwrap(),
            "deb http://archive.invalid/debian/ bookworm-backports main\n"
        );
        assert!(source_line("Vendor a a http://vendor.invalid/\n", true).is_err());
    }
}
