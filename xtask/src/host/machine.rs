//! One run of the emulated machine: file daemon and QEMU started, output passed on, both ended whatever happens.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use anyhow::{Context, Result, bail};

use super::ramdisk::{self, Boot};
use super::{Job, clear, wait, write_script};
use crate::manifest::Manifest;

/// RAM of the test host. Guests of up to 1 GiB, several at once, fit beside the caches.
const MEMORY: &str = "4G";
/// Virtual CPUs: as many as the smallest machine that this must run on has cores.
const CPUS: &str = "2";

/// Both the daemon and QEMU die with this process (`setpriv --pdeathsig`), Ctrl-C and SIGKILL included.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        // Gone already in the ordinary case.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the job in the machine and returns its exit code.
pub(super) fn run(manifest: &Manifest, job: &Job) -> Result<i32> {
    let boot = ramdisk::make(manifest)?;
    let own = std::env::current_exe().context("cannot find this program")?;
    write_script(job, Some(&own))?;
    clear(&job.out, "exit")?;
    let sockets = SocketDir::create()?;
    let _daemon = daemon(&sockets.path)?;
    let mut qemu = qemu(&boot, &sockets.path, job)?;
    let output = qemu
        .0
        .stdout
        .take()
        .context("QEMU's output is not a pipe")?;
    let copier = thread::spawn(move || pass_on(output));
    let status = wait(&mut qemu.0, job.limit).context("cannot wait for QEMU")?;
    drop(copier.join());
    if status.is_none() {
        bail!(
            "the test host was ended after {} s; its console is in {}",
            job.limit.as_secs(),
            console(job).display()
        );
    }
    exit_code(job)
}

fn exit_code(job: &Job) -> Result<i32> {
    let text = fs::read_to_string(job.out.join("exit")).unwrap_or_default();
    text.trim().parse().ok().with_context(|| {
        let log = fs::read(console(job)).unwrap_or_default();
        let log = String::from_utf8_lossy(&log).into_owned();
        let lines: Vec<&str> = log.lines().collect();
        format!(
            "the test host ended without a result; its last words:\n{}",
            lines[lines.len().saturating_sub(12)..].join("\n")
        )
    })
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

fn qemu(boot: &Boot, sockets: &Path, job: &Job) -> Result<Reaped> {
    let append = format!(
        "console=ttyS0 tsc=reliable quiet panic=-1 vmpatch.out={}",
        job.out.display()
    );
    let child = Command::new("setpriv")
        .args([
            "--pdeathsig",
            "KILL",
            "qemu-system-x86_64",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args([
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max,+svm,+npt",
            "-smp",
            CPUS,
            "-m",
            MEMORY,
        ])
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
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start qemu-system-x86_64")?;
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
