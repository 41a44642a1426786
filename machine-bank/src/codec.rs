//! Numbers and pieces taken from the front of bytes that anybody may have written: everything is bounds-checked, nothing panics.
//!
//! `Input::new(&[1, 0, 9]).u16()` is `Ok(1)` and leaves one byte; a second `u16()` is `Err(Malformed::Ends)`.

use thiserror::Error;

/// Bytes that are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Malformed {
    /// They end where more should come.
    #[error("it ends too early")]
    Ends,
    /// There is more than there should be.
    #[error("{0} bytes follow its end")]
    Trailing(usize),
    /// They begin with something else.
    #[error("it is no {0}")]
    Magic(&'static str),
    /// A version that this program does not know.
    #[error("its version is {0}, and this program reads version {1}")]
    Version(u16, u16),
    /// A value that makes no sense.
    #[error("{0} is {1}")]
    Value(&'static str, u64),
    /// It does not hash to what it should.
    #[error("{0} does not have its hash")]
    Hash(&'static str),
    /// Compressed data that does not decompress to what was announced.
    #[error("a group of pages does not decompress")]
    Compression,
}

/// What is left to read.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// All of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Bytes left.
    pub fn left(&self) -> usize {
        self.0.len()
    }

    /// The next `len` bytes.
    ///
    /// # Errors
    /// There are fewer.
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (front, rest) = self.0.split_at_checked(len).ok_or(Malformed::Ends)?;
        self.0 = rest;
        Ok(front)
    }

    /// The next `N` bytes.
    ///
    /// # Errors
    /// There are fewer.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (front, rest) = self.0.split_first_chunk::<N>().ok_or(Malformed::Ends)?;
        self.0 = rest;
        Ok(*front)
    }

    /// A byte.
    ///
    /// # Errors
    /// There is none.
    pub fn u8(&mut self) -> Result<u8, Malformed> {
        self.array().map(u8::from_le_bytes)
    }

    /// A little-endian number.
    ///
    /// # Errors
    /// There are fewer bytes.
    pub fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_le_bytes)
    }

    /// A little-endian number.
    ///
    /// # Errors
    /// There are fewer bytes.
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_le_bytes)
    }

    /// A little-endian number.
    ///
    /// # Errors
    /// There are fewer bytes.
    pub fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    /// A length of one byte and as much UTF-8 text.
    ///
    /// # Errors
    /// There are fewer bytes, or they are no text.
    pub fn text(&mut self) -> Result<&'a str, Malformed> {
        let len = self.u8()?;
        let bytes = self.take(len.into())?;
        std::str::from_utf8(bytes).map_err(|_| Malformed::Value("a text of bytes", len.into()))
    }

    /// Nothing may be left.
    ///
    /// # Errors
    /// Something is.
    pub fn end(&self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed::Trailing(self.0.len())) }
    }
}

/// Appends a text of at most 255 bytes, as [`Input::text`] reads it; what is longer is cut, which names are too short for.
pub fn put_text(out: &mut Vec<u8>, text: &str) {
    let bytes = &text.as_bytes()[..text.len().min(255)];
    out.push(bytes.len() as u8);
    out.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_too_early_and_what_goes_on_is_refused() {
        let mut bytes = vec![7, 1, 0];
        put_text(&mut bytes, "né");
        let mut input = Input::new(&bytes);
        assert_eq!((input.u8(), input.u16(), input.text()), (Ok(7), Ok(1), Ok("né")));
        assert_eq!((input.end(), input.u32()), (Ok(()), Err(Malformed::Ends)));
        assert_eq!(Input::new(&[3, b'a']).text(), Err(Malformed::Ends));
        assert!(Input::new(&[1, 0xff]).text().is_err());
        assert_eq!(Input::new(&[0, 0]).end(), Err(Malformed::Trailing(2)));
    }
}
