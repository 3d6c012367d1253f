//! The kernel that is to be patched, as its vmlinux or its memory shows it, beside the one that is compiled: another compiler,
//! version or configuration makes other code. Reads no memory of a guest; whoever does hands the banner over.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use memchr::memmem;
use object::read::elf::ElfFile64;
use object::{Endianness, Object, ObjectSection};

use crate::compiler;
use crate::config;
use crate::error::{At, BuildError};

/// How a banner begins, before the release (Linux v6.12 init/version-timestamp.c).
const BANNER: &[u8] = b"Linux version ";
/// Longest banner that is believed.
const LONGEST: usize = 1024;
/// What stands around a configuration within a kernel, gzip between (Linux v6.12 kernel/configs.c, CONFIG_IKCONFIG).
const CONFIG: [&[u8]; 2] = [b"IKCFG_ST", b"IKCFG_ED"];
/// Longest configuration that is believed; those of today have 0.3 MB.
const LONGEST_CONFIG: u64 = 16 << 20;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Running {
    banner: String,
    release: String,
    compiler: String,
    build_id: Option<String>,
    config: Option<String>,
}

/// Why a file does not show a kernel.
#[derive(Debug, thiserror::Error)]
pub enum RunningError {
    /// No 64-bit ELF.
    #[error("no vmlinux: {0}")]
    NoVmlinux(object::Error),
    /// It has no banner that says by which compiler it was built.
    #[error("no kernel: it has no banner `Linux version RELEASE (BUILDER) (COMPILER, LINKER)`")]
    NoBanner,
}

impl Running {
    /// Reads a vmlinux.
    ///
    /// # Errors
    /// [`RunningError`].
    pub fn of_vmlinux(bytes: &[u8]) -> Result<Self, RunningError> {
        let elf = ElfFile64::<Endianness>::parse(bytes).map_err(RunningError::NoVmlinux)?;
        let constants = elf.section_by_name(".rodata");
        let constants = constants.and_then(|it| it.data().ok()).unwrap_or_default();
        let build_id = elf.build_id().ok().flatten();
        let found = memmem::find_iter(constants, BANNER).find_map(|at| {
            let text = constants.get(at..constants.len().min(at + LONGEST))?;
            let end = text.iter().position(|byte| matches!(byte, b'\n' | 0))?;
            let banner = str::from_utf8(text.get(..end)?).ok()?;
            Self::of_banner(banner, build_id.map(hex)).ok()
        });
        Ok(Self {
            config: own_config(constants),
            ..found.ok_or(RunningError::NoBanner)?
        })
    }

    /// Takes what was read from a guest.
    ///
    /// # Errors
    /// [`RunningError::NoBanner`].
    pub fn of_banner(banner: &str, build_id: Option<String>) -> Result<Self, RunningError> {
        let release = banner.split(' ').nth(2).unwrap_or_default();
        let built_by = groups(banner).nth(1);
        let compiler = built_by.and_then(|text| text.split_once(", "));
        match compiler {
            Some((compiler, _)) if release.starts_with(|c: char| c.is_ascii_digit()) => Ok(Self {
                banner: banner.to_owned(),
                release: release.to_owned(),
                compiler: compiler.to_owned(),
                build_id,
                config: None,
            }),
            _ => Err(RunningError::NoBanner),
        }
    }

    /// `uname -r`.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.release
    }

    /// GNU build id, in lower-case hex.
    #[must_use]
    pub fn build_id(&self) -> Option<&str> {
        self.build_id.as_deref()
    }

    /// Checks that a source and a configuration, and the release if it is known, are those that this kernel was made of.
    ///
    /// # Errors
    /// [`BuildError::OtherKernel`] with all that differs.
    pub fn is_made_of(
        &self,
        source: &Path,
        config: &str,
        release: Option<&str>,
    ) -> Result<(), BuildError> {
        let makefile = source.join("Makefile");
        let makefile = std::fs::read_to_string(&makefile).at(&makefile)?;
        let mut differing = Vec::new();
        let mut differ = |what: &str, running: &str, compiled: &str| {
            differing.push(format!("{what} is {running}, compiled is {compiled}"));
        };
        match (release, config::source_version(&makefile)) {
            (Some(release), _) if release != self.release => {
                differ("the release", &self.release, release);
            }
            // Debian's releases of old have the version in the text behind alone.
            (None, Some(version)) if !has_version(&self.banner, &version) => {
                differ("the release", &self.release, &version);
            }
            _ => {}
        }
        let named = compiler::named(config).unwrap_or("unknown");
        if named != self.compiler {
            differ("the compiler", &self.compiler, named);
        }
        if let Some(own) = &self.config {
            let changed = config::changed(config, own);
            let told = changed
                .iter()
                .take(5)
                .map(|it| it.beside("compiled", "running"));
            let more = changed.len().saturating_sub(5);
            differing.extend(told);
            differing.extend((more > 0).then(|| format!("{more} more options differ")));
        }
        match differing.is_empty() {
            true => Ok(()),
            false => Err(BuildError::OtherKernel(differing)),
        }
    }
}

/// Whether a text has this version, and not only a longer one that begins or ends alike.
fn has_version(text: &str, version: &str) -> bool {
    let part = |c: char| c.is_ascii_digit() || c == '.';
    text.match_indices(version).any(|(at, _)| {
        let before = text.get(..at).unwrap_or_default();
        let behind = text.get(at + version.len()..).unwrap_or_default();
        !before.ends_with(part) && !behind.starts_with(part)
    })
}

