//! MSI-X (PCIe 5.0, section 6.1.4 and 7.7.2): the table and the pending-bit array that lie in a BAR, and what they let through.
//!
//! With 65 vectors the table is 1,040 bytes: vector 3's message address is at table + 0x30, its data at + 0x38, its mask bit at + 0x3c;
//! the pending bits of vectors 0 to 63 are the first 8 bytes of the array.

use farbus_remote_dma::Width;

use super::Raised;
use crate::irq::MessageInterrupt;
use crate::state::VectorState;

/// Bytes of one table entry.
pub(crate) const ENTRY_BYTES: u64 = 16;

const MASKED: u32 = 1;

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    address: u64,
    data: u32,
}

/// The table and pending bits of one function.
#[derive(Clone, Debug)]
pub(crate) struct Msix {
    entries: Vec<Entry>,
    masked: Vec<u64>,
    pending: Vec<u64>,
}

impl Msix {
    /// All vectors masked, as after a reset.
    pub(crate) fn new(vectors: u16) -> Self {
        let words = usize::from(vectors).div_ceil(64);
        Self { entries: vec![Entry::default(); usize::from(vectors)], masked: vec![u64::MAX; words], pending: vec![0; words] }
    }

    pub(crate) fn reset(&mut self) {
        self.entries.fill(Entry::default());
        self.masked.fill(u64::MAX);
        self.pending.fill(0);
    }

    /// All of it, for a saved state.
    pub(crate) fn save(&self) -> Vec<VectorState> {
        let bit = |words: &[u64], vector: usize| words.get(vector / 64).is_some_and(|word| word >> (vector % 64) & 1 == 1);
        let entries = self.entries.iter().enumerate();
        entries
            .map(|(vector, entry)| VectorState {
                address: entry.address,
                data: entry.data,
                masked: bit(&self.masked, vector),
                pending: bit(&self.pending, vector),
            })
            .collect()
    }

    /// Takes what was saved; false, and nothing is taken, where it has another number of vectors.
    pub(crate) fn load(&mut self, saved: &[VectorState]) -> bool {
        if saved.len() != self.entries.len() {
            return false;
        }
        self.reset();
        for (vector, state) in saved.iter().enumerate() {
            let (word, bit) = (vector / 64, 1u64 << (vector % 64));
            if let Some(entry) = self.entries.get_mut(vector) {
                // The two lowest address bits are zero, whatever was saved: messages are aligned words.
                *entry = Entry { address: state.address & !3, data: state.data };
            }
            if let (Some(masked), false) = (self.masked.get_mut(word), state.masked) {
                *masked &= !bit;
            }
            if let (Some(pending), true) = (self.pending.get_mut(word), state.pending) {
                *pending |= bit;
            }
        }
        true
    }

    /// Bytes of the table.
    pub(crate) fn table_bytes(&self) -> u64 {
        self.entries.len() as u64 * ENTRY_BYTES
    }

    /// Bytes of the pending-bit array.
    pub(crate) fn pending_bytes(&self) -> u64 {
        self.pending.len() as u64 * 8
    }

    /// The device raised `vector`; `open` where neither the function mask nor a missing right to send holds all vectors back.
    pub(crate) fn raise(&mut self, vector: u16, open: bool) -> Raised {
        let Some(entry) = self.entries.get(usize::from(vector)) else {
            return Raised::NoVector;
        };
        let (word, bit) = place(vector);
        if open && self.masked.get(word).is_some_and(|masked| masked & bit == 0) {
            return Raised::Deliver(MessageInterrupt { vector, address: entry.address, data: entry.data });
        }
        if let Some(pending) = self.pending.get_mut(word) {
            *pending |= bit;
        }
        Raised::Pending
    }

    /// The next vector that is pending and no longer masked; its pending bit is cleared. Only to be asked while all vectors are open.
    pub(crate) fn take_ready(&mut self) -> Option<MessageInterrupt> {
        let words = self.pending.iter_mut().zip(&self.masked).enumerate();
        for (index, (pending, masked)) in words {
            let ready = *pending & !masked;
            if ready == 0 {
                continue;
            }
            *pending &= !(ready & ready.wrapping_neg());
            let vector = index * 64 + ready.trailing_zeros() as usize;
            let entry = self.entries.get(vector)?;
            return Some(MessageInterrupt { vector: vector as u16, address: entry.address, data: entry.data });
        }
        None
    }

    /// A read of the table, `offset` bytes from its start. Bits of vector control other than the mask read zero.
    pub(crate) fn read_table(&self, offset: u64, width: Width) -> u64 {
        let index = (offset / ENTRY_BYTES) as usize;
        let Some(entry) = self.entries.get(index) else { return 0 };
        let (word, bit) = place(index as u16);
        let control = self.masked.get(word).map_or(0, |masked| u64::from(masked & bit != 0));
        let half = if offset % ENTRY_BYTES < 8 { entry.address } else { u64::from(entry.data) | control << 32 };
        width.truncate(half >> (offset % 8 * 8))
    }

    /// A write of the table. Only 4 and 8 bytes are defined (PCIe 5.0, section 7.7.2); others are ignored.
    pub(crate) fn write_table(&mut self, offset: u64, width: Width, value: u64) {
        match width {
            Width::B1 | Width::B2 => {}
            Width::B4 => self.write_word(offset, value as u32),
            Width::B8 => {
                self.write_word(offset, value as u32);
                self.write_word(offset + 4, (value >> 32) as u32);
            }
        }
    }

