//! The connection beside a link's data path: whole frames in order, and the news that the peer is gone.
//!
//! An RDMA lender tells the key of a memory region in a frame, `1e 00 00 00` and then 30 bytes of grant; keys never travel on the data path.
//! A socket that ends is how a peer that died is noticed when nothing is outstanding.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;

/// Bytes of the longest frame.
pub const MAX_FRAME: usize = 4096;

/// How long a peer may leave a frame of ours in its socket.
pub const SEND_LIMIT: Duration = Duration::from_secs(5);

/// Frames that may wait to be taken; a peer that sends more is at fault.
const MAX_WAITING: usize = 4096;

/// Bytes of a frame's length, little-endian.
const PREFIX: usize = 4;

/// Why the connection beside a link is of no use any more.
#[derive(Debug, Error)]
pub enum ControlError {
    /// The peer closed it, or its host did.
    #[error("the peer closed the control connection")]
    Gone,
    /// The peer broke the framing.
    #[error("a control frame of {len} bytes is over the limit of {MAX_FRAME}")]
    TooLong {
        /// Bytes announced, or asked to be sent.
        len: usize,
    },
    /// The peer sends frames that nobody asked for.
    #[error("more than {MAX_WAITING} control frames wait")]
    Flood,
    /// The peer takes nothing.
    #[error("the peer left a control frame unread for {} s", SEND_LIMIT.as_secs())]
    Stuck,
    /// The stream's own protection found bytes that the peer did not send so, or may not send.
    #[error("the control connection carries what is not the peer's: {0}")]
    Foreign(#[source] io::Error),
    /// The host refused.
    #[error("cannot use the control connection: {0}")]
    Host(#[source] io::Error),
}

/// Frames beside the data path. One thread owns it.
pub trait Control: Send {
    /// Sends a frame whole; blocks for at most [`SEND_LIMIT`].
    ///
    /// # Errors
    /// [`ControlError`].
    fn send(&mut self, frame: &[u8]) -> Result<(), ControlError>;

    /// The next frame, if a whole one is there. Never blocks.
    ///
    /// # Errors
    /// [`ControlError`]; frames that came whole before the end are handed out first.
    fn receive(&mut self) -> Result<Option<Vec<u8>>, ControlError>;

    /// Readable when a frame may have come, and when the peer is gone. What has been read once is not announced again: after each wake-up,
    /// and before the first wait, [`Control::receive`] is called until it has nothing.
    fn fd(&self) -> BorrowedFd<'_>;
}

/// The next frame; waits until `deadline`, then there is none.
///
/// # Errors
/// [`ControlError`].
pub fn receive_by(control: &mut dyn Control, deadline: Instant) -> Result<Option<Vec<u8>>, ControlError> {
    loop {
        if let Some(frame) = control.receive()? {
            return Ok(Some(frame));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        wait(control.fd(), PollFlags::IN, left).map_err(ControlError::Host)?;
    }
}

/// A byte stream that frames can travel on: a socket, or TLS over one.
///
/// A read answers `WouldBlock` only when neither the socket nor the stream itself holds a byte more, so that whoever reads until then may
/// wait for the socket. A write that answers `Ok` has taken the bytes, also where they are not in the socket yet; `flush` brings them there.
pub trait ControlStream: Read + Write + Send {
    /// The socket underneath.
    fn socket(&self) -> BorrowedFd<'_>;

    /// Makes reads and writes answer `WouldBlock` instead of waiting.
    ///
    /// # Errors
    /// What the kernel answers.
    fn make_nonblocking(&mut self) -> io::Result<()>;
}

macro_rules! control_stream {
    ($stream:ty) => {
        impl ControlStream for $stream {
            fn socket(&self) -> BorrowedFd<'_> {
                self.as_fd()
            }

            fn make_nonblocking(&mut self) -> io::Result<()> {
                self.set_nonblocking(true)
            }
        }
    };
}
control_stream!(UnixStream);
control_stream!(TcpStream);

/// Frames over a byte stream: a length of four bytes, then that many.
#[derive(Debug)]
pub struct Framed<S> {
    stream: S,
    /// Bytes of frames that are not whole yet.
    partial: Vec<u8>,
    waiting: VecDeque<Vec<u8>>,
    ended: bool,
    /// A frame of ours may have been cut off; nothing can follow it.
    broken: bool,
}

impl<S: ControlStream> Framed<S> {
    /// Frames over `stream`, on which both sides have said hello.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn new(mut stream: S) -> io::Result<Self> {
        stream.make_nonblocking()?;
        Ok(Self { stream, partial: Vec::new(), waiting: VecDeque::new(), ended: false, broken: false })
    }

    /// The stream underneath.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// Takes what the socket has.
    fn fill(&mut self) -> Result<(), ControlError> {
        let mut chunk = [0; MAX_FRAME];
        while !self.ended && self.waiting.len() <= MAX_WAITING {
            match self.stream.read(&mut chunk) {
                Ok(0) => self.ended = true,
                Ok(count) => {
                    self.partial.extend_from_slice(chunk.get(..count).unwrap_or_default());
                    self.split()?;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if is_the_end(&error) => self.ended = true,
                Err(error) => return Err(culprit(error)),
            }
        }
        if self.waiting.len() > MAX_WAITING { Err(ControlError::Flood) } else { Ok(()) }
    }

    fn split(&mut self) -> Result<(), ControlError> {
        while let Some((len, rest)) = self.partial.split_first_chunk::<PREFIX>() {
            let len = u32::from_le_bytes(*len) as usize;
            if len > MAX_FRAME {
                return Err(ControlError::TooLong { len });
            }
            let Some(frame) = rest.get(..len) else { return Ok(()) };
            self.waiting.push_back(frame.to_vec());
            self.partial.drain(..PREFIX + len);
        }
        Ok(())
    }

    /// Writes all of `bytes` into the socket, waiting for it until `deadline`.
    fn write_all(&mut self, mut bytes: &[u8], deadline: Instant) -> Result<(), ControlError> {
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(0) => return Err(ControlError::Gone),
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(error) => self.room(error, deadline)?,
            }
        }
        // Apart from the writing: what was taken must not be written again because the socket has no room for it yet.
        while let Err(error) = self.stream.flush() {
            self.room(error, deadline)?;
        }
        Ok(())
    }

