//! Which device answers which port and which guest-physical address. Owns the two address spaces and
//! their dispatch, shared by all vCPU threads; owns no device's behaviour.
//!
//! As on a PC, a read that nobody claims gives all ones and a write that nobody claims is lost.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// What a device's write does to the machine as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[must_use]
pub enum Effect {
    /// Nothing: the vCPU goes on.
    #[default]
    None,
    /// The guest switched the machine off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
}

/// A device as a vCPU sees it. `offset` counts from the start of the range it was attached to; `data` is
/// one access of 1, 2, 4 or 8 bytes in the guest's byte order, and may reach past the end of the range.
pub trait Device: Send {
    /// Fills `data`, which comes as all ones: bytes left alone read as ones.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes `data`.
    fn write(&mut self, offset: u64, data: &[u8]) -> Effect;
}

/// A device that several ranges and threads can share.
pub type Shared<D> = Arc<Mutex<D>>;

/// Port and memory-mapped devices of a machine. Made once, then read by every vCPU thread.
#[derive(Default, Debug)]
pub struct Bus {
    ports: Space,
    mmio: Space,
}

/// Why a device cannot be attached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Another device claims part of the range.
    #[error("{start:#x}, {size} bytes: overlaps the device at {other:#x}")]
    Overlap {
        /// First address asked for.
        start: u64,
        /// Addresses asked for.
        size: u64,
        /// Start of the range already claimed.
        other: u64,
    },
    /// Empty, or past the end of the address space.
    #[error("{start:#x}, {size} bytes: not a range of addresses")]
    NotARange {
        /// First address asked for.
        start: u64,
        /// Addresses asked for.
        size: u64,
    },
}

impl Bus {
    /// Lets `device` answer `size` ports from `start` on.
    ///
    /// # Errors
    /// [`BusError`] where the range is taken or is none.
    pub fn attach_ports<D: Device + 'static>(
        &mut self,
        start: u16,
        size: u16,
        device: Shared<D>,
    ) -> Result<(), BusError> {
        self.ports.attach(start.into(), size.into(), device)
    }

    /// Lets `device` answer `size` bytes of guest-physical space from `start` on.
    ///
    /// # Errors
    /// [`BusError`] where the range is taken or is none.
    pub fn attach_mmio<D: Device + 'static>(
        &mut self,
        start: u64,
        size: u64,
        device: Shared<D>,
    ) -> Result<(), BusError> {
        self.mmio.attach(start, size, device)
    }

    /// One `in`: fills `data`, the width of the access.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        self.ports.read(port.into(), data);
    }

    /// One `out`, of the width of `data`. A string write is as many calls as it has elements.
    pub fn write_port(&self, port: u16, data: &[u8]) -> Effect {
        self.ports.write(port.into(), data)
    }

    /// One load from where no memory slot is.
    pub fn read_mmio(&self, at: u64, data: &mut [u8]) {
        self.mmio.read(at, data);
    }

    /// One store to where no memory slot is.
    pub fn write_mmio(&self, at: u64, data: &[u8]) -> Effect {
        self.mmio.write(at, data)
    }
}

/// One address space: ranges by their start, without overlaps.
#[derive(Default)]
struct Space {
    ranges: BTreeMap<u64, (u64, Shared<dyn Device>)>,
}

impl Space {
    fn attach(
        &mut self,
        start: u64,
        size: u64,
        device: Shared<dyn Device>,
    ) -> Result<(), BusError> {
        let last = size.checked_sub(1).and_then(|rest| start.checked_add(rest));
        let last = last.ok_or(BusError::NotARange { start, size })?;
        if let Some((&other, (len, _))) = self.ranges.range(..=last).next_back()
            && start - start.min(other) < *len
        {
            return Err(BusError::Overlap { start, size, other });
        }
        self.ranges.insert(start, (size, device));
        Ok(())
    }

    fn find(&self, at: u64) -> Option<(u64, &Shared<dyn Device>)> {
        let (start, (size, device)) = self.ranges.range(..=at).next_back()?;
        let offset = at - start;
        (offset < *size).then_some((offset, device))
    }

    fn read(&self, at: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, device)) = self.find(at) {
            device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .read(offset, data);
        }
    }

    fn write(&self, at: u64, data: &[u8]) -> Effect {
        self.find(at).map_or(Effect::None, |(offset, device)| {
            device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .write(offset, data)
        })
    }
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.ranges.iter().map(|(start, (size, _))| (start, size)))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers the offset of the last write; reads as that offset.
    #[derive(Default)]
    struct Probe(u64);

    impl Device for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            if let Some(first) = data.first_mut() {
                *first = offset as u8;
            }
        }
        fn write(&mut self, offset: u64, _: &[u8]) -> Effect {
            self.0 = offset;
            Effect::Reset
        }
    }

    fn bus() -> (Bus, Shared<Probe>) {
        let (mut bus, probe) = (Bus::default(), Shared::<Probe>::default());
        bus.attach_ports(0x3f8, 8, Arc::clone(&probe)).unwrap();
        (bus, probe)
    }

    #[test]
    fn a_device_sees_offsets_from_the_start_of_its_range() {
        let (bus, probe) = bus();
        assert_eq!(bus.write_port(0x3ff, &[1]), Effect::Reset);
        assert_eq!(probe.lock().unwrap().0, 7);
        let mut data = [0; 2];
        bus.read_port(0x3f9, &mut data);
        assert_eq!(data, [1, 0xff]);
    }

    #[test]
    fn what_nobody_claims_reads_as_ones_and_swallows_writes() {
        let (bus, _) = bus();
        for port in [0x3f7, 0x400, 0, 0xffff] {
            let mut data = [0; 4];
            bus.read_port(port, &mut data);
            assert_eq!(
                (data, bus.write_port(port, &[0])),
                ([0xff; 4], Effect::None)
            );
        }
        let mut data = [0; 8];
        bus.read_mmio(0x3f8, &mut data);
        assert_eq!(data, [0xff; 8]);
    }

    #[test]
    fn a_range_that_overlaps_is_refused_and_a_touching_one_is_not() {
        let (mut bus, probe) = bus();
        let mut attach = |start, size| bus.attach_ports(start, size, Arc::clone(&probe));
        for (start, size) in [
            (0x3f8, 1),
            (0x3ff, 1),
            (0x3f0, 9),
            (0x3f0, 0x20),
            (0x3fa, 2),
        ] {
            let overlap = BusError::Overlap {
                start: start.into(),
                size: size.into(),
                other: 0x3f8,
            };
            assert_eq!(attach(start, size), Err(overlap), "{start:#x} {size}");
        }
        assert_eq!((attach(0x400, 1), attach(0x3f0, 8)), (Ok(()), Ok(())));
        assert_eq!(
            attach(0x500, 0),
            Err(BusError::NotARange {
                start: 0x500,
                size: 0
            })
        );
    }
}
