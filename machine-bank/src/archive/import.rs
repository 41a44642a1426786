//! A machine out of a stream that anybody may have written, into a bank: nothing is seen of it before all of it was there and right.
//!
//! `import(&bank, &mut pipe, &|_| {})` of an archive that was cut off after 40 MiB is refused; its pages are in no machine and go with the next sweep.

use std::io::{self, Read};

use serde::Serialize;
use thiserror::Error;

use super::{DELTA, FULL, KEYED, MAGIC, SAME, Seen, ZERO};
use crate::bank::Bank;
use crate::codec::Malformed;
use crate::deposit::Progress;
use crate::index::IndexError;
use crate::known::Known;
use crate::manifest::head::{Head, MOST_HEAD};
use crate::manifest::leaf::{LEAF, apply_delta, parse_full};
use crate::manifest::{LeafNames, Manifest, ManifestError, Writer};
use crate::pack::{GROUP, GroupDecoder, Packer, Sealed};
use crate::page::{PAGE, PageId, Root};
use crate::store::{Durability, Hold, Kind, StoreError};

/// Bytes of the longest leaf: a bitmap and all names.
const MOST_LEAF: usize = LEAF / 8 + LEAF * 32;

/// What was imported.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ImportReport {
    /// What the machine is called here.
    pub machine: String,
    /// Its root.
    pub root: String,
    /// What the archive rests on.
    pub since: Option<String>,
    /// Whether it was there already, so that nothing was imported but pages of it that had been lost.
    pub was_there: bool,
    /// Pages of the archive.
    pub pages: u64,
    /// Of these, those that the bank did not have.
    pub new: u64,
    /// Bytes of the packs that they became.
    pub pack_bytes: u64,
}

/// Why no machine was imported.
#[derive(Debug, Error)]
pub enum ImportError {
    /// It is no archive, it was changed, or it was cut off.
    #[error("the archive: {0}")]
    Malformed(#[from] Malformed),
    /// It is of another tenant.
    #[error("the archive is of a bank with {}", if *.0 { "another tenant key" } else { "another tenant key, or without one" })]
    Keys(bool),
    /// It says what differs from a machine that is not here.
    #[error("the archive rests on the machine with the root {0}, which is not in the bank")]
    NoBase(Root),
    /// It cannot be read.
    #[error("cannot read the archive: {0}")]
    Source(io::Error),
    /// What it rests on cannot be read.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The index cannot be read.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// There is no memory for a compressor.
    #[error("no memory: {0}")]
    Memory(io::Error),
    /// The store's fault, or a sweep is running.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What is read, hashed.
struct In<'a> {
    from: &'a mut dyn Read,
    hash: blake3::Hasher,
}

impl In<'_> {
    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), ImportError> {
        self.from.read_exact(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Malformed::Ends.into(),
            _ => ImportError::Source(error),
        })?;
        self.hash.update(bytes);
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ImportError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    /// A length of 4 bytes, at most `most`, and as many bytes. Room is made as they come.
    fn piece(&mut self, what: &'static str, most: usize) -> Result<Vec<u8>, ImportError> {
        let len = u32::from_le_bytes(self.array()?);
        if len as usize > most {
            return Err(Malformed::Value(what, len.into()).into());
        }
        let mut bytes = Vec::new();
        self.from.take(len.into()).read_to_end(&mut bytes).map_err(ImportError::Source)?;
        if bytes.len() != len as usize {
            return Err(Malformed::Ends.into());
        }
        self.hash.update(&bytes);
        Ok(bytes)
    }
}

/// The pages that are stored.
struct Pages<'b> {
    bank: &'b Bank,
    known: Known,
    packer: Packer,
    decoder: GroupDecoder,
    group: Box<[u8; GROUP]>,
    report: ImportReport,
}

