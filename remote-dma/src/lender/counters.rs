//! What a lender's session counts, and how others learn it.
//!
//! A command that brings 128 KiB from a file adds one to `lent_pieces` and 131,072 to `lent_bytes`; the session's tally hears of it at most 64 polls later.

use std::sync::Arc;

use farbus_transport::tally::Named;
use farbus_transport::{Fabric, Tally, Teller};

use super::LenderSession;

/// What a session did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Register reads served.
    pub bar_reads: u64,
    /// Register writes served.
    pub bar_writes: u64,
    /// DMA reads and writes that went directly.
    pub direct_dma: u64,
    /// Bytes of those.
    pub direct_bytes: u64,
    /// Pieces of guest memory that threads of the device, or the kernel for them, were let into: where an image is a file, its data go that way.
    pub lent_pieces: u64,
    /// Bytes of those.
    pub lent_bytes: u64,
    /// Pieces of DMA that went through the guest's side.
    pub mediated: u64,
    /// DMA that was refused.
    pub faults: u64,
    /// Interrupts sent.
    pub interrupts: u64,
}

impl Counters {
    /// Their names, in the order of [`Counters::values`].
    pub const NAMES: &'static [Named] = &[
        ("bar_reads", "Register reads served."),
        ("bar_writes", "Register writes served."),
        ("direct_dma", "DMA reads and writes that went directly."),
        ("direct_bytes", "Bytes of DMA that went directly."),
        ("lent_pieces", "Pieces of guest memory that threads of the device, or the kernel for them, were let into."),
        ("lent_bytes", "Bytes of those."),
        ("mediated", "Pieces of DMA that went through the guest's side."),
        ("faults", "DMA that was refused."),
        ("interrupts", "Interrupts sent."),
    ];

    /// All of them.
    pub const fn values(&self) -> [u64; 9] {
        let Self { bar_reads, bar_writes, direct_dma, direct_bytes, lent_pieces, lent_bytes, mediated, faults, interrupts } = *self;
        [bar_reads, bar_writes, direct_dma, direct_bytes, lent_pieces, lent_bytes, mediated, faults, interrupts]
    }
}

impl<F: Fabric> LenderSession<F> {
    /// What happened so far.
    pub fn counters(&self) -> Counters {
        self.bus.counters()
    }

    /// Tells `tally`, which has [`Counters::NAMES`], what it counts: every 64 polls, before each sleep, and at the end.
    #[must_use]
    pub fn telling(mut self, tally: Arc<Tally>) -> Self {
        self.teller = Some(Teller::new(tally));
        self
    }

    #[inline]
    pub(super) fn tell_counters(&mut self) {
        if let Some(teller) = &mut self.teller {
            teller.tell(&self.bus.counters.values());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_counter_has_a_name() {
        let counters = Counters { interrupts: 7, ..Counters::default() };
        assert_eq!((counters.values().len(), counters.values()[8]), (Counters::NAMES.len(), 7));
        assert_eq!(Counters::NAMES[8].0, "interrupts");
    }
}
