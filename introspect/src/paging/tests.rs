//! Walks over tables made by hand and by chance.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::address::GpaRange;

/// Tables written by hand: one word an entry, everything else zero, RAM to `top`.
struct Words {
    words: HashMap<u64, u64>,
    top: u64,
}

impl PhysicalMemory for Words {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        if at
            .0
            .checked_add(into.len() as u64)
            .is_none_or(|end| end > self.top)
        {
            return Err(MemoryError::NotBacked {
                at,
                len: into.len(),
            });
        }
        for (offset, byte) in into.iter_mut().enumerate() {
            let place = at.0 + offset as u64;
            let word = self.words.get(&(place & !7)).copied().unwrap_or(0);
            *byte = word.to_le_bytes()[(place % 8) as usize];
        }
        Ok(())
    }

    fn ram(&self) -> Vec<GpaRange> {
        vec![GpaRange {
            start: Gpa(0),
            end: Gpa(self.top),
        }]
    }
}

fn words(entries: &[(u64, u64)]) -> Words {
    Words {
        words: entries.iter().copied().collect(),
        top: 0x10_0000,
    }
}

const FOUR: AddressSpace = AddressSpace {
    root: Gpa(0x1000),
    five_level: false,
};
/// Last entry of each level: the address ffff_ffff_ffff_f000.
const LAST: u64 = 511 * 8;

#[test]
fn rights_are_those_of_the_strictest_level() {
    let memory = words(&[
        (0x1000 + LAST, 0x2007),
        (0x2000 + LAST, 0x3003),
        (0x3000 + LAST, NO_EXECUTE | 0x4007),
        (0x4000 + LAST, 0x5005),
    ]);
    let found = FOUR
        .translate(&memory, Gva(0xffff_ffff_ffff_f123))
        .unwrap()
        .unwrap();
    assert_eq!(
        (found.at, found.left_in_page),
        (Gpa(0x5123), 0x1000 - 0x123)
    );
    assert_eq!(
        (found.writable, found.executable, found.user),
        (false, false, false)
    );
}

#[test]
fn a_large_page_keeps_the_low_21_bits() {
    let memory = words(&[
        (0x1000 + LAST, 0x2003),
        (0x2000 + 510 * 8, 0x3003),
        (0x3000 + 64 * 8, (1 << 12) | 0x80_0000 | LARGE | PRESENT),
    ]);
    let found = FOUR
        .translate(&memory, Gva(0xffff_ffff_8812_3456))
        .unwrap()
        .unwrap();
    assert_eq!(found.at, Gpa(0x92_3456));
    assert_eq!(found.page_size, LARGE_PAGE);
    assert!(found.executable && !found.writable);
}

#[test]
fn words_on_both_sides_of_a_page_border_and_across_it_are_read() {
    // Two pages, of which the second lies before the first.
    let memory = words(&[
        (0x1000 + LAST, 0x2003),
        (0x2000 + LAST, 0x3003),
        (0x3000 + LAST, 0x4003),
        (0x4000 + LAST - 8, 0x6003),
        (0x4000 + LAST, 0x5003),
        (0x6ff8, 0x1122_3344_5566_7788),
        (0x5000, 0x99aa_bbcc_ddee_ff00),
        (0x5ff8, 7),
    ]);
    let kernel = KernelMemory::new(&memory, FOUR);
    let first = Gva(0xffff_ffff_ffff_e000);
    let mut found = [0; 4];
    let offsets = [0xff8, 0x1000, 0xffc, 0x1ff8];
    kernel.read_words(first, &offsets, &mut found).unwrap();
    let across = 0xddee_ff00_1122_3344;
    assert_eq!(
        found,
        [0x1122_3344_5566_7788, 0x99aa_bbcc_ddee_ff00, across, 7]
    );
    let mut one = [0];
    for (at, offset) in [(first, 0x2000), (Gva(0xffff_ffff_0000_0000), 0)] {
        let error = kernel.read_words(at, &[offset], &mut one);
        assert!(error.is_err(), "{at} {offset:#x}");
    }
}

