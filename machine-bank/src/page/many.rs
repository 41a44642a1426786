//! BLAKE3 of up to sixteen pages at once, each in a lane of its own.
//!
//! A page has four chunks, so hashed by itself it fills four of the sixteen lanes that AVX-512 has, or of the eight of AVX2; sixteen pages fill all of them,
//! chunk by chunk: twice as fast where this was measured (`cargo bench -p farbus-bench --bench parts names`). What is computed is BLAKE3 as it is
//! specified (BLAKE3, sections 2.2 to 2.4), by the blake3 crate's own compression; how the lanes are filled is all that is here.
//!
//! The crate says that its `platform` module may change, so its version is held to `~1.8`, and a test holds each result against `blake3::hash`.

use blake3::IncrementCounter;
use blake3::platform::{MAX_SIMD_DEGREE, Platform};

use super::{KEY, PAGE};

/// Pages that are hashed at once.
pub(super) const LANES: usize = 16;

const CHUNK: usize = 1024;
const CHUNKS: usize = PAGE / CHUNK;
const HASH: usize = 32;

/// BLAKE3, table 1: SHA-256's initial values.
const IV: [u32; 8] = [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];
/// BLAKE3, table 3.
const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 2;
const PARENT: u8 = 4;
const ROOT: u8 = 8;
const KEYED_HASH: u8 = 16;

/// BLAKE3 with a key or without one, for pages.
#[derive(Clone, Copy)]
pub(super) struct Lanes {
    platform: Platform,
    key: [u32; 8],
    flags: u8,
}

impl Lanes {
    pub fn new(key: Option<&[u8; KEY]>) -> Self {
        let platform = Platform::detect();
        match key {
            None => Self { platform, key: IV, flags: 0 },
            Some(key) => {
                let mut words = [0; 8];
                for (word, bytes) in words.iter_mut().zip(key.as_chunks::<4>().0) {
                    *word = u32::from_le_bytes(*bytes);
                }
                Self { platform, key: words, flags: KEYED_HASH }
            }
        }
    }

    /// The hashes of at most [`LANES`] pages, at the front of what is returned.
    pub fn hash(&self, pages: &[&[u8; PAGE]]) -> [[u8; HASH]; LANES] {
        debug_assert!(pages.len() <= LANES, "{} pages for {LANES} lanes", pages.len());
        let count = pages.len().min(LANES);
        // Chunk by chunk, the chaining value of each page's.
        let mut values = [[[0u8; HASH]; LANES]; CHUNKS];
        for (at, values) in values.iter_mut().enumerate() {
            let mut chunks = [&[0; CHUNK]; LANES];
            for (chunk, page) in chunks.iter_mut().zip(pages) {
                *chunk = &page.as_chunks::<CHUNK>().0[at];
            }
            let out = values.as_flattened_mut();
            self.many(&chunks[..count], at as u64, self.flags, CHUNK_START, CHUNK_END, out);
        }
        let lower = self.parents(count, &values[0], &values[1], 0);
        let upper = self.parents(count, &values[2], &values[3], 0);
        self.parents(count, &lower, &upper, ROOT)
    }

    /// The parents of `left` and `right`, pair by pair.
    fn parents(&self, count: usize, left: &[[u8; HASH]; LANES], right: &[[u8; HASH]; LANES], root: u8) -> [[u8; HASH]; LANES] {
        let mut pairs = [[0u8; 2 * HASH]; LANES];
        for ((pair, left), right) in pairs.iter_mut().zip(left).zip(right) {
            pair[..HASH].copy_from_slice(left);
            pair[HASH..].copy_from_slice(right);
        }
        let inputs: [&[u8; 2 * HASH]; LANES] = std::array::from_fn(|at| &pairs[at]);
        let mut out = [[0; HASH]; LANES];
        self.many(&inputs[..count], 0, self.flags | PARENT | root, 0, 0, out.as_flattened_mut());
        out
    }

    fn many<const N: usize>(&self, inputs: &[&[u8; N]], counter: u64, flags: u8, start: u8, end: u8, out: &mut [u8]) {
        self.platform.hash_many(inputs, &self.key, counter, IncrementCounter::No, flags, start, end, out);
    }
}

/// Sixteen pages fill every lane that there can be.
const _: () = assert!(LANES >= MAX_SIMD_DEGREE && CHUNKS == 4);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_number_of_pages_has_the_hashes_that_each_has_alone() {
        let pages: Vec<[u8; PAGE]> = (0..LANES as u32)
            .map(|n| {
                let mut page = [0; PAGE];
                blake3::Hasher::new().update(&n.to_le_bytes()).finalize_xof().fill(&mut page);
                page
            })
            .collect();
        let refs: Vec<_> = pages.iter().collect();
        let key = [7; KEY];
        for count in 0..=LANES {
            let plain = Lanes::new(None).hash(&refs[..count]);
            let keyed = Lanes::new(Some(&key)).hash(&refs[..count]);
            for (at, page) in pages[..count].iter().enumerate() {
                assert_eq!(plain[at], *blake3::hash(page).as_bytes(), "page {at} of {count}");
                assert_eq!(keyed[at], *blake3::keyed_hash(&key, page).as_bytes(), "page {at} of {count}, keyed");
            }
        }
    }
}
