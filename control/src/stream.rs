//! The byte stream of a control connection: TCP, in the open or in TLS, first blocking with deadlines and then never waiting.
//!
//! The socket remembers the first 8 bytes that came: `farbus\r\n` where TLS was expected is a peer that was started with `--plain`.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use farbus_transport::link::control::ControlStream;
use farbus_transport::link::hello::{HelloStream, MAGIC};

/// The moment by which something must be done, and how long was allowed for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    ends: Instant,
    pub(crate) allowed: Duration,
}

impl Deadline {
    pub(crate) fn after(allowed: Duration) -> Self {
        Self { ends: Instant::now() + allowed, allowed }
    }

    /// What is left of it; never zero, which sockets take for "for ever".
    pub(crate) fn left(self) -> Option<Duration> {
        let left = self.ends.saturating_duration_since(Instant::now());
        (!left.is_zero()).then(|| left.max(Duration::from_micros(1)))
    }
}

/// A socket that remembers what it heard first.
#[derive(Debug)]
pub(crate) struct Sniffed {
    socket: TcpStream,
    first: [u8; 8],
    received: usize,
}

impl Sniffed {
    pub(crate) fn new(socket: TcpStream) -> Self {
        Self { socket, first: [0; 8], received: 0 }
    }

    /// The first bytes, at most 8.
    pub(crate) fn first(&self) -> &[u8] {
        self.first.get(..self.received).unwrap_or(&self.first)
    }

    pub(crate) fn received(&self) -> usize {
        self.received
    }

    /// Whether a peer without TLS said hello.
    pub(crate) fn heard_farbus(&self) -> bool {
        self.first() == MAGIC
    }

    /// Whether a TLS record came: a handshake or an alert, of major version 3 (RFC 8446, section 5.1).
    pub(crate) fn heard_tls(&self) -> bool {
        matches!(self.first(), [0x15 | 0x16, 3, ..])
    }

    fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.socket.set_read_timeout(timeout)?;
        self.socket.set_write_timeout(timeout)
    }
}

impl Read for Sniffed {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.socket.read(into)?;
        if let Some(room) = self.first.get_mut(self.received..) {
            for (to, from) in room.iter_mut().zip(into.iter().take(count)) {
                *to = *from;
            }
        }
        self.received = self.received.saturating_add(count);
        Ok(count)
    }
}

impl Write for Sniffed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.write(bytes)
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.socket.write_vectored(pieces)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// TLS over a socket. No call reads or writes the socket more than once, so that a deadline is looked at in between.
#[derive(Debug)]
pub(crate) struct TlsStream {
    tls: rustls::Connection,
    socket: Sniffed,
    failure: Option<rustls::Error>,
}

/// Bytes that a peer whose connection is over may still have sent, and how long they may take.
const LAST_BYTES: usize = 64 << 10;
const LAST_WORDS: Duration = Duration::from_millis(300);

impl TlsStream {
    pub(crate) fn new(tls: rustls::Connection, socket: TcpStream) -> Self {
        Self { tls, socket: Sniffed::new(socket), failure: None }
    }

    /// What TLS itself found wrong, or the peer's alert.
    pub(crate) fn failure(&self) -> Option<&rustls::Error> {
        self.failure.as_ref()
    }

    pub(crate) fn sniffed(&self) -> &Sniffed {
        &self.socket
    }

    /// Goes through the handshake on a socket that blocks.
    pub(crate) fn handshake(&mut self, deadline: Deadline) -> io::Result<()> {
        loop {
            while self.tls.wants_write() {
                self.socket.set_timeout(Some(deadline.left().ok_or(ErrorKind::TimedOut)?))?;
                self.write_once()?;
            }
            if !self.tls.is_handshaking() {
                return Ok(());
            }
            self.socket.set_timeout(Some(deadline.left().ok_or(ErrorKind::TimedOut)?))?;
            match self.take() {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes the socket once.
    fn write_once(&mut self) -> io::Result<()> {
        match self.tls.write_tls(&mut self.socket)? {
            0 => Err(ErrorKind::WriteZero.into()),
            _ => Ok(()),
        }
    }

    /// Reads the socket once and hands TLS what came.
    fn take(&mut self) -> io::Result<usize> {
        let count = self.tls.read_tls(&mut self.socket)?;
        if let Err(error) = self.tls.process_new_packets() {
            // The alert that says why; a peer that does not take it finds the connection closed.
            while self.tls.wants_write() && self.write_once().is_ok() {}
            self.failure.get_or_insert_with(|| error.clone());
            return Err(io::Error::new(ErrorKind::InvalidData, error));
        }
        Ok(count)
    }

    /// Reads on after the end to find out why the peer ended it: its alert may lie behind the failure of our own write.
    pub(crate) fn hear_last_words(&mut self) {
        let deadline = Deadline::after(LAST_WORDS);
        let most = self.socket.received().saturating_add(LAST_BYTES);
        while self.failure.is_none() && self.socket.received() < most {
            let Some(left) = deadline.left() else { return };
            if self.socket.set_timeout(Some(left)).is_err() || !matches!(self.take(), Ok(1..)) {
                return;
            }
        }
    }

    /// Ends the connection so that the peer hears our alert: a socket that is closed with bytes unread sends a reset, which overtakes it.
    pub(crate) fn part(mut self) {
        let deadline = Deadline::after(LAST_WORDS);
        let most = self.socket.received().saturating_add(LAST_BYTES);
        let mut rest = [0; 4096];
        let mut ended = self.socket.socket.shutdown(Shutdown::Write).is_err();
        while !ended && self.socket.received() < most {
            let Some(left) = deadline.left() else { return };
            ended = self.socket.set_timeout(Some(left)).is_err() || !matches!(self.socket.read(&mut rest), Ok(1..));
        }
    }
}

impl Read for TlsStream {
    /// `Interrupted` where something came that is no byte of the peer's yet: half a record, a key update.
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self.tls.reader().read(into) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            read => return read,
        }
        // An answer of TLS's own may wait; whether it goes out or not must not keep us from reading.
        if self.tls.wants_write() {
            match self.write_once() {
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                _ => {}
            }
        }
        self.take()?;
        match self.tls.reader().read(into) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => Err(ErrorKind::Interrupted.into()),
            read => read,
        }
    }
}

impl Write for TlsStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // One piece at a time, so that what TLS holds stays small.
        self.flush()?;
        let count = self.tls.writer().write(bytes)?;
        match self.flush() {
            // Taken is taken.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(count),
            flushed => flushed.map(|()| count),
        }
    }

    /// `Interrupted` where the socket took a part.
    fn flush(&mut self) -> io::Result<()> {
        if self.tls.wants_write() {
            self.write_once()?;
        }
        if self.tls.wants_write() { Err(ErrorKind::Interrupted.into()) } else { Ok(()) }
    }
}

/// Either.
#[derive(Debug)]
pub(crate) enum Stream {
    Plain(Sniffed),
    Tls(Box<TlsStream>),
}

impl Stream {
    fn socket(&self) -> &Sniffed {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(tls) => &tls.socket,
        }
    }
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(into),
            Self::Tls(tls) => tls.read(into),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write(bytes),
            Self::Tls(tls) => tls.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.flush(),
            Self::Tls(tls) => tls.flush(),
        }
    }
}

impl HelloStream for Stream {
    fn set_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.socket().set_timeout(timeout)
    }
}

impl ControlStream for Stream {
    fn socket(&self) -> BorrowedFd<'_> {
        self.socket().socket.as_fd()
    }

    fn make_nonblocking(&mut self) -> io::Result<()> {
        self.socket().socket.set_nonblocking(true)
    }
}
