//! The messages of a session, each at most 56 bytes, parsed once and bounds-checked before anything acts on them.
//!
//! The guest's store of 17 to BAR0 + 0x1018 travels as `01 00 04 18 10 00 …`: kind 1, BAR 0, width 4, offset 0x1018, value 17. All numbers are
//! little-endian; a message that ends early, an unknown kind or a field out of range closes the link as the peer's fault.
//!
//! One slot of a link carries one message or several, one behind the other: a page that was written, the 16 bytes of its completion and vector 3
//! are 48 bytes together, and over RDMA one work request instead of three.

mod codec;

use farbus_transport::{Access, Grant};
use thiserror::Error;

use crate::address::{BarAddress, Iova, Width};
use crate::attachment::Ticket;
use crate::backend::{InterruptMode, MAX_POLLED_WRITE, ResetKind};
use crate::journal::Mark;
use crate::rest::RestToken;
pub use codec::Encoded;
use codec::Fields;

/// Numbers the requests of one side, so that an answer finds its question.
pub type Sequence = u32;

/// From the borrower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToLender {
    /// A posted register write.
    BarWrite {
        /// Where.
        at: BarAddress,
        /// How wide.
        width: Width,
        /// What.
        value: u64,
    },
    /// A register read; answered by [`ToBorrower::BarValue`].
    BarRead {
        /// Which question.
        sequence: Sequence,
        /// Where.
        at: BarAddress,
        /// How wide.
        width: Width,
    },
    /// Memory that windows may refer to; acknowledged.
    Offer {
        /// Which question.
        sequence: Sequence,
        /// The memory.
        memory: Grant,
        /// Its dirty log; not looked at where the lender cannot map it.
        dirty: Grant,
        /// Whether it may be accessed directly.
        proven: bool,
    },
    /// A window onto offered memory; acknowledged.
    Map {
        /// Which question.
        sequence: Sequence,
        /// First DMA address.
        iova: Iova,
        /// Bytes.
        len: u64,
        /// Key of the offered memory; `None` where every access is mediated.
        memory: Option<u64>,
        /// First byte in the offered memory.
        offset: u64,
        /// What the device may do.
        access: Access,
    },
    /// Windows inside the range end; acknowledged when no DMA touches them any more.
    Unmap {
        /// Which question.
        sequence: Sequence,
        /// First DMA address.
        iova: Iova,
        /// Bytes.
        len: u64,
    },
    /// Offered memory that no window uses any more; acknowledged.
    Withdraw {
        /// Which question.
        sequence: Sequence,
        /// Its key.
        key: u64,
    },
    /// Offered memory is what the guest sees: access it directly.
    Prove {
        /// Its key.
        key: u64,
    },
    /// How the function signals.
    InterruptMode(InterruptMode),
    /// Whether the device may start DMA.
    BusMaster(bool),
    /// Fence and reset; acknowledged.
    Reset {
        /// Which question.
        sequence: Sequence,
        /// How thorough.
        kind: ResetKind,
    },
    /// Everything sent before is executed; acknowledged.
    Fence {
        /// Which question.
        sequence: Sequence,
    },
    /// The bytes of a mediated read are in the lender's staging slot, or the guest's side refused.
    Fetched {
        /// Which mediation.
        ticket: Ticket,
        /// Whether the bytes are there.
        ok: bool,
    },
    /// A mediated write is in guest memory, or the guest's side refused.
    Stored {
        /// Which mediation.
        ticket: Ticket,
        /// Whether it is done.
        ok: bool,
    },
    /// Where the lender puts the bytes of mediated writes.
    Staging(Grant),
    /// The bytes of a mediated write are out of their slot, which is free; the write itself is still to be answered.
    Taken {
        /// Which mediation.
        ticket: Ticket,
    },
    /// Come to rest under a token; answered by [`ToBorrower::Rested`], or acknowledged as [`Outcome::Restless`].
    Pause {
        /// Which question.
        sequence: Sequence,
        /// The name of the rest.
        token: RestToken,
    },
    /// Go on.
    Resume,
    /// The borrower leaves: all windows and offers end, and the device, which is at rest, is kept; acknowledged. Nothing may follow.
    Keep {
        /// Which question.
        sequence: Sequence,
        /// How long, in milliseconds.
        lease_ms: u32,
    },
}

