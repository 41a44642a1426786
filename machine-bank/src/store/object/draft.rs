//! An object on its way into an object store: kept here until it is whole and has a name.
//!
//! A pack of 8 MiB is in memory and becomes one request; an index of 300 MiB is in a file without a name and becomes 19 parts of 16 MiB, three at a time.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStoreExt, PutMode};
use tokio::task::JoinSet;

use super::lease::Leases;
use super::{Bucket, Failure, sorted};
use crate::store::{Draft, Durability, Kind, StoreError, valid_name};

/// Bytes up to which an object is in memory and one request, and of each part above.
const PART: usize = 16 << 20;
/// Parts under way at once.
const PARTS: usize = 3;

#[derive(Debug)]
pub struct ObjectDraft {
    bucket: Arc<Bucket>,
    leases: Arc<Leases>,
    kind: Kind,
    bytes: Vec<u8>,
    /// What was too much for memory, before `bytes`; it has no name, so it ends with this process.
    spool: Option<(File, u64)>,
}

impl ObjectDraft {
    pub fn new(bucket: Arc<Bucket>, leases: Arc<Leases>, kind: Kind) -> Self {
        Self { bucket, leases, kind, bytes: Vec::new(), spool: None }
    }

    fn spool(&mut self) -> std::io::Result<()> {
        let (file, len) = match &mut self.spool {
            Some(spool) => spool,
            None => self.spool.insert((tempfile::tempfile()?, 0)),
        };
        file.write_all(&self.bytes)?;
        *len += self.bytes.len() as u64;
        self.bytes.clear();
        Ok(())
    }

    fn spooled(&mut self) -> Result<(), StoreError> {
        let folder = std::env::temp_dir();
        self.spool().map_err(|error| StoreError::io(format!("cannot keep a large {} in {}", self.kind, folder.display()), error))
    }

    /// Uploads a file in parts; nothing of it is seen before the last request.
    fn parts(&self, key: &Path, file: &File, len: u64) -> Result<(), StoreError> {
        let what = format!("cannot write {key}");
        let fail = |failure: Failure| sorted(&what, true, failure);
        let (client, to) = (self.bucket.client.clone(), key.clone());
        let mut upload = self.bucket.wait(async move { client.put_multipart(&to).await }).map_err(fail)?;
        let sent = self.send(&mut upload, file, len, &what).and_then(|()| self.leases.left());
        let done = match sent {
            Ok(left) => {
                let done = self.bucket.within(left.min(self.bucket.limit), async move {
                    let done = upload.complete().await;
                    Ok((upload, done))
                });
                done.map_err(fail).map(|(upload, done)| (upload, done.map_err(|error| fail(error.into()))))?
            }
            Err(error) => (upload, Err(error)),
        };
        let (mut upload, done) = done;
        done.map(|_| ()).inspect_err(|_| {
            if let Err(error) = self.bucket.wait(async move { upload.abort().await }) {
                tracing::debug!(?error, %key, "parts of an upload stay, which nobody sees");
            }
        })
    }

    fn send(&self, upload: &mut Box<dyn MultipartUpload>, file: &File, len: u64, what: &str) -> Result<(), StoreError> {
        let fail = |failure: Failure| sorted(what, true, failure);
        let mut at = 0;
        while at < len {
            let mut parts = JoinSet::new();
            let Some(runtime) = &self.bucket.runtime else { return Err(fail(Failure::Ended)) };
            for _ in 0..PARTS {
                let part = usize::try_from(len - at).map_or(PART, |left| left.min(PART));
                if part == 0 {
                    break;
                }
                let mut bytes = vec![0; part];
                file.read_exact_at(&mut bytes, at).map_err(|error| StoreError::io(what, error))?;
                parts.spawn_on(upload.put_part(Bytes::from(bytes).into()), runtime.handle());
                at += part as u64;
            }
            self.bucket
                .wait(async move {
                    while let Some(part) = parts.join_next().await {
                        part??;
                    }
                    Ok(())
                })
                .map_err(fail)?;
        }
        Ok(())
    }
}

impl Draft for ObjectDraft {
    fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.bytes.extend_from_slice(bytes);
        if self.bytes.len() > PART { self.spooled() } else { Ok(()) }
    }

    fn commit(mut self: Box<Self>, name: &str, _: Durability) -> Result<(), StoreError> {
        let key = self.bucket.object(self.kind, name)?;
        debug_assert!(valid_name(name));
        let limit = self.leases.left()?.min(self.bucket.limit);
        if self.spool.is_some() {
            self.spooled()?;
        }
        if let Some((file, len)) = self.spool.take() {
            return self.parts(&key, &file, len);
        }
        // Two that make a bank at one place are told of each other.
        let mode = if self.kind == Kind::Config && name == "bank" { PutMode::Create } else { PutMode::Overwrite };
        if self.bucket.small(limit, &key, std::mem::take(&mut self.bytes).into(), mode)? {
            return Ok(());
        }
        let source = std::io::Error::new(std::io::ErrorKind::AlreadyExists, "somebody made it meanwhile");
        Err(StoreError::io(format!("cannot write {key}"), source))
    }
}
