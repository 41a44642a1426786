//! What becomes of an operation when it is posted: checked against its spans, then put on the way, or carried out at once.
//!
//! A write of 8 bytes with a target span of 9 is refused here; on a link that is immediate a write of 8 bytes with a notification moves its
//! bytes now, and only the notification is under way.

use super::options::Violation;
use super::world::{Carried, Inner, SideIndex};
use crate::fabric::{Message, Op, OpError};
use crate::span::{Access, LocalSpan, RemoteSpan};

impl Inner {
    pub(super) fn store_polled(&mut self, side: SideIndex, to: &RemoteSpan, bytes: &[u8]) -> Result<(), OpError> {
        if !self.is_open(side) || self.cut {
            return Err(OpError::Closed);
        }
        if !self.options.peer_mappable || bytes.len() != to.len as usize {
            return Err(OpError::Denied);
        }
        self.check_access(Access::READ, to.access)?;
        let memory = self.remote_memory(side, to)?;
        memory.store_last_word_last(to.offset, bytes).map_err(|_| OpError::Denied)
    }

    /// Moves the bytes of a write or read now; what is left is under way.
    pub(super) fn at_once(&mut self, side: SideIndex, carried: Carried) -> (Carried, Result<(), OpError>) {
        let (moved, left) = match carried {
            Carried::Write { from, to, notify } => {
                (self.move_bytes(side, &from, &to, true, None), notify.map_or(Carried::Nothing, Carried::Notify))
            }
            Carried::Read { from, into } => (self.move_bytes(side, &into, &from, false, None), Carried::Nothing),
            under_way => (Ok(()), under_way),
        };
        if moved.is_err() && matches!(left, Carried::Notify(_)) {
            // A failed write notifies nobody, so the place kept for its notification is free again.
            self.sides[side].credits += 1;
        }
        (if moved.is_ok() { left } else { Carried::Nothing }, moved)
    }

    pub(super) fn carry(&self, op: Op<'_>) -> Result<Carried, OpError> {
        match op {
            Op::Write { from, to } => self.carry_write(from, to, None),
            Op::WriteNotify { from, to, notify } => self.carry_write(from, to, Some(notify)),
            Op::Read { from, into } => {
                let (from_len, into_len) = self.check_lengths(from.len, into.len)?;
                self.check_access(from.access, into.access)?;
                Ok(Carried::Read { from: RemoteSpan { len: from_len, ..from }, into: LocalSpan { len: into_len, ..into } })
            }
            Op::Send { message } => {
                let limit = self.limits.max_message;
                let too_long = OpError::TooLong { len: u32::try_from(message.len()).unwrap_or(u32::MAX), limit };
                let cut = message.get(..limit as usize).filter(|_| self.breaks(Violation::CutLongMessage));
                let shortened = message.split_last().filter(|_| self.breaks(Violation::ShortenMessage));
                let bytes = cut.or(shortened.map(|(_, rest)| rest)).unwrap_or(message);
                Message::new(bytes).map(Carried::Send).ok_or(too_long)
            }
        }
    }

    fn carry_write(&self, from: LocalSpan, to: RemoteSpan, notify: Option<u32>) -> Result<Carried, OpError> {
        let (from_len, to_len) = self.check_lengths(from.len, to.len)?;
        self.check_access(from.access, to.access)?;
        Ok(Carried::Write { from: LocalSpan { len: from_len, ..from }, to: RemoteSpan { len: to_len, ..to }, notify })
    }

    fn check_lengths(&self, from: u32, to: u32) -> Result<(u32, u32), OpError> {
        let shorter = from.min(to);
        let too_long = shorter > self.limits.max_op_len && !self.breaks(Violation::IgnoreMaxOpLen);
        if (from != to && !self.breaks(Violation::IgnoreMismatch)) || too_long {
            return Err(OpError::Mismatch { from, to });
        }
        Ok((shorter, shorter))
    }

    fn check_access(&self, source: Access, target: Access) -> Result<(), OpError> {
        let fits = source.allows(Access::READ) && target.allows(Access::WRITE);
        if fits || self.breaks(Violation::IgnoreAccess) { Ok(()) } else { Err(OpError::Denied) }
    }
}
