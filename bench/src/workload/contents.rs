//! What must be on the device: the original file, except where a case wrote, and there a pattern that names its place and its age.
//!
//! The third write to unit 17 stores, in each of its 64 cache lines, a word made from 17, 3 and the line's number; the rest of a line is
//! the same in every unit. A lost write shows as age 2, a misplaced one as another unit, a torn one as two ages in one unit.
//!
//! The ages (4 bytes for each 4 KiB) live in the runner's memory. The original must be a file that the device does not write to: the
//! device works on a copy, or on the original's snapshot.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::{UNIT_BYTES, WorkloadError};
use crate::driver::DmaBuffer;

/// Bytes that carry one stamp.
const LINE_BYTES: u64 = 64;

/// The original and the ages of what was written since.
#[derive(Debug)]
pub struct Contents {
    original: File,
    len: u64,
    /// Per unit: 0 where the original's bytes are, else how many writes it has seen.
    ages: Vec<u32>,
    key: u64,
}

impl Contents {
    /// A device that holds exactly the bytes of `original`. `key` tells this run's patterns from an earlier one's.
    ///
    /// # Errors
    /// [`WorkloadError::Original`] where its length cannot be read.
    pub fn new(original: File, key: u64) -> Result<Self, WorkloadError> {
        let len = original.metadata().map_err(WorkloadError::Original)?.len();
        let units = usize::try_from(len.div_ceil(UNIT_BYTES)).unwrap_or(usize::MAX);
        Ok(Self { original, len, ages: vec![0; units], key })
    }

    /// Bytes of the device.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Units that hold a pattern instead of the original.
    pub fn patterned(&self) -> u64 {
        self.ages.iter().filter(|age| **age != 0).count() as u64
    }

    /// Whether any of the units from byte `at` holds a pattern.
    pub(super) fn any_patterned(&self, at: u64, len: u64) -> bool {
        let range = (at / UNIT_BYTES) as usize..((at + len) / UNIT_BYTES) as usize;
        self.ages.get(range).is_some_and(|ages| ages.iter().any(|age| *age != 0))
    }

    /// Stamps `buffer`, whose filler [`prepare`] wrote, with the patterns of the next age for its units from byte `at` of the device on.
    /// The ages count from [`Contents::written`] on.
    #[inline]
    pub(super) fn stamp(&self, buffer: &DmaBuffer, at: u64) -> Result<(), WorkloadError> {
        for offset in (0..buffer.len()).step_by(UNIT_BYTES as usize) {
            let unit = (at + offset) / UNIT_BYTES;
            let stamp = self.stamp_of(unit, self.age(unit).wrapping_add(1));
            for line in 0..UNIT_BYTES / LINE_BYTES {
                buffer.write(offset + line * LINE_BYTES, &line_stamp(stamp, line).to_le_bytes())?;
            }
        }
        Ok(())
    }

    /// The units of `len` bytes from `at` were written as [`Contents::stamp`] made them.
    #[inline]
    pub(super) fn written(&mut self, at: u64, len: u64) {
        for unit in at / UNIT_BYTES..(at + len) / UNIT_BYTES {
            if let Some(age) = self.ages.get_mut(unit as usize) {
                *age = age.wrapping_add(1).max(1);
            }
        }
    }

    /// The units of `len` bytes from `at` hold the original again.
    pub(super) fn restored(&mut self, at: u64, len: u64) {
        for unit in at / UNIT_BYTES..(at + len) / UNIT_BYTES {
            if let Some(age) = self.ages.get_mut(unit as usize) {
                *age = 0;
            }
        }
    }

    /// The original's bytes from `at` on.
    pub(super) fn original(&self, at: u64, into: &mut [u8]) -> Result<(), WorkloadError> {
        self.original.read_exact_at(into, at).map_err(WorkloadError::Original)
    }

    /// What must be at byte `at` (a multiple of a unit) of the device.
    pub(super) fn expected(&self, at: u64, into: &mut [u8]) -> Result<(), WorkloadError> {
        self.original(at, into)?;
        for (unit, bytes) in (at / UNIT_BYTES..).zip(into.chunks_mut(UNIT_BYTES as usize)) {
            let age = self.age(unit);
            if age == 0 {
                continue;
            }
            let stamp = self.stamp_of(unit, age);
            for (line, bytes) in (0..).zip(bytes.chunks_mut(LINE_BYTES as usize)) {
                fill_line(bytes, line);
                if let Some(word) = bytes.first_chunk_mut() {
                    *word = line_stamp(stamp, line).to_le_bytes();
                }
            }
        }
        Ok(())
    }

    /// Where the bytes of the unit at byte `at` come from, for an error.
    pub(super) fn origin(&self, at: u64) -> String {
        match self.age(at / UNIT_BYTES) {
            0 => "as in the file".to_owned(),
            age => format!("write {age} of this run to unit {}", at / UNIT_BYTES),
        }
    }

    fn age(&self, unit: u64) -> u32 {
        self.ages.get(unit as usize).copied().unwrap_or(0)
    }

    fn stamp_of(&self, unit: u64, age: u32) -> u64 {
        // The age a write makes: 0 means "original", so the count skips it when it wraps.
        mix(self.key ^ mix(unit ^ (u64::from(age.max(1)) << 40)))
    }
}

/// Fills `buffer` with what all patterns have in common, once; the stamps come with each write.
pub(super) fn prepare(buffer: &DmaBuffer) -> Result<(), WorkloadError> {
    let mut bytes = [0; LINE_BYTES as usize];
    for at in (0..buffer.len()).step_by(LINE_BYTES as usize) {
        fill_line(&mut bytes, at % UNIT_BYTES / LINE_BYTES);
        buffer.write(at, &bytes)?;
    }
    Ok(())
}

fn fill_line(bytes: &mut [u8], line: u64) {
    for (index, word) in (0..).zip(bytes.chunks_mut(8)) {
        let filler = mix(line * 8 + index).to_le_bytes();
        word.copy_from_slice(&filler[..word.len()]);
    }
}

fn line_stamp(stamp: u64, line: u64) -> u64 {
    stamp.wrapping_add(line.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// SplitMix64's finalizer (Steele, Lea, Flood 2014): every bit of the input reaches every bit of the output.
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