#[test]
fn five_levels_take_one_more_table() {
    let space = AddressSpace {
        root: Gpa(0x6000),
        five_level: true,
    };
    let mut entries = vec![(0x6000 + LAST, 0x1003)];
    entries.extend([
        (0x1000 + LAST, 0x2003),
        (0x2000 + LAST, (1 << 30) | LARGE | 1),
    ]);
    let found = space
        .translate(&words(&entries), Gva(u64::MAX))
        .unwrap()
        .unwrap();
    assert_eq!(found.at, Gpa(0x7fff_ffff));
    assert_eq!(found.page_size, 1 << 30);
}

#[test]
fn an_encryption_bit_is_no_part_of_the_address() {
    let bit = 1 << 51;
    let memory = words(&[
        (0x1000 + LAST, bit | 0x2003),
        (0x2000 + LAST, bit | 0x3003),
        (0x3000 + LAST, bit | 0x4003),
        (0x4000 + LAST, bit | 0x5003),
    ]);
    let found = FOUR.translate(&memory, Gva(u64::MAX)).unwrap().unwrap();
    assert_eq!(found.at, Gpa(0x5fff));
}

#[test]
fn a_table_that_holds_itself_ends_the_walk_after_four_levels() {
    let memory = words(&[(0x1000 + LAST, 0x1003)]);
    let found = FOUR.translate(&memory, Gva(u64::MAX)).unwrap().unwrap();
    assert_eq!(found.at, Gpa(0x1fff));
}

#[test]
fn a_table_outside_ram_is_an_error_and_not_a_hole() {
    let memory = words(&[(0x1000 + LAST, 0x7fff_f003)]);
    assert!(FOUR.translate(&memory, Gva(u64::MAX)).is_err());
}

#[test]
fn a_non_canonical_address_is_not_mapped() {
    let memory = words(&[(0x1000, 0x2003), (0x2000, LARGE | PRESENT)]);
    assert!(FOUR.translate(&memory, Gva(0x1000)).unwrap().is_some());
    assert!(
        FOUR.translate(&memory, Gva(1 << 48 | 0x1000))
            .unwrap()
            .is_none()
    );
}

#[test]
fn a_read_over_two_pages_that_are_not_neighbours_joins_them() {
    let memory = words(&[
        (0x1000 + LAST, 0x2003),
        (0x2000 + LAST, 0x3003),
        (0x3000 + LAST, 0x4003),
        (0x4000 + LAST - 8, 0x9003),
        (0x4000 + LAST, 0x5003),
        (0x9ff8, 0x1122_3344_5566_7788),
        (0x5000, 0x99aa_bbcc_ddee_ff00),
    ]);
    let kernel = KernelMemory::new(&memory, FOUR);
    for _ in 0..2 {
        let word = kernel.read_u64(Gva(0xffff_ffff_ffff_effc)).unwrap();
        assert_eq!(word, 0xddee_ff00_1122_3344);
    }
    assert_eq!(
        kernel.read_u64(Gva(0xffff_ffff_ffff_dffc)),
        Err(ReadError::NotMapped(Gva(0xffff_ffff_ffff_dffc)))
    );
}

proptest! {
    #[test]
    fn hostile_tables_never_panic(
        entries in proptest::collection::vec((0_u64..0x2000, any::<u64>()), 0..64),
        at: u64,
        five_level: bool,
    ) {
        let entries: Vec<_> =
            entries.into_iter().map(|(place, word)| (place * 8, word & 0x8000_0000_000f_ffff)).collect();
        let memory = words(&entries);
        let space = AddressSpace { root: Gpa(0x1000), five_level };
        let _ = space.translate(&memory, Gva(at));
        let _ = space.hole(&memory, Gva(at));
        let _ = KernelMemory::new(&memory, space).read(Gva(at), &mut [0; 9000]);
    }
}
