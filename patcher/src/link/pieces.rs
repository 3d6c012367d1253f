//! Small pieces of code that linking makes itself and lays after a patch's text: tests of static keys, and
//! landing marks for guest functions that have none.

use std::collections::BTreeMap;

use vmpatch_introspect::Gva;
use vmpatch_introspect::unwind::orc::Entry;

use super::code::Obstacle;
use super::place::PIECE;
use super::relocate::{self, branch};
use crate::patch::RelocationKind;

/// Pieces made so far.
pub struct Pieces {
    start: Gva,
    most: usize,
    bytes: Vec<u8>,
    holds: Vec<Option<Entry>>,
    landings: BTreeMap<Gva, Gva>,
}

/// All pieces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Made {
    /// Their bytes, [`PIECE`] each.
    pub bytes: Vec<u8>,
    /// For each how to unwind from any of its instructions, for none touches the stack; `None` where that is not known.
    pub holds: Vec<Option<Entry>>,
}

impl Pieces {
    /// Room for `most` pieces from `start` on.
    #[must_use]
    pub const fn new(start: Gva, most: usize) -> Self {
        Self {
            start,
            most,
            bytes: Vec::new(),
            holds: Vec::new(),
            landings: BTreeMap::new(),
        }
    }

    /// All of them.
    #[must_use]
    pub fn finish(self) -> Made {
        let Self { bytes, holds, .. } = self;
        Made { bytes, holds }
    }

    fn next(&self) -> Result<Gva, Obstacle> {
        if self.bytes.len() / PIECE as usize >= self.most {
            return Err(Obstacle::Room);
        }
        Ok(self.start.wrapping_add(self.bytes.len() as u64))
    }

    fn push(&mut self, code: &[u8], holds: Option<Entry>) {
        self.holds.push(holds);
        let end = self.bytes.len() + PIECE as usize;
        self.bytes.extend_from_slice(code);
        self.bytes.resize(end, 0xcc);
    }

    /// `endbr64; jmp function`, the same for each use of a function, so that pointers stay comparable
    /// among new code.
    ///
    /// # Errors
    /// No room, or the function is out of reach.
    pub fn landing(&mut self, function: Gva) -> Result<Gva, Obstacle> {
        if let Some(made) = self.landings.get(&function) {
            return Ok(*made);
        }
        let at = self.next()?;
        let jump = far(branch(0xe9, at.wrapping_add(4), function))?;
        let code = [&[0xf3, 0x0f, 0x1e, 0xfa], &jump[..]].concat();
        // It is called like a function, and jumps to one.
        self.push(&code, Some(Entry::FUNCTION_START));
        self.landings.insert(function, at);
        Ok(at)
    }

    /// `cmpl $0, key(%rip); jne target; jmp back`, or `je` where the branch is inverted. `enabled` is
    /// the first member of `struct static_key` and counts as on if it is not 0 (Linux v6.12
    /// kernel/jump_label.c); flags are free, for asm goto clobbers them. `holds` is how to unwind from the branch, which
    /// this is a part of.
    ///
    /// # Errors
    /// No room, or something is out of reach.
    pub fn static_branch(
        &mut self,
        key: Gva,
        target: Gva,
        back: Gva,
        inverted: bool,
        holds: Option<Entry>,
    ) -> Result<Gva, Obstacle> {
        let at = self.next()?;
        // The field ends one byte before the next instruction: the immediate follows it.
        let field = at.wrapping_add(2);
        let key = far(relocate::encode(RelocationKind::Relative32, key, -5, field))?;
        let condition = if inverted { 0x84 } else { 0x85 };
        let away = far(branch(condition, at.wrapping_add(8), target))?;
        let back = far(branch(0xe9, at.wrapping_add(13), back))?;
        let code = [&[0x83, 0x3d], &key[..], &[0x00, 0x0f], &away, &back].concat();
        self.push(&code, holds);
        Ok(at)
    }
}

fn far<T>(made: Result<T, relocate::OutOfReach>) -> Result<T, Obstacle> {
    made.map_err(|far| Obstacle::Far {
        name: "made code".to_owned(),
        far,
    })
}

#[cfg(test)]
mod tests {
    use iced_x86::{Code, Decoder, DecoderOptions, Instruction};

    use super::*;

    const START: Gva = Gva(0xffff_ffff_ff02_2000);
    const KEY: Gva = Gva(0xffff_ffff_8300_0000);
    const TARGET: Gva = Gva(0xffff_ffff_ff02_2500);
    const BACK: Gva = Gva(0xffff_ffff_ff02_2605);

    fn decoded(pieces: Pieces) -> Vec<Instruction> {
        let bytes = pieces.finish().bytes;
        Decoder::with_ip(64, &bytes, START.0, DecoderOptions::NONE)
            .iter()
            .take(3)
            .collect()
    }

    #[test]
    fn a_static_branch_tests_its_key_and_goes_either_way() {
        for (inverted, code) in [(false, Code::Jne_rel32_64), (true, Code::Je_rel32_64)] {
            let mut pieces = Pieces::new(START, 1);
            let at_branch = Some(Entry::UNDEFINED);
            pieces
                .static_branch(KEY, TARGET, BACK, inverted, at_branch)
                .unwrap();
            assert_eq!(pieces.holds, [at_branch]);
            let made = decoded(pieces);
            assert_eq!(made[0].code(), Code::Cmp_rm32_imm8);
            assert_eq!(made[0].ip_rel_memory_address(), KEY.0);
            assert_eq!(made[0].immediate(1), 0);
            assert_eq!(
                (made[1].code(), made[1].near_branch_target()),
                (code, TARGET.0)
            );
            assert_eq!(made[2].near_branch_target(), BACK.0);
        }
    }

    #[test]
    fn a_function_has_one_landing_however_often_it_is_named() {
        let mut pieces = Pieces::new(START, 2);
        let first = pieces.landing(KEY).unwrap();
        assert_eq!(pieces.landing(KEY).unwrap(), first);
        assert_ne!(pieces.landing(TARGET).unwrap(), first);
        assert_eq!(pieces.landing(BACK), Err(Obstacle::Room));
        assert_eq!(pieces.holds, [Some(Entry::FUNCTION_START); 2]);
        let made = decoded(pieces);
        assert_eq!(made[0].code(), Code::Endbr64);
        assert_eq!(made[1].near_branch_target(), KEY.0);
    }
}
