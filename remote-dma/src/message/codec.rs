//! How fields become the bytes of a message and come out of them again: little-endian, one behind the other, each bounds-checked.
//!
//! `Encoded::new(1).u8(0).u8(4).u64(0x1018).u64(17)` is a register write of 19 bytes; `Fields` takes the same from the front and refuses what ends early.

use farbus_transport::{Access, Grant, fabric::MAX_MESSAGE};

use super::MessageError;
use crate::address::{BarAddress, Width};

/// The bytes of a message.
#[derive(Clone, Copy, Debug)]
pub struct Encoded {
    bytes: [u8; MAX_MESSAGE],
    len: usize,
}

impl Encoded {
    pub(super) fn new(kind: u8) -> Self {
        let mut encoded = Self { bytes: [0; MAX_MESSAGE], len: 0 };
        encoded.put(&[kind]);
        encoded
    }

    #[inline]
    pub(super) fn put(&mut self, bytes: &[u8]) {
        // Every message's fields add up to at most MAX_MESSAGE, which the round-trip test shows for each.
        if let Some(room) = self.bytes.get_mut(self.len..self.len + bytes.len()) {
            room.copy_from_slice(bytes);
            self.len += bytes.len();
        }
    }

    #[inline]
    pub(super) fn u8(mut self, value: u8) -> Self {
        self.put(&[value]);
        self
    }

    #[inline]
    pub(super) fn u32(mut self, value: u32) -> Self {
        self.put(&value.to_le_bytes());
        self
    }

    #[inline]
    pub(super) fn u64(mut self, value: u64) -> Self {
        self.put(&value.to_le_bytes());
        self
    }

    pub(super) fn grant(self, grant: &Grant) -> Self {
        self.u64(grant.key).u64(grant.len).u8(grant.access.bits())
    }

    /// What to send.
    pub fn as_slice(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// What is left of a message.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    #[inline]
    pub(super) fn take<const N: usize>(&mut self) -> Result<[u8; N], MessageError> {
        let (field, rest) = self.0.split_first_chunk::<N>().ok_or(MessageError::Length)?;
        self.0 = rest;
        Ok(*field)
    }

    #[inline]
    pub(super) fn fill(&mut self, room: &mut [u8]) -> Result<(), MessageError> {
        let (field, rest) = self.0.split_at_checked(room.len()).ok_or(MessageError::Length)?;
        room.copy_from_slice(field);
        self.0 = rest;
        Ok(())
    }

    #[inline]
    pub(super) fn u8(&mut self) -> Result<u8, MessageError> {
        self.take::<1>().map(|[byte]| byte)
    }

    #[inline]
    pub(super) fn u32(&mut self) -> Result<u32, MessageError> {
        self.take().map(u32::from_le_bytes)
    }

    #[inline]
    pub(super) fn u64(&mut self) -> Result<u64, MessageError> {
        self.take().map(u64::from_le_bytes)
    }

    pub(super) fn bool(&mut self) -> Result<bool, MessageError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(MessageError::Field),
        }
    }

    pub(super) fn access(&mut self) -> Result<Access, MessageError> {
        Access::from_bits(self.u8()?).ok_or(MessageError::Field)
    }

    pub(super) fn grant(&mut self) -> Result<Grant, MessageError> {
        Ok(Grant { key: self.u64()?, len: self.u64()?, access: self.access()? })
    }

    #[inline]
    pub(super) fn place(&mut self) -> Result<(BarAddress, Width), MessageError> {
        let (bar, width, offset) = (self.u8()?, self.u8()?, self.u64()?);
        let width = Width::from_bytes(u64::from(width)).ok_or(MessageError::Field)?;
        Ok((BarAddress { bar, offset }, width))
    }
}
