//! A guest started by `vmpatch run` in the foreground, with its console. Ended when dropped.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::log::Baseline;
use crate::tool::ended;
use crate::{Answer, Console, Oracle, Ram, Snapshot, Tool};

/// A guest image as `cargo xtask images` makes it.
#[derive(Clone, Debug)]
pub struct Image {
    dir: PathBuf,
}

/// How to boot it.
#[derive(Clone, Debug)]
pub struct Boot {
    /// Which VM this will be.
    pub id: String,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Memory as `vmpatch run` takes it.
    pub memory: String,
    /// What is added to the kernel's command line.
    pub cmdline: String,
    /// The ELF kernel instead of the bzImage.
    pub elf: bool,
    /// Another first file system than the image's own.
    pub initrd: Option<PathBuf>,
    /// What a line holds that tells that the guest is up.
    pub ready: String,
    /// How long it may take until init is ready.
    pub limit: Duration,
    /// More arguments for `vmpatch run`.
    pub args: Vec<String>,
}

/// A running guest.
#[derive(Debug)]
pub struct Guest {
    /// Its console.
    pub console: Console,
    /// The tool that drives it.
    pub tool: Tool,
    /// Its id.
    pub id: String,
    /// From start to init being ready.
    pub boot_time: Duration,
    /// Warnings of its own boot.
    pub baseline: Baseline,
    places: Option<Oracle>,
    process: Child,
}

impl Image {
    /// The image of that name below `VMPATCH_GUESTS`.
    ///
    /// # Errors
    /// The variable is not set or there is no such image.
    pub fn named(name: &str) -> Result<Self> {
        let root = std::env::var_os("VMPATCH_GUESTS")
            .context("VMPATCH_GUESTS is not set; run this by `cargo xtask`")?;
        Self::in_folder(PathBuf::from(root).join(name))
    }

    /// The image in this folder.
    ///
    /// # Errors
    /// There is none.
    pub fn in_folder(dir: PathBuf) -> Result<Self> {
        if !dir.join("stamp").exists() {
            bail!("no guest image {} (cargo xtask images)", dir.display());
        }
        Ok(Self { dir })
    }

    /// A file of the image.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Kernel release, as `uname -r` prints it.
    ///
    /// # Errors
    /// The image is damaged.
    pub fn release(&self) -> Result<String> {
        Ok(fs::read_to_string(self.file("release"))
            .context("the image names no release")?
            .trim()
            .to_owned())
    }
}

impl Boot {
    /// Two vCPUs, 256 MiB, quiet.
    #[must_use]
    pub fn new(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            vcpus: 2,
            memory: "256M".to_owned(),
            cmdline: String::new(),
            elf: false,
            initrd: None,
            ready: "@ready ".to_owned(),
            limit: Duration::from_secs(180),
            args: Vec::new(),
        }
    }

    /// With this added to the kernel's command line.
    #[must_use]
    pub fn cmdline(mut self, more: &str) -> Self {
        self.cmdline = format!("{} {more}", self.cmdline);
        self
    }

    /// With that many vCPUs.
    #[must_use]
    pub fn vcpus(mut self, vcpus: u32) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// Starts the guest and waits until its init is ready.
    ///
    /// # Errors
    /// It does not get there in time; the message holds its last lines.
    pub fn start(self, tool: &Tool, image: &Image) -> Result<Guest> {
        let since = Instant::now();
        let (console, process) =
            Console::of_process(self.command(tool, image)).context("cannot start vmpatch run")?;
        let mut guest = Guest {
            console,
            tool: tool.clone(),
            id: self.id,
            boot_time: Duration::ZERO,
            baseline: Baseline::default(),
            places: None,
            process,
        };
        guest
            .console
            .wait(0, self.limit, |l| l.contains(&self.ready))
            .context("the guest does not come up")?;
        guest.boot_time = since.elapsed();
        guest.baseline = Baseline::of(&guest.console.since(0));
        Ok(guest)
    }

    fn command(&self, tool: &Tool, image: &Image) -> std::process::Command {
        // A guest that nobody ends, as one that tests share, ends with the program that started it.
        let mut command = tool.command_after(&["setpriv", "--pdeathsig", "KILL"]);
        command
            .args([
                "run",
                "--id",
                &self.id,
                "--vcpus",
                &self.vcpus.to_string(),
                "--memory",
                &self.memory,
            ])
            .arg("--kernel")
            .arg(image.file(if self.elf { "vmlinux" } else { "vmlinuz" }))
            .arg("--initrd")
            .arg(self.initrd.clone().unwrap_or_else(|| image.file("initrd")))
            .args([
                "--cmdline",
                &format!("console=ttyS0 panic=-1 loglevel=5 {}", self.cmdline),
                "--console",
                "stdio",
            ])
            .args(&self.args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        command
    }
}

