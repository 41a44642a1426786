//! Where a lender listens: a host by name or address, and a TCP port.
//!
//! `nas.example.org:7000`, `10.0.0.7:7000` and `[fd00::7]:7000` are such places; an IPv6 address needs its brackets.

use std::fmt;
use std::net::{Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use thiserror::Error;
use tokio::net::lookup_host;
use tokio::time::timeout;

use crate::error::MeetError;

/// How long a name may take to become addresses: a resolver's first try (5 s, resolv.conf(5)) and a little.
pub const RESOLVE_LIMIT: Duration = Duration::from_secs(6);

/// Bytes of the longest host name (RFC 1035, section 2.3.4).
const MAX_HOST: usize = 253;

/// A host and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    /// A name or an address, without brackets.
    pub host: String,
    /// The TCP port; 0 only to listen at whichever is free.
    pub port: u16,
}

/// Why a text is no host and port.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum HostPortError {
    /// Nothing after the host.
    #[error("{0:?} has no port: use HOST:PORT, as in 10.0.0.7:7000")]
    NoPort(String),
    /// An IPv6 address in the open.
    #[error("{0:?}: an IPv6 address needs brackets, as in [fd00::7]:7000")]
    Brackets(String),
    /// What is in brackets is no IPv6 address.
    #[error("{0:?} is no IPv6 address")]
    NotV6(String),
    /// No name that a host could have.
    #[error("{0:?} is no host: use a name or an address of letters, digits, '.', '-' and '_'")]
    Host(String),
    /// The port.
    #[error("{0:?} is no port: use 1 to 65535")]
    Port(String),
}

impl FromStr for HostPort {
    type Err = HostPortError;

    fn from_str(text: &str) -> Result<Self, HostPortError> {
        let no_port = || HostPortError::NoPort(text.to_owned());
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (host, rest) = rest.split_once(']').ok_or_else(|| HostPortError::NotV6(text.to_owned()))?;
                host.parse::<Ipv6Addr>().map_err(|_| HostPortError::NotV6(host.to_owned()))?;
                (host, rest.strip_prefix(':').ok_or_else(no_port)?)
            }
            None => {
                let (host, port) = text.rsplit_once(':').ok_or_else(no_port)?;
                if host.contains(':') {
                    return Err(HostPortError::Brackets(text.to_owned()));
                }
                let good = host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte));
                if !good || host.is_empty() || host.len() > MAX_HOST {
                    return Err(HostPortError::Host(host.to_owned()));
                }
                (host, port)
            }
        };
        // `+7` would parse too.
        let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        let number = port.parse().ok().filter(|_| digits).ok_or_else(|| HostPortError::Port(port.to_owned()))?;
        Ok(Self { host: host.to_owned(), port: number })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') { write!(f, "[{}]:{}", self.host, self.port) } else { write!(f, "{}:{}", self.host, self.port) }
    }
}

impl HostPort {
    /// The addresses behind it, at least one.
    ///
    /// # Errors
    /// [`MeetError::Resolve`], [`MeetError::ResolveLimit`].
    pub(crate) async fn resolve(&self) -> Result<Vec<SocketAddr>, MeetError> {
        let host = || self.host.clone();
        let resolved = timeout(RESOLVE_LIMIT, lookup_host((self.host.as_str(), self.port))).await;
        let found: Vec<_> = match resolved {
            Err(_) => return Err(MeetError::ResolveLimit { host: host() }),
            Ok(Err(source)) => return Err(MeetError::Resolve { host: host(), source }),
            Ok(Ok(found)) => found.collect(),
        };
        if found.is_empty() {
            return Err(MeetError::Resolve { host: host(), source: std::io::Error::other("it has no address") });
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for text in ["nas:7000", "nas.example.org:1", "10.0.0.7:65535", "[fd00::7]:7000", "[::1]:0", "under_score:80"] {
            assert_eq!(text.parse::<HostPort>().unwrap().to_string(), text);
        }
        assert_eq!("[::1]:7000".parse::<HostPort>().unwrap().host, "::1");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let refused = |text: &str| text.parse::<HostPort>().unwrap_err();
        assert!(matches!(refused("nas"), HostPortError::NoPort(_)));
        assert!(matches!(refused("[::1]"), HostPortError::NoPort(_)));
        assert!(matches!(refused("[::1]7000"), HostPortError::NoPort(_)));
        assert!(matches!(refused("fd00::7:7000"), HostPortError::Brackets(_)));
        assert!(matches!(refused("[nas]:7000"), HostPortError::NotV6(_)));
        assert!(matches!(refused("[::1:7000"), HostPortError::NotV6(_)));
        for host in [":7000", "a b:7000", "a/b:7000", &format!("{}:1", "x".repeat(254))] {
            assert!(matches!(refused(host), HostPortError::Host(_)), "{host}");
        }
        for port in ["nas:", "nas:65536", "nas:-1", "nas:+1", "nas:http", "nas: 1"] {
            assert!(matches!(refused(port), HostPortError::Port(_)), "{port}");
        }
    }
}
