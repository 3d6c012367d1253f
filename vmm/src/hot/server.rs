//! The VMM's side of the shared page: one thread a session that takes commands, holds the stop and ends
//! it by itself when the lease runs out or the session is gone. Owns the lease. Whatever is in the page
//! was put there by somebody else: it is copied out, checked, and only then used.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmpatch_introspect::call::CallError;
use vmpatch_introspect::target::{StopError, WriteError};

use super::map::Shared;
use super::page::{self, Answer, Operation, Status};
use crate::vm::futex::{self, Sharing};
use crate::vm::{Running, State, Stopped};

/// No stop may be waited for longer than this.
const MAX_DEADLINE: Duration = Duration::from_secs(10);
/// No lease may be longer than this.
const MAX_LEASE: Duration = Duration::from_secs(60);

/// The session's thread, from outside. Dropping it ends the session: a stop that is held is undone and
/// the guest resumed before the drop returns.
#[derive(Debug)]
pub(crate) struct HotServer {
    page: Arc<Shared>,
    gone: Arc<AtomicU32>,
    thread: Option<JoinHandle<()>>,
}

impl HotServer {
    /// Makes the page and the thread.
    ///
    /// # Errors
    /// What the host kernel said.
    pub(crate) fn start(machine: Arc<Running>) -> io::Result<Self> {
        let page = Arc::new(Shared::create()?);
        page.begin(machine.vcpu_count());
        let gone = Arc::new(AtomicU32::new(0));
        let session = Session {
            machine,
            page: Arc::clone(&page),
            gone: Arc::clone(&gone),
            held: None,
            expired: false,
        };
        let thread = thread::Builder::new()
            .name("session".into())
            .spawn(|| session.serve())?;
        Ok(Self {
            page,
            gone,
            thread: Some(thread),
        })
    }

    /// For the session to map.
    pub(crate) fn page(&self) -> &Shared {
        &self.page
    }
}

impl Drop for HotServer {
    fn drop(&mut self) {
        self.gone.store(1, Ordering::SeqCst);
        futex::wake_all(&self.gone, Sharing::Private);
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has dropped its stop, and so has undone and resumed.
            let _ = thread.join();
        }
    }
}

/// A stop and until when it may last.
struct Held {
    stopped: Stopped,
    until: Instant,
}

struct Session {
    machine: Arc<Running>,
    page: Arc<Shared>,
    gone: Arc<AtomicU32>,
    held: Option<Held>,
    /// The last stop was ended by its lease.
    expired: bool,
}

impl Session {
    fn serve(mut self) {
        let mut seen = 0;
        while self.gone.load(Ordering::SeqCst) == 0 {
            self.end_if_expired();
            let word = self.page.command.load(Ordering::SeqCst);
            if word == seen {
                let until = self.held.as_ref().map(|held| held.until);
                if let Some(until) = until {
                    let left = until.saturating_duration_since(Instant::now());
                    futex::look(&self.page.command, seen, left);
                }
                let words = [
                    (&self.page.command, seen, Sharing::Shared),
                    (&*self.gone, 0, Sharing::Private),
                ];
                futex::wait_either(words, until);
                continue;
            }
            seen = word;
            let answer = self.obey(word);
            self.page.set_answer(&answer);
            let reply = (word & !0xff) | answer.status as u32;
            self.page.answer.store(reply, Ordering::SeqCst);
            futex::wake_all(&self.page.answer, Sharing::Shared);
        }
        // Dropping `held` undoes and resumes.
    }

    fn end_if_expired(&mut self) {
        if let Some(held) = self.held.take_if(|held| held.until <= Instant::now()) {
            tracing::warn!("a stop's lease ran out: undoing and resuming");
            self.expired = true;
            if let Err(error) = held.stopped.abandon() {
                tracing::error!("{error}");
            }
        }
    }

    fn obey(&mut self, word: u32) -> Answer {
        let Some(operation) = Operation::of(word) else {
            return Answer::plain(Status::Refused);
        };
        if let Operation::Stop = operation {
            return self.stop();
        }
        if self.machine.state() == State::Stuck {
            return Answer::plain(Status::UndoFailed);
        }
        match self.held.take() {
            Some(held) => self.go_on(operation, held),
            None if self.expired => Answer::plain(Status::LeaseExpired),
            None => Answer::plain(Status::Refused),
        }
    }

