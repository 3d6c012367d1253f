//! A plan: a patch placed for one boot of one guest. Owns the order of linking; each step is a file beside
//! this one.

use vmpatch_introspect::modules::ModuleState;
use vmpatch_introspect::target::Edit;
use vmpatch_introspect::{Gpa, Gva, GvaRange, ReadError};

use super::boot::Facts;
use super::boot::facts::FactsError;
use super::code::{self, CodeError, Context};
use super::entry::{self, Body, Entry, EntryError};
use super::hooks::{self, HookError, Hooks};
use super::layers::{self, LayerError, Layers};
use super::live::{Guest, Live};
use super::names::{Learned, Names};
use super::place::{Placement, Shape};
use super::region::{self, RegionError};
use super::relocate::{self, OutOfReach};
use super::tracing::{self, TracingError};
use super::traps::{self, Parts};
use super::unwind;
use crate::arena::fixed::Fixtures;
use crate::arena::window::{self, WindowError};
use crate::arena::{
    Arena, ArenaError, BusyKind, BusyRange, CallbackRecord, ModuleClaim, PatchRecord, SiteRecord,
    SiteRole,
};
use crate::patch::file::PatchFile;
use crate::patch::{Callback, Patch, Replacement, SectionKind};
use crate::unwind::rows::{self, Rows};
use crate::verify::locate::{LocateError, Located, Wanted};
use crate::verify::run_pre::Matcher;

/// A patch placed for one boot of one guest. Nothing is written yet.
#[derive(Debug)]
pub struct Plan<'a> {
    /// The patch.
    pub(crate) patch: &'a Patch,
    /// What the boot decided.
    pub(crate) facts: Facts,
    /// The old functions.
    pub(crate) located: Vec<Located>,
    /// What the manifest will say.
    pub(crate) record: PatchRecord,
    /// Bytes of the record's extents.
    pub(crate) contents: Vec<Vec<u8>>,
    /// What goes into the arena's fixed pages.
    pub(crate) fixtures: Fixtures,
    /// New functions, in the order of the patch.
    pub(crate) new: Vec<GvaRange>,
    /// For each of them the patch whose version it takes the place of.
    pub(crate) over: Vec<Option<String>>,
    /// The patches that are there.
    pub(crate) layers: &'a Layers,
    /// Whether arena pages are global.
    pub(crate) global: bool,
}

