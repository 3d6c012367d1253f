//! The hot path of a stop: stop, registers, verdict, write and resume through a page that the session and
//! the VMM share, without JSON and without a system call but for the futex wake-ups.

pub(crate) mod map;
pub(crate) mod page;
mod registers;
pub(crate) mod server;
