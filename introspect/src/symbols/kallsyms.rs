//! The normalised layer of kallsyms: names spelled out, offsets turned into addresses. Several
//! encodings fit the same bytes; the one is taken that agrees with addresses known from elsewhere.

use crate::address::{Gva, GvaRange};
use crate::kernel::AttachError;
use crate::paging::KernelMemory;
use crate::symbols::tables::{self, NameTables};
use crate::symbols::{Row, Symbols};

/// Longest name (Linux v6.12 include/linux/kallsyms.h, KSYM_NAME_LEN), with room to spare.
const LONGEST_NAME: usize = 1024;
/// Most bytes of all names, spelled out. Linux v6.12 as Debian has it needs 4 MiB.
const MOST_TEXT: usize = 64 << 20;

/// What is known of some symbols before the tables are read.
#[derive(Clone, Debug)]
pub(crate) struct Evidence {
    /// Names and the address that each must have, if a symbol of that name is there at all.
    pub(crate) anchors: Vec<(&'static str, Gva)>,
}

/// How the address of a symbol is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    /// Signed: not negative is absolute, negative is `relative_base - 1 - v` (CONFIG_KALLSYMS_ABSOLUTE_PERCPU,
    /// Linux v4.6 to v6.14).
    AbsolutePerCpu(u64),
    /// Unsigned from `relative_base` (Linux v4.6 without the option, and v6.15 on).
    FromBase(u64),
    /// Signed, from the place of the offset itself, which lies there (Linux v7.0 on).
    FromItself(Gva),
    /// The address itself, 8 bytes (before v4.6, and v6.10 and before without base-relative tables).
    Absolute,
}

/// The symbols of the kernel whose read-only data are `ranges`.
///
/// # Errors
/// [`AttachError::Unsupported`] where no tables are found, or none whose addresses agree.
pub(crate) fn read(
    memory: &KernelMemory<'_>,
    ranges: &[GvaRange],
    evidence: &Evidence,
) -> Result<Symbols, AttachError> {
    let mut seen = false;
    let mut symbols = None;
    for range in ranges {
        let found = tables::search(memory, *range, |tables| {
            seen = true;
            symbols = decode(memory, &tables, evidence);
            symbols.is_some()
        })?;
        if found {
            break;
        }
    }
    let why = if seen {
        "tables were found, but no known encoding of addresses agrees with the kernel's entry points"
    } else {
        "no token table with its index and names was found in the kernel's data"
    };
    symbols.ok_or_else(|| AttachError::Unsupported {
        what: "kallsyms",
        why: why.to_owned(),
    })
}

/// Names and addresses together, if some encoding agrees with the evidence.
fn decode(memory: &KernelMemory<'_>, tables: &NameTables, evidence: &Evidence) -> Option<Symbols> {
    let (names, mut rows) = spell(tables)?;
    let known = known_rows(&names, &rows, evidence);
    let (encoding, bytes) =
        candidates(memory, tables).find(|(encoding, bytes)| agrees(*encoding, bytes, &known))?;
    for (position, row) in rows.iter_mut().enumerate() {
        row.at = address(encoding, &bytes, position)?;
    }
    rows.is_sorted_by_key(|row| row.at)
        .then(|| Symbols::from_rows(names, rows))
}

/// All names in a row, and a row for each whose address is still to be filled in.
fn spell(tables: &NameTables) -> Option<(String, Vec<Row>)> {
    let mut speller = Speller::new(tables);
    let mut rows = Vec::with_capacity(tables.count as usize);
    let mut rest = tables.names.as_slice();
    while !rest.is_empty() {
        let (header, len) = tables::name_length(rest)?;
        let (packed, after) = rest.get(header..)?.split_at_checked(len)?;
        rest = after;
        let start = speller.end;
        for &byte in packed {
            speller.push(byte)?;
            if speller.end - start > LONGEST_NAME {
                return None;
            }
        }
        // The first letter is the kind.
        let kind = *speller.text.get(start).filter(|_| speller.end > start)?;
        let len = speller.end - start - 1;
        let name = (u32::try_from(start + 1).ok()?, u16::try_from(len).ok()?);
        rows.push(Row {
            at: Gva(0),
            name,
            kind,
        });
    }
    speller.text.truncate(speller.end);
    Some((String::from_utf8(speller.text).ok()?, rows))
}

/// Puts tokens one after the other. Most are short: those are copied whole, with what lies behind them,
/// which the next one overwrites. That is one store each, and there are a million.
struct Speller<'a> {
    short: Vec<([u8; SHORT], usize)>,
    long: Vec<&'a [u8]>,
    text: Vec<u8>,
    /// How much of `text` is spelled so far.
    end: usize,
}

/// Longest token that is copied whole.
const SHORT: usize = 16;

