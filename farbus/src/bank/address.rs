//! Where a bank is, as given on the command line, and the store that is there.
//!
//! `/srv/bank` is a directory of this host; anything that is not written as another kind of address is.

use std::convert::Infallible;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use farbus_machine_bank::store::{Directory, Store};

use super::args::Place;
use super::help::Helped;
use crate::failure::refusal;

/// A bank's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BankAddress {
    /// A directory.
    Directory(PathBuf),
}

impl FromStr for BankAddress {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self::Directory(text.into()))
    }
}

impl fmt::Display for BankAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "{}", path.display()),
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
            Self::Directory(path) => Ok(Box::new(Directory::create(path).helped(format!("cannot make a bank in {self}"), place)?)),
        }
    }

    /// The store that is there.
    pub fn open(&self, place: &Place) -> anyhow::Result<Box<dyn Store>> {
        match self {
            Self::Directory(path) => Ok(Box::new(Directory::open(path).helped(format!("cannot open the bank {self}"), place)?)),
        }
    }
}