    /// Waits for room in the socket where that is all that `error` says.
    fn room(&self, error: io::Error, deadline: Instant) -> Result<(), ControlError> {
        let left = deadline.saturating_duration_since(Instant::now());
        match error.kind() {
            ErrorKind::Interrupted | ErrorKind::WouldBlock if left.is_zero() => Err(ControlError::Stuck),
            ErrorKind::Interrupted => Ok(()),
            ErrorKind::WouldBlock => wait(self.stream.socket(), PollFlags::OUT, left).map_err(ControlError::Host),
            _ if is_the_end(&error) => Err(ControlError::Gone),
            _ => Err(culprit(error)),
        }
    }
}

impl<S: ControlStream> Control for Framed<S> {
    fn send(&mut self, frame: &[u8]) -> Result<(), ControlError> {
        let Some(len) = u32::try_from(frame.len()).ok().filter(|_| frame.len() <= MAX_FRAME) else {
            return Err(ControlError::TooLong { len: frame.len() });
        };
        let mut whole = Vec::with_capacity(PREFIX + frame.len());
        whole.extend_from_slice(&len.to_le_bytes());
        whole.extend_from_slice(frame);
        if self.broken {
            return Err(ControlError::Gone);
        }
        let sent = self.write_all(&whole, Instant::now() + SEND_LIMIT);
        self.broken = sent.is_err();
        sent
    }

