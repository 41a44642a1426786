//! A store in a bucket of an S3-compatible service, or in whatever else the `object_store` crate reaches: requests instead of files.
//!
//! `s3://backups/lab` keeps pack 9f… as the object `lab/packs/9f…` of the bucket `backups`, and says with `lab/locks/use/deposit-30000-4711-…`, which it
//! writes anew every 7 s, that process 4711 deposits.
//!
//! An object is one request up to 16 MiB and a multipart upload above, so it is there whole or not at all; a draft is in memory up to 16 MiB and then in a file
//! without a name, because such an upload is told its object's name first and a draft last. So a process that is killed leaves nothing in the bucket
//! but, after a large upload, parts that nobody sees; a rule of the bucket (`AbortIncompleteMultipartUpload`) removes those, since there is no way to list
//! them here. The service is asked for two things: that a listing has what was written before it, and `If-None-Match: *`. Both of S3's kind promise them.
//!
//! Every call has an end ([`ObjectOptions::limit`]): then it is [`StoreError::Unreachable`], and the next one asks anew.

mod draft;
mod fault;
mod lease;

use std::future::Future;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::TryStreamExt;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::client::ClientConfigKey;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore as Client, ObjectStoreExt, PutMode, RetryConfig};
use tokio::runtime::{Builder, Runtime};

use super::{Draft, Guard, Hold, Kind, Object, Pin, Store, StoreError, valid_name};
use crate::page::Root;
use draft::ObjectDraft;
use fault::{Failure, host, sorted};
pub use lease::LeaseTimes;
use lease::Leases;

/// Bytes that one request reads.
const READ: usize = 16 << 20;

/// How patient a store is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObjectOptions {
    /// The longest that a request may take, all its repetitions included; an upload in parts is a request for each of them.
    pub limit: Duration,
    /// How this process says that it is there.
    pub lease: LeaseTimes,
}

impl Default for ObjectOptions {
    fn default() -> Self {
        Self { limit: Duration::from_secs(60), lease: LeaseTimes::default() }
    }
}

/// A bank's objects in an object store.
#[derive(Debug)]
pub struct ObjectStore {
    bucket: Arc<Bucket>,
    leases: Arc<Leases>,
}

/// The connection, which guards and drafts share.
#[derive(Debug)]
struct Bucket {
    client: Arc<dyn Client>,
    prefix: Path,
    address: String,
    limit: Duration,
    /// The directory, where it is one.
    local: Option<PathBuf>,
    runtime: Option<Runtime>,
    next: AtomicU64,
    /// Tells this process's objects from those of others, on whatever host.
    process: String,
}

