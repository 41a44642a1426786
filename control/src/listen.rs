//! The lender's side: a TCP port, who may come to it, and each visitor's way from TCP to a control connection.
//!
//! `Listener::bind(&"0.0.0.0:7000".parse()?, security).await?` accepts; each arrival is greeted on a thread of its own, where it has 5 s to show
//! a certificate that is good and to say hello. Until then it has cost a socket and a thread, and has seen the lender's certificate and no more.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use farbus_transport::link::hello::{Agreed, ExchangeError, Hello};
use farbus_transport::link::verdict::{Refusal, tell};
use rustix::io::Errno;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, ServerConfig, ServerConnection};
use rustls::sign::SingleCertAndKey;
use tokio::net::TcpListener;

use crate::address::HostPort;
use crate::allow::AllowList;
use crate::credentials::{Credentials, PROVIDER};
use crate::error::MeetError;
use crate::identity::Identity;
use crate::meet::{Acquainted, HANDSHAKE_LIMIT, Met, acquaint_plain, acquaint_tls, prepare};
use crate::stream::Deadline;
use crate::verify::BorrowerCheck;

/// Visitors on their way from TCP to the end of their hello at a time, each with a socket, and in TLS with some 100 KiB and the caller's thread. One
/// more ends the oldest: whoever means it needs milliseconds.
pub const MAX_GREETINGS: usize = 32;

/// Of these, visitors from one address (in IPv6 from one network of 2^64 addresses). One more ends the oldest from there, so that one host
/// with many strangers is in nobody's way but its own.
pub const MAX_FROM_ONE: usize = 8;

/// How long accepting waits where this process has no descriptor left.
const EXHAUSTED: Duration = Duration::from_millis(100);

/// How a lender knows its borrowers.
#[derive(Clone, Debug)]
pub enum LenderSecurity {
    /// Not at all.
    Plain {
        /// Also where others than this host can connect.
        beyond_loopback: bool,
    },
    /// By their certificates.
    Tls {
        /// What it shows, and whom it trusts.
        credentials: Credentials,
        /// Who may borrow.
        allow: AllowList,
    },
}

enum Security {
    Plain,
    Tls { credentials: Credentials, chain: Arc<dyn ClientCertVerifier>, allow: Arc<AllowList> },
}

/// A TCP port that borrowers connect to.
pub struct Listener {
    tcp: TcpListener,
    address: SocketAddr,
    security: Arc<Security>,
    greetings: Arc<Greetings>,
}

impl Listener {
    /// Listens at the first address of `at` that this host has.
    ///
    /// # Errors
    /// [`MeetError`].
    pub async fn bind(at: &HostPort, security: LenderSecurity) -> Result<Self, MeetError> {
        let host = |what, source| MeetError::Host { what, address: at.to_string(), source };
        let candidates = at.resolve().await?;
        let security = match security {
            LenderSecurity::Plain { beyond_loopback } => {
                match candidates.iter().find(|candidate| !beyond_loopback && !candidate.ip().is_loopback()) {
                    Some(&address) => return Err(MeetError::PlainBeyondLoopback { address }),
                    None => Security::Plain,
                }
            }
            LenderSecurity::Tls { credentials, allow } => {
                let chain =
                    BorrowerCheck::chain(&credentials.roots).map_err(|why| host("listen at", std::io::Error::other(why)))?;
                Security::Tls { credentials, chain, allow: Arc::new(allow) }
            }
        };
        let tcp = TcpListener::bind(candidates.as_slice()).await.map_err(|source| match source.kind() {
            ErrorKind::AddrInUse => MeetError::InUse { address: at.to_string() },
            _ => host("listen at", source),
        })?;
        let address = tcp.local_addr().map_err(|source| host("listen at", source))?;
        Ok(Self { tcp, address, security: Arc::new(security), greetings: Arc::default() })
    }

