//! The layout of the page that a session and the VMM share, and how values go into its words and come
//! out. Owns the format; both sides use it, neither trusts the other: every word can change at any time,
//! so each is read once and then checked.
//!
//! ```text
//!   session: arguments, then command = number | operation, then wakes
//!   VMM:     results,   then answer  = number | status,    then wakes
//! ```

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use vmpatch_introspect::address::{Gpa, Gva};
use vmpatch_introspect::call::{Call, Called};
use vmpatch_introspect::target::{Detail, Edit, StopReport, StopRequest};
use vmpatch_introspect::vcpu::Vcpu;

use super::registers::{SLOT_WORDS, from_words, to_words};
use crate::config::MAX_VCPUS;
use crate::vm::{MAX_BATCH_BYTES, MAX_EDITS};

/// "vmpatch\0" as a little-endian word.
const MAGIC: u64 = u64::from_le_bytes(*b"vmpatch\0");
/// Raised with every change of the layout.
const VERSION: u32 = 3;
/// Words for a batch, or for the bytes or the text that explain an answer: every edit has a head of two
/// words, and both sides are padded to whole words.
const AREA_WORDS: usize = 2 * MAX_BATCH_BYTES / 8 + 4 * MAX_EDITS;

/// The shared page (several pages in truth).
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Page {
    magic: AtomicU64,
    version: AtomicU32,
    vcpus: AtomicU32,
    /// What the session wants: see [`Operation`]. A futex.
    pub(crate) command: AtomicU32,
    /// What came of it: see [`Answer`]. A futex.
    pub(crate) answer: AtomicU32,
    /// Of a stop: deadline and lease in nanoseconds, and 1 where what stacks need will do. Of a write: the number of
    /// edits in the area.
    arguments: [AtomicU64; 3],
    /// Of an answer: a vCPU, an edit's index or an address, and the length of what is in the area.
    detail: [AtomicU64; 2],
    /// Kick, registers, write, resume, window, in nanoseconds.
    report: [AtomicU64; 5],
    registers: [[AtomicU64; SLOT_WORDS]; MAX_VCPUS as usize],
    area: [AtomicU64; AREA_WORDS],
}

/// What a session can want.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Take all vCPUs out of guest mode.
    Stop = 1,
    /// Write the batch in the area.
    Write = 2,
    /// Resume and keep what was written.
    Resume = 3,
    /// Undo what was written and resume.
    Abandon = 4,
    /// Write the batch in the area and, if it was written, resume and keep it.
    Switch = 5,
    /// Let a vCPU make the call in the area.
    Call = 6,
}

impl Operation {
    /// The operation in the low byte of a command word, if it is one.
    pub(crate) const fn of(word: u32) -> Option<Self> {
        match word & 0xff {
            1 => Some(Self::Stop),
            2 => Some(Self::Write),
            3 => Some(Self::Resume),
            4 => Some(Self::Abandon),
            5 => Some(Self::Switch),
            6 => Some(Self::Call),
            _ => None,
        }
    }

    /// The command word: this operation, with a number that tells it from the one before.
    pub(crate) const fn numbered(self, number: u32) -> u32 {
        number << 8 | self as u32
    }
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// As wanted.
    Done = 1,
    /// Stop: the vCPU in `detail` was late.
    Late = 2,
    /// Stop: not running; the area says why.
    NotRunning = 3,
    /// Write: the edit in `detail` found the bytes in the area.
    Differs = 4,
    /// Write: the edit at the address in `detail` cannot be; the area says why.
    Malformed = 5,
    /// Write: the address in `detail` did not read back; all undone.
    ReadBack = 6,
    /// The address in `detail` could not be undone: the machine stays stopped.
    UndoFailed = 7,
    /// The lease ran out before: undone and resumed.
    LeaseExpired = 8,
    /// The command makes no sense now or at all.
    Refused = 9,
    /// The machine has ended; the area says how.
    Ended = 10,
    /// Call: the vCPU is in no state for it; the area says why.
    Unfit = 11,
    /// Call: it was made, and did not return. The area has [`called`].
    NotReturned = 12,
}