impl Drop for Bucket {
    fn drop(&mut self) {
        // Waiting for its threads is not allowed everywhere, and nothing of ours runs on them any more.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl ObjectStore {
    /// The store under `prefix` in a bucket of an S3-compatible service. Where that is, and who we are, say the usual `AWS_` variables of `environment`
    /// (`std::env::vars()`, as a rule).
    ///
    /// # Errors
    /// They do not go together; whether the service is there shows with the first call.
    pub fn s3(
        bucket: &str,
        prefix: &str,
        environment: impl IntoIterator<Item = (String, String)>,
        options: ObjectOptions,
    ) -> Result<Self, StoreError> {
        let address = format!("s3://{bucket}{}{prefix}", if prefix.is_empty() { "" } else { "/" });
        let invalid = |error: object_store::Error| host(format!("cannot use {address}"), std::io::ErrorKind::InvalidInput, error);
        // Fails where somebody has chosen one already, which is then used.
        if rustls::crypto::ring::default_provider().install_default().is_err() {
            tracing::trace!("another part of this process has chosen how TLS is done");
        }
        let mut builder = AmazonS3Builder::new();
        for (name, value) in environment {
            if let Some(key) = name.strip_prefix("AWS_").and_then(|_| name.to_ascii_lowercase().parse().ok()) {
                builder = builder.with_config(key, value);
            }
        }
        builder = builder.with_bucket_name(bucket);
        let endpoint = builder.get_config_value(&AmazonS3ConfigKey::Endpoint).unwrap_or_default();
        let allowed = builder.get_config_value(&AmazonS3ConfigKey::Client(ClientConfigKey::AllowHttp)).unwrap_or_default();
        if endpoint.starts_with("http://") && !matches!(allowed.as_str(), "true" | "1") {
            let what = format!("cannot use {address}");
            let why = format!("{endpoint} is not encrypted, and AWS_ALLOW_HTTP does not say that this is wanted");
            return Err(host(what, std::io::ErrorKind::InvalidInput, why));
        }
        for (key, value) in [(ClientConfigKey::ConnectTimeout, Duration::from_secs(5)), (ClientConfigKey::Timeout, options.limit)] {
            let key = AmazonS3ConfigKey::Client(key);
            if builder.get_config_value(&key).is_none() {
                builder = builder.with_config(key, format!("{} ms", value.min(options.limit).as_millis()));
            }
        }
        let retries = RetryConfig { max_retries: 5, retry_timeout: options.limit / 2, ..RetryConfig::default() };
        let client = builder.with_retry(retries).build().map_err(invalid)?;
        Self::over(Arc::new(client), prefix, address, options)
    }

    /// The store in a directory, by the crate's own rules for one. `create` makes it.
    ///
    /// # Errors
    /// It is not there, or cannot be made.
    pub fn local(path: &FilePath, create: bool, options: ObjectOptions) -> Result<Self, StoreError> {
        let fail = |error| StoreError::io(format!("cannot use {}", path.display()), error);
        if create {
            std::fs::create_dir_all(path).map_err(fail)?;
        }
        let path = path.canonicalize().map_err(fail)?;
        let address = format!("file://{}", path.display());
        let client = LocalFileSystem::new_with_prefix(&path).map(|client| client.with_fsync(true));
        let client = client.map_err(|error| sorted(&format!("cannot use {address}"), false, error.into()))?;
        let mut store = Self::over(Arc::new(client), "", address, options)?;
        Arc::get_mut(&mut store.bucket).into_iter().for_each(|bucket| bucket.local = Some(path.clone()));
        Ok(store)
    }

    /// The store under `prefix` of any that the crate has.
    ///
    /// # Errors
    /// The prefix is none, or there are no threads for it.
    pub fn over(client: Arc<dyn Client>, prefix: &str, address: String, options: ObjectOptions) -> Result<Self, StoreError> {
        let what = || format!("cannot use {address}");
        let prefix = Path::parse(prefix).map_err(|error| host(what(), std::io::ErrorKind::InvalidInput, error))?;
        let runtime = Builder::new_multi_thread().worker_threads(2).thread_name("farbus-objects").enable_all().build();
        let runtime = runtime.map_err(|error| StoreError::io(what(), error))?;
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|error| host(what(), std::io::ErrorKind::Other, error))?;
        let process = format!("{}-{:016x}", std::process::id(), u64::from_le_bytes(random));
        let next = AtomicU64::new(0);
        let bucket = Bucket { client, prefix, address, limit: options.limit, local: None, runtime: Some(runtime), next, process };
        Ok(Self { bucket: Arc::new(bucket), leases: Arc::new(Leases::new(options.lease)) })
    }
}

fn folder(kind: Kind) -> &'static str {
    match kind {
        Kind::Config => "config",
        Kind::Pack => "packs",
        Kind::Index => "index",
        Kind::Manifest => "manifests",
    }
}

