//! New code and data made ready for their place: fields filled in, sites treated as boot would have, and
//! those that need the guest's own tables turned into plain code. What is not understood is refused by
//! name, section and offset.

use vmpatch_introspect::Gva;

use super::boot::nops::NOP5;
use super::boot::{self, BootError, Facts, Image};
use super::live::Live;
use super::names::{Learned, Names};
use super::pieces::{Made, Pieces};
use super::place::Placement;
use super::relocate::{self, OutOfReach};
use super::unwind;
use crate::patch::{Patch, Reference, Relocation, Section, SectionKind, Site, SiteKind, Symbol};

/// Everything that decides what new code becomes.
pub struct Context<'a> {
    /// The patch.
    pub patch: &'a Patch,
    /// The guest.
    pub live: &'a dyn Live,
    /// What its boot decided.
    pub facts: &'a Facts,
    /// The patch's symbols in it.
    pub names: &'a Names<'a>,
    /// What running code told of them.
    pub learned: &'a Learned,
    /// Where everything of the patch lies.
    pub placement: &'a Placement,
}

/// Why new code cannot be made to run in this guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("section {section} at offset {offset:#x}: {why}")]
pub struct CodeError {
    /// Section of the patch.
    pub section: String,
    /// Offset in it.
    pub offset: u64,
    /// What is in the way.
    pub why: Obstacle,
}

/// What is in the way of one field or site.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    /// The guest does not have the symbol.
    #[error(
        "the guest has no symbol `{0}`, neither in the object that needs it nor in what that is linked to"
    )]
    Absent(String),
    /// It has several, and no old code told which.
    #[error("the guest has {count} symbols named `{name}`, and no old code tells which is meant")]
    Ambiguous {
        /// Name.
        name: String,
        /// How many.
        count: usize,
    },
    /// What it names is gone.
    #[error("`{0}` lies in init memory, which the guest frees after its start")]
    Init(String),
    /// It names bytes of the old object, which have no address.
    #[error("new code refers to bytes of the old object's {0}")]
    OldBytes(String),
    /// The target is too far away.
    #[error("`{name}`: {far}")]
    Far {
        /// What the field names.
        name: String,
        /// How far.
        far: OutOfReach,
    },
    /// Boot's work could not be done.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A name that only stands for something else at a site of its own kind.
    #[error("`{0}` is used where the patch marks no site for it")]
    Unmarked(String),
    /// A site the linker cannot make into plain code.
    #[error("{0}")]
    Site(&'static str),
    /// No room is left for made code.
    #[error("more pieces of code are needed than were counted")]
    Room,
}

/// The bytes of every section, and the code made beside them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Linked {
    /// In the order of the patch.
    pub sections: Vec<Vec<u8>>,
    /// From [`Placement::pieces`] on.
    pub pieces: Made,
}

impl Context<'_> {
    /// The address of a symbol that new code names.
    ///
    /// # Errors
    /// [`Obstacle`]: it is not known for certain.
    pub fn value(&self, index: u32) -> Result<Gva, Obstacle> {
        let Self {
            names,
            learned,
            placement,
            live,
            ..
        } = self;
        let name = || names.name(index).to_owned();
        match names.symbol(index) {
            Some(Symbol::Own {
                section, offset, ..
            }) => {
                let start = placement.sections.get(*section as usize);
                start
                    .map(|at| at.wrapping_add(*offset))
                    .ok_or(Obstacle::Site("no such section"))
            }
            Some(Symbol::OldBytes { section, .. }) => Err(Obstacle::OldBytes(section.clone())),
            _ => match (names.value(learned, index), names.count(index)) {
                (Some(at), _) if live.is_init(at) => Err(Obstacle::Init(name())),
                (Some(at), _) => Ok(at),
                (None, 0) => Err(Obstacle::Absent(name())),
                (None, count) => Err(Obstacle::Ambiguous {
                    name: name(),
                    count,
                }),
            },
        }
    }
}

/// Links every section.
///
/// # Errors
/// [`CodeError`], the first.
pub fn link(context: &Context<'_>, most_pieces: usize) -> Result<Linked, CodeError> {
    let mut pieces = Pieces::new(context.placement.pieces, most_pieces);
    let places = context
        .patch
        .sections
        .iter()
        .zip(&context.placement.sections);
    let sections = places
        .map(|(section, at)| {
            let mut linker = SectionLinker {
                context,
                section,
                pieces: &mut pieces,
            };
            linker.link(*at)
        })
        .collect::<Result<_, _>>()?;
    Ok(Linked {
        sections,
        pieces: pieces.finish(),
    })
}

