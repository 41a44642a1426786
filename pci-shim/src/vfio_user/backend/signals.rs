//! How the device's interrupts are heard: an eventfd for each vector, and one epoll descriptor for them and the server's socket.
//!
//! The server signals vector 3's eventfd; the epoll descriptor becomes readable, [`Signals::collect`] reads the eventfd and gives 3. However often
//! it was signalled meanwhile, that is one interrupt, as an edge that was not yet served is.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;

/// Events that one look takes.
const EVENTS: usize = 64;
const SOCKET: u64 = 0;
const PIN: u64 = 1;
const FIRST_VECTOR: u64 = 2;

/// What a look found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// The socket can be read, or is at its end.
    pub(super) readable: bool,
    /// The socket takes bytes again.
    pub(super) writable: bool,
    /// At least one eventfd was read.
    pub(super) raised: bool,
}

/// The eventfds of one device.
pub(super) struct Signals {
    epoll: OwnedFd,
    pin: OwnedFd,
    vectors: Vec<OwnedFd>,
    /// Vectors that were signalled and not yet told.
    pub(super) raised: Vec<u16>,
    /// INTx was signalled and not yet told.
    pub(super) pin_raised: bool,
    wants_room: bool,
}

impl Signals {
    /// As many eventfds as there are vectors, and the socket.
    ///
    /// # Errors
    /// What the kernel refused: 2,048 vectors take more descriptors than many processes may have.
    pub(super) fn new(socket: BorrowedFd<'_>, vectors: usize) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, socket, EventData::new_u64(SOCKET), EventFlags::IN)?;
        let signal = |data| -> io::Result<OwnedFd> {
            let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            epoll::add(&epoll, &fd, EventData::new_u64(data), EventFlags::IN)?;
            Ok(fd)
        };
        let pin = signal(PIN)?;
        let vectors = (0..vectors as u64).map(|vector| signal(FIRST_VECTOR + vector)).collect::<io::Result<Vec<_>>>()?;
        let raised = Vec::with_capacity(vectors.len());
        Ok(Self { epoll, pin, vectors, raised, pin_raised: false, wants_room: false })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    pub(super) fn pin(&self) -> BorrowedFd<'_> {
        self.pin.as_fd()
    }

    pub(super) fn vectors(&self) -> impl ExactSizeIterator<Item = BorrowedFd<'_>> {
        self.vectors.iter().map(AsFd::as_fd)
    }

    /// Whether something is there; nothing is taken.
    pub(super) fn is_quiet(&self) -> bool {
        let mut room = [MaybeUninit::<Event>::uninit(); 1];
        let found = epoll::wait(&self.epoll, &mut room[..], Some(&Timespec::default()));
        matches!(found, Ok(([], _)))
    }

    /// Takes what was signalled.
    pub(super) fn collect(&mut self) -> Found {
        let mut found = Found::default();
        let mut room = [MaybeUninit::<Event>::uninit(); EVENTS];
        let events = match epoll::wait(&self.epoll, &mut room[..], Some(&Timespec::default())) {
            Ok((events, _)) => events,
            Err(Errno::INTR) => return found,
            Err(errno) => {
                // Heard of by the socket's own calls where it is broken.
                tracing::error!(%errno, "the device's signals cannot be waited for");
                found.readable = true;
                return found;
            }
        };
        for event in events {
            let (flags, data) = (event.flags, event.data.u64());
            let fd = match data {
                SOCKET => {
                    found.readable |= flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR);
                    found.writable |= flags.contains(EventFlags::OUT);
                    continue;
                }
                PIN => Some(&self.pin),
                vector => self.vectors.get((vector - FIRST_VECTOR) as usize),
            };
            let Some(fd) = fd else { continue };
            if rustix::io::read(fd, &mut [0_u8; 8]).is_err() {
                continue;
            }
            found.raised = true;
            match data {
                PIN => self.pin_raised = true,
                vector => {
                    let vector = (vector - FIRST_VECTOR) as u16;
                    if !self.raised.contains(&vector) {
                        self.raised.push(vector);
                    }
                }
            }
        }
        found
    }

    /// Forgets what was signalled and not told.
    pub(super) fn forget(&mut self) {
        self.collect();
        self.raised.clear();
        self.pin_raised = false;
    }

    /// Whether to wake up when the socket takes bytes again.
    pub(super) fn set_wants_room(&mut self, socket: BorrowedFd<'_>, wants: bool) {
        if wants == self.wants_room {
            return;
        }
        self.wants_room = wants;
        let flags = if wants { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
        if let Err(errno) = epoll::modify(&self.epoll, socket, EventData::new_u64(SOCKET), flags) {
            tracing::error!(%errno, "the server's socket cannot be waited for");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn each_signalled_vector_is_told_once_and_the_socket_too() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut signals = Signals::new(ours.as_fd(), 100).unwrap();
        assert!(signals.is_quiet());
        for vector in [3, 3, 99] {
            rustix::io::write(signals.vectors().nth(vector).unwrap(), &1_u64.to_ne_bytes()).unwrap();
        }
        rustix::io::write(signals.pin(), &1_u64.to_ne_bytes()).unwrap();
        assert!(!signals.is_quiet());
        assert_eq!(signals.collect(), Found { raised: true, ..Found::default() });
        signals.raised.sort_unstable();
        assert_eq!((signals.raised.as_slice(), signals.pin_raised), (&[3, 99][..], true));
        signals.forget();
        assert!(signals.is_quiet() && signals.raised.is_empty());
        drop(theirs);
        assert!(signals.collect().readable);
    }
}