impl Status {
    /// The status in the low byte of an answer word.
    pub(crate) const fn of(word: u32) -> Option<Self> {
        match word & 0xff {
            1 => Some(Self::Done),
            2 => Some(Self::Late),
            3 => Some(Self::NotRunning),
            4 => Some(Self::Differs),
            5 => Some(Self::Malformed),
            6 => Some(Self::ReadBack),
            7 => Some(Self::UndoFailed),
            8 => Some(Self::LeaseExpired),
            9 => Some(Self::Refused),
            10 => Some(Self::Ended),
            11 => Some(Self::Unfit),
            12 => Some(Self::NotReturned),
            _ => None,
        }
    }
}

/// An answer without its registers and report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: Status,
    /// A vCPU, an edit's index or an address, by status.
    pub(crate) detail: u64,
    /// Bytes or text, by status.
    pub(crate) bytes: Vec<u8>,
}

impl Answer {
    pub(crate) const fn plain(status: Status) -> Self {
        Self::about(status, 0)
    }

    pub(crate) const fn about(status: Status, detail: u64) -> Self {
        Self {
            status,
            detail,
            bytes: Vec::new(),
        }
    }

    pub(crate) fn because(status: Status, detail: u64, why: &str) -> Self {
        // Whole characters only, so that the other side need not cut one.
        let mut end = why.len().min(512);
        while !why.is_char_boundary(end) {
            end -= 1;
        }
        let bytes = why.as_bytes().get(..end).unwrap_or_default().to_vec();
        Self {
            status,
            detail,
            bytes,
        }
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}

impl Page {
    /// Marks a fresh, zeroed page as one of this layout.
    pub(crate) fn begin(&self, vcpus: usize) {
        self.version.store(VERSION, Ordering::Relaxed);
        let vcpus = u32::try_from(vcpus).unwrap_or(u32::MAX);
        self.vcpus.store(vcpus, Ordering::Relaxed);
        self.magic.store(MAGIC, Ordering::Release);
    }

    /// Whether the page is of this layout.
    pub(crate) fn is_known(&self) -> bool {
        self.magic.load(Ordering::Acquire) == MAGIC
            && self.version.load(Ordering::Relaxed) == VERSION
    }

    pub(crate) fn set_request(&self, request: StopRequest) {
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let detail = match request.detail {
            Detail::All => 0,
            Detail::Stacks => 1,
        };
        let [deadline, lease] = [request.deadline, request.lease].map(nanoseconds);
        self.set_arguments([deadline, lease, detail]);
    }

    pub(crate) fn request(&self) -> StopRequest {
        let [deadline, lease, detail] = [0, 1, 2].map(|at| load(&self.arguments, at));
        StopRequest {
            deadline: Duration::from_nanos(deadline),
            lease: Duration::from_nanos(lease),
            detail: if detail == 1 {
                Detail::Stacks
            } else {
                Detail::All
            },
        }
    }

    pub(crate) fn set_arguments(&self, arguments: [u64; 3]) {
        for (word, argument) in self.arguments.iter().zip(arguments) {
            word.store(argument, Ordering::Relaxed);
        }
    }

    pub(crate) fn set_report(&self, report: &StopReport) {
        let times = [
            report.kick,
            report.registers,
            report.write,
            report.resume,
            report.window,
        ];
        for (word, time) in self.report.iter().zip(times) {
            let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
            word.store(nanoseconds, Ordering::Relaxed);
        }
    }

    pub(crate) fn report(&self) -> StopReport {
        let time = |at| Duration::from_nanos(load(&self.report, at));
        StopReport {
            kick: time(0),
            registers: time(1),
            write: time(2),
            resume: time(3),
            window: time(4),
        }
    }