impl Bucket {
    /// Does `future` on the runtime's threads, so that a caller may be on whichever thread it likes, and waits at most `limit`.
    fn within<T: Send + 'static>(
        &self,
        limit: Duration,
        future: impl Future<Output = object_store::Result<T>> + Send + 'static,
    ) -> Result<T, Failure> {
        let Some(runtime) = &self.runtime else { return Err(Failure::Ended) };
        let (send, receive) = sync_channel(1);
        runtime.spawn(async move {
            let done = tokio::time::timeout(limit, future).await;
            // Whoever asked is waiting; if it is not, nobody needs to know.
            _ = send.send(done);
        });
        match receive.recv() {
            Ok(Ok(done)) => done.map_err(Failure::Refused),
            Ok(Err(_)) => Err(Failure::Late(limit)),
            Err(_) => Err(Failure::Ended),
        }
    }

    fn wait<T: Send + 'static>(
        &self,
        future: impl Future<Output = object_store::Result<T>> + Send + 'static,
    ) -> Result<T, Failure> {
        self.within(self.limit, future)
    }

    /// The key of what is called `name` in `folder`.
    fn key(&self, folder: &str, name: &str) -> Path {
        self.prefix.clone().join(folder).join(name)
    }

    fn object(&self, kind: Kind, name: &str) -> Result<Path, StoreError> {
        if valid_name(name) { Ok(self.key(folder(kind), name)) } else { Err(StoreError::Name(name.to_owned())) }
    }

    /// A name that nobody else has.
    fn unique(&self) -> String {
        format!("{}-{}", self.process, self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// What is directly in a folder, by name.
    fn listed(&self, folder: &str) -> Result<Vec<(String, ObjectMeta)>, StoreError> {
        let prefix = folder.split('/').fold(self.prefix.clone(), |prefix, part| prefix.join(part));
        let (client, under) = (self.client.clone(), prefix.clone());
        let found = self.wait(async move { client.list(Some(&under)).try_collect::<Vec<_>>().await });
        let found = found.map_err(|failure| sorted(&format!("cannot list {}/{folder}", self.address), false, failure))?;
        let named = found.into_iter().filter_map(|about| {
            let mut parts = about.location.prefix_match(&prefix)?;
            let (name, deeper) = (parts.next()?.as_ref().to_owned(), parts.next().is_some());
            drop(parts);
            (!deeper && valid_name(&name)).then_some((name, about))
        });
        Ok(named.collect())
    }

    /// Writes a small object in one request; false where there is one and `mode` is to create it.
    fn small(&self, limit: Duration, key: &Path, bytes: Bytes, mode: PutMode) -> Result<bool, StoreError> {
        let (client, to) = (self.client.clone(), key.clone());
        match self.within(limit, async move { client.put_opts(&to, bytes.into(), mode.into()).await }) {
            Ok(_) => Ok(true),
            Err(Failure::Refused(object_store::Error::AlreadyExists { .. })) => Ok(false),
            Err(failure) => Err(sorted(&format!("cannot write {key}"), true, failure)),
        }
    }

    /// Writes a small object that is not there, with contents that nobody else writes; false where there is one of somebody else. The answer to a request may get lost
    /// and the crate then repeats it, so one that is refused may have met itself.
    fn mine(&self, limit: Duration, key: &Path) -> Result<bool, StoreError> {
        let mine = Bytes::from(self.unique());
        if self.small(limit, key, mine.clone(), PutMode::Create)? {
            return Ok(true);
        }
        let (client, from) = (self.client.clone(), key.clone());
        match self.within(limit, async move { client.get(&from).await?.bytes().await }) {
            Ok(theirs) => Ok(theirs == mine),
            Err(Failure::Refused(object_store::Error::NotFound { .. })) => Ok(false),
            Err(failure) => Err(sorted(&format!("cannot read whose {key} is"), false, failure)),
        }
    }

    fn delete(&self, limit: Duration, key: &Path) -> Result<(), StoreError> {
        let (client, gone) = (self.client.clone(), key.clone());
        match self.within(limit, async move { client.delete(&gone).await }) {
            Ok(()) | Err(Failure::Refused(object_store::Error::NotFound { .. })) => Ok(()),
            Err(failure) => Err(sorted(&format!("cannot remove {key}"), true, failure)),
        }
    }

    fn len(&self, kind: Kind, name: &str) -> Result<u64, StoreError> {
        let key = self.object(kind, name)?;
        let client = self.client.clone();
        match self.wait(async move { client.head(&key).await }) {
            Ok(about) => Ok(about.size),
            Err(failure) => Err(failure.of(kind, name)),
        }
    }

    fn read(&self, kind: Kind, name: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        let wanted = offset.saturating_add(buf.len() as u64);
        let ends = || StoreError::Ends { kind, name: name.to_owned(), wanted };
        let (key, client) = (self.object(kind, name)?, self.client.clone());
        match self.wait(async move { client.get_range(&key, offset..wanted).await }) {
            Ok(bytes) if bytes.len() == buf.len() => {
                buf.copy_from_slice(&bytes);
                Ok(())
            }
            Ok(_) => Err(ends()),
            Err(failure) => match failure.of(kind, name) {
                // Services say it in different ways that a range is beyond the end.
                StoreError::Io { .. } if self.len(kind, name)? < wanted => Err(ends()),
                error => Err(error),
            },
        }
    }

    /// Half-written files that dead processes left in a directory: `packs/9f…#1`.
    fn tidy_local(&self) -> Result<u64, StoreError> {
        let Some(root) = &self.local else { return Ok(0) };
        let mut freed = 0;
        for kind in Kind::ALL {
            let folder = root.join(folder(kind));
            let fail = |error| StoreError::io(format!("cannot tidy {}", folder.display()), error);
            let entries = match std::fs::read_dir(&folder) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                entries => entries.map_err(fail)?,
            };
            for entry in entries {
                let entry = entry.map_err(fail)?;
                if entry.file_name().as_encoded_bytes().contains(&b'#') {
                    freed += entry.metadata().map_err(fail)?.len();
                    std::fs::remove_file(entry.path()).map_err(fail)?;
                }
            }
        }
        Ok(freed)
    }
}

