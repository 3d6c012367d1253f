//! What the journal's records add up to: which changes stand in one boot of the guest. Pure; reads nothing.

use super::folder::Entry;
use super::record::{Begun, Ending, Operation};

/// The changes of one boot that stand, in the order they were applied: committed, and neither rolled back nor replaced since.
#[must_use]
pub fn standing<'a>(entries: &'a [Entry], boot: &str) -> Vec<(u64, &'a Begun)> {
    let mut standing: Vec<(u64, &Begun)> = Vec::new();
    for (number, begun) in committed(entries).filter(|(_, begun)| begun.boot == boot) {
        match begun.operation {
            Operation::Apply => {
                standing.retain(|(_, other)| !begun.replaced.contains(&other.patch.name));
                standing.push((number, begun));
            }
            Operation::Rollback => {
                standing.retain(|(_, other)| other.patch.name != begun.patch.name);
            }
        }
    }
    standing
}

/// The change that was begun and never ended. There is at most one: none begins before it is settled.
#[must_use]
pub fn open(entries: &[Entry]) -> Option<(u64, &Begun)> {
    entries.iter().find_map(
        |entry| match (&entry.transcript.begun, &entry.transcript.ending) {
            (Some(begun), None) => Some((entry.number, begun)),
            _ => None,
        },
    )
}

fn committed(entries: &[Entry]) -> impl Iterator<Item = (u64, &Begun)> {
    entries.iter().filter_map(
        |entry| match (&entry.transcript.begun, &entry.transcript.ending) {
            (Some(begun), Some(Ending::Committed { .. })) => Some((entry.number, begun)),
            _ => None,
        },
    )
}

/// Every change of one boot that may have reached the guest, oldest first. The pages of an abandoned one are
/// free again, so its bytes may by now be another's.
pub fn of_boot<'a>(entries: &'a [Entry], boot: &str) -> impl Iterator<Item = &'a Begun> {
    let abandoned =
        |entry: &&Entry| matches!(entry.transcript.ending, Some(Ending::Abandoned { .. }));
    let kept = entries.iter().filter(move |entry| !abandoned(entry));
    let begun = kept.filter_map(|entry| entry.transcript.begun.as_ref());
    begun.filter(move |begun| begun.boot == boot)
}
