//! The manifest: what the arena holds, kept in the arena itself, so that `status` and `rollback` work when
//! the host's journal is lost. Whether a patch is applied is not written down: the patched sites say it.

use serde::{Deserialize, Serialize};

use vmpatch_introspect::address::PAGE_SIZE;
use vmpatch_introspect::target::{Edit, MemoryError};
use vmpatch_introspect::{Gpa, Gva, GvaRange, PhysicalMemory};

use super::claim::ModuleClaim;
use super::fixed::FIXED_PAGES;
use super::window::{WINDOW_PAGES, page_address};
use crate::patch::check::{MAX_SYMBOL_NAME, patch_name};
use crate::patch::{CallbackKind, SectionKind};
use crate::unwind::Rows;

/// All that one boot of one guest has in its arena.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The boot it belongs to ([`Identity::boot`](vmpatch_introspect::identity::Identity::boot)).
    pub boot: String,
    /// Counts up with each change; the valid copy with the higher one counts.
    pub generation: u64,
    /// First page of the window that no extent has taken.
    pub next_page: u32,
    /// Patches placed so far, applied or not, oldest first.
    pub patches: Vec<PatchRecord>,
}

/// One patch in the arena.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PatchRecord {
    /// Its name.
    pub name: String,
    /// SHA-256 of its content, lower-case hex.
    pub digest: String,
    /// Pages it takes.
    pub extents: Vec<Extent>,
    /// Modules that some of the places lie in.
    pub modules: Vec<ModuleClaim>,
    /// Places in the guest's text that it changes.
    pub sites: Vec<SiteRecord>,
    /// Code that no task may stand in while it is applied or rolled back.
    pub busy: Vec<BusyRange>,
    /// Places in the guest's text that it needs changed and shares with every patch that needs them too: entries
    /// of the kernel's own look-ups. There while any of these patches is applied. They say nothing of its state.
    pub hooks: Vec<SiteRecord>,
    /// How to unwind from its code, among its constants; `None` where that is not known.
    pub unwind: Option<Rows>,
    /// Functions of it that are called when it is applied or rolled back, at most one of a kind.
    pub callbacks: Vec<CallbackRecord>,
}

/// A function of a patch that is called within the stop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallbackRecord {
    /// When.
    pub kind: CallbackKind,
    /// Its name.
    pub function: String,
    /// Its entry.
    pub at: Gva,
}

/// A run of whole pages of the window, mapped alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// First page.
    pub page: u32,
    /// How many.
    pub pages: u32,
    /// How they are mapped.
    pub kind: SectionKind,
}

/// One place in the guest's text that a patch changes: a jump near the entry of one function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteRecord {
    /// The function, for messages.
    pub function: String,
    /// What stands there.
    pub role: SiteRole,
    /// Where.
    pub at: Gva,
    /// The same place in guest-physical memory, page by page: `old` and `new` cut where a page ends.
    pub edits: Vec<Edit>,
    /// Whole instructions that the change covers.
    pub covered: GvaRange,
}

/// What a place that a patch changes is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SiteRole {
    /// The jump that is met when the function is entered.
    Entry,
    /// The long jump in the padding before a function whose entry has room for a short one only.
    Padding,
}

/// Code that must stand on no stack and under no instruction pointer while a patch is applied or rolled
/// back. The rule is livepatch's (Linux v6.12 kernel/livepatch/transition.c, `klp_check_stack_func`): a
/// frame is busy if the address to look it up by
/// ([`Frame::lookup`](vmpatch_introspect::unwind::Frame::lookup)) lies in the range.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BusyRange {
    /// From the first byte of the function to the last, its own padding not included.
    pub range: GvaRange,
    /// The function, for messages.
    pub function: String,
    /// Which side of the replacement it is.
    pub kind: BusyKind,
}

/// What a busy range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BusyKind {
    /// A function being replaced: counts when a patch is applied.
    Old,
    /// A cold part of one: counts when a patch is applied.
    OldPart,
    /// New code in the arena: counts when a patch is rolled back.
    New,
}

impl PatchRecord {
    /// All places that it changes or needs changed.
    pub fn places(&self) -> impl Iterator<Item = &SiteRecord> {
        self.sites.iter().chain(&self.hooks)
    }

    /// The edits of its own sites that apply it, in order.
    #[must_use]
    pub fn apply_edits(&self) -> Vec<Edit> {
        self.sites
            .iter()
            .flat_map(|site| site.edits.iter().cloned())
            .collect()
    }

