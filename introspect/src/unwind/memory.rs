//! The stacks that one trace may cross, and plain copies of them. Each stack is read once, from the first
//! word wanted to its top; unwinding then runs over the copy. Buffers live in a [`StackPool`] and are used
//! again for the next trace.

use crate::address::{Gva, GvaRange};
use crate::paging::KernelMemory;

use super::Unreliable;

/// Where words of a stack come from.
pub trait StackSource {
    /// Fills `into` from `at` on; `None` where any byte of it cannot be read.
    fn copy(&self, at: Gva, into: &mut [u8]) -> Option<()>;
}

impl StackSource for KernelMemory<'_> {
    fn copy(&self, at: Gva, into: &mut [u8]) -> Option<()> {
        self.read(at, into).ok()
    }
}

/// Which stack it is (Linux v6.12 `arch/x86/include/asm/stacktrace.h`, `enum stack_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StackKind {
    /// Of a task.
    Task,
    /// Of a CPU, for device interrupts and softirqs.
    Irq,
    /// Of a CPU, for one of the exceptions that switch stacks by themselves (IST).
    Exception,
    /// Of a CPU, for the first instructions after user mode.
    Entry,
}

/// One stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackSpan {
    /// Which.
    pub kind: StackKind,
    /// Where it lies, whole.
    pub range: GvaRange,
}

impl StackSpan {
    /// Whether `len` bytes from `at` lie on it.
    #[must_use]
    pub const fn holds(&self, at: u64, len: u64) -> bool {
        at >= self.range.start.0 && at < self.range.end.0 && self.range.end.0 - at >= len
    }
}

/// No stack is longer than this, in bytes (16 KiB, twice that with KASAN). Bounds each copy.
pub const MAX_STACK: u64 = 64 << 10;

/// A task stack and those of one CPU: no trace crosses more. Bounds the set of visited ones.
pub const MAX_SPANS: usize = 16;

/// Buffers that traces use one after another.
#[derive(Debug, Default)]
pub struct StackPool {
    copies: Vec<Copied>,
}

/// The upper part of a stack, from `start` on. Nothing copied yet while `words` is empty.
#[derive(Debug, Default)]
struct Copied {
    start: u64,
    words: Vec<u8>,
}

/// The stacks of one trace.
pub(crate) struct StackMemory<'a> {
    source: &'a dyn StackSource,
    spans: &'a [StackSpan],
    copies: &'a mut [Copied],
    current: Option<usize>,
    visited: u16,
}

impl<'a> StackMemory<'a> {
    /// `spans` beyond [`MAX_SPANS`] are not seen.
    pub(crate) fn new(
        pool: &'a mut StackPool,
        source: &'a dyn StackSource,
        spans: &'a [StackSpan],
    ) -> Self {
        let spans = spans.get(..MAX_SPANS).unwrap_or(spans);
        if pool.copies.len() < spans.len() {
            pool.copies.resize_with(spans.len(), Copied::default);
        }
        for copied in &mut pool.copies {
            copied.words.clear();
        }
        Self {
            source,
            spans,
            copies: &mut pool.copies,
            current: None,
            visited: 0,
        }
    }

    /// The stack that the trace is on.
    pub(crate) fn current(&self) -> Option<&StackSpan> {
        self.spans.get(self.current?)
    }

    /// Number of the stack that the trace is on.
    pub(crate) const fn current_index(&self) -> Option<usize> {
        self.current
    }

    /// The stack that holds `len` bytes from `at`, wherever the trace is.
    pub(crate) fn holding(&self, at: u64, len: u64) -> Option<&StackSpan> {
        self.spans.iter().find(|span| span.holds(at, len))
    }

