//! The blocking exchange of hellos over a stream socket, with one deadline for all of it.
//!
//! Both sides send their 40-byte headers at once; a borrower whose header a lender cannot accept is told so by the lender's own header
//! and never sees the device description. Descriptions follow, the borrower's first, so that two full 64 KiB cannot block each other.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use thiserror::Error;

use super::hello::{Agreed, Disagreement, HEADER_LEN, Header, Hello, HelloError, Role};
use super::{Event, State, next};
use crate::fabric::CloseReason;

/// A connected stream that can be told to stop waiting. `Interrupted` from any of its calls says that something was done, and to call again.
pub trait HelloStream: Read + Write {
    /// Makes each later read and write give up after `timeout` (`None`: never). `timeout` is not zero.
    ///
    /// # Errors
    /// Whatever the host says.
    fn set_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()>;
}

macro_rules! hello_stream {
    ($stream:ty) => {
        impl HelloStream for $stream {
            fn set_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
                self.set_read_timeout(timeout)?;
                self.set_write_timeout(timeout)
            }
        }
    };
}
hello_stream!(UnixStream);
hello_stream!(TcpStream);

/// Why no link came about.
#[derive(Debug, Error)]
pub enum ExchangeError {
    /// The peer sent something that is no hello.
    #[error("the peer's hello is malformed: {0}")]
    Malformed(HelloError),
    /// The two do not fit together.
    #[error(transparent)]
    Disagreement(#[from] Disagreement),
    /// The peer closed the connection before its hello was complete.
    #[error("the peer closed the connection after {received} of {needed} bytes of its hello")]
    PeerClosed {
        /// Bytes received.
        received: usize,
        /// Bytes of hello known to be due by then.
        needed: usize,
    },
    /// The time is over.
    #[error("no complete hello from the peer within {} ms", .allowed.as_millis())]
    Deadline {
        /// What was allowed.
        allowed: Duration,
    },
    /// What came instead of the lender's verdict.
    #[error("the peer's verdict is malformed: {found:02x?}")]
    Verdict {
        /// The bytes.
        found: [u8; 8],
    },
    /// This side's own hello cannot be sent.
    #[error("this side's hello cannot be sent: {0}")]
    Ours(HelloError),
    /// The host refused.
    #[error("cannot exchange hellos: {0}")]
    Host(#[source] io::Error),
}

impl ExchangeError {
    /// What the failure is to the table of link states.
    pub const fn event(&self) -> Event {
        match self {
            Self::Malformed(_) | Self::Verdict { .. } => Event::HelloMalformed,
            Self::Disagreement(Disagreement::Version { .. }) => Event::VersionMismatch,
            Self::Disagreement(Disagreement::SameRole(_)) => Event::HelloUnfit,
            Self::PeerClosed { .. } => Event::PeerCloses,
            Self::Deadline { .. } => Event::Deadline,
            Self::Ours(_) | Self::Host(_) => Event::Abort,
        }
    }

    /// How the link ended, by the table.
    pub const fn close_reason(&self) -> CloseReason {
        match next(State::Hello, self.event()) {
            Ok(super::Transition { action: super::Action::Report(reason), .. }) => reason,
            _ => CloseReason::Local,
        }
    }
}

/// Sends `ours`, receives the peer's hello and agrees; the link is [`State::Ready`] on return. `stream` must be blocking and is left
/// without timeouts. Takes at most `allowed` (and what the scheduler adds).
///
/// # Errors
/// [`ExchangeError`]; the stream is of no use then and should be dropped.
pub fn exchange<S: HelloStream>(stream: &mut S, ours: &Hello, allowed: Duration) -> Result<Agreed, ExchangeError> {
    let bytes = ours.encode().map_err(ExchangeError::Ours)?;
    let (our_header, our_description) = bytes.split_at(HEADER_LEN);
    let mut timed = Timed::new(stream, allowed);

    timed.send(our_header)?;
    let mut header = [0; HEADER_LEN];
    timed.receive(&mut header)?;
    let header = Header::parse(&header).map_err(ExchangeError::Malformed)?;
    let (version, features) = header.agree(ours)?;

    let mut description = vec![0; header.description_len as usize];
    match ours.role {
        Role::Borrower => {
            timed.send(our_description)?;
            timed.receive(&mut description)?;
        }
        Role::Lender => {
            timed.receive(&mut description)?;
            timed.send(our_description)?;
        }
    }
    timed.stream.set_timeout(None).map_err(ExchangeError::Host)?;
    Ok(Agreed { version, features, peer: header.with(description) })
}

/// A stream with one deadline for all that is sent and received.
pub(super) struct Timed<'a, S> {
    stream: &'a mut S,
    started: Instant,
    allowed: Duration,
    received: usize,
}

impl<'a, S: HelloStream> Timed<'a, S> {
    pub(super) fn new(stream: &'a mut S, allowed: Duration) -> Self {
        Self { stream, started: Instant::now(), allowed, received: 0 }
    }