    /// The edits of its own sites that roll it back, in order, but for what lies in modules that are gone.
    #[must_use]
    pub fn rollback_edits(&self, unloaded: &[ModuleClaim]) -> Vec<Edit> {
        self.sites_outside(unloaded)
            .rev()
            .flat_map(|site| site.edits.iter().rev().map(Edit::reversed))
            .collect()
    }

    /// What must not run while it is applied.
    pub fn busy_for_apply(&self) -> impl Iterator<Item = &BusyRange> {
        self.busy.iter().filter(|busy| busy.kind != BusyKind::New)
    }

    /// What must not run while it is rolled back.
    pub fn busy_for_rollback(&self) -> impl Iterator<Item = &BusyRange> {
        self.busy.iter().filter(|busy| busy.kind == BusyKind::New)
    }
}

impl Manifest {
    /// A manifest for a boot that has none yet, newer than what an earlier boot may have left.
    #[must_use]
    pub fn fresh(boot: &str, generation: u64) -> Self {
        Self {
            boot: boot.to_owned(),
            generation,
            next_page: FIXED_PAGES,
            patches: Vec::new(),
        }
    }

    /// Whether it is possible: extents lie between the fixed pages and `next_page`, edits within a
    /// page and as long on both sides, names are such as this program gives. A guest can write to the slot, so
    /// nothing else is believed.
    #[must_use]
    pub fn check(&self) -> bool {
        (FIXED_PAGES..=WINDOW_PAGES).contains(&self.next_page)
            && self.patches.iter().all(|patch| patch.check(self.next_page))
    }
}

impl PatchRecord {
    fn check(&self, next_page: u32) -> bool {
        let extents = self.extents.iter().all(|extent| {
            let end = extent.page.checked_add(extent.pages);
            FIXED_PAGES <= extent.page && end.is_some_and(|end| end <= next_page)
        });
        let mut places = self.places();
        let mut callbacks = self.callbacks.iter();
        extents
            && self.unwind.is_none_or(|rows| self.has_constants(rows))
            && self.names_are_ours()
            && places.all(SiteRecord::check)
            && callbacks.all(|it| self.has_text_at(it.at))
    }

    /// Whether rows lie among its constants.
    fn has_constants(&self, rows: Rows) -> bool {
        let end = rows
            .size()
            .and_then(|size| rows.at.checked_add(size as u64));
        self.extents.iter().any(|extent| {
            let start = page_address(extent.page);
            let past = page_address(extent.page.saturating_add(extent.pages));
            let within = start <= rows.at && end.is_some_and(|end| end <= past);
            extent.kind == SectionKind::ReadOnly && within
        })
    }

    /// Whether an address lies in text that it brings.
    fn has_text_at(&self, at: Gva) -> bool {
        let text = self
            .extents
            .iter()
            .filter(|it| it.kind == SectionKind::Text);
        let offset = at.0.wrapping_sub(page_address(0).0) / PAGE_SIZE;
        text.map(|it| u64::from(it.page)..u64::from(it.page) + u64::from(it.pages))
            .any(|pages| pages.contains(&offset))
    }

    /// The function of it that is called so.
    #[must_use]
    pub fn callback(&self, kind: CallbackKind) -> Option<&CallbackRecord> {
        self.callbacks.iter().find(|it| it.kind == kind)
    }

    /// Names reach terminals and file names: none may be empty, endless or of other characters than a patch file
    /// can bring there. A digest has no more kinds of characters than a name.
    fn names_are_ours(&self) -> bool {
        let plain = |name: &str| patch_name(name).is_ok();
        let of_sites = self.places().map(|site| &site.function);
        let of_busy = self.busy.iter().map(|busy| &busy.function);
        let of_modules = self.modules.iter().map(|module| &module.name);
        let of_callbacks = self.callbacks.iter().map(|it| &it.function);
        plain(&self.name)
            && plain(&self.digest)
            && of_sites
                .chain(of_busy)
                .chain(of_modules)
                .chain(of_callbacks)
                .all(|name| function_name(name))
    }
}

