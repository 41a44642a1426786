//! Groups of at most 16 pages, compressed together by zstd at its fastest ordinary level, or as they are where that would not make them smaller.
//!
//! Sixteen pages of text become a byte `1` and some 15 KB; sixteen pages of random bytes a byte `0` and the 65,536 bytes themselves.

use std::fmt;

use crate::codec::Malformed;
use crate::page::PAGE;

/// Pages of a full group.
pub const GROUP_PAGES: usize = 16;
/// Bytes of a full group, uncompressed.
pub const GROUP: usize = GROUP_PAGES * PAGE;
/// zstd's level: 404 MB/s on one core where this was measured; level 3 takes twice as long and saves 5 %.
const LEVEL: i32 = 1;

const RAW: u8 = 0;
const ZSTD: u8 = 1;

/// Compresses groups, one after the other, without allocating.
pub struct GroupEncoder {
    zstd: zstd::bulk::Compressor<'static>,
    out: Vec<u8>,
}

impl GroupEncoder {
    /// # Errors
    /// There is no memory for zstd's state.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { zstd: zstd::bulk::Compressor::new(LEVEL)?, out: vec![0; GROUP + 1] })
    }

    /// The group of `pages`, at most [`GROUP`] bytes, as it is stored.
    pub fn encode(&mut self, pages: &[u8]) -> &[u8] {
        // No room for a payload that is not smaller: zstd refuses then, and the group stays raw.
        let room = &mut self.out[1..pages.len()];
        let len = match self.zstd.compress_to_buffer(pages, room) {
            Ok(len) => {
                self.out[0] = ZSTD;
                len
            }
            Err(_) => {
                self.out[0] = RAW;
                self.out[1..=pages.len()].copy_from_slice(pages);
                pages.len()
            }
        };
        &self.out[..=len]
    }
}

impl fmt::Debug for GroupEncoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GroupEncoder")
    }
}

/// Decompresses groups.
pub struct GroupDecoder(zstd::bulk::Decompressor<'static>);

impl GroupDecoder {
    /// # Errors
    /// There is no memory for zstd's state.
    pub fn new() -> std::io::Result<Self> {
        zstd::bulk::Decompressor::new().map(Self)
    }

    /// Writes the pages of a stored group to the front of `out`, and says how many bytes they are. They are unverified: their names are to
    /// be held against them.
    ///
    /// # Errors
    /// It is no group, or is larger than one can be.
    pub fn decode(&mut self, stored: &[u8], out: &mut [u8; GROUP]) -> Result<usize, Malformed> {
        let (codec, payload) = stored.split_first().ok_or(Malformed::Ends)?;
        let len = match *codec {
            RAW => {
                out.get_mut(..payload.len())
                    .ok_or(Malformed::Value("a group's length", payload.len() as u64))?
                    .copy_from_slice(payload);
                payload.len()
            }
            ZSTD => self.0.decompress_to_buffer(payload, out.as_mut_slice()).map_err(|_| Malformed::Compression)?,
            other => return Err(Malformed::Value("a group's codec", other.into())),
        };
        if len == 0 || len % PAGE != 0 { Err(Malformed::Value("a group's length", len as u64)) } else { Ok(len) }
    }
}

impl fmt::Debug for GroupDecoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GroupDecoder")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_back_and_what_does_not_compress_is_one_byte_longer() {
        let (mut encoder, mut decoder) = (GroupEncoder::new().unwrap(), GroupDecoder::new().unwrap());
        let mut out = [0; GROUP];
        let text: Vec<u8> = b"a line of a log\n".iter().copied().cycle().take(GROUP).collect();
        let mut random = vec![0; 3 * PAGE];
        blake3::Hasher::new().finalize_xof().fill(&mut random);
        for (pages, most) in [(&text, GROUP / 10), (&random, 3 * PAGE + 1)] {
            let stored = encoder.encode(pages).to_vec();
            assert!(stored.len() <= most, "{}", stored.len());
            assert_eq!(decoder.decode(&stored, &mut out), Ok(pages.len()));
            assert!(out[..pages.len()] == pages[..]);
        }
    }

    #[test]
    fn what_is_no_group_is_refused() {
        let mut decoder = GroupDecoder::new().unwrap();
        let mut out = [0; GROUP];
        let bomb = zstd::bulk::compress(&vec![0; GROUP + PAGE], 1).unwrap();
        let odd = zstd::bulk::compress(&[7; 100], 1).unwrap();
        let with = |codec: u8, payload: &[u8]| [&[codec], payload].concat();
        for wrong in [
            vec![],
            vec![0],
            vec![2, 0],
            with(0, &[0; 4095]),
            with(0, &[0; GROUP + 1]),
            with(1, &bomb),
            with(1, &odd),
            with(1, &[1, 2, 3]),
        ] {
            assert!(decoder.decode(&wrong, &mut out).is_err(), "{:?}", wrong.get(..4));
        }
    }
}
