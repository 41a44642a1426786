//! A manifest that can be read: its head is verified, its leaves are when they are asked for.
//!
//! `manifest.leaf(&store, &identity, 0, 31)` reads the last leaf of the first section: it finds `Same`, `Same`, `Delta`, `Full` in four manifests,
//! applies the delta to the full one, and returns 4,096 names only if they have the hash that the first manifest's head says.

use std::collections::HashSet;
use std::sync::Arc;

use thiserror::Error;

use super::leaf::{Form, apply_delta, named, parse_full};
use super::table::{Table, split};
use super::{DEEPEST, Head, Listing, TRAILER, deposit_of};
use crate::codec::{Input, Malformed};
use crate::page::{Identity, PageId, Root};
use crate::remote::Service;
use crate::store::{Kind, Store, StoreError};

/// Why a machine cannot be read.
#[derive(Debug, Error)]
pub enum ManifestError {
    /// The store's fault.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It is damaged, or somebody changed it.
    #[error("the manifest of {}: {error}", called(.object))]
    Malformed {
        /// The object.
        object: String,
        /// What is wrong.
        error: Malformed,
    },
    /// Its pages are named by another manifest, which is missing.
    #[error("the manifest of {} rests on the machine with the root {base}, which is missing", called(.object))]
    NoBase {
        /// The object.
        object: String,
        /// What is missing.
        base: Root,
    },
}

/// What a manifest says that it rests on, though nothing else of it can be read.
///
/// # Errors
/// It does not say that either, or the store's fault.
pub(crate) fn named_base(store: &dyn Store, object: &str) -> Result<Option<Root>, ManifestError> {
    let malformed = |error| ManifestError::Malformed { object: object.to_owned(), error };
    let total = store.len(Kind::Manifest, object)?;
    let mut trailer = [0; TRAILER];
    let at = total.checked_sub(TRAILER as u64).ok_or_else(|| malformed(Malformed::Ends))?;
    store.read(Kind::Manifest, object, at, &mut trailer)?;
    let (_, table_at, end) = split(&trailer, total).map_err(malformed)?;
    let mut front = vec![0; (end - table_at).min(Table::FRONT as u64) as usize];
    store.read(Kind::Manifest, object, table_at, &mut front)?;
    Table::parse_front(&mut Input::new(&front)).map(|(base, _)| base).map_err(malformed)
}

fn called(object: &str) -> String {
    deposit_of(object).unwrap_or_else(|| object.to_owned())
}

/// A machine's manifest, with those that it rests on.
#[derive(Debug)]
pub struct Manifest {
    /// The object.
    pub object: String,
    /// Its root.
    pub root: Root,
    /// Its head, which has the root.
    pub head: Head,
    /// How its leaves are written.
    pub table: Table,
    /// What it rests on, and for each section the number that it has there.
    base: Option<(Arc<Self>, Vec<Option<usize>>)>,
}

impl Manifest {
    /// Opens the manifest of `root`, one of `listing`.
    ///
    /// # Errors
    /// It, or one that it rests on, is missing, damaged or changed.
    pub fn open(store: &dyn Store, identity: &Identity, listing: &Listing, root: &Root) -> Result<Arc<Self>, ManifestError> {
        let missing = || StoreError::Missing { kind: Kind::Manifest, name: root.to_string() };
        let object = listing.by_root(root).ok_or_else(missing)?.object();
        if let Some(service) = store.service() {
            return Self::open_remote(service, identity, object, *root);
        }
        let mut doubted = HashSet::new();
        loop {
            match Self::open_object(store, identity, listing, object.clone(), *root, u8::MAX) {
                // A cache or an open file may have what it was before somebody wrote it anew.
                Err(ManifestError::Malformed { object: which, .. } | ManifestError::NoBase { object: which, .. })
                    if doubted.insert(which.clone()) =>
                {
                    store.doubt(Kind::Manifest, &which);
                }
                opened => return opened,
            }
        }
    }

