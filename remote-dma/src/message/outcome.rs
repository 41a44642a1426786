//! How the lender answers a question of the borrower's, and the byte that stands for it in a message.
//!
//! A window at 0xfee0_0000 for a device whose IOMMU keeps these addresses to itself ends as `Outcome::Unreachable`, which travels as 6.

/// How a question to the lender ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// As asked.
    Done,
    /// The ranges overlap.
    Overlap,
    /// The range is no range, or leaves its memory.
    Range,
    /// Too many windows or regions.
    TooMany,
    /// The grant could not be taken.
    Grant,
    /// No such key.
    UnknownKey,
    /// The device, or its IOMMU, does not reach the range.
    Unreachable,
}

pub(super) const OUTCOMES: [Outcome; 7] = {
    use Outcome::{Done, Grant, Overlap, Range, TooMany, UnknownKey, Unreachable};
    [Done, Overlap, Range, TooMany, Grant, UnknownKey, Unreachable]
};

impl Outcome {
    pub(super) fn code(self) -> u8 {
        OUTCOMES.iter().position(|known| *known == self).unwrap_or(0) as u8
    }

    pub(super) fn from_code(code: u8) -> Option<Self> {
        OUTCOMES.get(usize::from(code)).copied()
    }
}
