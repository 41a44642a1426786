//! The connection to the server while its device is lent: questions go out without waiting, replies are matched, and one that is late ends it.
//!
//! Three register writes leave as three messages and are answered later, in any order; the fourth thing, a read, is one message and 20 us. A server
//! that owes an answer for longer than it may is gone: the socket is closed, and every question is answered by nobody.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use farbus_transport::Nanos;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use zerocopy::IntoBytes;

use super::RESET_LIMIT;
use super::asked::{Ask, Asked, MAX_ASKED};
use crate::vfio_user::message::encode;
use crate::vfio_user::socket::{Incoming, Input, Output, Received};
use crate::vfio_user::wire::{Header, MAX_MESSAGE_FDS};

/// Bytes that wait for the server, above which it counts as gone: it has not read for that long.
const MAX_BACKLOG: usize = 8 << 20;

/// What the server sent.
pub(super) enum Heard<'a> {
    /// The answer to a question: its body, or the errno.
    Answer(Ask, Result<&'a [u8], Errno>),
    /// A question of its own.
    Request(Header, &'a [u8]),
}

/// The connection.
pub(super) struct Link {
    socket: UnixStream,
    input: Input,
    output: Output,
    asked: Asked,
    pub(super) answer_within: Duration,
    /// The server has guest memory: it is gone only when it has closed its end.
    shared: bool,
    left: bool,
    /// Why it is of no use any more.
    down: Option<&'static str>,
}

impl Link {
    pub(super) fn new(socket: UnixStream, input: Input, answer_within: Duration) -> Self {
        Self {
            socket,
            input,
            output: Output::default(),
            asked: Asked::new(),
            answer_within,
            shared: false,
            left: false,
            down: None,
        }
    }

    pub(super) fn down(&self) -> Option<&'static str> {
        self.down
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(super) fn asked(&mut self) -> &mut Asked {
        &mut self.asked
    }

    /// Whether a few more questions can be asked without waiting.
    pub(super) fn has_room(&self) -> bool {
        self.asked.count() < MAX_ASKED / 2
    }

    pub(super) fn open_questions(&self) -> usize {
        self.asked.count()
    }

    pub(super) fn backlog(&self) -> usize {
        self.output.backlog()
    }

    /// Ends the connection.
    pub(super) fn fail(&mut self, why: &'static str) {
        if self.down.is_none() {
            self.down = Some(why);
            hang_up(&self.socket, self.shared);
        }
    }

    /// From now on the server has guest memory.
    pub(super) fn share(&mut self) {
        self.shared = true;
    }

    /// After its end: whether the server has closed its side.
    pub(super) fn has_left(&mut self) -> bool {
        let mut sink = [0_u8; 4096];
        while !self.left {
            match rustix::net::recv(&self.socket, &mut sink[..], RecvFlags::DONTWAIT) {
                Ok((_, 1..)) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Ok((_, 0)) | Err(_) => self.left = true,
            }
        }
        self.left
    }

    /// Asks; the answer comes from [`Link::next`].
    pub(super) fn ask(&mut self, ask: Ask, parts: [&[u8]; 2], now: Nanos) {
        if self.down.is_some() {
            return;
        }
        let Some((id, command)) = self.asked.remember(ask, now) else {
            return self.fail("it owes too many answers");
        };
        let header = Header::command(id, command, parts.iter().map(|part| part.len()).sum());
        self.send(&header, parts);
    }

    /// Asks with descriptors beside the question. Waits, for a bounded time, where the server does not read.
    pub(super) fn ask_with(&mut self, ask: Ask, body: &[u8], fds: &[BorrowedFd<'_>], now: Nanos) {
        if self.down.is_some() {
            return;
        }
        let Some((id, command)) = self.asked.remember(ask, now) else {
            return self.fail("it owes too many answers");
        };
        if let Err(error) = self.send_with(&Header::command(id, command, body.len()), body, fds) {
            tracing::debug!(%error, "the server takes no descriptors");
            self.fail("it reads nothing that is sent to it");
        }
    }

    fn send_with(&mut self, header: &Header, body: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let started = Nanos::now();
        while self.output.backlog() > 0 {
            self.output.flush(self.socket.as_fd())?;
            if Nanos::now().since(started) > self.answer_within {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        let mut message = Vec::with_capacity(header.message_size as usize);
        encode(&mut message, header, [body, &[]]);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MESSAGE_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut sent = rustix::net::sendmsg(&self.socket, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL)?;
        while let Some(rest) = message.get(sent..).filter(|rest| !rest.is_empty()) {
            sent += rustix::net::send(&self.socket, rest, SendFlags::NOSIGNAL)?;
        }
        Ok(())
    }

    /// Answers a question of the server's.
    pub(super) fn reply(&mut self, to: &Header, parts: [&[u8]; 2]) {
        if !to.no_reply() {
            self.send(&to.reply(parts.iter().map(|part| part.len()).sum()), parts);
        }
    }

    /// Refuses a question of the server's.
    pub(super) fn refuse(&mut self, to: &Header, errno: Errno) {
        if !to.no_reply() {
            self.send(&to.refusal(errno), [&[], &[]]);
        }
    }

    fn send(&mut self, header: &Header, parts: [&[u8]; 2]) {
        if self.down.is_some() {
            return;
        }
        match self.output.send(self.socket.as_fd(), header, parts) {
            Ok(()) if self.output.backlog() > MAX_BACKLOG => self.fail("it reads nothing that is sent to it"),
            Ok(()) => {}
            Err(error) => self.broke(&error),
        }
    }

    pub(super) fn flush(&mut self) {
        if self.down.is_none()
            && self.output.backlog() > 0
            && let Err(error) = self.output.flush(self.socket.as_fd())
        {
            self.broke(&error);
        }
    }

    fn broke(&mut self, error: &io::Error) {
        tracing::debug!(%error, "the connection to the server broke");
        self.fail("its server closed the connection");
    }

    /// Takes bytes from the socket; true where there were some.
    pub(super) fn receive(&mut self) -> bool {
        if self.down.is_some() {
            return false;
        }
        match self.input.receive(self.socket.as_fd(), false) {
            Ok(Received::Bytes) => return true,
            Ok(Received::Nothing) => {}
            Ok(Received::Closed) => self.fail("its server closed the connection"),
            Err(error) => self.broke(&error),
        }
        false
    }

    /// The next message of those bytes. What cannot be followed ends the connection.
    pub(super) fn next(&mut self) -> Option<Heard<'_>> {
        if self.down.is_some() {
            return None;
        }
        let why = match self.input.next_message()? {
            // Descriptors have no meaning in any of them, and are closed.
            Incoming::Message { header, body, .. } if header.is_command() => return Some(Heard::Request(header, body)),
            Incoming::Message { header, body, .. } if header.is_reply() => {
                match self.asked.answered(header.message_id, header.command) {
                    Some(ask) if header.flags & crate::vfio_user::wire::FLAG_ERROR == 0 => {
                        return Some(Heard::Answer(ask, Ok(body)));
                    }
                    Some(ask) => return Some(Heard::Answer(ask, Err(header.errno()))),
                    None => "its server answered what was not asked",
                }
            }
            Incoming::Message { .. } => "its server sent what is neither a command nor a reply",
            Incoming::TooLong(_) => "its server sent a message that is too long",
            Incoming::Broken(_) => "its server sent a message that is shorter than its header",
        };
        if self.down.is_none() {
            self.down = Some(why);
            hang_up(&self.socket, self.shared);
        }
        None
    }

    /// Ends the connection where an answer is late; else when one would be.
    pub(super) fn check_deadline(&mut self, now: Nanos) -> Option<Duration> {
        let (ask, since) = self.asked.oldest().filter(|_| self.down.is_none())?;
        let limit = if ask == Ask::Reset { RESET_LIMIT } else { self.answer_within };
        let spent = now.since(since);
        if spent > limit {
            tracing::warn!(?ask, ?limit, "the server owes an answer");
            self.fail("its server does not answer");
            return None;
        }
        Some(limit - spent)
    }
}

/// Ends our side; a server that has guest memory is heard until it has ended its own.
fn hang_up(socket: &UnixStream, shared: bool) {
    if let Err(error) = socket.shutdown(if shared { Shutdown::Write } else { Shutdown::Both }) {
        tracing::debug!(%error, "the server was gone already");
    }
}

/// Bytes of a structure, for [`Link::ask`].
pub(super) fn bytes<T: IntoBytes + zerocopy::Immutable>(value: &T) -> &[u8] {
    value.as_bytes()
}
