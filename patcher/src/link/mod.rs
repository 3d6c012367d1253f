//! A patch placed for one live guest: every symbol resolved, every relocation applied, every entry jump
//! chosen. Reads the guest while it runs; writes nothing.
//!
//! The order is [`plan`]'s: what is patched already ([`layers`]), where they are (run-pre matching in
//! [`verify`](crate::verify)), whether they can be replaced ([`region`], [`tracing`]), where the jump goes ([`entry`]),
//! where the new code lies ([`place`]) and what it becomes there ([`code`]), by what this boot decided
//! ([`boot`]); what the kernel finds when it traps ([`traps`]) and how it comes to look there ([`hooks`]); how stacks are
//! followed through it ([`unwind`]).

pub mod boot;
pub mod code;
pub mod entry;
pub mod hooks;
pub mod layers;
pub mod live;
pub mod names;
pub mod pieces;
pub mod place;
pub mod plan;
pub mod region;
pub mod relocate;
pub mod tracing;
pub mod traps;
pub mod unwind;

pub use live::{Guest, Live};
pub use plan::{LinkError, Plan};

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;

    use vmpatch_introspect::{Gpa, Gva, GvaRange, ReadError};

    use super::boot::returns::Returns;
    use super::boot::{Facts, Rules};
    use super::live::Live;
    use crate::patch::VMLINUX;

    /// A boot with no mitigation and no features.
    pub(crate) fn facts() -> Facts {
        Facts {
            rules: Rules::Single,
            features: None,
            returns: Returns::Plain,
            indirect: None,
            call_padding: None,
            ibt: false,
            isolated: false,
            paravirt_nop: None,
            paravirt_bug: None,
        }
    }

    /// A guest of a few named bytes.
    #[derive(Default)]
    pub(crate) struct Fake {
        /// Object, name, address.
        names: Vec<(String, String, Gva)>,
        bytes: BTreeMap<u64, u8>,
        init: Option<GvaRange>,
    }

    impl Fake {
        pub(crate) fn new() -> Self {
            Self::default()
        }

        pub(crate) fn name(&mut self, name: &str, at: Gva) {
            self.name_in(VMLINUX, name, at);
        }

        pub(crate) fn name_in(&mut self, object: &str, name: &str, at: Gva) {
            self.names.push((object.to_owned(), name.to_owned(), at));
        }

        pub(crate) fn init(&mut self, range: GvaRange) {
            self.init = Some(range);
        }

        pub(crate) fn put(&mut self, at: Gva, bytes: &[u8]) {
            for (offset, byte) in bytes.iter().enumerate() {
                self.bytes.insert(at.0 + offset as u64, *byte);
            }
        }
    }

    impl Live for Fake {
        fn is_init(&self, at: Gva) -> bool {
            self.init.is_some_and(|init| init.contains(at))
        }

        fn named(&self, name: &str) -> Vec<Gva> {
            self.defined_in(VMLINUX, name)
        }

        fn named_in(&self, object: &str, name: &str) -> Vec<Gva> {
            let own = self.defined_in(object, name);
            if own.is_empty() {
                self.named(name)
            } else {
                own
            }
        }

        fn defined_in(&self, object: &str, name: &str) -> Vec<Gva> {
            let names = self.names.iter();
            let matching = names.filter(|(of, it, _)| of == object && it == name);
            matching.map(|(.., at)| *at).collect()
        }

        fn read(&self, at: Gva, into: &mut [u8]) -> Result<(), ReadError> {
            for (offset, byte) in into.iter_mut().enumerate() {
                let place = at.0 + offset as u64;
                *byte = *self
                    .bytes
                    .get(&place)
                    .ok_or(ReadError::NotMapped(Gva(place)))?;
            }
            Ok(())
        }

        fn physical(&self, at: Gva) -> Result<Gpa, ReadError> {
            Ok(Gpa(at.0 & 0x3fff_ffff))
        }

        fn describe(&self, at: Gva) -> String {
            at.to_string()
        }
    }
}
