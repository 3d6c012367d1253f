//! From a name to the positions that may hold it: a chained hash table. The hash is keyed at random,
//! so a guest cannot make all names collide.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

/// End of a chain.
const NONE: u32 = u32::MAX;

/// Positions by hash of their name.
#[derive(Debug, Default)]
pub(super) struct NameIndex {
    hasher: RandomState,
    /// First position of each bucket; a power of two of them, or none.
    first: Vec<u32>,
    /// Next position of the same bucket; one for each position, ascending along a chain.
    next: Vec<u32>,
}

impl NameIndex {
    /// Indexes `names` by their position.
    pub(super) fn new<'a>(
        names: impl ExactSizeIterator<Item = &'a str> + DoubleEndedIterator,
    ) -> Self {
        let count = names.len();
        let mut index = Self {
            hasher: RandomState::new(),
            first: vec![NONE; count.next_power_of_two()],
            next: vec![NONE; count],
        };
        // From the last to the first, so that each chain ascends.
        for (position, name) in names.enumerate().rev() {
            index.insert(position, name);
        }
        index
    }

    fn insert(&mut self, position: usize, name: &str) {
        let bucket = self.bucket(name);
        let (Some(first), Some(next)) = (self.first.get_mut(bucket), self.next.get_mut(position))
        else {
            return;
        };
        *next = *first;
        *first = u32::try_from(position).unwrap_or(NONE);
    }

    fn bucket(&self, name: &str) -> usize {
        let hash = self.hasher.hash_one(name.as_bytes());
        usize::try_from(hash).unwrap_or(0) & self.first.len().wrapping_sub(1)
    }

    /// Positions, ascending, that may have that name; the caller compares.
    pub(super) fn candidates(&self, name: &str) -> impl Iterator<Item = usize> {
        let position = |at: &u32| if *at == NONE { None } else { Some(*at) };
        let first = self.first.get(self.bucket(name)).and_then(position);
        std::iter::successors(first, move |&at| {
            self.next.get(at as usize).and_then(position)
        })
        .map(|at| at as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_among_its_candidates() {
        let names: Vec<String> = (0..1000).map(|n| format!("name{}", n % 300)).collect();
        let index = NameIndex::new(names.iter().map(String::as_str));
        for name in &names {
            let found: Vec<_> = index
                .candidates(name)
                .filter(|&at| names[at] == *name)
                .collect();
            let expected: Vec<_> = (0..1000).filter(|&at| names[at] == *name).collect();
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn an_empty_index_has_no_candidates() {
        assert_eq!(NameIndex::default().candidates("x").count(), 0);
        assert_eq!(
            NameIndex::new(std::iter::empty()).candidates("x").count(),
            0
        );
    }
}