    fn stop(&mut self) -> Answer {
        if self.held.is_some() {
            return Answer::because(Status::NotRunning, 0, "this session has stopped it already");
        }
        self.expired = false;
        let request = self.page.request();
        let deadline = request.deadline.min(MAX_DEADLINE);
        match self.machine.stop_for(deadline, request.detail) {
            Ok(stopped) => {
                self.page.set_registers(stopped.vcpus());
                self.page.set_report(&stopped.report());
                let until = Instant::now() + request.lease.min(MAX_LEASE);
                self.held = Some(Held { stopped, until });
                Answer::plain(Status::Done)
            }
            Err(StopError::Deadline { vcpu, .. }) => Answer::about(Status::Late, vcpu.into()),
            Err(StopError::NotRunning(why) | StopError::Unreachable(why)) => {
                Answer::because(Status::NotRunning, 0, &why)
            }
        }
    }

    /// A command while the stop is held; puts the stop back if it still is.
    fn go_on(&mut self, operation: Operation, mut held: Held) -> Answer {
        if let Some(outcome) = self.machine.outcome() {
            return Answer::because(Status::Ended, 0, &outcome.to_string());
        }
        match operation {
            Operation::Write | Operation::Switch => {
                let answer = write(&mut held.stopped, &self.page);
                if answer.status == Status::Done && operation == Operation::Switch {
                    return self.resume(held.stopped);
                }
                if answer.status != Status::UndoFailed {
                    self.held = Some(held);
                }
                answer
            }
            Operation::Resume => self.resume(held.stopped),
            Operation::Call => {
                let answer = call(&mut held, &self.page);
                if answer.status != Status::UndoFailed {
                    self.held = Some(held);
                }
                answer
            }
            Operation::Stop => {
                self.held = Some(held);
                Answer::plain(Status::Refused)
            }
            Operation::Abandon => match held.stopped.abandon() {
                Ok(report) => {
                    self.page.set_report(&report);
                    Answer::plain(Status::Done)
                }
                Err(error) => refusal(&error, &[]),
            },
        }
    }

    fn resume(&self, stopped: Stopped) -> Answer {
        self.page.set_report(&stopped.resume());
        Answer::plain(Status::Done)
    }
}

/// A call ends before the lease does.
fn call(held: &mut Held, page: &Shared) -> Answer {
    let order = page.call();
    let until = held.until.min(Instant::now() + order.budget.min(MAX_LEASE));
    match held.stopped.call(&order, until) {
        Ok(called) => page::called(&called),
        Err(CallError::Unfit { why, .. }) => Answer::because(Status::Unfit, 0, &why),
        Err(CallError::NotRestored { why, .. }) => Answer::because(Status::UndoFailed, 0, &why),
        Err(CallError::LeaseExpired) => Answer::plain(Status::LeaseExpired),
        Err(CallError::Unsupported(why)) => Answer::because(Status::Unfit, 0, why),
        Err(CallError::Unreachable(why)) => Answer::because(Status::Ended, 0, &why),
    }
}

fn write(stopped: &mut Stopped, page: &Shared) -> Answer {
    let Some(batch) = page.batch() else {
        return Answer::because(Status::Malformed, 0, "the batch area holds no batch");
    };
    match stopped.write(&batch) {
        Ok(()) => Answer::plain(Status::Done),
        Err(error) => {
            let addresses: Vec<_> = batch.iter().map(|edit| edit.at).collect();
            refusal(&error, &addresses)
        }
    }
}

