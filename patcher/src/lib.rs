//! From two objects to a patch file, and from a patch file to a patched guest and back.
//!
//! The modules stand in the order a patch goes through them: [`build`] compares two objects and writes a
//! [`patch`] file; [`link`] places it for one live guest; [`verify`] proves that the old function is what
//! runs; [`journal`] makes the intent durable; [`apply`] stops, gates, writes and resumes, and [`rollback`]
//! is the same with the edits reversed.

pub mod apply;
pub mod arena;
pub mod build;
pub mod journal;
pub mod link;
pub mod object;
pub mod patch;
pub mod quiescence;
pub mod rollback;
pub mod status;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod unwind;
pub mod verify;
