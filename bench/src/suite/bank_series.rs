//! The images that `farbus bench bank` keeps: a series of a real guest, as ci/bank/series makes it, or a small one made from a seed.
//!
//! S0 is a machine after boot, S1 after idling, S2 after work, T0 another machine of the same disk; the disks are those at S0 and S2. In the small one two
//! thirds of the pages are zero, S1 differs from S0 in 1 % and S2 in 40 %.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const PAGE: usize = 4096;

/// Images in a folder.
#[derive(Clone, Debug)]
pub struct Series {
    folder: PathBuf,
    /// Which pages of S1 are not as in S0, as `farbus bank deposit --dirty` takes it.
    pub idle_bitmap: PathBuf,
    /// Whether it is of a real guest.
    pub real: bool,
}

impl Series {
    /// The series in `folder`; the bitmap is made in `scratch`.
    ///
    /// # Errors
    /// An image is missing.
    pub fn of(folder: &Path, scratch: &Path) -> Result<Self> {
        let series = Self { folder: folder.to_owned(), idle_bitmap: scratch.join("S1.bitmap"), real: true };
        for name in ["S0.ram", "S1.ram", "S2.ram"] {
            ensure!(folder.join(name).is_file(), "{} has no {name}: ci/bank/series makes a series", folder.display());
        }
        series.finish()
    }

    /// A small one of `pages` pages, in `scratch`.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn small(scratch: &Path, pages: usize, seed: u64) -> Result<Self> {
        let folder = scratch.join("series");
        fs::create_dir(&folder)?;
        let mut random = SmallRng::seed_from_u64(seed);
        // What the disk holds is in the page cache of both machines.
        let mut disk = vec![0; pages / 2 * PAGE];
        disk.chunks_exact_mut(PAGE).for_each(|page| fill(page, &mut random));
        let mut memory = vec![0; pages * PAGE];
        write(&mut memory, &disk, pages / 3, &mut random);
        let write_down =
            |name: &str, bytes: &[u8]| fs::write(folder.join(name), bytes).with_context(|| format!("cannot write {name}"));
        write_down("S0.disk", &disk)?;
        write_down("S0.ram", &memory)?;
        let mut idle = memory.clone();
        write(&mut idle, &disk, pages / 100, &mut random);
        write_down("S1.ram", &idle)?;
        write(&mut memory, &disk, pages / 2, &mut random);
        write_down("S2.ram", &memory)?;
        disk[..PAGE].fill(1);
        write_down("S2.disk", &disk)?;
        let mut other = vec![0; pages * PAGE];
        write(&mut other, &disk, pages / 3, &mut random);
        write_down("T0.ram", &other)?;
        Self { folder, idle_bitmap: scratch.join("S1.bitmap"), real: false }.finish()
    }

    /// The memory at `name`.
    pub fn image(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.ram"))
    }

    /// The disk at `name`, if it is there.
    pub fn disk(&self, name: &str) -> Option<PathBuf> {
        Some(self.folder.join(format!("{name}.disk"))).filter(|path| path.is_file())
    }

    /// Makes the bitmap, and reads every image once so that all are in the page cache.
    fn finish(self) -> Result<Self> {
        let (mut one, mut other) = (File::open(self.image("S0"))?, File::open(self.image("S1"))?);
        let (mut words, mut pages) = (Vec::new(), [[0; PAGE]; 2]);
        let mut page = 0;
        while one.read_exact(&mut pages[0]).is_ok() && other.read_exact(&mut pages[1]).is_ok() {
            if page % 64 == 0 {
                words.push(0_u64);
            }
            if pages[0] != pages[1]
                && let Some(word) = words.last_mut()
            {
                *word |= 1 << (page % 64);
            }
            page += 1;
        }
        let mut file = File::create(&self.idle_bitmap)?;
        words.iter().try_for_each(|word| file.write_all(&word.to_le_bytes()))?;
        for name in ["S2", "T0"] {
            if let Ok(mut file) = File::open(self.image(name)) {
                std::io::copy(&mut file, &mut std::io::sink())?;
            }
        }
        Ok(self)
    }
}

/// Writes to `count` pages, half of them with pages of the disk.
fn write(memory: &mut [u8], disk: &[u8], count: usize, random: &mut SmallRng) {
    for _ in 0..count {
        let at = random.random_range(0..memory.len() / PAGE) * PAGE;
        let page = &mut memory[at..at + PAGE];
        if random.random() {
            let from = random.random_range(0..disk.len() / PAGE) * PAGE;
            page.copy_from_slice(&disk[from..from + PAGE]);
        } else {
            fill(page, random);
        }
    }
}

/// Text, numbers and pointers, which compress to some third.
fn fill(page: &mut [u8], random: &mut SmallRng) {
    for slot in page.chunks_exact_mut(16) {
        slot[..6].copy_from_slice(&random.random::<u64>().to_le_bytes()[..6]);
        slot[8..].copy_from_slice(b"a guest ");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_series_is_what_it_says() {
        let scratch = tempfile::tempdir().unwrap();
        let series = Series::small(scratch.path(), 3000, 1).unwrap();
        let read = |name: &str| fs::read(series.image(name)).unwrap();
        let (first, second, idle) = (read("S0"), read("S2"), read("S1"));
        let differ =
            |one: &[u8], other: &[u8]| one.chunks(PAGE).zip(other.chunks(PAGE)).filter(|(one, other)| one != other).count();
        assert!((15..=30).contains(&differ(&first, &idle)) && (900..1500).contains(&differ(&first, &second)));
        let bitmap = fs::read(&series.idle_bitmap).unwrap();
        assert_eq!(bitmap.iter().map(|byte| byte.count_ones() as usize).sum::<usize>(), differ(&first, &idle));
        assert!(Series::of(scratch.path(), scratch.path()).is_err());
    }
}
