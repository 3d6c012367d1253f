//! The devices a stock kernel needs to boot, speak and switch off. Each file is one device; where each
//! is attached is [`crate::machine`]'s, what the guest is told of it is [`crate::boot::acpi`]'s.
//!
//! No PM timer, no RTC and no keyboard: a stock kernel takes its clock from kvmclock, and the FADT says
//! that the rest is absent. PIT, PIC, IOAPIC and local APICs are KVM's own.

pub mod console;
mod input;
mod output;
pub mod power;
pub mod serial;
mod tty;

pub use console::{Console, ConsoleError};
pub use input::Quit;
pub use power::{I8042, PowerManagement, ResetControl};
pub use serial::Com1;
