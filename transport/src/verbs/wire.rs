//! What travels between two verbs ends besides the bytes of operations: slots of 64 bytes on the queue pair, frames on the control connection.
//!
//! A message of 19 bytes is sent as a slot of 27: `01 13 00 00` (kind, length), four bytes of credits, then the message. A grant is a frame of 30
//! bytes: `02`, its number, address, length, key and access. Numbers are little-endian.
//!
//! | bytes of a slot | what |
//! |---|---|
//! | 0 | kind: 1 message, 2 credits alone, 3 goodbye, 4 revocation |
//! | 1 | bytes of the body: at most 56 of a message, 8 (the grant's number) of a revocation, else none |
//! | 2 to 3 | zero |
//! | 4 to 7 | slots that the sender has taken and posted again since the link began, counted around |
//! | from 8 | the body |
//!
//! Each side posts 256 slots before it says that it is ready. A sender counts what it sends, write-with-immediates too, and what the other took; the
//! difference never exceeds 256. Who has taken 64 slots since it last told tells.
//!
//! | frame | what |
//! |---|---|
//! | `01` attributes, 33 bytes, first from both sides | queue pair (4), first packet number (4), GID (16), LID (2), MTU as in ibv_mtu (1), reads served at once (1), slots (4) |
//! | `03` ready, 1 byte, once the queue pair sends and receives | |
//! | `02` grant, 30 bytes, at any time after that | number (8), address (8), length (8), remote key (4), access (1): bit 0 read, bit 1 write |

use crate::fabric::MAX_MESSAGE;
use crate::span::Access;

/// Bytes of a slot's header: kind, length, two zeros, and how many slots its sender has taken so far.
pub(super) const HEADER: usize = 8;

/// Bytes of a receive slot: one cache line.
pub(super) const SLOT_BYTES: usize = HEADER + MAX_MESSAGE;

/// Receive slots of each side: what the peer may send before this side polls.
pub(super) const SLOTS: u32 = 256;

/// The kind of a slot with the caller's message.
const MESSAGE: u8 = 1;

/// The header of a slot with a message of `len` bytes.
#[inline]
pub(super) fn message_header(len: u8, taken: u32) -> [u8; HEADER] {
    let [a, b, c, d] = taken.to_le_bytes();
    [MESSAGE, len, 0, 0, a, b, c, d]
}

/// Of a slot of `len` bytes that is a message: the message's length, and its sender's credits. `None` for every other slot, which
/// [`Slot::parse`] judges.
#[inline]
pub(super) fn message(header: [u8; HEADER], len: u32) -> Option<(u8, u32)> {
    let [MESSAGE, message_len, 0, 0, a, b, c, d] = header else { return None };
    let fits = usize::from(message_len) <= MAX_MESSAGE && HEADER + usize::from(message_len) == len as usize;
    fits.then(|| (message_len, u32::from_le_bytes([a, b, c, d])))
}

/// What a slot says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot<'a> {
    /// The caller's message.
    Message(&'a [u8]),
    /// Only the credits count.
    Credits,
    /// The link ends in order.
    Goodbye,
    /// A grant of this number is dead.
    Revoke(u64),
}

impl<'a> Slot<'a> {
    /// The bytes to send, and how many.
    pub(super) fn encode(self, taken: u32) -> ([u8; SLOT_BYTES], usize) {
        let number;
        let (kind, body): (u8, &[u8]) = match self {
            Slot::Message(message) => (MESSAGE, message),
            Slot::Credits => (2, &[]),
            Slot::Goodbye => (3, &[]),
            Slot::Revoke(grant) => {
                number = grant.to_le_bytes();
                (4, &number)
            }
        };
        let mut bytes = [0; SLOT_BYTES];
        bytes[0] = kind;
        bytes[1] = body.len() as u8;
        bytes[4..HEADER].copy_from_slice(&taken.to_le_bytes());
        let end = HEADER + body.len();
        // Callers check messages against MAX_MESSAGE before they come here.
        if let Some(room) = bytes.get_mut(HEADER..end) {
            room.copy_from_slice(body);
        }
        (bytes, end.min(SLOT_BYTES))
    }

