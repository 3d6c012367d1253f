//! The code that must stand on no stack: sorted once before the stop, searched many times inside it.
//! Owns the search; what a hit means is [`gate`](super::gate)'s business.

use vmpatch_introspect::{Gva, GvaRange};

use crate::arena::{BusyKind, BusyRange, ModuleClaim, SiteRecord};

/// Busy ranges and the inner bytes of the places to be rewritten.
#[derive(Clone, Debug, Default)]
pub struct BusyRanges {
    /// Sorted by start, not overlapping in practice; searched from the last start at or below.
    rows: Vec<Row>,
    /// From the lowest start to the highest end: most words of a stack lie outside.
    hull: Option<GvaRange>,
    /// Modules that hold places to be rewritten.
    modules: Vec<ModuleClaim>,
}

#[derive(Clone, Debug)]
struct Row {
    range: GvaRange,
    base: Gva,
    /// The highest end of this row and all before it, so that a search knows when to give up.
    reach: Gva,
    function: String,
    kind: RangeKind,
}

/// What a range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeKind {
    /// A function, or a part of one: no frame may lie in it.
    Code(BusyKind),
    /// Bytes to be rewritten, past the first: nobody may go on from there.
    Covered,
}

/// A hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit<'a> {
    /// The function.
    pub function: &'a str,
    /// What the range is.
    pub kind: RangeKind,
    /// Where the function, the part of it or the rewritten place begins.
    pub base: Gva,
}

impl Hit<'_> {
    /// How far `at` lies from there, as stack traces of the kernel have it: the return address itself.
    #[must_use]
    pub const fn offset_of(&self, at: Gva) -> u64 {
        at.0.saturating_sub(self.base.0)
    }
}

