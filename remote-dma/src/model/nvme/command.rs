//! The layouts that a driver and the controller exchange: 64-byte submission entries, 16-byte completion entries, status codes.
//!
//! Bytes `02 00 07 00 01 00 00 00 …` are a read (opcode 2) with command identifier 7 for namespace 1; its answer ends in the 32-bit word
//! `0x0001_0007`: identifier 7, phase 1, status 0. Parsing copies and never fails: judging what was parsed is the executor's part.

/// Bytes of a submission queue entry (NVMe 1.4, section 4.2: SQES 6).
pub const SQE_BYTES: u32 = 64;
/// Bytes of a completion queue entry (NVMe 1.4, section 4.6: CQES 4).
pub const CQE_BYTES: u32 = 16;
/// The namespace identifier that means all namespaces (NVMe 1.4, section 6.1.2).
pub const NSID_ALL: u32 = 0xffff_ffff;

/// A submission queue entry as the driver wrote it (NVMe 1.4, section 4.2, figure 105), copied once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Command {
    /// Command dword 0, bits 7:0.
    pub opcode: u8,
    /// Command dword 0, bits 15:8: fused operation (1:0), data pointer kind PSDT (7:6).
    pub flags: u8,
    /// Command dword 0, bits 31:16: the driver's name for the command.
    pub identifier: u16,
    /// Namespace identifier.
    pub namespace: u32,
    /// First PRP entry.
    pub prp1: u64,
    /// Second PRP entry or PRP list pointer.
    pub prp2: u64,
    /// Command dword 10.
    pub dword10: u32,
    /// Command dword 11.
    pub dword11: u32,
    /// Command dword 12.
    pub dword12: u32,
    /// Command dword 13.
    pub dword13: u32,
    /// Command dword 14.
    pub dword14: u32,
    /// Command dword 15.
    pub dword15: u32,
}

/// Splits an entry into its fields.
pub fn parse(entry: &[u8; SQE_BYTES as usize]) -> Command {
    let dword = |index: usize| {
        let bytes = entry.get(index * 4..index * 4 + 4).and_then(|bytes| bytes.try_into().ok());
        u32::from_le_bytes(bytes.unwrap_or_default())
    };
    let qword = |index: usize| u64::from(dword(index)) | u64::from(dword(index + 1)) << 32;
    let [opcode, flags, ..] = dword(0).to_le_bytes();
    Command {
        opcode,
        flags,
        identifier: (dword(0) >> 16) as u16,
        namespace: dword(1),
        prp1: qword(6),
        prp2: qword(8),
        dword10: dword(10),
        dword11: dword(11),
        dword12: dword(12),
        dword13: dword(13),
        dword14: dword(14),
        dword15: dword(15),
    }
}

impl Command {
    /// Starting LBA of an IO command (dwords 10 and 11).
    pub const fn first_lba(&self) -> u64 {
        self.dword10 as u64 | (self.dword11 as u64) << 32
    }

    /// Logical blocks of an IO command, 1 to 65,536 (dword 12 bits 15:0, zero-based).
    pub const fn block_count(&self) -> u64 {
        (self.dword12 & 0xffff) as u64 + 1
    }

    /// Force unit access (dword 12 bit 30).
    pub const fn force_unit_access(&self) -> bool {
        self.dword12 & 1 << 30 != 0
    }

    /// Whether the flags ask for what this controller does not have: fused operations or scatter-gather lists.
    pub const fn unsupported_flags(&self) -> bool {
        self.flags & 0b1100_0011 != 0
    }
}

/// The outcome of a command: status code type, status code and the do-not-retry bit (NVMe 1.4, section 4.6.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status(u16);

const DO_NOT_RETRY: u16 = 1 << 14;

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $kind:literal, $code:literal $(, $dnr:ident)?;)*) => {
        impl Status {
            $($(#[$doc])* pub const $name: Self = Self($kind << 8 | $code $(| $dnr)?);)*
        }
    };
}

statuses! {
    /// Successful completion (figure 127, 00h).
    SUCCESS = 0, 0x00;
    /// Invalid command opcode (01h).
    INVALID_OPCODE = 0, 0x01, DO_NOT_RETRY;
    /// Invalid field in command (02h).
    INVALID_FIELD = 0, 0x02, DO_NOT_RETRY;
    /// Data transfer error: guest memory could not be read or written (04h).
    DATA_TRANSFER_ERROR = 0, 0x04;
    /// Internal error: the host failed us (06h).
    INTERNAL_ERROR = 0, 0x06;
    /// Command abort requested (07h).
    ABORT_REQUESTED = 0, 0x07;
    /// Invalid namespace or format (0Bh).
    INVALID_NAMESPACE = 0, 0x0b, DO_NOT_RETRY;
    /// Command sequence error (0Ch).
    SEQUENCE_ERROR = 0, 0x0c, DO_NOT_RETRY;
    /// PRP offset invalid (13h).
    PRP_OFFSET_INVALID = 0, 0x13, DO_NOT_RETRY;
    /// Namespace is write protected (20h).
    WRITE_PROTECTED = 0, 0x20, DO_NOT_RETRY;
    /// LBA out of range (figure 128, 80h).
    LBA_OUT_OF_RANGE = 0, 0x80, DO_NOT_RETRY;
    /// Capacity exceeded: the file system that holds the image is full (81h).
    CAPACITY_EXCEEDED = 0, 0x81;
    /// Completion queue invalid (figure 129, 00h).
    COMPLETION_QUEUE_INVALID = 1, 0x00, DO_NOT_RETRY;
    /// Invalid queue identifier (01h).
    INVALID_QUEUE_IDENTIFIER = 1, 0x01, DO_NOT_RETRY;
    /// Invalid queue size (02h).
    INVALID_QUEUE_SIZE = 1, 0x02, DO_NOT_RETRY;
    /// Asynchronous event request limit exceeded (05h).
    EVENT_LIMIT_EXCEEDED = 1, 0x05, DO_NOT_RETRY;
    /// Invalid interrupt vector (08h).
    INVALID_INTERRUPT_VECTOR = 1, 0x08, DO_NOT_RETRY;
    /// Invalid log page (09h).
    INVALID_LOG_PAGE = 1, 0x09, DO_NOT_RETRY;
    /// Invalid queue deletion (0Ch).
    INVALID_QUEUE_DELETION = 1, 0x0c, DO_NOT_RETRY;
    /// Feature identifier not saveable (0Dh).
    FEATURE_NOT_SAVEABLE = 1, 0x0d, DO_NOT_RETRY;
    /// Feature not changeable (0Eh).
    FEATURE_NOT_CHANGEABLE = 1, 0x0e, DO_NOT_RETRY;
    /// Write fault (figure 131, 80h).
    WRITE_FAULT = 2, 0x80;
    /// Unrecovered read error (81h).
    UNRECOVERED_READ_ERROR = 2, 0x81;
    /// Compare failure (85h).
    COMPARE_FAILURE = 2, 0x85;
}

impl Status {
    /// The 15 status bits without the phase: code 7:0, type 10:8, more 13, do not retry 14.
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// Whether the command succeeded.
    pub const fn is_success(self) -> bool {
        self.0 == 0
    }
}

/// What a completion queue entry says (NVMe 1.4, section 4.6, figure 122).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Dword 0: command specific.
    pub result: u32,
    /// How far the submission queue was consumed when the entry was made.
    pub queue_head: u16,
    /// The submission queue of the command.
    pub queue: u16,
    /// The command.
    pub identifier: u16,
    /// The outcome.
    pub status: Status,
}

