//! Messages on a unix stream socket: whole messages out of arbitrary pieces, descriptors with the message they came with, bounded memory.
//!
//! Two pipelined region reads of 32 bytes arrive in one `recvmsg` and are handed out one after the other; a map of 48 bytes that arrives
//! as 10 and 38 bytes is handed out once, with the descriptor that came beside its first piece.
//!
//! The kernel ends a `recvmsg` after the first piece of data that carries descriptors (unix(7), "Ancillary messages"), and a piece belongs
//! to one `sendmsg`. So descriptors belong to the message that the last byte of their `recvmsg` is part of.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags};
use zerocopy::FromBytes;

use super::message::{Framing, encode, framing};
use super::wire::{HEADER_BYTES, Header, MAX_MESSAGE_FDS};

const FIRST_BUFFER: usize = 64 << 10;

/// What one `recvmsg` brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// Some bytes: ask [`Input::next_message`].
    Bytes,
    /// Nothing is there yet.
    Nothing,
    /// The other side closed the connection.
    Closed,
}

/// One message, or why there is none.
#[derive(Debug)]
pub enum Incoming<'a> {
    /// A whole message.
    Message {
        /// Its header.
        header: Header,
        /// What follows the header.
        body: &'a [u8],
        /// The descriptors that came with it, in order.
        fds: Vec<OwnedFd>,
        /// More descriptors came than a message may carry; those beyond were closed.
        excess_fds: bool,
        /// Nothing that was received follows it.
        last: bool,
    },
    /// A message that is too long to be held. Its body will be skipped.
    TooLong(Header),
    /// A header whose size is smaller than a header: the rest of the stream cannot be understood.
    Broken(Header),
}

struct Batch {
    /// Position in the stream just after the data that these came with.
    end: u64,
    fds: Vec<OwnedFd>,
    excess: bool,
}

/// The receiving half of a connection.
pub struct Input {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Position of `start` in the stream.
    position: u64,
    /// Bytes of a message that was too long, still to come.
    skip: u64,
    batches: VecDeque<Batch>,
}

impl Default for Input {
    fn default() -> Self {
        Self::new()
    }
}

impl Input {
    /// Nothing received yet.
    pub fn new() -> Self {
        Self { buffer: vec![0; FIRST_BUFFER], start: 0, end: 0, position: 0, skip: 0, batches: VecDeque::new() }
    }

    /// One `recvmsg`. Call [`Input::next_message`] until it is empty before calling again.
    ///
    /// # Errors
    /// What the kernel answered, a connection reset among it.
    pub fn receive(&mut self, socket: BorrowedFd<'_>, block: bool) -> io::Result<Received> {
        self.make_room();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MESSAGE_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | if block { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        let Some(room) = self.buffer.get_mut(self.end..) else {
            return Err(io::ErrorKind::OutOfMemory.into());
        };
        let message = match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(room)], &mut control, flags) {
            Ok(message) => message,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Received::Nothing),
            Err(errno) => return Err(errno.into()),
        };
        if message.bytes == 0 {
            return Ok(Received::Closed);
        }
        self.end += message.bytes;
        let mut fds = Vec::new();
        for ancillary in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = ancillary {
                fds.extend(rights);
            }
        }
        let mut excess = message.flags.contains(ReturnFlags::CTRUNC);
        if !fds.is_empty() || excess {
            let waiting: usize = self.batches.iter().map(|batch| batch.fds.len()).sum();
            if waiting + fds.len() > MAX_MESSAGE_FDS {
                fds.clear();
                excess = true;
            }
            self.batches.push_back(Batch { end: self.position + (self.end - self.start) as u64, fds, excess });
            // A sender that drips descriptors byte by byte only ever gets "too many" remembered once.
            if excess && self.batches.len() > MAX_MESSAGE_FDS {
                self.batches.pop_back();
                if let Some(last) = self.batches.back_mut() {
                    last.excess = true;
                }
            }
        }
        Ok(Received::Bytes)
    }

    /// The next whole message that was received.
    pub fn next_message(&mut self) -> Option<Incoming<'_>> {
        if self.skip > 0 {
            let skipped = self.skip.min((self.end - self.start) as u64);
            self.skip -= skipped;
            self.take(skipped as usize);
        }
        let (header, _) = Header::read_from_prefix(self.buffer.get(self.start..self.end)?).ok()?;
        match framing(&header) {
            Framing::Broken => Some(Incoming::Broken(header)),
            Framing::Skip(bytes) => {
                self.take(HEADER_BYTES);
                self.skip = bytes;
                Some(Incoming::TooLong(header))
            }
            Framing::Whole(size) => {
                if self.end - self.start < size {
                    if self.buffer.len() < size {
                        self.buffer.resize(size, 0);
                    }
                    return None;
                }
                let (fds, excess_fds, begin) = if self.batches.is_empty() {
                    let begin = self.start;
                    self.start += size;
                    self.position += size as u64;
                    (Vec::new(), false, begin)
                } else {
                    let begin = self.start;
                    let (fds, excess) = self.take(size);
                    (fds, excess, begin)
                };
                let last = self.start == self.end;
                let body = self.buffer.get(begin + HEADER_BYTES..begin + size)?;
                Some(Incoming::Message { header, body, fds, excess_fds, last })
            }
        }
    }

    /// Consumes bytes, with the descriptors that came with them.
    fn take(&mut self, bytes: usize) -> (Vec<OwnedFd>, bool) {
        self.start += bytes;
        self.position += bytes as u64;
        let (mut fds, mut excess) = (Vec::new(), false);
        while self.batches.front().is_some_and(|batch| batch.end <= self.position) {
            let Some(batch) = self.batches.pop_front() else { break };
            excess |= batch.excess;
            fds.extend(batch.fds);
        }
        (fds, excess)
    }

    fn make_room(&mut self) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            if self.end == self.buffer.len() {
                // Only where `next` was not asked until it was empty.
                self.buffer.resize(self.end + FIRST_BUFFER, 0);
            }
        }
    }
}

