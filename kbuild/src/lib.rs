//! From a kernel's source, its configuration and the diff of a fix to the objects before and after: what the
//! kernel's own build system makes of the files that the diff changes. Owns the work tree; what the objects say is
//! the patcher's business.
//!
//! ```text
//! source, config ─ Tree (made ready once, kept) ──┐
//! fix.patch ────── Diff ──────────────────────────┴─ compile ─ patch ─ compile ─ restore ─ Pairs
//! ```
//!
//! The source itself is never written to: a tree of links stands before it ([`shadow`]).

pub mod cache;
pub mod command;
mod compiler;
pub mod diff;
mod error;
mod lines;
pub mod shadow;
pub mod tree;
mod wide;

pub use diff::Diff;
pub use error::BuildError;
pub use tree::{Compiled, Pair, Tree};
