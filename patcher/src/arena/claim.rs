//! The modules that a patch's places lie in. A module can be unloaded and its memory given to others while a patch is
//! applied: its places are then no longer the patch's. Owns telling those that are still there.

use serde::{Deserialize, Serialize};

use vmpatch_introspect::modules::{ModulePlace, ModuleState};
use vmpatch_introspect::{Gva, GvaRange};

use super::manifest::{PatchRecord, SiteRecord};

/// A module as it was when a patch was placed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleClaim {
    /// Its name.
    pub name: String,
    /// Its `struct module`.
    pub at: Gva,
    /// Its core text.
    pub text: GvaRange,
}

impl ModuleClaim {
    /// Whether it is still loaded where it was.
    #[must_use]
    pub fn is_loaded(&self, modules: &[ModulePlace]) -> bool {
        self.found_in(modules).is_some()
    }

    /// Whether it is still loaded where it was, and not just being unloaded.
    #[must_use]
    pub fn is_live(&self, modules: &[ModulePlace]) -> bool {
        let found = self.found_in(modules);
        found.is_some_and(|module| module.state == ModuleState::Live)
    }

    fn found_in<'a>(&self, modules: &'a [ModulePlace]) -> Option<&'a ModulePlace> {
        let same = |module: &&ModulePlace| module.at == self.at && module.text == self.text;
        modules.iter().find(same)
    }
}

impl PatchRecord {
    /// The modules of it that are no longer loaded where they were.
    #[must_use]
    pub fn unloaded(&self, modules: &[ModulePlace]) -> Vec<ModuleClaim> {
        let claims = self.modules.iter();
        claims
            .filter(|claim| !claim.is_loaded(modules))
            .cloned()
            .collect()
    }

    /// Its places that lie in none of these modules.
    pub fn sites_outside<'a>(
        &'a self,
        unloaded: &'a [ModuleClaim],
    ) -> impl DoubleEndedIterator<Item = &'a SiteRecord> + Clone {
        let is_inside = |site: &SiteRecord| unloaded.iter().any(|it| it.text.contains(site.at));
        self.sites.iter().filter(move |site| !is_inside(site))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::*;

    const TEXT: GvaRange = GvaRange {
        start: Gva(0x1000),
        end: Gva(0x2000),
    };

    fn place(state: ModuleState) -> ModulePlace {
        ModulePlace {
            at: Gva(0x9000),
            state,
            text: TEXT,
            init_text: None,
            orc: None,
        }
    }

    #[test]
    fn places_in_a_module_that_is_gone_are_no_longer_the_patchs() {
        let mut record = record("fix");
        record.modules = vec![ModuleClaim {
            name: "loop".into(),
            at: Gva(0x9000),
            text: TEXT,
        }];
        let loaded = [place(ModuleState::Live)];
        assert!(record.unloaded(&loaded).is_empty());
        let elsewhere = ModulePlace {
            at: Gva(0xa000),
            ..loaded[0]
        };
        let gone = record.unloaded(&[elsewhere]);
        assert_eq!(gone, record.modules);
        assert_eq!(record.sites_outside(&gone).count(), 0);
        assert_eq!(record.sites_outside(&[]).count(), 1);
    }

    #[test]
    fn a_module_that_is_being_unloaded_is_loaded_but_not_live() {
        let claim = ModuleClaim {
            name: "loop".into(),
            at: Gva(0x9000),
            text: TEXT,
        };
        let going = [place(ModuleState::Going)];
        assert!(claim.is_loaded(&going) && !claim.is_live(&going));
        assert!(claim.is_live(&[place(ModuleState::Live)]));
    }
}