/// How many pieces of code the references of a patch may need, beside its static branches.
#[must_use]
pub fn most_stubs(patch: &Patch, facts: &Facts) -> usize {
    if facts.ibt { patch.symbols.len() } else { 0 }
}

struct SectionLinker<'a, 'b> {
    context: &'a Context<'a>,
    section: &'a Section,
    pieces: &'b mut Pieces,
}

impl SectionLinker<'_, '_> {
    fn link(&mut self, at: Gva) -> Result<Vec<u8>, CodeError> {
        let mut image = Image {
            at,
            bytes: self.section.bytes.clone(),
        };
        if let (true, Some(site)) = (
            self.section.kind != SectionKind::Text,
            self.section.sites.first(),
        ) {
            let why = Obstacle::Site("only code can have sites");
            return Err(self.error(site.offset, why));
        }
        let replaced = self.replaced_bytes();
        for field in &self.section.relocations {
            if !replaced
                .get(field.offset as usize)
                .copied()
                .unwrap_or_default()
            {
                self.field(&mut image, field)?;
            }
        }
        let resolve = |index| self.context.value(index).ok();
        let Context { facts, live, .. } = self.context;
        boot::run(&mut image, &self.section.sites, facts, *live, &resolve)
            .map_err(|error| self.error(error.offset(), error.into()))?;
        for site in &self.section.sites {
            self.site(&mut image, site)?;
        }
        Ok(image.bytes)
    }

    /// Bytes of sites that are written anew whatever the object has there.
    fn replaced_bytes(&self) -> Vec<bool> {
        let mut replaced = vec![false; self.section.bytes.len()];
        for site in &self.section.sites {
            let anew = matches!(
                site.kind,
                SiteKind::Fentry
                    | SiteKind::Return
                    | SiteKind::Retpoline { .. }
                    | SiteKind::JumpLabel { .. }
            );
            let from = site.offset as usize;
            if let (true, Some(part)) = (
                anew,
                replaced.get_mut(from..from.saturating_add(site.len.into())),
            ) {
                part.fill(true);
            }
        }
        replaced
    }

    fn field(&mut self, image: &mut Image, field: &Relocation) -> Result<(), CodeError> {
        let name = self.context.names.name(field.symbol);
        if stands_for_a_site(name) && self.is_guest(field.symbol) {
            return Err(self.error(field.offset, Obstacle::Unmarked(name.to_owned())));
        }
        let mut symbol = self
            .context
            .value(field.symbol)
            .map_err(|why| self.error(field.offset, why))?;
        if self.needs_landing_mark(field, symbol) {
            let stub = self.pieces.landing(symbol);
            symbol = stub.map_err(|why| self.error(field.offset, why))?;
        }
        let at = image.address(field.offset);
        let bytes = relocate::encode(field.kind, symbol, field.addend, at).map_err(|far| {
            self.error(
                field.offset,
                Obstacle::Far {
                    name: name.to_owned(),
                    far,
                },
            )
        })?;
        image
            .write(field.offset, &bytes)
            .map_err(|why| self.error(field.offset, why.into()))
    }

    fn is_guest(&self, index: u32) -> bool {
        matches!(self.context.names.symbol(index), Some(Symbol::Guest { .. }))
    }

    /// Whether the field takes the address of a guest function that may then be called indirectly, which
    /// faults where indirect branch tracking is on and the function has no landing mark (Intel SDM vol. 1
    /// section 17.3).
    fn needs_landing_mark(&self, field: &Relocation, symbol: Gva) -> bool {
        if !self.context.facts.ibt || !self.is_guest(field.symbol) || self.is_branch(field) {
            return false;
        }
        let text = (
            self.context.live.unique("_stext"),
            self.context.live.unique("_etext"),
        );
        let (Some(start), Some(end)) = text else {
            return false;
        };
        let marked = self.context.live.bytes(symbol, 4);
        (start..end).contains(&symbol) && marked.is_ok_and(|it| it != [0xf3, 0x0f, 0x1e, 0xfa])
    }

