//! The server of the control socket: one thread that accepts, one a client. Owns the threads; does not own
//! what a method does ([`super::methods`]).
//!
//! A client that sends nothing costs a sleeping thread; one that does not read is dropped when a write to
//! it has waited for a second. Neither is noticed by the others or by the guest.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::Value;

use super::message::{Description, Failure, MAX_LINE, Request, Response, code};
use super::methods::{Client, Machine, Reply};
use super::rundir::{RunDir, RunDirError};
use super::wire::{self, LineReader};
use crate::vm::Running;

/// The most clients at a time.
const MAX_CLIENTS: usize = 32;
/// How long a client may take to read what it asked for.
const SEND_LIMIT: Duration = Duration::from_secs(1);

/// See the module. Dropping it closes the socket, ends every client and gives the machine's place back.
#[derive(Debug)]
pub struct ControlServer {
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
    place: RunDir,
}

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The socket or its thread could not be made.
    #[error("the control socket: {0}")]
    Socket(#[from] io::Error),
    /// The description could not be written.
    #[error(transparent)]
    Place(#[from] RunDirError),
}

#[derive(Debug)]
struct Shared {
    machine: Arc<Machine>,
    closing: AtomicBool,
    clients: Mutex<Vec<Served>>,
}

/// A client's thread, and a second handle on its socket to end it.
#[derive(Debug)]
struct Served {
    stream: UnixStream,
    thread: JoinHandle<()>,
}

impl ControlServer {
    /// Serves `machine` from its place, which the caller has claimed before it made the machine.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn start(
        place: RunDir,
        machine: Arc<Running>,
        description: Description,
    ) -> Result<Self, ServerError> {
        let listener = UnixListener::bind(place.socket())?;
        place.describe(&description)?;
        let shared = Arc::new(Shared {
            machine: Arc::new(Machine::new(machine, description)),
            closing: AtomicBool::new(false),
            clients: Mutex::default(),
        });
        let theirs = Arc::clone(&shared);
        let acceptor = thread::Builder::new()
            .name("control".into())
            .spawn(move || accept(&theirs, &listener))?;
        Ok(Self {
            shared,
            acceptor: Some(acceptor),
            place,
        })
    }

    /// Where the machine is found.
    #[must_use]
    pub const fn place(&self) -> &RunDir {
        &self.place
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        // Wakes the acceptor. Where the socket's file is gone it sleeps on, to no harm.
        if UnixStream::connect(self.place.socket()).is_ok()
            && let Some(acceptor) = self.acceptor.take()
        {
            let _ = acceptor.join();
        }
        let clients = std::mem::take(&mut *self.shared.clients());
        for client in &clients {
            let _ = client.stream.shutdown(std::net::Shutdown::Both);
        }
        for client in clients {
            let _ = client.thread.join();
        }
    }
}

impl Shared {
    fn clients(&self) -> MutexGuard<'_, Vec<Served>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn accept(shared: &Arc<Shared>, listener: &UnixListener) {
    for stream in listener.incoming() {
        if shared.closing.load(Ordering::SeqCst) {
            return;
        }
        let admitted = stream.and_then(|stream| admit(shared, stream));
        if let Err(error) = admitted {
            tracing::debug!("a client was not admitted: {error}");
            // Out of descriptors or threads: give them time to come back.
            thread::sleep(Duration::from_millis(10));
        }
    }
}

fn admit(shared: &Arc<Shared>, stream: UnixStream) -> io::Result<()> {
    let mut clients = shared.clients();
    clients.retain(|client| !client.thread.is_finished());
    let uid = wire::peer_uid(&stream)?;
    if clients.len() >= MAX_CLIENTS || (uid != 0 && uid != wire::own_uid()) {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    stream.set_write_timeout(Some(SEND_LIMIT))?;
    let second = stream.try_clone()?;
    let theirs = Arc::clone(&shared.machine);
    let thread = thread::Builder::new()
        .name("client".into())
        .spawn(move || converse(&theirs, &second))?;
    clients.push(Served { stream, thread });
    Ok(())
}

/// Serves one client until it goes. Its session, if it has one, ends with it.
fn converse(machine: &Arc<Machine>, stream: &UnixStream) {
    let (mut reader, mut client) = (LineReader::default(), Client::default());
    while let Ok(Some(line)) = reader.next(stream, MAX_LINE) {
        // Descriptors of a client's are of no use here.
        drop(line.files);
        let Some((id, result)) = answer(machine, &mut client, &line.text) else {
            continue;
        };
        if respond(machine, stream, id, result).is_err() {
            break;
        }
    }
    // Before the socket is closed, so that a client that waits for that finds the session over.
    drop(client);
    let _ = stream.shutdown(std::net::Shutdown::Both);
}

/// `None` for a request that wants no answer, which is not carried out either.
fn answer(
    machine: &Arc<Machine>,
    client: &mut Client,
    line: &[u8],
) -> Option<(Value, Result<Reply, Failure>)> {
    let value: Value = match serde_json::from_slice(line) {
        Ok(value) => value,
        Err(error) => {
            let failure = Failure::new(code::PARSE, error.to_string());
            return Some((Value::Null, Err(failure)));
        }
    };
    let request: Request = match serde_json::from_value(value) {
        Ok(request) => request,
        Err(error) => {
            let failure = Failure::new(code::REQUEST, error.to_string());
            return Some((Value::Null, Err(failure)));
        }
    };
    if request.id.is_null() {
        return None;
    }
    if request.jsonrpc != "2.0" {
        let failure = Failure::new(code::REQUEST, "jsonrpc must be \"2.0\"");
        return Some((request.id, Err(failure)));
    }
    let result = client.call(machine, &request.method, request.params);
    Some((request.id, result))
}

fn respond(
    machine: &Machine,
    stream: &UnixStream,
    id: Value,
    result: Result<Reply, Failure>,
) -> io::Result<()> {
    let mut response = Response {
        jsonrpc: "2.0".into(),
        id,
        result: None,
        error: None,
    };
    let (fds, terminate) = match result {
        Ok(reply) => {
            response.result = Some(reply.result);
            (reply.fds, reply.terminate)
        }
        Err(failure) => {
            response.error = Some(failure);
            (Vec::new(), false)
        }
    };
    let line = serde_json::to_vec(&response)?;
    let beside: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let sent = wire::send(stream, &line, &beside);
    if terminate {
        machine.running.terminate();
    }
    sent
}
