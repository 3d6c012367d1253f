//! Whether a configuration is one of this source, and complete: what the kernel's own tools would make of it otherwise is told,
//! for an option that changes on the way is not what the running kernel was built with.

use std::collections::BTreeMap;
use std::fmt;

/// Options that say how a kernel is signed and named, or what else is installed where it is built; no code of the kernel is
/// made otherwise by them. Debian takes the first kind out of what it ships.
const NO_CODE: [&str; 7] = [
    "CONFIG_BUILD_SALT",
    "CONFIG_MODULE_SIG_ALL",
    "CONFIG_MODULE_SIG_KEY",
    "CONFIG_RUSTC_",
    "CONFIG_RUST_IS_AVAILABLE",
    "CONFIG_SYSTEM_REVOCATION_KEYS",
    "CONFIG_SYSTEM_TRUSTED_KEYS",
];

/// An option that the kernel's own tools set otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    option: String,
    /// `None`: not named.
    given: Option<String>,
    made: Option<String>,
}

impl Changed {
    /// The option in two configurations.
    pub(crate) fn beside(&self, given: &str, made: &str) -> String {
        let [in_given, in_made] = self.told();
        format!(
            "{} is {in_made} in the {made} one, {in_given} in the {given} one",
            self.option
        )
    }

    fn told(&self) -> [&str; 2] {
        [&self.given, &self.made].map(|value| value.as_deref().unwrap_or("absent"))
    }
}

impl fmt::Display for Changed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [given, made] = self.told();
        write!(f, "{} is {given} and becomes {made}", self.option)
    }
}

/// What differs between a configuration as given and as the kernel's own tools settled it.
pub(crate) fn changed(given: &str, settled: &str) -> Vec<Changed> {
    let (given, settled) = (options(given), options(settled));
    let names = given
        .keys()
        .chain(settled.keys().filter(|it| !given.contains_key(*it)));
    let differing = names.filter(|name| given.get(*name) != settled.get(*name));
    let coding = differing.filter(|name| !NO_CODE.iter().any(|no_code| name.starts_with(no_code)));
    let owned = |value: Option<&&str>| value.map(|value| (*value).to_owned());
    coding
        .map(|name| Changed {
            option: (*name).to_owned(),
            given: owned(given.get(name)),
            made: owned(settled.get(name)),
        })
        .collect()
}

/// Options with their values; `n` for those that are said not to be set.
fn options(config: &str) -> BTreeMap<&str, &str> {
    let lines = config.lines().map(str::trim_end);
    let pairs = lines.filter_map(|line| {
        let unset = || Some((line.strip_prefix("# ")?.strip_suffix(" is not set")?, "n"));
        line.split_once('=').or_else(unset)
    });
    pairs
        .filter(|(name, _)| name.starts_with("CONFIG_"))
        .collect()
}

/// The version that a configuration says it is of, in its head (Linux v6.12 scripts/kconfig/confdata.c, `conf_write_heading`).
pub(crate) fn version(config: &str) -> Option<&str> {
    let heads = config
        .lines()
        .take(8)
        .filter_map(|line| line.strip_prefix("# Linux/"));
    let mut words = heads.filter_map(|head| head.strip_suffix(" Kernel Configuration"));
    words.next()?.split_once(' ').map(|(_, version)| version)
}

/// The version that a source says it is of, in its makefile.
pub(crate) fn source_version(makefile: &str) -> Option<String> {
    let value = |name: &str| {
        let mut lines = makefile.lines().take(16);
        let line = lines.find_map(|line| line.strip_prefix(name)?.trim().strip_prefix('='))?;
        Some(line.trim().to_owned())
    };
    let numbers = [value("VERSION")?, value("PATCHLEVEL")?, value("SUBLEVEL")?];
    Some(numbers.join(".") + &value("EXTRAVERSION").unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_that_becomes_another_is_told_with_both_values() {
        let given =
            "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_GONE=m\nCONFIG_S=\"x=y\"\n# a note\n";
        let settled = "CONFIG_A=y\nCONFIG_B=y\nCONFIG_S=\"x=y\"\nCONFIG_NEW=1\n";
        let told: Vec<_> = changed(given, settled)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            told,
            [
                "CONFIG_B is n and becomes y",
                "CONFIG_GONE is m and becomes absent",
                "CONFIG_NEW is absent and becomes 1"
            ]
        );
    }

    #[test]
    fn what_makes_no_code_may_differ() {
        let settled = "CONFIG_BUILD_SALT=\"\"\nCONFIG_RUSTC_VERSION=1\nCONFIG_MODULE_SIG_ALL=y\n";
        assert_eq!(changed("CONFIG_RUSTC_VERSION=0\n", settled), []);
    }

    #[test]
    fn both_say_of_which_version_they_are() {
        let config = "#\n# Automatically generated file; DO NOT EDIT.\n# Linux/x86 6.12.107 Kernel Configuration\n#\n";
        assert_eq!(version(config), Some("6.12.107"));
        assert_eq!(version("CONFIG_A=y\n"), None);
        let makefile =
            "# x\nVERSION = 6\nPATCHLEVEL = 12\nSUBLEVEL = 107\nEXTRAVERSION =\nNAME = Baby\n";
        assert_eq!(source_version(makefile).as_deref(), Some("6.12.107"));
        assert_eq!(source_version(""), None);
    }
}
