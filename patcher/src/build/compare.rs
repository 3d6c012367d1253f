//! Which functions differ, and in what. Owns the verdict; what is done about it is [`super::collect`]'s.

use super::instructions::{Flow, Instruction};
use super::key::{self, Content, Key, Names};
use super::pair::Pairs;
use super::policy;
use super::reference::Target;
use super::side::Side;
use super::special::{Entry, Special};

/// What became of a function of the new object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// As before.
    Same,
    /// As before but for the line numbers that its warnings report.
    LinesOnly,
    /// Different, in the way named.
    Changed(&'static str),
    /// Not in the old object, or no longer in the guest.
    New,
}

/// Verdicts of the new object's functions, in its order. A function and the parts split off from it share
/// the verdict, because they are one.
pub(super) fn verdicts(old: &Side, new: &Side, pairs: &Pairs, new_names: &Names) -> Vec<Verdict> {
    let old_names = Names::default();
    let verdict = |index| match pairs.old_function_of(index) {
        Some(before) if is_freed(old, before) && !is_freed(new, index) => Verdict::New,
        Some(before) => compare((old, &old_names, before), (new, new_names, index)),
        None => Verdict::New,
    };
    let mut verdicts: Vec<_> = (0..new.inventory.functions.len()).map(verdict).collect();
    for index in 0..verdicts.len() {
        let Some(parent) = new.function(index).parent else {
            continue;
        };
        if !is_as_before(verdicts[index]) && is_as_before(verdicts[parent]) {
            verdicts[parent] = Verdict::Changed(PART);
        }
    }
    for parent in losers_of_parts(old, pairs) {
        if is_as_before(verdicts[parent]) {
            verdicts[parent] = Verdict::Changed(PART);
        }
    }
    spread_to_parts(new, &mut verdicts);
    verdicts
}

/// Whether a function is gone from the guest since it booted.
fn is_freed(side: &Side, function: usize) -> bool {
    policy::is_init(&side.home_of(function).name)
}

const PART: &str = "a part split off from it";

fn is_as_before(verdict: Verdict) -> bool {
    matches!(verdict, Verdict::Same | Verdict::LinesOnly)
}

/// Functions of the new object of which only the old one has a part.
fn losers_of_parts(old: &Side, pairs: &Pairs) -> Vec<usize> {
    let functions = old.inventory.functions.iter().enumerate();
    let lost = functions.filter_map(|(index, part)| {
        let is_lost = pairs.new_function_of(index).is_none();
        pairs.new_function_of(part.parent?).filter(|_| is_lost)
    });
    lost.collect()
}

fn spread_to_parts(new: &Side, verdicts: &mut [Verdict]) {
    for index in 0..verdicts.len() {
        let Some(parent) = new.function(index).parent else {
            continue;
        };
        if is_as_before(verdicts[index]) && !is_as_before(verdicts[parent]) {
            verdicts[index] = Verdict::Changed("the function it is split off from");
        }
    }
}

/// A function, in an object with these names.
pub(super) type Seen<'a> = (&'a Side, &'a Names, usize);

/// Compares one function with what it was.
pub(super) fn compare(old: Seen<'_>, new: Seen<'_>) -> Verdict {
    let (mut before, mut after) = (code(old), code(new));
    if before.bytes != after.bytes {
        mask_lines(old, &mut before.bytes);
        mask_lines(new, &mut after.bytes);
    }
    if before.bytes != after.bytes {
        return Verdict::Changed("instructions");
    }
    if before.fields != after.fields {
        return Verdict::Changed("what its instructions refer to");
    }
    let (before, after) = (entries(old), entries(new));
    if before
        .iter()
        .map(|it| &it.0)
        .ne(after.iter().map(|it| &it.0))
    {
        return Verdict::Changed("its entries in special sections");
    }
    if before != after {
        Verdict::LinesOnly
    } else {
        Verdict::Same
    }
}

fn code((side, names, function): Seen<'_>) -> Content {
    key::masked(
        side,
        names,
        side.function_bytes(function),
        &side.code[function].references,
    )
}

/// The function that prints a warning's message (Linux v6.1 and v6.12 kernel/panic.c; include/asm-generic/bug.h, `__WARN_printf`).
const MESSAGE: &str = "__warn_printk";

/// The bytes of a function without its fields and the lines of its warnings.
pub(super) fn shape(side: &Side, function: usize) -> Vec<u8> {
    let seen = (side, &Names::default(), function);
    let mut bytes = code(seen).bytes;
    mask_lines(seen, &mut bytes);
    bytes
}

