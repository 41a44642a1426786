//! A machine that came from a `mapped-ram` file becomes such a file again, that QEMU resumes from with `-incoming file:…`.
//!
//! `withdrawal.qemu(&target, …)` of a guest of 512 MiB writes its 85 MiB of pages that are not zero, each verified, and the stream around them.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use serde::Serialize;
use thiserror::Error;

use super::kept::{Kept, SECTION};
use crate::codec::Malformed;
use crate::deposit::{FileSource, Progress, Source};
use crate::page::PAGE;
use crate::withdraw::{Target, WithdrawError, WithdrawReport, Withdrawal};

/// Why no file was made.
#[derive(Debug, Error)]
pub enum QemuError {
    /// It was deposited otherwise.
    #[error("the machine has no section {SECTION}, so it was not deposited from a mapped-ram file")]
    Other,
    /// What was kept of its file is not.
    #[error("section {SECTION}: {0}")]
    Malformed(#[from] Malformed),
    /// A block is missing or has another length.
    #[error("section {SECTION} speaks of {len} bytes of {section}, which the machine does not have")]
    Block {
        /// Its section.
        section: String,
        /// The bytes that it should have.
        len: u64,
    },
    /// A section cannot be had, or not be written.
    #[error(transparent)]
    Withdraw(#[from] WithdrawError),
}

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct QemuReport {
    /// Bytes of the file.
    pub bytes: u64,
    /// Each section with what became of it.
    pub sections: Vec<(String, WithdrawReport)>,
}

impl Withdrawal<'_> {
    /// Writes the file that the machine was deposited from to `target`. What is right there already stays. `progress` is called from several
    /// threads.
    ///
    /// # Errors
    /// The machine was deposited otherwise, a page is missing or damaged, or the file cannot be written; what is in it then is not the machine.
    pub fn qemu(&self, target: &File, progress: &(dyn Fn(Progress) + Sync)) -> Result<QemuReport, QemuError> {
        let kept = self.qemu_file()?;
        let host = |error| QemuError::Withdraw(WithdrawError::Target(error));
        let before = FileSource::new(target.try_clone().map_err(host)?).map_err(host)?;
        let before = (!before.is_empty()).then(|| before.at_most(kept.file_len()));
        let fresh = before.is_none();
        target.set_len(kept.file_len()).map_err(host)?;
        let mut report = QemuReport { bytes: kept.file_len(), sections: Vec::new() };
        let (mut done, total) = (0, kept.blocks().iter().map(|block| block.len).sum::<u64>() + kept.len());
        let mut section = |name: &str, len: u64, map: Map<'_>| {
            let part = Part { file: target, before: before.as_ref(), map };
            let before = done;
            let further = |more: Progress| progress(Progress { done: before + more.done, total });
            report.sections.push((name.to_owned(), self.section_to(name, &part, fresh, &further)?));
            done += len;
            Ok::<_, QemuError>(())
        };
        for block in kept.blocks() {
            section(&block.section, block.len, Map::From(block.at))?;
        }
        section(SECTION, kept.len(), Map::Around(&kept))?;
        Ok(report)
    }

    /// What is kept of the file that the machine was deposited from.
    ///
    /// # Errors
    /// It was deposited otherwise, or that is damaged.
    pub fn qemu_file(&self) -> Result<Kept, QemuError> {
        let head = &self.manifest().head;
        let section = self.manifest().section(SECTION).ok_or(QemuError::Other)?;
        let mut first = [0; PAGE];
        self.read(section, 0, &mut first)?;
        let mut header = vec![0; Kept::announced(&first)?];
        self.read(section, 0, &mut header)?;
        let kept = Kept::parse(&header)?;
        for block in kept.blocks() {
            let there = self.manifest().section(&block.section).map(|at| head.sections[at].len);
            if there != Some(block.len) || block.section == SECTION {
                return Err(QemuError::Block { section: block.section.clone(), len: block.len });
            }
        }
        if head.sections[section].len != kept.len() {
            return Err(Malformed::Value("the length of the section", head.sections[section].len).into());
        }
        Ok(kept)
    }
}

/// Where in the file a section's bytes go.
#[derive(Debug)]
enum Map<'a> {
    /// From there on.
    From(u64),
    /// Around the blocks.
    Around(&'a Kept),
}

impl Map<'_> {
    fn place(&self, offset: u64) -> Option<(u64, u64)> {
        match self {
            Self::From(start) => Some((start + offset, u64::MAX)),
            Self::Around(kept) => kept.place(offset),
        }
    }
}

/// The part of the file that a section is.
#[derive(Debug)]
struct Part<'a> {
    file: &'a File,
    before: Option<&'a FileSource>,
    map: Map<'a>,
}

impl Part<'_> {
    /// Calls `each` with the place of each piece of `range` of the section, and the piece counted from its beginning; what is nowhere has none.
    fn pieces(&self, offset: u64, len: usize, each: &mut dyn FnMut(Option<u64>, Range<usize>) -> io::Result<()>) -> io::Result<()> {
        let mut at = 0;
        while at < len {
            let (place, more) = match self.map.place(offset + at as u64) {
                Some((place, more)) => (Some(place), usize::try_from(more).map_or(len - at, |more| more.min(len - at))),
                // A header ends with a page.
                None => (None, (PAGE - (offset as usize + at) % PAGE).min(len - at)),
            };
            each(place, at..at + more)?;
            at += more;
        }
        Ok(())
    }
}

impl Target for Part<'_> {
    fn there(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0);
        let Some(before) = self.before else { return Ok(()) };
        self.pieces(offset, buf.len(), &mut |place, piece| {
            let Some(place) = place else { return Ok(()) };
            let len = before.len().saturating_sub(place).min(piece.len() as u64) as usize;
            if len == 0 || before.data_from(place)?.is_none_or(|data| data.start >= place + len as u64) {
                return Ok(());
            }
            before.read_at(place, &mut buf[piece][..len])
        })
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.pieces(offset, bytes.len(), &mut |place, piece| {
            place.map_or(Ok(()), |place| self.file.write_all_at(&bytes[piece], place))
        })
    }
}
