//! Reads the whole device through the driver and compares every byte; puts the original back.
//!
//! Eight reads of 128 KiB are in flight; each is compared as soon as its completion is seen, which is also the proof that data comes before
//! completions: a buffer still holds another place's bytes until the right ones arrive.

use super::{LARGE_BYTES, Progress, UNIT_BYTES, Workload, WorkloadError};
use crate::driver::{DmaBuffer, Driver, Io, Registers};

/// Commands in flight.
const IN_FLIGHT: usize = 8;

/// The outcome of a verification that found nothing wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Bytes read and compared: all of the device.
    pub bytes: u64,
    /// Of these, bytes that were compared with the original file.
    pub original: u64,
    /// Of these, bytes that were compared with a pattern of a write of this run.
    pub patterned: u64,
}

impl Workload {
    /// Reads every block through the driver and compares it with what must be there.
    ///
    /// # Errors
    /// [`WorkloadError::WrongData`] names the first difference found.
    pub fn verify<R: Registers>(
        &mut self,
        driver: &mut Driver<R>,
        mut progress: impl FnMut(Progress),
    ) -> Result<Verified, WorkloadError> {
        let total = self.contents.len();
        let (mut found, mut wanted) = (vec![0; LARGE_BYTES as usize], vec![0; LARGE_BYTES as usize]);
        let (mut slots, mut next, mut done) = ([None; IN_FLIGHT], 0, 0);
        while done < total {
            for (slot, pending) in slots.iter_mut().enumerate() {
                if pending.is_some() || next == total {
                    continue;
                }
                let (buffer, len) = self.piece(driver, slot, next)?;
                let block = next / driver.namespace().block_bytes;
                driver.submit(self.queue, &Io::Read { block, into: &buffer }, slot as u64)?;
                *pending = Some((next, len));
                next += len;
            }
            driver.ring(self.queue)?;
            let mut completed = [None; IN_FLIGHT];
            reap(driver, self.queue, "verify", &mut completed)?;
            for slot in completed.into_iter().flatten() {
                let Some((at, len)) = slots.get_mut(slot).and_then(Option::take) else {
                    let (case, token) = ("verify", slot as u64);
                    return Err(WorkloadError::Slot { case, token });
                };
                let (found, wanted) = (&mut found[..len as usize], &mut wanted[..len as usize]);
                self.large[slot].read(0, found)?;
                self.compare(at, found, wanted)?;
                done += len;
                progress(Progress { done, total });
            }
        }
        let patterned = self.contents.patterned() * UNIT_BYTES;
        Ok(Verified { bytes: total, original: total - patterned, patterned })
    }

    /// Writes the original bytes back wherever a case wrote, and flushes. [`Workload::verify`] afterwards compares all with the file.
    ///
    /// # Errors
    /// [`WorkloadError`].
    pub fn restore<R: Registers>(
        &mut self,
        driver: &mut Driver<R>,
        mut progress: impl FnMut(Progress),
    ) -> Result<(), WorkloadError> {
        let total = self.contents.len();
        let mut bytes = vec![0; LARGE_BYTES as usize];
        let mut at = 0;
        while at < total {
            let (buffer, len) = self.piece(driver, 0, at)?;
            if self.contents.any_patterned(at, len) {
                let bytes = &mut bytes[..len as usize];
                self.contents.original(at, bytes)?;
                buffer.write(0, bytes)?;
                let block = at / driver.namespace().block_bytes;
                driver.execute(self.queue, &Io::Write { block, from: &buffer })?;
                self.contents.restored(at, len);
            }
            at += len;
            progress(Progress { done: at, total });
        }
        driver.execute(self.queue, &Io::Flush)?;
        Ok(())
    }

    /// The buffer of `slot`, cut to what is left of the device from `at` on and to the longest transfer.
    fn piece<R: Registers>(&self, driver: &Driver<R>, slot: usize, at: u64) -> Result<(DmaBuffer, u64), WorkloadError> {
        let longest = driver.max_transfer() / UNIT_BYTES * UNIT_BYTES;
        let len = LARGE_BYTES.min(self.contents.len() - at).min(longest.max(UNIT_BYTES));
        let outside = farbus_transport::MemoryError::OutOfBounds { offset: 0, len, mapped: LARGE_BYTES };
        let buffer = self.large.get(slot).and_then(|buffer| buffer.slice(0, len));
        Ok((buffer.ok_or(outside)?, len))
    }

    fn compare(&self, at: u64, found: &[u8], wanted: &mut [u8]) -> Result<(), WorkloadError> {
        self.contents.expected(at, wanted)?;
        if found == wanted {
            return Ok(());
        }
        let differs = found.iter().zip(wanted.iter()).position(|(found, wanted)| found != wanted).unwrap_or(0);
        let sample = |bytes: &[u8]| bytes.iter().skip(differs).take(8).copied().collect();
        Err(WorkloadError::WrongData {
            at: at + differs as u64,
            expected: self.contents.origin(at + differs as u64),
            found: sample(found),
            wanted: sample(wanted),
        })
    }
}

/// Waits for completions and notes the slots they name.
fn reap<R: Registers>(
    driver: &mut Driver<R>,
    queue: crate::driver::QueueIndex,
    case: &'static str,
    completed: &mut [Option<usize>; IN_FLIGHT],
) -> Result<(), WorkloadError> {
    let mut free = completed.iter_mut();
    let mut failed = None;
    driver.reap_some(queue, |done| {
        if !done.status.ok() {
            failed = Some(done.status);
        }
        if let Some(entry) = free.next() {
            *entry = Some(done.token as usize);
        }
    })?;
    match failed {
        Some(status) => Err(WorkloadError::Command { case, status }),
        None => Ok(()),
    }
}
