//! What each method does. Owns the one session of the machine; knows nothing of sockets.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use vmpatch_introspect::address::GpaRange;

use super::message::{
    ArenaWrite, Description, Failure, MAX_ARENA_WRITE, MappedRange, Opened, PROTOCOL, Status, code,
    method,
};
use crate::hot::server::HotServer;
use crate::memory::{Slot, SlotKind};
use crate::vm::Running;

/// How long the owner's pause may take to be reached.
const PAUSE_DEADLINE: Duration = Duration::from_secs(1);
/// How long a new session waits for the one before it to be seen as over.
const HANDOVER: Duration = Duration::from_millis(500);
/// How often it looks meanwhile.
const HANDOVER_STEP: Duration = Duration::from_millis(1);

/// What all clients share.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) running: Arc<Running>,
    pub(super) description: Description,
    started: Instant,
    session: AtomicBool,
}

/// What one client has.
#[derive(Debug, Default)]
pub(super) struct Client {
    session: Option<Session>,
}

/// The machine's session, as long as its client has it.
#[derive(Debug)]
struct Session {
    /// Before `_slot`: the next session comes when this one has undone and resumed.
    _hot: HotServer,
    _slot: Slotted,
}

/// Marks the session as taken until it is dropped.
#[derive(Debug)]
struct Slotted(Arc<Machine>);

impl Drop for Slotted {
    fn drop(&mut self) {
        self.0.session.store(false, Ordering::SeqCst);
    }
}

/// A good answer.
pub(super) struct Reply {
    pub(super) result: Value,
    /// What goes beside it.
    pub(super) fds: Vec<OwnedFd>,
    /// The machine ends once the answer is sent.
    pub(super) terminate: bool,
}

impl Reply {
    fn of(result: &impl Serialize) -> Result<Self, Failure> {
        let result = serde_json::to_value(result)
            .map_err(|error| Failure::refused(format!("cannot be told: {error}")))?;
        Ok(Self {
            result,
            fds: Vec::new(),
            terminate: false,
        })
    }
}

impl Machine {
    pub(super) fn new(running: Arc<Running>, description: Description) -> Self {
        Self {
            running,
            description,
            started: Instant::now(),
            session: AtomicBool::new(false),
        }
    }

    fn status(&self) -> Status {
        Status {
            protocol: PROTOCOL,
            description: self.description.clone(),
            state: self.running.state(),
            outcome: self.running.outcome().map(|outcome| outcome.to_string()),
            session: self.session.load(Ordering::SeqCst),
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
        }
    }
}

impl Client {
    /// Carries out one request.
    pub(super) fn call(
        &mut self,
        machine: &Arc<Machine>,
        name: &str,
        params: Value,
    ) -> Result<Reply, Failure> {
        let running = &machine.running;
        match name {
            method::STATUS => Reply::of(&machine.status()),
            method::PAUSE => done(running.pause(PAUSE_DEADLINE)),
            method::RESUME => done(running.unpause()),
            method::STOP => Ok(Reply {
                terminate: true,
                ..Reply::of(&())?
            }),
            method::OPEN => self.open(machine),
            method::ARENA_WRITE => self.write_arena(running, &parse(params)?),
            _ => Err(Failure::new(code::METHOD, format!("no method {name:?}"))),
        }
    }

    fn open(&mut self, machine: &Arc<Machine>) -> Result<Reply, Failure> {
        if !claim(&machine.session) {
            return Err(Failure::refused("another session is open on this VM"));
        }
        let slot = Slotted(Arc::clone(machine));
        let hot =
            HotServer::start(Arc::clone(&machine.running)).map_err(|error| internal(&error))?;
        let reply = opened(machine, &hot).map_err(|error| internal(&error))?;
        self.session = Some(Session {
            _hot: hot,
            _slot: slot,
        });
        reply
    }

    fn write_arena(&self, running: &Running, write: &ArenaWrite) -> Result<Reply, Failure> {
        if self.session.is_none() {
            return Err(Failure::refused("this connection has no session open"));
        }
        let bytes = BASE64
            .decode(&write.data)
            .map_err(|error| Failure::new(code::PARAMS, format!("data: {error}")))?;
        let range = GpaRange::sized(write.at, bytes.len() as u64);
        let arena = running.memory().layout().arena();
        let inside =
            range.is_some_and(|range| arena.start <= range.start && range.end <= arena.end);
        if !inside || bytes.len() > MAX_ARENA_WRITE {
            let what = format!(
                "{} bytes at {} are not inside {arena}",
                bytes.len(),
                write.at
            );
            return Err(Failure::new(code::PARAMS, what));
        }
        done(running.memory().write(write.at, &bytes))
    }
}

/// Takes the one session, after waiting a little: a client that has just ended may not have been noticed yet, and whoever
/// calls one command after the other must not be refused for it.
fn claim(session: &AtomicBool) -> bool {
    let until = Instant::now() + HANDOVER;
    while session.swap(true, Ordering::SeqCst) {
        if Instant::now() >= until {
            return false;
        }
        std::thread::sleep(HANDOVER_STEP);
    }
    true
}

/// The answer to opening a session: memory and the shared page, with their descriptors.
fn opened(machine: &Machine, hot: &HotServer) -> io::Result<Result<Reply, Failure>> {
    let memory = machine.running.memory();
    let [ram, arena] = [SlotKind::Ram, SlotKind::Arena]
        .map(|kind| memory.slots().iter().filter(move |slot| slot.kind == kind));
    let mut fds = Vec::new();
    let (ram_fd, mut ranges) = (fds.len(), Vec::new());
    for slot in ram {
        // All RAM slots share one file.
        if fds.is_empty() {
            fds.push(read_only(&slot.file)?);
        }
        ranges.push(mapped(slot, ram_fd));
    }
    let (arena_fd, mut arenas) = (fds.len(), Vec::new());
    for slot in arena {
        fds.push(read_only(&slot.file)?);
        arenas.push(mapped(slot, arena_fd));
    }
    let Some(&arena) = arenas.first() else {
        return Ok(Err(Failure::refused("this VM has no arena slot")));
    };
    let hot_fd = fds.len();
    fds.push(hot.page().fd().try_clone_to_owned()?);
    let reply = Reply::of(&Opened {
        protocol: PROTOCOL,
        description: machine.description.clone(),
        ram: ranges,
        arena,
        hot_fd,
    });
    Ok(reply.map(|reply| Reply { fds, ..reply }))
}

const fn mapped(slot: &Slot, fd: usize) -> MappedRange {
    MappedRange {
        range: slot.range,
        fd,
        offset: slot.offset,
    }
}

/// The same file, opened anew for reading only: a duplicate would share the right to write.
fn read_only(file: &File) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    File::open(path).map(OwnedFd::from)
}

fn done<E: ToString>(result: Result<(), E>) -> Result<Reply, Failure> {
    result.map_err(|error| Failure::refused(error.to_string()))?;
    Reply::of(&())
}

fn parse<T: DeserializeOwned>(params: Value) -> Result<T, Failure> {
    serde_json::from_value(params).map_err(|error| Failure::new(code::PARAMS, error.to_string()))
}

fn internal(error: &io::Error) -> Failure {
    Failure::refused(format!("the VMM cannot open a session: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_that_is_about_to_end_is_waited_for() {
        let session = AtomicBool::new(true);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                session.store(false, Ordering::SeqCst);
            });
            assert!(claim(&session));
        });
        assert!(session.load(Ordering::SeqCst));
    }

    #[test]
    fn a_session_that_stays_is_not_taken_over() {
        assert!(!claim(&AtomicBool::new(true)));
    }
}
