//! Where the two sides of a link meet, as given on the command line.
//!
//! `shm:/run/farbus/nvme0` is a unix socket through which two processes of one host share memory; `rdma:nas:7000,dev=mlx5_0,gid=3` is TCP port
//! 7000 of host nas, over which a queue pair of device mlx5_0 is agreed on.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use farbus_control::HostPort;
use farbus_control::address::HostPortError;
use thiserror::Error;

/// A link address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkAddress {
    /// Shared memory on this host.
    Shm(PathBuf),
    /// A queue pair with another host.
    Rdma(RdmaAddress),
}

/// Where a queue pair is agreed on, and which device of this host it is to use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RdmaAddress {
    /// The lender's host and TCP port.
    pub meet: HostPort,
    /// The RDMA device of this side; without it, the only one with an active port.
    pub device: Option<String>,
    /// Its port, from 1.
    pub port: Option<u8>,
    /// The index of the port's address (GID).
    pub gid: Option<u32>,
}

/// Why a text is no link address.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum AddressError {
    /// No scheme, or one that does not exist.
    #[error("{0:?} is no link address: use shm:PATH or rdma:HOST:PORT[,dev=NAME][,port=N][,gid=N]")]
    Scheme(String),
    /// Nothing after the colon.
    #[error("shm: needs a path, as in shm:/tmp/farbus.link")]
    NoPath,
    /// No socket can be there.
    #[error(transparent)]
    Path(#[from] PathTooLong),
    /// Host or port.
    #[error("rdma: needs a host and a TCP port, as in rdma:nas:7000,dev=mlx5_0: {0}")]
    Meet(#[from] HostPortError),
    /// The port by which a lender asks for any that is free.
    #[error("nobody can be reached at port 0: name the port that `farbus lend` says it listens at")]
    PortZero,
    /// An option that does not exist.
    #[error("{0:?} is no option of an rdma: address: there are dev=NAME, port=N and gid=N")]
    Option(String),
    /// An option that is there already.
    #[error("{0}= is given twice")]
    Twice(&'static str),
    /// A value that cannot be.
    #[error("{name}={value:?}: {wanted}")]
    Value {
        /// The option.
        name: &'static str,
        /// What it was given.
        value: String,
        /// What it takes.
        wanted: &'static str,
    },
}

/// No socket can be at a path that long: unix sockets have short names.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("the path is {len} bytes long; a unix socket's is at most {MAX_PATH}")]
pub struct PathTooLong {
    len: usize,
}

/// Bytes of a unix socket's path (unix(7): sun_path is 108 with its NUL).
const MAX_PATH: usize = 107;
/// Bytes of an RDMA device's name (verbs.h, IBV_SYSFS_NAME_MAX with its NUL).
const MAX_DEVICE: usize = 63;

/// The path of a socket.
///
/// # Errors
/// [`PathTooLong`].
pub fn socket_path(text: &str) -> Result<PathBuf, PathTooLong> {
    if text.len() > MAX_PATH { Err(PathTooLong { len: text.len() }) } else { Ok(text.into()) }
}

/// Where a lender is: an address that can be connected to.
///
/// # Errors
/// [`AddressError`].
pub fn lender_address(text: &str) -> Result<LinkAddress, AddressError> {
    match text.parse()? {
        LinkAddress::Rdma(address) if address.meet.port == 0 => Err(AddressError::PortZero),
        address => Ok(address),
    }
}

impl FromStr for LinkAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        match text.split_once(':') {
            Some(("shm", "")) => Err(AddressError::NoPath),
            Some(("shm", path)) => Ok(Self::Shm(socket_path(path)?)),
            Some(("rdma", rest)) => rest.parse().map(Self::Rdma),
            _ => Err(AddressError::Scheme(text.to_owned())),
        }
    }
}

impl FromStr for RdmaAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let mut parts = text.split(',');
        let meet = parts.next().unwrap_or_default().parse()?;
        let mut address = Self { meet, device: None, port: None, gid: None };
        for part in parts {
            match part.split_once('=') {
                Some(("dev", name)) => once("dev", &mut address.device, device(name)?)?,
                Some(("port", value)) => {
                    let port = value.parse().ok().filter(|&port| port > 0);
                    once("port", &mut address.port, port.ok_or_else(|| wrong("port", value, "a device's ports are 1 to 255"))?)?;
                }
                Some(("gid", value)) => {
                    let gid = value.parse().ok();
                    once("gid", &mut address.gid, gid.ok_or_else(|| wrong("gid", value, "it is an index, counted from 0"))?)?;
                }
                _ => return Err(AddressError::Option(part.to_owned())),
            }
        }
        Ok(address)
    }
}

