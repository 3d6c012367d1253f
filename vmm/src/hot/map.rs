//! The shared page in memory: made as a sealed memfd by the VMM, mapped by both sides. Owns the mapping.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::ptr::{self, NonNull};

use super::page::Page;

/// Neither side can shrink it under the other (SIGBUS), nor take the seals off.
const SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

/// A mapped [`Page`] and its file.
#[derive(Debug)]
pub(crate) struct Shared {
    page: NonNull<Page>,
    file: File,
}

// SAFETY: the mapping belongs to the process, not to a thread, and `Page` holds atomics alone.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// A new page, all zero.
    ///
    /// # Errors
    /// What the host kernel said.
    pub(crate) fn create() -> io::Result<Self> {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name is a NUL-terminated string that outlives the call.
        let fd = unsafe { libc::memfd_create(c"vmpatch-hot".as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and owned by nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(size_of::<Page>() as u64)?;
        // SAFETY: takes two integers; the descriptor is open.
        let sealed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, SEALS) };
        if sealed < 0 {
            return Err(io::Error::last_os_error());
        }
        Self::map(file)
    }

    /// The page in a file that the VMM handed over.
    ///
    /// # Errors
    /// Too short or not sealed against shrinking, not of this layout, or what the host kernel said.
    pub(crate) fn open(file: File) -> io::Result<Self> {
        if !is_fixed(&file) || file.metadata()?.len() < size_of::<Page>() as u64 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let shared = Self::map(file)?;
        match shared.is_known() {
            true => Ok(shared),
            false => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn map(file: File) -> io::Result<Self> {
        let (size, access) = (size_of::<Page>(), libc::PROT_READ | libc::PROT_WRITE);
        let fd = file.as_raw_fd();
        // SAFETY: maps a file of at least this size at an address of the kernel's choice.
        let at = unsafe { libc::mmap(ptr::null_mut(), size, access, libc::MAP_SHARED, fd, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let page = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { page, file })
    }

    /// Every whole word, whatever the layout says it is: for tests that lie.
    #[cfg(test)]
    pub(crate) fn all_words(&self) -> &[std::sync::atomic::AtomicU64] {
        let words = size_of::<Page>() / 8;
        // SAFETY: the page consists of atomics, is aligned to 8 bytes and is as long as these words.
        unsafe { std::slice::from_raw_parts(self.page.as_ptr().cast(), words) }
    }

    /// For the other side.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Deref for Shared {
    type Target = Page;

    fn deref(&self) -> &Page {
        // SAFETY: the mapping is page-aligned, large enough, lives as long as `self`, and any bits are a
        // valid `Page`; it consists of atomics, which other processes may change.
        unsafe { self.page.as_ref() }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: unmaps what `map` mapped; nobody can hold a reference into it any more.
        unsafe { libc::munmap(self.page.as_ptr().cast(), size_of::<Page>()) };
    }
}

/// Whether the file can never get shorter.
pub(crate) fn is_fixed(file: &File) -> bool {
    // SAFETY: takes an integer; the descriptor is open.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && seals & libc::F_SEAL_SHRINK != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_another_layout_is_refused() {
        let page = Shared::create().unwrap();
        let file = || page.file.try_clone().unwrap();
        assert!(Shared::open(file()).is_err());
        page.begin(1);
        assert!(Shared::open(file()).is_ok());
        assert!(page.file.set_len(0).is_err());
    }

    #[test]
    fn a_file_that_could_be_cut_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        assert!(Shared::open(file).is_err());
    }
}
