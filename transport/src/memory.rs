//! Raw memory that two sides can touch: one owner per mapping, copies named by the aliasing they allow.
//!
//! `Memory::memfd("guest", 1 << 20)` makes 1 MiB that can be handed to another process by descriptor; `memory.write(0x1000, b"abc")`
//! stores three bytes while a peer may be reading them. Such memory is never a `&[u8]`: only copies in and out, and single words, exist.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use thiserror::Error;

use crate::hold::Hold;

/// Why memory could not be made, mapped or touched.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The range is not inside the mapping.
    #[error("range {offset:#x} + {len:#x} is outside a mapping of {mapped:#x} bytes")]
    OutOfBounds {
        /// First byte.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Bytes mapped.
        mapped: u64,
    },
    /// A word must be aligned to its size.
    #[error("offset {offset:#x} is not aligned to {align} bytes")]
    Misaligned {
        /// First byte.
        offset: u64,
        /// Needed alignment in bytes.
        align: u64,
    },
    /// The file behind a descriptor is shorter than what was said of it.
    #[error("the file has {actual:#x} bytes where {claimed:#x} were claimed")]
    FileTooShort {
        /// What the peer said.
        claimed: u64,
        /// What the file has.
        actual: u64,
    },
    /// The mapping is read-only.
    #[error("the mapping is read-only")]
    ReadOnly,
    /// The memory that this process may lock is not enough for the device to use it.
    #[error(
        "cannot lock {asked} bytes for the device: this process may lock {limit} in all; run `ulimit -l unlimited` first, or set \
         LimitMEMLOCK=infinity in its systemd unit"
    )]
    LockLimit {
        /// Bytes to be locked.
        asked: u64,
        /// Bytes that this process may lock in all (RLIMIT_MEMLOCK).
        limit: u64,
    },
    /// The host refused.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the kernel answered.
        source: std::io::Error,
    },
}

