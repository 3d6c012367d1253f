//! The test host: a QEMU machine with emulated AMD-V and nested paging that runs a stock kernel with `kvm_amd`, for machines
//! whose own `/dev/kvm` cannot run stock kernels. The command sees this machine's files, read-only, under their own paths, and
//! one folder to write to. Where the hardware can do it the same command runs directly. Does not know what is tested.
//!
//! ```text
//!   wanted? ──no──► run directly
//!     │yes
//!   virtiofsd ── socket ── QEMU ── init ── chroot ── command
//!     │                     │ hvc0 → our standard output
//!     └─ both die with us   └ ttyS0 → console.log
//! ```

mod machine;
mod ramdisk;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use std::{fs, io};

use anyhow::{Context, Result};

use crate::manifest::Manifest;

/// A command to run where stock kernels can run.
#[derive(Debug)]
pub(crate) struct Job {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Folder to start in.
    pub cwd: PathBuf,
    /// Variables to set; nothing else is inherited but `PATH`.
    pub env: Vec<(String, String)>,
    /// The only folder that can be written (and `/tmp`, which does not last). Created if absent.
    pub out: PathBuf,
    /// After this the machine is ended.
    pub limit: Duration,
}

/// Where a job ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the emulated machine.
    TestHost,
    /// On this machine.
    Direct,
}

impl Place {
    /// The word for reports.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::TestHost => "test-host",
            Self::Direct => "direct",
        }
    }
}

/// Where jobs run on this machine: directly if the CPU shows `svm` or `vmx` and `/dev/kvm` opens.
///
/// A `/dev/kvm` without either flag is a KVM that runs guests by emulation and cannot run stock kernels.
pub(crate) fn place() -> Place {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo
        .lines()
        .find(|l| l.starts_with("flags"))
        .unwrap_or_default();
    let can = flags.split_whitespace().any(|f| f == "svm" || f == "vmx");
    let opens = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    if can && opens {
        Place::Direct
    } else {
        Place::TestHost
    }
}

/// Runs a job to its end, output shown as it comes, and returns the command's exit code.
pub(crate) fn run(manifest: &Manifest, job: &Job) -> Result<i32> {
    fs::create_dir_all(&job.out).with_context(|| format!("cannot create {}", job.out.display()))?;
    match place() {
        Place::Direct => direct(job),
        Place::TestHost => machine::run(manifest, job),
    }
}

fn direct(job: &Job) -> Result<i32> {
    let script = write_script(job)?;
    let mut child = Command::new("setpriv")
        .args(["--pdeathsig", "KILL"])
        // Guests that the command leaves behind end with it.
        .args([
            "unshare",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "/bin/sh",
        ])
        .arg(script)
        .stdin(Stdio::null())
        .spawn()
        .context("cannot start the command")?;
    let status = wait(&mut child, job.limit)?;
    Ok(status.and_then(|s| s.code()).unwrap_or(124))
}

/// The job as a shell script in its output folder.
fn write_script(job: &Job) -> Result<PathBuf> {
    let mut text = String::from("#!/bin/sh\n");
    for (name, value) in &job.env {
        text.push_str(&format!("export {name}={}\n", quoted(value)));
    }
    text.push_str(&format!(
        "cd {} || exit 126\nexec",
        quoted(&job.cwd.to_string_lossy())
    ));
    for word in &job.argv {
        text.push(' ');
        text.push_str(&quoted(word));
    }
    text.push('\n');
    let path = job.out.join("command");
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// A word that a POSIX shell takes as it is.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// How waiting for a child ended.
#[derive(Debug)]
enum Waited {
    Ended(std::process::ExitStatus),
    /// Killed: what was watched for came.
    GivenUp,
    /// Killed: the time was over.
    TimedOut,
}

/// Waits for a child; after `limit` ends it.
fn wait(
    child: &mut std::process::Child,
    limit: Duration,
) -> io::Result<Option<std::process::ExitStatus>> {
    Ok(match wait_while(child, limit, || false)? {
        Waited::Ended(status) => Some(status),
        Waited::GivenUp | Waited::TimedOut => None,
    })
}

/// Waits for a child; after `limit`, or once `hopeless` holds, ends it.
fn wait_while(
    child: &mut std::process::Child,
    limit: Duration,
    hopeless: impl Fn() -> bool,
) -> io::Result<Waited> {
    let until = std::time::Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Waited::Ended(status));
        }
        let why = match (hopeless(), std::time::Instant::now() >= until) {
            (true, _) => Waited::GivenUp,
            (_, true) => Waited::TimedOut,
            (false, false) => {
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        child.kill()?;
        child.wait()?;
        return Ok(why);
    }
}

/// Removes what an earlier run left in the output folder under this name.
fn clear(out: &Path, name: &str) -> Result<()> {
    match fs::remove_file(out.join(name)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove old {name}"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_keeps_words_with_spaces_and_quotes_whole() {
        let dir = tempfile::tempdir().unwrap();
        let job = Job {
            argv: vec![
                "printf".into(),
                "%s|".into(),
                "it's one".into(),
                "$HOME".into(),
            ],
            cwd: dir.path().into(),
            env: vec![("A".into(), "b c".into())],
            out: dir.path().into(),
            limit: Duration::from_secs(5),
        };
        let script = write_script(&job).unwrap();
        let output = Command::new("sh").arg(script).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "it's one|$HOME|");
    }

    #[test]
    fn a_child_without_hope_is_ended_before_its_limit() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let ended = wait_while(&mut child, Duration::from_secs(50), || true);
        assert!(matches!(ended, Ok(Waited::GivenUp)), "{ended:?}");
    }

    #[test]
    fn a_child_that_outlives_its_limit_is_ended() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        assert!(
            wait(&mut child, Duration::from_millis(60))
                .unwrap()
                .is_none()
        );
    }
}
