//! Dumps of stopped stock guests with the guests' own answers beside them: what introspection is compared with where no guest can
//! run under our own VMM. Made in plain QEMU, which emulates any guest anywhere. The layout of a dump folder is `introspect`'s.

mod monitor;
mod ramdisk;
mod registers;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::emulator::Emulator;
use crate::manifest::Manifest;
use crate::publish::Staging;
use crate::run::Reaped;
use crate::{checksum, images, packages, paths, progress};

/// A dump to make.
#[derive(Debug)]
struct Wanted {
    name: &'static str,
    guest: &'static str,
    /// What runs when it is taken, and what else stands on the kernel's command line.
    cmdline: &'static str,
}

/// Both kernels as they boot here, and both with page-table isolation and busy processors.
const WANTED: [Wanted; 4] = [
    Wanted {
        name: "debian-6.12",
        guest: "debian-6.12",
        cmdline: "vmpatch.load=one",
    },
    Wanted {
        name: "debian-6.1",
        guest: "debian-6.1",
        cmdline: "vmpatch.load=one",
    },
    Wanted {
        name: "debian-6.12-user",
        guest: "debian-6.12",
        cmdline: "vmpatch.load=user pti=on",
    },
    Wanted {
        name: "debian-6.1-kernel",
        guest: "debian-6.1",
        cmdline: "vmpatch.load=kernel pti=on",
    },
];
/// RAM of a dumped guest.
const MEMORY: &str = "256M";
/// A boot takes ten seconds; this machine may be busy.
const LIMIT: Duration = Duration::from_secs(400);

/// Makes all dumps unless the cache has them; returns their folder.
pub(crate) fn make(manifest: &Manifest) -> Result<PathBuf> {
    let root = paths::cache()?.join("dumps");
    for wanted in &WANTED {
        one(manifest, wanted, &root).with_context(|| format!("cannot dump {}", wanted.name))?;
    }
    Ok(root)
}

/// Makes one dump unless the cache has it; returns its folder.
pub(crate) fn make_one(manifest: &Manifest, name: &str) -> Result<PathBuf> {
    let wanted = WANTED
        .iter()
        .find(|w| w.name == name)
        .with_context(|| format!("no dump is called {name}"))?;
    let root = paths::cache()?.join("dumps");
    one(manifest, wanted, &root)?;
    Ok(root.join(name))
}

fn one(manifest: &Manifest, wanted: &Wanted, root: &Path) -> Result<()> {
    let guest = packages::settle(manifest.guest(wanted.guest)?)?;
    let target = root.join(wanted.name);
    let init = ramdisk::init()?;
    let stamp = checksum::of_parts(&[guest.version.as_bytes(), wanted.cmdline.as_bytes(), &init]);
    if fs::read_to_string(target.join("stamp")).is_ok_and(|s| s == stamp) {
        return Ok(());
    }
    let image = images::make(manifest, wanted.guest)?;
    let step = progress::step(format!("dumping a stopped {}", wanted.name));
    let staging = Staging::beside(&target)?;
    let tree = packages::unpacked(&guest, &guest.image)?;
    fs::write(
        staging.dir().join("initrd"),
        ramdisk::archive(&guest, &tree, &init)?,
    )?;
    take(
        &Emulator::find(manifest)?,
        staging.dir(),
        &image.dir.join("vmlinuz"),
        wanted.cmdline,
    )?;
    split_answers(staging.dir())?;
    fs::remove_file(staging.dir().join("initrd"))?;
    fs::write(staging.dir().join("stamp"), stamp)?;
    staging.publish()?;
    step.done();
    Ok(())
}

