//! Whether what refers into bytes is well formed: relocated fields and sites of one piece of code or data.

use super::{ABSENT, Malformed, OUTSIDE, count, index, printable};
use crate::patch::{
    Alternative, Patch, Reference, Relocation, RelocationKind, SectionKind, Site, SiteKind, Symbol,
    Trap, TrapKind, Unwind,
};

/// The instruction of WARN and BUG (Linux v6.12 arch/x86/include/asm/bug.h, `ASM_UD2`).
const UD2: [u8; 2] = [0x0f, 0x0b];

/// Which code may name what: old code knows nothing of the patch, new code nothing of the old object.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Old,
    New,
}

/// Bytes with what refers into them.
pub(super) struct Body<'a> {
    pub(super) patch: &'a Patch,
    pub(super) place: &'a str,
    pub(super) bytes: &'a [u8],
    pub(super) side: Side,
}

impl Body<'_> {
    /// Every field inside the bytes, after the one before, and naming a symbol it may name.
    pub(super) fn relocations(&self, relocations: &[Relocation]) -> Result<(), Malformed> {
        let mut free_from = 0;
        for relocation in relocations {
            let offset = relocation.offset;
            if offset < free_from {
                return Err(self.offset("field", offset, "overlaps the one before"));
            }
            free_from = self.end("field", offset, field_bytes(relocation.kind))?;
            self.symbol(relocation.symbol)?;
        }
        Ok(())
    }

    /// Every site inside the bytes, in order, and of a length its kind can have.
    pub(super) fn sites(&self, sites: &[Site]) -> Result<(), Malformed> {
        let mut last = 0;
        for site in sites {
            if site.offset < last {
                return Err(self.offset("site", site.offset, "is before the one before it"));
            }
            last = site.offset;
            self.end("site", site.offset, u64::from(site.len))?;
            self.site(site)?;
        }
        Ok(())
    }

    /// Every trap in code, at an instruction of its own, after the one before.
    pub(super) fn traps(&self, kind: SectionKind, traps: &[Trap]) -> Result<(), Malformed> {
        let mut last = None;
        for trap in traps {
            let offset = trap.offset;
            if kind != SectionKind::Text {
                return Err(self.offset("trap", offset, "is not in code"));
            }
            if last.is_some_and(|last| offset <= last) {
                return Err(self.offset("trap", offset, "is not after the one before it"));
            }
            last = Some(offset);
            self.end("trap", offset, 1)?;
            self.trap(trap)?;
        }
        Ok(())
    }

    /// Every row of unwind data in code or at its end, after the one before, and of a kind that functions have.
    pub(super) fn unwind(&self, kind: SectionKind, rows: &[Unwind]) -> Result<(), Malformed> {
        let mut last = None;
        for row in rows {
            let offset = u64::from(row.offset);
            if kind != SectionKind::Text {
                return Err(self.offset("unwind data", offset, "is not of code"));
            }
            if last.is_some_and(|last| offset <= last) {
                return Err(self.offset("unwind data", offset, "is not after the one before it"));
            }
            last = Some(offset);
            self.end("unwind data", offset, 0)?;
            if !crate::unwind::is_of_function(&row.entry) {
                return Err(self.offset(
                    "unwind data",
                    offset,
                    "is of no kind that functions have",
                ));
            }
        }
        Ok(())
    }

    fn trap(&self, trap: &Trap) -> Result<(), Malformed> {
        match &trap.kind {
            TrapKind::Bug { file, .. } => {
                printable("source file", file)?;
                let end = self.end("trap", trap.offset, UD2.len() as u64)?;
                match self.bytes.get(trap.offset as usize..end as usize) {
                    Some(bytes) if bytes == UD2 => Ok(()),
                    _ => Err(self.offset("trap", trap.offset, "is no ud2")),
                }
            }
            TrapKind::Fault { fixup, .. } => self.reference(*fixup),
        }
    }

    fn site(&self, site: &Site) -> Result<(), Malformed> {
        let lengths = possible_lengths(&site.kind);
        if !lengths.contains(&site.len) {
            return Err(self.impossible(site, "length"));
        }
        match &site.kind {
            SiteKind::Retpoline { register: 16.., .. } => Err(self.impossible(site, "register")),
            SiteKind::JumpLabel { key, target, .. } => {
                self.reference(*key)?;
                self.reference(*target)
            }
            SiteKind::Alternative { replacements } => self.alternatives(site, replacements),
            SiteKind::RuntimeConstant { symbol, shift } => {
                if site.len != if *shift { 1 } else { 8 } {
                    return Err(self.impossible(site, "length"));
                }
                self.symbol(*symbol)
            }
            _ => Ok(()),
        }
    }

    fn alternatives(&self, site: &Site, replacements: &[Alternative]) -> Result<(), Malformed> {
        count("alternatives of one site", replacements.len(), 1)?;
        for replacement in replacements {
            let code = &replacement.code;
            if code.bytes.len() > usize::from(site.len) {
                return Err(self.impossible(site, "replacement length"));
            }
            let text = Body {
                bytes: &code.bytes,
                ..*self
            };
            text.relocations(&code.relocations)?;
        }
        Ok(())
    }

    fn reference(&self, reference: Reference) -> Result<(), Malformed> {
        self.symbol(reference.symbol)
    }

    fn symbol(&self, at: u32) -> Result<(), Malformed> {
        match (self.patch.symbols.get(at as usize), self.side) {
            (None, _) => Err(index(self.place, "symbol", at, ABSENT)),
            (Some(Symbol::Own { .. }), Side::Old) => Err(index(
                self.place,
                "symbol",
                at,
                "is new but named by old code",
            )),
            (Some(Symbol::OldBytes { .. }), Side::New) => Err(index(
                self.place,
                "symbol",
                at,
                "is old but named by new code",
            )),
            _ => Ok(()),
        }
    }

    /// The end of something inside the bytes.
    fn end(&self, what: &'static str, offset: u64, len: u64) -> Result<u64, Malformed> {
        let end = offset
            .checked_add(len)
            .filter(|end| *end <= self.bytes.len() as u64);
        end.ok_or_else(|| self.offset(what, offset, OUTSIDE))
    }

    fn offset(&self, what: &'static str, offset: u64, problem: &'static str) -> Malformed {
        Malformed::Offset {
            place: self.place.to_owned(),
            what,
            offset,
            problem,
        }
    }

    fn impossible(&self, site: &Site, what: &'static str) -> Malformed {
        Malformed::Site {
            place: self.place.to_owned(),
            offset: site.offset,
            what,
        }
    }
}

/// Size in bytes of a relocated field.
const fn field_bytes(kind: RelocationKind) -> u64 {
    match kind {
        RelocationKind::Absolute64 => 8,
        RelocationKind::Relative32
        | RelocationKind::Absolute32
        | RelocationKind::Absolute32Signed => 4,
    }
}

/// Lengths in bytes as compilers and the kernel's macros make them. A tail call or return can be a
/// conditional jump of 6 bytes; `ret` is 1 byte, `ret imm16` 3, `rep ret` 2.
fn possible_lengths(kind: &SiteKind) -> std::ops::RangeInclusive<u8> {
    match kind {
        SiteKind::Fentry => 5..=5,
        SiteKind::Return => 1..=6,
        SiteKind::Retpoline { .. } | SiteKind::StaticCall => 5..=6,
        SiteKind::JumpLabel { .. } => 2..=5,
        SiteKind::Alternative { .. } | SiteKind::Paravirt { .. } => 1..=u8::MAX,
        SiteKind::RuntimeConstant { .. } => 1..=8,
        SiteKind::Endbr => 4..=4,
        SiteKind::LockPrefix => 1..=1,
    }
}
