//! One run of the emulated machine: file daemon and QEMU started, output passed on, both ended whatever happens.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use anyhow::{Context, Result, bail};

use super::ramdisk::{self, Boot};
use super::{Job, Waited, clear, wait_while, write_script};
use crate::emulator::Emulator;
use crate::manifest::Manifest;
use crate::progress;
use crate::run::Reaped;

/// RAM of the test host. Guests of up to 1 GiB, several at once, fit beside the caches.
const MEMORY: &str = "4G";
/// Virtual CPUs. Guests have several all the same, which this one runs in turn. With two, under load, QEMU (7.2 and 10.0) now and
/// then gives a guest's vCPU the state of the host's own kernel: seen as a vCPU with the host's CR3, RSP and RIP (in `kvm_amd`) and
/// its VMCB's address in RAX. It then faults for ever or shuts down.
const CPUS: &str = "1";

/// A machine that has shown no sign of life for so long hangs. It shows one every five seconds.
const SILENCE: Duration = Duration::from_secs(90);

/// How a machine ended.
enum Ended {
    /// The command came to its end, with this exit code.
    Command(i32),
    /// The machine failed: its kernel died or hangs. What the command would have come to is not known.
    Machine(String),
}

/// Runs the job in the machine and returns its exit code. Emulation of nested virtualisation is not sound: where the machine
/// itself fails, another is begun, once, and that is told.
pub(super) fn run(manifest: &Manifest, job: &Job) -> Result<i32> {
    let emulator = Emulator::find(manifest)?;
    let mut ended = once(&emulator, manifest, job)?;
    if let Ended::Machine(why) = &ended {
        progress::warn(&format!(
            "the emulated machine itself failed, so that nothing is known of the command: it is begun anew in another\n{why}"
        ));
        ended = once(&emulator, manifest, job)?;
    }
    match ended {
        Ended::Command(code) => Ok(code),
        Ended::Machine(why) => bail!("{why}"),
    }
}

fn once(emulator: &Emulator, manifest: &Manifest, job: &Job) -> Result<Ended> {
    let boot = ramdisk::make(manifest)?;
    write_script(job)?;
    clear(&job.out, "exit")?;
    clear(&job.out, "alive")?;
    let sockets = SocketDir::create()?;
    let _daemon = daemon(&sockets.path)?;
    let mut qemu = qemu(emulator, &boot, &sockets.path, job)?;
    let output = qemu
        .0
        .stdout
        .take()
        .context("QEMU's output is not a pipe")?;
    let copier = thread::spawn(move || pass_on(output));
    let silent = || silence(job).is_some_and(|since| since > SILENCE);
    let ended = wait_while(&mut qemu.0, job.limit, silent).context("cannot wait for QEMU")?;
    drop(copier.join());
    let console = console(job);
    Ok(match ended {
        Waited::Ended(_) => ending(job),
        Waited::GivenUp => Ended::Machine(format!(
            "the test host gave no sign of life for {} s; its console is in {}",
            SILENCE.as_secs(),
            console.display()
        )),
        Waited::TimedOut => bail!(
            "the test host was ended after {} s; its console is in {}",
            job.limit.as_secs(),
            console.display()
        ),
    })
}

/// How long ago the machine last showed that it lives; `None` before it first does.
fn silence(job: &Job) -> Option<Duration> {
    let alive = fs::metadata(job.out.join("alive")).ok()?;
    alive.modified().ok()?.elapsed().ok()
}

fn ending(job: &Job) -> Ended {
    let text = fs::read_to_string(job.out.join("exit")).unwrap_or_default();
    if let Ok(code) = text.trim().parse() {
        return Ended::Command(code);
    }
    let log = fs::read(console(job)).unwrap_or_default();
    Ended::Machine(format!(
        "the test host ended without a result; its console ({}) tells:\n{}",
        console(job).display(),
        last_words(&String::from_utf8_lossy(&log))
    ))
}

