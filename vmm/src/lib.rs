//! Virtual machines that can be stopped: our own KVM VMM, and the client of its control socket.
//!
//! Knows nothing of patches: it offers [`vmpatch_introspect::target`]'s traits and no more.

pub mod boot;
pub mod bus;
pub mod client;
pub mod config;
pub mod control;
pub mod devices;
pub mod host;
mod hot;
pub mod machine;
pub mod memory;
pub mod vm;