    fn receive(&mut self) -> Result<Option<Vec<u8>>, ControlError> {
        if let Some(frame) = self.waiting.pop_front() {
            return Ok(Some(frame));
        }
        self.fill()?;
        match self.waiting.pop_front() {
            Some(frame) => Ok(Some(frame)),
            None if self.ended => Err(ControlError::Gone),
            None => Ok(None),
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.stream.socket()
    }
}

/// Waits until the descriptor is ready, or `at_most`.
fn wait(fd: BorrowedFd<'_>, flags: PollFlags, at_most: Duration) -> io::Result<()> {
    let timeout = Timespec { tv_sec: at_most.as_secs().min(3600) as i64, tv_nsec: i64::from(at_most.subsec_nanos()) };
    match poll(&mut [PollFd::new(&fd, flags)], Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// The peer's end of the connection is closed or does not answer any more.
fn is_the_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::UnexpectedEof
            | ErrorKind::BrokenPipe
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            // What keep-alive and a host without a way to the peer end with (tcp(7)).
            | ErrorKind::TimedOut
            | ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable
            | ErrorKind::NetworkDown
    )
}

fn culprit(error: io::Error) -> ControlError {
    if error.kind() == ErrorKind::InvalidData { ControlError::Foreign(error) } else { ControlError::Host(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Framed<UnixStream>, UnixStream) {
        let (ours, peer) = UnixStream::pair().unwrap();
        (Framed::new(ours).unwrap(), peer)
    }

    #[test]
    fn frames_arrive_whole_and_in_order_however_they_are_cut() {
        let (mut ours, mut peer) = pair();
        let mut bytes = Vec::new();
        for frame in [&b"one"[..], b"", b"three"] {
            bytes.extend_from_slice(&(frame.len() as u32).to_le_bytes());
            bytes.extend_from_slice(frame);
        }
        let mut got = Vec::new();
        for byte in bytes {
            peer.write_all(&[byte]).unwrap();
            while let Some(frame) = ours.receive().unwrap() {
                got.push(frame);
            }
        }
        assert_eq!(got, [&b"one"[..], b"", b"three"]);
        drop(peer);
        assert!(matches!(ours.receive(), Err(ControlError::Gone)));
    }

    #[test]
    fn what_came_before_the_end_is_handed_out() {
        let (mut ours, peer) = pair();
        let mut peer = Framed::new(peer).unwrap();
        peer.send(b"last").unwrap();
        drop(peer);
        assert_eq!(ours.receive().unwrap().as_deref(), Some(&b"last"[..]));
        assert!(matches!(ours.receive(), Err(ControlError::Gone)));
    }

    #[test]
    fn a_frame_that_is_too_long_is_refused_on_both_sides() {
        let (mut ours, mut peer) = pair();
        assert!(matches!(ours.send(&[0; MAX_FRAME + 1]), Err(ControlError::TooLong { .. })));
        ours.send(&[7; MAX_FRAME]).unwrap();
        peer.write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(matches!(ours.receive(), Err(ControlError::TooLong { len }) if len == u32::MAX as usize));
    }

    #[test]
    fn a_peer_that_floods_is_refused() {
        let (mut ours, mut peer) = pair();
        let writer = std::thread::spawn(move || {
            for _ in 0..20_000 {
                if peer.write_all(&[0; 4]).is_err() {
                    return;
                }
            }
        });
        let outcome = loop {
            std::thread::sleep(Duration::from_millis(20));
            match ours.fill() {
                Ok(()) => {}
                Err(error) => break error,
            }
        };
        assert!(matches!(outcome, ControlError::Flood));
        drop(ours);
        writer.join().unwrap();
    }

    /// A stream that takes bytes long before they are in its socket, as TLS does; `taken` is all that was ever taken.
    struct Buffering {
        socket: UnixStream,
        taken: Vec<u8>,
        buffered: VecDeque<u8>,
    }

    impl Read for Buffering {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            self.socket.read(into)
        }
    }

    impl Write for Buffering {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let some = bytes.get(..bytes.len().min(100)).unwrap_or_default();
            self.taken.extend_from_slice(some);
            self.buffered.extend(some);
            Ok(some.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            while !self.buffered.is_empty() {
                let count = self.socket.write(self.buffered.make_contiguous())?;
                self.buffered.drain(..count);
            }
            Ok(())
        }
    }

    impl ControlStream for Buffering {
        fn socket(&self) -> BorrowedFd<'_> {
            self.socket.as_fd()
        }

        fn make_nonblocking(&mut self) -> io::Result<()> {
            self.socket.set_nonblocking(true)
        }
    }

    #[test]
    fn a_full_socket_does_not_repeat_what_the_stream_has_taken() {
        let (ours, peer) = UnixStream::pair().unwrap();
        let mut ours = Framed::new(Buffering { socket: ours, taken: Vec::new(), buffered: VecDeque::new() }).unwrap();
        let frames: Vec<Vec<u8>> = (0..400_u32).map(|n| n.to_le_bytes().repeat(250)).collect();
        let expected = frames.clone();
        let reader = std::thread::spawn(move || {
            let mut peer = Framed::new(peer).unwrap();
            for frame in expected {
                // Slower than the sender, so that its socket is full most of the time.
                std::thread::sleep(Duration::from_micros(200));
                assert_eq!(receive_by(&mut peer, Instant::now() + SEND_LIMIT).unwrap().unwrap(), frame);
            }
        });
        for frame in &frames {
            ours.send(frame).unwrap();
        }
        reader.join().unwrap();
        let whole: usize = frames.iter().map(|frame| PREFIX + frame.len()).sum();
        assert_eq!(ours.stream.taken.len(), whole);
    }

    #[test]
    fn nothing_follows_a_frame_that_was_cut_off() {
        let (mut ours, peer) = pair();
        drop(peer);
        assert!(matches!(ours.send(b"one"), Err(ControlError::Gone)));
        let (fresh, _peer) = UnixStream::pair().unwrap();
        ours.stream = fresh;
        assert!(matches!(ours.send(b"two"), Err(ControlError::Gone)), "a frame follows half a frame");
    }

    #[test]
    fn waiting_for_a_frame_ends_at_the_deadline() {
        let (mut ours, _peer) = pair();
        assert!(receive_by(&mut ours, Instant::now() + Duration::from_millis(30)).unwrap().is_none());
    }
}
