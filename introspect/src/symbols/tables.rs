//! The raw layer of kallsyms: where its tables lie, found by their own structure, and their bytes.
//! Chooses nothing: what an offset means is [`super::kallsyms`]'s business.
//!
//! ```text
//! 6.4 and later   num_syms names markers token_table token_index offsets relative_base seqs_of_names
//! 6.2 and 6.3     offsets relative_base num_syms names markers seqs_of_names token_table token_index
//! 4.6 to 6.1      offsets relative_base num_syms names markers token_table token_index
//! ```
//!
//! Each begins at a multiple of 8 (scripts/kallsyms.c, `ALGN`); the order changed with Linux commit
//! 404bad70fcf7 ("scripts/kallsyms: change the output order") (in v6.4).

use memchr::memmem::Finder;

use crate::address::{Gva, GvaRange};
use crate::paging::{KernelMemory, ReadError};

/// More symbols than any kernel has: seqs_of_names counts them in 3 bytes.
pub(crate) const MOST_SYMBOLS: u32 = 1 << 22;
/// Every 256th symbol has a marker (scripts/kallsyms.c).
const MARKED: u32 = 256;
/// Fewer markers than this are not believed: they could be chance.
const FEWEST_MARKERS: usize = 4;
/// A compressed name is at most 0x3fff bytes after at most two of length (scripts/kallsyms.c).
const LONGEST_BLOCK: u32 = MARKED * (0x3fff + 2);
/// A block of names in a real kernel: longer last blocks are not looked for.
const LAST_BLOCK: u64 = 64 << 10;
/// Most bytes of compressed names.
const MOST_NAMES: u64 = 64 << 20;
/// Longest token table that is believed.
const TOKEN_TABLE: usize = 16 << 10;
const TOKENS: usize = 256;
/// How many places that look like a token table are tried.
const MOST_CANDIDATES: usize = 64;
/// The tokens of the digits, which always stand for themselves.
const DIGITS: &[u8; 20] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00";
const FIRST_DIGIT: usize = b'0' as usize;

/// The token table: what each byte of a compressed name stands for.
#[derive(Debug)]
pub(crate) struct Tokens {
    text: Vec<u8>,
    starts: Vec<u16>,
}

impl Tokens {
    /// What `byte` stands for.
    pub(crate) fn get(&self, byte: u8) -> &[u8] {
        let start = self.starts.get(usize::from(byte)).copied().unwrap_or(0);
        let rest = self.text.get(usize::from(start)..).unwrap_or_default();
        rest.split(|&byte| byte == 0).next().unwrap_or_default()
    }
}

/// The tables that say how symbols are called, and the places where the rest may lie.
#[derive(Debug)]
pub(crate) struct NameTables {
    /// How many symbols.
    pub(crate) count: u32,
    /// Compressed names, one after the other, exactly `count` of them.
    pub(crate) names: Vec<u8>,
    pub(crate) tokens: Tokens,
    /// Where `kallsyms_num_syms` lies: older kernels have their addresses before it.
    pub(crate) num_syms_at: Gva,
    /// First table place after the token index: newer kernels have their addresses there.
    pub(crate) after_tokens: Gva,
}

/// Hands every set of name tables in `range` to `accept`, each complete and consistent in itself, until one
/// is taken; says whether one was.
///
/// # Errors
/// The range cannot be read.
pub(crate) fn search(
    memory: &KernelMemory<'_>,
    range: GvaRange,
    mut accept: impl FnMut(NameTables) -> bool,
) -> Result<bool, ReadError> {
    let mut tried = 0;
    let mut at = range.start;
    while let Some(digits) = find_digits(
        memory,
        GvaRange {
            start: at,
            end: range.end,
        },
    )? {
        let found = token_tables(memory, range, digits)
            .and_then(|tokens| name_tables(memory, range, tokens));
        if found.is_some_and(&mut accept) {
            return Ok(true);
        }
        tried += 1;
        if tried == MOST_CANDIDATES {
            break;
        }
        at = digits.wrapping_add(1);
    }
    Ok(false)
}

