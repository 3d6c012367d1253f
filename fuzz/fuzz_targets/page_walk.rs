//! Page tables made by a guest: every address walked by the tables alone and through the remembered
//! translations of `KernelMemory` must come out the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmpatch_fuzz::Bytes;
use vmpatch_introspect::target::{MemoryError, PhysicalMemory};
use vmpatch_introspect::{AddressSpace, Gpa, GpaRange, Gva, KernelMemory};

const RAM: u64 = 0x10000;

/// 64 KiB of RAM, repeated for the first GiB, so that most tables lead somewhere.
struct Repeated(Vec<u8>);

impl PhysicalMemory for Repeated {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        if at.0 >= 1 << 30 || into.len() as u64 > (1 << 30) - at.0 {
            return Err(MemoryError::NotBacked {
                at,
                len: into.len(),
            });
        }
        for (at, byte) in (at.0..).zip(into) {
            *byte = self.0.get((at % RAM) as usize).copied().unwrap_or(0);
        }
        Ok(())
    }

    fn ram(&self) -> Vec<GpaRange> {
        GpaRange::sized(Gpa(0), 1 << 30).into_iter().collect()
    }
}

/// The bytes from `at` on, each translated by itself.
fn plainly(memory: &Repeated, space: AddressSpace, at: Gva, into: &mut [u8]) -> Option<()> {
    for (at, byte) in (at.0..=u64::MAX).zip(into) {
        let found = space.translate(memory, Gva(at)).ok()??;
        memory.read(found.at, std::slice::from_mut(byte)).ok()?;
    }
    Some(())
}

fuzz_target!(|input: &[u8]| {
    let mut bytes = Bytes(input);
    let [five_level, addresses] = bytes.take();
    let space = AddressSpace {
        root: Gpa(bytes.word() & 0xf000),
        five_level: five_level & 1 != 0,
    };
    let wanted: Vec<u64> = (0..addresses & 7).map(|_| bytes.word()).collect();
    let memory = Repeated(bytes.0.to_vec());
    let kernel = KernelMemory::new(&memory, space);
    for &at in wanted.iter().chain(&wanted) {
        let at = Gva(at);
        if let Ok(Some(found)) = space.translate(&memory, at) {
            assert!(found.page_size.is_power_of_two() && found.left_in_page <= found.page_size);
            assert_eq!(found.at.0 & 0xfff, at.page_offset());
        }
        if let Ok(hole) = space.hole(&memory, at) {
            assert!(hole > 0);
        }
        let (mut one, mut other) = ([0; 24], [0; 24]);
        let plain = plainly(&memory, space, at, &mut one);
        let read = kernel.read(at, &mut other).ok();
        assert_eq!(plain, read, "{at}");
        assert!(plain.is_none() || one == other, "{at}");
    }
});
