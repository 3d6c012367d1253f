//! From a kernel's source, its configuration and the diff of a fix to the objects before and after: what the
//! kernel's own build system makes of the files that the diff changes. Owns the work tree; what the objects say is
//! the patcher's business.
//!
//! ```text
//! source, config ─ Tree (made ready once, kept) ──┐
//! fix.patch ────── Diff ──────────────────────────┴─ affected ─ compile ─ patch ─ compile ─ restore ─ Built
//! ```
//!
//! The source itself is never written to: a tree of links stands before it ([`shadow`]).

mod affected;
mod apply;
pub mod apt;
pub mod cache;
mod code;
pub mod command;
mod compiler;
pub mod config;
mod configured;
pub mod debian;
pub mod diff;
mod error;
pub mod fix;
mod fresh;
pub mod headers;
mod hunk;
mod includes;
mod lines;
mod lock;
mod made;
mod orc;
pub mod publish;
pub mod running;
pub mod shadow;
pub mod tree;
mod wide;

pub use apply::Moved;
pub use debian::{Debian, DebianError};
pub use diff::Diff;
pub use error::BuildError;
pub use fix::{Built, Pair};
pub use orc::Orc;
pub use running::Running;
pub use tree::{Compiled, Tree};