    pub(crate) fn set_answer(&self, answer: &Answer) {
        let len = answer.bytes.len() as u64;
        for (word, value) in self.detail.iter().zip([answer.detail, len]) {
            word.store(value, Ordering::Relaxed);
        }
        // What does not fit is cut; nothing that long is ever answered.
        let _ = Writer(self.area.iter()).bytes(&answer.bytes);
    }

    /// The answer with this status; its bytes are cut to what the area holds.
    pub(crate) fn answer(&self, status: Status) -> Answer {
        let len = load(&self.detail, 1).min(AREA_WORDS as u64 * 8);
        let len = usize::try_from(len).unwrap_or(0);
        Answer {
            status,
            detail: load(&self.detail, 0),
            bytes: Reader(self.area.iter()).bytes(len).unwrap_or_default(),
        }
    }

    pub(crate) fn set_registers(&self, vcpus: &[Vcpu]) {
        for (slot, vcpu) in self.registers.iter().zip(vcpus) {
            for (word, value) in slot.iter().zip(to_words(vcpu)) {
                word.store(value, Ordering::Relaxed);
            }
        }
    }

    /// Registers of the first `vcpus` vCPUs.
    pub(crate) fn registers(&self, vcpus: usize) -> Vec<Vcpu> {
        let slots = self.registers.iter().take(vcpus);
        let words = slots.map(|slot| std::array::from_fn(|at| load(slot, at)));
        words.map(|words| from_words(&words)).collect()
    }

