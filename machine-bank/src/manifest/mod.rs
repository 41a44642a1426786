//! Manifests: what a machine was at one deposit. The leaves come first, in any order, then the head, then where each leaf is and how it is written.
//!
//! The second deposit of a machine of 512 MiB of which 900 pages changed is a manifest of some 34 KB: 900 names with their positions against the
//! first as its base. Deltas of deltas end at depth 32, where all names are written again.
//!
//! ```text
//! "FBMACH1\n"          8
//! leaves               in the order in which they were ready
//! head                 what the root is the hash of (head.rs)
//! table                base's root (32, zeros: none), depth (1), and for each leaf its form (1), and offset (8) and length (4) where it has bytes
//! lengths of head and table (4 and 4), "FBMACHE\n"
//! ```
//!
//! Only the head is under the root. How its leaves are written may change, when the base is removed say: what they resolve to may not, because
//! the head has their hashes.

pub mod head;
pub mod leaf;
mod listing;
mod opened;
mod rewrite;
mod table;
mod writer;

pub use head::{Counts, Head, Section, SectionKind, valid_machine};
pub use leaf::LEAF;
pub use listing::{Entry, Listing, deposit_of};
pub(crate) use opened::named_base;
pub use opened::{Manifest, ManifestError};
pub use rewrite::rewrite;
pub use table::{Table, split};
pub use writer::{LeafNames, Writer};

const MAGIC: &[u8; 8] = b"FBMACH1\n";
const END: &[u8; 8] = b"FBMACHE\n";
/// Bytes at a manifest's end that say where head and table are.
pub const TRAILER: usize = 16;
/// Manifests on top of each other from which all names are written again.
pub const DEEPEST: u8 = 32;
