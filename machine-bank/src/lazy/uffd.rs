//! userfaultfd: the kernel asks us for a page that is not there, and we put it in, whole groups at once. Raw requests, no library.
//!
//! A read of byte 0x7f00_0001_2345 of a registered range becomes `Event::Fault { address: 0x7f00_0001_2000 }`; `copy` of 64 KiB to
//! 0x7f00_0001_0000 answers it, and fifteen faults that now never happen.
//!
//! Facts about the requests are those of ioctl_userfaultfd(2) and `include/uapi/linux/userfaultfd.h` of Linux 6.18.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use farbus_transport::Memory;
use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, ReadWriteFlags};
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::mm::UserfaultfdFlags;
use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::page::PAGE;

const API: u64 = 0xaa;
const GROUP: u8 = 0xaa;

/// What a range is registered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watch(u64);

impl Watch {
    /// Pages that are not there.
    pub const MISSING: Self = Self(1);
    /// First writes to pages that were protected.
    pub const WRITES: Self = Self(1 << 1);
    /// Pages that are not there, or are in the shared file and not yet mapped here.
    pub const MISSING_AND_MINOR: Self = Self(1 | 1 << 2);
}

/// What a kernel can do, as bits of `uffdio_api.features`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// Removed pages are told (balloons).
    pub const EVENT_REMOVE: Self = Self(1 << 3);
    /// Missing faults on shared memory.
    pub const MISSING_SHMEM: Self = Self(1 << 5);
    /// Minor faults on shared memory.
    pub const MINOR_SHMEM: Self = Self(1 << 10);
    /// Write protection on shared memory.
    pub const WP_SHMEM: Self = Self(1 << 12);
    /// Write protection of pages that are not there.
    pub const WP_UNPOPULATED: Self = Self(1 << 13);
    /// Pages whose use is a SIGBUS.
    pub const POISON: Self = Self(1 << 14);
    /// Write protection that the kernel takes off by itself, for tracking.
    pub const WP_ASYNC: Self = Self(1 << 15);

    /// All of both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` are there.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Why there is no userfaultfd.
#[derive(Debug, Error)]
pub enum UffdError {
    /// This process may not.
    #[error("userfaultfd is not permitted here: run as root, or let this user open /dev/userfaultfd")]
    NotPermitted,
    /// The kernel is built without it.
    #[error("this kernel has no userfaultfd")]
    Absent,
    /// The kernel lacks a feature.
    #[error("this kernel's userfaultfd lacks features {:#x}", .0.0)]
    Lacks(Features),
    /// The kernel refused something else.
    #[error("userfaultfd: {what}: {errno}")]
    Host {
        /// What was asked.
        what: &'static str,
        /// Its answer.
        errno: Errno,
    },
}

/// What the kernel tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Somebody waits for the page at this address.
    Fault {
        /// Of the page.
        address: u64,
    },
    /// The pages of a range are being thrown away: from now on they are zero.
    Remove {
        /// The first byte.
        start: u64,
        /// Behind the last.
        end: u64,
    },
    /// Something that we never asked to be told.
    Other(u8),
}

/// Why pages were not put where they belong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PlaceError {
    /// Events have to be read first.
    #[error("the range is changing")]
    Changing,
    /// The memory, or its process, is gone.
    #[error("the memory is gone")]
    Gone,
    /// What should be mapped is not in the file any more.
    #[error("the page is not in the shared file")]
    NotCached,
    /// The host's fault.
    #[error("the kernel refused a page: {0}")]
    Host(Errno),
}

/// What became of a page that was there already, and of others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Placed {
    /// Pages put there by this call.
    pub pages: u64,
    /// Pages that somebody had put there before.
    pub there: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy, Default)]
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy, Default)]
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

/// `uffdio_register`, `uffdio_zeropage`, `uffdio_continue` and `uffdio_poison` have one layout: a range, a mode, and the kernel's answer.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy, Default)]
#[repr(C)]
struct Ranged {
    range: Range,
    mode: u64,
    answer: i64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy, Default)]
#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy, Default)]
#[repr(C)]
struct Protect {
    range: Range,
    mode: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy, Default)]
#[repr(C)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    a: u64,
    b: u64,
    c: u64,
}

const API_REQUEST: Opcode = opcode::read_write::<Api>(GROUP, 0x3f);
const REGISTER: Opcode = opcode::read_write::<Ranged>(GROUP, 0x00);
const WAKE: Opcode = opcode::read::<Range>(GROUP, 0x02);
const COPY: Opcode = opcode::read_write::<Copy>(GROUP, 0x03);
const ZEROPAGE: Opcode = opcode::read_write::<Ranged>(GROUP, 0x04);
const CONTINUE: Opcode = opcode::read_write::<Ranged>(GROUP, 0x07);
const POISON: Opcode = opcode::read_write::<Ranged>(GROUP, 0x08);
const WRITEPROTECT: Opcode = opcode::read_write::<Protect>(GROUP, 0x06);
const NEW: Opcode = opcode::none(GROUP, 0x00);

