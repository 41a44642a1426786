//! What is deposited: bytes that can be read at any offset, by two threads at once.
//!
//! A file of 512 MiB of which 100 MiB were ever written says where these are, and the rest is known to be zero without being read.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// Bytes to deposit. What is read is read once: what is hashed is what is stored.
pub trait Source: Sync {
    /// Bytes in all.
    fn len(&self) -> u64;

    /// Fills `buf` from `offset`; both lie within [`Source::len`].
    ///
    /// # Errors
    /// The host's fault.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// The first stretch from `offset` that may be other than zero; `None`: all is zero from there.
    ///
    /// # Errors
    /// The host's fault.
    fn data_from(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let len = self.len();
        Ok((offset < len).then_some(offset..len))
    }

    /// Whether there is nothing.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A file: a memory image, a disk image, a memfd.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    len: u64,
    holes: bool,
}

impl FileSource {
    /// The file as long as it is now. A block device is as long as where its end is.
    ///
    /// # Errors
    /// The host's fault.
    pub fn new(file: File) -> io::Result<Self> {
        let len = seek(&file, SeekFrom::End(0))?;
        let holes = len > 0 && matches!(seek(&file, SeekFrom::Data(0)), Ok(_) | Err(Errno::NXIO));
        Ok(Self { file, len, holes })
    }

    /// Without what lies behind `len` bytes.
    #[must_use]
    pub fn at_most(mut self, len: u64) -> Self {
        self.len = self.len.min(len);
        self
    }
}

impl Source for FileSource {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn data_from(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        if offset >= self.len {
            return Ok(None);
        }
        if !self.holes {
            return Ok(Some(offset..self.len));
        }
        match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(start) => {
                let end = seek(&self.file, SeekFrom::Hole(start))?;
                Ok(Some(start..end.min(self.len)))
            }
            // No data behind it.
            Err(Errno::NXIO) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl Source for &[u8] {
    fn len(&self) -> u64 {
        (**self).len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let range = usize::try_from(offset).ok().and_then(|from| self.get(from..from.checked_add(buf.len())?));
        buf.copy_from_slice(range.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// Which pages may differ from the parent's.
#[derive(Clone, Copy, Debug)]
pub enum Changes<'a> {
    /// Any: all are hashed.
    HashAll,
    /// Those whose bit is set, page `64 i + j` by bit `j` of word `i`; pages behind its end may too. Others are taken from the parent unread.
    Bitmap(&'a [u64]),
    /// None, and the source cannot be read: all is taken from the parent, which has a section of that length.
    None,
}

impl Changes<'_> {
    /// Whether page `page` may differ.
    pub fn may(&self, page: u64) -> bool {
        match self {
            Self::HashAll => true,
            Self::None => false,
            Self::Bitmap(words) => {
                let word = usize::try_from(page / 64).ok().and_then(|at| words.get(at));
                word.is_none_or(|word| word >> (page % 64) & 1 == 1)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_says_where_its_data_are() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(10 << 20).unwrap();
        file.write_all_at(b"x", 5 << 20).unwrap();
        let source = FileSource::new(file).unwrap();
        assert_eq!(source.len(), 10 << 20);
        let data = source.data_from(0).unwrap().unwrap();
        assert!(data.contains(&(5 << 20)), "{data:?}");
        assert_eq!(source.data_from(10 << 20).unwrap(), None);
        let mut buf = [0; 2];
        source.read_at(5 << 20, &mut buf).unwrap();
        assert_eq!(&buf, b"x\0");
        assert!(source.read_at((10 << 20) - 1, &mut buf).is_err());
    }

    #[test]
    fn a_bitmap_names_pages_and_what_is_behind_it_may_have_changed() {
        let changes = Changes::Bitmap(&[1 << 5, 1]);
        assert!(changes.may(5) && changes.may(64) && changes.may(128));
        assert!(!changes.may(4) && !changes.may(65));
        assert!(Changes::HashAll.may(0) && !Changes::None.may(0));
    }
}