/// What stands in parentheses, from the outermost to their end.
fn groups(text: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0_usize;
    let mut start = 0;
    text.char_indices().filter_map(move |(at, c)| match c {
        '(' => {
            depth += 1;
            if depth == 1 {
                start = at + 1;
            }
            None
        }
        ')' => {
            let outermost = depth == 1;
            depth = depth.saturating_sub(1);
            outermost.then(|| text.get(start..at))?
        }
        _ => None,
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The configuration that a kernel has within itself; `None` if it has none, or none that can be read.
fn own_config(constants: &[u8]) -> Option<String> {
    let [start, end] = CONFIG;
    let from = memmem::find(constants, start)? + start.len();
    let packed = constants.get(from..)?;
    let packed = packed.get(..memmem::find(packed, end)?)?;
    let mut gzip = Command::new("gzip");
    gzip.arg("-dc").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut gzip = gzip.stderr(Stdio::null()).spawn().ok()?;
    let (mut to, from) = (gzip.stdin.take()?, gzip.stdout.take()?);
    let text = std::thread::scope(|scope| {
        // It may have said much before it has read all; that it ends early shows in what it says.
        scope.spawn(move || drop(to.write_all(packed)));
        let mut text = String::new();
        let read = from.take(LONGEST_CONFIG).read_to_string(&mut text);
        read.ok().map(|_| text)
    });
    gzip.wait().ok().filter(std::process::ExitStatus::success)?;
    text
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const TEXT: &str = "Linux version 6.1.0-56-cloud-amd64 (debian@x) (gcc-12 (Debian 12.2.0-14) 12.2.0, GNU ld (GNU \
         Binutils) 2.40) #1 SMP Debian 6.1.192-2 (2026-11-16)";

    /// A source of this version, and a configuration with the banner's compiler.
    fn source(sublevel: u32) -> (tempfile::TempDir, String) {
        let folder = tempfile::tempdir().unwrap();
        let makefile =
            format!("VERSION = 6\nPATCHLEVEL = 1\nSUBLEVEL = {sublevel}\nEXTRAVERSION =\n");
        fs::write(folder.path().join("Makefile"), makefile).unwrap();
        let config = "CONFIG_CC_VERSION_TEXT=\"gcc-12 (Debian 12.2.0-14) 12.2.0\"\nCONFIG_A=y\n";
        (folder, config.to_owned())
    }

    #[test]
    fn a_banner_tells_release_and_compiler() {
        let running = Running::of_banner(TEXT, None).unwrap();
        assert_eq!(running.release(), "6.1.0-56-cloud-amd64");
        assert_eq!(running.compiler, "gcc-12 (Debian 12.2.0-14) 12.2.0");
        for bad in [
            "",
            "Linux version %s (%s)",
            "Linux version 6.1 (a) (gcc",
            "Linux version 6.1 )(",
        ] {
            assert!(Running::of_banner(bad, None).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_differs_from_what_is_compiled_is_named() {
        let running = Running::of_banner(TEXT, None).unwrap();
        let (same, config) = source(192);
        running.is_made_of(same.path(), &config, None).unwrap();
        let refused = |source: &Path, config: &str, release| {
            running
                .is_made_of(source, config, release)
                .unwrap_err()
                .to_string()
        };
        let (other, _) = source(19);
        let told = refused(other.path(), &config, None);
        assert!(
            told.contains("6.1.0-56-cloud-amd64") && told.contains("6.1.19"),
            "{told}"
        );
        let told = refused(same.path(), &config, Some("6.1.0-56-amd64"));
        assert!(told.contains("compiled is 6.1.0-56-amd64"), "{told}");
        let told = refused(same.path(), &config.replace("-14", "-13"), None);
        assert!(
            told.contains("12.2.0-14") && told.contains("12.2.0-13"),
            "{told}"
        );
        let own = config.replace("CONFIG_A=y", "CONFIG_A=m");
        let with_own = Running {
            config: Some(own),
            ..running.clone()
        };
        let told = with_own.is_made_of(same.path(), &config, None).unwrap_err();
        assert!(told.to_string().contains("CONFIG_A"), "{told}");
    }

    /// A file with these constants.
    fn vmlinux(constants: &[u8]) -> Vec<u8> {
        use object::write;
        let (format, kind) = (object::BinaryFormat::Elf, object::Architecture::X86_64);
        let mut file = write::Object::new(format, kind, object::Endianness::Little);
        let kind = object::SectionKind::ReadOnlyData;
        let section = file.add_section(Vec::new(), b".rodata".to_vec(), kind);
        file.append_section_data(section, constants, 1);
        file.write().unwrap()
    }

    #[test]
    fn a_vmlinux_shows_its_banner_and_its_own_configuration() {
        let folder = tempfile::tempdir().unwrap();
        let text = "CONFIG_A=y\n".repeat(20_000);
        let plain = folder.path().join("config");
        fs::write(&plain, &text).unwrap();
        assert!(Command::new("gzip").arg(&plain).status().unwrap().success());
        let packed = fs::read(folder.path().join("config.gz")).unwrap();
        let banner = format!("Linux version %s (%s)\n\0{TEXT}\n\0");
        let constants = [banner.as_bytes(), CONFIG[0], &packed, CONFIG[1]].concat();
        let running = Running::of_vmlinux(&vmlinux(&constants)).unwrap();
        assert_eq!(running.release(), "6.1.0-56-cloud-amd64");
        assert!(running.config == Some(text));
        let cut = [banner.as_bytes(), CONFIG[0], &packed[..9], CONFIG[1]].concat();
        assert_eq!(Running::of_vmlinux(&vmlinux(&cut)).unwrap().config, None);
        assert!(Running::of_vmlinux(&vmlinux(b"Linux version ")).is_err());
        assert!(Running::of_vmlinux(b"no ELF").is_err());
    }
}
