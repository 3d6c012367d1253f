//! The modules that a patch's places lie in. A module can be unloaded and its memory given to others while a patch is
//! applied: its places are then no longer the patch's, also where it was loaded again at the same address but in other
//! frames. Owns telling those that are still there.

use serde::{Deserialize, Serialize};

use vmpatch_introspect::modules::{ModulePlace, ModuleState};
use vmpatch_introspect::{AddressSpace, Gpa, Gva, GvaRange, PhysicalMemory};

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
    /// Pages of it that the patch changes, and the frames they lie in.
    pub frames: Vec<(Gva, Gpa)>,
}

/// The modules that are loaded now.
#[derive(Clone, Copy, Debug, Default)]
pub struct Loaded<'a> {
    /// Where they lie.
    pub places: &'a [ModulePlace],
    /// The kernel's address space.
    pub space: Option<AddressSpace>,
}

impl ModuleClaim {
    /// Whether it is still loaded where it was.
    #[must_use]
    pub fn is_loaded(&self, loaded: Loaded<'_>, memory: &dyn PhysicalMemory) -> bool {
        self.found_in(loaded, memory).is_some()
    }

    /// Whether it is still loaded where it was, and not just being unloaded.
    #[must_use]
    pub fn is_live(&self, loaded: Loaded<'_>, memory: &dyn PhysicalMemory) -> bool {
        let found = self.found_in(loaded, memory);
        found.is_some_and(|module| module.state == ModuleState::Live)
    }

    /// Whether a byte lies in one of the frames that are changed.
    #[must_use]
    pub fn has_frame(&self, at: Gpa) -> bool {
        let mut frames = self.frames.iter();
        frames.any(|(_, frame)| *frame == at.page_base())
    }

    fn found_in<'a>(
        &self,
        loaded: Loaded<'a>,
        memory: &dyn PhysicalMemory,
    ) -> Option<&'a ModulePlace> {
        let same = |module: &&ModulePlace| module.at == self.at && module.text == self.text;
        let found = loaded.places.iter().find(same)?;
        let space = loaded.space?;
        let frame = |page| space.translate(memory, page).ok().flatten().map(|it| it.at);
        let mut frames = self.frames.iter();
        frames
            .all(|(page, there)| frame(*page) == Some(*there))
            .then_some(found)
    }
}

impl PatchRecord {
    /// The modules of it that are no longer loaded where they were.
    #[must_use]
    pub fn unloaded(&self, loaded: Loaded<'_>, memory: &dyn PhysicalMemory) -> Vec<ModuleClaim> {
        let claims = self.modules.iter();
        claims
            .filter(|claim| !claim.is_loaded(loaded, memory))
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
    use super::super::tests::{Slot, kernel, record};
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

    fn claim(frames: Vec<(Gva, Gpa)>) -> ModuleClaim {
        ModuleClaim {
            name: "loop".into(),
            at: Gva(0x9000),
            text: TEXT,
            frames,
        }
    }

    fn loaded(places: &[ModulePlace]) -> Loaded<'_> {
        let space = Some(kernel().layout.space);
        Loaded { places, space }
    }

    #[test]
    fn places_in_a_module_that_is_gone_are_no_longer_the_patchs() {
        let (slot, mut record) = (Slot::new(), record("fix"));
        record.modules = vec![claim(Vec::new())];
        let there = [place(ModuleState::Live)];
        assert!(record.unloaded(loaded(&there), &slot).is_empty());
        let elsewhere = [ModulePlace {
            at: Gva(0xa000),
            ..there[0]
        }];
        let gone = record.unloaded(loaded(&elsewhere), &slot);
        assert_eq!(gone, record.modules);
        assert_eq!(record.sites_outside(&gone).count(), 0);
        assert_eq!(record.sites_outside(&[]).count(), 1);
    }

    #[test]
    fn a_module_at_the_same_address_in_other_frames_is_another_one() {
        let slot = Slot::new();
        // Entries 511 of two levels lead to a third table, whose first entry is this page.
        let page = Gva(0xffff_ffff_c000_0000);
        slot.write(Gpa(0x3000), &0x4063_u64.to_le_bytes());
        slot.write(Gpa(0x4000), &0x5063_u64.to_le_bytes());
        let there = [place(ModuleState::Live)];
        let at = |frame| claim(vec![(page, frame)]).is_loaded(loaded(&there), &slot);
        assert!(at(Gpa(0x5000)));
        assert!(!at(Gpa(0x6000)));
    }

    #[test]
    fn a_module_that_is_being_unloaded_is_loaded_but_not_live() {
        let (slot, claim) = (Slot::new(), claim(Vec::new()));
        let going = [place(ModuleState::Going)];
        assert!(claim.is_loaded(loaded(&going), &slot));
        assert!(!claim.is_live(loaded(&going), &slot));
        assert!(claim.is_live(loaded(&[place(ModuleState::Live)]), &slot));
    }
}
