//! This side of the shared page: a command, then a sleep until its answer. Owns the numbering.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::hot::map::Shared;
use crate::hot::page::{Answer, Operation, Status};
use crate::vm::futex::{self, Sharing};

/// How often a missing answer makes us see whether the VMM still lives.
const ALIVE_EVERY: Duration = Duration::from_millis(20);

/// See the module.
#[derive(Debug)]
pub(super) struct HotClient {
    page: Shared,
    number: u32,
}

/// There was no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Silence {
    /// The VMM has closed the connection.
    Gone,
    /// It has not, but did not answer in time.
    Slow,
    /// It answered with a status there is not.
    Nonsense,
}

impl HotClient {
    pub(super) const fn new(page: Shared) -> Self {
        Self { page, number: 0 }
    }

    pub(super) fn page(&self) -> &Shared {
        &self.page
    }

    /// Gives the command, whose arguments are in the page, and waits for its answer.
    pub(super) fn command(
        &mut self,
        operation: Operation,
        limit: Duration,
        is_gone: impl Fn() -> bool,
    ) -> Result<Answer, Silence> {
        // 24 bits of number; 0 is what a fresh page holds.
        self.number = self.number % 0xff_ffff + 1;
        let word = operation.numbered(self.number);
        let before = self.page.answer.load(Ordering::SeqCst);
        self.page.command.store(word, Ordering::SeqCst);
        futex::wake_all(&self.page.command, Sharing::Shared);
        let reply = self.wait(before, word >> 8, limit, is_gone)?;
        let status = Status::of(reply).ok_or(Silence::Nonsense)?;
        Ok(self.page.answer(status))
    }

    fn wait(
        &self,
        before: u32,
        number: u32,
        limit: Duration,
        is_gone: impl Fn() -> bool,
    ) -> Result<u32, Silence> {
        let end = Instant::now() + limit;
        let mut seen = before;
        loop {
            futex::look(&self.page.answer, seen, ALIVE_EVERY);
            futex::wait(&self.page.answer, seen, Some(ALIVE_EVERY), Sharing::Shared);
            let word = self.page.answer.load(Ordering::SeqCst);
            if word >> 8 == number {
                return Ok(word);
            }
            if word == seen && is_gone() {
                return Err(Silence::Gone);
            }
            if Instant::now() >= end {
                return Err(Silence::Slow);
            }
            seen = word;
        }
    }
}