    /// A slot as it was received, `len` bytes of it, with the sender's credits.
    ///
    /// # Errors
    /// What is wrong with it, for a close reason.
    #[inline]
    pub(super) fn parse(bytes: &'a [u8; SLOT_BYTES], len: u32) -> Result<(Self, u32), &'static str> {
        let [kind, body_len, 0, 0, a, b, c, d, ..] = *bytes else {
            return Err("a slot with reserved bytes set");
        };
        let end = HEADER + usize::from(body_len);
        if end != len as usize {
            return Err("a slot of the wrong length");
        }
        let body = bytes.get(HEADER..end).ok_or("a slot of the wrong length")?;
        let slot = match (kind, body) {
            (MESSAGE, message) => Slot::Message(message),
            (2, []) => Slot::Credits,
            (3, []) => Slot::Goodbye,
            (4, number) => Slot::Revoke(u64::from_le_bytes(number.try_into().map_err(|_| "a slot of the wrong length")?)),
            _ => return Err("a slot of unknown kind"),
        };
        Ok((slot, u32::from_le_bytes([a, b, c, d])))
    }
}

/// A side's queue pair, as the other needs to know it (InfiniBand Architecture Specification 1.4, volume 1, section 9.7: what a
/// reliable connection is made of).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Attributes {
    /// 24 bits.
    pub(super) queue_pair: u32,
    /// 24 bits: the first packet sequence number that its sender uses.
    pub(super) first_psn: u32,
    /// Address of the port.
    pub(super) gid: [u8; 16],
    /// Local identifier of the port; 0 on Ethernet.
    pub(super) lid: u16,
    /// As in ibv_mtu: 1 is 256 bytes, 5 is 4,096.
    pub(super) mtu: u8,
    /// Reads that the side serves at once.
    pub(super) reads_served: u8,
    /// Receive slots that are posted.
    pub(super) slots: u32,
}

/// What a side says of memory that it grants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Announcement {
    /// The number under which the grant is spoken of; never used twice on a link.
    pub(super) number: u64,
    /// The address of its first byte, as the owner's device knows it.
    pub(super) address: u64,
    /// Bytes.
    pub(super) len: u64,
    /// The remote key.
    pub(super) key: u32,
    /// What may be done with it.
    pub(super) access: Access,
}

/// A frame of the control connection, after the hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// First, from both sides.
    Attributes(Attributes),
    /// The sender's queue pair takes packets.
    Ready,
    /// Memory of the sender.
    Grant(Announcement),
}

impl Frame {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(64);
        match self {
            Self::Attributes(it) => {
                bytes.push(1);
                bytes.extend_from_slice(&it.queue_pair.to_le_bytes());
                bytes.extend_from_slice(&it.first_psn.to_le_bytes());
                bytes.extend_from_slice(&it.gid);
                bytes.extend_from_slice(&it.lid.to_le_bytes());
                bytes.extend_from_slice(&[it.mtu, it.reads_served]);
                bytes.extend_from_slice(&it.slots.to_le_bytes());
            }
            Self::Ready => bytes.push(3),
            Self::Grant(it) => {
                bytes.push(2);
                bytes.extend_from_slice(&it.number.to_le_bytes());
                bytes.extend_from_slice(&it.address.to_le_bytes());
                bytes.extend_from_slice(&it.len.to_le_bytes());
                bytes.extend_from_slice(&it.key.to_le_bytes());
                bytes.push(it.access.bits());
            }
        }
        bytes
    }

    /// # Errors
    /// What is wrong with it.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, &'static str> {
        const BITS_24: u32 = 0x00ff_ffff;
        let (kind, mut rest) = bytes.split_first().ok_or("an empty frame")?;
        let frame = match kind {
            1 => {
                let it = Attributes {
                    queue_pair: u32::from_le_bytes(take(&mut rest)?),
                    first_psn: u32::from_le_bytes(take(&mut rest)?),
                    gid: take(&mut rest)?,
                    lid: u16::from_le_bytes(take(&mut rest)?),
                    mtu: take::<1>(&mut rest)?[0],
                    reads_served: take::<1>(&mut rest)?[0],
                    slots: u32::from_le_bytes(take(&mut rest)?),
                };
                if it.queue_pair > BITS_24 || it.first_psn > BITS_24 {
                    return Err("a queue pair or sequence number of more than 24 bits");
                }
                if !(1..=5).contains(&it.mtu) {
                    return Err("an MTU that does not exist");
                }
                // A device waits for ever with a read that the other side may not be asked for.
                if it.reads_served == 0 {
                    return Err("a queue pair that serves no reads");
                }
                if it.slots != SLOTS {
                    return Err("another number of receive slots than this version has");
                }
                Self::Attributes(it)
            }
            2 => Self::Grant(Announcement {
                number: u64::from_le_bytes(take(&mut rest)?),
                address: u64::from_le_bytes(take(&mut rest)?),
                len: u64::from_le_bytes(take(&mut rest)?),
                key: u32::from_le_bytes(take(&mut rest)?),
                access: Access::from_bits(take::<1>(&mut rest)?[0]).ok_or("an access that does not exist")?,
            }),
            3 => Self::Ready,
            _ => return Err("a frame of unknown kind"),
        };
        if let Self::Grant(it) = &frame
            && it.address.checked_add(it.len).is_none()
        {
            return Err("a grant that wraps around the address space");
        }
        if rest.is_empty() { Ok(frame) } else { Err("a frame that is too long") }
    }
}

