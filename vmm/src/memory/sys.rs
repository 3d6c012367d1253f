//! The two places where guest memory meets the host kernel: making a memfd, and giving a mapping to KVM.
//! The only `unsafe` of guest memory; the copies themselves are vm-memory's.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

use super::Slot;

/// Seals that keep a peer who gets the descriptor from shrinking the file under us (SIGBUS).
const SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

/// A file of `size` zero bytes in memory, of fixed size for ever.
pub(super) fn memfd(name: &CStr, size: u64) -> io::Result<File> {
    // SAFETY: the name is a NUL-terminated string that outlives the call.
    let fd =
        unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and owned by nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size)?;
    // SAFETY: takes two integers; the descriptor is open.
    let sealed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, SEALS) };
    if sealed < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(file)
    }
}

/// Gives the slot's mapping to KVM as guest memory.
pub(super) fn register(vm: &VmFd, slot: &Slot) -> Result<(), kvm_ioctls::Error> {
    let region = kvm_userspace_memory_region {
        slot: slot.number,
        flags: 0,
        guest_phys_addr: slot.range.start.0,
        memory_size: slot.range.size(),
        userspace_addr: slot.host_address,
    };
    // SAFETY: the mapping covers the whole size, and `GuestMemory::register` makes whoever owns the VM
    // keep the memory, and with it the mapping, for as long as the VM lives.
    unsafe { vm.set_user_memory_region(region) }
}
