//! The steps that both sides of a connection share: TCP's options, TLS, the hellos, and what an error in one of them means.
//!
//! A borrower that is not on the list completes its half of the TLS handshake and only then, reading the lender's hello, hears the alert
//! access_denied: that is [`MeetError::Unwelcome`], not a hello that was cut off.

use std::io::{self, ErrorKind};
use std::net::TcpStream;
use std::time::Duration;

use farbus_transport::link::control::{Control, ControlError, Framed};
use farbus_transport::link::hello::{Agreed, ExchangeError, Hello, exchange};
use rustix::net::sockopt;

use crate::error::{CertificateProblem, MeetError, Unwelcome};
use crate::identity::Identity;
use crate::stream::{Deadline, Sniffed, Stream, TlsStream};
use crate::verify::Found;

/// How long a peer may take over TLS and hello together, and a lender over its verdict.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);

/// Silence after which the kernel asks whether the peer's host is there. Nothing is sent on an idle control connection, and the device
/// should be free again soon after its borrower's host has died.
pub const PROBE_AFTER: Duration = Duration::from_secs(2);
/// Between two such questions: longer than a round trip on any network that RDMA runs on, by far.
pub const PROBE_EVERY: Duration = Duration::from_secs(1);
/// Questions without an answer after which the host is dead; one lost packet, or two, are no death.
pub const PROBES: u32 = 3;
/// How long what was sent may stay unacknowledged, which the questions do not cover: as long as all of them take.
pub const UNACKNOWLEDGED: Duration = Duration::from_secs(5);

/// A control connection to a peer that said hello and was welcomed.
pub struct Met {
    /// Frames to and from it.
    pub control: Box<dyn Control>,
    /// What both agreed on.
    pub agreed: Agreed,
    /// Whose certificate it showed; `None` over plain TCP.
    pub peer: Option<Identity>,
}

impl std::fmt::Debug for Met {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Met").field("agreed", &self.agreed).field("peer", &self.peer).finish_non_exhaustive()
    }
}

/// A peer whose hello was good; the lender's verdict is not said yet.
#[derive(Debug)]
pub(crate) struct Acquainted {
    pub(crate) stream: Stream,
    pub(crate) agreed: Agreed,
    pub(crate) peer: Option<Identity>,
}

impl Acquainted {
    /// Frames from here on.
    pub(crate) fn met(self) -> Result<Met, MeetError> {
        let control = Framed::new(self.stream).map_err(ControlError::Host)?;
        Ok(Met { control: Box::new(control), agreed: self.agreed, peer: self.peer })
    }
}

/// Makes the socket one of a control connection: blocking, without delay, and noticing that the other host has died.
pub(crate) fn prepare(socket: &TcpStream) -> io::Result<()> {
    socket.set_nonblocking(false)?;
    socket.set_nodelay(true)?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, PROBE_AFTER)?;
    sockopt::set_tcp_keepintvl(socket, PROBE_EVERY)?;
    sockopt::set_tcp_keepcnt(socket, PROBES)?;
    sockopt::set_tcp_user_timeout(socket, UNACKNOWLEDGED.as_millis() as u32)?;
    Ok(())
}

/// Says hello in the open.
pub(crate) fn acquaint_plain(socket: TcpStream, hello: &Hello, deadline: Deadline) -> Result<Acquainted, MeetError> {
    let mut stream = Stream::Plain(Sniffed::new(socket));
    let agreed = say_hello(&mut stream, hello, deadline);
    match (agreed, stream) {
        (Ok(agreed), stream) => Ok(Acquainted { stream, agreed, peer: None }),
        (Err(_), Stream::Plain(socket)) if socket.heard_tls() => Err(MeetError::TlsPeer),
        (Err(error), _) => Err(error.into()),
    }
}

/// Goes through TLS and says hello in it; `found` is what the check of the peer's certificate came to.
pub(crate) fn acquaint_tls<'f>(
    connection: rustls::Connection,
    socket: TcpStream,
    found: impl Fn() -> Option<&'f Found>,
    hello: &Hello,
    deadline: Deadline,
) -> Result<Acquainted, MeetError> {
    let mut tls = TlsStream::new(connection, socket);
    if let Err(error) = tls.handshake(deadline) {
        let why = no_tls(&tls, found(), error, deadline);
        tls.part();
        return Err(why);
    }
    // Nobody is let in whom the check did not see.
    let Some(Ok(peer)) = found() else { return Err(MeetError::Certificate(CertificateProblem::Missing)) };
    let mut stream = Stream::Tls(Box::new(tls));
    let error = match say_hello(&mut stream, hello, deadline) {
        Ok(agreed) => return Ok(Acquainted { stream, agreed, peer: Some(peer.clone()) }),
        Err(error) => error,
    };
    let Stream::Tls(mut tls) = stream else { return Err(error.into()) };
    Err(last_words(&mut tls).unwrap_or_else(|| error.into()))
}

fn say_hello(stream: &mut Stream, hello: &Hello, deadline: Deadline) -> Result<Agreed, ExchangeError> {
    let left = deadline.left().ok_or(ExchangeError::Deadline { allowed: deadline.allowed })?;
    exchange(stream, hello, left).map_err(|error| match error {
        // It says what was allowed in all.
        ExchangeError::Deadline { .. } => ExchangeError::Deadline { allowed: deadline.allowed },
        other => other,
    })
}

/// What the peer's TLS said, where that is why the connection ended.
pub(crate) fn last_words(tls: &mut TlsStream) -> Option<MeetError> {
    tls.hear_last_words();
    tls.failure().map(meaning)
}

fn meaning(failure: &rustls::Error) -> MeetError {
    match failure {
        rustls::Error::AlertReceived(alert) => MeetError::Unwelcome(Unwelcome::from(*alert)),
        other => MeetError::Tls(other.clone()),
    }
}

/// Why a TLS handshake did not come to its end.
fn no_tls(tls: &TlsStream, found: Option<&Found>, error: io::Error, deadline: Deadline) -> MeetError {
    let sniffed = tls.sniffed();
    if sniffed.heard_farbus() {
        return MeetError::PlainPeer;
    }
    match tls.failure() {
        Some(rustls::Error::NoCertificatesPresented) => MeetError::Certificate(CertificateProblem::Missing),
        Some(failure @ rustls::Error::InvalidCertificate(_)) => MeetError::Certificate(match found {
            Some(Err(problem)) => problem.clone(),
            _ => CertificateProblem::Other(failure.to_string()),
        }),
        Some(rustls::Error::InvalidMessage(_)) if !sniffed.heard_tls() => MeetError::NotTls { found: sniffed.first().to_vec() },
        Some(failure) => meaning(failure),
        None => match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => MeetError::Deadline { allowed: deadline.allowed },
            ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted => {
                MeetError::Closed { received: sniffed.received() }
            }
            _ => MeetError::Control(ControlError::Host(error)),
        },
    }
}
