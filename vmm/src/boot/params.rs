//! The zero page (`struct boot_params`) and the command line: what the boot protocol tells the kernel
//! (Linux v6.12 Documentation/arch/x86/boot.rst and zero-page.rst).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::ByteValued;
use vmpatch_introspect::address::{Gpa, GpaRange};
use vmpatch_introspect::target::MemoryError;

use super::image::Loaded;
use super::map;
use crate::memory::GuestMemory;

/// `type_of_loader`: none that has a number of its own.
const UNKNOWN_LOADER: u8 = 0xff;

/// Why the kernel cannot be told what it needs.
#[derive(Debug, thiserror::Error)]
pub enum ParamsError {
    /// The kernel would cut it.
    #[error("the command line has {found} bytes, this kernel takes {allowed}")]
    CmdlineTooLong {
        /// Its length in bytes.
        found: usize,
        /// What the kernel's header says it takes.
        allowed: u64,
    },
    /// The pages are not there: the machine has no low RAM.
    #[error("writing the boot parameters: {0}")]
    Write(#[from] MemoryError),
}

/// Writes the zero page and the command line.
///
/// # Errors
/// [`ParamsError`] where the kernel cannot take the command line.
pub fn write(
    memory: &GuestMemory,
    kernel: &Loaded,
    initrd: Option<GpaRange>,
    cmdline: &str,
    rsdp: Gpa,
) -> Result<(), ParamsError> {
    write_cmdline(memory, kernel, cmdline)?;
    let mut params = boot_params {
        hdr: kernel.header,
        ..Default::default()
    };
    params.hdr.type_of_loader = UNKNOWN_LOADER;
    params.hdr.cmd_line_ptr = low(map::CMDLINE.0);
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = low(initrd.start.0);
        params.hdr.ramdisk_size = low(initrd.size());
    }
    params.acpi_rsdp_addr = rsdp.0;
    fill_e820(&mut params, memory);
    memory.write(map::BOOT_PARAMS, params.as_slice())?;
    Ok(())
}

fn write_cmdline(memory: &GuestMemory, kernel: &Loaded, cmdline: &str) -> Result<(), ParamsError> {
    let allowed = u64::from(kernel.header.cmdline_size).min(map::CMDLINE_ROOM - 1);
    let found = cmdline.len();
    if u64::try_from(found).is_ok_and(|len| len > allowed) {
        return Err(ParamsError::CmdlineTooLong { found, allowed });
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    memory.write(map::CMDLINE, &bytes)?;
    Ok(())
}

fn fill_e820(params: &mut boot_params, memory: &GuestMemory) {
    let map = map::e820(memory.layout());
    let mut table = params.e820_table;
    for (entry, (range, kind)) in table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr: range.start.0,
            size: range.size(),
            r#type: *kind as u32,
        };
    }
    params.e820_table = table;
    params.e820_entries = u8::try_from(map.len()).unwrap_or(u8::MAX);
}

/// A field of 32 bits for what lies below the hole.
fn low(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::image::Format;
    use crate::memory::Layout;
    use linux_loader::loader::bootparam::setup_header;
    use vmpatch_introspect::target::PhysicalMemory;

    fn machine(cmdline_size: u32) -> (GuestMemory, Loaded) {
        let layout = Layout::new(4 << 30, 40).unwrap();
        let header = setup_header {
            cmdline_size,
            ..Default::default()
        };
        let range = GpaRange {
            start: Gpa(1 << 24),
            end: Gpa(1 << 25),
        };
        let entry = range.start;
        let kernel = Loaded {
            format: Format::BzImage,
            entry,
            range,
            header,
        };
        (GuestMemory::new(layout).unwrap(), kernel)
    }

    fn field<const N: usize>(memory: &GuestMemory, offset: u64) -> [u8; N] {
        let mut bytes = [0; N];
        memory
            .read(Gpa(map::BOOT_PARAMS.0 + offset), &mut bytes)
            .unwrap();
        bytes
    }

    #[test]
    fn the_kernel_finds_everything_at_the_offsets_of_the_protocol() {
        let (memory, kernel) = machine(2047);
        let initrd = GpaRange {
            start: Gpa(0x3000_0000),
            end: Gpa(0x3000_1234),
        };
        write(
            &memory,
            &kernel,
            Some(initrd),
            "console=ttyS0",
            Gpa(0xe_0000),
        )
        .unwrap();
        assert_eq!(u64::from_le_bytes(field(&memory, 0x070)), 0xe_0000);
        assert_eq!(field(&memory, 0x210), [0xff]);
        assert_eq!(u32::from_le_bytes(field(&memory, 0x218)), 0x3000_0000);
        assert_eq!(u32::from_le_bytes(field(&memory, 0x21c)), 0x1234);
        let mut cmdline = [1; 14];
        let at = u32::from_le_bytes(field(&memory, 0x228));
        memory.read(Gpa(at.into()), &mut cmdline).unwrap();
        assert_eq!(&cmdline, b"console=ttyS0\0");
    }

    #[test]
    fn the_memory_map_counts_its_entries() {
        let (memory, kernel) = machine(2047);
        write(&memory, &kernel, None, "", Gpa(0)).unwrap();
        assert_eq!(field(&memory, 0x1e8), [4]);
        // The fourth entry, 20 bytes each: RAM above 4 GiB.
        assert_eq!(u64::from_le_bytes(field(&memory, 0x2d0 + 60)), 1 << 32);
        assert_eq!(u32::from_le_bytes(field(&memory, 0x2d0 + 76)), 1);
    }

    #[test]
    fn a_command_line_that_the_kernel_would_cut_is_refused() {
        let (memory, kernel) = machine(8);
        assert!(write(&memory, &kernel, None, "12345678", Gpa(0)).is_ok());
        let error = write(&memory, &kernel, None, "123456789", Gpa(0)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the command line has 9 bytes, this kernel takes 8"
        );
    }
}
