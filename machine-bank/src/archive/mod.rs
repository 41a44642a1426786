//! A machine as one file, or one stream: for a tape, a mail, a pipe through `ssh`, or a bank that no other bank can reach.
//!
//! `export(&bank, &entry, None, &mut file, …)` of a guest of 512 MiB writes some 50 MiB; `import(&other, &mut file, …)` makes the machine in another bank, under
//! the same root. With `Some(&base)` the archive has what the base lacks, and is imported only where the base is.
//!
//! # The format, version 1
//!
//! Numbers are little-endian. It is written and read from the front to the back, without going back.
//!
//! ```text
//!    0  "FBARCH1\n"
//!    8  u8 flags: 1: the bank has a tenant key; other bits are 0
//!    9  how the bank is told from those of other keys (32), as in its description
//!   41  the root of the base (32); zeros: none
//!   73  u32 bytes, and the head of the manifest; its hash is the machine's root
//!       for each leaf of each section, in order:
//!           u8 form, as in a manifest: 0 zero, 1 as in the base, 2 in full, 3 what differs from the base; u32 bytes, and these
//!           its pages that came in no earlier leaf and that the base does not have, in order, in groups: u32 bytes, and a group as packs have it
//!       BLAKE3 of all of it (32)
//! ```
//!
//! A leaf of the base is that of the section of the same name, if it has as many pages. Pages are not named beside their groups: their names are in the leaf,
//! and each page is held against its own. So every byte is covered by the root but for how groups are compressed, which the hash at the end covers.
//! Groups are made anew: an archive has no page that is not the machine's, though a group of the bank may.
//!
//! The machine `tiny` of the crate's documentation, as golden files of the tests (`machine-bank/tests/golden/archive`):
//!
//! ```text
//! tiny@1, 348 bytes
//!   73  91 00 00 00, …        a head of 145 bytes, as in the manifest
//!  222  02, 41 00 00 00       the leaf is full, in 65 bytes: a bitmap and two names
//!  292  14 00 00 00, 01 …     one group of 20 bytes, of the one page that is named twice
//!  316  fb f7 01 16 …         the hash
//!
//! tiny@2-since-1, 265 bytes
//!   41  a8 83 17 90 …         it rests on the root of tiny@1
//!  222  03, 06 00 00 00       the leaf is what differs: nothing set, one page zero, page 2; so no group comes
//!  233  f7 1f fd 58 …         the hash
//! ```

mod export;
mod import;

use std::collections::HashSet;
use std::sync::Arc;

use crate::bank::Bank;
use crate::manifest::{Manifest, ManifestError};
use crate::page::PageId;

pub use export::{ExportError, ExportReport, export};
pub use import::{ImportError, ImportReport, import};

const MAGIC: &[u8; 8] = b"FBARCH1\n";
const KEYED: u8 = 1;
const ZERO: u8 = 0;
const SAME: u8 = 1;
const FULL: u8 = 2;
const DELTA: u8 = 3;

/// What an archive rests on, and which pages have been in it: both sides keep the same.
#[derive(Debug, Default)]
struct Seen {
    base: Option<Arc<Manifest>>,
    pages: HashSet<PageId>,
}

impl Seen {
    /// With all pages of a base.
    fn new(bank: &Bank, base: Option<Arc<Manifest>>) -> Result<Self, ManifestError> {
        let mut pages = HashSet::new();
        for (at, section) in base.iter().flat_map(|base| base.head.sections.iter().enumerate()) {
            for leaf in 0..section.leaves.len() {
                let Some(base) = &base else { continue };
                pages.extend(base.leaf(bank.store(), bank.identity(), at, leaf)?.iter().filter(|id| !id.is_zero()));
            }
        }
        Ok(Self { base, pages })
    }

    /// The leaf that a leaf of `count` pages of a section may rest on.
    fn below(&self, bank: &Bank, section: &str, leaf: usize, count: usize) -> Result<Option<Vec<PageId>>, ManifestError> {
        let Some((base, at)) = self.base.as_ref().and_then(|base| Some((base, base.section(section)?))) else { return Ok(None) };
        if base.head.sections[at].pages_of(leaf) != count {
            return Ok(None);
        }
        base.leaf(bank.store(), bank.identity(), at, leaf).map(Some)
    }

    /// Those of a leaf's pages that were in no earlier one, each once.
    fn first(&mut self, ids: &[PageId]) -> Vec<PageId> {
        ids.iter().filter(|id| !id.is_zero() && self.pages.insert(**id)).copied().collect()
    }
}