    /// Where it listens, with the port that was chosen.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits for a visitor, who has said nothing yet. Nothing is lost where the wait is given up.
    ///
    /// # Errors
    /// [`MeetError::Host`] where this port is of no use any more.
    pub async fn accept(&self) -> Result<Arrival, MeetError> {
        let failed = |source| MeetError::Host { what: "accept a borrower at", address: self.address.to_string(), source };
        loop {
            match self.tcp.accept().await {
                Ok((stream, from)) => {
                    let stream = stream.into_std().map_err(failed)?;
                    match Greetings::enter(&self.greetings, &stream, from.ip()) {
                        Ok(place) => return Ok(Arrival { stream, from, security: Arc::clone(&self.security), place }),
                        Err(error) => tracing::warn!(%error, %from, "a visitor was dropped"),
                    }
                }
                // The visitor was gone, or its network was, before it was accepted (accept(2)).
                Err(error) if is_the_visitors(&error) => tracing::debug!(%error, "a visitor left at once"),
                Err(error) if is_exhaustion(&error) => {
                    tracing::warn!(%error, "a borrower cannot be accepted yet");
                    tokio::time::sleep(EXHAUSTED).await;
                }
                Err(error) => return Err(failed(error)),
            }
        }
    }
}

fn is_the_visitors(error: &std::io::Error) -> bool {
    use ErrorKind as K;
    matches!(error.kind(), K::ConnectionAborted | K::ConnectionReset | K::HostUnreachable | K::NetworkUnreachable | K::NetworkDown)
}

fn is_exhaustion(error: &std::io::Error) -> bool {
    Errno::from_io_error(error).is_some_and(|errno| [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM].contains(&errno))
}

/// Visitors on their way, the oldest first.
#[derive(Default)]
struct Greetings(Mutex<(u64, VecDeque<Greeting>)>);

struct Greeting {
    number: u64,
    from: IpAddr,
    /// To end it: the same socket as the visitor's.
    socket: TcpStream,
}

/// One visitor's place among them, until it is dropped.
struct Place {
    greetings: Arc<Greetings>,
    number: u64,
}

impl Greetings {
    fn enter(own: &Arc<Self>, socket: &TcpStream, from: IpAddr) -> std::io::Result<Place> {
        let socket = socket.try_clone()?;
        let from = network(from);
        let mut greetings = own.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (last, waiting) = &mut *greetings;
        let from_there = waiting.iter().filter(|other| other.from == from).count();
        let in_the_way = if from_there >= MAX_FROM_ONE {
            waiting.iter().position(|other| other.from == from)
        } else {
            (waiting.len() >= MAX_GREETINGS).then_some(0)
        };
        if let Some(oldest) = in_the_way.and_then(|at| waiting.remove(at)) {
            // Its greeting hears the end of the stream; one that is at its end already is no loss.
            let _over = oldest.socket.shutdown(Shutdown::Both);
        }
        *last += 1;
        waiting.push_back(Greeting { number: *last, from, socket });
        Ok(Place { greetings: Arc::clone(own), number: *last })
    }
}

impl Place {
    /// Leaves; false where another was given it before.
    fn leave(&self) -> bool {
        let mut greetings = self.greetings.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, waiting) = &mut *greetings;
        let at = waiting.iter().position(|greeting| greeting.number == self.number);
        at.is_some_and(|at| waiting.remove(at).is_some())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
    }
}

fn network(from: IpAddr) -> IpAddr {
    match from.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}

/// A visitor who has said nothing yet. It has a place among those on their way until it is greeted or dropped.
pub struct Arrival {
    stream: TcpStream,
    from: SocketAddr,
    security: Arc<Security>,
    place: Place,
}

impl Arrival {
    /// Where it comes from.
    pub fn from(&self) -> SocketAddr {
        self.from
    }

    /// Finds out who it is and exchanges hellos with it. Blocks for at most [`HANDSHAKE_LIMIT`] and a little.
    ///
    /// # Errors
    /// [`MeetError`].
    pub fn greet(self, hello: &Hello) -> Result<Greeted, MeetError> {
        let Self { stream, from, security, place } = self;
        let greeted = greet(stream, from, &security, hello);
        // Also where it had just come to its end: its socket is shut by now.
        if place.leave() { greeted.map(Greeted) } else { Err(MeetError::Crowded) }
    }
}

fn greet(stream: TcpStream, from: SocketAddr, security: &Security, hello: &Hello) -> Result<Acquainted, MeetError> {
    let deadline = Deadline::after(HANDSHAKE_LIMIT);
    prepare(&stream).map_err(|source| MeetError::Host { what: "talk to", address: from.to_string(), source })?;
    match security {
        Security::Plain => acquaint_plain(stream, hello, deadline),
        Security::Tls { credentials, chain, allow } => {
            let check = Arc::new(BorrowerCheck::new(Arc::clone(chain), Arc::clone(allow)));
            let connection = connection(credentials, Arc::clone(&check)).map_err(MeetError::Tls)?;
            acquaint_tls(connection.into(), stream, || check.found(), hello, deadline)
        }
    }
}

