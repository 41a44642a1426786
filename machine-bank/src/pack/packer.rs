//! Pages one by one into groups, groups into packs.
//!
//! The sixteenth page that is pushed ends a group, and some 600 groups later `push` hands back a pack of 8 MiB.

use super::{GROUP, GroupEncoder, PackBuilder, Sealed};
use crate::page::{PAGE, PageId};

/// A group and a pack that are being filled.
#[derive(Debug)]
pub struct Packer {
    encoder: GroupEncoder,
    group: Vec<u8>,
    ids: Vec<PageId>,
    pack: PackBuilder,
    bytes: u64,
}

impl Packer {
    /// # Errors
    /// There is no memory for zstd's state.
    pub fn new() -> std::io::Result<Self> {
        let encoder = GroupEncoder::new()?;
        Ok(Self { encoder, group: Vec::with_capacity(GROUP), ids: Vec::new(), pack: PackBuilder::default(), bytes: 0 })
    }

    /// Takes a page, and hands back a pack that became full by it.
    pub fn push(&mut self, id: PageId, page: &[u8; PAGE]) -> Option<Sealed> {
        self.group.extend_from_slice(page);
        self.ids.push(id);
        if self.group.len() < GROUP {
            return None;
        }
        self.end_group();
        self.pack.is_full().then(|| std::mem::take(&mut self.pack).seal())
    }

    /// Bytes of whole groups that can be spilled.
    pub fn pending(&self) -> usize {
        self.pack.pending()
    }

    /// Hands out the whole groups that were not spilled before.
    ///
    /// # Errors
    /// Those of `write`; the pack is of no more use then.
    pub fn spill<E>(&mut self, write: impl FnOnce(&[u8]) -> Result<(), E>) -> Result<(), E> {
        self.pack.spill(write)
    }

    /// Ends a group that is not full.
    pub fn end_group(&mut self) {
        if self.group.is_empty() {
            return;
        }
        let group = self.encoder.encode(&self.group);
        self.bytes += group.len() as u64;
        self.pack.push(group, &self.ids);
        self.group.clear();
        self.ids.clear();
    }

    /// The pack as it is, which may be empty.
    pub fn take(&mut self) -> PackBuilder {
        self.end_group();
        std::mem::take(&mut self.pack)
    }

    /// Bytes of groups since this was last asked.
    pub fn take_bytes(&mut self) -> u64 {
        std::mem::take(&mut self.bytes)
    }
}