    pub(super) fn send(&mut self, mut bytes: &[u8]) -> Result<(), ExchangeError> {
        while !bytes.is_empty() {
            self.renew()?;
            match self.stream.write(bytes) {
                Ok(0) => return Err(ExchangeError::Host(ErrorKind::WriteZero.into())),
                Ok(sent) => bytes = bytes.get(sent..).unwrap_or_default(),
                Err(error) => self.judge(error, 0)?,
            }
        }
        while let Err(error) = self.stream.flush() {
            self.judge(error, 0)?;
            self.renew()?;
        }
        Ok(())
    }

    pub(super) fn receive(&mut self, mut into: &mut [u8]) -> Result<(), ExchangeError> {
        while !into.is_empty() {
            self.renew()?;
            match self.stream.read(into) {
                Ok(0) => return Err(self.peer_closed(into.len())),
                Ok(read) => {
                    self.received += read;
                    into = into.get_mut(read..).unwrap_or_default();
                }
                Err(error) => self.judge(error, into.len())?,
            }
        }
        Ok(())
    }

    /// Sets the timeout to what is left, so that a peer that sends a byte at a time gains nothing by it.
    fn renew(&mut self) -> Result<(), ExchangeError> {
        let left = self.allowed.saturating_sub(self.started.elapsed());
        if left.is_zero() {
            return Err(ExchangeError::Deadline { allowed: self.allowed });
        }
        // The kernel keeps microseconds and takes zero for "for ever".
        let left = left.max(Duration::from_micros(1));
        self.stream.set_timeout(Some(left)).map_err(ExchangeError::Host)
    }

    fn judge(&self, error: io::Error, missing: usize) -> Result<(), ExchangeError> {
        match error.kind() {
            ErrorKind::Interrupted => Ok(()),
            ErrorKind::WouldBlock | ErrorKind::TimedOut => Err(ExchangeError::Deadline { allowed: self.allowed }),
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted | ErrorKind::UnexpectedEof => {
                Err(self.peer_closed(missing))
            }
            _ => Err(ExchangeError::Host(error)),
        }
    }

    fn peer_closed(&self, missing: usize) -> ExchangeError {
        ExchangeError::PeerClosed { received: self.received, needed: (self.received + missing).max(HEADER_LEN) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::hello::{MAX_DESCRIPTION, SPOKEN, Versions};
    use super::*;

    const SOON: Duration = Duration::from_millis(150);
    const AMPLE: Duration = Duration::from_secs(20);

    fn hello(role: Role, description: Vec<u8>) -> Hello {
        Hello { versions: SPOKEN, role, features: 0b110, epoch: 3, description }
    }

    /// What both ends make of each other.
    fn both(a: Hello, b: Hello) -> (Result<Agreed, ExchangeError>, Result<Agreed, ExchangeError>) {
        let (mut left, mut right) = UnixStream::pair().unwrap();
        let other = std::thread::spawn(move || exchange(&mut right, &b, AMPLE));
        let ours = exchange(&mut left, &a, AMPLE);
        drop(left);
        (ours, other.join().unwrap())
    }

    #[test]
    fn two_full_descriptions_pass_each_other() {
        let lender = hello(Role::Lender, vec![1; MAX_DESCRIPTION]);
        let mut borrower = hello(Role::Borrower, vec![2; MAX_DESCRIPTION]);
        borrower.features = 0b011;
        let (at_lender, at_borrower) = both(lender.clone(), borrower.clone());
        let (at_lender, at_borrower) = (at_lender.unwrap(), at_borrower.unwrap());
        assert_eq!((at_lender.version, at_lender.features, at_lender.peer), (1, 0b010, borrower));
        assert_eq!((at_borrower.version, at_borrower.features, at_borrower.peer), (1, 0b010, lender));
    }

    #[test]
    fn the_same_passes_over_tcp() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let lender = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            exchange(&mut stream, &hello(Role::Lender, vec![1; MAX_DESCRIPTION]), AMPLE).unwrap()
        });
        let mut stream = TcpStream::connect(address).unwrap();
        let agreed = exchange(&mut stream, &hello(Role::Borrower, vec![2; MAX_DESCRIPTION]), AMPLE).unwrap();
        assert_eq!(agreed.peer.description, [1; MAX_DESCRIPTION]);
        assert_eq!(lender.join().unwrap().peer.description, [2; MAX_DESCRIPTION]);
    }

