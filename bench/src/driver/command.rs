//! Submission and completion entries as bytes (NVMe 1.4, sections 4.2 and 4.6), and the commands that the driver knows.
//!
//! A read of 8 blocks from block 4,096 is opcode 0x02 with CDW10 = 4096, CDW11 = 0 and CDW12 = 7, because block counts are 0's based.

use super::error::CommandStatus;
use super::prp::Prps;

/// Bytes of a submission queue entry.
pub const SUBMISSION_BYTES: u64 = 64;
/// Bytes of a completion queue entry.
pub const COMPLETION_BYTES: u64 = 16;
/// Offset in a completion entry of the word with command identifier, phase bit and status.
pub const STATUS_WORD: u64 = 12;

/// One command before it has an identifier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Command {
    /// Opcode.
    pub opcode: u8,
    /// Namespace, 0 where the command has none.
    pub namespace: u32,
    /// Command words 10 to 12; the others are zero in every command used here.
    pub words: [u32; 3],
}

impl Command {
    /// Identify (5.15): controller (CNS 1), namespace (CNS 0) or the list of active namespaces (CNS 2).
    pub const fn identify(cns: u32, namespace: u32) -> Self {
        Self { opcode: 0x06, namespace, words: [cns, 0, 0] }
    }

    /// Set Features, Number of Queues (5.21.1.7): asks for `pairs` queue pairs.
    pub const fn number_of_queues(pairs: u16) -> Self {
        let zero_based = pairs.saturating_sub(1) as u32;
        Self { opcode: 0x09, namespace: 0, words: [0x07, zero_based | (zero_based << 16), 0] }
    }

    /// Create I/O Completion Queue (5.3), contiguous; with `vector`, interrupts are enabled.
    pub const fn create_completion_queue(queue: u16, depth: u16, vector: Option<u16>) -> Self {
        let (enabled, vector) = match vector {
            Some(vector) => (0b10, vector as u32),
            None => (0, 0),
        };
        Self { opcode: 0x05, namespace: 0, words: [queue_and_size(queue, depth), 1 | enabled | (vector << 16), 0] }
    }

    /// Create I/O Submission Queue (5.4), contiguous, completing into the completion queue of the same number.
    pub const fn create_submission_queue(queue: u16, depth: u16) -> Self {
        Self { opcode: 0x01, namespace: 0, words: [queue_and_size(queue, depth), 1 | ((queue as u32) << 16), 0] }
    }

    /// Delete I/O Submission Queue (5.6).
    pub const fn delete_submission_queue(queue: u16) -> Self {
        Self { opcode: 0x00, namespace: 0, words: [queue as u32, 0, 0] }
    }

    /// Delete I/O Completion Queue (5.5).
    pub const fn delete_completion_queue(queue: u16) -> Self {
        Self { opcode: 0x04, namespace: 0, words: [queue as u32, 0, 0] }
    }

    /// Flush (6.8).
    pub const fn flush(namespace: u32) -> Self {
        Self { opcode: 0x00, namespace, words: [0; 3] }
    }

    /// Write (6.15) of `blocks`, 1 to 65,536.
    pub const fn write(namespace: u32, block: u64, blocks: u32) -> Self {
        Self::transfer(0x01, namespace, block, blocks)
    }

    /// Read (6.9) of `blocks`, 1 to 65,536.
    pub const fn read(namespace: u32, block: u64, blocks: u32) -> Self {
        Self::transfer(0x02, namespace, block, blocks)
    }

    const fn transfer(opcode: u8, namespace: u32, block: u64, blocks: u32) -> Self {
        Self { opcode, namespace, words: [block as u32, (block >> 32) as u32, blocks.wrapping_sub(1) & 0xffff] }
    }

    /// The 64 bytes of the submission entry.
    pub fn encode(&self, identifier: u16, prps: Prps) -> [u8; SUBMISSION_BYTES as usize] {
        let mut entry = [0; SUBMISSION_BYTES as usize];
        let mut put = |at: usize, bytes: &[u8]| entry[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[self.opcode]);
        put(2, &identifier.to_le_bytes());
        put(4, &self.namespace.to_le_bytes());
        put(24, &prps.prp1.to_le_bytes());
        put(32, &prps.prp2.to_le_bytes());
        for (index, word) in self.words.iter().enumerate() {
            put(40 + 4 * index, &word.to_le_bytes());
        }
        entry
    }
}

const fn queue_and_size(queue: u16, depth: u16) -> u32 {
    queue as u32 | ((depth.saturating_sub(1) as u32) << 16)
}

/// The last word of a completion entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusWord(pub u32);

impl StatusWord {
    /// The phase bit, which tells a new entry from an old one.
    pub const fn phase(self) -> bool {
        self.0 & (1 << 16) != 0
    }

    /// The command that completed.
    pub const fn identifier(self) -> u16 {
        (self.0 & 0xffff) as u16
    }

    /// How it went.
    pub const fn status(self) -> CommandStatus {
        CommandStatus((self.0 >> 17) as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_is_encoded_as_the_specification_lays_it_out() {
        let entry = Command::read(1, 0x1_0000_1000, 8).encode(0x0203, Prps { prp1: 0x1122, prp2: 0x3344 });
        assert_eq!(entry[..8], [0x02, 0, 0x03, 0x02, 1, 0, 0, 0]);
        assert_eq!(entry[24..26], [0x22, 0x11]);
        assert_eq!(entry[32..34], [0x44, 0x33]);
        assert_eq!(entry[40..52], [0x00, 0x10, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0]);
        assert!(entry[52..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_queue_without_interrupts_does_not_ask_for_vector_zero() {
        assert_eq!(Command::create_completion_queue(3, 64, None).words, [3 | (63 << 16), 0b01, 0]);
        assert_eq!(Command::create_completion_queue(3, 64, Some(5)).words[1], 0b11 | (5 << 16));
        assert_eq!(Command::create_submission_queue(3, 64).words[1], 1 | (3 << 16));
    }

    #[test]
    fn status_and_phase_are_not_mixed_up() {
        let word = StatusWord((0x4080 << 17) | (1 << 16) | 7);
        assert!(word.phase());
        assert_eq!((word.identifier(), word.status()), (7, CommandStatus(0x4080)));
    }
}
