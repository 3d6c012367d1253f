//! Shadow data that patches keep beside live objects (`include/vmpatch/shadow.h`): how much there is. Owns reading the chains,
//! which belong to the guest and change while they are read; what is told is of a moment, and nothing hangs on it.

use std::collections::BTreeMap;

use serde::Serialize;
use vmpatch_introspect::Gva;

use crate::arena::fixed::SHADOW_ROOT;

/// Heads of chains (`VMPATCH_SHADOW_BITS`).
const HEADS: u64 = 1 << 9;
/// Where an entry has its id: behind `next`, `struct rcu_head` of two words (Linux v6.12 include/linux/types.h) and `obj`.
const ID: u64 = 32;
/// Most entries that are counted: a chain may lead in a circle.
const MOST: u64 = 1 << 20;

/// The data of one id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ShadowData {
    /// The id.
    pub id: u64,
    /// How many objects have such data.
    pub objects: u64,
}

/// Counts, by what is at an address of the kernel's, if something is.
#[must_use]
pub fn count(word: &dyn Fn(Gva) -> Option<u64>) -> Vec<ShadowData> {
    let mut found = BTreeMap::<u64, u64>::new();
    let mut left = MOST;
    for head in 0..HEADS {
        // Bit 0 of a head is its lock.
        let next = |link| Some(word(link)? & !1).filter(|to| *to != 0).map(Gva);
        let mut entry = next(SHADOW_ROOT.wrapping_add(head * 8));
        while let (Some(at), 1..) = (entry, left) {
            let Some(id) = word(at.wrapping_add(ID)) else {
                break;
            };
            *found.entry(id).or_default() += 1;
            left -= 1;
            entry = next(at);
        }
    }
    let found = found.into_iter();
    found
        .map(|(id, objects)| ShadowData { id, objects })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words of memory; the root's are zero.
    fn memory(words: &[(u64, u64)]) -> impl Fn(Gva) -> Option<u64> + use<> {
        let words: BTreeMap<_, _> = words.iter().copied().collect();
        move |at| {
            let root = SHADOW_ROOT.0..SHADOW_ROOT.0 + HEADS * 8;
            let zero = root.contains(&at.0).then_some(0);
            words.get(&at.0).copied().or(zero)
        }
    }

    #[test]
    fn entries_are_counted_by_id_along_locked_chains_too() {
        let (a, b, c) = (0x1000, 0x2000, 0x3000);
        let words = memory(&[
            (SHADOW_ROOT.0 + 8, a | 1),
            (a, b),
            (a + ID, 7),
            (b, 0),
            (b + ID, 9),
            (SHADOW_ROOT.0 + 511 * 8, c),
            (c, 0),
            (c + ID, 7),
        ]);
        let counted = count(&words);
        let of = |id, objects| ShadowData { id, objects };
        assert_eq!(counted, [of(7, 2), of(9, 1)]);
        assert!(count(&|_| None).is_empty());
    }

    #[test]
    fn a_circle_and_a_chain_into_nothing_come_to_an_end() {
        let a = 0x1000;
        let counted = count(&memory(&[(SHADOW_ROOT.0, a), (a, a), (a + ID, 7)]));
        assert_eq!(counted[0].objects, MOST);
        let words = memory(&[(SHADOW_ROOT.0, a), (a, 0x5000), (a + ID, 7)]);
        assert_eq!(count(&words)[0].objects, 1);
    }
}