/// A userfaultfd: ours, or one that a client passed us.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl Uffd {
    /// A new one for this process with these features, which does not block.
    ///
    /// # Errors
    /// It is not permitted, or the kernel lacks one of them.
    pub fn new(features: Features) -> Result<Self, UffdError> {
        let lacks = Self::supported()?;
        if !lacks.has(features) {
            return Err(UffdError::Lacks(Features(features.0 & !lacks.0)));
        }
        let uffd = Self(open()?);
        uffd.shake(features)?;
        Ok(uffd)
    }

    /// What the kernel offers.
    ///
    /// # Errors
    /// It is not permitted.
    pub fn supported() -> Result<Features, UffdError> {
        Self(open()?).shake(Features(0))
    }

    /// One that a client made, registered and passed to us.
    ///
    /// # Errors
    /// The descriptor is something else.
    pub fn passed(fd: OwnedFd) -> Result<Self, UffdError> {
        let link = rustix::fs::readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new());
        let link = link.map_err(|errno| UffdError::Host { what: "look at a descriptor", errno })?;
        if link.to_bytes() != b"anon_inode:[userfaultfd]" {
            return Err(UffdError::Host { what: "the descriptor is no userfaultfd", errno: Errno::INVAL });
        }
        let uffd = Self(fd);
        // Whoever made it decides whether reads block, and one of ours may not.
        rustix::fs::fcntl_getfl(&uffd.0)
            .and_then(|flags| rustix::fs::fcntl_setfl(&uffd.0, flags | OFlags::NONBLOCK))
            .map_err(|errno| UffdError::Host { what: "make a descriptor non-blocking", errno })?;
        Ok(uffd)
    }

    fn shake(&self, features: Features) -> Result<Features, UffdError> {
        let mut api = Api { api: API, features: features.0, ioctls: 0 };
        self.call::<API_REQUEST, _>(&mut api).map_err(|errno| UffdError::Host { what: "agree on an API", errno })?;
        Ok(Features(api.features))
    }

    /// Watches a range of this process, of whole pages.
    ///
    /// # Safety
    /// The range is one mapping of the caller's, of which no reference exists: from now on its contents appear when it is read.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) unsafe fn register(&self, start: u64, len: u64, watch: Watch) -> Result<(), UffdError> {
        let mut register = Ranged { range: Range { start, len }, mode: watch.0, answer: 0 };
        self.call::<REGISTER, _>(&mut register).map_err(|errno| UffdError::Host { what: "register a range", errno })
    }

    /// The next event, if there is one.
    ///
    /// # Errors
    /// The host's fault.
    pub fn event(&self) -> Result<Option<Event>, Errno> {
        let mut message = Message::default();
        match self.read(message.as_mut_bytes()) {
            Ok(len) if len == size_of::<Message>() => Ok(Some(match message.event {
                0x12 => Event::Fault { address: message.b & !(PAGE as u64 - 1) },
                0x15 => Event::Remove { start: message.a, end: message.b },
                other => Event::Other(other),
            })),
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// Reads without waiting, also where the one who passed the descriptor has made it blocking since: one client may not stop the others' handler.
    fn read(&self, message: &mut [u8]) -> Result<usize, Errno> {
        // An offset of -1 is the file's own (preadv2(2)); RWF_NOWAIT is known to userfaultfd since Linux 6.10.
        match rustix::io::preadv2(&self.0, &mut [IoSliceMut::new(message)], u64::MAX, ReadWriteFlags::NOWAIT) {
            Err(Errno::OPNOTSUPP | Errno::SPIPE) => rustix::io::read(&self.0, message),
            other => other,
        }
    }

    /// Puts bytes at an address, both of whole pages, and wakes who waits for them. Pages that are there stay as they are.
    ///
    /// # Errors
    /// See [`PlaceError`].
    pub fn copy(&self, to: u64, bytes: &[u8]) -> Result<Placed, PlaceError> {
        self.copy_from(to, bytes.as_ptr() as u64, bytes.len() as u64)
    }

    /// The same with bytes of a cache.
    ///
    /// # Errors
    /// See [`PlaceError`].
    pub fn copy_memory(&self, to: u64, memory: &Memory, offset: u64, len: u64) -> Result<Placed, PlaceError> {
        let from = memory.at(offset, len).map_err(|_| PlaceError::Host(Errno::FAULT))?;
        self.copy_from(to, from.as_ptr() as u64, len)
    }

    fn copy_from(&self, to: u64, from: u64, len: u64) -> Result<Placed, PlaceError> {
        self.stretch(to, len, |at, left| {
            let mut copy = Copy { dst: to + at, src: from + at, len: left, mode: 0, copied: 0 };
            (self.call::<COPY, _>(&mut copy), copy.copied)
        })
    }

    /// Maps pages of zeros.
    ///
    /// # Errors
    /// See [`PlaceError`].
    pub fn zero(&self, to: u64, len: u64) -> Result<Placed, PlaceError> {
        self.ranged::<ZEROPAGE>(to, len)
    }

    /// Maps pages that the file behind the memory has.
    ///
    /// # Errors
    /// See [`PlaceError`].
    pub fn map_cached(&self, to: u64, len: u64) -> Result<Placed, PlaceError> {
        self.ranged::<CONTINUE>(to, len)
    }

    /// Makes every use of the pages a SIGBUS.
    ///
    /// # Errors
    /// See [`PlaceError`]; `Host` also where the kernel is older than 6.6.
    pub fn poison(&self, to: u64, len: u64) -> Result<Placed, PlaceError> {
        self.ranged::<POISON>(to, len)
    }

    fn ranged<const OPCODE: Opcode>(&self, to: u64, len: u64) -> Result<Placed, PlaceError> {
        self.stretch(to, len, |at, left| {
            let mut request = Ranged { range: Range { start: to + at, len: left }, mode: 0, answer: 0 };
            (self.call::<OPCODE, _>(&mut request), request.answer)
        })
    }

    /// Repeats a request until all of `len` bytes are there. The kernel stops at a page that is there already, and at a signal.
    fn stretch(&self, to: u64, len: u64, request: impl Fn(u64, u64) -> (Result<(), Errno>, i64)) -> Result<Placed, PlaceError> {
        let (mut at, mut placed) = (0, Placed::default());
        while at < len {
            match request(at, len - at) {
                (Ok(()), _) => {
                    placed.pages += (len - at) / PAGE as u64;
                    at = len;
                }
                (Err(Errno::AGAIN), done) if done > 0 => {
                    placed.pages += done.unsigned_abs() / PAGE as u64;
                    at += done.unsigned_abs();
                }
                (Err(Errno::EXIST), _) => {
                    // Whoever put it there may have done so before the fault was told: then nobody has woken who waits.
                    self.wake(to + at, PAGE as u64)?;
                    placed.there += 1;
                    at += PAGE as u64;
                }
                (Err(Errno::AGAIN), _) => return Err(PlaceError::Changing),
                (Err(Errno::NOENT | Errno::SRCH), _) => return Err(PlaceError::Gone),
                (Err(Errno::FAULT), _) => return Err(PlaceError::NotCached),
                (Err(errno), _) => return Err(PlaceError::Host(errno)),
            }
        }
        Ok(placed)
    }

    /// Has the first write to each page of a range told, and waiting; or lets the writes go on, and wakes who waits.
    ///
    /// # Errors
    /// See [`PlaceError`].
    pub fn protect(&self, start: u64, len: u64, protected: bool) -> Result<(), PlaceError> {
        loop {
            let mut request = Protect { range: Range { start, len }, mode: u64::from(protected) };
            match self.call::<WRITEPROTECT, _>(&mut request) {
                Ok(()) => return Ok(()),
                // Mappings of the process are changing: nothing was done yet.
                Err(Errno::AGAIN | Errno::INTR) => std::thread::yield_now(),
                Err(Errno::NOENT | Errno::SRCH) => return Err(PlaceError::Gone),
                Err(errno) => return Err(PlaceError::Host(errno)),
            }
        }
    }

    /// Lets everybody who waits for a page of the range try again.
    ///
    /// # Errors
    /// See [`PlaceError`].
    pub fn wake(&self, start: u64, len: u64) -> Result<(), PlaceError> {
        self.call::<WAKE, _>(&mut Range { start, len }).map_err(PlaceError::Host)
    }

    fn call<const OPCODE: Opcode, T: FromBytes + IntoBytes>(&self, argument: &mut T) -> Result<(), Errno> {
        // SAFETY: every opcode above is made of the size of the structure that its callers pass, whose layout is the kernel's and for which
        // any bytes are a value. What the kernel changes beside it lies in ranges that were registered under `register`'s terms, or in
        // another process.
        let request = unsafe { Updater::<OPCODE, T>::new(argument) };
        // SAFETY: as above; a descriptor that is no userfaultfd answers ENOTTY.
        unsafe { ioctl(&self.0, request) }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn open() -> Result<OwnedFd, UffdError> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: a descriptor that watches nothing; what it watches is decided by `register`.
    match unsafe { rustix::mm::userfaultfd(flags) } {
        Ok(fd) => Ok(fd),
        Err(Errno::NOSYS) => Err(UffdError::Absent),
        Err(Errno::PERM) => open_device(flags),
        Err(errno) => Err(UffdError::Host { what: "open", errno }),
    }
}

/// The way for users whom an administrator lets open the device.
fn open_device(flags: UserfaultfdFlags) -> Result<OwnedFd, UffdError> {
    let device = rustix::fs::open("/dev/userfaultfd", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    let device = device.map_err(|_| UffdError::NotPermitted)?;
    super::device::new_uffd::<NEW>(&device, flags.bits() as usize)
        .map_err(|errno| UffdError::Host { what: "open by the device", errno })
}
