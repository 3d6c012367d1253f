//! Kernel images: which format a file has, whether it can be booted, and its loading. Owns the checks
//! that give an error worth reading before linux-loader copies anything.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{self, BzImage, Elf, KernelLoader};
use vm_memory::{ByteValued, GuestAddress};
use vmpatch_introspect::address::{Gpa, GpaRange};

use super::map;
use crate::memory::GuestMemory;

/// Offset of `struct setup_header` in a bzImage (Linux v6.12 Documentation/arch/x86/boot.rst).
const SETUP_HEADER: u64 = 0x1f1;
/// `HdrS`.
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// The boot protocol that brought `xloadflags`, with the 64-bit entry (Linux v3.8).
const PROTOCOL_2_12: u16 = 0x020c;
/// `XLF_KERNEL_64`: there is a 64-bit entry, 512 bytes into the protected-mode code.
const HAS_64_BIT_ENTRY: u16 = 1;
const ENTRY_64: u64 = 0x200;

/// A kernel in guest memory.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// Which format it had.
    pub format: Format,
    /// Where the first vCPU starts, in 64-bit mode.
    pub entry: Gpa,
    /// The memory it uses until it manages memory itself: nothing else may lie there.
    pub range: GpaRange,
    /// The image's own header; of a vmlinux, one with what the protocol needs filled in.
    pub header: setup_header,
}

/// Formats that can be booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A compressed kernel that relocates itself (KASLR).
    BzImage,
    /// An uncompressed ELF kernel that runs where it is linked to run.
    Vmlinux,
}

/// Why an image cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be opened or read.
    #[error("kernel {}: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// Neither of the formats.
    #[error(
        "kernel {}: neither a bzImage ('HdrS' at byte 0x202) nor a vmlinux (ELF): {found}",
        path.display()
    )]
    Format {
        /// Which file.
        path: PathBuf,
        /// What it looks like.
        found: String,
    },
    /// The right format, but not bootable here.
    #[error("kernel {}: {expected} is needed, found {found}", path.display())]
    Unsupported {
        /// Which file.
        path: PathBuf,
        /// What it would have to be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// Shorter than it says.
    #[error("kernel {}: cut short: {found} bytes of {expected}", path.display())]
    Truncated {
        /// Which file.
        path: PathBuf,
        /// Bytes by its header.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },
    /// The machine has too little memory below 3 GiB.
    #[error(
        "kernel {}: needs memory up to {} MiB to start, the machine has {} MiB there; give it more memory",
        path.display(), needed.0.div_ceil(1 << 20), found.0 >> 20
    )]
    TooLittleMemory {
        /// Which file.
        path: PathBuf,
        /// End of what it needs.
        needed: Gpa,
        /// End of what there is.
        found: Gpa,
    },
    /// linux-loader refused it.
    #[error("kernel {}: {source}", path.display())]
    Loader {
        /// Which file.
        path: PathBuf,
        /// What it said.
        source: loader::Error,
    },
}

/// Loads the kernel at `path`.
///
/// # Errors
/// [`ImageError`]: what was expected and what was found.
pub fn load(memory: &GuestMemory, path: &Path) -> Result<Loaded, ImageError> {
    let mut image = Image::open(path)?;
    match image.start {
        [0x7f, b'E', b'L', b'F', ..] => image.load_vmlinux(memory),
        _ => match image.header()? {
            Some(header) => image.load_bzimage(memory, header),
            None => Err(image.unknown()),
        },
    }
}

struct Image {
    path: PathBuf,
    file: File,
    size: u64,
    /// Its first bytes: zeros where it is shorter.
    start: [u8; 20],
}

