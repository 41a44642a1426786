//! A machine out of a bank into one stream, every page verified on the way.
//!
//! `export(&bank, &vm7_3, Some(&vm7_2), &mut pipe, &|_| {})` writes the 17,000 pages that `vm7@2` does not have, and the names of those that changed.

use std::io::{self, Write};

use serde::Serialize;
use thiserror::Error;

use super::{DELTA, FULL, KEYED, MAGIC, SAME, Seen, ZERO};
use crate::bank::Bank;
use crate::deposit::Progress;
use crate::manifest::leaf::{Encoded, encode};
use crate::manifest::{Entry, ManifestError};
use crate::pack::{GROUP, GROUP_PAGES, GroupEncoder};
use crate::page::PAGE;
use crate::reader::{At, ReadError, Reader, Scratch, Wanted};
use crate::store::StoreError;

/// What was exported.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ExportReport {
    /// `vm7@3`.
    pub machine: String,
    /// Its root.
    pub root: String,
    /// What it rests on.
    pub since: Option<String>,
    /// Pages in the archive.
    pub pages: u64,
    /// Bytes of it.
    pub bytes: u64,
}

/// Why a machine was not exported.
#[derive(Debug, Error)]
pub enum ExportError {
    /// It cannot be read.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// Its pages cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The store's fault.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is no memory for a compressor.
    #[error("no memory: {0}")]
    Memory(io::Error),
    /// The archive cannot be written.
    #[error("cannot write the archive: {0}")]
    Target(io::Error),
}

/// What is written, hashed.
struct Out<'a> {
    to: &'a mut dyn Write,
    hash: blake3::Hasher,
    bytes: u64,
}

impl Out<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), ExportError> {
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        self.to.write_all(bytes).map_err(ExportError::Target)
    }

    /// A length of 4 bytes, and these.
    fn piece(&mut self, bytes: &[u8]) -> Result<(), ExportError> {
        self.put(&(bytes.len() as u32).to_le_bytes())?;
        self.put(bytes)
    }
}

/// Writes a machine to `to`, or what `since` does not have of it.
///
/// # Errors
/// It is damaged, or it cannot be written; what was written is no archive then.
pub fn export(
    bank: &Bank,
    entry: &Entry,
    since: Option<&Entry>,
    to: &mut dyn Write,
    progress: &dyn Fn(Progress),
) -> Result<ExportReport, ExportError> {
    let _pins = (bank.pin(entry)?, since.map(|since| bank.pin(since)).transpose()?);
    let manifest = bank.manifest(entry)?;
    let base = since.map(|since| bank.manifest(since)).transpose()?;
    let mut out = Out { to, hash: blake3::Hasher::new(), bytes: 0 };
    out.put(MAGIC)?;
    out.put(&[if bank.identity().is_keyed() { KEYED } else { 0 }])?;
    out.put(&bank.identity().check())?;
    out.put(&base.as_ref().map_or([0; 32], |base| base.root.0))?;
    out.piece(&manifest.head.encode())?;
    let mut seen = Seen::new(bank, base)?;
    let (reader, mut scratch, mut encoder) =
        (Reader::of(bank, entry.root)?, Scratch::new()?, GroupEncoder::new().map_err(ExportError::Memory)?);
    let total = manifest.head.sections.iter().map(|section| section.len).sum();
    let (mut done, mut pages, mut buffer) = (0, 0, Vec::new());
    for (at, section) in manifest.head.sections.iter().enumerate() {
        for leaf in 0..section.leaves.len() {
            let ids = manifest.leaf(bank.store(), bank.identity(), at, leaf)?;
            let below = seen.below(bank, &section.name, leaf, ids.len())?;
            let (form, bytes) = match encode(&ids, below.as_deref()) {
                Encoded::Zero => (ZERO, Vec::new()),
                Encoded::Same => (SAME, Vec::new()),
                Encoded::Full(bytes) => (FULL, bytes),
                Encoded::Delta(bytes) => (DELTA, bytes),
            };
            out.put(&[form])?;
            out.piece(&bytes)?;
            let first = seen.first(&ids);
            // Read in the order in which they are stored, written in that of the leaf.
            buffer.resize(first.len() * PAGE, 0);
            let mut wanted = Vec::with_capacity(first.len());
            for (page, id) in ids.iter().enumerate() {
                // They are in the order of the leaf, each where it is first.
                if first.get(wanted.len()) == Some(id) {
                    wanted.push(Wanted { id: *id, token: wanted.len() as u64, at: At::new(at, leaf, page) });
                }
            }
            reader.fetch(&wanted, &mut scratch, &mut |at, page| buffer[at as usize * PAGE..][..PAGE].copy_from_slice(page))?;
            for group in buffer.chunks(GROUP) {
                out.piece(encoder.encode(group))?;
            }
            pages += first.len() as u64;
            done += (ids.len() * PAGE) as u64;
            progress(Progress { done: done.min(total), total });
        }
    }
    let hash = out.hash.finalize();
    out.put(hash.as_bytes())?;
    out.to.flush().map_err(ExportError::Target)?;
    let (machine, root) = (entry.to_string(), entry.root.to_string());
    Ok(ExportReport { machine, root, since: since.map(ToString::to_string), pages, bytes: out.bytes })
}

/// A group is as long as its pages.
const _: () = assert!(GROUP == GROUP_PAGES * PAGE);