/// Why a patch cannot be placed for a guest.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// It was made for another kernel.
    #[error("the patch is for kernel {wanted}, the guest runs {found}")]
    WrongKernel {
        /// Release or build id that the patch asks for.
        wanted: String,
        /// What the guest has.
        found: String,
    },
    /// A module that it changes is not there.
    #[error("the patch changes module `{module}`, which is {state}")]
    Module {
        /// The module.
        module: String,
        /// What it is instead of live.
        state: &'static str,
    },
    /// What the boot decided cannot be told.
    #[error(transparent)]
    Facts(#[from] FactsError),
    /// Another patch is in the way.
    #[error(transparent)]
    Layers(#[from] LayerError),
    /// An old function does not run.
    #[error(transparent)]
    Locate(#[from] LocateError),
    /// An old function lies where none can be replaced.
    #[error("`{function}` cannot be replaced: {why}")]
    Region {
        /// The function.
        function: String,
        /// Why not.
        why: RegionError,
    },
    /// The guest's own ftrace might never let the jump be reached.
    #[error("`{function}` cannot be replaced: {why}")]
    Tracing {
        /// The function.
        function: String,
        /// Why not.
        why: TracingError,
    },
    /// No place for the jump.
    #[error("`{function}` cannot be entered by a jump: {why}")]
    Entry {
        /// The function.
        function: String,
        /// Why not.
        why: EntryError,
    },
    /// The kernel would not find what new code needs when it traps.
    #[error(
        "new code has a WARN, a BUG or an access that may fault, and `{function}` cannot be hooked: {why}"
    )]
    Hook {
        /// The function that the kernel looks up by.
        function: &'static str,
        /// Why not.
        why: HookError,
    },
    /// New code cannot be made ready.
    #[error(transparent)]
    Code(#[from] CodeError),
    /// The new function is out of the jump's reach.
    #[error(transparent)]
    Far(#[from] OutOfReach),
    /// No room, or the arena cannot be used.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// The guest's page tables cannot be read.
    #[error(transparent)]
    Window(#[from] WindowError),
    /// Guest memory cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
}

impl LinkError {
    /// Both versions of an old function side by side, where it is not what runs.
    #[must_use]
    pub fn difference(&self) -> &[String] {
        match self {
            Self::Locate(error) => error.difference(),
            _ => &[],
        }
    }
}

impl<'a> Plan<'a> {
    /// Places a patch upon others or in their place: finds the old functions, chooses entry jumps, and makes the new code
    /// ready. What was placed before and rolled back is taken up again where it lies, if it comes out the same and has no
    /// data of its own: a table of WARN and BUG counts as such, for the kernel marks in it what has warned.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn link(
        file: &'a PatchFile,
        guest: &Guest<'_>,
        arena: &Arena,
        layers: &'a Layers,
    ) -> Result<Self, LinkError> {
        let patch = file.patch();
        fits(patch, guest)?;
        let memory = guest.memory().physical;
        let (beneath, ground) = (layers.beneath(memory), layers.ground(memory));
        let (beneath, ground) = (guest.over(&beneath), guest.over(&ground));
        let facts = guest.facts()?;
        let names = Names::look_up(&patch.symbols, &patch.units, guest);
        let needed = traps::needed(patch);
        let hooks = hooks::choose(&needed, &ground, &facts, arena, layers)
            .map_err(|(function, why)| LinkError::Hook { function, why })?;
        let linker = Linker {
            patch,
            hooks: &hooks,
            digest: file.digest().to_string(),
            guest,
            arena,
            facts: &facts,
            names: &names,
            layers,
            beneath: &beneath,
            ground: &ground,
        };
        let (located, learned) = linker.locate()?;
        linker.hooks_are_apart(&located)?;
        let entries = linker.entries(&located)?;
        let upon = linker.upon(&located)?;
        let over = upon.iter().map(|it| it.map(|record| record.name.clone()));
        let over = over.collect();
        let replaced = Replaced {
            located: &located,
            entries: &entries,
            upon: &upon,
        };
        let placed = linker.place(&replaced, &learned)?;
        let global = !facts.isolated
            && window::is_global(guest.kernel().layout.space, memory, text_start(guest))?;
        Ok(Self {
            patch,
            located,
            record: placed.record,
            contents: placed.contents,
            fixtures: placed.fixtures,
            new: placed.new,
            over,
            layers,
            global,
            facts,
        })
    }

    /// What the manifest will say of it.
    #[must_use]
    pub const fn record(&self) -> &PatchRecord {
        &self.record
    }
}

fn text_start(guest: &Guest<'_>) -> Gva {
    guest.kernel().layout.text.start
}

/// Whether the patch was made for this kernel, as far as it says.
fn fits(patch: &Patch, guest: &Guest<'_>) -> Result<(), LinkError> {
    let identity = &guest.kernel().identity;
    let release = (patch.requires.release.as_ref(), Some(&identity.release));
    let build_id = (patch.requires.build_id.as_ref(), identity.build_id.as_ref());
    for (wanted, found) in [release, build_id] {
        if let (Some(wanted), Some(found)) = (wanted, found)
            && wanted != found
        {
            let (wanted, found) = (wanted.clone(), found.clone());
            return Err(LinkError::WrongKernel { wanted, found });
        }
    }
    patch
        .modules()
        .into_iter()
        .try_for_each(|name| is_live(name, guest))
}

fn is_live(name: &str, guest: &Guest<'_>) -> Result<(), LinkError> {
    let state = match guest.module(name).map(|module| module.state) {
        Some(ModuleState::Live) => return Ok(()),
        Some(ModuleState::Coming | ModuleState::Unformed) => "just being loaded",
        Some(ModuleState::Going) => "just being unloaded",
        None => "not loaded",
    };
    let module = name.to_owned();
    Err(LinkError::Module { module, state })
}

/// What came of placing.
struct Placed {
    record: PatchRecord,
    contents: Vec<Vec<u8>>,
    fixtures: Fixtures,
    new: Vec<GvaRange>,
}

struct Linker<'a> {
    patch: &'a Patch,
    hooks: &'a Hooks,
    digest: String,
    guest: &'a Guest<'a>,
    arena: &'a Arena,
    facts: &'a Facts,
    names: &'a Names<'a>,
    layers: &'a Layers,
    /// The guest without what other patches did to it.
    beneath: &'a Guest<'a>,
    /// The guest without what the patches did that the new one takes the place of.
    ground: &'a Guest<'a>,
}

/// The old functions of a patch, one of each for every one.
struct Replaced<'a> {
    located: &'a [Located],
    entries: &'a [Entry],
    /// The patch whose version of it is in effect, and stays.
    upon: &'a [Option<&'a PatchRecord>],
}

