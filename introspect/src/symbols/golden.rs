//! Kallsyms tables written by hand in each layout a kernel has had, and damaged ones.

use proptest::prelude::*;

use super::Symbols;
use super::kallsyms::{self, Evidence};
use crate::address::Gva;
use crate::flat::{BASE, Flat};

/// What differs between kernels.
#[derive(Clone, Copy, Debug)]
struct Layout {
    /// Addresses stand before the names (before v6.4).
    addresses_first: bool,
    /// `seqs_of_names` stand before the token table (v6.2, v6.3).
    seqs_before_tokens: bool,
    encoding: Encoding,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    AbsolutePerCpu,
    FromBase,
    FromItself,
    Absolute,
}

const V4_6: Layout = Layout {
    addresses_first: true,
    seqs_before_tokens: false,
    encoding: Encoding::AbsolutePerCpu,
};
const V6_2: Layout = Layout {
    seqs_before_tokens: true,
    ..V4_6
};
const V6_4: Layout = Layout {
    addresses_first: false,
    ..V4_6
};
const V6_15: Layout = Layout {
    encoding: Encoding::FromBase,
    ..V6_4
};
const V7_0: Layout = Layout {
    encoding: Encoding::FromItself,
    ..V6_4
};
const ALL: [Layout; 8] = [
    V4_6,
    Layout {
        encoding: Encoding::FromBase,
        ..V4_6
    },
    Layout {
        encoding: Encoding::Absolute,
        ..V4_6
    },
    V6_2,
    V6_4,
    Layout {
        encoding: Encoding::Absolute,
        ..V6_4
    },
    V6_15,
    V7_0,
];

/// A symbol as a kernel has it: kind and name together, and address.
type Row = (String, u64);

/// Symbols of a small kernel: per-CPU ones low, text, and one name too long for one byte of length.
fn rows(per_cpu: bool) -> Vec<Row> {
    let mut rows = Vec::new();
    for cpu in 0..if per_cpu { 10 } else { 0 } {
        rows.push((format!("Apercpu_{cpu}"), cpu * 8));
    }
    rows.push(("T_text".to_owned(), BASE.0));
    for nth in 0..1500 {
        rows.push((format!("tfunction_{nth}"), BASE.0 + 16 * nth));
    }
    rows.push((format!("t{}", "Q".repeat(200)), BASE.0 + 0x10_0000));
    rows
}

/// Bytes that can be aligned as `scripts/kallsyms` aligns its tables.
#[derive(Default)]
struct Image(Vec<u8>);

impl Image {
    fn align(&mut self) -> usize {
        self.0.resize(self.0.len().next_multiple_of(8), 0);
        self.0.len()
    }

    fn words(&mut self, words: impl IntoIterator<Item = u32>) {
        self.align();
        self.0.extend(words.into_iter().flat_map(u32::to_le_bytes));
    }
}

/// Tokens: each byte is itself, but for 0x80, which is `function_`.
fn token(byte: u8) -> Vec<u8> {
    match byte {
        0x80 => b"function_".to_vec(),
        b' '..=b'~' => vec![byte],
        _ => Vec::new(),
    }
}

fn packed(name: &str) -> Vec<u8> {
    let name = name.replace("function_", "\u{1}");
    let bytes: Vec<u8> = name
        .bytes()
        .map(|byte| if byte == 1 { 0x80 } else { byte })
        .collect();
    let len = bytes.len();
    let mut packed = if len < 0x80 {
        vec![len as u8]
    } else {
        vec![(len & 0x7f | 0x80) as u8, (len >> 7) as u8]
    };
    packed.extend(bytes);
    packed
}

