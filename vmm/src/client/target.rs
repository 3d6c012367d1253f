//! A machine of our own VMM as the rest of the program sees any machine: it can be read, stopped, written
//! and resumed. Owns the session; one a machine.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::Value;
use vmpatch_introspect::address::{Gpa, GpaRange};
use vmpatch_introspect::call::{Call, CallError, Called};
use vmpatch_introspect::target::{
    ArenaError, Edit, MemoryError, PhysicalMemory, ResumeError, StopError, StopReport, StopRequest,
    StoppedTarget, SwitchError, Target, WriteError,
};
use vmpatch_introspect::vcpu::Vcpu;

use super::connection::{self, Connection};
use super::hot::{HotClient, Silence};
use super::memory::MappedMemory;
use crate::control::message::{ArenaWrite, Description, MAX_ARENA_WRITE, Opened, PROTOCOL, method};
use crate::hot::map::Shared;
use crate::hot::page::{self, Answer, Operation, Status};

/// Beyond a stop's own deadline the VMM may take this long to answer.
const MARGIN: Duration = Duration::from_secs(2);

/// See the module.
#[derive(Debug)]
pub struct KvmTarget {
    description: Description,
    memory: MappedMemory,
    arena: GpaRange,
    session: Mutex<Session>,
}

/// What only one call at a time may use.
#[derive(Debug)]
struct Session {
    connection: Connection,
    hot: HotClient,
    /// Between a stop and its end.
    stopped: bool,
}

/// Why a machine could not be looked into.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The machine did not do as asked.
    #[error(transparent)]
    Call(#[from] connection::CallError),
    /// It is of another version.
    #[error(
        "the VM speaks protocol {theirs}, this program {PROTOCOL}: use the vmpatch that started it"
    )]
    Protocol {
        /// Its protocol.
        theirs: u64,
    },
    /// What it offers cannot be used.
    #[error("the VM's memory cannot be mapped: {0}")]
    Map(String),
    /// The shared page cannot be used.
    #[error("the VM's shared page cannot be used: {0}")]
    Page(io::Error),
}

impl KvmTarget {
    /// Opens the session of the machine that `vm` names by id, directory or socket. It ends when the
    /// target is dropped, or when this process ends in whatever way.
    ///
    /// # Errors
    /// [`ConnectError`]; among others another session is open.
    pub fn connect(vm: &str) -> Result<Self, ConnectError> {
        let mut connection = super::connect(vm)?;
        let (value, files) = connection.call(method::OPEN, Value::Null)?;
        let theirs = value.get("protocol").and_then(Value::as_u64).unwrap_or(0);
        if theirs != u64::from(PROTOCOL) {
            return Err(ConnectError::Protocol { theirs });
        }
        let opened: Opened = connection::parse(method::OPEN, value)?;
        let files: Vec<_> = files.into_iter().map(Arc::new).collect();
        let memory = MappedMemory::map(&opened.ram, opened.arena, &files);
        let hot = HotClient::new(open_page(&files, opened.hot_fd).map_err(ConnectError::Page)?);
        Ok(Self {
            description: opened.description,
            memory: memory.map_err(ConnectError::Map)?,
            arena: opened.arena.range,
            session: Mutex::new(Session {
                connection,
                hot,
                stopped: false,
            }),
        })
    }

    /// What the machine says of itself.
    #[must_use]
    pub const fn description(&self) -> &Description {
        &self.description
    }

    fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn open_page(files: &[Arc<File>], index: usize) -> io::Result<Shared> {
    let file = files.get(index).ok_or(io::ErrorKind::NotFound)?;
    Shared::open(file.try_clone()?)
}

impl Session {
    fn command(&mut self, operation: Operation, limit: Duration) -> Result<Answer, String> {
        let connection = &self.connection;
        let answer = self
            .hot
            .command(operation, limit, || connection.is_closed());
        answer.map_err(|silence| {
            match silence {
                Silence::Gone => "its VMM has ended",
                Silence::Slow => "its VMM does not answer in time",
                Silence::Nonsense => "its VMM answers nonsense",
            }
            .to_owned()
        })
    }