impl<'a> Speller<'a> {
    fn new(tables: &'a NameTables) -> Self {
        let long: Vec<&[u8]> = (0..=u8::MAX).map(|byte| tables.tokens.get(byte)).collect();
        let short = |token: &&[u8]| {
            let mut padded = [0; SHORT];
            padded
                .iter_mut()
                .zip(token.iter())
                .for_each(|(to, from)| *to = *from);
            (padded, token.len())
        };
        let short = long.iter().map(short).collect();
        // Names are packed to less than half.
        Self {
            short,
            long,
            text: vec![0; (tables.names.len() * 3).min(MOST_TEXT) + SHORT],
            end: 0,
        }
    }

    fn push(&mut self, byte: u8) -> Option<()> {
        let (token, len) = *self.short.get(usize::from(byte))?;
        let room = self.end + len.max(SHORT);
        if room > self.text.len() {
            let len = room.checked_mul(2).filter(|len| *len <= MOST_TEXT)?;
            self.text.resize(len, 0);
        }
        if len <= SHORT {
            self.text
                .get_mut(self.end..self.end + SHORT)?
                .copy_from_slice(&token);
        } else {
            let token = self.long.get(usize::from(byte))?;
            self.text
                .get_mut(self.end..self.end + len)?
                .copy_from_slice(token);
        }
        self.end += len;
        Some(())
    }
}

/// Positions of the symbols that the evidence names, with the address each must have. A name that
/// several symbols bear proves nothing.
fn known_rows(names: &str, rows: &[Row], evidence: &Evidence) -> Vec<(usize, Gva)> {
    let mut known = Vec::new();
    for (wanted, at) in &evidence.anchors {
        let mut found = rows.iter().enumerate().filter(|(_, row)| {
            usize::from(row.name.1) == wanted.len() && super::name_of(names, row) == *wanted
        });
        if let (Some((position, _)), None) = (found.next(), found.next()) {
            known.push((position, *at));
        }
    }
    known
}

fn agrees(encoding: Encoding, bytes: &[u8], known: &[(usize, Gva)]) -> bool {
    let right = |(position, at): &(usize, Gva)| address(encoding, bytes, *position) == Some(*at);
    !known.is_empty() && known.iter().all(right)
}

/// Every place the addresses may lie and every meaning they may have there, with the bytes of the table.
fn candidates<'a>(
    memory: &'a KernelMemory<'_>,
    tables: &'a NameTables,
) -> impl Iterator<Item = (Encoding, Vec<u8>)> + 'a {
    let narrow = u64::from(tables.count) * 4;
    let padded = narrow.next_multiple_of(8);
    let wide = u64::from(tables.count) * 8;
    let (before, after) = (tables.num_syms_at, tables.after_tokens);
    let base_before = before.wrapping_sub(8);
    let base_after = after.wrapping_add(padded);
    let placed = [
        (after, narrow, Some(base_after)),
        (base_before.wrapping_sub(padded), narrow, Some(base_before)),
        (after, narrow, None),
        (after, wide, None),
        (before.wrapping_sub(wide), wide, None),
    ];
    placed.into_iter().flat_map(move |(at, len, base)| {
        let bytes = GvaRange::sized(at, len)
            .and_then(|range| tables::read_range(memory, range))
            .unwrap_or_default();
        let base = base.map(|base| memory.read_u64(base).unwrap_or(0));
        let encodings = match base {
            Some(base) => vec![Encoding::AbsolutePerCpu(base), Encoding::FromBase(base)],
            None if len == narrow => vec![Encoding::FromItself(at)],
            None => vec![Encoding::Absolute],
        };
        encodings
            .into_iter()
            .map(move |encoding| (encoding, bytes.clone()))
    })
}

/// The address of the symbol at `position`.
fn address(encoding: Encoding, bytes: &[u8], position: usize) -> Option<Gva> {
    if encoding == Encoding::Absolute {
        let at = position.checked_mul(8)?;
        let word = bytes.get(at..at.checked_add(8)?)?;
        return Some(Gva(u64::from_le_bytes(word.try_into().ok()?)));
    }
    let at = position.checked_mul(4)?;
    let word = tables::u32_at(bytes, at)?;
    let signed = i64::from(word.cast_signed());
    Some(Gva(match encoding {
        Encoding::AbsolutePerCpu(_) if signed >= 0 => u64::from(word),
        Encoding::AbsolutePerCpu(base) => base.wrapping_sub(1).wrapping_add_signed(-signed),
        Encoding::FromBase(base) => base.wrapping_add(u64::from(word)),
        Encoding::FromItself(table) => table.0.wrapping_add(at as u64).wrapping_add_signed(signed),
        Encoding::Absolute => return None,
    }))
}
