//! What its section makes of a variable in a running guest. The guest's own stands for the new version's only if both are
//! treated alike. Owns the classes and which of them stands for which.

use super::policy;
use crate::object::Section;

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// Freed when the guest had booted.
    Init,
    /// Its address is the distance from each CPU's own (Linux v6.12 include/linux/percpu-defs.h).
    PerCpu,
    /// Read-only from the end of boot on (`__ro_after_init`, Linux v6.12 include/linux/cache.h).
    Sealed,
    /// Read-only.
    ReadOnly,
    /// Writable, wherever it lies.
    Plain,
}

impl Class {
    /// That of a section of data.
    pub(super) fn of(section: &Section) -> Self {
        match section.name.as_str() {
            name if policy::is_init(name) => Self::Init,
            name if name.starts_with(policy::PER_CPU) => Self::PerCpu,
            ".data..ro_after_init" => Self::Sealed,
            _ if section.flags.write => Self::Plain,
            _ => Self::ReadOnly,
        }
    }

    /// Why what the guest has of this class cannot be what the new version has of another; `None`: it can.
    pub(super) fn cannot_be(self, new: Self) -> Option<&'static str> {
        match (self, new) {
            // Plain memory does what less than that would do.
            (Self::Plain, Self::Sealed | Self::Init) => None,
            _ if self == new => None,
            (Self::Init, _) => Some("it was init data, which the guest has freed"),
            (Self::PerCpu, _) => {
                Some("it was a per-CPU variable, and the guest has one for each CPU")
            }
            (_, Self::PerCpu) => {
                Some("it becomes a per-CPU variable, and the guest has only one for all CPUs")
            }
            (Self::Sealed, _) => {
                Some("it was __ro_after_init, and the guest can no longer write it")
            }
            (Self::ReadOnly, _) => Some("it was read-only, and the guest cannot write it"),
            (Self::Plain, _) => Some("it becomes read-only, and the guest may have written it"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_do_as_much_stands_for_a_variable() {
        use Class::{Init, PerCpu, Plain, ReadOnly, Sealed};
        let all = [Init, PerCpu, Sealed, ReadOnly, Plain];
        for old in all {
            for new in all {
                let stands = old == new || old == Plain && [Sealed, Init].contains(&new);
                assert_eq!(old.cannot_be(new).is_none(), stands, "{old:?} {new:?}");
            }
        }
    }
}