impl Linker<'_> {
    /// Finds every old function, and learns from them what open symbols are.
    fn locate(&self) -> Result<(Vec<Located>, Learned), LinkError> {
        let matcher = Matcher {
            live: self.beneath,
            facts: self.facts,
            names: self.names,
        };
        let mut learned = Learned::new();
        let mut all = Vec::with_capacity(self.patch.replaced.len());
        for wanted in &self.patch.replaced {
            let object = Wanted::of(self.patch, wanted).object;
            self.is_clear(wanted, object)?;
            let located = matcher
                .locate(Wanted::of(self.patch, wanted), &mut learned)
                .map_err(|error| self.rather_its_region(error, object))?;
            for range in std::iter::once(&located.range).chain(&located.parts) {
                region::check(*range, object, self.guest).map_err(|why| LinkError::Region {
                    function: wanted.name.clone(),
                    why,
                })?;
            }
            all.push(located);
        }
        Ok((all, learned))
    }

    /// What was init code is poisoned and differs everywhere: the place says more than the bytes.
    fn rather_its_region(&self, error: LocateError, object: &str) -> LinkError {
        if let LocateError::Differs { name, at, .. } = &error
            && let Some(range) = GvaRange::sized(*at, 1)
            && let Err(why) = region::check(range, object, self.guest)
        {
            let function = name.clone();
            return LinkError::Region { function, why };
        }
        error.into()
    }

    /// Before it is compared: what a patch left behind half done would only read as a difference.
    fn is_clear(&self, wanted: &Replacement, object: &str) -> Result<(), LayerError> {
        for at in self.guest.defined_in(object, &wanted.name) {
            if let Some(range) = GvaRange::sized(at, wanted.old.bytes.len() as u64) {
                self.layers.upon(&wanted.name, range)?;
            }
        }
        Ok(())
    }

    /// No function can be both replaced and hooked: one jump would hide the other.
    fn hooks_are_apart(&self, located: &[Located]) -> Result<(), LinkError> {
        let functions = self.patch.replaced.iter().zip(located);
        for (wanted, found) in functions {
            let mut hooks = self.hooks.sites.iter();
            if hooks.any(|site| found.range.contains(site.at)) {
                return Err(LayerError::Hooked {
                    function: wanted.name.clone(),
                    owner: self.patch.name.clone(),
                }
                .into());
            }
        }
        Ok(())
    }

    fn entries(&self, located: &[Located]) -> Result<Vec<Entry>, LinkError> {
        let functions = self.patch.replaced.iter().zip(located);
        functions
            .map(|(wanted, found)| self.entry(wanted, found))
            .collect()
    }

    fn entry(&self, wanted: &Replacement, found: &Located) -> Result<Entry, LinkError> {
        let running = self
            .beneath
            .bytes(found.range.start, wanted.old.bytes.len())?;
        // No function is the first of its text, so there is something before it; what cannot be read is no padding.
        let padding = found.range.start.wrapping_sub(entry::PADDING as u64);
        let before = self
            .beneath
            .bytes(padding, entry::PADDING)
            .unwrap_or_default();
        let parts = wanted.old_parts.iter().zip(&found.parts);
        let parts: Vec<_> = parts
            .map(|(part, range)| {
                let running = self.beneath.bytes(range.start, part.code.bytes.len())?;
                Ok((&part.code, range.start, running))
            })
            .collect::<Result<_, ReadError>>()?;
        let bodies: Vec<_> = parts
            .iter()
            .map(|(code, at, running)| Body {
                code,
                at: *at,
                running,
                before: &[],
            })
            .collect();
        let main = Body {
            code: &wanted.old,
            at: found.range.start,
            running: &running,
            before: &before,
        };
        if let Some(fentry) = entry::fentry(main) {
            let site = main.at.wrapping_add(fentry.offset);
            tracing::check(site, self.guest).map_err(|why| LinkError::Tracing {
                function: wanted.name.clone(),
                why,
            })?;
        }
        entry::choose(main, &bodies).map_err(|why| LinkError::Entry {
            function: wanted.name.clone(),
            why,
        })
    }

    /// Links for the place the same patch had before, if that gives the same again; else for a new one.
    fn place(&self, old: &Replaced<'_>, learned: &Learned) -> Result<Placed, LinkError> {
        let stubs = code::most_stubs(self.patch, self.facts);
        let shape = Shape::of(self.patch, stubs);
        let has_data = self
            .patch
            .sections
            .iter()
            .any(|it| it.kind == SectionKind::Data);
        let before = self.arena.manifest().patches.iter().rev();
        let same = |record: &&PatchRecord| record.digest == self.digest;
        for record in before.filter(same).filter(|_| !has_data) {
            if let Some(placement) = shape.place_again(&record.extents) {
                let placed = self.link_at(&shape, &placement, old, learned)?;
                if placed.record == *record {
                    return Ok(placed);
                }
            }
        }
        let placement = shape.place(self.arena)?;
        self.link_at(&shape, &placement, old, learned)
    }

    fn link_at(
        &self,
        shape: &Shape,
        placement: &Placement,
        old: &Replaced<'_>,
        learned: &Learned,
    ) -> Result<Placed, LinkError> {
        let context = Context {
            patch: self.patch,
            live: self.guest,
            facts: self.facts,
            names: self.names,
            learned,
            placement,
        };
        let linked = code::link(&context, shape.most_pieces())?;
        let mut busy = old_ranges(self.patch, old.located);
        busy.extend(layers_replaced(old.upon));
        busy.extend(new_ranges(
            self.patch,
            placement,
            linked.pieces.bytes.len() as u64,
        ));
        let new: Vec<_> = self
            .patch
            .replaced
            .iter()
            .map(|it| new_function(self.patch, it, placement))
            .collect();
        let sites = self.sites(old.entries, &new)?;
        let unwind = rows::encode(&unwind::rows(self.patch, placement, &linked.pieces));
        let record = PatchRecord {
            name: self.patch.name.clone(),
            digest: self.digest.clone(),
            extents: placement.extents.clone(),
            modules: self.claims(&sites),
            sites,
            busy,
            hooks: self.hooks.sites.clone(),
            unwind: (!unwind.is_empty()).then(|| Rows::of(placement.tables.unwind, &unwind)),
            callbacks: callbacks(self.patch, placement),
        };
        let tables = Parts {
            unwind,
            ..traps::fill(&context)?
        };
        let contents = shape.contents(&linked.sections, &linked.pieces.bytes, &tables);
        let place = |table| (table, placement.tables.table(table));
        let fixtures = Fixtures {
            stubs: self.hooks.stubs.clone(),
            tables: traps::needed(self.patch).into_iter().map(place).collect(),
        };
        Ok(Placed {
            record,
            contents,
            fixtures,
            new,
        })
    }

    /// For each function the patch that has replaced it, and stays.
    fn upon(&self, located: &[Located]) -> Result<Vec<Option<&PatchRecord>>, LayerError> {
        let functions = self.patch.replaced.iter().zip(located);
        functions
            .map(|(wanted, found)| self.layers.upon(&wanted.name, found.range))
            .collect()
    }

    fn claims(&self, sites: &[SiteRecord]) -> Vec<ModuleClaim> {
        let names = self.patch.modules().into_iter();
        let modules = names.filter_map(|name| self.guest.module(name));
        modules
            .map(|module| ModuleClaim {
                name: module.name.clone(),
                at: module.at,
                text: module.text,
                frames: frames(module.text, sites),
            })
            .collect()
    }

    fn sites(&self, entries: &[Entry], new: &[GvaRange]) -> Result<Vec<SiteRecord>, LinkError> {
        let functions = self.patch.replaced.iter().zip(entries).zip(new);
        functions
            .map(|((wanted, entry), new)| {
                let jump = match entry.by {
                    Some(by) => relocate::short_jump(entry.at, by)?.to_vec(),
                    None => relocate::branch(0xe9, entry.at, new.start)?.to_vec(),
                };
                self.site(wanted, SiteRole::Entry, (entry.at, entry.covered), &jump)
            })
            .chain(self.long_jumps(entries, new))
            .collect()
    }

    /// The jumps in the padding that short ones lead to.
    fn long_jumps<'s>(
        &'s self,
        entries: &'s [Entry],
        new: &'s [GvaRange],
    ) -> impl Iterator<Item = Result<SiteRecord, LinkError>> + 's {
        let functions = self.patch.replaced.iter().zip(entries).zip(new);
        functions.filter_map(|((wanted, entry), new)| {
            let by = entry.by?;
            let site = relocate::branch(0xe9, by, new.start).map_err(LinkError::from);
            let covered = sized(by, entry::JUMP);
            Some(site.and_then(|jump| self.site(wanted, SiteRole::Padding, (by, covered), &jump)))
        })
    }

    fn site(
        &self,
        wanted: &Replacement,
        role: SiteRole,
        (at, covered): (Gva, GvaRange),
        jump: &[u8],
    ) -> Result<SiteRecord, LinkError> {
        Ok(SiteRecord {
            function: wanted.name.clone(),
            role,
            at,
            edits: edits(self.ground, at, jump)?,
            covered,
        })
    }
}