/// TLS 1.3 only, a certificate demanded, and no resumption: who comes again shows it again.
fn connection(credentials: &Credentials, check: Arc<BorrowerCheck>) -> Result<ServerConnection, rustls::Error> {
    let own = Arc::new(SingleCertAndKey::from((*credentials.own).clone()));
    let mut config = ServerConfig::builder_with_provider(Arc::clone(&PROVIDER))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(check)
        .with_cert_resolver(own);
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    ServerConnection::new(Arc::new(config))
}

/// A borrower whose certificate and hello were good and who waits for the verdict.
#[derive(Debug)]
pub struct Greeted(Acquainted);

impl Greeted {
    /// What it said.
    pub fn agreed(&self) -> &Agreed {
        &self.0.agreed
    }

    /// Whose certificate it showed; `None` over plain TCP.
    pub fn peer(&self) -> Option<&Identity> {
        self.0.peer.as_ref()
    }

    /// Welcomes it: frames from here on.
    ///
    /// # Errors
    /// [`MeetError::Dropped`], [`MeetError::Hello`], [`MeetError::Control`].
    pub fn welcome(mut self) -> Result<Met, MeetError> {
        match tell(&mut self.0.stream, Ok(()), HANDSHAKE_LIMIT) {
            Err(ExchangeError::PeerClosed { .. }) => Err(MeetError::Dropped),
            Err(error) => Err(error.into()),
            Ok(()) => self.0.met(),
        }
    }

    /// Tells it why there is no link.
    ///
    /// # Errors
    /// [`MeetError::Hello`] where it does not listen any more.
    pub fn refuse(mut self, refusal: Refusal) -> Result<(), MeetError> {
        Ok(tell(&mut self.0.stream, Err(refusal), HANDSHAKE_LIMIT)?)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    /// The two ends of a visitor's connection, of which the first is the lender's.
    fn visitor() -> (TcpStream, TcpStream) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let theirs = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (listener.accept().unwrap().0, theirs)
    }

    #[test]
    fn one_more_ends_the_oldest_of_its_own_source_before_that_of_another() {
        let greetings = Arc::new(Greetings::default());
        let (ours, theirs) = visitor();
        let enter = |text: &str| Greetings::enter(&greetings, &ours, text.parse().unwrap()).unwrap();
        let first = enter("10.0.0.1");
        let other = enter("10.0.0.2");
        let _more: Vec<_> = (1..MAX_FROM_ONE).map(|_| enter("10.0.0.1")).collect();
        assert!(theirs.set_nonblocking(true).is_ok() && theirs.peek(&mut [0]).is_err(), "ended too early");
        // The same, as a socket for both families sees it.
        let mapped = enter("::ffff:10.0.0.1");
        assert_eq!(theirs.peek(&mut [0]).unwrap(), 0, "the oldest goes on");
        assert!(!first.leave() && other.leave() && mapped.leave());
    }

    #[test]
    fn networks_of_ipv6_are_one_source_each() {
        assert_eq!(network("fd00::1".parse().unwrap()), network("fd00::ffff:1".parse().unwrap()));
        assert_ne!(network("fd00::1".parse().unwrap()), network("fd00:0:0:1::1".parse().unwrap()));
        assert_ne!(network("10.0.0.1".parse().unwrap()), network("10.0.0.2".parse().unwrap()));
    }

    #[test]
    fn one_more_than_all_ends_the_oldest_and_who_left_is_not_counted() {
        let greetings = Arc::new(Greetings::default());
        let (ours, _theirs) = visitor();
        let enter = |host: usize| Greetings::enter(&greetings, &ours, Ipv4Addr::from(host as u32).into()).unwrap();
        let mut all: Vec<_> = (0..MAX_GREETINGS).map(enter).collect();
        drop(all.pop());
        let late = enter(100);
        assert!(all.first().is_some_and(Place::leave), "somebody was ended though there was room");
        let (_room, _one_more) = (enter(101), enter(102));
        assert!(!all.get(1).is_some_and(Place::leave), "the oldest is still there");
        drop((all, late));
        assert_eq!(greetings.0.lock().unwrap().1.len(), 2);
    }
}