/// The next place of the digits' tokens.
fn find_digits(memory: &KernelMemory<'_>, range: GvaRange) -> Result<Option<Gva>, ReadError> {
    const CHUNK: u64 = 256 << 10;
    let finder = Finder::new(DIGITS);
    let mut buffer = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let len = CHUNK.min(range.end.0 - at.0);
        buffer.resize(usize::try_from(len).unwrap_or(0), 0);
        memory.read(at, &mut buffer)?;
        if let Some(offset) = finder.find(&buffer) {
            return Ok(Some(at.wrapping_add(offset as u64)));
        }
        if len <= DIGITS.len() as u64 {
            break;
        }
        at = at.wrapping_add(len - DIGITS.len() as u64 + 1);
    }
    Ok(None)
}

/// A token table and its index, with where they begin and end.
struct FoundTokens {
    tokens: Tokens,
    start: Gva,
    end: Gva,
}

/// The token table around its digits: of all starts from which 48 tokens lead to the digits, the one
/// whose token index matches in all 256 offsets.
fn token_tables(memory: &KernelMemory<'_>, range: GvaRange, digits: Gva) -> Option<FoundTokens> {
    let window = clamp(
        range,
        digits.0.saturating_sub(4096),
        digits.0 + TOKEN_TABLE as u64,
    );
    let bytes = read_range(memory, window)?;
    let before = usize::try_from(digits.0 - window.start.0).ok()?;
    let mut zeros = 0;
    for start in (0..=before).rev() {
        zeros += usize::from(start < before && bytes.get(start) == Some(&0));
        if zeros > FIRST_DIGIT {
            return None;
        }
        let aligned = (window.start.0 + start as u64).is_multiple_of(8);
        if zeros < FIRST_DIGIT || !aligned {
            continue;
        }
        if let Some((tokens, len)) = tokens_at(bytes.get(start..)?) {
            let start = window.start.wrapping_add(start as u64);
            return Some(FoundTokens {
                tokens,
                start,
                end: start.wrapping_add(len),
            });
        }
    }
    None
}

/// Tokens and index if `bytes` begins with them, and the length of both.
fn tokens_at(bytes: &[u8]) -> Option<(Tokens, u64)> {
    let mut starts = Vec::with_capacity(TOKENS);
    let mut at = 0;
    for _ in 0..TOKENS {
        starts.push(u16::try_from(at).ok()?);
        at += bytes.get(at..)?.iter().position(|&byte| byte == 0)? + 1;
    }
    let index_at = at.next_multiple_of(8);
    let index = bytes.get(index_at..index_at + TOKENS * 2)?;
    let same = index
        .chunks_exact(2)
        .zip(&starts)
        .all(|(stored, start)| stored == start.to_le_bytes());
    let text = bytes.get(..at)?.to_vec();
    same.then_some((Tokens { text, starts }, (index_at + TOKENS * 2) as u64))
}

/// The markers before the token table, and the names before the markers.
fn name_tables(
    memory: &KernelMemory<'_>,
    range: GvaRange,
    tokens: FoundTokens,
) -> Option<NameTables> {
    let (markers_at, markers) = markers_before(memory, range, tokens.start)?;
    let last = u64::from(*markers.last()?);
    let window = clamp(
        range,
        markers_at.0.saturating_sub(last + LAST_BLOCK),
        markers_at.0,
    );
    if window.size() > MOST_NAMES {
        return None;
    }
    let bytes = read_range(memory, window)?;
    let slack = bytes.len().checked_sub(usize::try_from(last).ok()?)?;
    for start in (8..slack).filter(|start| (window.start.0 + *start as u64).is_multiple_of(8)) {
        let Some((count, end)) = names_at(&bytes, start, &markers) else {
            continue;
        };
        return Some(NameTables {
            count,
            names: bytes.get(start..end)?.to_vec(),
            tokens: tokens.tokens,
            num_syms_at: window.start.wrapping_add(start as u64 - 8),
            after_tokens: Gva(tokens.end.0.next_multiple_of(8)),
        });
    }
    None
}

/// Checks that names begin at `start`: their number stands before them, every marker points to its
/// name, and they end where the markers begin (the end of `bytes`). Gives the number and their end.
fn names_at(bytes: &[u8], start: usize, markers: &[u32]) -> Option<(u32, usize)> {
    let count = u32_at(bytes, start.checked_sub(8)?)?;
    let padding = u32_at(bytes, start.checked_sub(4)?)?;
    let plausible = padding == 0 && count.div_ceil(MARKED) as usize == markers.len();
    if !plausible || count > MOST_SYMBOLS {
        return None;
    }
    let mut at = start;
    let mut markers = markers.iter();
    for position in 0..count {
        if position % MARKED == 0 && *markers.next()? as usize != at - start {
            return None;
        }
        let (header, len) = name_length(bytes.get(at..)?)?;
        at = at.checked_add(header + len)?;
    }
    (at <= bytes.len() && bytes.len() - at < 8).then_some((count, at))
}

