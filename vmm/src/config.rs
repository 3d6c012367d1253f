//! What a user asks for when they run a machine, and whether it can be. Owns no resource: files are
//! opened by those who use them.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The most vCPUs a machine can have.
pub const MAX_VCPUS: u8 = 8;
/// The least memory, in bytes: below it no 64-bit Linux kernel starts.
pub const MIN_MEMORY: u64 = 32 << 20;
/// Memory comes in multiples of this many bytes.
pub const MEMORY_STEP: u64 = 2 << 20;
/// The longest id, in bytes: it becomes part of a socket's path, which has 108 in all.
pub const MAX_ID: usize = 64;

/// A machine as asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// What the user calls it: letters, digits, `-`, `_` and `.`.
    pub id: String,
    /// A bzImage or an uncompressed vmlinux.
    pub kernel: PathBuf,
    /// An initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Guest RAM in bytes.
    pub memory: u64,
    /// The host's side of the serial console.
    pub console: ConsoleKind,
    /// Helps a KVM without hardware virtualisation over instructions that it cannot emulate. Only for
    /// kernels configured for it; see [`crate::host::Kind::Software`].
    pub assist_emulation: bool,
}

/// The host's side of the serial console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConsoleKind {
    /// Standard input (raw while the machine runs, if it is a terminal) and standard output.
    Stdio,
    /// Output to a file that is made anew; no input.
    File(PathBuf),
    /// A new pseudo-terminal.
    Pty,
}

/// What a machine cannot be asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not usable as part of a file name.
    #[error(
        "machine id {id:?}: use 1 to {MAX_ID} letters, digits, '-', '_' or '.', not beginning with '.'"
    )]
    Id {
        /// What was asked for.
        id: String,
    },
    /// Too few or too many.
    #[error("{vcpus} vCPUs: a machine has 1 to {MAX_VCPUS}")]
    Vcpus {
        /// What was asked for.
        vcpus: u8,
    },
    /// Too little, or not in whole steps.
    #[error(
        "{bytes} bytes of memory: at least {} MiB, in steps of {} MiB; try {} MiB",
        MIN_MEMORY >> 20, MEMORY_STEP >> 20, suggested(*bytes) >> 20
    )]
    Memory {
        /// What was asked for.
        bytes: u64,
    },
    /// The kernel would read only up to the zero byte.
    #[error("the kernel command line holds a zero byte at {at}")]
    CmdlineZero {
        /// Where.
        at: usize,
    },
}

impl MachineConfig {
    /// Checks what can be checked without opening a file.
    ///
    /// # Errors
    /// [`ConfigError`]: the first thing that cannot be.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !is_id(&self.id) {
            return Err(ConfigError::Id {
                id: self.id.clone(),
            });
        }
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return Err(ConfigError::Vcpus { vcpus: self.vcpus });
        }
        if self.memory < MIN_MEMORY || !self.memory.is_multiple_of(MEMORY_STEP) {
            return Err(ConfigError::Memory { bytes: self.memory });
        }
        match self.cmdline.bytes().position(|byte| byte == 0) {
            Some(at) => Err(ConfigError::CmdlineZero { at }),
            None => Ok(()),
        }
    }
}

/// Whether `id` can name a machine: it becomes part of a path.
#[must_use]
pub fn is_id(id: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    !id.is_empty() && id.len() <= MAX_ID && !id.starts_with('.') && id.bytes().all(allowed)
}

/// The nearest size at or above `bytes` that is allowed.
fn suggested(bytes: u64) -> u64 {
    bytes
        .max(MIN_MEMORY)
        .checked_next_multiple_of(MEMORY_STEP)
        .unwrap_or(!(MEMORY_STEP - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> MachineConfig {
        MachineConfig {
            id: "web-17".into(),
            kernel: "vmlinuz".into(),
            initrd: None,
            cmdline: "console=ttyS0".into(),
            vcpus: 2,
            memory: 256 << 20,
            console: ConsoleKind::Stdio,
            assist_emulation: false,
        }
    }

    #[test]
    fn an_ordinary_machine_is_allowed() {
        assert_eq!(config().validate(), Ok(()));
    }

    #[test]
    fn ids_that_would_leave_their_folder_are_refused() {
        for id in [
            "",
            "../x",
            "a/b",
            ".hidden",
            "a b",
            "\u{e9}",
            &"x".repeat(65),
        ] {
            let config = MachineConfig {
                id: id.into(),
                ..config()
            };
            assert_eq!(config.validate(), Err(ConfigError::Id { id: id.into() }));
        }
    }

    #[test]
    fn vcpus_are_one_to_eight() {
        for (vcpus, allowed) in [(0, false), (1, true), (8, true), (9, false)] {
            assert_eq!(
                MachineConfig { vcpus, ..config() }.validate().is_ok(),
                allowed,
                "{vcpus}"
            );
        }
    }

    #[test]
    fn a_wrong_memory_size_comes_with_one_that_works() {
        for (bytes, suggestion) in [(0, "32 MiB"), (33 << 20, "34 MiB"), (u64::MAX, "MiB")] {
            let error = MachineConfig {
                memory: bytes,
                ..config()
            }
            .validate()
            .unwrap_err();
            assert!(error.to_string().ends_with(suggestion), "{error}");
            let better = suggested(bytes);
            assert_eq!(
                MachineConfig {
                    memory: better,
                    ..config()
                }
                .validate(),
                Ok(())
            );
        }
    }

    #[test]
    fn a_zero_byte_in_the_command_line_is_found() {
        let config = MachineConfig {
            cmdline: "a\0b".into(),
            ..config()
        };
        assert_eq!(config.validate(), Err(ConfigError::CmdlineZero { at: 1 }));
    }
}
