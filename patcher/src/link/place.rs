//! Where each section of a patch lies in the arena: sections of a kind side by side in one extent, and room
//! after the text for small pieces of code that linking makes itself.

use vmpatch_introspect::Gva;

use super::traps::{self, Block, Parts};
use crate::arena::{Arena, ArenaError, Extent};
use crate::patch::{Patch, SectionKind, SiteKind};

/// Most bytes that one piece of made code takes.
pub const PIECE: u64 = 32;
/// The kinds, in the order of their extents.
const KINDS: [SectionKind; 3] = [SectionKind::Text, SectionKind::ReadOnly, SectionKind::Data];

/// Sizes and offsets, before any address is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// For each section of the patch: its kind and its offset in the extent of that kind.
    offsets: Vec<(SectionKind, u64)>,
    /// The same for the parts of its tables.
    tables: Parts<(SectionKind, u64)>,
    /// Extents needed, with their size in bytes.
    sizes: Vec<(SectionKind, u64)>,
    /// Offset of the room for made code in the text extent.
    pieces: u64,
    /// How many pieces of it there may be.
    most_pieces: usize,
}

/// Addresses of everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Extents, one for each kind that there is.
    pub extents: Vec<Extent>,
    /// Start of each section.
    pub sections: Vec<Gva>,
    /// Start of the room for made code.
    pub pieces: Gva,
    /// Start of each part of the tables.
    pub tables: Parts<Gva>,
}

impl Shape {
    /// Lays out the sections of a patch. `stubs` is how many more pieces of code may be made.
    #[must_use]
    pub fn of(patch: &Patch, stubs: usize) -> Self {
        let mut offsets = Vec::with_capacity(patch.sections.len());
        let mut ends = [0_u64; KINDS.len()];
        let mut take = |block: Block| {
            let end = &mut ends[kind_index(block.kind)];
            if block.size == 0 {
                return (block.kind, *end);
            }
            let start = end.saturating_add(block.align - 1) & !(block.align - 1);
            *end = start.saturating_add(block.size);
            (block.kind, start)
        };
        for section in &patch.sections {
            offsets.push(take(Block {
                kind: section.kind,
                align: section.align,
                size: section.bytes.len() as u64,
            }));
        }
        let most_pieces = static_branches(patch).saturating_add(stubs);
        let room = traps::room(patch, most_pieces);
        let tables = Parts {
            bugs: take(room.bugs),
            faults: take(room.faults),
            files: take(room.files),
            unwind: take(room.unwind),
        };
        let pieces = ends[0].saturating_add(PIECE - 1) & !(PIECE - 1);
        ends[0] = pieces.saturating_add((most_pieces as u64).saturating_mul(PIECE));
        let sizes = KINDS
            .into_iter()
            .zip(ends)
            .filter(|(_, size)| *size > 0)
            .collect();
        Self {
            offsets,
            tables,
            sizes,
            pieces,
            most_pieces,
        }
    }

    /// How many pieces of made code there is room for.
    #[must_use]
    pub const fn most_pieces(&self) -> usize {
        self.most_pieces
    }

    /// Whether anything is mapped so.
    #[must_use]
    pub fn needs(&self, kind: SectionKind) -> bool {
        self.sizes.iter().any(|(needed, _)| *needed == kind)
    }

    /// Takes pages that no patch had yet.
    ///
    /// # Errors
    /// [`ArenaError::Full`].
    pub fn place(&self, arena: &Arena) -> Result<Placement, ArenaError> {
        arena.place(&self.sizes).map(|extents| self.at(extents))
    }

    /// The same place as before, if the extents are what this patch needs.
    #[must_use]
    pub fn place_again(&self, extents: &[Extent]) -> Option<Placement> {
        let fits = |(extent, (kind, size)): (&Extent, &(SectionKind, u64))| {
            extent.kind == *kind && u64::from(extent.pages) == size.div_ceil(4096)
        };
        let same = extents.len() == self.sizes.len() && extents.iter().zip(&self.sizes).all(fits);
        same.then(|| self.at(extents.to_vec()))
    }

