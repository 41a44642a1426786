//! One direction between two threads of this process: a ring of messages, and a descriptor that wakes the thread that takes them.
//!
//! A vCPU's thread pushes "BAR0 + 0x1018 := 17" into the wire of its function's thread: one cache line, and a system call only where that thread sleeps.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use farbus_transport::barrier;
use farbus_transport::ring::{Consumer, Fencing, HeapLines, Producer};
use rustix::event::EventfdFlags;

/// Messages that wait in one direction, at most.
pub const SLOTS: u32 = 256;

/// The end that is pushed into.
pub struct Wire {
    ring: Producer<HeapLines>,
    wake: Arc<OwnedFd>,
}

impl Wire {
    /// Pushes a message of at most 56 bytes, whose `kind` means what the two threads agreed on; false where 256 wait already.
    #[inline]
    pub fn try_push(&mut self, kind: u8, bytes: &[u8]) -> bool {
        // A ring in this process cannot be wrong about its indexes.
        self.ring.push(kind, bytes) != Ok(false)
    }

    /// Waits for room: only for what the other thread is bound to take.
    pub fn push(&mut self, kind: u8, bytes: &[u8]) {
        while !self.try_push(kind, bytes) {
            self.flush();
            std::thread::yield_now();
        }
    }

    /// Wakes the other thread, where it sleeps.
    #[inline]
    pub fn flush(&mut self) {
        if self.ring.must_wake()
            && let Err(errno) = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes())
        {
            tracing::debug!(%errno, "a wake-up was there already");
        }
    }
}

/// The end that is taken from.
pub struct Tap {
    ring: Consumer<HeapLines>,
    wake: Arc<OwnedFd>,
    asleep: bool,
}

impl Tap {
    /// Readable when an armed tap has a message.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// The next message and its kind.
    #[inline]
    pub fn take(&mut self) -> Option<(u8, farbus_transport::Message)> {
        if self.asleep {
            self.asleep = false;
            self.ring.disarm();
            let mut count = [0; 8];
            if let Err(errno) = rustix::io::read(&*self.wake, &mut count) {
                tracing::trace!(%errno, "woken by something else");
            }
        }
        let taken = self.ring.take().ok().flatten()?;
        let message = farbus_transport::Message::new(taken.bytes.get(..usize::from(taken.len))?)?;
        Some((taken.kind, message))
    }

    /// The first half of [`Tap::arm`], for one of several: false where a message is there. Then [`barrier()`], once for all, and [`Tap::is_quiet`] of each.
    pub fn announce(&mut self) -> bool {
        self.asleep = true;
        self.ring.arm(|| ())
    }

    /// The second half: whether there is still nothing.
    pub fn is_quiet(&self) -> bool {
        !self.ring.is_ready()
    }

    /// Prepares to sleep: true where [`Tap::fd`] will become readable with the next message, false where one is there.
    pub fn arm(&mut self) -> bool {
        let mut ordered = true;
        self.asleep = self.ring.arm(|| ordered = barrier::global()) && ordered;
        self.asleep
    }
}

/// Orders every announcement of this thread before its last look; false where the kernel will not, and then nobody may sleep.
pub fn barrier() -> bool {
    !barrier::register() || barrier::global()
}

/// A direction: its two ends.
///
/// # Errors
/// What eventfd(2) answers.
pub fn wire() -> io::Result<(Wire, Tap)> {
    let fencing = if barrier::register() { Fencing::Sleeper } else { Fencing::Both };
    let wake = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let lines = HeapLines::new(SLOTS);
    let wire = Wire { ring: Producer::new(lines.clone(), fencing), wake: Arc::clone(&wake) };
    Ok((wire, Tap { ring: Consumer::new(lines, fencing), wake, asleep: false }))
}
