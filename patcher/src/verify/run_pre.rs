//! Run-pre matching: whether a function of the old object is what runs at an address. The object's code
//! is taken through the kernel's own boot and then compared, byte for byte but for the places that
//! [`tolerance`] names; fields are checked by what they name, and tell what open symbols are.

use vmpatch_introspect::{Gva, ReadError};

use super::{disassembly, tolerance};
use crate::link::boot::{self, BootError, Facts, Image};
use crate::link::live::Live;
use crate::link::names::{Disagreement, Learned, Names};
use crate::link::relocate;
use crate::patch::{Code, Relocation, Site, SiteKind};

/// Everything one guest is compared with.
pub struct Matcher<'a> {
    /// The guest.
    pub live: &'a dyn Live,
    /// What its boot decided.
    pub facts: &'a Facts,
    /// The patch's symbols in it.
    pub names: &'a Names<'a>,
}

/// Where and why the function that runs is another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Offset of the first byte that differs.
    pub offset: usize,
    /// Why it counts as different.
    pub reason: Reason,
    /// Both versions around it, as text.
    pub lines: Vec<String>,
}

/// Why code counts as different.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// The bytes are others.
    #[error("the bytes differ")]
    Bytes,
    /// A field names something else.
    #[error("the field names another thing: {0}")]
    Field(#[from] Disagreement),
    /// A place the kernel may rewrite holds what it would not write.
    #[error("the kernel would not have made this of a {0}")]
    Site(&'static str),
    /// The old code could not be taken through the kernel's boot.
    #[error("what boot made of it cannot be told: {0}")]
    Boot(#[from] BootError),
    /// The guest's text cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// Longest function compared.
const LONGEST: usize = 1 << 20;

impl Matcher<'_> {
    /// Compares `code` with what runs at `at`. What open symbols turn out to be is added to `learned`;
    /// where the code does not match, `learned` may hold part of it.
    ///
    /// # Errors
    /// [`Mismatch`].
    pub fn compare(&self, code: &Code, at: Gva, learned: &mut Learned) -> Result<(), Mismatch> {
        let length = code.bytes.len();
        let running = match self.live.bytes(at, length.min(LONGEST)) {
            Ok(bytes) if bytes.len() == length => bytes,
            Ok(_) => return Err(Mismatch::bare(Reason::Bytes)),
            Err(error) => return Err(Mismatch::bare(error.into())),
        };
        let mut image = Image {
            at,
            bytes: code.bytes.clone(),
        };
        let trial = Trial {
            matcher: self,
            code,
            running: &running,
        };
        match trial.run(&mut image, learned) {
            Ok(()) => Ok(()),
            Err((offset, reason)) => {
                let lines = disassembly::side_by_side(at, &image.bytes, &running, offset);
                Err(Mismatch {
                    offset,
                    reason,
                    lines,
                })
            }
        }
    }
}

impl Mismatch {
    fn bare(reason: Reason) -> Self {
        Self {
            offset: 0,
            reason,
            lines: Vec::new(),
        }
    }
}

type Outcome = Result<(), (usize, Reason)>;

/// One comparison under way.
struct Trial<'a> {
    matcher: &'a Matcher<'a>,
    code: &'a Code,
    running: &'a [u8],
}

impl Trial<'_> {
    fn run(&self, image: &mut Image, learned: &mut Learned) -> Outcome {
        let rewritten = self.rewritten();
        let fixed = |field: &&Relocation| {
            !rewritten
                .get(field.offset as usize)
                .copied()
                .unwrap_or_default()
        };
        for field in self.code.relocations.iter().filter(fixed) {
            self.field(image, field, learned)?;
        }
        self.fields_in_sites(image, &rewritten, learned)?;
        let resolve = |index| self.matcher.names.value(learned, index);
        let Matcher { live, facts, .. } = self.matcher;
        boot::run(image, &self.code.sites, facts, *live, &resolve)
            .map_err(|error| (error.offset() as usize, error.into()))?;
        for site in &self.code.sites {
            self.tolerate(image, site, learned)?;
        }
        match image
            .bytes
            .iter()
            .zip(self.running)
            .position(|(built, runs)| built != runs)
        {
            Some(offset) => Err((offset, Reason::Bytes)),
            None => Ok(()),
        }
    }

    /// Which bytes the kernel rewrites as a whole: fields there are not what the object has.
    fn rewritten(&self) -> Vec<bool> {
        let mut rewritten = vec![false; self.code.bytes.len()];
        let whole = |site: &&Site| !matches!(site.kind, SiteKind::LockPrefix | SiteKind::Endbr);
        for site in self.code.sites.iter().filter(whole) {
            let from = site.offset as usize;
            if let Some(part) = rewritten.get_mut(from..from.saturating_add(site.len.into())) {
                part.fill(true);
            }
        }
        rewritten
    }

    /// A field that runs as it was linked: what it names must be the symbol.
    fn field(&self, image: &mut Image, field: &Relocation, learned: &mut Learned) -> Outcome {
        let offset = field.offset as usize;
        let at = image.address(field.offset);
        let bytes = offset
            .checked_add(relocate::field_size(field.kind))
            .and_then(|end| self.running.get(offset..end))
            .ok_or((offset, Reason::Bytes))?;
        let found =
            relocate::decode(field.kind, bytes, field.addend, at).ok_or((offset, Reason::Bytes))?;
        let names = self.matcher.names;
        let agreed = match names.agree(learned, field.symbol, found) {
            Err(error) => match self.behind_padding(field, found) {
                Some(function) => names.agree(learned, field.symbol, function),
                None => Err(error),
            },
            agreed => agreed,
        };
        agreed.map_err(|error| (offset, error.into()))?;
        image
            .write(field.offset, bytes)
            .map_err(|error| (offset, error.into()))
    }

    /// With call-depth tracking a call leads to the padding before its function (Linux v6.12
    /// arch/x86/kernel/callthunks.c): the function then, if this is such a call.
    fn behind_padding(&self, field: &Relocation, found: Gva) -> Option<Gva> {
        let padding = self.matcher.facts.call_padding?;
        let opcode = field.offset.checked_sub(1)? as usize;
        (self.running.get(opcode) == Some(&0xe8)).then(|| found.wrapping_add(padding))
    }

    /// Fields within rewritten places: filled in where the symbol is known, for the re-enacted boot.
    fn fields_in_sites(&self, image: &mut Image, rewritten: &[bool], learned: &Learned) -> Outcome {
        let inside = |field: &&Relocation| {
            rewritten
                .get(field.offset as usize)
                .copied()
                .unwrap_or_default()
        };
        let fields: Vec<_> = self
            .code
            .relocations
            .iter()
            .filter(inside)
            .cloned()
            .collect();
        let resolve = |index| self.matcher.names.value(learned, index);
        match image.relocate(&fields, &resolve) {
            Ok(_) => Ok(()),
            Err(error) => Err((error.offset() as usize, error.into())),
        }
    }

    /// Takes over what runs at a place that changes after boot, if the kernel could have written it.
    fn tolerate(&self, image: &mut Image, site: &Site, learned: &Learned) -> Outcome {
        let offset = site.offset as usize;
        let part = offset..offset.saturating_add(site.len.into());
        let running = self
            .running
            .get(part)
            .ok_or((offset, Reason::Site("site")))?;
        let at = image.address(site.offset);
        let (what, tolerated) = match &site.kind {
            SiteKind::Fentry => ("call to ftrace", tolerance::fentry(running)),
            SiteKind::Endbr => ("landing mark", tolerance::landing_mark(running)),
            SiteKind::LockPrefix => return self.lock_prefix(image, site, running),
            SiteKind::JumpLabel { target, .. } => {
                let target = self
                    .matcher
                    .names
                    .value(learned, target.symbol)
                    .map(|symbol| symbol.wrapping_add(target.addend.cast_unsigned()));
                (
                    "static-key branch",
                    tolerance::jump_label(running, at, target),
                )
            }
            SiteKind::StaticCall => ("static call", self.static_call(site, at, running)),
            SiteKind::Retpoline { register, call } => {
                let Matcher { live, facts, .. } = self.matcher;
                let nameless =
                    tolerance::nameless_thunk(running, at, *register, *call, facts, *live);
                if !nameless {
                    return Ok(());
                }
                ("retpoline", true)
            }
            SiteKind::Alternative { .. } => return self.padded_call(image, site, running),
            SiteKind::Return | SiteKind::RuntimeConstant { .. } | SiteKind::Paravirt { .. } => {
                return Ok(());
            }
        };
        if !tolerated {
            return Err((offset, Reason::Site(what)));
        }
        image
            .write(site.offset, running)
            .map_err(|error| (offset, error.into()))
    }

    /// The prefix may lie in an alternative that has taken its place: then the alternative decides.
    fn lock_prefix(&self, image: &mut Image, site: &Site, running: &[u8]) -> Outcome {
        let offset = site.offset as usize;
        if image.bytes.get(offset) == Some(&0xf0) && tolerance::lock_prefix(running) {
            return image
                .write(site.offset, running)
                .map_err(|error| (offset, error.into()));
        }
        Ok(())
    }

    /// With call-depth tracking a call that an alternative begins with leads to the padding before its
    /// function (Linux v6.12 arch/x86/kernel/callthunks.c, `patch_alt_call_sites`).
    fn padded_call(&self, image: &mut Image, site: &Site, running: &[u8]) -> Outcome {
        let offset = site.offset as usize;
        let (Some(padding), Some(call)) = (self.matcher.facts.call_padding, running.first_chunk())
        else {
            return Ok(());
        };
        let built = image
            .bytes
            .get(offset..)
            .and_then(|rest| rest.first_chunk());
        if built.is_some_and(|built| tolerance::padded_call(built, call, padding)) {
            return image
                .write(site.offset, call)
                .map_err(|error| (offset, error.into()));
        }
        Ok(())
    }

    fn static_call(&self, site: &Site, at: Gva, running: &[u8]) -> bool {
        let end = site.offset.saturating_add(site.len.into());
        let within = |field: &&Relocation| (site.offset..end).contains(&field.offset);
        let Some(field) = self.code.relocations.iter().find(within) else {
            return false;
        };
        let Some(key) = self
            .matcher
            .names
            .name(field.symbol)
            .strip_prefix("__SCT__")
        else {
            return false;
        };
        let live = self.matcher.live;
        let Some(trampoline) = live.unique(&format!("__SCT__{key}")) else {
            return false;
        };
        let function = live
            .unique(&format!("__SCK__{key}"))
            .and_then(|key| live.read_u64(key).ok());
        let call = tolerance::StaticCall {
            at,
            trampoline,
            function: function.map(Gva),
            return_zero: live.unique("__static_call_return0"),
        };
        call.accepts(running, self.matcher.facts)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::link::tests::{Fake, facts};
    use crate::patch::{Reference, RelocationKind, Symbol};
    use crate::verify::locate::{LocateError, Wanted};

    const AT: Gva = Gva(0xffff_ffff_8100_0000);
    const CALLED: Gva = Gva(0xffff_ffff_8100_4000);
    const OTHER: Gva = Gva(0xffff_ffff_8100_8000);

    fn relocation(offset: u64, symbol: u32) -> Relocation {
        let kind = RelocationKind::Relative32;
        Relocation {
            offset,
            kind,
            symbol,
            addend: -4,
        }
    }

    fn site(offset: u64, len: u8, kind: SiteKind) -> Site {
        Site { offset, len, kind }
    }

    /// endbr64; call __fentry__; call helper; jmp __x86_return_thunk
    fn code() -> Code {
        let bytes = [
            &[0xf3, 0x0f, 0x1e, 0xfa][..],
            &[0xe8, 0, 0, 0, 0],
            &[0xe8, 0, 0, 0, 0],
            &[0xe9, 0, 0, 0, 0],
        ];
        Code {
            bytes: bytes.concat(),
            relocations: vec![relocation(5, 1), relocation(10, 0), relocation(15, 2)],
            sites: vec![
                site(0, 4, SiteKind::Endbr),
                site(4, 5, SiteKind::Fentry),
                site(14, 5, SiteKind::Return),
            ],
        }
    }

    fn symbols() -> Vec<Symbol> {
        let names = ["helper", "__fentry__", "__x86_return_thunk"];
        let guest = |name: &&str| Symbol::Guest {
            name: (*name).into(),
            sympos: None,
        };
        names.iter().map(guest).collect()
    }

    /// What boot makes of [`code`] at `at`: sealed, untraced, plainly returning.
    fn booted(at: Gva, called: Gva) -> Vec<u8> {
        let call = relocate::branch(0xe8, at.wrapping_add(9), called).unwrap();
        let parts = [
            &[0x66, 0x0f, 0x1f, 0x00][..],
            &[0x0f, 0x1f, 0x44, 0, 0],
            &call,
            &[0xc3, 0xcc, 0xcc, 0xcc, 0xcc],
        ];
        parts.concat()
    }

    fn guest() -> Fake {
        let mut live = Fake::new();
        live.name("init_task", Gva(1));
        live.name("helper", CALLED);
        live.name("f", AT);
        live.put(AT, &booted(AT, CALLED));
        live
    }

    fn compare(live: &Fake) -> Result<Learned, Reason> {
        let (symbols, facts) = (symbols(), facts());
        let names = Names::look_up(&symbols, live);
        let (facts, names) = (&facts, &names);
        let mut learned = Learned::new();
        let matcher = Matcher { live, facts, names };
        let compared = matcher.compare(&code(), AT, &mut learned);
        compared.map(|()| learned).map_err(|it| it.reason)
    }

    #[test]
    fn what_boot_made_of_the_function_is_the_function() {
        assert_eq!(compare(&guest()), Ok(Learned::new()));
    }

    #[test]
    fn a_call_to_another_function_is_seen_though_its_bytes_are_a_field() {
        let mut live = guest();
        live.put(AT, &booted(AT, OTHER));
        assert!(matches!(compare(&live), Err(Reason::Field(_))));
    }

    #[test]
    fn of_two_functions_of_a_name_the_code_tells_which_is_called() {
        let mut live = guest();
        live.name("helper", OTHER);
        assert_eq!(compare(&live), Ok(Learned::from([(0, CALLED)])));
    }

    #[test]
    fn a_breakpoint_is_never_tolerated() {
        for offset in [0, 4, 9, 14] {
            let mut live = guest();
            live.put(AT.wrapping_add(offset), &[0xcc]);
            assert!(compare(&live).is_err(), "+{offset:#x}");
        }
    }

    #[test]
    fn text_that_ends_in_an_unmapped_page_is_refused() {
        let mut live = Fake::new();
        live.put(AT, &booted(AT, CALLED)[..12]);
        assert!(matches!(compare(&live), Err(Reason::Read(_))));
    }

    fn locate(live: &Fake, sympos: Option<u32>) -> Result<Gva, LocateError> {
        let (symbols, facts, code) = (symbols(), facts(), code());
        let names = Names::look_up(&symbols, live);
        let (facts, names) = (&facts, &names);
        let wanted = Wanted {
            name: "f",
            sympos,
            code: &code,
            parts: &[],
        };
        let matcher = Matcher { live, facts, names };
        let found = matcher.locate(wanted, &mut Learned::new());
        found.map(|it| it.range.start)
    }

    #[test]
    fn of_two_functions_of_a_name_the_one_that_matches_is_meant() {
        let mut live = guest();
        live.name("f", OTHER);
        live.put(OTHER, &booted(OTHER, AT));
        assert_eq!(locate(&live, None), Ok(AT));
        assert!(matches!(
            locate(&live, Some(2)),
            Err(LocateError::Differs { at: OTHER, .. })
        ));
    }

    #[test]
    fn two_that_match_alike_are_not_chosen_between_but_by_position() {
        let mut live = guest();
        live.name("f", OTHER);
        live.put(OTHER, &booted(OTHER, CALLED));
        assert!(matches!(
            locate(&live, None),
            Err(LocateError::Several { count: 2, .. })
        ));
        assert_eq!(locate(&live, Some(2)), Ok(OTHER));
        assert!(matches!(
            locate(&live, Some(3)),
            Err(LocateError::Absent { .. })
        ));
    }

    fn kinds() -> impl Strategy<Value = SiteKind> {
        let reference = Reference {
            symbol: 0,
            addend: 7,
        };
        prop_oneof![
            Just(SiteKind::Fentry),
            Just(SiteKind::Return),
            Just(SiteKind::StaticCall),
            Just(SiteKind::Endbr),
            Just(SiteKind::LockPrefix),
            (0..16_u8, any::<bool>())
                .prop_map(|(register, call)| SiteKind::Retpoline { register, call }),
            any::<bool>().prop_map(|shift| SiteKind::RuntimeConstant { symbol: 0, shift }),
            any::<u8>().prop_map(|slot| SiteKind::Paravirt { slot }),
            any::<bool>().prop_map(move |inverted| SiteKind::JumpLabel {
                key: reference,
                target: reference,
                inverted
            }),
        ]
    }

    proptest! {
        #[test]
        fn no_code_of_a_patch_and_no_text_of_a_guest_makes_it_panic(
            bytes in proptest::collection::vec(any::<u8>(), 1..64),
            running in proptest::collection::vec(any::<u8>(), 0..64),
            sites in proptest::collection::vec((0..70_u64, any::<u8>(), kinds()), 0..6),
            fields in proptest::collection::vec((0..70_u64, 0..5_u32, any::<i64>()), 0..6),
        ) {
            let mut live = guest();
            live.put(AT, &running);
            let sites = sites.into_iter().map(|(offset, len, kind)| site(offset, len, kind));
            let fields = fields.into_iter().map(|(offset, symbol, addend)| Relocation {
                addend,
                ..relocation(offset, symbol)
            });
            let code = Code { bytes, relocations: fields.collect(), sites: sites.collect() };
            let (symbols, facts) = (symbols(), facts());
            let names = Names::look_up(&symbols, &live);
            let matcher = Matcher { live: &live, facts: &facts, names: &names };
            let _ = matcher.compare(&code, AT, &mut Learned::new());
        }
    }
}