/// What the session is told of a write that failed.
fn refusal(error: &WriteError, batch: &[vmpatch_introspect::address::Gpa]) -> Answer {
    match error {
        WriteError::Differs { at, found, .. } => Answer {
            status: Status::Differs,
            detail: batch.iter().position(|edit| edit == at).unwrap_or(0) as u64,
            bytes: found.clone(),
        },
        WriteError::Malformed { at, what } => Answer::because(Status::Malformed, at.0, what),
        WriteError::ReadOnly { at } => Answer::because(Status::Malformed, at.0, "read-only"),
        WriteError::ReadBack { at } => Answer::about(Status::ReadBack, at.0),
        WriteError::UndoFailed { at } => Answer::about(Status::UndoFailed, at.0),
        WriteError::LeaseExpired => Answer::plain(Status::LeaseExpired),
        WriteError::Unreachable(why) => Answer::because(Status::Ended, 0, why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::testing::spinning;

    /// Gives a command as a session does; panics if there is no answer in time.
    fn command(page: &Shared, word: u32) -> Answer {
        page.command.store(word, Ordering::SeqCst);
        futex::wake_all(&page.command, Sharing::Shared);
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let answer = page.answer.load(Ordering::SeqCst);
            if answer >> 8 == word >> 8 {
                return page.answer(Status::of(answer).unwrap());
            }
            assert!(Instant::now() < end, "no answer to {word:#x}");
            futex::wait(
                &page.answer,
                answer,
                Some(Duration::from_millis(5)),
                Sharing::Shared,
            );
        }
    }

    #[test]
    fn commands_out_of_order_are_refused() {
        let Some(machine) = spinning() else { return };
        let server = HotServer::start(machine).unwrap();
        let page = server.page();
        for (number, operation) in [
            Operation::Write,
            Operation::Resume,
            Operation::Abandon,
            Operation::Switch,
            Operation::Call,
        ]
        .into_iter()
        .enumerate()
        {
            let answer = command(page, operation.numbered(number as u32 + 1));
            assert_eq!(answer.status, Status::Refused, "{operation:?}");
        }
        page.set_arguments([1_000_000_000, 10_000_000_000, 0]);
        assert_eq!(
            command(page, Operation::Stop.numbered(9)).status,
            Status::Done
        );
        assert_eq!(
            command(page, Operation::Stop.numbered(10)).status,
            Status::NotRunning
        );
        assert_eq!(
            command(page, Operation::Resume.numbered(11)).status,
            Status::Done
        );
        assert_eq!(
            command(page, Operation::Resume.numbered(12)).status,
            Status::Refused
        );
        assert_eq!(command(page, 13 << 8 | 0xee).status, Status::Refused);
    }

    #[test]
    fn garbage_in_the_page_never_hangs_or_ends_the_session() {
        let Some(machine) = spinning() else { return };
        let server = HotServer::start(Arc::clone(&machine)).unwrap();
        let page = server.page();
        let mut seed = 0x2545_f491_4f6c_dd1du64;
        let mut random = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        for number in 1..3000u32 {
            for _ in 0..random() % 64 {
                let words = page.all_words();
                // Low words are where the layout's heads are; the deadline stays short.
                let reach = if random() % 2 == 0 {
                    16
                } else {
                    words.len() as u64
                };
                let value = match random() % 4 {
                    0 => random() % 600,
                    1 => u64::MAX,
                    2 => 0x1000,
                    _ => random(),
                };
                words[(random() % reach) as usize].store(value, Ordering::SeqCst);
            }
            page.set_arguments([random() % 3_000_000, random() % 2_000_000, random() % 3]);
            let operation = (random() % 8) as u32;
            command(page, number << 8 | operation);
        }
        command(page, Operation::Abandon.numbered(0xff_fff0));
        page.set_arguments([2_000_000_000, 10_000_000_000, 0]);
        assert_eq!(
            command(page, Operation::Stop.numbered(0xff_fff1)).status,
            Status::Done
        );
        drop(server);
        assert_eq!(machine.state(), State::Running);
        assert_eq!(machine.outcome(), None);
    }

    #[test]
    fn a_lease_longer_than_allowed_is_cut_and_one_of_nothing_ends_at_once() {
        let Some(machine) = spinning() else { return };
        let server = HotServer::start(Arc::clone(&machine)).unwrap();
        let page = server.page();
        page.set_arguments([u64::MAX, 0, 0]);
        assert_eq!(
            command(page, Operation::Stop.numbered(1)).status,
            Status::Done
        );
        assert_eq!(
            command(page, Operation::Resume.numbered(2)).status,
            Status::LeaseExpired
        );
        assert_eq!(machine.state(), State::Running);
        page.set_arguments([u64::MAX, u64::MAX, 0]);
        assert_eq!(
            command(page, Operation::Stop.numbered(3)).status,
            Status::Done
        );
        assert_eq!(
            command(page, Operation::Resume.numbered(4)).status,
            Status::Done
        );
    }
}
