//! Numbers and sections as bytes, little-endian, and back: what is read is bounds-checked, and nothing that is in the bytes can panic.
//!
//! A section is a tag of 2 bytes, a length of 4 and so many bytes: `03 00 04 00 00 00 aa bb cc dd` is section 3 with four of them.

use super::StateError;

/// Bytes being written.
#[derive(Debug, Default)]
pub(crate) struct Output(pub(crate) Vec<u8>);

impl Output {
    pub(crate) fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub(crate) fn u16(&mut self, value: u16) {
        self.bytes(&value.to_le_bytes());
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// A length of 2 bytes, and the text; what is longer than 65,535 bytes is cut, and no name is.
    pub(crate) fn text(&mut self, text: &str) {
        let bytes = text.as_bytes().get(..usize::from(u16::MAX)).unwrap_or(text.as_bytes());
        self.u16(bytes.len() as u16);
        self.bytes(bytes);
    }

    /// A section of what `fill` writes.
    pub(crate) fn section(&mut self, tag: u16, fill: impl FnOnce(&mut Self)) {
        let mut inner = Self::default();
        fill(&mut inner);
        self.u16(tag);
        self.u32(inner.0.len() as u32);
        self.bytes(&inner.0);
    }
}

/// What is left to read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Input<'a>(pub(crate) &'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn slice(&mut self, len: usize) -> Result<&'a [u8], StateError> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(StateError::Truncated)?;
        self.0 = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], StateError> {
        let (taken, rest) = self.0.split_first_chunk::<N>().ok_or(StateError::Truncated)?;
        self.0 = rest;
        Ok(*taken)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, StateError> {
        self.array().map(|[byte]| byte)
    }

    pub(crate) fn bool(&mut self) -> Result<bool, StateError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(StateError::Malformed("a flag that is neither 0 nor 1")),
        }
    }

    pub(crate) fn u16(&mut self) -> Result<u16, StateError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, StateError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, StateError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn text(&mut self) -> Result<String, StateError> {
        let len = usize::from(self.u16()?);
        let bytes = self.slice(len)?.to_vec();
        String::from_utf8(bytes).map_err(|_| StateError::Malformed("a name that is no text"))
    }

    /// As many as `count` says, each of which takes at least a byte: a count that cannot be right allocates nothing.
    pub(crate) fn list<T>(
        &mut self,
        count: usize,
        mut each: impl FnMut(&mut Self) -> Result<T, StateError>,
    ) -> Result<Vec<T>, StateError> {
        if count > self.0.len() {
            return Err(StateError::Truncated);
        }
        (0..count).map(|_| each(self)).collect()
    }

    pub(crate) fn end(&self) -> Result<(), StateError> {
        if self.0.is_empty() { Ok(()) } else { Err(StateError::Malformed("bytes behind the end of a section")) }
    }
}