    /// Puts a call into the area.
    pub(crate) fn set_call(&self, call: &Call) {
        let budget = u64::try_from(call.budget.as_nanos()).unwrap_or(u64::MAX);
        let words = [
            u64::from(call.vcpu),
            call.function.0,
            call.stack.0,
            call.page_tables.0,
            call.gs_base.0,
            call.gates.0,
            call.idt.0,
            call.gdt.0,
            call.tss.0,
            call.forbidden.0,
            budget,
            // No four bytes lie there.
            call.preempt_count.map_or(u64::MAX, |at| at.0),
        ];
        for (word, value) in self.area.iter().zip(words) {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// The call in the area, whatever is there.
    pub(crate) fn call(&self) -> Call {
        let word = |at| load(&self.area, at);
        Call {
            vcpu: u32::try_from(word(0)).unwrap_or(u32::MAX),
            function: Gva(word(1)),
            stack: Gva(word(2)),
            page_tables: Gpa(word(3)),
            gs_base: Gva(word(4)),
            gates: Gva(word(5)),
            idt: Gva(word(6)),
            gdt: Gva(word(7)),
            tss: Gva(word(8)),
            forbidden: Gva(word(9)),
            budget: Duration::from_nanos(word(10)),
            preempt_count: Some(word(11)).filter(|at| *at != u64::MAX).map(Gpa),
        }
    }

    /// Puts a batch into the area; `None` if it does not fit.
    pub(crate) fn set_batch(&self, batch: &[Edit]) -> Option<()> {
        if batch.len() > MAX_EDITS {
            return None;
        }
        let mut area = Writer(self.area.iter());
        for edit in batch {
            area.word(edit.at.0)?;
            let lengths = [&edit.old, &edit.new].map(|side| u32::try_from(side.len()).ok());
            let [Some(old), Some(new)] = lengths else {
                return None;
            };
            area.word(u64::from(new) << 32 | u64::from(old))?;
            area.bytes(&edit.old)?;
            area.bytes(&edit.new)?;
        }
        self.set_arguments([batch.len() as u64, 0, 0]);
        Some(())
    }

    /// Copies the batch out of the area; `None` if what is there is none.
    pub(crate) fn batch(&self) -> Option<Vec<Edit>> {
        let count = usize::try_from(load(&self.arguments, 0)).ok()?;
        if count > MAX_EDITS {
            return None;
        }
        let mut area = Reader(self.area.iter());
        let edits = (0..count).map(|_| {
            let at = Gpa(area.word()?);
            let lengths = area.word()?;
            let [old, new] = [lengths & 0xffff_ffff, lengths >> 32].map(usize::try_from);
            Some(Edit {
                at,
                old: area.bytes(old.ok()?)?,
                new: area.bytes(new.ok()?)?,
            })
        });
        edits.collect()
    }
}

/// Kinds of calls that did not return.
const TRAPPED: u64 = 1;
const LATE: u64 = 2;
const STUCK: u64 = 3;

/// The answer to a call that was made: of one that did not return three words, then text.
pub(crate) fn called(called: &Called) -> Answer {
    let (words, text) = match called {
        Called::Returned(value) => return Answer::about(Status::Done, *value),
        Called::Trapped { vector, frame, cr2 } => {
            ([TRAPPED | u64::from(*vector) << 8, frame.0, *cr2], "")
        }
        Called::Late { at } => ([LATE, at.0, 0], ""),
        Called::Stuck { at, what } => ([STUCK, at.0, 0], what.as_str()),
    };
    let mut answer = Answer::because(Status::NotReturned, 0, text);
    let head = words.into_iter().flat_map(u64::to_le_bytes);
    answer.bytes.splice(0..0, head);
    answer
}

/// What such an answer says; `None` if it is none.
pub(crate) fn what_called(answer: &Answer) -> Option<Called> {
    if answer.status == Status::Done {
        return Some(Called::Returned(answer.detail));
    }
    let (head, text) = answer.bytes.split_at_checked(24)?;
    let mut words = head
        .chunks_exact(8)
        .map(|word| word.try_into().map(u64::from_le_bytes));
    let (kind, at, cr2) = (
        words.next()?.ok()?,
        words.next()?.ok()?,
        words.next()?.ok()?,
    );
    match (answer.status, kind & 0xff) {
        (Status::NotReturned, TRAPPED) => Some(Called::Trapped {
            vector: u8::try_from(kind >> 8).ok()?,
            frame: Gva(at),
            cr2,
        }),
        (Status::NotReturned, LATE) => Some(Called::Late { at: Gva(at) }),
        (Status::NotReturned, STUCK) => Some(Called::Stuck {
            at: Gva(at),
            what: String::from_utf8_lossy(text).into_owned(),
        }),
        _ => None,
    }
}

fn load(words: &[AtomicU64], at: usize) -> u64 {
    words.get(at).map_or(0, |word| word.load(Ordering::Relaxed))
}

/// Puts values one after the other into words.
struct Writer<'a>(std::slice::Iter<'a, AtomicU64>);

impl Writer<'_> {
    fn word(&mut self, value: u64) -> Option<()> {
        self.0.next()?.store(value, Ordering::Relaxed);
        Some(())
    }

    fn bytes(&mut self, bytes: &[u8]) -> Option<()> {
        for part in bytes.chunks(8) {
            let mut word = [0; 8];
            word.iter_mut().zip(part).for_each(|(to, from)| *to = *from);
            self.word(u64::from_le_bytes(word))?;
        }
        Some(())
    }
}

/// Takes them out again, in the same order. Never reads past the last word.
struct Reader<'a>(std::slice::Iter<'a, AtomicU64>);

