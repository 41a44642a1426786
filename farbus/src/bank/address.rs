//! Where a bank is, as given on the command line, and the store that is there.
//!
//! `/srv/bank` is a directory of this host, `s3://backups/lab` what is under `lab/` in a bucket, `file:///mnt/objects` a directory that is used as if it were one, and
//! `rdma:nas:7001,dev=mlx5_0` what `farbus bank serve` serves on host nas; anything that is not written as another kind of address is a directory.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use farbus_machine_bank::remote::{Link, Reconnect, RemoteStore};
use farbus_machine_bank::store::object::ObjectOptions;
use farbus_machine_bank::store::{CacheCounters, CachedStore, Directory, ObjectStore, PagedStore, Store, StoreError};
use farbus_transport::Nanos;
use farbus_transport::link::hello::{Hello, Role, SPOKEN};

use super::args::Place;
use super::help::Helped;
use super::serve_args::BankLinkArgs;
use crate::failure::{misuse, refusal};
use crate::link::{Linked, Purpose};
use crate::link_address::{LinkAddress, lender_address};

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
    /// A directory of objects, as the `object_store` crate keeps them.
    Objects(PathBuf),
    /// A bucket of an S3-compatible service, and what its objects' names begin with.
    Bucket {
        /// The bucket.
        bucket: String,
        /// Without slashes at its ends.
        prefix: String,
    },
}

impl FromStr for BankAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(("shm" | "rdma", _)) = text.split_once(':') {
            return lender_address(text).map(Self::Link).map_err(|error| error.to_string());
        }
        if let Some(rest) = text.strip_prefix("s3://") {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            let prefix = prefix.trim_matches('/');
            let plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
            return if bucket.is_empty()
                || !plain(bucket)
                || !prefix.split('/').all(|part| plain(part) && part != "." && part != "..")
            {
                Err(format!("{text} names no bucket: write s3://BUCKET or s3://BUCKET/PREFIX"))
            } else {
                Ok(Self::Bucket { bucket: bucket.to_owned(), prefix: prefix.to_owned() })
            };
        }
        if let Some(path) = text.strip_prefix("file://") {
            return if path.starts_with('/') {
                Ok(Self::Objects(path.into()))
            } else {
                Err(format!("{text} names no directory: write file:///DIRECTORY, from the root on"))
            };
        }
        match text.split_once("://") {
            Some((kind, _)) if kind.bytes().all(|byte| byte.is_ascii_alphanumeric()) => {
                Err(format!("{kind}:// is no kind of bank: write a directory, s3://BUCKET/PREFIX or file:///DIRECTORY"))
            }
            _ => Ok(Self::Directory(text.into())),
        }
    }
}

impl fmt::Display for BankAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "{}", path.display()),
            Self::Link(address) => address.fmt(f),
            Self::Objects(path) => write!(f, "file://{}", path.display()),
            Self::Bucket { bucket, prefix } if prefix.is_empty() => write!(f, "s3://{bucket}"),
            Self::Bucket { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}"),
        }
    }
}

/// A store, and what its cache does, if it has one.
pub type Opened = (Box<dyn Store>, Option<Arc<CacheCounters>>);

impl BankAddress {
    /// Whether it is reached over a network, by requests.
    pub fn is_bucket(&self) -> bool {
        matches!(self, Self::Bucket { .. })
    }

    /// An empty store there, for a new bank.
    pub fn create(&self, place: &Place) -> anyhow::Result<Box<dyn Store>> {
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
            Self::Bucket { .. } => self.store().helped(what(), place),
        }
    }

    /// The store that is there.
    pub fn open(&self, place: &Place) -> anyhow::Result<Box<dyn Store>> {
        match self {
            Self::Link(address) => Ok(Box::new(connect(address, place)?)),
            _ => self.store().helped(format!("cannot open the bank {self}"), place),
        }
    }

    /// The same behind the cache that the arguments ask for: a bucket has one unless they say otherwise; over a link pages are what is kept.
    pub fn open_cached(&self, place: &Place) -> anyhow::Result<Opened> {
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

    fn store(&self) -> Result<Box<dyn Store>, StoreError> {
        match self {
            Self::Link(address) => Err(StoreError::Refused(format!("{address} is a link"))),
            Self::Directory(path) => Ok(Box::new(Directory::open(path)?)),
            Self::Objects(path) => Ok(Box::new(ObjectStore::local(path, false, ObjectOptions::default())?)),
            Self::Bucket { bucket, prefix } => {
                // Values that are no text are none of those that matter.
                let environment =
                    std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
                Ok(Box::new(ObjectStore::s3(bucket, prefix, environment, ObjectOptions::default())?))
            }
        }
    }
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
    fn an_address_is_a_directory_unless_it_says_what_else() {
        let parse = |text: &str| text.parse::<BankAddress>();
        let bucket = |bucket: &str, prefix: &str| BankAddress::Bucket { bucket: bucket.to_owned(), prefix: prefix.to_owned() };
        assert_eq!(parse("/srv/bank"), Ok(BankAddress::Directory("/srv/bank".into())));
        assert_eq!(parse("bank@2:x"), Ok(BankAddress::Directory("bank@2:x".into())));
        assert_eq!(parse("s3://backups"), Ok(bucket("backups", "")));
        assert_eq!(parse("s3://backups/lab/1/"), Ok(bucket("backups", "lab/1")));
        assert_eq!(parse("file:///mnt/b"), Ok(BankAddress::Objects("/mnt/b".into())));
        for wrong in [
            "s3://",
            "s3:///lab",
            "s3://a b",
            "s3://b/../c",
            "s3://b/a//c ",
            "file://mnt",
            "gs://b",
            "http://h/b",
            "shm:",
            "rdma:nas:0",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        for text in
            ["/srv/bank", "s3://backups", "s3://backups/lab/1", "file:///mnt/b", "shm:/run/bank", "rdma:nas:7001,dev=mlx5_0"]
        {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
    }
}