/// Length of the length of a compressed name, and that length: two bytes if bit 7 of the first is set
/// (Linux commit 73bbb94466fd ("kallsyms: support "big" kernel symbols") (in v6.1)). Older
/// kernels allowed names of 127 bytes, which compression shortens, so the bit decides for all.
pub(crate) fn name_length(bytes: &[u8]) -> Option<(usize, usize)> {
    let first = usize::from(*bytes.first()?);
    if first == 0 {
        return None;
    }
    if first & 0x80 == 0 {
        return Some((1, first));
    }
    let second = usize::from(*bytes.get(1)?);
    Some((2, first & 0x7f | second << 7))
}

/// The markers: they end where the token table begins, or `seqs_of_names` before it.
fn markers_before(
    memory: &KernelMemory<'_>,
    range: GvaRange,
    tokens: Gva,
) -> Option<(Gva, Vec<u32>)> {
    let near = clamp(range, tokens.0.saturating_sub(128 << 10), tokens.0);
    let bytes = read_range(memory, near)?;
    if let Some((start, markers)) = markers_ending_at(&bytes, bytes.len()) {
        return Some((near.start.wrapping_add(start as u64), markers));
    }
    let far = clamp(
        range,
        tokens.0.saturating_sub(u64::from(MOST_SYMBOLS) * 3),
        tokens.0,
    );
    let bytes = read_range(memory, far)?;
    let (start, markers) = markers_before_seqs(&bytes)?;
    Some((far.start.wrapping_add(start as u64), markers))
}

/// The rising words that end at `end`, or one word of padding before it, and begin with zero.
fn markers_ending_at(bytes: &[u8], end: usize) -> Option<(usize, Vec<u32>)> {
    let mut at = end.checked_sub(4)?;
    let mut value = u32_at(bytes, at)?;
    if value == 0 {
        at = at.checked_sub(4)?;
        value = u32_at(bytes, at)?;
    }
    let mut markers = vec![value];
    while value != 0 {
        at = at.checked_sub(4)?;
        let before = u32_at(bytes, at)?;
        if !is_step(before, value) {
            return None;
        }
        value = before;
        markers.push(value);
    }
    markers.reverse();
    (markers.len() >= FEWEST_MARKERS).then_some((at, markers))
}

/// The last rising run from zero whose length fits the 3 bytes a symbol between it and the end.
fn markers_before_seqs(bytes: &[u8]) -> Option<(usize, Vec<u32>)> {
    let mut end = bytes.len() / 8 * 8;
    let first = bytes.len() % 8;
    while end >= 8 {
        let seqs = bytes.len() - first - end;
        if let Some((start, markers)) = markers_ending_at(bytes, first + end) {
            let most = (markers.len() * MARKED as usize * 3).next_multiple_of(8);
            let fewest = (markers.len() - 1) * MARKED as usize * 3;
            if (fewest..=most).contains(&seqs) {
                return Some((start, markers));
            }
        }
        end -= 8;
    }
    None
}

/// Whether two neighbours can be markers: 256 names of at least one byte and its length apart.
fn is_step(before: u32, after: u32) -> bool {
    after
        .checked_sub(before)
        .is_some_and(|step| (2 * MARKED..=LONGEST_BLOCK).contains(&step))
}

fn clamp(range: GvaRange, start: u64, end: u64) -> GvaRange {
    let start = start.max(range.start.0).min(range.end.0);
    GvaRange {
        start: Gva(start),
        end: Gva(end.min(range.end.0).max(start)),
    }
}

/// The bytes of a range whose size the caller has bounded.
pub(crate) fn read_range(memory: &KernelMemory<'_>, range: GvaRange) -> Option<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(range.size()).ok()?];
    memory.read(range.start, &mut bytes).ok()?;
    Some(bytes)
}

/// A little-endian word within `bytes`.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(word.try_into().ok()?))
}