/// One edit for each page that the bytes lie on.
pub(super) fn edits(live: &dyn Live, at: Gva, new: &[u8]) -> Result<Vec<Edit>, ReadError> {
    let mut edits = Vec::new();
    let (mut at, mut left) = (at, new);
    while !left.is_empty() {
        let in_page = (4096 - at.page_offset()).min(left.len() as u64) as usize;
        let (now, later) = left.split_at(in_page);
        edits.push(Edit {
            at: live.physical(at)?,
            old: live.bytes(at, in_page)?,
            new: now.to_vec(),
        });
        at = at.wrapping_add(in_page as u64);
        left = later;
    }
    Ok(edits)
}

/// The pages of a module's text that are changed, and their frames.
fn frames(text: GvaRange, sites: &[SiteRecord]) -> Vec<(Gva, Gpa)> {
    let mut frames = Vec::new();
    for site in sites.iter().filter(|site| text.contains(site.at)) {
        let mut at = site.at;
        for edit in &site.edits {
            frames.push((at.wrapping_sub(at.page_offset()), edit.at.page_base()));
            at = at.wrapping_add(edit.new.len() as u64);
        }
    }
    frames.sort_unstable();
    frames.dedup();
    frames
}

/// The code of other patches that one takes the place of.
fn layers_replaced(upon: &[Option<&PatchRecord>]) -> Vec<BusyRange> {
    let mut ranges = Vec::new();
    for range in upon.iter().flatten().flat_map(|it| layers::code_of(it)) {
        if !ranges.contains(&range) {
            ranges.push(range);
        }
    }
    ranges
}

