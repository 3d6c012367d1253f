//! The compiler that the kernel was built with: another one makes other code of the same source, and a patch built
//! with it replaces functions by others that were never tested together.

use crate::command;
use crate::error::BuildError;

/// A compiler that is the one that the configuration names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Compiler {
    /// The program.
    pub(crate) program: String,
    /// The first line it says of itself.
    pub(crate) version: String,
}

impl Compiler {
    /// Finds the compiler of this configuration.
    ///
    /// # Errors
    /// It is not named, not installed, of another version, or no gcc.
    pub(crate) fn of(config: &str) -> Result<Self, BuildError> {
        let wanted = named(config).ok_or(BuildError::NoCompilerNamed)?;
        let program = wanted.split(' ').next().unwrap_or_default().to_owned();
        if !program.contains("gcc") || program.contains('/') {
            return Err(BuildError::OtherCompiler(wanted.to_owned()));
        }
        let Ok(output) = command::finish(command::plain(&program).arg("--version")) else {
            let wanted = wanted.to_owned();
            return Err(BuildError::CompilerMissing { wanted, program });
        };
        let text = String::from_utf8_lossy(&output.stdout);
        let found = text.lines().next().unwrap_or_default().to_owned();
        if found != wanted {
            return Err(BuildError::CompilerDiffers {
                wanted: wanted.to_owned(),
                found,
                program,
            });
        }
        Ok(Self {
            program,
            version: found,
        })
    }
}

/// The first line of the compiler's `--version`, as the kernel's build wrote it down (Linux v6.12 init/Kconfig,
/// CC_VERSION_TEXT).
pub(crate) fn named(config: &str) -> Option<&str> {
    let line = |line: &'static str| move |text: &&str| text.starts_with(line);
    let text = config.lines().find(line("CONFIG_CC_VERSION_TEXT="))?;
    let quoted = text.split_once('=')?.1.trim();
    quoted
        .strip_prefix('"')?
        .strip_suffix('"')
        .filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compiler_is_read_from_the_configuration() {
        let config = "CONFIG_A=y\nCONFIG_CC_VERSION_TEXT=\"gcc-12 (Debian 12.2.0-14) 12.2.0\"\n";
        assert_eq!(named(config), Some("gcc-12 (Debian 12.2.0-14) 12.2.0"));
        for none in [
            "",
            "CONFIG_CC_VERSION_TEXT=",
            "CONFIG_CC_VERSION_TEXT=\"\"",
            "# CONFIG_CC_VERSION_TEXT=\"x\"",
        ] {
            assert_eq!(named(none), None, "{none}");
        }
    }

    #[test]
    fn a_compiler_that_is_not_the_kernels_is_refused_by_both_names() {
        let of =
            |text: &str| Compiler::of(&format!("CONFIG_CC_VERSION_TEXT=\"{text}\"")).unwrap_err();
        assert!(matches!(
            of("gcc-0 (none) 0"),
            BuildError::CompilerMissing { .. }
        ));
        assert!(matches!(
            of("clang version 19"),
            BuildError::OtherCompiler(_)
        ));
        assert!(matches!(of("/tmp/gcc 1"), BuildError::OtherCompiler(_)));
    }
}