/// Boots, waits for the guest's last answer, stops it and keeps its memory and registers.
fn take(emulator: &Emulator, dir: &Path, kernel: &Path, cmdline: &str) -> Result<()> {
    let mut qemu = Reaped(start(emulator, dir, kernel, cmdline)?);
    wait_for_end(&mut qemu, &dir.join("answers"))?;
    // The guest's shell is on its way to sleep.
    thread::sleep(Duration::from_millis(150));
    let mut monitor = monitor::Monitor::connect(&dir.join("qmp"))?;
    monitor.call("stop", serde_json::Value::Null)?;
    let text = monitor.human("info registers -a")?;
    fs::write(dir.join("registers.txt"), &text)?;
    fs::write(
        dir.join("vcpus.json"),
        serde_json::to_vec_pretty(&registers::parse(&text)?)?,
    )?;
    crate::run::quiet(
        Command::new("cp")
            .arg("--sparse=always")
            .arg(dir.join("ram.live"))
            .arg(dir.join("ram.bin")),
    )?;
    drop(qemu);
    for name in ["ram.live", "qmp"] {
        fs::remove_file(dir.join(name)).with_context(|| format!("no {name} to remove"))?;
    }
    Ok(())
}

fn start(emulator: &Emulator, dir: &Path, kernel: &Path, cmdline: &str) -> Result<Child> {
    emulator
        .command()
        .args(["-cpu", "max", "-smp", "2", "-m", MEMORY])
        .args([
            "-object",
            &format!("memory-backend-file,id=ram,size={MEMORY},mem-path=ram.live,share=on"),
        ])
        .args([
            "-machine",
            "pc,memory-backend=ram",
            "-serial",
            "file:console.log",
            "-serial",
            "file:answers",
        ])
        .args([
            "-qmp",
            "unix:qmp,server=on,wait=off",
            "-initrd",
            "initrd",
            "-kernel",
        ])
        .arg(kernel)
        .args(["-append", &format!("console=ttyS0 panic=-1 {cmdline}")])
        .current_dir(dir)
        .stdout(Stdio::null())
        .spawn()
        .context("cannot start QEMU")
}

fn wait_for_end(qemu: &mut Reaped, answers: &Path) -> Result<()> {
    let until = Instant::now() + LIMIT;
    while Instant::now() < until {
        if qemu.0.try_wait()?.is_some() {
            bail!("the guest ended before it had answered");
        }
        // Seven megabytes at most; only their end matters, and it comes once.
        if fs::read(answers)
            .is_ok_and(|bytes| bytes.ends_with(b"=====END\n") || bytes.ends_with(b"=====END\r\n"))
        {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(100));
    }
    bail!("the guest did not answer within {} s", LIMIT.as_secs())
}

/// One file for each "=====NAME" in what the guest said.
fn split_answers(dir: &Path) -> Result<()> {
    let all = fs::read(dir.join("answers"))?;
    let mut at: Option<(PathBuf, Vec<u8>)> = None;
    for line in all.split_inclusive(|b| *b == b'\n') {
        let name = line
            .strip_prefix(b"=====")
            .map(|n| String::from_utf8_lossy(n).trim().to_owned());
        match (name, &mut at) {
            (Some(name), _) => {
                if let Some((path, content)) = at.take() {
                    fs::write(path, content)?;
                }
                // A name comes from our own init, but through a guest: never a way out of the folder.
                let plain = name
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "._".contains(c))
                    && !name.starts_with('.');
                at = (plain && name != "END").then(|| (dir.join(name), Vec::new()));
            }
            (None, Some((_, content))) => content.extend_from_slice(line),
            (None, None) => {}
        }
    }
    fs::remove_file(dir.join("answers"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_split_by_name_and_stay_in_their_folder() {
        let dir = tempfile::tempdir().unwrap();
        let said = "=====a.txt\none\ntwo\n=====../evil\nx\n=====b.txt\nthree\n=====END\n";
        fs::write(dir.path().join("answers"), said).unwrap();
        split_answers(dir.path()).unwrap();
        assert_eq!(
            fs::read_to_string(dir.path().join("a.txt")).unwrap(),
            "one\ntwo\n"
        );
        assert_eq!(
            fs::read_to_string(dir.path().join("b.txt")).unwrap(),
            "three\n"
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
