//! A `mapped-ram` file as sources of a deposit: each block by its bitmap, and everything around the blocks.
//!
//! A block of 128 MiB of which the bitmap says that 60 MiB are in the file is read for these, and is zero elsewhere whatever the file has there.

use std::fmt;
use std::io;
use std::ops::Range;

use super::saved::{Block, Saved};
use crate::deposit::Source;

/// The pages of one block.
pub struct BlockSource<'a> {
    file: &'a dyn Source,
    block: &'a Block,
}

/// What is around the blocks, behind its header.
#[derive(Debug)]
pub struct RestSource<'a> {
    saved: &'a Saved<'a>,
    header: Vec<u8>,
}

impl fmt::Debug for BlockSource<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockSource").field("name", &self.block.name).finish_non_exhaustive()
    }
}

impl Saved<'_> {
    /// The pages of one of its blocks.
    pub fn pages<'a>(&'a self, block: &'a Block) -> BlockSource<'a> {
        BlockSource { file: self.source(), block }
    }

    /// Everything around them.
    pub fn rest(&self) -> RestSource<'_> {
        RestSource { saved: self, header: self.kept().encode() }
    }
}

impl BlockSource<'_> {
    /// The first page from `page` on whose bit is `set`, or the number of pages.
    fn next(&self, page: u64, set: bool) -> u64 {
        let count = self.block.len / self.block.page_size;
        let mut page = page;
        while page < count {
            // The bitmap has a bit for each page, so both are in it.
            let byte = self.block.bitmap[(page / 8) as usize];
            let ours = if set { byte } else { !byte } >> (page % 8);
            if ours != 0 {
                return (page + u64::from(ours.trailing_zeros())).min(count);
            }
            page = (page / 8 + 1) * 8;
        }
        count
    }

    /// The first stretch that is in the file and ends behind `offset`.
    fn stretch(&self, offset: u64) -> Option<Range<u64>> {
        let size = self.block.page_size;
        let start = self.next(offset / size, true);
        let end = self.next(start, false);
        (start < end).then(|| (start * size).max(offset)..end * size)
    }
}

impl Source for BlockSource<'_> {
    fn len(&self) -> u64 {
        self.block.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let there = self.stretch(at).map_or(end..end, |there| there.start.min(end)..there.end.min(end));
            let part = |range: Range<u64>| (range.start - offset) as usize..(range.end - offset) as usize;
            buf[part(at..there.start)].fill(0);
            self.file.read_at(self.block.pages_at + there.start, &mut buf[part(there.clone())])?;
            at = there.end;
        }
        Ok(())
    }

    fn data_from(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok(self.stretch(offset))
    }
}

impl Source for RestSource<'_> {
    fn len(&self) -> u64 {
        self.saved.kept().len()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let Some((place, len)) = self.saved.kept().place(at) else {
                let header =
                    self.header.get(at as usize..).filter(|header| !header.is_empty()).ok_or(io::ErrorKind::UnexpectedEof)?;
                let (front, behind) = rest.split_at_mut(header.len().min(rest.len()));
                front.copy_from_slice(&header[..front.len()]);
                at += front.len() as u64;
                rest = behind;
                continue;
            };
            let len = usize::try_from(len).map_or(rest.len(), |len| len.min(rest.len()));
            let (front, behind) = rest.split_at_mut(len);
            self.saved.source().read_at(place, front)?;
            at += front.len() as u64;
            rest = behind;
        }
        Ok(())
    }
}
