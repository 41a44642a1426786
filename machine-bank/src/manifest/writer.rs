//! Writes a manifest: leaves as they become ready, in any order, and at the end the head that they belong to.
//!
//! Two threads each hash every other leaf of a machine, and hand what they found to one writer; the root is known when the last has come.

use std::sync::Arc;

use super::head::{Head, Section, leaves};
use super::leaf::{Encoded, Form, encode};
use super::table::Table;
use super::{DEEPEST, END, Entry, MAGIC, Manifest, SectionKind};
use crate::manifest::Counts;
use crate::page::{Identity, PageId, Root};
use crate::store::{Draft, Kind, Store, StoreError};

/// A manifest that is being written.
#[derive(Debug)]
pub struct Writer {
    draft: Box<dyn Draft>,
    offset: u64,
    base: Option<Arc<Manifest>>,
    sections: Vec<Section>,
    forms: Vec<Vec<Form>>,
}

/// A leaf that is hashed and encoded, which needs no writer.
#[derive(Debug)]
pub struct LeafNames {
    hash: [u8; 32],
    encoded: Encoded,
}

impl LeafNames {
    /// The leaf of these names, against those of the base.
    pub fn new(identity: &Identity, ids: &[PageId], base: Option<&[PageId]>) -> Self {
        Self { hash: identity.leaf(ids), encoded: encode(ids, base) }
    }
}

impl Writer {
    /// A manifest without sections. `base` is left out where it is too deep already.
    ///
    /// # Errors
    /// The store's fault.
    pub fn new(store: &dyn Store, base: Option<Arc<Manifest>>) -> Result<Self, StoreError> {
        let mut draft = store.create(Kind::Manifest)?;
        draft.append(MAGIC)?;
        let base = base.filter(|base| base.table.depth < DEEPEST);
        Ok(Self { draft, offset: MAGIC.len() as u64, base, sections: Vec::new(), forms: Vec::new() })
    }

    /// What leaves are written against.
    pub fn base(&self) -> Option<&Arc<Manifest>> {
        self.base.as_ref()
    }

    /// Begins a section; its number is returned.
    pub fn section(&mut self, kind: SectionKind, name: &str, len: u64) -> usize {
        let leaves = vec![[0; 32]; leaves(len)];
        self.forms.push(vec![Form::Zero; leaves.len()]);
        self.sections.push(Section { kind, name: name.to_owned(), len, counts: Counts::default(), leaves });
        self.sections.len() - 1
    }

    /// Whether no section was begun.
    pub fn is_empty(&self) -> bool {
        self.sections.is_empty()
    }

    /// Whether there is such a section.
    pub fn has(&self, name: &str) -> bool {
        self.sections.iter().any(|section| section.name == name)
    }

    /// Takes a leaf. Each of a section has to come once.
    ///
    /// # Errors
    /// The store's fault.
    pub fn leaf(&mut self, section: usize, leaf: usize, names: &LeafNames) -> Result<(), StoreError> {
        let mut place = |bytes: &[u8]| {
            let offset = self.offset;
            self.draft.append(bytes)?;
            self.offset += bytes.len() as u64;
            Ok::<_, StoreError>((offset, bytes.len() as u32))
        };
        let form = match &names.encoded {
            Encoded::Zero => Form::Zero,
            Encoded::Same => Form::Same,
            Encoded::Full(bytes) => place(bytes).map(|(offset, len)| Form::Full { offset, len })?,
            Encoded::Delta(bytes) => place(bytes).map(|(offset, len)| Form::Delta { offset, len })?,
        };
        self.forms[section][leaf] = form;
        self.sections[section].leaves[leaf] = names.hash;
        Ok(())
    }

    /// What became of a section's pages.
    pub fn count(&mut self, section: usize, counts: Counts) {
        self.sections[section].counts = counts;
    }

    /// What all sections' pages became.
    pub fn counts(&self) -> Counts {
        let mut sum = Counts::default();
        self.sections.iter().for_each(|section| sum.add(&section.counts));
        sum
    }

    /// Ends it under the head of these fields and commits it as the deposit that `number` says, which is asked last.
    ///
    /// # Errors
    /// The store's fault.
    pub fn finish(
        mut self,
        identity: &Identity,
        machine: &str,
        created_ms: u64,
        parent: Option<Root>,
        number: impl FnOnce(Root) -> Result<u64, StoreError>,
    ) -> Result<Entry, StoreError> {
        let used = self.forms.iter().flatten().any(|form| matches!(form, Form::Same | Form::Delta { .. }));
        let base = self.base.take().filter(|_| used);
        let depth = base.as_ref().map_or(0, |base| base.table.depth + 1);
        let table = Table { base: base.map(|base| base.root), depth, forms: self.forms }.encode();
        let head = Head { machine: machine.to_owned(), created_ms, parent, sections: self.sections }.encode();
        let root = identity.root(&head);
        self.draft.append(&head)?;
        self.draft.append(&table)?;
        let lengths = [(head.len() as u32).to_le_bytes(), (table.len() as u32).to_le_bytes()].concat();
        self.draft.append(&[&lengths[..], END].concat())?;
        let len = self.offset + (head.len() + table.len()) as u64 + super::TRAILER as u64;
        let entry = Entry { machine: machine.to_owned(), number: number(root)?, root, len };
        self.draft.commit_deposit(entry)
    }
}