    /// Opens one whose leaves are asked for one by one: how they are written is known where it is.
    fn open_remote(service: &dyn Service, identity: &Identity, object: String, root: Root) -> Result<Arc<Self>, ManifestError> {
        let malformed = |error| ManifestError::Malformed { object: object.clone(), error };
        let (depth, head) = service.head(&root)?;
        if identity.root(&head) != root {
            return Err(malformed(Malformed::Hash("the head")));
        }
        let head = Head::parse(&head).map_err(malformed)?;
        if depth > DEEPEST {
            return Err(malformed(Malformed::Value("a manifest's depth", depth.into())));
        }
        let forms = head.sections.iter().map(|section| vec![Form::Same; section.leaves.len()]).collect();
        Ok(Arc::new(Self { object, root, head, table: Table { base: None, depth, forms }, base: None }))
    }

    fn open_object(
        store: &dyn Store,
        identity: &Identity,
        listing: &Listing,
        object: String,
        root: Root,
        below: u8,
    ) -> Result<Arc<Self>, ManifestError> {
        let malformed = |error| ManifestError::Malformed { object: object.clone(), error };
        let total = store.len(Kind::Manifest, &object)?;
        let mut trailer = [0; TRAILER];
        store.read(
            Kind::Manifest,
            &object,
            total.checked_sub(TRAILER as u64).ok_or_else(|| malformed(Malformed::Ends))?,
            &mut trailer,
        )?;
        let (head_at, table_at, end) = split(&trailer, total).map_err(malformed)?;
        // Both lengths are bounded by `split`.
        let mut bytes = vec![0; (end - head_at) as usize];
        store.read(Kind::Manifest, &object, head_at, &mut bytes)?;
        let (head, table) = bytes.split_at((table_at - head_at) as usize);
        if identity.root(head) != root {
            return Err(malformed(Malformed::Hash("the head")));
        }
        let head = Head::parse(head).map_err(malformed)?;
        let table = Table::parse(table, &head, head_at).map_err(malformed)?;
        // Bases are ever less deep, so they end.
        if table.depth >= below {
            return Err(malformed(Malformed::Value("a manifest's depth", table.depth.into())));
        }
        let base = match table.base {
            None => None,
            Some(base) => {
                let entry = listing.by_root(&base).ok_or_else(|| ManifestError::NoBase { object: object.clone(), base })?;
                let opened = Self::open_object(store, identity, listing, entry.object(), base, table.depth)?;
                let sections = head.sections.iter().map(|section| opened.section(&section.name)).collect();
                Some((opened, sections))
            }
        };
        Ok(Arc::new(Self { object, root, head, table, base }))
    }

    /// The number of a section.
    pub fn section(&self, name: &str) -> Option<usize> {
        self.head.sections.iter().position(|section| section.name == name)
    }

    /// Reads every leaf, verified: whether all names of the machine's pages are there.
    ///
    /// # Errors
    /// One is damaged, or the store's fault.
    pub fn verify(&self, store: &dyn Store, identity: &Identity) -> Result<(), ManifestError> {
        for (section, about) in self.head.sections.iter().enumerate() {
            for leaf in 0..about.leaves.len() {
                self.leaf(store, identity, section, leaf)?;
            }
        }
        Ok(())
    }

    /// The names of the pages of a leaf, verified. `section` and `leaf` exist.
    ///
    /// # Errors
    /// It is damaged or changed, or the store's fault.
    pub fn leaf(&self, store: &dyn Store, identity: &Identity, section: usize, leaf: usize) -> Result<Vec<PageId>, ManifestError> {
        self.verified(store, identity, section, leaf).or_else(|error| {
            let ManifestError::Malformed { .. } = error else { return Err(error) };
            let mut manifest = Some(self);
            while let Some(doubted) = manifest {
                store.doubt(Kind::Manifest, &doubted.object);
                manifest = doubted.base.as_ref().map(|(base, _)| &**base);
            }
            self.verified(store, identity, section, leaf)
        })
    }

