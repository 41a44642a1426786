//! A bit for each page or group of a machine.
//!
//! 131,072 pages are 2,048 words; `bits.set(37)` says whether that is news.

use std::ops::Range;

#[derive(Debug)]
pub(crate) struct Bits(Vec<u64>);

impl Bits {
    pub fn new(count: u64) -> Self {
        Self(vec![0; count.div_ceil(64) as usize])
    }

    pub fn get(&self, at: u64) -> bool {
        self.0.get((at / 64) as usize).is_some_and(|word| word >> (at % 64) & 1 == 1)
    }

    /// Whether it was not set before.
    pub fn set(&mut self, at: u64) -> bool {
        let Some(word) = self.0.get_mut((at / 64) as usize) else { return false };
        let before = *word;
        *word |= 1 << (at % 64);
        before != *word
    }

    /// Whether it was set before.
    pub fn clear(&mut self, at: u64) -> bool {
        let Some(word) = self.0.get_mut((at / 64) as usize) else { return false };
        let before = *word;
        *word &= !(1 << (at % 64));
        before != *word
    }

    pub fn set_all(&mut self, range: Range<u64>) {
        for at in range.start..range.end.min(self.0.len() as u64 * 64) {
            self.set(at);
        }
    }

    pub fn any(&self, range: Range<u64>) -> bool {
        range.into_iter().any(|at| self.get(at))
    }
}
