//! One connection to a control socket: a request, then its answer. Owns the framing of this side.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::control::message::{Failure, MAX_LINE, Request, Response};
use crate::control::rundir::RunDirError;
use crate::control::wire::{self, LineReader};

/// See the module.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    reader: LineReader,
    calls: u64,
}

/// Why a machine did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// There is no such place.
    #[error(transparent)]
    Place(#[from] RunDirError),
    /// No VMM answers there.
    #[error("no VM answers at {path}: {source}", path = .path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the host kernel said.
        source: io::Error,
    },
    /// The connection broke, or there was no answer in time.
    #[error("{method}: the VM does not answer: {source}")]
    Broken {
        /// What was asked.
        method: &'static str,
        /// What the host kernel said.
        source: io::Error,
    },
    /// The VM answered what it should not.
    #[error("{method}: the VM's answer makes no sense: {what}")]
    Nonsense {
        /// What was asked.
        method: &'static str,
        /// What is wrong.
        what: String,
    },
    /// The VM refused.
    #[error("{}", .0.message)]
    Refused(Failure),
}

impl Connection {
    /// Connects; every answer may take `limit`.
    ///
    /// # Errors
    /// [`CallError::Connect`].
    pub fn open(socket: &Path, limit: Duration) -> Result<Self, CallError> {
        let connect = || {
            let stream = UnixStream::connect(socket)?;
            stream.set_read_timeout(Some(limit))?;
            stream.set_write_timeout(Some(limit))?;
            Ok(stream)
        };
        let stream = connect().map_err(|source| CallError::Connect {
            path: socket.into(),
            source,
        })?;
        Ok(Self {
            stream,
            reader: LineReader::default(),
            calls: 0,
        })
    }

    /// Asks, and waits for the answer and the files beside it.
    ///
    /// # Errors
    /// [`CallError`]. After anything but [`CallError::Refused`] the connection is of no further use.
    pub fn call(
        &mut self,
        method: &'static str,
        params: Value,
    ) -> Result<(Value, Vec<File>), CallError> {
        self.calls += 1;
        let broken = |source| CallError::Broken { method, source };
        let request = Request {
            jsonrpc: "2.0".into(),
            id: self.calls.into(),
            method: method.into(),
            params,
        };
        let line = serde_json::to_vec(&request).map_err(|error| broken(error.into()))?;
        wire::send(&self.stream, &line, &[]).map_err(broken)?;
        let answer = self.reader.next(&self.stream, MAX_LINE).map_err(broken)?;
        let answer = answer.ok_or_else(|| broken(io::ErrorKind::UnexpectedEof.into()))?;
        let value = serde_json::from_slice(&answer.text).map_err(|error| broken(error.into()))?;
        let response: Response = parse(method, value)?;
        if response.id != self.calls {
            let what = format!("it answers request {}, not {}", response.id, self.calls);
            return Err(CallError::Nonsense { method, what });
        }
        match response {
            Response {
                error: Some(failure),
                ..
            } => Err(CallError::Refused(failure)),
            Response { result, .. } => Ok((result.unwrap_or_default(), answer.files)),
        }
    }

    /// Whether the VMM has closed the connection.
    pub(super) fn is_closed(&self) -> bool {
        wire::hung_up(&self.stream)
    }
}

/// The value an answer should hold.
pub(super) fn parse<T: DeserializeOwned>(
    method: &'static str,
    value: Value,
) -> Result<T, CallError> {
    serde_json::from_value(value).map_err(|error| CallError::Nonsense {
        method,
        what: error.to_string(),
    })
}
