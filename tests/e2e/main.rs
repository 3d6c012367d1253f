//! End-to-end tests: the command line against real guests. `cargo xtask test` builds what they need and runs them where stock
//! kernels can run; alone they are ignored.

#![allow(clippy::unwrap_used, clippy::panic, reason = "only tests are here")]

mod apply;
mod boot;
mod build;
mod busy;
mod callbacks;
mod classics;
mod held;
mod hooks;
mod interrupted;
mod layers;
mod lifecycle;
mod oracle;
mod refusals;
mod shadow;
mod sleeper;
mod soak;
mod support;
