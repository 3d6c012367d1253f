//! Kernel images for tests: as small as can be, made byte by byte.

/// An ELF executable whose one segment is `code` at 16 MiB, where it wants `memory` bytes.
pub(crate) fn vmlinux(code: &[u8], entry: u64, memory: u64) -> Vec<u8> {
    const START: u64 = 0x100_0000;
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    elf.extend([entry, 64, 0].map(u64::to_le_bytes).concat());
    elf.extend([0, 0, 64, 56, 1, 0, 0, 0].map(u16::to_le_bytes).concat());
    elf.extend([1, 5].map(u32::to_le_bytes).concat());
    let size = code.len() as u64;
    elf.extend(
        [120, START, START, size, memory.max(size), 0]
            .map(u64::to_le_bytes)
            .concat(),
    );
    elf.extend(code);
    elf
}