    /// Makes sure that `len` bytes from `at` lie on the current stack, moving to another one if they do
    /// not. No stack is entered twice: an exception stack is left before it is used again (Linux v6.12
    /// `arch/x86/kernel/dumpstack_64.c`, `get_stack_info`).
    pub(crate) fn enter(&mut self, at: u64, len: u64) -> Result<usize, Unreliable> {
        if let Some(index) = self.current
            && self
                .spans
                .get(index)
                .is_some_and(|span| span.holds(at, len))
        {
            return Ok(index);
        }
        let stray = Unreliable::StrayStackPointer(Gva(at));
        let Some(index) = self.spans.iter().position(|span| span.holds(at, len)) else {
            return Err(stray);
        };
        if self.visited & (1 << index) != 0 {
            return Err(stray);
        }
        self.visited |= 1 << index;
        self.current = Some(index);
        Ok(index)
    }

    /// The word at `at`.
    pub(crate) fn word(&mut self, at: u64) -> Result<u64, Unreliable> {
        let index = self.enter(at, 8)?;
        self.word_of(index, at)
    }

    fn word_of(&mut self, index: usize, at: u64) -> Result<u64, Unreliable> {
        let unreadable = Unreliable::Unreadable(Gva(at));
        let (Some(span), Some(copied)) = (self.spans.get(index), self.copies.get_mut(index)) else {
            return Err(unreadable);
        };
        if copied.words.is_empty() || at < copied.start {
            copied
                .fill(self.source, span, at)
                .ok_or(unreadable.clone())?;
        }
        let offset = usize::try_from(at - copied.start).map_err(|_| unreadable.clone())?;
        copied
            .words
            .get(offset..)
            .and_then(|rest| rest.first_chunk())
            .map_or(Err(unreadable), |word| Ok(u64::from_le_bytes(*word)))
    }
}

impl Copied {
    /// Copies from the cache line of `at` to the top of the stack.
    fn fill(&mut self, source: &dyn StackSource, span: &StackSpan, at: u64) -> Option<()> {
        let start = (at & !63).max(span.range.start.0);
        let size = span.range.end.0.checked_sub(start)?;
        if size > MAX_STACK {
            return None;
        }
        self.words.clear();
        self.words.resize(usize::try_from(size).ok()?, 0);
        self.start = start;
        let read = source.copy(Gva(start), &mut self.words);
        if read.is_none() {
            self.words.clear();
        }
        read
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Memory whose every word is its own address; counts how often it is read.
    struct Own(Cell<usize>);

    impl StackSource for Own {
        fn copy(&self, at: Gva, into: &mut [u8]) -> Option<()> {
            self.0.set(self.0.get() + 1);
            for (i, byte) in into.iter_mut().enumerate() {
                let address = at.0 + i as u64;
                *byte = (address & !7).to_le_bytes()[(address & 7) as usize];
            }
            Some(())
        }
    }

    fn span(kind: StackKind, start: u64) -> StackSpan {
        StackSpan {
            kind,
            range: GvaRange {
                start: Gva(start),
                end: Gva(start + 0x1000),
            },
        }
    }

    #[test]
    fn a_stack_is_read_once_however_many_words_are_wanted() {
        let source = Own(Cell::new(0));
        let spans = [span(StackKind::Task, 0x1000)];
        let mut pool = StackPool::default();
        let mut memory = StackMemory::new(&mut pool, &source, &spans);
        for at in (0x1800..0x2000).step_by(8) {
            assert_eq!(memory.word(at), Ok(at));
        }
        assert_eq!(source.0.get(), 1);
        assert_eq!(
            memory.word(0x1ffc),
            Err(Unreliable::StrayStackPointer(Gva(0x1ffc)))
        );
    }

    #[test]
    fn a_stack_that_was_left_is_not_entered_again() {
        let source = Own(Cell::new(0));
        let spans = [span(StackKind::Irq, 0x1000), span(StackKind::Task, 0x8000)];
        let mut pool = StackPool::default();
        let mut memory = StackMemory::new(&mut pool, &source, &spans);
        assert!(memory.word(0x1ff8).is_ok() && memory.word(0x8100).is_ok());
        assert_eq!(
            memory.word(0x1ff8),
            Err(Unreliable::StrayStackPointer(Gva(0x1ff8)))
        );
    }
}
