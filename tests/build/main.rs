//! `vmpatch build`: from a source and a diff, by the real source and configuration of a stock kernel, and from objects.
#![allow(clippy::unwrap_used, reason = "tests fail by it")]

mod diffs;
mod refusals;
mod support;