/// The sending half of a connection: what the socket does not take at once waits here.
#[derive(Debug, Default)]
pub struct Output {
    buffer: Vec<u8>,
    sent: usize,
}

impl Output {
    /// Sends a message, or keeps what the socket does not take.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn send(&mut self, socket: BorrowedFd<'_>, header: &Header, parts: [&[u8]; 2]) -> io::Result<()> {
        encode(&mut self.buffer, header, parts);
        self.flush(socket)
    }

    /// Sends what waits, as far as the socket takes it.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        while let Some(rest) = self.buffer.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match rustix::net::send(socket, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(bytes) => self.sent += bytes,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.buffer.drain(..self.sent);
                    self.sent = 0;
                    return Ok(());
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        self.buffer.clear();
        self.sent = 0;
        Ok(())
    }

    /// Bytes that the socket has not taken.
    pub fn backlog(&self) -> usize {
        self.buffer.len() - self.sent
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use proptest::prelude::*;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage};
    use zerocopy::IntoBytes;

    use super::*;
    use crate::vfio_user::wire::Command;

    fn send(socket: &UnixStream, bytes: &[u8], fds: usize) {
        let files: Vec<_> = (0..fds).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
        let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if fds > 0 {
            assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
        }
        let sent = rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
        assert_eq!(sent, bytes.len());
    }

    fn message(id: u16, body: usize) -> Vec<u8> {
        let mut bytes = Header::command(id, Command::RegionWrite, body).as_bytes().to_vec();
        bytes.extend((0..body).map(|i| i as u8 ^ id as u8));
        bytes
    }

    fn drain(input: &mut Input, socket: &UnixStream) -> Vec<(u16, usize, usize, bool)> {
        let mut seen = Vec::new();
        while input.receive(socket.as_fd(), false).unwrap() == Received::Bytes {
            while let Some(incoming) = input.next_message() {
                match incoming {
                    Incoming::Message { header, body, fds, excess_fds, .. } => {
                        assert!(body.iter().enumerate().all(|(i, b)| *b == i as u8 ^ header.message_id as u8));
                        seen.push((header.message_id, body.len(), fds.len(), excess_fds));
                    }
                    Incoming::TooLong(header) => seen.push((header.message_id, 0, 0, true)),
                    Incoming::Broken(_) => panic!("broken"),
                }
            }
        }
        seen
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn descriptors_stay_with_their_message_however_it_is_cut(
            messages in proptest::collection::vec((0_usize..300, 0_usize..4, 0_usize..300), 1..12),
            read_every in 1_usize..4,
        ) {
            let (a, b) = UnixStream::pair().unwrap();
            let mut input = Input::new();
            let (mut expected, mut seen) = (Vec::new(), Vec::new());
            for (i, (body, fds, cut)) in messages.iter().enumerate() {
                let bytes = message(i as u16, *body);
                let cut = (*cut).min(bytes.len());
                if cut == 0 {
                    send(&a, &bytes, *fds);
                } else {
                    send(&a, &bytes[..cut], *fds);
                    if cut < bytes.len() {
                        send(&a, &bytes[cut..], 0);
                    }
                }
                expected.push((i as u16, *body, *fds, false));
                if i % read_every == 0 {
                    seen.extend(drain(&mut input, &b));
                }
            }
            seen.extend(drain(&mut input, &b));
            prop_assert_eq!(seen, expected);
        }
    }

    #[test]
    fn too_many_descriptors_are_closed_and_said() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut input = Input::new();
        send(&a, &message(1, 8), 20);
        send(&a, &message(2, 8), 1);
        let seen = drain(&mut input, &b);
        assert!(seen[0].3 && seen[0].2 <= MAX_MESSAGE_FDS);
        assert_eq!(seen[1], (2, 8, 1, false));
    }

    #[test]
    fn a_message_that_is_too_long_is_skipped_and_the_next_is_read() {
        let (a, b) = UnixStream::pair().unwrap();
        let long = 2_usize << 20;
        let writer = std::thread::spawn(move || {
            let mut a = a;
            std::io::Write::write_all(&mut a, &message(1, long)).unwrap();
            std::io::Write::write_all(&mut a, &message(2, 100_000)).unwrap();
            a
        });
        let mut input = Input::new();
        let mut seen = Vec::new();
        while seen.len() < 2 {
            seen.extend(drain(&mut input, &b));
        }
        assert_eq!(seen, [(1, 0, 0, true), (2, 100_000, 0, false)]);
        drop(writer.join());
    }
}
