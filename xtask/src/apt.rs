//! This machine's package manager: tools installed, guest packages fetched. Names no archive; that is the machine's own
//! configuration. Does not know what the packages are for.

use std::path::Path;
use std::process::Command;
use std::sync::Once;

use anyhow::{Context, Result, bail};

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

/// Fetches one package file of exactly this version into `dir`.
pub(crate) fn download(package: &str, version: &str, dir: &Path) -> Result<()> {
    let spec = format!("{package}={version}");
    let fetch = || {
        run::quiet(
            Command::new("apt-get")
                .args(["download", "-q", &spec])
                .current_dir(dir),
        )
    };
    if fetch().is_ok() {
        return Ok(());
    }
    // Lists may be absent or old on a fresh machine: once anew, then the answer counts.
    update()?;
    fetch()
        .map(drop)
        .with_context(|| format!("cannot fetch {spec} from this machine's package archive"))
}

/// Package names that match an extended regular expression.
pub(crate) fn names(pattern: &str) -> Result<Vec<String>> {
    let text = run::stdout(Command::new("apt-cache").args(["search", "--names-only", pattern]))?;
    Ok(text
        .lines()
        .filter_map(|l| l.split_whitespace().next())
        .map(str::to_owned)
        .collect())
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

fn update() -> Result<()> {
    static UPDATED: Once = Once::new();
    let mut result = Ok(());
    UPDATED.call_once(|| {
        result = run::quiet(Command::new("apt-get").args(["update", "-q"])).map(drop);
    });
    result.context("cannot read the package lists (run as root, with the network up)")
}