    fn stop(&mut self, request: StopRequest) -> Result<(), StopError> {
        self.hot.page().set_request(request);
        let limit = request.deadline.saturating_add(MARGIN);
        let answer = self
            .command(Operation::Stop, limit)
            .map_err(StopError::Unreachable)?;
        match answer.status {
            Status::Done => {
                self.stopped = true;
                Ok(())
            }
            Status::Late => Err(StopError::Deadline {
                vcpu: u32::try_from(answer.detail).unwrap_or(u32::MAX),
                deadline: request.deadline,
            }),
            Status::NotRunning | Status::Ended => Err(StopError::NotRunning(answer.text())),
            other => Err(StopError::Unreachable(unexpected(other))),
        }
    }

    fn write(&mut self, batch: &[Edit]) -> Result<(), WriteError> {
        self.put(batch)?;
        let answer = self
            .command(Operation::Write, MARGIN)
            .map_err(WriteError::Unreachable)?;
        match answer.status {
            Status::Done => Ok(()),
            _ => Err(write_error(batch, &answer)),
        }
    }

    /// Puts the batch into the shared page.
    fn put(&self, batch: &[Edit]) -> Result<(), WriteError> {
        let too_large = || WriteError::Malformed {
            at: batch.first().map_or(Gpa(0), |edit| edit.at),
            what: "the batch is too large for the shared page".into(),
        };
        self.hot.page().set_batch(batch).ok_or_else(too_large)
    }

    fn switch(&mut self, batch: &[Edit]) -> Result<StopReport, SwitchError> {
        self.put(batch)?;
        let answer = self
            .command(Operation::Switch, MARGIN)
            .map_err(ResumeError::Unreachable)?;
        if answer.status != Status::Done {
            return Err(write_error(batch, &answer).into());
        }
        self.stopped = false;
        Ok(self.hot.page().report())
    }

    fn call(&mut self, call: &Call) -> Result<Called, CallError> {
        self.hot.page().set_call(call);
        let limit = call.budget.saturating_add(MARGIN);
        let answer = self
            .command(Operation::Call, limit)
            .map_err(CallError::Unreachable)?;
        let vcpu = call.vcpu;
        let why = answer.text();
        match answer.status {
            Status::Done | Status::NotReturned => page::what_called(&answer)
                .ok_or_else(|| CallError::Unreachable(unexpected(answer.status))),
            Status::Unfit => Err(CallError::Unfit { vcpu, why }),
            Status::UndoFailed => Err(CallError::NotRestored { vcpu, why }),
            Status::LeaseExpired => Err(CallError::LeaseExpired),
            Status::Ended => Err(CallError::Unreachable(why)),
            other => Err(CallError::Unreachable(unexpected(other))),
        }
    }

    fn resume(&mut self) -> Result<StopReport, ResumeError> {
        self.stopped = false;
        let answer = self
            .command(Operation::Resume, MARGIN)
            .map_err(ResumeError::Unreachable)?;
        match answer.status {
            Status::Done => Ok(self.hot.page().report()),
            Status::LeaseExpired => Err(ResumeError::LeaseExpired),
            Status::Ended => Err(ResumeError::Unreachable(answer.text())),
            other => Err(ResumeError::Unreachable(unexpected(other))),
        }
    }

