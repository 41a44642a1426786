//! What a deposit takes of memory and of manifest where the machine is large: 10 GiB, of pages that are all different, made as they are read.
//!
//! After 2.6 million pages the process has grown by some 60 MiB, 40 of which are its buffers; a second deposit of which 1 % changed has a manifest of 35 bytes
//! for each changed page.

use std::io;
use std::path::Path;

use anyhow::{Context, Result};
use farbus_machine_bank::deposit::BUFFERS;
use farbus_machine_bank::store::Directory;
use farbus_machine_bank::{Bank, Changes, DepositOptions, PAGE, SectionKind, Source};

/// The figures.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Large {
    /// By how much the process grew at most, without the buffers of a deposit.
    pub memory_mib: f64,
    /// Of the second deposit.
    pub manifest_bytes: f64,
}

/// Memory that is not there: page `n` is `n` and the version, then a pattern.
struct Machine {
    bytes: u64,
    version: u64,
}

impl Source for Machine {
    fn len(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        for (at, page) in buf.chunks_mut(PAGE).enumerate() {
            let number = offset / PAGE as u64 + at as u64;
            page.fill(0x5a);
            // One page in a hundred is another one in the next version.
            let version = if number.is_multiple_of(100) { self.version } else { 0 };
            page[..16].copy_from_slice(&(u128::from(number) << 64 | u128::from(version + 1)).to_le_bytes());
        }
        Ok(())
    }
}

/// Deposits a machine of `bytes` bytes twice, in a bank at `path`.
///
/// # Errors
/// A deposit fails, or Linux does not say how much memory the process has.
pub fn large(path: &Path, bytes: u64) -> Result<Large> {
    let bank = Bank::init(Box::new(Directory::create(path)?), None)?;
    // The highest since now is what counts.
    std::fs::write("/proc/self/clear_refs", "5").context("Linux does not forget how much memory the process had")?;
    let before = memory("VmRSS:")?;
    let first = deposit(&bank, &Machine { bytes, version: 0 }, Changes::HashAll)?;
    anyhow::ensure!(first.counts.new == bytes / PAGE as u64, "the pages are not all different");
    let grown = memory("VmHWM:")?.saturating_sub(before);
    let pages = bytes / PAGE as u64;
    let mut dirty = vec![0_u64; pages.div_ceil(64) as usize];
    (0..pages).step_by(100).for_each(|page| dirty[(page / 64) as usize] |= 1 << (page % 64));
    let second = deposit(&bank, &Machine { bytes, version: 1 }, Changes::Bitmap(&dirty))?;
    std::fs::remove_dir_all(path).with_context(|| format!("cannot remove {}", path.display()))?;
    Ok(Large {
        memory_mib: grown.saturating_sub(BUFFERS as u64) as f64 / f64::from(1 << 20),
        manifest_bytes: second.manifest_bytes as f64 / second.counts.new as f64,
    })
}

fn deposit(bank: &Bank, machine: &Machine, changes: Changes<'_>) -> Result<farbus_machine_bank::deposit::DepositReport> {
    let mut deposit = bank.deposit("large", &DepositOptions::default())?;
    deposit.section(SectionKind::Memory, "memory", machine, changes, &|_| {})?;
    Ok(deposit.commit()?)
}

/// A line of /proc/self/status, in bytes.
fn memory(line: &str) -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let found =
        status.lines().find_map(|text| text.strip_prefix(line)).with_context(|| format!("/proc/self/status has no {line}"))?;
    let kib: u64 = found.trim().trim_end_matches(" kB").parse().with_context(|| format!("{line}{found} is no number of kB"))?;
    Ok(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_of_64_mib_is_deposited_within_bounds() {
        let folder = tempfile::tempdir().unwrap();
        let large = large(&folder.path().join("bank"), 64 << 20).unwrap();
        assert!(large.memory_mib <= 64.0 && (34.0..48.0).contains(&large.manifest_bytes), "{large:?}");
    }
}
