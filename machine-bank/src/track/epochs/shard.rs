//! What is known of 512 pages in an epoch: which the deposit has still to read, which were written since, and what was set aside of these.
//!
//! Page 7 is due; it is written: its old bytes are set aside, it is written and due no more; the deposit takes them, and after that there is nothing
//! of the epoch left to read there.

use std::collections::HashMap;

use crate::page::PAGE;

/// Pages of a shard.
pub(super) const SHARD_PAGES: u64 = 512;
const WORDS: usize = SHARD_PAGES as usize / 64;

/// A bit for each page.
type Bits = [u64; WORDS];

/// 512 pages.
#[derive(Debug)]
pub(super) struct Shard {
    /// In the epoch, and not read yet.
    due: Bits,
    /// Since the epoch began, or since the last one where none runs.
    written: Bits,
    /// Were written before they were read, or cannot be had any more.
    aside: HashMap<u16, Box<[u8; PAGE]>>,
    lost: bool,
}

/// Where a page's bytes of the epoch are.
pub(super) enum Taken {
    /// They were set aside.
    Aside(Box<[u8; PAGE]>),
    /// Where they were.
    Memory,
    /// Nowhere.
    Lost,
}

impl Shard {
    pub fn all_written() -> Self {
        Self { due: [0; WORDS], written: [u64::MAX; WORDS], aside: HashMap::new(), lost: false }
    }

    /// An epoch begins: what was written is due, and returned.
    pub fn begin(&mut self) -> Bits {
        self.due = std::mem::take(&mut self.written);
        self.due
    }

    /// The epoch ends; `again` counts as written. How many pages were set aside is returned.
    pub fn end(&mut self, again: Option<Bits>) -> u64 {
        self.due = [0; WORDS];
        if let Some(again) = again {
            self.written.iter_mut().zip(again).for_each(|(written, again)| *written |= again);
        }
        let freed = self.aside.len() as u64;
        self.aside.clear();
        freed
    }

    /// Whether the epoch's deposit has still to read the page.
    pub fn is_due(&self, at: usize) -> bool {
        get(&self.due, at)
    }

    pub fn write(&mut self, at: usize) {
        self.written[at / 64] |= 1 << (at % 64);
    }

    /// Keeps what a page was.
    pub fn set_aside(&mut self, at: usize, bytes: Box<[u8; PAGE]>) {
        self.clear_due(at);
        self.aside.insert(at as u16, bytes);
    }

    /// A page whose bytes cannot be had.
    pub fn lose_one(&mut self, at: usize) {
        self.clear_due(at);
        self.write(at);
    }

    /// Nobody tells of writes any more.
    pub fn lose(&mut self) {
        self.lost = true;
    }

    /// The deposit reads a page.
    pub fn take(&mut self, at: usize) -> Taken {
        if let Some(bytes) = self.aside.remove(&(at as u16)) {
            return Taken::Aside(bytes);
        }
        // What is neither due nor written is as it was when the epoch began.
        if self.lost || (!self.is_due(at) && get(&self.written, at)) {
            return Taken::Lost;
        }
        self.clear_due(at);
        Taken::Memory
    }

    fn clear_due(&mut self, at: usize) {
        self.due[at / 64] &= !(1 << (at % 64));
    }
}

fn get(bits: &Bits, at: usize) -> bool {
    bits[at / 64] >> (at % 64) & 1 == 1
}
