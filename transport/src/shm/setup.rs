//! How an end of the fabric comes to be: the lender makes the rings and the wake-ups, the borrower is given them.
//!
//! Five descriptors make a link: the socket, one memfd with both rings, an eventfd for each side to sleep on, and an epoll that also hears of
//! the peer's death.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::{EventfdFlags, epoll};

use super::lines::{RING_BYTES, SLOTS, SharedLines};
use super::revoke::{LIVES_BYTES, Revocations};
use super::socket::GrantSocket;
use super::{SHARED_BYTES, ShmFabric, ShmOptions, Side};
use crate::barrier;
use crate::local::LocalRegions;
use crate::memory::{Memory, MemoryError, is_sealed};
use crate::ring::{Consumer, Fencing, Producer};
use crate::table::Table;
use crate::time::Nanos;

impl ShmFabric {
    /// Makes the rings (lender) or receives them (borrower) over `stream`, after the hello. Blocks for at most a few seconds.
    ///
    /// # Errors
    /// What the kernel answers; `InvalidData` where the peer sent something else than rings.
    pub fn establish(stream: UnixStream, side: Side, options: ShmOptions) -> io::Result<Self> {
        let mut socket = GrantSocket::new(stream)?;
        let asymmetric = barrier::register();
        let invalid = |error: MemoryError| io::Error::new(io::ErrorKind::InvalidData, error);
        let (rings, own_wake, peer_wake, peer_asymmetric) = match side {
            Side::Lender => {
                let rings = Memory::memfd("farbus-rings", SHARED_BYTES).map_err(io::Error::other)?;
                let wake = || rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
                let (own, peer) = (wake()?, wake()?);
                let (fd, _) = rings.file().ok_or(io::ErrorKind::InvalidData)?;
                socket.send_setup(&[fd, own.as_fd(), peer.as_fd()], asymmetric)?;
                let (_, peer_asymmetric) = socket.receive_setup(0)?;
                (rings, own, peer, peer_asymmetric)
            }
            Side::Borrower => {
                let (fds, peer_asymmetric) = socket.receive_setup(3)?;
                let [rings, peer, own] = <[OwnedFd; 3]>::try_from(fds).map_err(|_| io::ErrorKind::InvalidData)?;
                if !is_sealed(&rings) {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "the peer's rings are not sealed"));
                }
                let rings = Memory::map_file(rings, 0, SHARED_BYTES, true).map_err(invalid)?;
                // A wake-up that blocks would let a hostile peer stop us by filling the counter.
                rustix::fs::fcntl_setfl(&own, rustix::fs::OFlags::NONBLOCK)?;
                rustix::fs::fcntl_setfl(&peer, rustix::fs::OFlags::NONBLOCK)?;
                socket.send_setup(&[], asymmetric)?;
                (rings, own, peer, peer_asymmetric)
            }
        };
        let fencing = if asymmetric && peer_asymmetric { Fencing::Sleeper } else { Fencing::Both };
        let (tx_at, rx_at) = if side == Side::Lender { (0, RING_BYTES) } else { (RING_BYTES, 0) };
        let lines = |base| SharedLines::new(Arc::clone(&rings), base).map_err(invalid);
        let lives = |ring_at: u64| 2 * RING_BYTES + ring_at / RING_BYTES * LIVES_BYTES;
        let busy = (lines(tx_at)?, lines(rx_at)?);
        let revocations = Revocations::new(&rings, (lives(tx_at), lives(rx_at)), busy, fencing).map_err(invalid)?;
        let tx = Producer::new(lines(tx_at)?, fencing);
        let rx = Consumer::new(lines(rx_at)?, fencing);
        let wait = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&wait, &own_wake, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        epoll::add(&wait, &socket, epoll::EventData::new_u64(1), epoll::EventFlags::RDHUP)?;
        Ok(Self {
            tx,
            rx,
            ready: VecDeque::with_capacity(SLOTS as usize + 1),
            locals: LocalRegions::default(),
            remotes: Table::default(),
            granted: Vec::new(),
            revocations,
            closed: None,
            close_reported: false,
            peer_left: false,
            asleep: false,
            heard_at: Nanos::now(),
            taken_by_peer: 0,
            options,
            own_wake,
            peer_wake,
            wait,
            lifeline: Some(socket.lifeline()),
            socket,
        })
    }
}