impl Store for ObjectStore {
    fn address(&self) -> String {
        self.bucket.address.clone()
    }

    fn list(&self, kind: Kind) -> Result<Vec<Object>, StoreError> {
        let listed = self.bucket.listed(folder(kind))?;
        Ok(listed
            .into_iter()
            .map(|(name, about)| Object { name, len: about.size, modified: SystemTime::from(about.last_modified) })
            .collect())
    }

    fn read(&self, kind: Kind, name: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        if buf.is_empty() {
            let wanted = offset;
            let ends = || StoreError::Ends { kind, name: name.to_owned(), wanted };
            return (self.len(kind, name)? >= offset).then_some(()).ok_or_else(ends);
        }
        let mut at = offset;
        for part in buf.chunks_mut(READ) {
            self.bucket.read(kind, name, at, part)?;
            at = at.saturating_add(part.len() as u64);
        }
        Ok(())
    }

    fn len(&self, kind: Kind, name: &str) -> Result<u64, StoreError> {
        self.bucket.len(kind, name)
    }

    fn create(&self, kind: Kind) -> Result<Box<dyn Draft>, StoreError> {
        Ok(Box::new(ObjectDraft::new(self.bucket.clone(), self.leases.clone(), kind)))
    }

    fn sync(&self, _: Kind) -> Result<(), StoreError> {
        // What was acknowledged is durable; but it counts only if everybody still knows that we are there.
        self.leases.left().map(|_| ())
    }

    fn remove(&self, kind: Kind, name: &str) -> Result<(), StoreError> {
        let limit = self.leases.left()?.min(self.bucket.limit);
        self.bucket.delete(limit, &self.bucket.object(kind, name)?)
    }

    fn hold(&self, hold: Hold, wait: Duration) -> Result<Box<dyn Guard>, StoreError> {
        lease::hold(&self.bucket, &self.leases, hold, wait)
    }

    fn pin(&self, root: Root) -> Result<Box<dyn Guard>, StoreError> {
        lease::pin(&self.bucket, &self.leases, root)
    }

    fn pins(&self) -> Result<Vec<Pin>, StoreError> {
        lease::pins(&self.bucket)
    }

    fn reserve(&self, name: &str) -> Result<bool, StoreError> {
        if !valid_name(name) {
            return Err(StoreError::Name(name.to_owned()));
        }
        let limit = self.leases.left()?.min(self.bucket.limit);
        self.bucket.mine(limit, &self.bucket.key("numbers", name))
    }

    fn tidy(&self) -> Result<u64, StoreError> {
        let limit = self.leases.left()?.min(self.bucket.limit);
        lease::tidy(&self.bucket)?;
        // A number that a later or the same deposit has is not given again, so nobody needs to keep it; when that one is removed the bank notes its number.
        let manifests = self.bucket.listed(folder(Kind::Manifest))?;
        let given = |name: &str| name.rsplit_once('@').map(|(machine, number)| (machine.to_owned(), number.to_owned()));
        let of_deposits: Vec<_> = manifests.iter().filter_map(|(name, _)| given(name.rsplit_once('@')?.0)).collect();
        for (name, about) in self.bucket.listed("numbers")? {
            let is_below = |(machine, number): &(String, String)| {
                let parse = |number: &str| number.parse::<u64>().ok();
                given(&name).is_some_and(|(of, mine)| of == *machine && parse(&mine) <= parse(number))
            };
            if of_deposits.iter().any(is_below) {
                self.bucket.delete(limit, &about.location)?;
            }
        }
        self.bucket.tidy_local()
    }
}