/// Old functions with their parts: a task in any of them would run on in old code.
fn old_ranges(patch: &Patch, located: &[Located]) -> Vec<BusyRange> {
    let mut ranges = Vec::new();
    for (wanted, found) in patch.replaced.iter().zip(located) {
        let busy = |range: &GvaRange, function: &str, kind| BusyRange {
            range: *range,
            function: function.to_owned(),
            kind,
        };
        ranges.push(busy(&found.range, &wanted.name, BusyKind::Old));
        let parts = wanted.old_parts.iter().zip(&found.parts);
        ranges.extend(parts.map(|(part, range)| busy(range, &part.name, BusyKind::OldPart)));
    }
    ranges
}

/// All new text, section by section, and the code made beside it.
fn new_ranges(patch: &Patch, placement: &Placement, pieces: u64) -> Vec<BusyRange> {
    let sections = (0_u32..).zip(&patch.sections).zip(&placement.sections);
    let text = sections.filter(|((_, section), _)| section.kind == SectionKind::Text);
    let mut ranges: Vec<_> = text
        .map(|((index, section), at)| BusyRange {
            range: sized(*at, section.bytes.len() as u64),
            function: section_function(patch, index, &section.name),
            kind: BusyKind::New,
        })
        .collect();
    if pieces > 0 {
        ranges.push(BusyRange {
            range: sized(placement.pieces, pieces),
            function: format!("{} (made code)", patch.name),
            kind: BusyKind::New,
        });
    }
    ranges
}