impl Image {
    fn open(path: &Path) -> Result<Self, ImageError> {
        let read = |source| ImageError::Read {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(read)?;
        let metadata = file.metadata().map_err(read)?;
        if !metadata.is_file() {
            return Err(read(io::Error::other("not a regular file")));
        }
        let mut start = [0; 20];
        let len = file.read_at(&mut start, 0).map_err(read)?;
        start.iter_mut().skip(len).for_each(|byte| *byte = 0);
        Ok(Self {
            path: path.to_owned(),
            file,
            size: metadata.len(),
            start,
        })
    }

    /// The setup header, if this is a bzImage.
    fn header(&self) -> Result<Option<setup_header>, ImageError> {
        let mut header = setup_header::default();
        match self.file.read_exact_at(header.as_mut_slice(), SETUP_HEADER) {
            Ok(()) => Ok((header.header == HEADER_MAGIC).then_some(header)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(source) => Err(ImageError::Read {
                path: self.path.clone(),
                source,
            }),
        }
    }

    fn load_bzimage(
        &mut self,
        memory: &GuestMemory,
        header: setup_header,
    ) -> Result<Loaded, ImageError> {
        self.check_protocol(&header)?;
        self.check_length(&header)?;
        let start = Gpa(header.pref_address);
        let range = self.fits(memory, start, u64::from(header.init_size).max(self.size))?;
        let at = GuestAddress(start.0);
        let loaded = BzImage::load(memory.mapping(), Some(at), &mut self.file, None)
            .map_err(|source| self.loader(source))?;
        let header = loaded.setup_header.unwrap_or(header);
        let entry = Gpa(start.0.saturating_add(ENTRY_64));
        Ok(Loaded {
            format: Format::BzImage,
            entry,
            range,
            header,
        })
    }

    fn check_protocol(&self, header: &setup_header) -> Result<(), ImageError> {
        let (version, xloadflags) = (header.version, header.xloadflags);
        if version < PROTOCOL_2_12 {
            let found = format!("{}.{:02}", version >> 8, version & 0xff);
            return Err(self.unsupported("boot protocol 2.12 or newer (Linux 3.8)", found));
        }
        if xloadflags & HAS_64_BIT_ENTRY == 0 {
            return Err(self.unsupported("a 64-bit kernel", "a 32-bit one".into()));
        }
        if header.relocatable_kernel == 0 {
            return Err(self.unsupported("CONFIG_RELOCATABLE", "a kernel without it".into()));
        }
        Ok(())
    }

    /// Protected-mode code is `syssize` units of 16 bytes after the setup sectors (0 means 4).
    fn check_length(&self, header: &setup_header) -> Result<(), ImageError> {
        let sectors = if header.setup_sects == 0 {
            4
        } else {
            u64::from(header.setup_sects)
        };
        let expected = (sectors + 1) * 512 + u64::from(header.syssize) * 16;
        // The last unit may be cut to the byte.
        if self.size + 16 > expected {
            return Ok(());
        }
        Err(ImageError::Truncated {
            path: self.path.clone(),
            expected,
            found: self.size,
        })
    }

    fn load_vmlinux(&mut self, memory: &GuestMemory) -> Result<Loaded, ImageError> {
        self.check_elf()?;
        let low = map::low_ram(memory.layout());
        let start = GuestAddress(low.start.0);
        let loaded = Elf::load(memory.mapping(), None, &mut self.file, Some(start))
            .map_err(|source| self.loader(source))?;
        let size = loaded.kernel_end.saturating_sub(low.start.0);
        let range = self.fits(memory, low.start, size)?;
        let entry = Gpa(loaded.kernel_load.0);
        if !range.contains(entry) {
            let found = format!("an entry at {entry}, outside what it loads");
            return Err(self.unsupported("an entry at a physical address", found));
        }
        Ok(Loaded {
            format: Format::Vmlinux,
            entry,
            range,
            header: vmlinux_header(),
        })
    }

    /// Class, byte order, type and machine, by their places in `Elf64_Ehdr`.
    fn check_elf(&self) -> Result<(), ImageError> {
        let [_, _, _, _, class, order, ..] = self.start;
        let [.., kind, kind_high, machine, machine_high] = self.start;
        let kind = u16::from_le_bytes([kind, kind_high]);
        let machine = u16::from_le_bytes([machine, machine_high]);
        if (class, order, machine) != (2, 1, 62) {
            let found = format!("ELF class {class}, byte order {order}, machine {machine}");
            return Err(self.unsupported("ELF class 2, byte order 1, machine 62 (x86-64)", found));
        }
        if kind != 2 {
            let found = format!("ELF type {kind} (a module or object file is 1)");
            return Err(self.unsupported("an executable, ELF type 2", found));
        }
        Ok(())
    }

    /// The range from `start`, where it is RAM.
    fn fits(&self, memory: &GuestMemory, start: Gpa, size: u64) -> Result<GpaRange, ImageError> {
        let low = map::low_ram(memory.layout());
        let end = start.checked_add(size).unwrap_or(Gpa(u64::MAX));
        if start < low.start || end > low.end {
            let path = self.path.clone();
            return Err(ImageError::TooLittleMemory {
                path,
                needed: end,
                found: low.end,
            });
        }
        Ok(GpaRange { start, end })
    }

    fn unknown(&self) -> ImageError {
        let found = match self.start {
            [0x1f, 0x8b, ..] => "it is gzip data: unpack it first".into(),
            [0xfd, b'7', b'z', b'X', b'Z', ..] => "it is xz data: unpack it first".into(),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => "it is zstd data: unpack it first".into(),
            [b'!', b'<', b'a', b'r', ..] => "it is a package: extract boot/vmlinuz from it".into(),
            _ if self.size == 0 => "it is empty".into(),
            [a, b, c, d, ..] => format!("it begins with {a:02x} {b:02x} {c:02x} {d:02x}"),
        };
        ImageError::Format {
            path: self.path.clone(),
            found,
        }
    }

    fn unsupported(&self, expected: &'static str, found: String) -> ImageError {
        ImageError::Unsupported {
            path: self.path.clone(),
            expected,
            found,
        }
    }

    fn loader(&self, source: loader::Error) -> ImageError {
        ImageError::Loader {
            path: self.path.clone(),
            source,
        }
    }
}

/// What the boot protocol wants to see of a kernel that comes without a header.
fn vmlinux_header() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: HEADER_MAGIC,
        version: PROTOCOL_2_12,
        kernel_alignment: 0x20_0000,
        initrd_addr_max: 0x7fff_ffff,
        cmdline_size: 2047,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing;
    use crate::memory::Layout;
    use std::fs;
    use vmpatch_introspect::target::PhysicalMemory;

    fn memory(mib: u64) -> GuestMemory {
        GuestMemory::new(Layout::new(mib << 20, 40).unwrap()).unwrap()
    }

    fn load_bytes(bytes: &[u8], mib: u64) -> Result<(Loaded, GuestMemory), String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), bytes).unwrap();
        let memory = memory(mib);
        let loaded = load(&memory, file.path()).map_err(|error| error.to_string())?;
        Ok((loaded, memory))
    }

    /// The smallest bzImage that passes: 1 setup sector after the boot sector, 1024 bytes of code.
    fn bzimage(change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
        let mut header = setup_header {
            setup_sects: 1,
            syssize: 64,
            header: HEADER_MAGIC,
            version: 0x020f,
            loadflags: 1,
            relocatable_kernel: 1,
            xloadflags: 1,
            pref_address: 0x100_0000,
            init_size: 0x200_0000,
            ..Default::default()
        };
        change(&mut header);
        let mut image = vec![0; 1024];
        image[0x1f1..][..size_of::<setup_header>()].copy_from_slice(header.as_slice());
        image.extend([0xcc; 1024]);
        image
    }

    fn vmlinux(entry: u64, memory: u64) -> Vec<u8> {
        testing::vmlinux(b"code", entry, memory)
    }

    #[test]
    fn a_bzimage_is_loaded_where_it_prefers_and_entered_in_64_bit_mode() {
        let (loaded, memory) = load_bytes(&bzimage(|_| ()), 64).unwrap();
        let expected = GpaRange {
            start: Gpa(0x100_0000),
            end: Gpa(0x300_0000),
        };
        assert_eq!((loaded.entry, loaded.range), (Gpa(0x100_0200), expected));
        assert_eq!(memory.read_u64(Gpa(0x100_03f8)), Ok(0xcccc_cccc_cccc_cccc));
    }

    #[test]
    fn a_vmlinux_is_loaded_where_it_is_linked() {
        let (loaded, memory) = load_bytes(&vmlinux(0x100_0002, 0x10_0000), 64).unwrap();
        assert_eq!(
            (loaded.entry, loaded.range.end),
            (Gpa(0x100_0002), Gpa(0x110_0000))
        );
        let mut code = [0; 4];
        memory.read(Gpa(0x100_0000), &mut code).unwrap();
        assert_eq!(&code, b"code");
    }

    #[test]
    fn a_machine_too_small_for_its_kernel_is_told_how_much_it_needs() {
        let error = load_bytes(&bzimage(|_| ()), 32).unwrap_err();
        assert!(
            error.contains("up to 48 MiB") && error.contains("has 32 MiB"),
            "{error}"
        );
        let error = load_bytes(&vmlinux(0x100_0000, 0x1000_0000), 32).unwrap_err();
        assert!(error.contains("up to 272 MiB"), "{error}");
    }

    #[test]
    fn images_that_cannot_boot_say_what_was_found() {
        let cases: [(Vec<u8>, &str); 9] = [
            (bzimage(|header| header.version = 0x0204), "found 2.04"),
            (bzimage(|header| header.xloadflags = 0), "a 32-bit one"),
            (
                bzimage(|header| header.relocatable_kernel = 0),
                "without it",
            ),
            (
                bzimage(|header| header.syssize = 100),
                "cut short: 2048 bytes of 2624",
            ),
            (vec![], "it is empty"),
            (b"\x1f\x8b\x08\x00".to_vec(), "gzip"),
            (b"!<arch>\n".to_vec(), "package"),
            (vec![0x90; 4096], "begins with 90 90 90 90"),
            (b"\x7fELF\x01\x01".to_vec(), "ELF class 1"),
        ];
        for (bytes, expected) in cases {
            let error = load_bytes(&bytes, 64).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn an_object_file_is_no_kernel() {
        let mut object = vmlinux(0x100_0000, 4);
        object[16] = 1;
        assert!(load_bytes(&object, 64).unwrap_err().contains("ELF type 1"));
    }

    #[test]
    fn an_entry_outside_the_image_is_refused() {
        let virtual_entry = vmlinux(0xffff_ffff_8100_0000, 4);
        assert!(
            load_bytes(&virtual_entry, 64)
                .unwrap_err()
                .contains("physical address")
        );
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = load(&memory(64), Path::new("/nowhere/vmlinuz"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("/nowhere/vmlinuz"), "{error}");
        assert!(load(&memory(64), Path::new("/dev/null")).is_err());
    }
}