    /// A read of the pending-bit array. Writes have no effect there.
    pub(crate) fn read_pending(&self, offset: u64, width: Width) -> u64 {
        let word = self.pending.get((offset / 8) as usize).copied().unwrap_or(0);
        width.truncate(word >> (offset % 8 * 8))
    }

    fn write_word(&mut self, offset: u64, value: u32) {
        let index = (offset / ENTRY_BYTES) as usize;
        let Some(entry) = self.entries.get_mut(index) else { return };
        match offset % ENTRY_BYTES / 4 {
            // The two lowest address bits are zero: messages are aligned words.
            0 => entry.address = entry.address & !0xffff_ffff | u64::from(value & !3),
            1 => entry.address = entry.address & 0xffff_ffff | u64::from(value) << 32,
            2 => entry.data = value,
            _ => {
                let (word, bit) = place(index as u16);
                let Some(masked) = self.masked.get_mut(word) else { return };
                *masked = if value & MASKED != 0 { *masked | bit } else { *masked & !bit };
            }
        }
    }
}

fn place(vector: u16) -> (usize, u64) {
    (usize::from(vector / 64), 1 << (vector % 64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_vector_raised_twice_while_masked_is_told_exactly_once() {
        let mut msix = Msix::new(65);
        msix.write_table(64 * 16, Width::B8, 0xfee0_1000);
        msix.write_table(64 * 16 + 8, Width::B4, 0x4041);
        assert_eq!(msix.raise(64, true), Raised::Pending);
        assert_eq!(msix.raise(64, true), Raised::Pending);
        assert_eq!(msix.read_pending(8, Width::B8), 1);
        assert_eq!(msix.take_ready(), None);
        msix.write_table(64 * 16 + 12, Width::B4, 0);
        let irq = MessageInterrupt { vector: 64, address: 0xfee0_1000, data: 0x4041 };
        assert_eq!(msix.take_ready(), Some(irq));
        assert_eq!(msix.take_ready(), None);
        assert_eq!(msix.read_pending(8, Width::B8), 0);
        assert_eq!(msix.raise(64, true), Raised::Deliver(irq));
        assert_eq!(msix.raise(65, true), Raised::NoVector);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write { offset: u64, width: Width, value: u64 },
        Raise { vector: u16, open: bool },
        Drain,
    }

    fn steps() -> impl Strategy<Value = Step> {
        let width = prop_oneof![Just(Width::B1), Just(Width::B2), Just(Width::B4), Just(Width::B8)];
        prop_oneof![
            (0..70 * 16u64, width, any::<u64>()).prop_map(|(offset, width, value)| Step::Write {
                offset: offset & !(width.bytes() - 1),
                width,
                value
            }),
            (0..70u16, any::<bool>()).prop_map(|(vector, open)| Step::Raise { vector, open }),
            Just(Step::Drain),
        ]
    }

    proptest! {
        /// A table of plain bytes and a list of pending flags agree with every read, and with every message that leaves.
        #[test]
        fn the_table_agrees_with_bytes_and_flags(steps in prop::collection::vec(steps(), 1..200)) {
            let mut msix = Msix::new(65);
            let mut bytes = vec![0u8; 65 * 16];
            for entry in bytes.chunks_exact_mut(16) {
                entry[12] = 1;
            }
            let mut pending = [false; 65];
            let message = |bytes: &[u8], vector: usize| MessageInterrupt {
                vector: vector as u16,
                address: u64::from_le_bytes(bytes[vector * 16..][..8].try_into().unwrap()),
                data: u32::from_le_bytes(bytes[vector * 16 + 8..][..4].try_into().unwrap()),
            };
            for step in steps {
                match step {
                    Step::Write { offset, width, value } => {
                        msix.write_table(offset, width, value);
                        if offset < bytes.len() as u64 && matches!(width, Width::B4 | Width::B8) {
                            let at = offset as usize;
                            let len = width.bytes() as usize;
                            bytes[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
                            for entry in bytes.chunks_exact_mut(16) {
                                entry[0] &= !3;
                                entry[12] &= 1;
                                entry[13..].fill(0);
                            }
                        }
                    }
                    Step::Raise { vector, open } => {
                        let v = usize::from(vector);
                        let expected = if v >= 65 {
                            Raised::NoVector
                        } else if open && bytes[v * 16 + 12] == 0 {
                            Raised::Deliver(message(&bytes, v))
                        } else {
                            pending[v] = true;
                            Raised::Pending
                        };
                        prop_assert_eq!(msix.raise(vector, open), expected);
                    }
                    Step::Drain => {
                        let ready: Vec<usize> = (0..65).filter(|v| pending[*v] && bytes[v * 16 + 12] == 0).collect();
                        for v in ready {
                            pending[v] = false;
                            prop_assert_eq!(msix.take_ready(), Some(message(&bytes, v)));
                        }
                        prop_assert_eq!(msix.take_ready(), None);
                    }
                }
                for v in 0..65u64 {
                    let word = msix.read_pending(v / 64 * 8, Width::B8);
                    prop_assert_eq!(word >> (v % 64) & 1 == 1, pending[v as usize]);
                }
                for at in (0..bytes.len()).step_by(8) {
                    let expected = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
                    prop_assert_eq!(msix.read_table(at as u64, Width::B8), expected);
                    let upper = msix.read_table(at as u64 + 4, Width::B4);
                    prop_assert_eq!(upper, expected >> 32);
                }
            }
        }
    }
}