fn section_function(patch: &Patch, section: u32, name: &str) -> String {
    let replaced = patch.replaced.iter().find(|it| it.new_section == section);
    let plain = || name.strip_prefix(".text.").unwrap_or(name).to_owned();
    replaced.map_or_else(plain, |it| it.name.clone())
}

fn new_function(patch: &Patch, wanted: &Replacement, placement: &Placement) -> GvaRange {
    let section = wanted.new_section as usize;
    let start = placement.sections.get(section).copied().unwrap_or_default();
    let size = patch
        .sections
        .get(section)
        .map_or(0, |section| section.bytes.len() as u64);
    let entry = start.wrapping_add(wanted.new_offset);
    sized(entry, size.saturating_sub(wanted.new_offset))
}

/// Where the callbacks of a patch lie.
fn callbacks(patch: &Patch, placement: &Placement) -> Vec<CallbackRecord> {
    let record = |it: &Callback| {
        let at = placement.sections.get(it.section as usize).copied();
        CallbackRecord {
            kind: it.kind,
            function: it.name.clone(),
            at: at.unwrap_or_default(),
        }
    };
    patch.callbacks.iter().map(record).collect()
}

/// Arena addresses are far below the end of the address space.
fn sized(start: Gva, size: u64) -> GvaRange {
    GvaRange::sized(start, size).unwrap_or(GvaRange { start, end: start })
}

#[cfg(test)]
mod tests {
    use super::super::tests::Fake;
    use super::*;

    #[test]
    fn a_jump_across_two_pages_is_two_edits_that_each_stay_on_one() {
        let at = Gva(0xffff_ffff_8100_0ffd);
        let mut live = Fake::new();
        live.put(at, &[1, 2, 3, 4, 5]);
        let edits = edits(&live, at, &[11, 12, 13, 14, 15]).unwrap();
        let sides: Vec<_> = edits.iter().map(|it| (&it.old[..], &it.new[..])).collect();
        assert_eq!(
            sides,
            [(&[1, 2, 3][..], &[11, 12, 13][..]), (&[4, 5], &[14, 15])]
        );
        assert_eq!(edits[1].at, live.physical(at.wrapping_add(3)).unwrap());
        assert_eq!(edits[1].at.page_offset(), 0);
    }

    #[test]
    fn a_place_on_two_pages_of_a_module_claims_both_frames() {
        let at = Gva(0xffff_ffff_c010_0ffd);
        let mut live = Fake::new();
        live.put(at, &[0; 5]);
        let site = SiteRecord {
            function: "f".into(),
            role: SiteRole::Entry,
            at,
            edits: edits(&live, at, &[1; 5]).unwrap(),
            covered: sized(at, 5),
        };
        let page = at.wrapping_sub(at.page_offset());
        let frame = |page| (page, live.physical(page).unwrap());
        assert_eq!(
            frames(sized(page, 0x2000), std::slice::from_ref(&site)),
            [frame(page), frame(page.wrapping_add(0x1000))]
        );
        assert!(frames(sized(page, 0x100), &[site]).is_empty());
    }
}
