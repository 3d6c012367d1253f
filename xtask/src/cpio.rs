//! Writes archives in the "newc" format that Linux unpacks as its first root file system
//! (Linux v6.12 Documentation/driver-api/early-userspace/buffer-format.rst). Does not read them.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result};

/// File type bits of `st_mode` (POSIX `sys/stat.h`, values as the format fixes them).
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;

/// An archive being written. Parent folders must come before what is in them.
#[derive(Debug)]
pub(crate) struct Archive<W: Write> {
    out: W,
    next_inode: u32,
}

impl<W: Write> Archive<W> {
    /// Begins an archive.
    pub(crate) fn new(out: W) -> Self {
        Self { out, next_inode: 1 }
    }

    /// Adds a folder.
    pub(crate) fn directory(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, DIRECTORY | 0o755, 2, &[])
    }

    /// Adds a file with its permission bits.
    pub(crate) fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(path, REGULAR | mode, 1, content)
    }

    /// Ends the archive and gives the writer back.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.next_inode = 0;
        self.entry("TRAILER!!!", 0, 1, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, path: &str, mode: u32, links: u32, content: &[u8]) -> io::Result<()> {
        let too_big = |_| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{path} does not fit the archive format"),
            )
        };
        let size = u32::try_from(content.len()).map_err(too_big)?;
        let name_size = u32::try_from(path.len() + 1).map_err(too_big)?;
        // inode mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let fields = [
            self.next_inode,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            0,
            0,
            name_size,
            0,
        ];
        let mut head = String::from("070701");
        for field in fields {
            head.push_str(&format!("{field:08X}"));
        }
        head.push_str(path);
        head.push('\0');
        self.padded(head.as_bytes())?;
        self.padded(content)?;
        self.next_inode += 1;
        Ok(())
    }

    /// Every piece ends on a 4-byte boundary; header and name count as one piece.
    fn padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.out
            .write_all(&[0; 3][..bytes.len().next_multiple_of(4) - bytes.len()])
    }
}

/// The archive in the file `base` and then `more`, as one: the kernel unpacks the second over the first.
pub(crate) fn behind(base: &Path, more: &[u8]) -> Result<Vec<u8>> {
    let mut all = fs::read(base).with_context(|| format!("cannot read {}", base.display()))?;
    all.resize(all.len().next_multiple_of(4), 0);
    all.extend(more);
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn busybox_unpacks_what_was_packed() {
        if !crate::run::on_path("busybox") {
            eprintln!("SKIPPED: busybox is not installed (cargo xtask setup)");
            return;
        }
        let mut archive = Archive::new(Vec::new());
        archive.directory("d").unwrap();
        archive.file("d/seven", 0o755, b"1234567").unwrap();
        let bytes = archive.finish().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new("busybox")
            .args(["cpio", "-i"])
            .current_dir(dir.path())
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        assert!(child.wait().unwrap().success());
        assert_eq!(
            std::fs::read(dir.path().join("d/seven")).unwrap(),
            b"1234567"
        );
    }
}
