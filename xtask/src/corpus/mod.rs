//! The corpus: real fixes of Linux as entries of `tests/corpus/`, what is expected of each, and what came of it. Knows how an
//! entry is built and what a guest needs for it; does not run one.
//!
//! ```text
//! entry ── build ──► patch or refusal ── expected refusal? ─► table
//!                          │ patch
//!                     guest: check ─ probe ─ apply ─ probe ─ rollback ─ probe
//! ```

pub(crate) mod build;
pub(crate) mod entry;
pub(crate) mod modules;
pub(crate) mod plan;
pub(crate) mod ramdisk;
pub(crate) mod verdict;

pub(crate) use entry::{Entry, Expected, Probe};