impl BusyRanges {
    /// Sorts the ranges of a change.
    #[must_use]
    pub fn new<'a>(
        busy: impl Iterator<Item = &'a BusyRange>,
        sites: impl IntoIterator<Item = &'a SiteRecord>,
    ) -> Self {
        let code = busy.map(|busy| Row {
            range: busy.range,
            base: busy.range.start,
            reach: busy.range.end,
            function: busy.function.clone(),
            kind: RangeKind::Code(busy.kind),
        });
        let covered = sites.into_iter().map(|site| Row {
            // A task that goes on from the first byte meets whole instructions, old or new.
            range: GvaRange {
                start: site.covered.start.wrapping_add(1),
                end: site.covered.end,
            },
            base: site.covered.start,
            reach: site.covered.end,
            function: site.function.clone(),
            kind: RangeKind::Covered,
        });
        let mut rows: Vec<Row> = code
            .chain(covered)
            .filter(|row| !row.range.is_empty())
            .collect();
        rows.sort_by_key(|row| (row.range.start, row.range.end));
        let mut reach = Gva(0);
        for row in &mut rows {
            reach = reach.max(row.range.end);
            row.reach = reach;
        }
        let hull = rows.first().map(|first| GvaRange {
            start: first.range.start,
            end: reach,
        });
        Self {
            rows,
            hull,
            modules: Vec::new(),
        }
    }

    /// The same for places that lie in these modules, which must be there and not on their way out.
    #[must_use]
    pub fn in_modules(self, modules: impl IntoIterator<Item = ModuleClaim>) -> Self {
        Self {
            modules: modules.into_iter().collect(),
            ..self
        }
    }

    /// The modules that hold places to be rewritten.
    #[must_use]
    pub fn modules(&self) -> &[ModuleClaim] {
        &self.modules
    }

    /// How many ranges there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is none, so that nothing can be busy.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The code that holds an instruction pointer or, for a return address, the byte before it.
    #[must_use]
    pub fn holding(&self, at: Gva) -> Option<Hit<'_>> {
        self.search(at, |row| {
            row.range.contains(at) && row.kind != RangeKind::Covered
        })
    }

    /// The place to be rewritten that `at` would go on within.
    #[must_use]
    pub fn covering(&self, at: Gva) -> Option<Hit<'_>> {
        self.search(at, |row| {
            row.range.contains(at) && row.kind == RangeKind::Covered
        })
    }

    /// The range that a word may point into, be it as an instruction pointer or as a return address. A call
    /// that never returns ends its function, so the end itself counts.
    #[must_use]
    pub fn touched_by(&self, word: u64) -> Option<Hit<'_>> {
        let hull = self.hull?;
        if word < hull.start.0 || word > hull.end.0 {
            return None;
        }
        self.search(Gva(word), |row| {
            row.range.start.0 <= word && word <= row.range.end.0
        })
    }

    fn search(&self, at: Gva, holds: impl Fn(&Row) -> bool) -> Option<Hit<'_>> {
        let after = self.rows.partition_point(|row| row.range.start <= at);
        self.rows
            .get(..after)?
            .iter()
            .rev()
            .take_while(|row| row.reach >= at)
            .find(|row| holds(row))
            .map(|row| Hit {
                function: &row.function,
                kind: row.kind,
                base: row.base,
            })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::arena::SiteRole;

    fn busy(start: u64, end: u64, function: &str) -> BusyRange {
        BusyRange {
            range: GvaRange {
                start: Gva(start),
                end: Gva(end),
            },
            function: function.to_owned(),
            kind: BusyKind::Old,
        }
    }

    fn site(start: u64, end: u64) -> SiteRecord {
        SiteRecord {
            function: "f".to_owned(),
            role: SiteRole::Entry,
            at: Gva(start),
            edits: Vec::new(),
            covered: GvaRange {
                start: Gva(start),
                end: Gva(end),
            },
        }
    }

    #[test]
    fn the_end_of_a_function_is_outside_for_a_frame_and_inside_for_a_scan() {
        let rows = [busy(0x100, 0x140, "f")];
        let ranges = BusyRanges::new(rows.iter(), &[]);
        assert!(ranges.holding(Gva(0x140)).is_none());
        let hit = ranges.holding(Gva(0x13f)).unwrap();
        assert_eq!(hit.offset_of(Gva(0x140)), 0x40);
        assert!(ranges.touched_by(0x140).is_some());
        assert!(ranges.touched_by(0x141).is_none());
        assert!(ranges.touched_by(0xff).is_none());
    }

    #[test]
    fn the_first_byte_of_a_rewritten_place_is_free_and_the_others_are_not() {
        let ranges = BusyRanges::new([].iter(), &[site(0x105, 0x10a)]);
        assert!(ranges.covering(Gva(0x105)).is_none());
        assert!(ranges.covering(Gva(0x106)).is_some());
        assert!(ranges.covering(Gva(0x109)).is_some());
        assert!(ranges.covering(Gva(0x10a)).is_none());
    }

    proptest! {
        #[test]
        fn the_search_agrees_with_looking_at_every_range(
            starts in proptest::collection::vec((0_u64..200, 1_u64..60), 0..12),
            at in 0_u64..300,
        ) {
            let rows: Vec<_> = starts.iter().map(|&(s, n)| busy(s, s + n, "f")).collect();
            let sites: Vec<_> = starts.iter().map(|&(s, n)| site(s + 7, s + 7 + n)).collect();
            let ranges = BusyRanges::new(rows.iter(), &sites);
            let held = starts.iter().any(|&(s, n)| s <= at && at < s + n);
            let covered = starts.iter().any(|&(s, n)| s + 7 < at && at < s + 7 + n);
            let touched = starts.iter().any(|&(s, n)| {
                (s <= at && at <= s + n) || (n > 1 && s + 7 < at && at <= s + 7 + n)
            });
            prop_assert_eq!(ranges.holding(Gva(at)).is_some(), held);
            prop_assert_eq!(ranges.covering(Gva(at)).is_some(), covered);
            prop_assert_eq!(ranges.touched_by(at).is_some(), touched);
        }
    }
}