fn addresses(image: &mut Image, rows: &[Row], encoding: Encoding) {
    let base = BASE.0;
    let table = BASE.0 + image.align() as u64;
    let offset = |(position, (_, at)): (usize, &Row)| match encoding {
        Encoding::AbsolutePerCpu if *at < base => *at as u32,
        Encoding::AbsolutePerCpu => (base.wrapping_sub(1).wrapping_sub(*at)) as u32,
        Encoding::FromItself => at.wrapping_sub(table + position as u64 * 4) as u32,
        _ => (at - base) as u32,
    };
    if encoding == Encoding::Absolute {
        image.words(
            rows.iter()
                .flat_map(|(_, at)| [*at as u32, (*at >> 32) as u32]),
        );
        return;
    }
    image.words(rows.iter().enumerate().map(offset));
    if encoding != Encoding::FromItself {
        image.words([base as u32, (base >> 32) as u32]);
    }
}

fn seqs(image: &mut Image, rows: &[Row]) {
    image.align();
    let seqs = (0..rows.len() as u32).flat_map(|seq| seq.to_be_bytes().into_iter().skip(1));
    image.0.extend(seqs);
}

fn names(image: &mut Image, rows: &[Row]) {
    image.words([rows.len() as u32]);
    let start = image.align();
    let mut markers = Vec::new();
    for (position, (name, _)) in rows.iter().enumerate() {
        if position % 256 == 0 {
            markers.push((image.0.len() - start) as u32);
        }
        image.0.extend(packed(name));
    }
    image.words(markers);
}

fn tokens(image: &mut Image) {
    let start = image.align();
    let mut index = Vec::new();
    for byte in 0..=u8::MAX {
        index.push((image.0.len() - start) as u16);
        image.0.extend(token(byte));
        image.0.push(0);
    }
    image.align();
    image.0.extend(index.into_iter().flat_map(u16::to_le_bytes));
}

fn write(layout: Layout, rows: &[Row]) -> Vec<u8> {
    let mut image = Image(b"other data first".repeat(9));
    image.align();
    if layout.addresses_first {
        addresses(&mut image, rows, layout.encoding);
    }
    names(&mut image, rows);
    if layout.seqs_before_tokens {
        seqs(&mut image, rows);
    }
    tokens(&mut image);
    if !layout.addresses_first {
        addresses(&mut image, rows, layout.encoding);
        seqs(&mut image, rows);
    }
    image.align();
    image.0.extend([0xee; 64]);
    image.0
}

fn read(image: &[u8], at: u64) -> Option<Symbols> {
    let flat = Flat::new(image);
    let evidence = Evidence {
        anchors: vec![("_text", Gva(at))],
    };
    kallsyms::read(&flat.memory(), &[flat.range()], &evidence).ok()
}

fn has_per_cpu(layout: Layout) -> bool {
    matches!(
        layout.encoding,
        Encoding::AbsolutePerCpu | Encoding::Absolute
    )
}

#[test]
fn every_layout_gives_the_symbols_that_were_written() {
    for layout in ALL {
        let rows = rows(has_per_cpu(layout));
        let symbols = read(&write(layout, &rows), BASE.0).unwrap_or_else(|| panic!("{layout:?}"));
        let found: Vec<Row> = symbols
            .iter()
            .map(|symbol| (format!("{}{}", symbol.kind, symbol.name), symbol.at.0))
            .collect();
        assert_eq!(found, rows, "{layout:?}");
    }
}

#[test]
fn tables_that_contradict_the_entry_points_are_refused() {
    for layout in ALL {
        let image = write(layout, &rows(has_per_cpu(layout)));
        assert!(read(&image, BASE.0 + 16).is_none(), "{layout:?}");
    }
}

#[test]
fn tables_behind_a_decoy_are_found() {
    let mut image = Image(Vec::new());
    for _ in 0..3 {
        tokens(&mut image);
    }
    image.align();
    let rows = rows(true);
    image.0.extend(write(V6_4, &rows));
    assert_eq!(
        read(&image.0, BASE.0).map(|symbols| symbols.len()),
        Some(rows.len())
    );
}

proptest! {
    #[test]
    fn damaged_tables_never_panic(
        layout in prop::sample::select(&ALL[..]),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut image = write(layout, &rows(has_per_cpu(layout)));
        for (place, byte) in damage {
            let at = place.index(image.len());
            image[at] = byte;
        }
        let _ = read(&image, BASE.0);
        image.truncate(cut.index(image.len()));
        let _ = read(&image, BASE.0);
    }
}
