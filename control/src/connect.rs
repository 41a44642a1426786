//! The borrower's side: finding the lender, making sure that it is the right one, and its verdict.
//!
//! `connect(&"nas:7000".parse()?, &security).await?.greet(&hello)?` is a control connection to the lender whose certificate is one for the host nas.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use farbus_transport::link::hello::{ExchangeError, Hello};
use farbus_transport::link::verdict::hear;
use rustls::client::{ClientConfig, ClientConnection, Resumption};
use rustls::pki_types::ServerName;
use rustls::sign::SingleCertAndKey;
use tokio::time::timeout;

use crate::address::HostPort;
use crate::credentials::{Credentials, PROVIDER};
use crate::error::MeetError;
use crate::identity::Name;
use crate::meet::{HANDSHAKE_LIMIT, Met, acquaint_plain, acquaint_tls, last_words, prepare};
use crate::stream::{Deadline, Stream};
use crate::verify::{LenderCheck, WantedLender};

/// How long each of a lender's addresses may take to accept: a lost packet is sent again after 1 s, and once more after 3 s (RFC 6298).
pub const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// How a borrower knows its lender.
#[derive(Clone, Debug)]
pub enum BorrowerSecurity {
    /// Not at all.
    Plain {
        /// Also on other hosts than this one.
        beyond_loopback: bool,
    },
    /// By its certificate.
    Tls {
        /// What it shows, and whom it trusts.
        credentials: Credentials,
        /// The lender's name; `None` for whichever lender's certificate is for the host that is connected to.
        peer: Option<Name>,
    },
}

/// A TCP connection to a lender, on which nothing was said yet.
#[derive(Debug)]
pub struct Dialled {
    stream: TcpStream,
    to: SocketAddr,
    host: String,
    security: BorrowerSecurity,
}

/// Connects to the first address of `to` that answers.
///
/// # Errors
/// [`MeetError`]; where several addresses do not answer, the last one's.
pub async fn connect(to: &HostPort, security: &BorrowerSecurity) -> Result<Dialled, MeetError> {
    let mut last = None;
    for address in to.resolve().await? {
        if let BorrowerSecurity::Plain { beyond_loopback: false } = security
            && !address.ip().is_loopback()
        {
            return Err(MeetError::PlainBeyondLoopback { address });
        }
        match dial(address).await {
            Ok(stream) => return Ok(Dialled { stream, to: address, host: to.host.clone(), security: security.clone() }),
            Err(error) => last = Some(error),
        }
    }
    // A name without an address is an error of its own.
    Err(last.unwrap_or_else(|| MeetError::ResolveLimit { host: to.host.clone() }))
}

async fn dial(address: SocketAddr) -> Result<TcpStream, MeetError> {
    let no_answer = || MeetError::NoAnswer { address, allowed: CONNECT_LIMIT };
    let host = |source| MeetError::Host { what: "connect to", address: address.to_string(), source };
    let stream = match timeout(CONNECT_LIMIT, tokio::net::TcpStream::connect(address)).await {
        Err(_) => return Err(no_answer()),
        Ok(Err(error)) => {
            return Err(match error.kind() {
                ErrorKind::ConnectionRefused => MeetError::NobodyThere { address },
                ErrorKind::TimedOut => no_answer(),
                _ => host(error),
            });
        }
        Ok(Ok(stream)) => stream,
    };
    stream.into_std().and_then(|stream| prepare(&stream).map(|()| stream)).map_err(host)
}

impl Dialled {
    /// Where it goes.
    pub fn to(&self) -> SocketAddr {
        self.to
    }

    /// Makes sure who is there, exchanges hellos and waits for the verdict. Blocks for at most
    /// twice [`HANDSHAKE_LIMIT`] and a little.
    ///
    /// # Errors
    /// [`MeetError`].
    pub fn greet(self, hello: &Hello) -> Result<Met, MeetError> {
        let deadline = Deadline::after(HANDSHAKE_LIMIT);
        let mut acquainted = match self.security {
            BorrowerSecurity::Plain { .. } => acquaint_plain(self.stream, hello, deadline)?,
            BorrowerSecurity::Tls { credentials, peer } => {
                let wanted = match peer {
                    Some(name) => WantedLender::Named(name),
                    None => {
                        let host = ServerName::try_from(self.host.as_str()).map(|name| name.to_owned());
                        WantedLender::Host(host.map_err(|_| MeetError::HostName { host: self.host.clone() })?)
                    }
                };
                let check = Arc::new(LenderCheck::new(Arc::clone(&credentials.roots), wanted));
                let connection = connection(&credentials, Arc::clone(&check), self.to).map_err(MeetError::Tls)?;
                acquaint_tls(connection.into(), self.stream, || check.found(), hello, deadline)?
            }
        };
        match hear(&mut acquainted.stream, HANDSHAKE_LIMIT) {
            Ok(Ok(())) => acquainted.met(),
            Ok(Err(refusal)) => Err(MeetError::Refused(refusal)),
            Err(error) => {
                let told = match &mut acquainted.stream {
                    Stream::Tls(tls) => last_words(tls),
                    Stream::Plain(_) => None,
                };
                Err(told.unwrap_or_else(|| match error {
                    ExchangeError::PeerClosed { .. } => MeetError::Dropped,
                    other => other.into(),
                }))
            }
        }
    }
}

/// TLS 1.3 only, no resumption, and nothing in the open about whom this side wants.
fn connection(credentials: &Credentials, check: Arc<LenderCheck>, to: SocketAddr) -> Result<ClientConnection, rustls::Error> {
    let own = Arc::new(SingleCertAndKey::from((*credentials.own).clone()));
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&PROVIDER))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(check)
        .with_client_cert_resolver(own);
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    ClientConnection::new(Arc::new(config), ServerName::from(to.ip()))
}