impl MemoryError {
    /// For `map_err`: what the host refused.
    pub fn from_host(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

fn host(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> MemoryError {
    move |errno| MemoryError::Host { what, source: errno.into() }
}

/// Whether a file is sealed against shrinking. Ask before its length: a seal cannot be taken off, but a file can shrink until it is sealed.
pub(crate) fn is_sealed(fd: impl AsFd) -> bool {
    rustix::fs::fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
}

enum Backing {
    /// Mapped by us and unmapped when dropped.
    Mapped,
    /// Belongs to somebody else, who keeps it mapped as long as this lives (see [`Memory::borrowed`]).
    Borrowed,
}

/// One contiguous piece of memory that others may read and write at the same time.
pub struct Memory {
    base: NonNull<u8>,
    len: usize,
    writable: bool,
    backing: Backing,
    file: Option<(OwnedFd, u64)>,
}

// SAFETY: the mapping is plain memory without thread affinity; every access goes through raw copies or atomics below.
unsafe impl Send for Memory {}
// SAFETY: as for Send; shared access never makes a reference to the bytes.
unsafe impl Sync for Memory {}

impl Memory {
    /// New zeroed memory in a memfd of `len` bytes (rounded up to pages by the kernel), sealed against shrinking and growing.
    ///
    /// # Errors
    /// [`MemoryError::Host`] where the kernel refuses.
    pub fn memfd(name: &str, len: u64) -> Result<Arc<Self>, MemoryError> {
        let name = CString::new(name).unwrap_or_default();
        let fd =
            rustix::fs::memfd_create(&name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(host("create a memfd"))?;
        rustix::fs::ftruncate(&fd, len).map_err(host("size a memfd"))?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(host("seal a memfd"))?;
        Self::map_file(fd, 0, len, true)
    }

    /// Maps `len` bytes of `fd` from `offset` (a multiple of the page size), shared.
    ///
    /// # Errors
    /// [`MemoryError::FileTooShort`] where the file ends before the range does, [`MemoryError::Host`] where the kernel refuses.
    pub fn map_file(fd: OwnedFd, offset: u64, len: u64, writable: bool) -> Result<Arc<Self>, MemoryError> {
        let stat = rustix::fs::fstat(&fd).map_err(host("stat a descriptor"))?;
        let actual = u64::try_from(stat.st_size).unwrap_or(0);
        let claimed = offset.saturating_add(len);
        if claimed > actual {
            return Err(MemoryError::FileTooShort { claimed, actual });
        }
        let size = usize::try_from(len).unwrap_or(usize::MAX);
        let prot = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: a new mapping at an address that the kernel chooses aliases nothing of ours.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), size, prot, MapFlags::SHARED, &fd, offset) }
            .map_err(host("map memory"))?;
        let base = NonNull::new(base.cast())
            .ok_or(MemoryError::Host { what: "map memory", source: std::io::ErrorKind::OutOfMemory.into() })?;
        Ok(Arc::new(Self { base, len: size, writable, backing: Backing::Mapped, file: Some((fd, offset)) }))
    }

    /// Memory that someone else mapped (a VMM's guest memory, say), optionally with the descriptor and offset behind it.
    ///
    /// # Safety
    /// `base` must be valid for reads and writes of `len` bytes until the last clone of the result is dropped, and must be
    /// accessed by others only in ways that tolerate concurrent writes (as guest memory is).
    pub unsafe fn borrowed(base: NonNull<u8>, len: usize, file: Option<(OwnedFd, u64)>) -> Arc<Self> {
        Arc::new(Self { base, len, writable: true, backing: Backing::Borrowed, file })
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the mapping may be written.
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// The descriptor behind the memory and the offset in it of the first byte, where there is one.
    pub fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.file.as_ref().map(|(fd, offset)| (fd.as_fd(), *offset))
    }

    /// Whether the file behind the memory is sealed against shrinking, so that nobody can make an access fault.
    pub fn sealed(&self) -> bool {
        self.file.as_ref().is_some_and(|(fd, _)| is_sealed(fd))
    }

    /// Copies `into.len()` bytes from `offset` out. Bytes that somebody writes meanwhile may arrive mixed.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`].
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        let from = self.at(offset, into.len() as u64)?;
        // SAFETY: `at` checked that the range is mapped; `into` is ours alone, so the two do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies `from` to `offset`. Readers may see a part of it.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`], [`MemoryError::ReadOnly`].
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), MemoryError> {
        if self.try_write(offset, from) { Ok(()) } else { self.at_for_writing(offset, from.len() as u64).map(|_| ()) }
    }

    #[inline]
    fn try_write(&self, offset: u64, from: &[u8]) -> bool {
        let (Some(to), true) = (self.find(offset, from.len() as u64), self.writable) else { return false };
        // SAFETY: the range was just checked to be mapped writable; `from` is ours, so the two do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), from.len()) };
        true
    }

    /// Copies `len` bytes from `source` at `source_offset` to `offset` here: the one copy of a DMA. The two may overlap.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`], [`MemoryError::ReadOnly`].
    #[inline]
    pub fn copy_from(&self, offset: u64, source: &Self, source_offset: u64, len: u64) -> Result<(), MemoryError> {
        if self.try_copy_from(offset, source, source_offset, len) {
            return Ok(());
        }
        source.at(source_offset, len)?;
        self.at_for_writing(offset, len)?;
        Ok(())
    }

    /// As [`Memory::copy_from`]; false, without a reason, where it refuses. For the data path: an error with a destructor costs it registers.
    #[inline]
    pub(crate) fn try_copy_from(&self, offset: u64, source: &Self, source_offset: u64, len: u64) -> bool {
        let (Some(from), Some(to), true) = (source.find(source_offset, len), self.find(offset, len), self.writable) else {
            return false;
        };
        // SAFETY: both ranges were checked to be mapped, the target writable; `copy` allows them to overlap (two mappings of one file may).
        unsafe { std::ptr::copy(from.as_ptr(), to.as_ptr(), len as usize) };
        true
    }

