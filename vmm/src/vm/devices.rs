//! What a vCPU's run loop needs of the devices: the two address spaces, and whether an access ends
//! the machine. Owns no device.

use vmpatch_introspect::address::Gpa;

/// The devices behind the I/O ports and the memory that is no RAM. Called from every vCPU thread at
/// once. One call is one access of 1, 2, 4 or 8 bytes; string instructions come as several calls.
pub trait Devices: Send + Sync {
    /// Reads from `port`. Where no device answers, `into` is to be filled with ones.
    fn port_read(&self, port: u16, into: &mut [u8]);

    /// Writes to `port`.
    fn port_write(&self, port: u16, from: &[u8]) -> After;

    /// Reads from a guest-physical address that no memory slot covers.
    fn memory_read(&self, at: Gpa, into: &mut [u8]);

    /// Writes to a guest-physical address that no memory slot covers.
    fn memory_write(&self, at: Gpa, from: &[u8]) -> After;
}

/// What an access means for the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// The guest runs on.
    GoOn,
    /// The guest has switched itself off.
    PowerOff,
    /// The guest has asked to be reset.
    Reset,
}