/// From the lender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToBorrower {
    /// The answer to a register read; every earlier DMA write is visible.
    BarValue {
        /// Which question.
        sequence: Sequence,
        /// The value.
        value: u64,
    },
    /// A question is dealt with.
    Ack {
        /// Which question.
        sequence: Sequence,
        /// How it ended.
        outcome: Outcome,
    },
    /// An MSI or MSI-X vector, after everything before it.
    Interrupt {
        /// Which vector.
        vector: u16,
    },
    /// The INTx level, after everything before it.
    Pin {
        /// Asserted or not.
        asserted: bool,
    },
    /// Bytes a guest may be polling: the borrower's CPU stores them, the last word last.
    StorePolled {
        /// Where.
        iova: Iova,
        /// How many of `bytes` count; the others are zero.
        len: u8,
        /// What.
        bytes: [u8; MAX_POLLED_WRITE],
    },
    /// Guest memory was written by the fabric, before this message.
    Dirty {
        /// Where.
        iova: Iova,
        /// Bytes.
        len: u64,
    },
    /// Read guest memory into the staging slot of `ticket`.
    Fetch {
        /// Which mediation.
        ticket: Ticket,
        /// Where.
        iova: Iova,
        /// Bytes.
        len: u32,
    },
    /// Write the bytes in a staging slot to guest memory.
    Store {
        /// Which mediation.
        ticket: Ticket,
        /// Where the bytes are.
        slot: u8,
        /// Where.
        iova: Iova,
        /// Bytes.
        len: u32,
        /// The last word must become visible last.
        polled: bool,
    },
    /// Where the borrower puts the bytes of mediated reads.
    Staging(Grant),
    /// The device is at rest, and everything before this was told.
    Rested {
        /// Which question.
        sequence: Sequence,
        /// How far its journal is, where it has one.
        mark: Option<Mark>,
    },
}

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
    /// The device cannot be brought to rest, or is not at rest.
    Restless,
    /// The device, or its IOMMU, does not reach the range.
    Unreachable,
}

const OUTCOMES: [Outcome; 8] = {
    use Outcome::{Done, Grant, Overlap, Range, Restless, TooMany, UnknownKey, Unreachable};
    [Done, Overlap, Range, TooMany, Grant, UnknownKey, Restless, Unreachable]
};

/// How a journal that is none is written.
const NO_MARK: Mark = Mark { life: 0, begun: 0, acknowledged: 0 };

/// What is wrong with a message.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum MessageError {
    /// It ends too early or too late.
    #[error("a message of the wrong length")]
    Length,
    /// No message has this kind.
    #[error("a message of unknown kind")]
    Kind,
    /// A field is outside its range.
    #[error("a message with a field out of range")]
    Field,
}

impl MessageError {
    /// The same as text for a close reason.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Length => "a message of the wrong length",
            Self::Kind => "a message of unknown kind",
            Self::Field => "a message with a field out of range",
        }
    }
}