    #[test]
    fn both_sides_learn_that_their_versions_differ() {
        let mut newer = hello(Role::Borrower, Vec::new());
        newer.versions = Versions::new(3, 4).unwrap();
        let (ours, theirs) = both(hello(Role::Lender, Vec::new()), newer);
        let (ours, theirs) = (ours.unwrap_err(), theirs.unwrap_err());
        assert_eq!(ours.to_string(), "peer speaks versions 3 to 4, this side 1 to 1");
        assert_eq!(theirs.to_string(), "peer speaks versions 1 to 1, this side 3 to 4");
        assert_eq!(ours.close_reason(), CloseReason::Protocol("no version in common"));
    }

    #[test]
    fn two_lenders_are_told_so() {
        let (ours, theirs) = both(hello(Role::Lender, Vec::new()), hello(Role::Lender, Vec::new()));
        assert_eq!(ours.unwrap_err().to_string(), "both sides are the lender");
        assert_eq!(theirs.unwrap_err().to_string(), "both sides are the lender");
    }

    #[test]
    fn a_peer_that_closes_mid_hello_is_named_with_what_it_sent() {
        for sent in [0, 1, 39, 40, 43] {
            let (mut left, mut right) = UnixStream::pair().unwrap();
            let bytes = hello(Role::Borrower, b"abcd".to_vec()).encode().unwrap();
            right.write_all(&bytes[..sent]).unwrap();
            drop(right);
            let error = exchange(&mut left, &hello(Role::Lender, Vec::new()), AMPLE).unwrap_err();
            assert_eq!(error.close_reason(), CloseReason::PeerClosed, "{sent}: {error}");
            let ExchangeError::PeerClosed { received, needed } = error else { panic!("{sent}: {error}") };
            // A peer that is gone before our own header was written may be noticed by the write.
            assert!(received == sent || received == 0, "{sent}: {received}");
            assert!(needed > received);
        }
    }

    #[test]
    fn a_silent_peer_and_one_that_dribbles_meet_one_deadline() {
        let (mut left, _silent) = UnixStream::pair().unwrap();
        let started = Instant::now();
        let error = exchange(&mut left, &hello(Role::Lender, Vec::new()), SOON).unwrap_err();
        assert!(matches!(error, ExchangeError::Deadline { allowed } if allowed == SOON), "{error}");
        assert!(started.elapsed() >= SOON);

        let (mut left, mut dribbling) = UnixStream::pair().unwrap();
        let dribble = std::thread::spawn(move || {
            let bytes = hello(Role::Borrower, Vec::new()).encode().unwrap();
            for byte in bytes {
                std::thread::sleep(SOON / 5);
                if dribbling.write_all(&[byte]).is_err() {
                    return true;
                }
            }
            false
        });
        let error = exchange(&mut left, &hello(Role::Lender, Vec::new()), SOON).unwrap_err();
        assert!(matches!(error, ExchangeError::Deadline { .. }), "{error}");
        drop(left);
        assert!(dribble.join().unwrap(), "the dribbling peer got to the end of its hello");
    }

    #[test]
    fn a_stranger_is_shown_nothing_of_the_device() {
        let (mut left, mut right) = UnixStream::pair().unwrap();
        right.write_all(b"GET / HTTP/1.1\r\nHost: example.org\r\nAccept: */*\r\n\r\n").unwrap();
        let error = exchange(&mut left, &hello(Role::Lender, b"secret".to_vec()), AMPLE).unwrap_err();
        assert!(matches!(error, ExchangeError::Malformed(HelloError::Magic { .. })), "{error}");
        drop(left);
        let mut seen = Vec::new();
        // The stream ends with a reset, because our side dropped it with bytes unread.
        let _reset = right.read_to_end(&mut seen);
        assert_eq!(seen.len(), HEADER_LEN);
    }
}
