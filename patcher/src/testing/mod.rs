//! A machine of plain bytes and a guest that says what it is told to say: the oracle for the invariants of
//! a change. Faults are scripted, every write is counted and shown to a watcher. For tests only.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

pub mod guest;
pub mod machine;
pub mod sample;

pub use guest::ScriptedGuest;
pub use machine::{Fault, Machine, WriteSeen};