    fn verified(&self, store: &dyn Store, identity: &Identity, section: usize, leaf: usize) -> Result<Vec<PageId>, ManifestError> {
        let pages = self.head.sections[section].pages_of(leaf);
        let hash = self.head.sections[section].leaves[leaf];
        let mut fetched = None;
        let ids = match store.service() {
            Some(service) => {
                let kept = store.pages().and_then(|cache| cache.leaf(&hash)).and_then(|full| parse_full(&full, pages).ok());
                if let Some(ids) = kept.filter(|ids| identity.leaf(ids) == hash) {
                    return Ok(ids);
                }
                let full = fetched.insert(service.leaf(&self.root, section, leaf)?);
                parse_full(full, pages).map_err(|error| self.malformed(error))?
            }
            None => self.resolve(store, section, leaf, pages)?,
        };
        if identity.leaf(&ids) == hash {
            if let (Some(cache), Some(full)) = (store.pages(), fetched) {
                cache.keep_leaf(&hash, &full);
            }
            Ok(ids)
        } else {
            Err(self.malformed(Malformed::Hash("a leaf")))
        }
    }

    fn resolve(&self, store: &dyn Store, section: usize, leaf: usize, pages: usize) -> Result<Vec<PageId>, ManifestError> {
        let form = self.table.forms.get(section).and_then(|forms| forms.get(leaf)).copied();
        let form = form.ok_or_else(|| self.malformed(Malformed::Value("a base's number of leaves", leaf as u64)))?;
        let of_base = || {
            let base = self.base.as_ref().and_then(|(base, sections)| Some((base, (*sections.get(section)?)?)));
            let (base, section) =
                base.ok_or_else(|| self.malformed(Malformed::Value("a section without a base", section as u64)))?;
            if base.head.sections[section].pages_of(leaf) != pages {
                return Err(self.malformed(Malformed::Value("the pages of a base's leaf", pages as u64)));
            }
            base.resolve(store, section, leaf, pages)
        };
        match form {
            Form::Zero => Ok(vec![PageId::ZERO; pages]),
            Form::Same => of_base(),
            Form::Full { offset, len } => {
                let bytes = self.read(store, offset, len)?;
                parse_full(&bytes, pages).map_err(|error| self.malformed(error))
            }
            Form::Delta { offset, len } => {
                let mut ids = of_base()?;
                let bytes = self.read(store, offset, len)?;
                apply_delta(&bytes, &mut ids).map_err(|error| self.malformed(error))?;
                Ok(ids)
            }
        }
    }

    /// The names that this manifest itself writes down for a leaf; those of all manifests are all that any machine needs.
    ///
    /// # Errors
    /// It is damaged, or the store's fault.
    pub fn named(&self, store: &dyn Store, section: usize, leaf: usize) -> Result<Vec<PageId>, ManifestError> {
        let form = self.table.forms[section][leaf];
        let bytes = match form {
            Form::Zero | Form::Same => return Ok(Vec::new()),
            Form::Full { offset, len } | Form::Delta { offset, len } => self.read(store, offset, len)?,
        };
        named(form, &bytes, self.head.sections[section].pages_of(leaf)).map_err(|error| self.malformed(error))
    }

    fn read(&self, store: &dyn Store, offset: u64, len: u32) -> Result<Vec<u8>, ManifestError> {
        let mut bytes = vec![0; len as usize];
        store.read(Kind::Manifest, &self.object, offset, &mut bytes)?;
        Ok(bytes)
    }

    fn malformed(&self, error: Malformed) -> ManifestError {
        ManifestError::Malformed { object: self.object.clone(), error }
    }

    /// Those that it rests on, the next first.
    pub fn bases(&self) -> impl Iterator<Item = &Arc<Self>> {
        std::iter::successors(self.base.as_ref().map(|(base, _)| base), |base| base.base.as_ref().map(|(base, _)| base))
    }

    /// The first below it for which `wanted` holds.
    pub fn below(&self, wanted: &dyn Fn(&Root) -> bool) -> Option<Arc<Self>> {
        let mut next = self.base.as_ref().map(|(base, _)| base);
        while let Some(base) = next {
            if wanted(&base.root) {
                return Some(base.clone());
            }
            next = base.base.as_ref().map(|(base, _)| base);
        }
        None
    }
}
