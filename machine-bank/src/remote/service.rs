//! What a store says of pages and machines where it is not a store of bytes but another bank: the seam between both kinds.
//!
//! `store.service()` is nothing for a directory, whose packs and index are read; over a link it answers `leaf(root, 0, 31)` and `fetch(root, 0, 31, …)`, and
//! nobody learns which pack has what, or what other machines are made of.

use std::fmt;

use farbus_transport::tally::Named;
use serde::Serialize;

use crate::page::{PageId, Root};
use crate::store::StoreError;

/// What went over a link so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct WireCounts {
    /// Messages that this side sent.
    pub messages_sent: u64,
    /// Messages that it received.
    pub messages_received: u64,
    /// Bytes of both.
    pub message_bytes: u64,
    /// One-sided reads of the other side's memory.
    pub reads: u64,
    /// Bytes that they brought.
    pub read_bytes: u64,
    /// Bytes that the other side was told to read here.
    pub offered_bytes: u64,
}

impl WireCounts {
    /// Their names, in the order of [`WireCounts::values`].
    pub const NAMES: &'static [Named] = &[
        ("messages_sent", "Messages sent."),
        ("messages_received", "Messages received."),
        ("message_bytes", "Bytes of messages sent and received."),
        ("reads", "One-sided reads of the other side's memory."),
        ("read_bytes", "Bytes that they brought."),
        ("offered_bytes", "Bytes that the other side was told to read here."),
    ];

    /// All of them.
    pub const fn values(&self) -> [u64; 6] {
        let Self { messages_sent, messages_received, message_bytes, reads, read_bytes, offered_bytes } = *self;
        [messages_sent, messages_received, message_bytes, reads, read_bytes, offered_bytes]
    }

    /// These and others.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        Self {
            messages_sent: self.messages_sent + other.messages_sent,
            messages_received: self.messages_received + other.messages_received,
            message_bytes: self.message_bytes + other.message_bytes,
            reads: self.reads + other.reads,
            read_bytes: self.read_bytes + other.read_bytes,
            offered_bytes: self.offered_bytes + other.offered_bytes,
        }
    }
}

/// What comes of pages that are fetched.
#[derive(Debug)]
pub enum Fetched<'a> {
    /// A group as it is stored, and which of the wanted pages it has: number in the leaf, number in the group. Nothing of it is verified.
    Group(&'a [u8], &'a [(u16, u8)]),
    /// A page that no pack has, by its number in the leaf.
    Missing(u16),
}

/// A bank that is asked for machines and pages.
pub trait Service: Send + Sync + fmt::Debug {
    /// How deep a machine's manifest rests on others, and its head. Unverified.
    ///
    /// # Errors
    /// There is no such machine for this client, or the link's fault.
    fn head(&self, root: &Root) -> Result<(u8, Vec<u8>), StoreError>;

    /// The names of a leaf's pages, as a leaf is written in full. Unverified.
    ///
    /// # Errors
    /// As [`Service::head`].
    fn leaf(&self, root: &Root, section: usize, leaf: usize) -> Result<Vec<u8>, StoreError>;

    /// Hands the groups with `pages` of a leaf to `sink`. `buffer` is the caller's, so that none is made for each leaf.
    ///
    /// # Errors
    /// As [`Service::head`]; others may have been handed out.
    fn fetch(
        &self,
        root: &Root,
        section: usize,
        leaf: usize,
        pages: &[u16],
        buffer: &mut Vec<u8>,
        sink: &mut dyn FnMut(Fetched<'_>),
    ) -> Result<(), StoreError>;

    /// Which pages need not be sent.
    ///
    /// # Errors
    /// The link's fault, or nothing may be deposited.
    fn have(&self, ids: &[PageId]) -> Result<Vec<bool>, StoreError>;

    /// What went over the link.
    fn wire(&self) -> WireCounts;
}