/// Puts the number of a warning in the place of its line where an instruction loads the line for the warning's message
/// (`WARN(…, __LINE__)` as in `ASSERT_RTNL`, Linux v6.12 include/linux/rtnetlink.h): the same number in both
/// objects then means the same warning, whatever line it moved to. A number that is loaded for anything else is not a line.
fn mask_lines((side, _, function): Seen<'_>, bytes: &mut [u8]) {
    let lines: Vec<(u64, u32)> = side.entries[function]
        .iter()
        .filter_map(|it| match it.special {
            Special::Bug { line, .. } => Some((it.offset, u32::from(line))),
            _ => None,
        })
        .collect();
    let view = &side.code[function];
    let mut loads: Vec<&Instruction> = Vec::new();
    for instruction in view.instructions.iter() {
        match instruction.flow {
            Flow::Call if calls_message(side, function, instruction) => {
                // The trap stands right behind the call, but for a nop that may mark where checks are off.
                let behind = instruction.end..instruction.end + 4;
                let number = lines.iter().position(|(at, _)| behind.contains(at));
                for load in loads.drain(..) {
                    mask_line(bytes, load, &lines, number);
                }
            }
            Flow::Other => loads.push(instruction),
            _ => loads.clear(),
        }
    }
}

fn calls_message(side: &Side, function: usize, call: &Instruction) -> bool {
    let field = call.relative.map(|field| field.offset);
    let mut references = side.code[function].references.iter();
    let target = references.find(|it| Some(it.offset) == field);
    target.is_some_and(|it| side.name_of(&it.target) == MESSAGE)
}

fn mask_line(bytes: &mut [u8], load: &Instruction, lines: &[(u64, u32)], number: Option<usize>) {
    let line = number.and_then(|number| lines.get(number));
    let (Some(field), Some(number), Some((_, line))) = (loaded_number(bytes, load), number, line)
    else {
        return;
    };
    if u32::from_le_bytes(*field) == *line {
        *field = (u32::MAX - number as u32).to_le_bytes();
    }
}

/// The immediate of `mov $imm32, %reg32` (Intel SDM vol. 2, MOV, B8+rd), a REX prefix or none before it.
fn loaded_number<'a>(bytes: &'a mut [u8], instruction: &Instruction) -> Option<&'a mut [u8; 4]> {
    let (start, end) = (instruction.start as usize, instruction.end as usize);
    let is_load = matches!(
        bytes.get(start..end)?,
        [0xb8..=0xbf, _, _, _, _] | [0x41, 0xb8..=0xbf, _, _, _, _]
    );
    bytes
        .get_mut(end.checked_sub(4).filter(|_| is_load)?..end)?
        .try_into()
        .ok()
}

/// An entry in comparable form, and the line number that does not count.
pub(super) type Comparable = ((u64, String, Vec<Key>, Vec<u8>), u16);

fn entries((side, names, function): Seen<'_>) -> Vec<Comparable> {
    side.entries[function]
        .iter()
        .map(|it| comparable(side, names, it))
        .collect()
}

/// An entry without what need not be the same.
pub(super) fn comparable(side: &Side, names: &Names, entry: &Entry) -> Comparable {
    let key = |target: &Target| key::key(side, names, target);
    let table = side.object.section(entry.table).name.clone();
    let (keys, bytes, line) = match &entry.special {
        Special::LockPrefix | Special::Unknown => (Vec::new(), Vec::new(), 0),
        Special::Alternative {
            feature,
            negated,
            direct_call,
            len,
            bytes,
            references,
        } => {
            let mut text = key::masked(side, names, bytes, references).bytes;
            text.extend_from_slice(&feature.to_le_bytes());
            text.extend_from_slice(&[u8::from(*negated), u8::from(*direct_call), *len]);
            (
                references.iter().map(|it| key(&it.target)).collect(),
                text,
                0,
            )
        }
        Special::JumpLabel {
            key: branch_key,
            target,
            inverted,
        } => (
            vec![key(branch_key), key(target)],
            vec![u8::from(*inverted)],
            0,
        ),
        Special::Bug { file, line, flags } => (
            Vec::new(),
            [file.as_bytes(), &flags.to_le_bytes()[..]].concat(),
            *line,
        ),
        Special::Exception { fixup, data } => (vec![key(fixup)], data.to_le_bytes().to_vec(), 0),
        Special::Paravirt { slot, len } => (Vec::new(), vec![*slot, *len], 0),
        Special::RuntimeConstant { .. } => (Vec::new(), Vec::new(), 0),
    };
    ((entry.offset, table, keys, bytes), line)
}