    /// A 32-bit word that several threads or processes use at once; `offset` must be a multiple of 4.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`], [`MemoryError::Misaligned`], [`MemoryError::ReadOnly`].
    #[inline]
    pub fn atomic_u32(&self, offset: u64) -> Result<&AtomicU32, MemoryError> {
        let word = self.at_for_writing(offset, 4)?;
        if !word.cast::<u32>().is_aligned() {
            return Err(MemoryError::Misaligned { offset, align: 4 });
        }
        // SAFETY: mapped, writable and aligned as just checked; lives as long as `self`; all concurrent use is by atomics or copies.
        Ok(unsafe { AtomicU32::from_ptr(word.as_ptr().cast()) })
    }

    /// A 64-bit word that several threads or processes use at once; `offset` must be a multiple of 8.
    ///
    /// # Errors
    /// As [`Memory::atomic_u32`].
    pub fn atomic_u64(&self, offset: u64) -> Result<&AtomicU64, MemoryError> {
        let word = self.at_for_writing(offset, 8)?;
        if !word.cast::<u64>().is_aligned() {
            return Err(MemoryError::Misaligned { offset, align: 8 });
        }
        // SAFETY: as in `atomic_u32`.
        Ok(unsafe { AtomicU64::from_ptr(word.as_ptr().cast()) })
    }

    /// Bytes that several threads or processes use at once; `None` outside of the mapping and where it is read-only.
    #[inline]
    pub fn atomic_bytes(&self, offset: u64, len: u64) -> Option<&[AtomicU8]> {
        let first = self.find(offset, len).filter(|_| self.writable)?;
        // SAFETY: mapped and writable for `len` bytes as just checked, as long as `self` lives; an AtomicU8 has the layout of a byte and
        // allows any concurrent use by atomics or copies.
        Some(unsafe { std::slice::from_raw_parts(first.as_ptr().cast::<AtomicU8>(), len as usize) })
    }

    /// Stores `bytes` (a multiple of 4 long, `offset` a multiple of 4) so that the last 32-bit word becomes visible after all others:
    /// for words that a guest polls, such as the phase bit in the last word of a completion entry.
    ///
    /// # Errors
    /// As [`Memory::atomic_u32`]; [`MemoryError::Misaligned`] also for a length that is no multiple of 4.
    pub fn store_last_word_last(&self, offset: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        if self.try_store_last_word_last(offset, bytes) {
            return Ok(());
        }
        if bytes.is_empty() || !bytes.len().is_multiple_of(4) {
            return Err(MemoryError::Misaligned { offset: bytes.len() as u64, align: 4 });
        }
        self.at_for_writing(offset, bytes.len() as u64)?;
        Err(MemoryError::Misaligned { offset, align: 4 })
    }

    /// As [`Memory::store_last_word_last`]; false, without a reason, where it refuses.
    #[inline]
    pub(crate) fn try_store_last_word_last(&self, offset: u64, bytes: &[u8]) -> bool {
        let Some((head, last)) = bytes.split_last_chunk::<4>().filter(|_| bytes.len().is_multiple_of(4)) else {
            return false;
        };
        let Ok(flag) = self.atomic_u32(offset.saturating_add(head.len() as u64)) else { return false };
        let written = self.try_write(offset, head);
        if written {
            flag.store(u32::from_ne_bytes(*last), Ordering::Release);
        }
        written
    }

    /// The address of a checked range, for a system call that fills or reads guest memory directly.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`].
    #[inline]
    pub fn at(&self, offset: u64, len: u64) -> Result<NonNull<u8>, MemoryError> {
        self.find(offset, len).ok_or(MemoryError::OutOfBounds { offset, len, mapped: self.len as u64 })
    }

