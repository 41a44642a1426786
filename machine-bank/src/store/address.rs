//! Where a bank is, as people write it, and the store that is there.
//!
//! `/srv/bank` is a directory of this host, `s3://backups/lab` what is under `lab/` in a bucket, `file:///mnt/objects` a directory that is used as if it were one, and
//! `shm:/run/bank` what another process serves; anything that is not written as another kind of address is a directory. What kinds of links there are the
//! program decides ([`LinkSpec`]): [`ShmPath`] is shared memory alone.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::str::FromStr;

use farbus_transport::Nanos;
use farbus_transport::link::hello::{Hello, Role, SPOKEN};
use farbus_transport::shm::{Connection, ShmOptions, connect_if};

#[cfg(feature = "object")]
use super::object::{ObjectOptions, ObjectStore};
use super::{Directory, Store, StoreError};
use crate::remote::{GREETING, Link, Reconnect, RemoteStore};

/// A place where a bank is served.
pub trait LinkSpec: fmt::Display + Sized {
    /// From what begins with `shm:` or `rdma:`.
    ///
    /// # Errors
    /// What is wrong with it, for people.
    fn parse(text: &str) -> Result<Self, String>;
}

/// A bank's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BankAddress<L = ShmPath> {
    /// A directory.
    Directory(PathBuf),
    /// Where a bank is served.
    Link(L),
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

impl<L: LinkSpec> FromStr for BankAddress<L> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(("shm" | "rdma", _)) = text.split_once(':') {
            return L::parse(text).map(Self::Link);
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

impl<L: LinkSpec> fmt::Display for BankAddress<L> {
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

impl<L: LinkSpec> BankAddress<L> {
    /// Whether it is reached over a network, by requests.
    pub fn is_bucket(&self) -> bool {
        matches!(self, Self::Bucket { .. })
    }

    /// The store that is there; `connect` makes that of a link. Where a bucket is, and who we are, say the `AWS_` variables of this process's environment.
    ///
    /// # Errors
    /// What `connect` fails with, or the store's fault; [`StoreError::Refused`] where this crate was built without object stores.
    pub fn store<E: From<StoreError>>(&self, connect: impl FnOnce(&L) -> Result<Box<dyn Store>, E>) -> Result<Box<dyn Store>, E> {
        match self {
            Self::Link(link) => connect(link),
            Self::Directory(path) => Ok(Box::new(Directory::open(path)?)),
            #[cfg(feature = "object")]
            Self::Objects(path) => Ok(Box::new(ObjectStore::local(path, false, ObjectOptions::default())?)),
            #[cfg(feature = "object")]
            Self::Bucket { bucket, prefix } => {
                // Values that are no text are none of those that matter.
                let environment =
                    std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
                Ok(Box::new(ObjectStore::s3(bucket, prefix, environment, ObjectOptions::default())?))
            }
            #[cfg(not(feature = "object"))]
            Self::Objects(_) | Self::Bucket { .. } => {
                Err(StoreError::Refused(format!("{self} is an object store, and this program was built without them")).into())
            }
        }
    }
}

/// A socket at which a bank is served over shared memory: `shm:/run/bank`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShmPath(pub PathBuf);

impl LinkSpec for ShmPath {
    fn parse(text: &str) -> Result<Self, String> {
        match text.strip_prefix("shm:") {
            Some("") => Err("shm: needs a path, as in shm:/run/bank".to_owned()),
            Some(path) => Ok(Self(path.into())),
            None => Err(format!(
                "{text} is reached over RDMA, and this program reaches banks of this host only: farbus bank copy brings its machines here"
            )),
        }
    }
}

impl fmt::Display for ShmPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "shm:{}", self.0.display())
    }
}

impl ShmPath {
    /// The bank that is served there; a server that goes away is waited for, and asked again.
    ///
    /// # Errors
    /// Nobody serves one there, or not for us.
    pub fn connect(&self) -> Result<RemoteStore, StoreError> {
        let (first, again) = (self.link()?, self.clone());
        Ok(RemoteStore::reconnecting(first, Reconnect::default(), move || again.link()))
    }

    fn link(&self) -> Result<Link, StoreError> {
        let gone = |why: String| StoreError::Gone(format!("{self}: {why}"));
        let hello = Hello { versions: SPOKEN, role: Role::Borrower, features: 0, epoch: 0, description: GREETING.to_vec() };
        // It may be served by another user: whoever owns the place that was named.
        let owner = self.0.symlink_metadata().ok().map(|about| about.uid());
        let connected = connect_if(&self.0, &hello, ShmOptions::default(), &|uid| owner == Some(uid));
        let Connection { fabric, agreed } = connected.map_err(|error| gone(error.to_string()))?;
        if agreed.peer.description != GREETING {
            return Err(gone("no bank is served there, but something else".to_owned()));
        }
        Link::open(fabric, self.to_string(), Nanos::now)
    }
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
        assert_eq!(parse("shm:/run/bank"), Ok(BankAddress::Link(ShmPath("/run/bank".into()))));
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
            "rdma:nas:7001",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        for text in ["/srv/bank", "s3://backups", "s3://backups/lab/1", "file:///mnt/b", "shm:/run/bank"] {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn where_nobody_serves_a_bank_the_store_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let error = ShmPath(folder.path().join("bank")).connect().unwrap_err();
        assert!(error.is_of_store() && error.to_string().starts_with("shm:"), "{error}");
    }
}