/// Makes the machine of an archive. The archive ends with the stream.
///
/// # Errors
/// It is no archive, was changed or cut off, is of another tenant, or rests on what is not here; the machine is not there then.
pub fn import(bank: &Bank, from: &mut dyn Read, progress: &dyn Fn(Progress)) -> Result<ImportReport, ImportError> {
    let mut input = In { from, hash: blake3::Hasher::new() };
    if input.array::<8>()? != *MAGIC {
        return Err(Malformed::Magic("archive of a machine").into());
    }
    let ([flags], check, base) = (input.array()?, input.array::<32>()?, input.array::<32>()?);
    if flags & !KEYED != 0 {
        return Err(Malformed::Value("the flags", flags.into()).into());
    }
    let keyed = flags & KEYED != 0;
    if check != bank.identity().check() || keyed != bank.identity().is_keyed() {
        return Err(ImportError::Keys(bank.identity().is_keyed()));
    }
    let head = input.piece("the length of the head", MOST_HEAD)?;
    let root = bank.identity().root(&head);
    let head = Head::parse(&head)?;
    let _hold = bank.store().hold(Hold::Deposit, bank.wait())?;
    let listing = bank.listing()?;
    // It is read all the same: pages of it may have been lost, and whoever writes the archive into a pipe comes to its end.
    let there = listing.by_root(&root).cloned();
    let base = Some(Root(base)).filter(|base| base.0 != [0; 32]);
    let since = base.map(|base| listing.by_root(&base).ok_or(ImportError::NoBase(base))).transpose()?;
    let open = |root: &Root| Manifest::open(bank.store(), bank.identity(), &listing, root);
    let base = since.map(|since| open(&since.root)).transpose()?;
    // Names are written against the base, or the parent where it is here.
    let below = match head.parent.filter(|parent| base.is_none() && listing.by_root(parent).is_some()) {
        Some(parent) => Some(open(&parent)?),
        None => base.clone(),
    };
    let mut writer = Writer::new(bank.store(), below)?;
    let report = ImportReport { since: since.map(ToString::to_string), ..ImportReport::default() };
    let mut pages = Pages::new(bank, report)?;
    let mut seen = Seen::new(bank, base)?;
    let (mut done, total) = (0, head.sections.iter().map(|section| section.len).fold(0, u64::saturating_add));
    for section in &head.sections {
        let to = writer.section(section.kind, &section.name, section.len);
        writer.count(to, section.counts);
        for (leaf, hash) in section.leaves.iter().enumerate() {
            let count = section.pages_of(leaf);
            let ids = read_leaf(&mut input, count, || seen.below(bank, &section.name, leaf, count))?;
            if bank.identity().leaf(&ids) != *hash {
                return Err(Malformed::Hash("a leaf").into());
            }
            pages.take(&mut input, &seen.first(&ids))?;
            let below = match writer.base().map(|base| (base, base.section(&section.name))) {
                Some((base, Some(at))) if base.head.sections[at].pages_of(leaf) == count => {
                    Some(base.leaf(bank.store(), bank.identity(), at, leaf)?)
                }
                _ => None,
            };
            writer.leaf(to, leaf, &LeafNames::new(bank.identity(), &ids, below.as_deref()))?;
            done += (count * PAGE) as u64;
            progress(Progress { done: done.min(total), total });
        }
    }
    let hash = input.hash.finalize();
    if input.array::<32>()? != *hash.as_bytes() {
        return Err(Malformed::Hash("it").into());
    }
    if input.from.read(&mut [0]).map_err(ImportError::Source)? != 0 {
        return Err(Malformed::Trailing(1).into());
    }
    pages.end()?;
    if let Some(there) = there {
        let Pages { known, report, .. } = pages;
        known.finish(bank)?;
        // Whoever hears that it is there relies on it.
        open(&root)?.verify(bank.store(), bank.identity())?;
        return Ok(ImportReport { machine: there.to_string(), root: root.to_string(), was_there: true, ..report });
    }
    let commit = bank.store().hold(Hold::Commit, bank.wait())?;
    let number = |made: Root| {
        // What was read is what is written, so its hash is; only a fault of ours could differ.
        if made != root {
            return Err(StoreError::Name(made.to_string()));
        }
        bank.next_number(&head.machine)
    };
    let entry = writer.finish(bank.identity(), &head.machine, head.created_ms, head.parent, number)?;
    drop(commit);
    bank.store().sync(Kind::Manifest)?;
    let Pages { known, report, .. } = pages;
    known.finish(bank)?;
    Ok(ImportReport { machine: entry.to_string(), root: root.to_string(), ..report })
}