impl ToLender {
    /// The bytes to send.
    #[inline]
    pub fn encode(&self) -> Encoded {
        let place = |encoded: Encoded, at: &BarAddress, width: &Width| encoded.u8(at.bar).u8(width.bytes() as u8).u64(at.offset);
        match self {
            Self::BarWrite { at, width, value } => place(Encoded::new(1), at, width).u64(*value),
            Self::BarRead { sequence, at, width } => place(Encoded::new(2), at, width).u32(*sequence),
            Self::Offer { sequence, memory, dirty, proven } => {
                Encoded::new(3).u32(*sequence).grant(memory).grant(dirty).u8(u8::from(*proven))
            }
            Self::Map { sequence, iova, len, memory, offset, access } => Encoded::new(4)
                .u32(*sequence)
                .u64(iova.0)
                .u64(*len)
                .u8(u8::from(memory.is_some()))
                .u64(memory.unwrap_or(0))
                .u64(*offset)
                .u8(access.bits()),
            Self::Unmap { sequence, iova, len } => Encoded::new(5).u32(*sequence).u64(iova.0).u64(*len),
            Self::Withdraw { sequence, key } => Encoded::new(6).u32(*sequence).u64(*key),
            Self::Prove { key } => Encoded::new(7).u64(*key),
            Self::InterruptMode(mode) => match mode {
                InterruptMode::Pin => Encoded::new(8).u8(0).u8(0),
                InterruptMode::Msi(vectors) => Encoded::new(8).u8(1).u8(*vectors),
                InterruptMode::Msix => Encoded::new(8).u8(2).u8(0),
            },
            Self::BusMaster(enabled) => Encoded::new(9).u8(u8::from(*enabled)),
            Self::Reset { sequence, kind } => Encoded::new(10).u32(*sequence).u8(match kind {
                ResetKind::Function => 0,
                ResetKind::Conventional => 1,
            }),
            Self::Fence { sequence } => Encoded::new(11).u32(*sequence),
            Self::Fetched { ticket, ok } => Encoded::new(12).u32(ticket.0).u8(u8::from(*ok)),
            Self::Stored { ticket, ok } => Encoded::new(13).u32(ticket.0).u8(u8::from(*ok)),
            Self::Staging(grant) => Encoded::new(14).grant(grant),
            Self::Taken { ticket } => Encoded::new(15).u32(ticket.0),
            Self::Pause { sequence, token } => {
                let mut encoded = Encoded::new(16).u32(*sequence);
                encoded.put(&token.0);
                encoded
            }
            Self::Resume => Encoded::new(17),
            Self::Keep { sequence, lease_ms } => Encoded::new(18).u32(*sequence).u32(*lease_ms),
        }
    }

    /// Parses the first message of what a peer sent, and what follows it.
    ///
    /// # Errors
    /// [`MessageError`].
    #[inline]
    pub fn parse(bytes: &[u8]) -> Result<(Self, &[u8]), MessageError> {
        let mut fields = Fields(bytes);
        let message = match fields.u8()? {
            1 => {
                let (at, width) = fields.place()?;
                Self::BarWrite { at, width, value: fields.u64()? }
            }
            2 => {
                let (at, width) = fields.place()?;
                Self::BarRead { sequence: fields.u32()?, at, width }
            }
            3 => Self::Offer { sequence: fields.u32()?, memory: fields.grant()?, dirty: fields.grant()?, proven: fields.bool()? },
            4 => {
                let (sequence, iova, len) = (fields.u32()?, Iova(fields.u64()?), fields.u64()?);
                let (mapped, key) = (fields.bool()?, fields.u64()?);
                Self::Map { sequence, iova, len, memory: mapped.then_some(key), offset: fields.u64()?, access: fields.access()? }
            }
            5 => Self::Unmap { sequence: fields.u32()?, iova: Iova(fields.u64()?), len: fields.u64()? },
            6 => Self::Withdraw { sequence: fields.u32()?, key: fields.u64()? },
            7 => Self::Prove { key: fields.u64()? },
            8 => Self::InterruptMode(match (fields.u8()?, fields.u8()?) {
                (0, 0) => InterruptMode::Pin,
                (1, vectors) if vectors.is_power_of_two() && vectors <= 32 => InterruptMode::Msi(vectors),
                (2, 0) => InterruptMode::Msix,
                _ => return Err(MessageError::Field),
            }),
            9 => Self::BusMaster(fields.bool()?),
            10 => Self::Reset {
                sequence: fields.u32()?,
                kind: if fields.bool()? { ResetKind::Conventional } else { ResetKind::Function },
            },
            11 => Self::Fence { sequence: fields.u32()? },
            12 => Self::Fetched { ticket: Ticket(fields.u32()?), ok: fields.bool()? },
            13 => Self::Stored { ticket: Ticket(fields.u32()?), ok: fields.bool()? },
            14 => Self::Staging(fields.grant()?),
            15 => Self::Taken { ticket: Ticket(fields.u32()?) },
            16 => Self::Pause { sequence: fields.u32()?, token: RestToken(fields.take()?) },
            17 => Self::Resume,
            18 => Self::Keep { sequence: fields.u32()?, lease_ms: fields.u32()? },
            _ => return Err(MessageError::Kind),
        };
        Ok((message, fields.0))
    }
}

