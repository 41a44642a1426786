//! Where a bank is, as given on the command line, and the store that is there.
//!
//! `/srv/bank` is a directory of this host, `rdma:nas:7001,dev=mlx5_0` one that `farbus bank serve` serves on host nas; anything that is not written as
//! another kind of address is a directory.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use farbus_machine_bank::remote::RemoteStore;
use farbus_machine_bank::store::{Directory, Store};
use farbus_transport::Nanos;
use farbus_transport::link::hello::{Hello, Role, SPOKEN};

use super::args::Place;
use super::help::Helped;
use crate::failure::refusal;
use crate::link::{Linked, Purpose};
use crate::link_address::{AddressError, LinkAddress, lender_address};

/// What both sides of a link to a bank say of themselves, so that nobody takes a device for one.
pub const GREETING: &[u8] = b"farbus bank";
/// How a bank is served.
const SERVE: &str = "farbus bank serve BANK --listen ADDRESS";

/// A bank's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BankAddress {
    /// A directory.
    Directory(PathBuf),
    /// Where `farbus bank serve` serves one.
    Link(LinkAddress),
}

impl FromStr for BankAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        match text.split_once(':') {
            Some(("shm" | "rdma", _)) => lender_address(text).map(Self::Link),
            _ => Ok(Self::Directory(text.into())),
        }
    }
}

impl fmt::Display for BankAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "{}", path.display()),
            Self::Link(address) => address.fmt(f),
        }
    }
}

impl BankAddress {
    /// An empty store there, for a new bank.
    pub fn create(&self, place: &Place) -> anyhow::Result<Box<dyn Store>> {
        match self {
            Self::Directory(path) if path.join("config/bank").exists() => {
                Err(refusal(format!("there is a bank in {self}"), "use it as it is, or choose another directory"))
            }
            Self::Link(_) => Err(refusal(
                "no bank is made over a link",
                format!("run farbus bank init where it is to be, and serve it: {SERVE}"),
            )),
            Self::Directory(path) => Ok(Box::new(Directory::create(path).helped(format!("cannot make a bank in {self}"), place)?)),
        }
    }

    /// The store that is there.
    pub fn open(&self, place: &Place) -> anyhow::Result<Box<dyn Store>> {
        match self {
            Self::Link(address) => Ok(Box::new(connect(address, place)?)),
            Self::Directory(path) => Ok(Box::new(Directory::open(path).helped(format!("cannot open the bank {self}"), place)?)),
        }
    }
}

/// A bank that is served at `address`.
fn connect(address: &LinkAddress, place: &Place) -> anyhow::Result<RemoteStore> {
    let hello = Hello { versions: SPOKEN, role: Role::Borrower, features: 0, epoch: 0, description: GREETING.to_vec() };
    let (linked, agreed) = crate::link::connect(address, Purpose::Bank, &place.link.security, &place.link.peer, &hello)?;
    if agreed.peer.description != GREETING {
        return Err(refusal(
            format!("no bank is served at {address}: a device is lent there"),
            format!("give the address that {SERVE} says"),
        ));
    }
    let store = match linked {
        Linked::Shm(fabric) => RemoteStore::connect(*fabric, address.to_string(), Nanos::now),
        Linked::Rdma(fabric) => RemoteStore::connect(*fabric, address.to_string(), Nanos::now),
    };
    store.helped(format!("cannot reach the bank at {address}"), place)
}