/// The names of a leaf of `count` pages.
fn read_leaf(
    input: &mut In<'_>,
    count: usize,
    below: impl FnOnce() -> Result<Option<Vec<PageId>>, ManifestError>,
) -> Result<Vec<PageId>, ImportError> {
    let [form] = input.array()?;
    let bytes = input.piece("the length of a leaf", MOST_LEAF)?;
    if matches!(form, ZERO | SAME) && !bytes.is_empty() {
        return Err(Malformed::Trailing(bytes.len()).into());
    }
    let of_base = || below()?.ok_or(ImportError::Malformed(Malformed::Value("a leaf without a base", count as u64)));
    match form {
        ZERO => Ok(vec![PageId::ZERO; count]),
        SAME => of_base(),
        FULL => Ok(parse_full(&bytes, count)?),
        DELTA => {
            let mut ids = of_base()?;
            apply_delta(&bytes, &mut ids)?;
            Ok(ids)
        }
        other => Err(Malformed::Value("the form of a leaf", other.into()).into()),
    }
}

impl<'b> Pages<'b> {
    fn new(bank: &'b Bank, report: ImportReport) -> Result<Self, ImportError> {
        let (packer, decoder) = (Packer::new().map_err(ImportError::Memory)?, GroupDecoder::new().map_err(ImportError::Memory)?);
        Ok(Self { bank, known: Known::open(bank)?, packer, decoder, group: Box::new([0; GROUP]), report })
    }

    /// Reads the groups of `ids`, each page held against its name, and stores those that the bank lacks.
    fn take(&mut self, input: &mut In<'_>, ids: &[PageId]) -> Result<(), ImportError> {
        let mut rest = ids;
        while !rest.is_empty() {
            let group = input.piece("the length of a group", GROUP + 1)?;
            let len = self.decoder.decode(&group, &mut self.group)?;
            let (these, others) =
                rest.split_at_checked(len / PAGE).ok_or(Malformed::Value("a group's number of pages", len as u64))?;
            rest = others;
            let mut full: Vec<Sealed> = Vec::new();
            let mut lacking: Vec<_> = these.iter().zip(self.group[..len].as_chunks::<PAGE>().0).collect();
            if lacking.iter().any(|(id, page)| self.bank.identity().page(*page) != **id) {
                return Err(Malformed::Hash("a page").into());
            }
            self.known.lacking(self.bank, &mut lacking, |(id, _)| **id)?;
            for (id, page) in lacking {
                self.report.new += 1;
                full.extend(self.packer.push(*id, page));
            }
            full.iter().try_for_each(|sealed| self.put(sealed))?;
        }
        self.report.pages += ids.len() as u64;
        Ok(())
    }

    fn put(&mut self, sealed: &Sealed) -> Result<(), StoreError> {
        self.bank.store().put(Kind::Pack, &sealed.id.name(), &sealed.bytes, Durability::Durable)?;
        self.report.pack_bytes += sealed.bytes.len() as u64;
        self.known.add(self.bank, sealed.id, &sealed.entries)
    }

    /// Stores the last pack, and makes all of them durable.
    fn end(&mut self) -> Result<(), StoreError> {
        let last = self.packer.take();
        if !last.is_empty() {
            self.put(&last.seal())?;
        }
        self.bank.store().sync(Kind::Pack)
    }
}
