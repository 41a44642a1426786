//! Descriptors across the unix socket of a link: how granted memory, rings and wake-ups reach the other process.
//!
//! A grant of 512 MiB travels as 32 bytes (`key`, `len`, access) with the memfd attached; whoever receives fewer or more descriptors than the
//! frame says closes them all and refuses.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use crate::fabric::{Grant, GrantError};
use crate::hold::Lifeline;
use crate::span::Access;

/// Bytes of every frame on the socket after the hello.
const FRAME_BYTES: usize = 32;
const MAGIC: u32 = 0x6d68_7366;
/// The low bits of a grant's detail are its access, the rest the offset in the file, a multiple of the page size.
const ACCESS_BITS: u64 = 0xfff;
/// Descriptors one frame may carry.
const MAX_FDS: usize = 4;
/// How long a peer may take to deliver what it announced.
const DELIVERY: Duration = Duration::from_secs(2);
/// Grants that may wait to be imported.
const MAX_WAITING: usize = 1024;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FrameKind {
    Grant = 1,
    Setup = 2,
}

#[derive(Clone, Copy, Debug)]
struct Frame {
    kind: u32,
    key: u64,
    len: u64,
    detail: u64,
}

impl Frame {
    fn encode(self) -> [u8; FRAME_BYTES] {
        let mut bytes = [0; FRAME_BYTES];
        let fields = [u64::from(MAGIC) | u64::from(self.kind) << 32, self.key, self.len, self.detail];
        for (into, field) in bytes.chunks_exact_mut(8).zip(fields) {
            into.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    fn parse(bytes: &[u8; FRAME_BYTES]) -> Option<Self> {
        let mut fields = [0_u64; 4];
        for (field, from) in fields.iter_mut().zip(bytes.chunks_exact(8)) {
            *field = u64::from_le_bytes(from.try_into().ok()?);
        }
        let [head, key, len, detail] = fields;
        (head as u32 == MAGIC).then_some(Self { kind: (head >> 32) as u32, key, len, detail })
    }
}

/// Memory that arrived and was not asked for yet.
#[derive(Debug)]
pub(super) struct Delivered {
    /// What the owner granted, as it said with the descriptor.
    pub(super) granted: Grant,
    pub(super) fd: OwnedFd,
    pub(super) offset: u64,
}

/// The socket of a link after the hello.
#[derive(Debug)]
pub(super) struct GrantSocket {
    stream: Arc<UnixStream>,
    waiting: VecDeque<Delivered>,
}

impl GrantSocket {
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream: Arc::new(stream), waiting: VecDeque::new() })
    }

    /// Sends the memory behind a grant.
    pub(super) fn send_grant(&self, grant: &Grant, fd: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        let detail = offset | u64::from(grant.access.bits());
        self.send(Frame { kind: FrameKind::Grant as u32, key: grant.key, len: grant.len, detail }, &[fd])
    }

    /// The memory that the peer sent for `grant` and the offset in it; waits a bounded time for it.
    pub(super) fn receive_grant(&mut self, grant: &Grant) -> Result<Delivered, GrantError> {
        let deadline = Instant::now() + DELIVERY;
        loop {
            if let Some(at) = self.waiting.iter().position(|delivered| delivered.granted.key == grant.key) {
                return self.waiting.remove(at).ok_or(GrantError::Missing { key: grant.key });
            }
            let (frame, mut fds) = self.receive(deadline, 1).map_err(|_| GrantError::Missing { key: grant.key })?;
            if frame.kind != FrameKind::Grant as u32 || self.waiting.len() >= MAX_WAITING {
                return Err(GrantError::Missing { key: grant.key });
            }
            let fd = fds.pop().ok_or(GrantError::Missing { key: grant.key })?;
            let access = Access::from_bits((frame.detail & ACCESS_BITS) as u8).ok_or(GrantError::Missing { key: grant.key })?;
            let granted = Grant { key: frame.key, len: frame.len, access };
            self.waiting.push_back(Delivered { granted, fd, offset: frame.detail & !ACCESS_BITS });
        }
    }

    /// Sends the rings and the two wake-up descriptors; `asymmetric` says whether this process registered for membarrier(2).
    pub(super) fn send_setup(&self, fds: &[BorrowedFd<'_>], asymmetric: bool) -> io::Result<()> {
        self.send(Frame { kind: FrameKind::Setup as u32, key: 0, len: 0, detail: u64::from(asymmetric) }, fds)
    }

    /// Receives what [`GrantSocket::send_setup`] sent, with exactly `count` descriptors.
    pub(super) fn receive_setup(&mut self, count: usize) -> io::Result<(Vec<OwnedFd>, bool)> {
        let (frame, fds) = self.receive(Instant::now() + DELIVERY, count)?;
        if frame.kind != FrameKind::Setup as u32 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the peer sent no setup"));
        }
        Ok((fds, frame.detail & 1 == 1))
    }

    /// Whether the peer still holds its end.
    pub(super) fn peer_is_there(&self) -> bool {
        let mut fds = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        match rustix::event::poll(&mut fds, Some(&now)) {
            Ok(_) => fds.iter().all(|fd| !fd.revents().intersects(PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR)),
            Err(_) => true,
        }
    }

    /// What tells the peer that we are there until it is dropped.
    pub(super) fn lifeline(&self) -> Arc<Lifeline> {
        Lifeline::new(&self.stream)
    }

    fn send(&self, frame: Frame, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = frame.encode();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors for one frame"));
        }
        let deadline = Instant::now() + DELIVERY;
        loop {
            match rustix::net::sendmsg(&self.stream, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL) {
                Ok(FRAME_BYTES) => return Ok(()),
                Ok(_) => return Err(io::Error::new(io::ErrorKind::WriteZero, "a frame was cut")),
                Err(rustix::io::Errno::AGAIN) => self.wait(PollFlags::OUT, deadline)?,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn receive(&mut self, deadline: Instant, count: usize) -> io::Result<(Frame, Vec<OwnedFd>)> {
        let mut bytes = [0; FRAME_BYTES];
        let mut filled = 0;
        let mut fds = Vec::new();
        while filled < FRAME_BYTES {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let rest = bytes.get_mut(filled..).unwrap_or_default();
            match rustix::net::recvmsg(&self.stream, &mut [IoSliceMut::new(rest)], &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) if received.bytes == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(received) => filled += received.bytes,
                Err(rustix::io::Errno::AGAIN) => self.wait(PollFlags::IN, deadline)?,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    fds.extend(received);
                }
            }
        }
        let invalid = |what| io::Error::new(io::ErrorKind::InvalidData, what);
        let frame = Frame::parse(&bytes).ok_or_else(|| invalid("the peer sent no frame"))?;
        if fds.len() != count {
            return Err(invalid("a frame came with another number of descriptors than it should"));
        }
        Ok((frame, fds))
    }

    fn wait(&self, flags: PollFlags, deadline: Instant) -> io::Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut fds = [PollFd::new(&self.stream, flags)];
        let timeout = Timespec { tv_sec: left.as_secs().try_into().unwrap_or(1), tv_nsec: left.subsec_nanos().into() };
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for GrantSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn pair() -> (GrantSocket, GrantSocket) {
        let (a, b) = UnixStream::pair().unwrap();
        (GrantSocket::new(a).unwrap(), GrantSocket::new(b).unwrap())
    }

    fn grant(key: u64) -> Grant {
        Grant { key, len: 8192, access: Access::READ }
    }

    #[test]
    fn grants_may_be_taken_in_another_order_than_sent() {
        let (a, mut b) = pair();
        let file = tempfile::tempfile().unwrap();
        for key in 1..=3 {
            a.send_grant(&grant(key), file.as_fd(), key * 4096).unwrap();
        }
        for key in [3, 1, 2] {
            assert_eq!(b.receive_grant(&grant(key)).unwrap().offset, key * 4096);
        }
    }

    #[test]
    fn nonsense_on_the_socket_is_refused_and_leaks_no_descriptor() {
        let (a, mut b) = pair();
        (&*a.stream).write_all(&[0xff; FRAME_BYTES]).unwrap();
        assert!(matches!(b.receive_grant(&grant(1)), Err(GrantError::Missing { key: 1 })));
        let file = tempfile::tempfile().unwrap();
        a.send_setup(&[file.as_fd(), file.as_fd()], true).unwrap();
        assert!(b.receive_setup(3).is_err());
        (&*a.stream).write_all(&[0; 5]).unwrap();
        drop(a);
        assert!(b.receive_setup(3).is_err());
        assert!(!b.peer_is_there());
    }
}