fn once<T>(name: &'static str, place: &mut Option<T>, value: T) -> Result<(), AddressError> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(AddressError::Twice(name)),
    }
}

fn device(name: &str) -> Result<String, AddressError> {
    let good = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte));
    if good && !name.is_empty() && name.len() <= MAX_DEVICE {
        Ok(name.to_owned())
    } else {
        Err(wrong("dev", name, "`farbus devices` names those that there are"))
    }
}

fn wrong(name: &'static str, value: &str, wanted: &'static str) -> AddressError {
    AddressError::Value { name, value: value.to_owned(), wanted }
}

impl fmt::Display for LinkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shm(path) => write!(f, "shm:{}", path.display()),
            Self::Rdma(address) => address.fmt(f),
        }
    }
}

impl fmt::Display for RdmaAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rdma:{}", self.meet)?;
        if let Some(device) = &self.device {
            write!(f, ",dev={device}")?;
        }
        if let Some(port) = self.port {
            write!(f, ",port={port}")?;
        }
        if let Some(gid) = self.gid {
            write!(f, ",gid={gid}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        text.parse::<LinkAddress>().unwrap_err().to_string()
    }

    #[test]
    fn only_what_exists_is_accepted() {
        assert_eq!("shm:/tmp/a:b".parse(), Ok(LinkAddress::Shm("/tmp/a:b".into())));
        assert_eq!("shm:".parse::<LinkAddress>(), Err(AddressError::NoPath));
        assert!(format!("shm:/{}", "x".repeat(107)).parse::<LinkAddress>().is_err());
        for text in ["", "nas:7000", "tcp:nas:7000", "RDMA:nas:7000"] {
            assert!(refused(text).contains("rdma:HOST:PORT"), "{text}");
        }
    }

    #[test]
    fn nobody_is_looked_for_at_port_zero() {
        assert_eq!(lender_address("rdma:nas:0"), Err(AddressError::PortZero));
        assert!(lender_address("rdma:nas:1").is_ok() && lender_address("shm:/tmp/link").is_ok());
    }

    #[test]
    fn an_rdma_address_is_read_as_it_is_written() {
        for text in
            ["rdma:nas:7000", "rdma:[fd00::7]:7000,dev=rxe0", "rdma:10.0.0.7:1,dev=mlx5_0,port=2,gid=3", "rdma:0.0.0.0:0,gid=0"]
        {
            assert_eq!(text.parse::<LinkAddress>().unwrap().to_string(), text);
        }
        let options = "rdma:nas:7000,gid=3,port=1,dev=rxe0".parse();
        let meet = HostPort { host: "nas".to_owned(), port: 7000 };
        let wanted = RdmaAddress { meet, device: Some("rxe0".to_owned()), port: Some(1), gid: Some(3) };
        assert_eq!(options, Ok(LinkAddress::Rdma(wanted)));
    }

    #[test]
    fn a_wrong_rdma_address_is_refused_with_what_would_be_right() {
        for (text, words) in [
            ("rdma:", "as in rdma:nas:7000"),
            ("rdma:nas", "has no port"),
            ("rdma:fd00::7:7000", "needs brackets"),
            ("rdma:nas:70000", "1 to 65535"),
            ("rdma:nas:7000,", "dev=NAME"),
            ("rdma:nas:7000,mtu=4096", "\"mtu=4096\" is no option"),
            ("rdma:nas:7000,dev=", "farbus devices"),
            ("rdma:nas:7000,dev=../x", "farbus devices"),
            ("rdma:nas:7000,port=0", "1 to 255"),
            ("rdma:nas:7000,port=256", "1 to 255"),
            ("rdma:nas:7000,gid=-1", "from 0"),
            ("rdma:nas:7000,dev=a,dev=b", "dev= is given twice"),
        ] {
            assert!(refused(text).contains(words), "{text}: {}", refused(text));
        }
    }
}