    fn at(&self, extents: Vec<Extent>) -> Placement {
        let start = |kind| {
            let extent = extents.iter().find(|extent| extent.kind == kind);
            extent.map_or(Gva(0), |extent| Arena::address(*extent))
        };
        let section = |&(kind, offset): &(SectionKind, u64)| start(kind).wrapping_add(offset);
        let sections = self.offsets.iter().map(section).collect();
        let pieces = start(SectionKind::Text).wrapping_add(self.pieces);
        let tables = Parts {
            bugs: section(&self.tables.bugs),
            faults: section(&self.tables.faults),
            files: section(&self.tables.files),
            unwind: section(&self.tables.unwind),
        };
        Placement {
            sections,
            pieces,
            tables,
            extents,
        }
    }

    /// The bytes of each extent, from those of each section, of the made code and of the tables.
    #[must_use]
    pub fn contents(
        &self,
        sections: &[Vec<u8>],
        pieces: &[u8],
        tables: &Parts<Vec<u8>>,
    ) -> Vec<Vec<u8>> {
        let tables = self.tables.in_order().into_iter().zip(tables.in_order());
        let parts: Vec<_> = self.offsets.iter().zip(sections).chain(tables).collect();
        let fill = |&(kind, size): &(SectionKind, u64)| {
            let gap = if kind == SectionKind::Text { 0xcc } else { 0 };
            let mut bytes = vec![gap; size as usize];
            let mut put = |at: u64, part: &[u8]| {
                let into = bytes.get_mut(at as usize..at as usize + part.len());
                if let Some(into) = into {
                    into.copy_from_slice(part);
                }
            };
            for ((of, offset), part) in &parts {
                if *of == kind {
                    put(*offset, part);
                }
            }
            if kind == SectionKind::Text {
                put(self.pieces, pieces);
            }
            bytes
        };
        self.sizes.iter().map(fill).collect()
    }
}

const fn kind_index(kind: SectionKind) -> usize {
    match kind {
        SectionKind::Text => 0,
        SectionKind::ReadOnly => 1,
        SectionKind::Data => 2,
    }
}

fn static_branches(patch: &Patch) -> usize {
    let sites = patch.sections.iter().flat_map(|section| &section.sites);
    sites
        .filter(|site| matches!(site.kind, SiteKind::JumpLabel { .. }))
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::patch::{Requirement, Section};

    fn section(kind: SectionKind, align: u64, bytes: &[u8]) -> Section {
        Section {
            name: "s".into(),
            kind,
            align,
            bytes: bytes.to_vec(),
            relocations: Vec::new(),
            sites: Vec::new(),
            traps: Vec::new(),
            unwind: Vec::new(),
        }
    }

    fn patch(sections: Vec<Section>) -> Patch {
        Patch {
            name: "p".into(),
            requires: Requirement::default(),
            units: Vec::new(),
            replaced: Vec::new(),
            sections,
            symbols: Vec::new(),
            callbacks: Vec::new(),
        }
    }

    #[test]
    fn sections_of_a_kind_share_an_extent_and_keep_their_alignment() {
        let shape = Shape::of(
            &patch(vec![
                section(SectionKind::Text, 16, &[1; 5]),
                section(SectionKind::Data, 8, &[2; 3]),
                section(SectionKind::Text, 16, &[3; 5]),
            ]),
            1,
        );
        let extents = [
            Extent {
                page: 34,
                pages: 1,
                kind: SectionKind::Text,
            },
            Extent {
                page: 35,
                pages: 1,
                kind: SectionKind::Data,
            },
        ];
        let placed = shape.place_again(&extents).unwrap();
        let text = Arena::address(extents[0]);
        assert_eq!(placed.sections[2], text.wrapping_add(16));
        assert_eq!(placed.sections[1], Arena::address(extents[1]));
        assert_eq!(placed.pieces, text.wrapping_add(32));
        let contents = shape.contents(
            &[vec![1; 5], vec![2; 3], vec![3; 5]],
            &[9],
            &Parts::default(),
        );
        assert_eq!(contents[0][..6], [1, 1, 1, 1, 1, 0xcc]);
        assert_eq!(
            (contents[0][16], contents[0][32], contents[0].len()),
            (3, 9, 64)
        );
        assert_eq!(contents[1], [2, 2, 2]);
    }

    #[test]
    fn extents_of_another_patch_are_not_used_again() {
        let shape = Shape::of(&patch(vec![section(SectionKind::Text, 1, &[0; 5000])]), 0);
        let small = [Extent {
            page: 34,
            pages: 1,
            kind: SectionKind::Text,
        }];
        assert!(shape.place_again(&small).is_none());
        let other = [Extent {
            page: 34,
            pages: 2,
            kind: SectionKind::Data,
        }];
        assert!(shape.place_again(&other).is_none());
    }
}