/// What a console shows of a kernel's end: from the first sign of trouble, or the last lines where there is none.
fn last_words(console: &str) -> String {
    const SIGNS: [&str; 4] = ["BUG:", "Oops", "general protection", "Kernel panic"];
    const MOST: usize = 40;
    let lines: Vec<&str> = console.lines().collect();
    let trouble = lines
        .iter()
        .position(|line| SIGNS.iter().any(|sign| line.contains(sign)));
    let from = trouble.unwrap_or(lines.len().saturating_sub(12));
    let shown: Vec<&str> = lines.into_iter().skip(from).take(MOST).collect();
    shown.join("\n")
}

fn console(job: &Job) -> PathBuf {
    job.out.join("console.log")
}

fn daemon(sockets: &Path) -> Result<Reaped> {
    let socket = sockets.join("files");
    let old = Path::new("/usr/lib/qemu/virtiofsd");
    let new = Path::new("/usr/libexec/virtiofsd");
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]);
    if new.exists() {
        command.arg(new).args([
            "--shared-dir",
            "/",
            "--cache",
            "always",
            "--sandbox",
            "chroot",
        ]);
    } else {
        command.arg(old).args([
            "-f",
            "-o",
            "source=/",
            "-o",
            "cache=always",
            "-o",
            "sandbox=chroot",
            "-o",
            "log_level=err",
        ]);
    }
    let child = command
        .arg(format!("--socket-path={}", socket.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start virtiofsd")?;
    let daemon = Reaped(child);
    let until = Instant::now() + Duration::from_secs(10);
    while !socket.exists() {
        if Instant::now() >= until {
            bail!("virtiofsd did not come up (it needs root)");
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(daemon)
}

fn qemu(emulator: &Emulator, boot: &Boot, sockets: &Path, job: &Job) -> Result<Reaped> {
    // A periodic tick: a timer interrupt that the emulation loses while a guest runs is made up for by the next, where a tickless
    // host waited for ever.
    let append = format!(
        "console=ttyS0 tsc=reliable nohz=off highres=off quiet panic=-1 vmpatch.out={}",
        job.out.display()
    );
    let child = emulator
        .command()
        .args(["-cpu", "max,+svm,+npt", "-smp", CPUS, "-m", MEMORY])
        .args([
            "-object",
            &format!("memory-backend-memfd,id=ram,size={MEMORY},share=on"),
            "-numa",
            "node,memdev=ram",
        ])
        .args([
            "-chardev",
            &format!("socket,id=files,path={}", sockets.join("files").display()),
        ])
        .args(["-device", "vhost-user-fs-pci,chardev=files,tag=root"])
        .args(["-chardev", "file,id=output,path=/dev/stdout"])
        .args([
            "-device",
            "virtio-serial-pci",
            "-device",
            "virtconsole,chardev=output",
        ])
        .args(["-serial", &format!("file:{}", console(job).display())])
        .arg("-kernel")
        .arg(&boot.kernel)
        .arg("-initrd")
        .arg(&boot.initrd)
        .args(["-append", &append])
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start QEMU")?;
    Ok(Reaped(child))
}

/// Shows output as it comes, not line by line.
fn pass_on(mut from: impl Read) -> io::Result<()> {
    let mut piece = [0_u8; 4096];
    let mut out = io::stdout();
    loop {
        let n = from.read(&mut piece)?;
        if n == 0 {
            return Ok(());
        }
        out.write_all(&piece[..n])?;
        out.flush()?;
    }
}

/// A folder with a path short enough for socket names (108 bytes, Linux include/uapi/linux/un.h).
struct SocketDir {
    path: PathBuf,
}

impl SocketDir {
    fn create() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("vmpatch-host.{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self { path })
    }
}

impl Drop for SocketDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_kernel_is_shown_from_its_cause() {
        let mut console = "fine\n".repeat(30);
        assert_eq!(last_words(&console).lines().count(), 12);
        console.push_str(
            "Oops: int3: 0000 [#1]\nRIP: finish_task_switch\nKernel panic - not syncing\n",
        );
        assert!(last_words(&console).starts_with("Oops: int3"));
    }
}