/// For the fuzzer: a frame as it would be sent again; `None` where it is refused.
#[doc(hidden)]
pub fn frame_again(frame: &[u8]) -> Option<Vec<u8>> {
    Frame::parse(frame).ok().map(|frame| frame.encode())
}

/// For the fuzzer: a received slot of `len` bytes as it would be sent again, and how many bytes; `None` where it is refused.
#[doc(hidden)]
pub fn slot_again(slot: &[u8; SLOT_BYTES], len: u32) -> Option<([u8; SLOT_BYTES], usize)> {
    Slot::parse(slot, len).ok().map(|(slot, taken)| slot.encode(taken))
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], &'static str> {
    let (field, after) = rest.split_first_chunk::<N>().ok_or("a frame that is too short")?;
    *rest = after;
    Ok(*field)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_slot_is_read_as_it_was_written() {
        for slot in [
            Slot::Message(b"hello"),
            Slot::Message(&[7; MAX_MESSAGE]),
            Slot::Message(b""),
            Slot::Credits,
            Slot::Goodbye,
            Slot::Revoke(u64::MAX),
        ] {
            let (bytes, len) = slot.encode(0x0102_0304);
            assert_eq!(Slot::parse(&bytes, len as u32), Ok((slot, 0x0102_0304)));
            assert!(Slot::parse(&bytes, len as u32 + 1).is_err());
            if let Slot::Message(message) = slot {
                assert_eq!(bytes[..HEADER], message_header(message.len() as u8, 0x0102_0304));
            }
        }
    }

    #[test]
    fn a_frame_is_read_as_it_was_written_and_no_byte_may_be_missing_or_more() {
        let attributes =
            Attributes { queue_pair: 0x11, first_psn: 0xff_ffff, gid: [9; 16], lid: 0, mtu: 5, reads_served: 16, slots: SLOTS };
        let grant = Announcement { number: 7, address: 0x7f00_0000_1000, len: 4096, key: 0xabcd, access: Access::READ_WRITE };
        for frame in [Frame::Attributes(attributes), Frame::Ready, Frame::Grant(grant)] {
            let mut bytes = frame.encode();
            assert_eq!(Frame::parse(&bytes), Ok(frame));
            for cut in 0..bytes.len() {
                assert!(Frame::parse(&bytes[..cut]).is_err(), "{frame:?} cut to {cut}");
            }
            bytes.push(0);
            assert!(Frame::parse(&bytes).is_err());
        }
    }

    #[test]
    fn attributes_that_no_link_can_be_made_of_are_refused() {
        let good = Attributes { queue_pair: 0x11, first_psn: 0, gid: [9; 16], lid: 0, mtu: 5, reads_served: 1, slots: SLOTS };
        assert!(Frame::parse(&Frame::Attributes(good).encode()).is_ok());
        for wrong in [
            Attributes { queue_pair: 1 << 24, ..good },
            Attributes { first_psn: 1 << 24, ..good },
            Attributes { mtu: 0, ..good },
            Attributes { mtu: 6, ..good },
            Attributes { reads_served: 0, ..good },
            Attributes { slots: SLOTS + 1, ..good },
        ] {
            assert!(Frame::parse(&Frame::Attributes(wrong).encode()).is_err(), "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80), mut slot: [u8; 32], kind in 0_u8..6, len in 0_u32..100) {
            if let Ok(frame) = Frame::parse(&bytes) {
                prop_assert_eq!(frame.encode(), bytes);
            }
            // One of the kinds that exist, now and then with the length that it says.
            (slot[0], slot[2], slot[3]) = (kind, 0, slot[3] & kind);
            slot[1] = if slot[1] & 1 == 0 { (len as u8).wrapping_sub(HEADER as u8) } else { slot[1] };
            let mut whole = [0; SLOT_BYTES];
            whole[..32].copy_from_slice(&slot);
            let parsed = Slot::parse(&whole, len);
            if let Ok((slot, taken)) = parsed {
                prop_assert_eq!(slot.encode(taken).1, len as usize);
            }
            // The short way takes just what the long one calls a message.
            let short = message(whole[..HEADER].try_into().unwrap(), len);
            match parsed {
                Ok((Slot::Message(bytes), taken)) => prop_assert_eq!(short, Some((bytes.len() as u8, taken))),
                _ => prop_assert_eq!(short, None),
            }
        }
    }
}
