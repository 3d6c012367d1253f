//! A first file system whose init is eight bytes of code that spin in user mode and never call the kernel: all the user space there
//! can be where the processor emulates kernel mode.

use anyhow::Result;

use crate::cpio::Archive;

/// Where the program is loaded.
const BASE: u64 = 0x40_0000;
/// ELF header and one program header (System V ABI, "ELF Header" and "Program Header", 64-bit sizes).
const HEADERS: u64 = 64 + 56;
/// `1: pause; jmp 1b` (Intel SDM vol. 2, PAUSE and JMP rel8).
const CODE: [u8; 4] = [0xf3, 0x90, 0xeb, 0xfc];

/// The archive.
pub(super) fn archive() -> Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new());
    archive.directory("dev")?;
    archive.file("init", 0o755, &program())?;
    Ok(archive.finish()?)
}

fn program() -> Vec<u8> {
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // Executable, x86-64, version 1.
    elf.extend(2_u16.to_le_bytes());
    elf.extend(62_u16.to_le_bytes());
    elf.extend(1_u32.to_le_bytes());
    // Entry, program headers, no section headers, no flags.
    for word in [BASE + HEADERS, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    // PT_LOAD, readable and executable: the whole file.
    elf.extend(1_u32.to_le_bytes());
    elf.extend(5_u32.to_le_bytes());
    let size = HEADERS + CODE.len() as u64;
    for word in [0, BASE, BASE, size, size, 0x1000] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(CODE);
    elf
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_program_starts_and_spins() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("init");
        std::fs::write(&path, program()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut child = Command::new(&path).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        assert!(child.try_wait().unwrap().is_none(), "it ended");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
