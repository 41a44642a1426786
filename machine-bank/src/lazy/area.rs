//! Memory of this process whose pages come when they are used: anonymous, in a memfd, or a private view of a shared cache.
//!
//! `Area::anonymous(512 << 20)` takes no memory yet; served by a [`FaultServer`](super::FaultServer), its first byte is the machine's first.

use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;

use farbus_transport::{Memory, MemoryError};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use super::uffd::{Uffd, UffdError, Watch};
use crate::deposit::Source;
use crate::page::PAGE;

/// A mapping, and what is behind it.
#[derive(Debug)]
pub struct Area {
    memory: Arc<Memory>,
    base: u64,
    len: u64,
    /// Whether the mapping is ours to end.
    own: bool,
}

impl Area {
    /// Private memory of at least `len` bytes, in whole pages.
    ///
    /// # Errors
    /// The host's fault.
    pub fn anonymous(len: u64) -> Result<Self, MemoryError> {
        let len = whole(len)?;
        // SAFETY: a new mapping at an address that the kernel chooses aliases nothing of ours.
        let base = unsafe { mmap_anonymous(std::ptr::null_mut(), len, protection(), MapFlags::PRIVATE | MapFlags::NORESERVE) };
        Self::of(base.map_err(|errno| host(errno.into()))?, len)
    }

    /// Memory in a memfd that others can map.
    ///
    /// # Errors
    /// The host's fault.
    pub fn shared(len: u64) -> Result<Self, MemoryError> {
        let len = whole(len)? as u64;
        let memory = Memory::memfd("farbus-machine", len)?;
        let base = memory.at(0, len)?.as_ptr() as u64;
        Ok(Self { memory, base, len, own: false })
    }

    /// A private view of what is behind `memory`: it is seen until it is written, and what is written here nobody else sees.
    ///
    /// # Errors
    /// There is no file behind it, or the host's fault.
    pub fn view(memory: &Memory) -> Result<Self, MemoryError> {
        let (file, offset) = memory.file().ok_or_else(|| host(std::io::ErrorKind::Unsupported.into()))?;
        let len = whole(memory.len())?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses aliases nothing of ours.
        let base = unsafe { mmap(std::ptr::null_mut(), len, protection(), flags, file.as_fd(), offset) };
        Self::of(base.map_err(|errno| host(errno.into()))?, len)
    }

    fn of(base: *mut core::ffi::c_void, len: usize) -> Result<Self, MemoryError> {
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(|| host(std::io::ErrorKind::OutOfMemory.into()))?;
        // SAFETY: the mapping was just made for reads and writes of `len` bytes, and `Drop` ends it after the last clone, which only this has.
        let memory = unsafe { Memory::borrowed(base, len, None) };
        Ok(Self { memory, base: base.as_ptr() as u64, len: len as u64, own: true })
    }

    /// Its bytes, by copies.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The memory itself, for a device to have windows of it; only of [`Area::shared`], whose mapping lasts as long as anybody has it.
    pub fn share(&self) -> Option<Arc<Memory>> {
        (!self.own).then(|| Arc::clone(&self.memory))
    }

    /// Where it is in this process.
    pub fn address(&self) -> u64 {
        self.base
    }

    /// Bytes, a multiple of the page.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Throws pages away, as a balloon does: they are zero when they are used again.
    ///
    /// # Errors
    /// The range is none of it, or the host's fault.
    pub fn give_back(&self, offset: u64, len: u64) -> Result<(), MemoryError> {
        let at = self.memory.at(offset, len)?;
        // SAFETY: the range was just found to be of this mapping, of which nobody has a reference.
        unsafe { madvise(at.as_ptr().cast(), len as usize, Advice::LinuxDontNeed) }.map_err(|errno| host(errno.into()))
    }

    /// Has its faults told to `uffd`.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn watch(&self, uffd: &Uffd, watch: Watch) -> Result<(), UffdError> {
        // SAFETY: the range is this mapping, of which `Memory` makes no references (transport/src/memory.rs).
        unsafe { uffd.register(self.base, self.len, watch) }
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        if self.own {
            // SAFETY: the mapping was made by `of`'s callers, and its only other user is `memory`, which goes now and unmaps nothing.
            if let Err(errno) = unsafe { munmap(self.base as *mut _, self.len as usize) } {
                tracing::warn!(%errno, "a mapping stays");
            }
        }
    }
}

fn protection() -> ProtFlags {
    ProtFlags::READ | ProtFlags::WRITE
}

fn whole(len: u64) -> Result<usize, MemoryError> {
    let pages = usize::try_from(len).ok().and_then(|len| len.max(1).checked_next_multiple_of(PAGE));
    pages.ok_or_else(|| host(std::io::ErrorKind::OutOfMemory.into()))
}

fn host(source: std::io::Error) -> MemoryError {
    MemoryError::Host { what: "map a machine's memory", source }
}

impl Source for Area {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.memory.read(offset, buf).map_err(std::io::Error::other)
    }
}