impl ToBorrower {
    /// The bytes to send.
    #[inline]
    pub fn encode(&self) -> Encoded {
        match self {
            Self::BarValue { sequence, value } => Encoded::new(1).u32(*sequence).u64(*value),
            Self::Ack { sequence, outcome } => {
                let code = OUTCOMES.iter().position(|known| known == outcome).unwrap_or(0);
                Encoded::new(2).u32(*sequence).u8(code as u8)
            }
            Self::Interrupt { vector } => Encoded::new(3).u32(u32::from(*vector)),
            Self::Pin { asserted } => Encoded::new(4).u8(u8::from(*asserted)),
            Self::StorePolled { iova, len, bytes } => {
                let mut encoded = Encoded::new(5).u64(iova.0).u8(*len);
                encoded.put(bytes.get(..usize::from(*len)).unwrap_or(bytes));
                encoded
            }
            Self::Dirty { iova, len } => Encoded::new(6).u64(iova.0).u64(*len),
            Self::Fetch { ticket, iova, len } => Encoded::new(7).u32(ticket.0).u64(iova.0).u32(*len),
            Self::Store { ticket, slot, iova, len, polled } => {
                Encoded::new(8).u32(ticket.0).u8(*slot).u64(iova.0).u32(*len).u8(u8::from(*polled))
            }
            Self::Staging(grant) => Encoded::new(9).grant(grant),
            Self::Rested { sequence, mark } => {
                let Mark { life, begun, acknowledged } = mark.unwrap_or(NO_MARK);
                Encoded::new(10).u32(*sequence).u8(u8::from(mark.is_some())).u64(life).u64(begun).u64(acknowledged)
            }
        }
    }

    /// Parses the first message of what a peer sent, and what follows it.
    ///
    /// # Errors
    /// [`MessageError`].
    #[inline]
    pub fn parse(bytes: &[u8]) -> Result<(Self, &[u8]), MessageError> {
        let mut fields = Fields(bytes);
        let message = match fields.u8()? {
            1 => Self::BarValue { sequence: fields.u32()?, value: fields.u64()? },
            2 => {
                let (sequence, code) = (fields.u32()?, fields.u8()?);
                Self::Ack { sequence, outcome: *OUTCOMES.get(usize::from(code)).ok_or(MessageError::Field)? }
            }
            3 => Self::Interrupt { vector: u16::try_from(fields.u32()?).map_err(|_| MessageError::Field)? },
            4 => Self::Pin { asserted: fields.bool()? },
            5 => {
                let (iova, len) = (Iova(fields.u64()?), fields.u8()?);
                let mut bytes = [0; MAX_POLLED_WRITE];
                let room = bytes.get_mut(..usize::from(len)).ok_or(MessageError::Field)?;
                fields.fill(room)?;
                Self::StorePolled { iova, len, bytes }
            }
            6 => Self::Dirty { iova: Iova(fields.u64()?), len: fields.u64()? },
            7 => Self::Fetch { ticket: Ticket(fields.u32()?), iova: Iova(fields.u64()?), len: fields.u32()? },
            8 => {
                let (ticket, slot) = (Ticket(fields.u32()?), fields.u8()?);
                Self::Store { ticket, slot, iova: Iova(fields.u64()?), len: fields.u32()?, polled: fields.bool()? }
            }
            9 => Self::Staging(fields.grant()?),
            10 => {
                let (sequence, kept) = (fields.u32()?, fields.bool()?);
                let mark = Mark { life: fields.u64()?, begun: fields.u64()?, acknowledged: fields.u64()? };
                // One form for "none", so that a message has one encoding.
                if !kept && mark != NO_MARK {
                    return Err(MessageError::Field);
                }
                Self::Rested { sequence, mark: kept.then_some(mark) }
            }
            _ => return Err(MessageError::Kind),
        };
        Ok((message, fields.0))
    }
}

#[cfg(test)]
mod tests;
