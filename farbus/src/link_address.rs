//! Where the two sides of a link meet, as given on the command line.
//!
//! `shm:/run/farbus/nvme0` is a unix socket through which two processes of one host share memory.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

/// A link address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkAddress {
    /// Shared memory on this host.
    Shm(PathBuf),
}

/// Why a text is no link address.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum AddressError {
    /// No scheme, or one that does not exist.
    #[error("{0:?} is no link address: use shm:PATH")]
    Scheme(String),
    /// Nothing after the colon.
    #[error("shm: needs a path, as in shm:/tmp/farbus.link")]
    NoPath,
    /// No socket can be there.
    #[error(transparent)]
    Path(#[from] PathTooLong),
}

/// No socket can be at a path that long: unix sockets have short names.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("the path is {len} bytes long; a unix socket's is at most {MAX_PATH}")]
pub struct PathTooLong {
    len: usize,
}

/// Bytes of a unix socket's path (unix(7): sun_path is 108 with its NUL).
const MAX_PATH: usize = 107;

/// The path of a socket.
///
/// # Errors
/// [`PathTooLong`].
pub fn socket_path(text: &str) -> Result<PathBuf, PathTooLong> {
    if text.len() > MAX_PATH { Err(PathTooLong { len: text.len() }) } else { Ok(text.into()) }
}

impl FromStr for LinkAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        match text.split_once(':') {
            Some(("shm", "")) => Err(AddressError::NoPath),
            Some(("shm", path)) => Ok(Self::Shm(socket_path(path)?)),
            _ => Err(AddressError::Scheme(text.to_owned())),
        }
    }
}

impl fmt::Display for LinkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shm(path) => write!(f, "shm:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_exists_is_accepted() {
        assert_eq!("shm:/tmp/a:b".parse(), Ok(LinkAddress::Shm("/tmp/a:b".into())));
        assert_eq!("shm:".parse::<LinkAddress>(), Err(AddressError::NoPath));
        assert!("rdma:host:1".parse::<LinkAddress>().is_err());
        assert!(format!("shm:/{}", "x".repeat(107)).parse::<LinkAddress>().is_err());
    }
}
