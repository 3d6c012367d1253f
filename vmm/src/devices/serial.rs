//! COM1: a 16550 on port 3f8 whose interrupt goes to KVM through an eventfd. Owns the adaption of
//! vm-superio to our bus; where its bytes go is [`super::console`]'s.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use vm_superio::serial::{self, SerialEvents};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::{Device, Effect};

/// Where COM1's output goes.
pub type Output = Box<dyn Write + Send>;

/// An interrupt line into the in-kernel interrupt controllers.
#[derive(Debug)]
pub struct IrqLine(EventFd);

impl Trigger for IrqLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Told when the guest has read all input, so that more can be given.
#[derive(Clone, Debug, Default)]
pub struct Drained(Arc<(Mutex<()>, Condvar)>);

impl Drained {
    /// Waits until the guest read all input, or for `limit`: a guest that never reads must not hold
    /// whoever feeds it for ever.
    pub fn wait(&self, limit: Duration) {
        let (lock, drained) = &*self.0;
        let guard = lock.lock().unwrap_or_else(PoisonError::into_inner);
        drop(drained.wait_timeout(guard, limit));
    }
}

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.0.1.notify_all();
    }
}

/// COM1 as the guest sees it.
pub struct Com1 {
    uart: Serial<IrqLine, Drained, Output>,
}

impl Com1 {
    /// First port.
    pub const PORT: u16 = 0x3f8;
    /// Ports it takes.
    pub const SIZE: u16 = 8;
    /// Its interrupt on a PC.
    pub const IRQ: u8 = 4;

    /// A UART that writes to `output`; with it, the eventfd that raises its interrupt, to be given to
    /// KVM for [`IRQ`](Self::IRQ).
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn new(output: Output) -> io::Result<(Self, EventFd)> {
        let line = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let irq = IrqLine(line.try_clone()?);
        Ok((
            Self {
                uart: Serial::with_events(irq, Drained::default(), output),
            },
            line,
        ))
    }

    /// What tells when input has been read.
    #[must_use]
    pub fn drained(&self) -> Drained {
        self.uart.events().clone()
    }

    /// Gives as much of `input` to the guest as fits; how many bytes that was. In loop-back mode (the
    /// guest tests its UART) that is none.
    pub fn feed(&mut self, input: &[u8]) -> usize {
        let room = self.uart.fifo_capacity().min(input.len());
        match self
            .uart
            .enqueue_raw_bytes(input.get(..room).unwrap_or_default())
        {
            Ok(taken) => taken,
            Err(serial::Error::FullFifo) => 0,
            // The bytes are in; only the interrupt failed, and the next one makes up for it.
            Err(_) => room,
        }
    }
}

impl Device for Com1 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (register, byte) in (offset..u64::from(Self::SIZE)).zip(data) {
            *byte = self.uart.read(u8::try_from(register).unwrap_or(u8::MAX));
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        for (register, &byte) in (offset..u64::from(Self::SIZE)).zip(data) {
            // As on a real line: what cannot be sent is lost, and the guest is not told.
            if let Err(error) = self
                .uart
                .write(u8::try_from(register).unwrap_or(u8::MAX), byte)
            {
                tracing::debug!(?error, "COM1 lost a byte");
            }
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    struct Sent(mpsc::Sender<u8>);

    impl Write for Sent {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            bytes
                .iter()
                .try_for_each(|&byte| self.0.send(byte))
                .map_err(io::Error::other)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn com1() -> (Com1, EventFd, mpsc::Receiver<u8>) {
        let (sender, receiver) = mpsc::channel();
        let (com1, line) = Com1::new(Box::new(Sent(sender))).unwrap();
        (com1, line, receiver)
    }

    #[test]
    fn what_the_guest_sends_comes_out_and_raises_its_interrupt() {
        let (mut com1, line, sent) = com1();
        assert_eq!(com1.write(1, &[0b10]), Effect::None);
        assert_eq!(com1.write(0, b"A"), Effect::None);
        assert_eq!(sent.try_recv(), Ok(b'A'));
        assert!(line.read().unwrap() >= 1);
    }

    #[test]
    fn input_reaches_the_guest_and_only_as_much_as_fits() {
        let (mut com1, line, _) = com1();
        assert_eq!(com1.write(1, &[0b01]), Effect::None);
        let taken = com1.feed(&[b'x'; 1000]);
        assert!(0 < taken && taken < 1000);
        assert_eq!(com1.feed(b"y"), 0);
        assert!(line.read().unwrap() >= 1);
        let mut byte = [0];
        for _ in 0..taken {
            com1.read(0, &mut byte);
            assert_eq!(byte, [b'x']);
        }
        com1.read(5, &mut byte);
        assert_eq!(byte[0] & 1, 0, "no more input is reported");
    }

    #[test]
    fn an_access_past_the_registers_is_harmless() {
        let (mut com1, _, sent) = com1();
        let mut data = [0xff; 8];
        com1.read(7, &mut data);
        assert_eq!(data[1..], [0xff; 7]);
        assert_eq!(com1.write(8, &[0; 8]), Effect::None);
        assert!(sent.try_recv().is_err());
    }
}