impl SiteRecord {
    /// Whether it holds its new bytes.
    ///
    /// # Errors
    /// It lies outside guest RAM.
    pub fn is_in_place(&self, physical: &dyn PhysicalMemory) -> Result<bool, MemoryError> {
        for edit in &self.edits {
            let mut now = vec![0; edit.new.len()];
            physical.read(edit.at, &mut now)?;
            if now != edit.new {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn check(&self) -> bool {
        let possible = |edit: &Edit| {
            let length = edit.old.len() as u64;
            edit.new.len() as u64 == length && edit.at.page_offset() + length <= PAGE_SIZE
        };
        !self.edits.is_empty() && self.edits.iter().all(possible)
    }
}

/// Symbols of kernel objects, and what stands for made code: `fix (made code)`.
fn function_name(name: &str) -> bool {
    let visible = |byte: u8| byte == b' ' || byte.is_ascii_graphic();
    (1..=MAX_SYMBOL_NAME).contains(&name.len()) && name.bytes().all(visible)
}

/// Why the manifest cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// The slot cannot be read.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Neither copy is whole.
    #[error("the arena at {at} holds a manifest that is damaged: {what}")]
    Damaged {
        /// The slot.
        at: Gpa,
        /// What is wrong.
        what: String,
    },
    /// Written by another version of this program.
    #[error("the arena's manifest has format {found}, this program reads format {known}")]
    OtherVersion {
        /// What the manifest says.
        found: u32,
        /// What this program knows.
        known: u32,
    },
    /// More than one copy can hold.
    #[error("the arena's manifest would have {size} bytes, it can have {limit}")]
    TooLarge {
        /// Its size in bytes.
        size: usize,
        /// Most bytes it can have.
        limit: usize,
    },
    /// It cannot be encoded.
    #[error("the arena's manifest cannot be encoded: {0}")]
    Encode(postcard::Error),
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::*;

    /// Whether a manifest with this record, changed so, is believed.
    fn believed(change: impl Fn(&mut PatchRecord)) -> bool {
        let mut manifest = Manifest::fresh("boot", 1);
        let mut changed = record("fix");
        change(&mut changed);
        manifest.patches.push(changed);
        manifest.check()
    }

    #[test]
    fn unwind_data_outside_of_a_patchs_constants_is_not_believed() {
        let constants = Extent {
            page: FIXED_PAGES,
            pages: 1,
            kind: SectionKind::ReadOnly,
        };
        let start = page_address(FIXED_PAGES);
        let placed = |at, count, kind| {
            let mut manifest = Manifest::fresh("boot", 1);
            manifest.next_page = FIXED_PAGES + 1;
            let mut record = record("fix");
            record.extents = vec![Extent { kind, ..constants }];
            record.unwind = Some(Rows { at, count, crc: 0 });
            manifest.patches.push(record);
            manifest.check()
        };
        let most = (PAGE_SIZE / 12) as u32;
        assert!(placed(start, most, SectionKind::ReadOnly));
        assert!(!placed(start, most + 1, SectionKind::ReadOnly));
        assert!(!placed(start, u32::MAX, SectionKind::ReadOnly));
        assert!(!placed(start.wrapping_sub(12), 1, SectionKind::ReadOnly));
        assert!(!placed(start, 1, SectionKind::Data));
        assert!(!placed(Gva(u64::MAX), 1, SectionKind::ReadOnly));
    }

    #[test]
    fn a_record_with_a_name_that_no_patch_can_have_is_not_believed() {
        assert!(believed(|_| {}));
        assert!(believed(
            |it| it.sites[0].function = "fix (made code)".into()
        ));
        let long = "x".repeat(MAX_SYMBOL_NAME + 1);
        for name in ["", "../fix", "a/b", "a\nb", "\x1b[2J", "fix\u{202e}", &long] {
            assert!(!believed(|it| it.name = name.into()), "{name:?}");
            assert!(!believed(|it| it.digest = name.into()), "{name:?}");
        }
        for name in ["", "\x1b[2J", "f\0", "f\u{202e}", &long] {
            assert!(
                !believed(|it| it.sites[0].function = name.into()),
                "{name:?}"
            );
        }
    }

    #[test]
    fn a_callback_outside_of_the_patchs_own_text_is_not_believed() {
        let page = FIXED_PAGES;
        let with = |kind, at| {
            let mut manifest = Manifest::fresh("boot", 1);
            let mut patch = record("fix");
            let pages = 1;
            patch.extents = vec![Extent { page, pages, kind }];
            patch.callbacks = vec![CallbackRecord {
                kind: CallbackKind::PreApply,
                function: "f".into(),
                at,
            }];
            manifest.next_page = page + 1;
            manifest.patches.push(patch);
            manifest.check()
        };
        let first = page_address(page);
        assert!(with(SectionKind::Text, first.wrapping_add(0xff0)));
        assert!(!with(SectionKind::Data, first));
        assert!(!with(SectionKind::Text, first.wrapping_add(0x1000)));
        assert!(!with(SectionKind::Text, Gva(0xffff_ffff_8100_0000)));
    }
}
