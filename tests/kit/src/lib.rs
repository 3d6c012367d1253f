//! Drives the `vmpatch` command line and a guest's console, as a user would, for end-to-end tests, demo, soak and benches. Sees
//! the product through its command line only: it is no short cut around it.

mod console;
mod guest;
mod kernel;
mod log;
mod oracle;
mod patch;
mod ram;
mod soak;
mod tool;

pub use console::Console;
pub use guest::{Boot, Guest, Image};
pub use kernel::Kernel;
pub use log::{Baseline, troubles};
pub use oracle::Oracle;
pub use patch::{Side, extra, objects, patch_file};
pub use ram::{Ram, Snapshot};
pub use soak::{Soak, SoakReport};
pub use tool::{Answer, Tool};