impl Guest {
    /// Calls the tool on this guest: `verb … --vm ID …`.
    ///
    /// # Errors
    /// The tool cannot be started.
    pub fn call(&self, words: &[&str]) -> Result<Answer> {
        self.call_with(&self.tool, words)
    }

    /// The same with another tool, such as one with a variable set.
    ///
    /// # Errors
    /// The tool cannot be started.
    pub fn call_with(&self, tool: &Tool, words: &[&str]) -> Result<Answer> {
        tool.call(words.iter().copied().chain(["--vm", &self.id]))
    }

    /// Runs a shell command in the guest.
    ///
    /// # Errors
    /// No answer within a minute, or it failed; the message then holds what can be seen of the guest from outside.
    pub fn ask(&mut self, command: &str) -> Result<Vec<String>> {
        let answer = self.console.ask(command, Duration::from_secs(60));
        answer.with_context(|| format!("{command}\n{}", self.scene()))
    }

    /// How a guest that fell silent looks from outside: where its vCPUs stand, what every task waits for, what its log says.
    fn scene(&self) -> String {
        const MOST: usize = 20_000;
        let mut scene = String::new();
        for verb in ["vcpus", "stacks", "dmesg"] {
            let mut inspect = self.tool.command();
            inspect.args(["inspect", verb, "--vm", &self.id]);
            let text = match ended(&mut inspect, Duration::from_secs(60)) {
                Ok(output) if output.status.success() => output.stdout,
                Ok(output) => output.stderr,
                Err(error) => error.to_string().into_bytes(),
            };
            let text = String::from_utf8_lossy(&text);
            let last = text.char_indices().rev().nth(MOST).map_or(0, |(at, _)| at);
            scene.push_str(&format!("--- inspect {verb}\n{}\n", &text[last..]));
        }
        scene
    }

    /// What the guest's kernel says of itself: `places`, `symbols`, `tasks`, `stacks`, or all of it, `oracle`.
    ///
    /// # Errors
    /// The guest does not answer, or not in the expected form.
    pub fn oracle(&mut self, what: &str) -> Result<Oracle> {
        let lines = self.console.ask(what, Duration::from_secs(180));
        Oracle::parse(&lines.with_context(|| format!("{what}\n{}", self.scene()))?)
    }

    /// Digests of the kernel's code, read-only data and arena table, taken now.
    ///
    /// # Errors
    /// The guest does not say where they lie, or its memory cannot be read.
    pub fn snapshot(&mut self) -> Result<Snapshot> {
        if self.places.is_none() {
            self.places = Some(self.oracle("places")?);
        }
        let places = self.places.as_ref().context("no places")?;
        Ram::of_process(self.process.id())?.snapshot(places)
    }

    /// What `/proc/vmpatch_planted` tells: pid of the planted kthread of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn planted(&mut self, name: &str) -> Result<i64> {
        let lines = self.ask("cat /proc/vmpatch_planted")?;
        let pid = lines
            .iter()
            .find_map(|l| l.strip_prefix(&format!("thread {name} ")));
        pid.and_then(|p| p.parse().ok())
            .with_context(|| format!("no planted kthread {name}"))
    }

    /// Oopses and warnings since boot, beyond those of the boot itself.
    #[must_use]
    pub fn troubles(&self) -> Vec<String> {
        self.baseline.beyond(&self.console.since(0))
    }

    /// Waits for the process to end by itself and returns its exit code.
    ///
    /// # Errors
    /// It does not end in time.
    pub fn wait_end(&mut self, limit: Duration) -> Result<Option<i32>> {
        let until = Instant::now() + limit;
        while Instant::now() < until {
            if let Some(status) = self
                .process
                .try_wait()
                .context("cannot wait for vmpatch run")?
            {
                return Ok(status.code());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("vmpatch run did not end in time")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Gone already if the test ended it.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