impl Reader<'_> {
    fn word(&mut self) -> Option<u64> {
        Some(self.0.next()?.load(Ordering::Relaxed))
    }

    fn bytes(&mut self, len: usize) -> Option<Vec<u8>> {
        let words = len.div_ceil(8);
        if words > self.0.len() {
            return None;
        }
        let mut bytes = Vec::with_capacity(words * 8);
        for _ in 0..words {
            bytes.extend(self.word()?.to_le_bytes());
        }
        bytes.truncate(len);
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hot::map::Shared;

    fn page() -> Shared {
        Shared::create().unwrap()
    }

    #[test]
    fn every_vcpu_has_its_own_registers() {
        let zero = from_words(&[0; SLOT_WORDS]);
        let vcpus: Vec<_> = (0..u32::from(MAX_VCPUS))
            .map(|index| Vcpu { index, ..zero })
            .collect();
        let page = page();
        page.set_registers(&vcpus);
        assert_eq!(page.registers(vcpus.len()), vcpus);
    }

    #[test]
    fn a_batch_comes_out_as_it_went_in() {
        let edit = |at, len| Edit {
            at: Gpa(at),
            old: vec![1; len],
            new: (0..len).map(|n| n as u8).collect(),
        };
        let batch: Vec<_> = (0..13).map(|len| edit(u64::MAX - 9, len)).collect();
        let page = page();
        page.set_batch(&batch).unwrap();
        assert_eq!(page.batch(), Some(batch));
    }

    #[test]
    fn the_largest_batch_fits() {
        let per_edit = MAX_BATCH_BYTES / MAX_EDITS;
        let edit = Edit {
            at: Gpa(0),
            old: vec![0; per_edit],
            new: vec![0; per_edit],
        };
        assert!(page().set_batch(&vec![edit; MAX_EDITS]).is_some());
        let longest = Edit {
            at: Gpa(0),
            old: vec![0; 4096],
            new: vec![0; 4096],
        };
        let batch = vec![longest; MAX_BATCH_BYTES / 4096];
        assert!(page().set_batch(&batch).is_some());
    }

    #[test]
    fn a_request_comes_out_as_it_went_in() {
        let page = page();
        for request in [StopRequest::default(), StopRequest::for_change()] {
            page.set_request(request);
            assert_eq!(page.request(), request);
        }
    }

    #[test]
    fn a_call_comes_out_as_it_went_in() {
        let word = |n: u64| n << 33 | n;
        let call = Call {
            vcpu: 3,
            function: Gva(word(1)),
            stack: Gva(word(2)),
            page_tables: Gpa(word(3)),
            gs_base: Gva(word(4)),
            gates: Gva(word(5)),
            idt: Gva(word(6)),
            gdt: Gva(word(7)),
            tss: Gva(word(8)),
            forbidden: Gva(word(9)),
            preempt_count: None,
            budget: Duration::from_millis(10),
        };
        let page = page();
        for preempt_count in [None, Some(Gpa(word(11)))] {
            let call = Call {
                preempt_count,
                ..call
            };
            page.set_call(&call);
            assert_eq!(page.call(), call);
        }
    }

    #[test]
    fn what_came_of_a_call_comes_out_as_it_went_in() {
        let page = page();
        for it in [
            Called::Returned(u64::MAX),
            Called::Trapped {
                vector: 255,
                frame: Gva(1 << 40),
                cr2: 2,
            },
            Called::Late { at: Gva(7) },
            Called::Stuck {
                at: Gva(8),
                what: "a triple fault".to_owned(),
            },
        ] {
            let answer = called(&it);
            page.set_answer(&answer);
            assert_eq!(what_called(&page.answer(answer.status)), Some(it));
        }
        assert_eq!(what_called(&Answer::plain(Status::NotReturned)), None);
    }

    #[test]
    fn lengths_past_the_area_are_no_batch() {
        let page = page();
        page.set_arguments([1, 0, 0]);
        page.area[1].store(u64::MAX, Ordering::Relaxed);
        assert_eq!(page.batch(), None);
        page.set_arguments([u64::MAX, 0, 0]);
        assert_eq!(page.batch(), None);
    }

    #[test]
    fn an_answer_that_claims_too_many_bytes_is_cut() {
        let page = page();
        page.set_answer(&Answer::because(Status::Malformed, 5, "because"));
        assert_eq!(page.answer(Status::Malformed).text(), "because");
        page.detail[1].store(u64::MAX, Ordering::Relaxed);
        assert_eq!(page.answer(Status::Malformed).bytes.len(), AREA_WORDS * 8);
    }
}