    /// For a stop that is given up; the lease does the same where this does not reach the VMM.
    fn abandon(&mut self) {
        if std::mem::take(&mut self.stopped)
            && let Err(why) = self.command(Operation::Abandon, MARGIN)
        {
            tracing::warn!("giving up the stop: {why}");
        }
    }
}

fn write_error(batch: &[Edit], answer: &Answer) -> WriteError {
    let at = Gpa(answer.detail);
    match answer.status {
        Status::Differs => {
            let index = usize::try_from(answer.detail).unwrap_or(usize::MAX);
            let edit = batch.get(index);
            WriteError::Differs {
                at: edit.map_or(Gpa(0), |edit| edit.at),
                expected: edit.map_or_else(Vec::new, |edit| edit.old.clone()),
                found: answer.bytes.clone(),
            }
        }
        Status::Malformed => WriteError::Malformed {
            at,
            what: answer.text(),
        },
        Status::ReadBack => WriteError::ReadBack { at },
        Status::UndoFailed => WriteError::UndoFailed { at },
        Status::LeaseExpired => WriteError::LeaseExpired,
        Status::Ended => WriteError::Unreachable(answer.text()),
        other => WriteError::Unreachable(unexpected(other)),
    }
}

fn unexpected(status: Status) -> String {
    match status {
        Status::UndoFailed => "it stays stopped because a write could not be undone".into(),
        other => format!("its VMM answers {other:?}"),
    }
}

impl PhysicalMemory for KvmTarget {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(at, into)
    }

    fn read_u64(&self, at: Gpa) -> Result<u64, MemoryError> {
        self.memory.read_u64(at)
    }

    fn read_words(&self, at: Gpa, offsets: &[u64], into: &mut [u64]) -> Result<(), MemoryError> {
        self.memory.read_words(at, offsets, into)
    }

    fn ram(&self) -> Vec<GpaRange> {
        self.memory.ram()
    }
}

impl Target for KvmTarget {
    fn name(&self) -> &str {
        &self.description.id
    }

    fn vcpu_count(&self) -> usize {
        self.description.vcpus
    }

    fn stop(&self, request: StopRequest) -> Result<Box<dyn StoppedTarget + '_>, StopError> {
        let mut session = self.session();
        session.stop(request)?;
        let vcpus = session.hot.page().registers(self.description.vcpus);
        Ok(Box::new(KvmStopped {
            target: self,
            vcpus,
        }))
    }

    fn arena(&self) -> Result<GpaRange, ArenaError> {
        Ok(self.arena)
    }

    fn can_call(&self) -> bool {
        true
    }

    fn write_arena(&self, at: Gpa, bytes: &[u8]) -> Result<(), ArenaError> {
        let len = bytes.len();
        let range = GpaRange::sized(at, len as u64);
        if range.is_none_or(|range| range.start < self.arena.start || range.end > self.arena.end) {
            return Err(ArenaError::Outside { at, len });
        }
        let mut session = self.session();
        let mut place = at;
        for part in bytes.chunks(MAX_ARENA_WRITE) {
            let write = ArenaWrite {
                at: place,
                data: BASE64.encode(part),
            };
            let params = serde_json::to_value(write)
                .map_err(|error| ArenaError::Unreachable(error.to_string()))?;
            let answer = session.connection.call(method::ARENA_WRITE, params);
            answer.map_err(|error| ArenaError::Unreachable(error.to_string()))?;
            place = place.wrapping_add(part.len() as u64);
        }
        Ok(())
    }
}

/// Every vCPU of the machine stands, for this process.
struct KvmStopped<'a> {
    target: &'a KvmTarget,
    vcpus: Vec<Vcpu>,
}

impl StoppedTarget for KvmStopped<'_> {
    fn memory(&self) -> &dyn PhysicalMemory {
        &self.target.memory
    }

    fn vcpus(&self) -> &[Vcpu] {
        &self.vcpus
    }

    fn write(&mut self, batch: &[Edit]) -> Result<(), WriteError> {
        self.target.session().write(batch)
    }

    fn call(&mut self, call: &Call) -> Result<Called, CallError> {
        self.target.session().call(call)
    }

    fn resume(self: Box<Self>) -> Result<StopReport, ResumeError> {
        self.target.session().resume()
    }

    fn switch(self: Box<Self>, batch: &[Edit]) -> Result<StopReport, SwitchError> {
        self.target.session().switch(batch)
    }
}

impl Drop for KvmStopped<'_> {
    fn drop(&mut self) {
        self.target.session().abandon();
    }
}
