//! The request of /dev/userfaultfd that answers with a descriptor, for users who may open the device and not use the system call.
//!
//! `new_uffd::<USERFAULTFD_IOC_NEW>(&device, O_CLOEXEC | O_NONBLOCK)` is a userfaultfd that also sees faults of the kernel's.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl};

struct New<const OPCODE: Opcode>(usize);

// SAFETY: the request takes a number in the place of a pointer and answers with a descriptor of ours (ioctl_userfaultfd(2)).
unsafe impl<const OPCODE: Opcode> Ioctl for New<OPCODE> {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        OPCODE
    }

    fn as_ptr(&mut self) -> *mut core::ffi::c_void {
        core::ptr::without_provenance_mut(self.0)
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut core::ffi::c_void) -> rustix::io::Result<OwnedFd> {
        // SAFETY: rustix calls this only where the request succeeded, and then the number is a new descriptor that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(out) })
    }
}

/// A new userfaultfd.
pub(super) fn new_uffd<const OPCODE: Opcode>(device: impl AsFd, flags: usize) -> Result<OwnedFd, Errno> {
    // SAFETY: see the implementation above; a descriptor that is not the device answers ENOTTY.
    unsafe { ioctl(device, New::<OPCODE>(flags)) }
}