    /// As [`Memory::at`], without a reason where it is outside.
    #[inline]
    fn find(&self, offset: u64, len: u64) -> Option<NonNull<u8>> {
        let end = offset.checked_add(len)?;
        if end > self.len as u64 {
            return None;
        }
        // SAFETY: offset <= len of one mapping, as just checked.
        Some(unsafe { self.base.add(offset as usize) })
    }

    /// The first byte; for the rings, which check their range once.
    #[inline]
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    #[inline]
    fn at_for_writing(&self, offset: u64, len: u64) -> Result<NonNull<u8>, MemoryError> {
        if !self.writable {
            return Err(MemoryError::ReadOnly);
        }
        self.at(offset, len)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if matches!(self.backing, Backing::Mapped) && self.len > 0 {
            // SAFETY: `base` and `len` are the mapping made in `map_file`, and no span or Mapped can exist without an Arc of us.
            let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
            debug_assert!(unmapped.is_ok(), "a mapping of our own could not be unmapped");
        }
    }
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let fd = self.file.as_ref().map(|(fd, _)| fd.as_raw_fd());
        f.debug_struct("Memory").field("len", &self.len).field("writable", &self.writable).field("fd", &fd).finish_non_exhaustive()
    }
}

/// A checked piece of memory that keeps its mapping alive: what a worker thread holds while the kernel reads or fills guest memory. Where the
/// memory is a peer's, the peer that takes it back waits until this is dropped.
#[derive(Debug)]
pub struct Mapped {
    memory: Arc<Memory>,
    offset: u64,
    len: u64,
    _hold: Option<Hold>,
}

impl Mapped {
    /// The `len` bytes from `offset` of `memory`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`].
    pub fn new(memory: Arc<Memory>, offset: u64, len: u64) -> Result<Self, MemoryError> {
        memory.at(offset, len)?;
        Ok(Self { memory, offset, len, _hold: None })
    }

    /// The same piece, for which its owner waits.
    pub(crate) fn held(self, hold: Hold) -> Self {
        Self { _hold: Some(hold), ..self }
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// First byte. Valid for `len()` bytes as long as this value lives; others may write the bytes at any time.
    pub fn as_ptr(&self) -> *mut u8 {
        // `new` checked the range, so the address exists.
        self.memory.at(self.offset, self.len).map_or(std::ptr::null_mut(), NonNull::as_ptr)
    }

    /// The memory and the offset of the first byte in it. Who keeps the memory longer than this value keeps it mapped, but is not waited for.
    pub fn parts(&self) -> (&Arc<Memory>, u64) {
        (&self.memory, self.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_written_through_one_mapping_are_read_through_another() {
        let memory = Memory::memfd("test", 8192).unwrap();
        let fd = memory.file().unwrap().0.try_clone_to_owned().unwrap();
        let second = Memory::map_file(fd, 4096, 4096, false).unwrap();
        memory.write(4096 + 7, b"farbus").unwrap();
        let mut seen = [0; 6];
        second.read(7, &mut seen).unwrap();
        assert_eq!(&seen, b"farbus");
        assert!(matches!(second.write(0, b"x"), Err(MemoryError::ReadOnly)));
    }

    #[test]
    fn nothing_outside_a_mapping_is_touched() {
        let memory = Memory::memfd("test", 4096).unwrap();
        assert!(memory.read(4095, &mut [0; 2]).is_err());
        assert!(memory.write(u64::MAX, b"x").is_err());
        assert!(memory.atomic_u32(4094).is_err());
        assert!(memory.copy_from(0, &memory, 1, 4096).is_err());
        assert!(memory.store_last_word_last(0, b"abc").is_err());
    }

    #[test]
    fn a_descriptor_that_is_too_short_is_refused_before_it_can_fault() {
        let memory = Memory::memfd("test", 4096).unwrap();
        let fd = memory.file().unwrap().0.try_clone_to_owned().unwrap();
        assert!(matches!(Memory::map_file(fd, 0, 8192, true), Err(MemoryError::FileTooShort { claimed: 8192, actual: 4096 })));
        assert!(memory.sealed());
    }
}