    /// Whether the field is the target of a direct call or jump, by the opcode before it.
    fn is_branch(&self, field: &Relocation) -> bool {
        let before = |back: usize| {
            let at = (field.offset as usize).checked_sub(back)?;
            self.section.bytes.get(at).copied()
        };
        self.section.kind == SectionKind::Text
            && field.kind == crate::patch::RelocationKind::Relative32
            && (matches!(before(1), Some(0xe8 | 0xe9))
                || matches!((before(2), before(1)), (Some(0x0f), Some(0x80..=0x8f))))
    }

    fn site(&mut self, image: &mut Image, site: &Site) -> Result<(), CodeError> {
        let bytes = match &site.kind {
            SiteKind::Fentry if site.len == 5 => NOP5,
            SiteKind::Fentry => {
                return Err(self.error(
                    site.offset,
                    Obstacle::Site("a call to ftrace of odd length"),
                ));
            }
            SiteKind::JumpLabel {
                key,
                target,
                inverted,
            } => {
                if site.len != 5 {
                    let why =
                        "a static-key branch of two bytes cannot hold a jump; build with five";
                    return Err(self.error(site.offset, Obstacle::Site(why)));
                }
                self.static_branch(image, site.offset, *key, *target, *inverted)
                    .map_err(|why| self.error(site.offset, why))?
            }
            // The trampoline is always current; landing marks and lock prefixes are right as they are;
            // the rest is boot's work and done.
            SiteKind::StaticCall
            | SiteKind::Endbr
            | SiteKind::LockPrefix
            | SiteKind::Return
            | SiteKind::Retpoline { .. }
            | SiteKind::RuntimeConstant { .. }
            | SiteKind::Alternative { .. }
            | SiteKind::Paravirt { .. } => return Ok(()),
        };
        image
            .write(site.offset, &bytes)
            .map_err(|why| self.error(site.offset, why.into()))
    }

    /// A branch that nobody in the guest keeps current asks for the key's value each time it runs.
    fn static_branch(
        &mut self,
        image: &Image,
        offset: u64,
        key: Reference,
        target: Reference,
        inverted: bool,
    ) -> Result<[u8; 5], Obstacle> {
        let place = |it: Reference| {
            self.context
                .value(it.symbol)
                .map(|at| at.wrapping_add(it.addend.cast_unsigned()))
        };
        let (key, target) = (place(key)?, place(target)?);
        let at = image.address(offset);
        let holds = unwind::at(self.section, offset);
        let test = self
            .pieces
            .static_branch(key, target, at.wrapping_add(5), inverted, holds)?;
        let name = "code made for a static branch".to_owned();
        relocate::branch(0xe9, at, test).map_err(|far| Obstacle::Far { name, far })
    }

    fn error(&self, offset: u64, why: Obstacle) -> CodeError {
        CodeError {
            section: self.section.name.clone(),
            offset,
            why,
        }
    }
}

/// Names that boot replaces by something else, so that a bare use of them is a mistake: the return thunk
/// warns after boot, the others are no functions.
fn stands_for_a_site(name: &str) -> bool {
    name == "__fentry__"
        || name == "__x86_return_thunk"
        || name.starts_with("__x86_indirect_thunk_")
}

#[cfg(test)]
mod tests {
    use super::super::place::Shape;
    use super::super::tests::{Fake, facts};
    use super::*;
    use crate::arena::Extent;
    use crate::patch::{RelocationKind, Requirement};
    use vmpatch_introspect::GvaRange;

    const HELPER: Gva = Gva(0xffff_ffff_8100_4000);

    fn guest(name: &str) -> Symbol {
        Symbol::Guest {
            unit: 0,
            name: name.into(),
            sympos: None,
        }
    }

    fn relocation(offset: u64, symbol: u32) -> Relocation {
        Relocation {
            offset,
            kind: RelocationKind::Relative32,
            symbol,
            addend: -4,
        }
    }

    /// One section of code: ten bytes, two branches.
    fn patch(symbols: Vec<Symbol>, sites: Vec<Site>) -> Patch {
        let section = Section {
            name: ".text.f".into(),
            kind: SectionKind::Text,
            align: 16,
            bytes: vec![0xe8, 0, 0, 0, 0, 0xe9, 0, 0, 0, 0],
            relocations: vec![relocation(1, 0), relocation(6, 1)],
            sites,
            traps: Vec::new(),
            unwind: Vec::new(),
        };
        Patch {
            name: "p".into(),
            requires: Requirement::default(),
            units: Vec::new(),
            replaced: Vec::new(),
            sections: vec![section],
            symbols,
            callbacks: Vec::new(),
        }
    }

