//! Where a bank is, as given on the command line, and the store that is there.
//!
//! `/srv/bank` is a directory of this host, `s3://backups/lab` what is under `lab/` in a bucket, `file:///mnt/objects` a directory that is used as if it were one, and
//! `rdma:nas:7001,dev=mlx5_0` what `farbus bank serve` serves on host nas; anything that is not written as another kind of address is a directory.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use farbus_machine_bank::remote::{GREETING, Link, Reconnect, RemoteStore};
use farbus_machine_bank::store::object::ObjectOptions;
use farbus_machine_bank::store::{CacheCounters, CachedStore, Directory, LinkSpec, ObjectStore, PagedStore, Store, StoreError};
use farbus_transport::Nanos;
use farbus_transport::link::hello::{Hello, Role, SPOKEN};

use super::args::Place;
use super::help::Helped;
use super::serve_args::BankLinkArgs;
use crate::failure::{misuse, refusal};
use crate::link::{Linked, Purpose};
use crate::link_address::{LinkAddress, lender_address};

/// How a bank is served.
const SERVE: &str = "farbus bank serve BANK --listen ADDRESS";

/// A bank's address.
pub type BankAddress = farbus_machine_bank::store::BankAddress<LinkAddress>;

impl LinkSpec for LinkAddress {
    fn parse(text: &str) -> Result<Self, String> {
        lender_address(text).map_err(|error| error.to_string())
    }
}

/// A store, and what its cache does, if it has one.
pub type Opened = (Box<dyn Store>, Option<Arc<CacheCounters>>);

/// What is done at an address, with what was said of the place.
pub trait AtPlace {
    /// An empty store there, for a new bank.
    fn create(&self, place: &Place) -> anyhow::Result<Box<dyn Store>>;

    /// The store that is there.
    fn open(&self, place: &Place) -> anyhow::Result<Box<dyn Store>>;

    /// The same behind the cache that the arguments ask for: a bucket has one unless they say otherwise; over a link pages are what is kept.
    fn open_cached(&self, place: &Place) -> anyhow::Result<Opened>;
}

impl AtPlace for BankAddress {
    fn create(&self, place: &Place) -> anyhow::Result<Box<dyn Store>> {
        let what = || format!("cannot make a bank in {self}");
        match self {
            Self::Directory(path) if path.join("config/bank").exists() => {
                Err(refusal(format!("there is a bank in {self}"), "use it as it is, or choose another directory"))
            }
            Self::Link(_) => {
                Err(misuse("no bank is made over a link", format!("run farbus bank init where it is to be, and serve it: {SERVE}")))
            }
            Self::Directory(path) => Ok(Box::new(Directory::create(path).helped(what(), place)?)),
            Self::Objects(path) => Ok(Box::new(ObjectStore::local(path, true, ObjectOptions::default()).helped(what(), place)?)),
            Self::Bucket { .. } => here(self).helped(what(), place),
        }
    }

    fn open(&self, place: &Place) -> anyhow::Result<Box<dyn Store>> {
        match self {
            Self::Link(address) => Ok(Box::new(connect(address, place)?)),
            _ => here(self).helped(format!("cannot open the bank {self}"), place),
        }
    }

    fn open_cached(&self, place: &Place) -> anyhow::Result<Opened> {
        let store = self.open(place)?;
        let folder = match &place.cache {
            Some(folder) if folder == Path::new("none") => None,
            Some(folder) => Some(folder.clone()),
            None => default_cache().filter(|_| self.is_bucket()),
        };
        let Some(folder) = folder else { return Ok((store, None)) };
        if let Self::Link(_) = self {
            let store = PagedStore::new(store, &folder, place.cache_size);
            let counters = store.counters();
            return Ok((Box::new(store), Some(counters)));
        }
        let store = CachedStore::new(store, &folder, place.cache_size);
        let counters = store.counters();
        Ok((Box::new(store), Some(counters)))
    }
}

/// A store that is reached without a link.
fn here(address: &BankAddress) -> Result<Box<dyn Store>, StoreError> {
    address.store(|link| Err(StoreError::Refused(format!("{link} is a link"))))
}

/// `$XDG_CACHE_HOME/farbus/bank`, or `~/.cache/farbus/bank`; none where there is no home.
fn default_cache() -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let caches = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")))?;
    Some(caches.join("farbus/bank"))
}

/// A bank that is served at `address`. A server that goes away is waited for, and asked again.
fn connect(address: &LinkAddress, place: &Place) -> anyhow::Result<RemoteStore> {
    let give_up = place.link.reconnect.unwrap_or(Reconnect::default().give_up);
    let first = link(address, &place.link)?.helped(format!("cannot reach the bank at {address}"), place)?;
    if give_up.is_zero() {
        return Ok(RemoteStore::over(first));
    }
    let (address, options) = (address.clone(), place.link.clone());
    let again = move || link(&address, &options).map_err(|error| StoreError::Gone(format!("{error:#}"))).and_then(|linked| linked);
    Ok(RemoteStore::reconnecting(first, Reconnect { give_up, ..Reconnect::default() }, again))
}

/// A link to the bank at `address`.
fn link(address: &LinkAddress, options: &BankLinkArgs) -> anyhow::Result<Result<Link, StoreError>> {
    let hello = Hello { versions: SPOKEN, role: Role::Borrower, features: 0, epoch: 0, description: GREETING.to_vec() };
    let (linked, agreed) = crate::link::connect(address, Purpose::Bank, &options.security, &options.peer, &hello)?;
    if agreed.peer.description != GREETING {
        return Err(refusal(
            format!("no bank is served at {address}: a device is lent there"),
            format!("give the address that {SERVE} says"),
        ));
    }
    Ok(match linked {
        Linked::Shm(fabric) => Link::open(*fabric, address.to_string(), Nanos::now),
        Linked::Rdma(fabric) => Link::open(*fabric, address.to_string(), Nanos::now),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_those_of_this_program_and_nobody_is_reached_at_port_0() {
        let parse = |text: &str| text.parse::<BankAddress>();
        assert_eq!(parse("/srv/bank"), Ok(BankAddress::Directory("/srv/bank".into())));
        for wrong in ["s3://", "gs://b", "shm:", "rdma:nas:0"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        for text in ["shm:/run/bank", "rdma:nas:7001,dev=mlx5_0"] {
            let address = parse(text).unwrap();
            assert!(matches!(address, BankAddress::Link(_)));
            assert_eq!(address.to_string(), text);
        }
    }
}
