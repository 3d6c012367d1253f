//! The QEMU that emulates machines (the test host, of one CPU, and guests to be dumped, of two): this machine's own where it is
//! new enough, else a newer one that is unpacked into the cache and not installed. Does not know what is booted in it.
//!
//! Kernels rewrite their own code while other CPUs run it. Before 8.1 QEMU read the bytes to be translated before it watched them
//! for writes, so that a CPU could go on for ever with code that another had replaced in between; a kernel then dies of a
//! breakpoint that it does not know any more, or waits for something that has happened (QEMU commit deba78709ae8, "accel/tcg:
//! Always lock pages before translation", in v8.1).

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::manifest::{Emulator as Wanted, Manifest};
use crate::publish::Staging;
use crate::{apt, checksum, packages, paths, progress, run};

/// The program's name, and its place within an unpacked package.
const PROGRAM: &str = "qemu-system-x86_64";
/// Where packages put what a machine's firmware is made of.
const FIRMWARE: [&str; 2] = ["usr/share/qemu", "usr/share/seabios"];

/// A QEMU to start.
#[derive(Debug)]
pub(crate) struct Emulator {
    program: PathBuf,
    firmware: Vec<PathBuf>,
}

impl Emulator {
    /// The best there is. One that is too old is better than none, and is warned of.
    ///
    /// # Errors
    /// The manifest names no version that can be compared with.
    pub(crate) fn find(manifest: &Manifest) -> Result<Self> {
        let wanted = &manifest.emulator;
        let oldest =
            numbers(&wanted.at_least).context("the manifest's emulator wants no version")?;
        let installed = Self::installed();
        if installed.is_at_least(oldest) {
            return Ok(installed);
        }
        let unpacked = unpacked(wanted).map(|root| Self::within(&root));
        match unpacked {
            Ok(newer) if newer.is_at_least(oldest) => Ok(newer),
            other => {
                let why = other.err().map_or_else(
                    || "the newer one does not start here".to_owned(),
                    |error| format!("{error:#}"),
                );
                progress::warn(&format!(
                    "QEMU is older than {} and loses code that a guest rewrites: an emulated kernel may die or hang ({why})",
                    wanted.at_least
                ));
                Ok(installed)
            }
        }
    }

    fn installed() -> Self {
        Self {
            program: PROGRAM.into(),
            firmware: Vec::new(),
        }
    }

    fn within(root: &Path) -> Self {
        Self {
            program: root.join("usr/bin").join(PROGRAM),
            firmware: FIRMWARE.iter().map(|dir| root.join(dir)).collect(),
        }
    }

    fn is_at_least(&self, oldest: (u32, u32)) -> bool {
        let text = run::stdout(Command::new(&self.program).arg("--version")).unwrap_or_default();
        version(&text).is_some_and(|found| found >= oldest)
    }

    /// QEMU with no device and no window, which ends when this program does, Ctrl-C and SIGKILL included.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(&self.program);
        for dir in &self.firmware {
            command.arg("-L").arg(dir);
        }
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .arg("-no-reboot")
            .args(["-accel", "tcg,thread=multi"])
            .stdin(Stdio::null());
        command
    }
}

/// All packages in one folder of the cache.
fn unpacked(wanted: &Wanted) -> Result<PathBuf> {
    let mut pins = vec![wanted.version.as_bytes()];
    pins.extend(wanted.packages.iter().map(|p| p.sha256.as_bytes()));
    let name = format!("qemu-{}", &checksum::of_parts(&pins)[..16]);
    let target = paths::cache()?.join("tree").join(name);
    if target.exists() {
        return Ok(target);
    }
    let step = progress::step(format!(
        "fetching QEMU {} (the one installed is older than {})",
        wanted.version, wanted.at_least
    ));
    let archive = apt::Backports::of_this_machine(&paths::cache()?.join("backports"))?;
    let staging = Staging::beside(&target)?;
    for package in &wanted.packages {
        let fetched = Staging::beside(&staging.dir().join("package"))?;
        let deb = archive.download(&package.name, &wanted.version_of(package), fetched.dir())?;
        checksum::demand(&deb, &package.sha256)?;
        packages::unpack(&deb, staging.dir())?;
    }
    staging.publish()?;
    step.done();
    Ok(target)
}

/// Major and minor number in what `--version` prints.
fn version(text: &str) -> Option<(u32, u32)> {
    numbers(text.split_once("version ")?.1)
}

fn numbers(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_from_what_qemu_prints() {
        let old = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright";
        let new = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)\n";
        assert_eq!(version(old), Some((7, 2)));
        assert_eq!(version(new), Some((10, 0)));
        assert!(version(old) < numbers("8.1") && numbers("8.1") < version(new));
        assert_eq!(version("no emulator at all"), None);
        assert_eq!(numbers("9"), None, "half a version is none");
    }
}
