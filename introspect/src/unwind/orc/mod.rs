//! ORC, the kernel's own unwind format: an ip table and a table of 6-byte entries. [`raw`] knows each
//! format as stored, [`entry`] is the one normal form, [`table`] finds the entry of an address. Following
//! entries up a stack is the business of `unwind::walk`.

pub mod entry;
pub mod raw;
pub mod table;

pub use entry::{Base, Entry, Kind};
pub use raw::Format;
pub use table::{Table, TableError};
