//! Why two hosts do not meet, sorted by culprit: the peer, what this side was told to do, the network, this host.
//!
//! A borrower whose certificate ran out yesterday is [`MeetError::Certificate`] at the lender, "the peer's certificate expired at …", and
//! [`MeetError::Unwelcome`] at the borrower, which hears it as a TLS alert.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use farbus_transport::link::control::ControlError;
use farbus_transport::link::hello::{ExchangeError, Role};
use farbus_transport::link::verdict::Refusal;
use rustls::{AlertDescription, CertificateError};
use thiserror::Error;

use crate::address::RESOLVE_LIMIT;
use crate::allow::AllowError;
use crate::certificate::{Certificate, Untimely};
use crate::identity::{Identity, Name};
use crate::listen::{MAX_FROM_ONE, MAX_GREETINGS};

/// Why there is no control connection.
#[derive(Debug, Error)]
pub enum MeetError {
    // The peer, or whoever is in its place.
    /// This side does not take its certificate.
    #[error("the peer's certificate {0}")]
    Certificate(#[source] CertificateProblem),
    /// It does not take this side's certificate.
    #[error("the peer does not take this side's certificate: {0}")]
    Unwelcome(#[source] Unwelcome),
    /// It speaks plain TCP where TLS is demanded.
    #[error("the peer speaks plain TCP, this side TLS")]
    PlainPeer,
    /// It speaks TLS where plain TCP is expected.
    #[error("the peer speaks TLS, this side plain TCP")]
    TlsPeer,
    /// It speaks something else.
    #[error("the peer speaks no TLS: its first bytes are {found:02x?}")]
    NotTls {
        /// The first bytes.
        found: Vec<u8>,
    },
    /// It breaks TLS, or its TLS and this side's have nothing in common.
    #[error("no TLS 1.3 with the peer: {0}")]
    Tls(#[source] rustls::Error),
    /// It is too slow.
    #[error("the peer did not complete the TLS handshake within {} s", .allowed.as_secs_f32())]
    Deadline {
        /// What was allowed.
        allowed: Duration,
    },
    /// It was too slow for the crowd.
    #[error("the peer had not said enough when {MAX_GREETINGS} others came, or {MAX_FROM_ONE} from where it is")]
    Crowded,
    /// It left.
    #[error("the peer closed the connection during the TLS handshake, after {received} bytes")]
    Closed {
        /// Bytes received.
        received: usize,
    },
    /// Its hello, or its verdict, is not good.
    #[error(transparent)]
    Hello(#[from] ExchangeError),
    /// The lender's verdict.
    #[error("no link: {0}")]
    Refused(#[source] Refusal),
    /// The peer left after its hello, without a verdict.
    #[error("the peer gave no link after its hello")]
    Dropped,

    // What this side was told to do.
    /// A name that no certificate could be for.
    #[error("{host:?} is no name of a host that a certificate could be for")]
    HostName {
        /// The name.
        host: String,
    },
    /// Plain TCP is for one host's own use.
    #[error("{address} is not on this host's loopback, and plain TCP protects nothing")]
    PlainBeyondLoopback {
        /// The address.
        address: SocketAddr,
    },

    // The network, or nobody there.
    /// Nobody listens.
    #[error("nobody listens at {address}")]
    NobodyThere {
        /// The address.
        address: SocketAddr,
    },
    /// No answer.
    #[error("{address} does not answer within {} s", .allowed.as_secs_f32())]
    NoAnswer {
        /// The address.
        address: SocketAddr,
        /// What was allowed.
        allowed: Duration,
    },
    /// The name is not known.
    #[error("cannot find the address of {host}: {source}")]
    Resolve {
        /// The name.
        host: String,
        /// What the resolver answered.
        source: io::Error,
    },
    /// The resolver does not answer.
    #[error("no address of {host} within {} s", RESOLVE_LIMIT.as_secs())]
    ResolveLimit {
        /// The name.
        host: String,
    },

    // This host.
    /// Another process listens there.
    #[error("{address} is in use by another process")]
    InUse {
        /// The address.
        address: String,
    },
    /// The host refused.
    #[error("cannot {what} {address}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// Where.
        address: String,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The connection cannot be used.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// What is wrong with the peer's certificate.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum CertificateProblem {
    /// There is none.
    #[error("is missing: it showed none")]
    Missing,
    /// Nobody whom this side trusts signed it.
    #[error("was not signed by the authority that this side trusts (it says {issuer:?})")]
    UnknownAuthority {
        /// Who signed it by its own word.
        issuer: String,
    },
    /// It is not valid now.
    #[error("{0}")]
    Untimely(Untimely),
    /// It says whose it is, and that one may not be the other end of this link.
    #[error("is one of a {found}, not of a {expected}")]
    Role {
        /// What it must be.
        expected: Role,
        /// What it is.
        found: Role,
    },
    /// It does not say whose it is.
    #[error("names no {expected}: its subject is {subject:?}")]
    Unnamed {
        /// What it must name.
        expected: Role,
        /// Whose it is in words.
        subject: String,
    },
    /// It is a borrower's who may not borrow.
    #[error("is that of {name}, who is not on the list of those who may borrow")]
    NotAllowed {
        /// Its name.
        name: Name,
    },
    /// It is another lender's than the one that was asked for.
    #[error("is that of {found}, not of {expected}")]
    OtherPeer {
        /// Who was asked for.
        expected: Name,
        /// Who it is.
        found: Name,
    },
    /// It is another host's.
    #[error("is not for {host}, but for {}", list(.addresses))]
    OtherHost {
        /// The host that was asked for.
        host: String,
        /// The hosts it is for.
        addresses: Vec<String>,
    },
    /// Whether it may borrow cannot be told.
    #[error("is that of {name}, and the list of those who may borrow cannot be read: {why}")]
    NoList {
        /// Its name.
        name: Name,
        /// Why not.
        why: String,
    },
    /// Anything else.
    #[error("is not acceptable: {0}")]
    Other(String),
}

fn list(addresses: &[String]) -> String {
    if addresses.is_empty() { "no host at all".to_owned() } else { addresses.join(", ") }
}

impl CertificateProblem {
    /// What TLS's own check found.
    pub(crate) fn found(error: &rustls::Error, certificate: &Certificate, expected: Role) -> Self {
        use CertificateError as E;
        let rustls::Error::InvalidCertificate(problem) = error else { return Self::Other(error.to_string()) };
        match problem {
            // The second: an authority of the same name, and another key.
            E::UnknownIssuer | E::BadSignature => Self::UnknownAuthority { issuer: certificate.issuer.clone() },
            E::Expired | E::ExpiredContext { .. } => Self::Untimely(Untimely::Expired { since: certificate.validity.until }),
            E::NotValidYet | E::NotValidYetContext { .. } => {
                Self::Untimely(Untimely::NotYetValid { from: certificate.validity.from })
            }
            E::InvalidPurpose | E::InvalidPurposeContext { .. } => match Self::role(certificate, expected) {
                Err(problem) => problem,
                Ok(_) => Self::Other(problem.to_string()),
            },
            other => Self::Other(other.to_string()),
        }
    }

    /// Whose a certificate is, where that may be an `expected`.
    pub(crate) fn role(certificate: &Certificate, expected: Role) -> Result<Identity, Self> {
        match &certificate.identity {
            Some(identity) if identity.role == expected => Ok(identity.clone()),
            Some(identity) => Err(Self::Role { expected, found: identity.role }),
            None => Err(Self::Unnamed { expected, subject: certificate.subject.clone() }),
        }
    }

    pub(crate) fn no_list(name: Name, why: &AllowError) -> Self {
        Self::NoList { name, why: why.to_string() }
    }
}

/// Why a peer does not take this side's certificate, as far as it says so (RFC 8446, section 6.2).
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Unwelcome {
    /// It trusts another authority.
    #[error("it does not know the authority that signed it")]
    UnknownAuthority,
    /// By its clock.
    #[error("it is not valid, by the peer's clock")]
    Untimely,
    /// It knows who this is, and that is not enough.
    #[error("its name is not one that the peer allows")]
    NotAllowed,
    /// A lender's where a borrower's is needed, or the other way round.
    #[error("it is for another role")]
    Role,
    /// It is none.
    #[error("it demands one")]
    Missing,
    /// Its names, or its form.
    #[error("it is not for this host, or malformed")]
    Bad,
    /// Another alert.
    #[error("it ends TLS with alert {0}")]
    Alert(u8),
}

impl From<AlertDescription> for Unwelcome {
    fn from(alert: AlertDescription) -> Self {
        use AlertDescription as A;
        match alert {
            A::UnknownCA => Self::UnknownAuthority,
            A::CertificateExpired => Self::Untimely,
            A::AccessDenied => Self::NotAllowed,
            A::UnsupportedCertificate => Self::Role,
            A::CertificateRequired => Self::Missing,
            A::BadCertificate | A::CertificateUnknown => Self::Bad,
            // A signature that does not fit: an authority of the same name and another key.
            A::DecryptError => Self::UnknownAuthority,
            other => Self::Alert(u8::from(other)),
        }
    }
}
