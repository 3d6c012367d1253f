//! The other end of the control socket: what the command line uses to list, pause and end machines, and
//! [`KvmTarget`], a machine to look into and to patch. Everything that analyses runs here, outside the VMM.

mod connection;
mod hot;
mod memory;
mod target;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::control::message::method;
pub use crate::control::message::{Description, Status};
use crate::control::rundir::{self, Found, RunDirError};
pub use connection::{CallError, Connection};
pub use target::{ConnectError, KvmTarget};

/// How long a machine may take to answer an ordinary question.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// The machines whose VMM lives, by id. What dead ones left is removed.
///
/// # Errors
/// [`RunDirError`] where the run directory cannot be read.
pub fn list() -> Result<Vec<Found>, RunDirError> {
    rundir::list(&rundir::base()?)
}

/// What a machine says of itself.
///
/// # Errors
/// [`CallError`].
pub fn status(vm: &str) -> Result<Status, CallError> {
    let (value, _) = connect(vm)?.call(method::STATUS, Value::Null)?;
    connection::parse(method::STATUS, value)
}

/// The owner's pause.
///
/// # Errors
/// [`CallError`]; it is refused where the machine is stopped for a patch, or a vCPU is late.
pub fn pause(vm: &str) -> Result<(), CallError> {
    ask(vm, method::PAUSE)
}

/// The end of the owner's pause.
///
/// # Errors
/// [`CallError`]; it is refused where the owner has not paused it.
pub fn resume(vm: &str) -> Result<(), CallError> {
    ask(vm, method::RESUME)
}

/// Ends a machine as pulling its plug does.
///
/// # Errors
/// [`CallError`].
pub fn terminate(vm: &str) -> Result<(), CallError> {
    ask(vm, method::STOP)
}

fn ask(vm: &str, method: &'static str) -> Result<(), CallError> {
    connect(vm)?.call(method, Value::Null).map(drop)
}

/// A connection to the machine of this id or path.
///
/// # Errors
/// [`CallError`].
pub fn connect(vm: &str) -> Result<Connection, CallError> {
    Connection::open(&socket(vm)?, ANSWER_LIMIT)
}

/// The directory of the machine that `vm` names: an id, a machine's directory, or its socket.
///
/// # Errors
/// [`RunDirError`] where the name can be none of these.
pub fn folder(vm: &str) -> Result<PathBuf, RunDirError> {
    if !vm.contains('/') {
        if !crate::config::is_id(vm) {
            return Err(RunDirError::Id(vm.into()));
        }
        return Ok(rundir::base()?.join(vm));
    }
    let path = Path::new(vm);
    Ok(match path.is_dir() {
        true => path.to_owned(),
        false => path.parent().unwrap_or(Path::new(".")).to_owned(),
    })
}

/// The control socket that `vm` names.
fn socket(vm: &str) -> Result<PathBuf, RunDirError> {
    let path = Path::new(vm);
    if vm.contains('/') && !path.is_dir() {
        return Ok(path.to_owned());
    }
    Ok(rundir::socket_of(&folder(vm)?))
}
