//! The control socket of a machine: where it is found, what it speaks, and the server in the VMM. Owns the
//! protocol; does not own the machine ([`crate::vm`]) nor the hot path of a stop ([`crate::hot`]).

pub mod message;
mod methods;
pub mod rundir;
mod server;
pub(crate) mod wire;

pub use rundir::{RunDir, RunDirError};
pub use server::{ControlServer, ServerError};
