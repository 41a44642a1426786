//! The lender's side: a TCP port, who may come to it, and each visitor's way from TCP to a control connection.
//!
//! `Listener::bind(&"0.0.0.0:7000".parse()?, security).await?` accepts; each arrival is greeted on a thread of its own, where it has 5 s to show
//! a certificate that is good and to say hello. Until then it has cost a socket and a thread, and has seen the lender's certificate and no more.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use farbus_transport::link::hello::{Agreed, ExchangeError, Hello};
use farbus_transport::link::verdict::{Refusal, tell};
use rustix::io::Errno;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, ServerConfig, ServerConnection};
use rustls::sign::SingleCertAndKey;
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::address::HostPort;
use crate::allow::AllowList;
use crate::credentials::{Credentials, PROVIDER};
use crate::error::MeetError;
use crate::identity::Identity;
use crate::meet::{Acquainted, HANDSHAKE_LIMIT, Met, acquaint_plain, acquaint_tls, prepare};
use crate::stream::Deadline;
use crate::verify::BorrowerCheck;

/// Visitors that may be on their way at a time; more wait in the socket's queue. Each costs a thread, and some 100 KiB in TLS.
pub const MAX_GREETINGS: usize = 32;

/// Of these, visitors from one address (from one network of 2^64 addresses in IPv6); more are dropped, so that one host cannot keep all others
/// out. A good one is done in milliseconds.
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
    greetings: Arc<Semaphore>,
    sources: Arc<Sources>,
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
        let greetings = Arc::new(Semaphore::new(MAX_GREETINGS));
        Ok(Self { tcp, address, security: Arc::new(security), greetings, sources: Arc::default() })
    }

    /// Where it listens, with the port that was chosen.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits for a visitor, who has said nothing yet, and for room for it. Nothing is lost where the wait is given up.
    ///
    /// # Errors
    /// [`MeetError::Host`] where this port is of no use any more.
    pub async fn accept(&self) -> Result<Arrival, MeetError> {
        let failed = |source| MeetError::Host { what: "accept a borrower at", address: self.address.to_string(), source };
        let room = Arc::clone(&self.greetings).acquire_owned().await;
        // The semaphore lives as long as this and is never closed.
        let room = room.map_err(|closed| failed(std::io::Error::other(closed)))?;
        loop {
            match self.tcp.accept().await {
                Ok((stream, from)) => match self.sources.enter(from.ip()) {
                    Some(place) => {
                        let stream = stream.into_std().map_err(failed)?;
                        return Ok(Arrival { stream, from, security: Arc::clone(&self.security), _place: place, _room: room });
                    }
                    None => tracing::warn!(%from, "a visitor was dropped: {MAX_FROM_ONE} from there are being greeted"),
                },
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

/// Visitors on their way, by where they come from.
#[derive(Default)]
struct Sources(Mutex<HashMap<IpAddr, usize>>);

/// One visitor's place among those of its source, until it is dropped.
struct Place {
    sources: Arc<Sources>,
    from: IpAddr,
}

impl Sources {
    fn enter(self: &Arc<Self>, from: IpAddr) -> Option<Place> {
        let from = network(from);
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(from).or_default();
        if *count >= MAX_FROM_ONE {
            return None;
        }
        *count += 1;
        Some(Place { sources: Arc::clone(self), from })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.sources.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.from) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.from);
            }
        }
    }
}

fn network(from: IpAddr) -> IpAddr {
    match from.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}

/// A visitor who has said nothing yet. It keeps its room until it is greeted or dropped.
pub struct Arrival {
    stream: TcpStream,
    from: SocketAddr,
    security: Arc<Security>,
    _place: Place,
    _room: OwnedSemaphorePermit,
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
        let deadline = Deadline::after(HANDSHAKE_LIMIT);
        let host = |source| MeetError::Host { what: "talk to", address: self.from.to_string(), source };
        prepare(&self.stream).map_err(host)?;
        let acquainted = match &*self.security {
            Security::Plain => acquaint_plain(self.stream, hello, deadline)?,
            Security::Tls { credentials, chain, allow } => {
                let check = Arc::new(BorrowerCheck::new(Arc::clone(chain), Arc::clone(allow)));
                let connection = connection(credentials, Arc::clone(&check)).map_err(MeetError::Tls)?;
                acquaint_tls(connection.into(), self.stream, || check.found(), hello, deadline)?
            }
        };
        Ok(Greeted(acquainted))
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
    use super::*;

    #[test]
    fn one_source_has_some_places_and_gets_them_back() {
        let sources = Arc::new(Sources::default());
        let enter = |text: &str| sources.enter(text.parse().unwrap());
        let mut held: Vec<_> = (0..MAX_FROM_ONE).map(|_| enter("10.0.0.1").unwrap()).collect();
        assert!(enter("10.0.0.1").is_none() && enter("::ffff:10.0.0.1").is_none() && enter("10.0.0.2").is_some());
        held.pop();
        assert!(enter("10.0.0.1").is_some(), "its place, which it gave back at once");
        let _v6: Vec<_> = (0..MAX_FROM_ONE).map(|host| enter(&format!("fd00::{host:x}")).unwrap()).collect();
        assert!(enter("fd00::ffff").is_none() && enter("fd00:0:0:1::1").is_some());
        drop(held);
        assert_eq!(sources.0.lock().unwrap().len(), 1, "who left is still counted");
    }
}
