//! A stopped or live guest kernel as data: address kinds, page walks, kernel identity, symbols, types,
//! modules, tasks, stacks and log, read from guest memory and registers alone.
//!
//! Knows nothing of KVM or QEMU: it is written against [`target`], the two traits that every machine
//! offers. All that is read from a guest is hostile: every loop is bounded, arithmetic is checked, and
//! nothing here panics on what a guest holds.
#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

pub mod address;
pub mod call;
pub mod deadline;
pub mod dump;
pub mod features;
mod find;
#[cfg(any(test, fuzzing))]
mod flat;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
pub mod identity;
mod image;
pub mod kernel;
mod layout;
pub mod log;
pub mod modules;
pub mod paging;
mod patching;
mod places;
pub mod roots;
pub mod stacks;
pub mod symbols;
pub mod target;
pub mod tasks;
pub mod types;
pub mod unwind;
pub mod vcpu;

pub use address::{Gpa, GpaRange, Gva, GvaRange};
pub use call::{Call, CallError, Called};
pub use deadline::Deadline;
pub use dump::Dump;
pub use find::ForeignVcpu;
pub use kernel::{AttachError, Kernel};
pub use paging::{AddressSpace, KernelMemory, ReadError};
pub use roots::Roots;
pub use target::{PhysicalMemory, StoppedTarget, Target};
pub use vcpu::{Activity, Vcpu};