    fn site(offset: u64, len: u8, kind: SiteKind) -> Site {
        Site { offset, len, kind }
    }

    fn linked(patch: &Patch) -> Result<(Vec<u8>, Vec<u8>), Obstacle> {
        let mut live = Fake::new();
        live.name("helper", HELPER);
        live.name("twice", HELPER);
        live.name("twice", Gva(HELPER.0 + 64));
        live.name("__x86_return_thunk", Gva(HELPER.0 + 128));
        live.name("early", Gva(HELPER.0 + 0x2000));
        live.init(GvaRange {
            start: Gva(HELPER.0 + 0x1000),
            end: Gva(HELPER.0 + 0x2001),
        });
        let shape = Shape::of(patch, 0);
        let extent = Extent {
            page: 0,
            pages: 1,
            kind: SectionKind::Text,
        };
        let context = Context {
            patch,
            live: &live,
            facts: &facts(),
            names: &Names::look_up(&patch.symbols, &patch.units, &live),
            learned: &Learned::new(),
            placement: &shape.place_again(&[extent]).unwrap(),
        };
        let linked = link(&context, shape.most_pieces()).map_err(|error| error.why)?;
        Ok((linked.sections[0].clone(), linked.pieces.bytes))
    }

    fn call_to(target: Gva) -> [u8; 5] {
        relocate::branch(0xe8, Gva(0xffff_ffff_ff00_0000), target).unwrap()
    }

    #[test]
    fn calls_reach_the_guest_and_returns_are_what_boot_makes_of_them() {
        let symbols = vec![guest("helper"), guest("__x86_return_thunk")];
        let (code, pieces) = linked(&patch(symbols, vec![site(5, 5, SiteKind::Return)])).unwrap();
        assert_eq!(code[..5], call_to(HELPER));
        assert_eq!(code[5..], [0xc3, 0xcc, 0xcc, 0xcc, 0xcc]);
        assert!(pieces.is_empty());
    }

    #[test]
    fn the_call_to_ftrace_becomes_a_nop_though_the_guest_has_no_such_function() {
        let symbols = vec![guest("__fentry__"), guest("helper")];
        let (code, _) = linked(&patch(symbols, vec![site(0, 5, SiteKind::Fentry)])).unwrap();
        assert_eq!(code[..5], NOP5);
    }

    #[test]
    fn a_jump_to_the_return_thunk_that_is_no_return_site_is_refused() {
        let symbols = vec![guest("helper"), guest("__x86_return_thunk")];
        assert!(matches!(
            linked(&patch(symbols, Vec::new())),
            Err(Obstacle::Unmarked(_))
        ));
    }

    #[test]
    fn a_symbol_that_is_not_known_for_certain_is_refused() {
        let absent = linked(&patch(vec![guest("nothing"), guest("helper")], Vec::new()));
        assert_eq!(absent, Err(Obstacle::Absent("nothing".into())));
        let twice = linked(&patch(vec![guest("twice"), guest("helper")], Vec::new()));
        assert!(matches!(twice, Err(Obstacle::Ambiguous { count: 2, .. })));
        let bytes = Symbol::OldBytes {
            section: ".rodata".into(),
            bytes: vec![1],
        };
        let old = linked(&patch(vec![bytes, guest("helper")], Vec::new()));
        assert!(matches!(old, Err(Obstacle::OldBytes(_))));
    }

    #[test]
    fn what_the_guest_has_freed_since_its_start_is_refused() {
        let early = linked(&patch(vec![guest("early"), guest("helper")], Vec::new()));
        assert_eq!(early, Err(Obstacle::Init("early".into())));
    }

    #[test]
    fn a_static_branch_jumps_to_a_test_of_its_key_and_a_short_one_is_refused() {
        let reference = |addend| Reference { symbol: 0, addend };
        let label = SiteKind::JumpLabel {
            key: reference(0),
            target: reference(0x40),
            inverted: false,
        };
        let symbols = || vec![guest("helper"), guest("helper")];
        let (code, pieces) = linked(&patch(symbols(), vec![site(5, 5, label.clone())])).unwrap();
        assert_eq!((code[5], pieces.len()), (0xe9, 32));
        assert_eq!(pieces[..2], [0x83, 0x3d]);
        assert!(matches!(
            linked(&patch(symbols(), vec![site(5, 2, label)])),
            Err(Obstacle::Site(_))
        ));
    }
}