impl Completion {
    /// The entry's bytes; the phase lies in the last word, bit 16.
    pub const fn encode(&self, phase: bool) -> [u8; CQE_BYTES as usize] {
        let words = [
            self.result,
            0,
            self.queue_head as u32 | (self.queue as u32) << 16,
            self.identifier as u32 | (phase as u32) << 16 | (self.status.0 as u32) << 17,
        ];
        let [[a, b, c, d], [e, f, g, h], [i, j, k, l], [m, n, o, p]] = [
            words[0].to_le_bytes(),
            words[1].to_le_bytes(),
            words[2].to_le_bytes(),
            words[3].to_le_bytes(),
        ];
        [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
    }
}

/// Admin opcodes (NVMe 1.4, section 5, figure 139).
pub mod admin {
    /// Delete I/O submission queue.
    pub const DELETE_SUBMISSION_QUEUE: u8 = 0x00;
    /// Create I/O submission queue.
    pub const CREATE_SUBMISSION_QUEUE: u8 = 0x01;
    /// Get log page.
    pub const LOG_PAGE: u8 = 0x02;
    /// Delete I/O completion queue.
    pub const DELETE_COMPLETION_QUEUE: u8 = 0x04;
    /// Create I/O completion queue.
    pub const CREATE_COMPLETION_QUEUE: u8 = 0x05;
    /// Identify.
    pub const IDENTIFY: u8 = 0x06;
    /// Abort.
    pub const ABORT: u8 = 0x08;
    /// Set features.
    pub const SET_FEATURES: u8 = 0x09;
    /// Get features.
    pub const FEATURES: u8 = 0x0a;
    /// Asynchronous event request.
    pub const EVENT_REQUEST: u8 = 0x0c;
}

/// NVM opcodes (NVMe 1.4, section 6, figure 346).
pub mod io {
    /// Flush.
    pub const FLUSH: u8 = 0x00;
    /// Write.
    pub const WRITE: u8 = 0x01;
    /// Read.
    pub const READ: u8 = 0x02;
    /// Compare.
    pub const COMPARE: u8 = 0x05;
    /// Write zeroes.
    pub const WRITE_ZEROES: u8 = 0x08;
    /// Dataset management.
    pub const DATASET_MANAGEMENT: u8 = 0x09;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_is_parsed_field_by_field() {
        let mut entry = [0; 64];
        entry[..8].copy_from_slice(&[0x02, 0, 7, 0, 1, 0, 0, 0]);
        entry[24..32].copy_from_slice(&0x2_3f00_1000_u64.to_le_bytes());
        entry[40..48].copy_from_slice(&0x1_0000_0005_u64.to_le_bytes());
        entry[48..52].copy_from_slice(&0x4000_0007_u32.to_le_bytes());
        let command = parse(&entry);
        assert_eq!((command.opcode, command.identifier, command.namespace), (io::READ, 7, 1));
        assert_eq!(command.prp1, 0x2_3f00_1000);
        assert_eq!((command.first_lba(), command.block_count()), (0x1_0000_0005, 8));
        assert!(command.force_unit_access() && !command.unsupported_flags());
    }

    #[test]
    fn a_completion_carries_phase_and_status_in_its_last_word() {
        let completion = Completion {
            result: 0x1122_3344,
            queue_head: 9,
            queue: 3,
            identifier: 7,
            status: Status::SUCCESS,
        };
        let bytes = completion.encode(true);
        assert_eq!(&bytes[..4], &[0x44, 0x33, 0x22, 0x11]);
        assert_eq!(&bytes[8..12], &[9, 0, 3, 0]);
        assert_eq!(&bytes[12..], &0x0001_0007_u32.to_le_bytes());
        let refused = Completion {
            status: Status::LBA_OUT_OF_RANGE,
            ..completion
        };
        assert_eq!(&refused.encode(false)[14..], &(0x4080_u16 << 1).to_le_bytes());
    }
}
