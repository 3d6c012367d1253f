//! How to unwind from new code: the kernel has tables for its own text, patches bring theirs. Owns what of it is
//! believed and where it lies in the arena; following it up a stack is `introspect`'s.
//!
//! ```text
//! objtool's copy of an object ── build ──▶ Section::unwind ── link ──▶ rows in the arena ── cover ──▶ Unwinder
//! ```
//!
//! The guest's own unwinder does not see any of it.

mod cover;
pub mod rows;

use vmpatch_introspect::unwind::orc::{Base, Entry, Kind};

pub use cover::cover;
pub use rows::{Row, Rows};

/// Whether a function compiled from C can have this entry: a call from it leads back to where a return address lies,
/// or nothing is known. Frames of interrupts and ends of stacks are made by the kernel's entry code only, and
/// whoever claims one would hide what lies beyond.
#[must_use]
pub const fn is_of_function(entry: &Entry) -> bool {
    let sp_is_known = !matches!(entry.sp, Base::Undefined | Base::PreviousSp | Base::Unknown);
    let bp_is_known = matches!(entry.bp, Base::Undefined | Base::PreviousSp | Base::Bp);
    match entry.kind {
        Kind::Undefined => true,
        Kind::Call => sp_is_known && bp_is_known && !entry.signal,
        Kind::EndOfStack | Kind::Regs | Kind::RegsPartial | Kind::Unknown => false,
    }
}
