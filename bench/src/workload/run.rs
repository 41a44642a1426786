//! One case: commands kept in flight, latencies recorded, nothing allocated and nothing asked of the kernel after the first command.
//!
//! At queue depth 32 a reap that finds 5 completions is followed by 5 submissions and one doorbell, as a kernel's driver would do it.

use std::time::Instant;

use rand::Rng;

use super::contents::prepare;
use super::{Budget, Case, CaseRun, MAX_IN_FLIGHT, Workload, WorkloadError};
use crate::driver::{Completion, Driver, Io, QueueIndex, Registers};
use crate::measure::Latencies;

/// A buffer's command.
#[derive(Clone, Copy)]
struct InFlight {
    at: u64,
    submitted: Instant,
}

/// Empty polls between two looks at the clock in which a deadline could have passed.
const POLLS_PER_LOOK: u32 = 1024;

impl Workload {
    /// Runs `case` once.
    ///
    /// # Errors
    /// [`WorkloadError`]; the driver is of no use then, because commands may be in flight.
    pub fn run<R: Registers>(&mut self, driver: &mut Driver<R>, case: Case, budget: Budget) -> Result<CaseRun, WorkloadError> {
        let mut latencies = Latencies::new();
        let (commands, elapsed) = self.run_into(driver, case, budget, &mut latencies)?;
        Ok(CaseRun { commands, elapsed, latencies })
    }

    /// As [`Workload::run`], into a histogram that is there already: this call does not allocate.
    ///
    /// # Errors
    /// As [`Workload::run`].
    pub fn run_into<R: Registers>(
        &mut self,
        driver: &mut Driver<R>,
        case: Case,
        budget: Budget,
        latencies: &mut Latencies,
    ) -> Result<(u64, std::time::Duration), WorkloadError> {
        self.check(driver, case)?;
        let mut slots: [Option<InFlight>; MAX_IN_FLIGHT] = [None; MAX_IN_FLIGHT];
        let wanted = case.in_flight.min(MAX_IN_FLIGHT);
        if case.write {
            for slot in 0..wanted {
                prepare(self.buffer(case, slot))?;
            }
        }
        let start = Instant::now();
        let (mut submitted, mut completed) = (0_u64, 0_u64);
        let mut running = true;
        let mut idle_polls = 0_u32;
        loop {
            if running {
                submitted += self.fill(driver, case, &mut slots, wanted, budget, submitted)?;
                driver.ring(self.queue)?;
            }
            let found = self.collect(driver, case, &mut slots, latencies)?;
            completed += found;
            running = match budget {
                Budget::Commands(limit) => submitted < limit,
                // The clock was just looked at for the completion; once more for each batch.
                Budget::Time(limit) => running && (found == 0 || start.elapsed() < limit),
            };
            if !running && completed == submitted {
                break;
            }
            idle_polls = if found > 0 { 0 } else { idle_polls.wrapping_add(1) };
            if idle_polls != 0 && idle_polls.is_multiple_of(POLLS_PER_LOOK) {
                check_deadline(driver, &slots, self.queue)?;
            }
        }
        Ok((completed, start.elapsed()))
    }

    fn check<R: Registers>(&self, driver: &mut Driver<R>, case: Case) -> Result<(), WorkloadError> {
        let needed = case.bytes * case.in_flight as u64 * 2;
        let device = self.contents.len();
        if device < needed {
            let case = case.name;
            return Err(WorkloadError::TooSmall { case, needed, device });
        }
        let allowed = driver.max_transfer();
        if case.bytes > allowed {
            let asked = case.bytes;
            let what = "bytes of a transfer";
            return Err(WorkloadError::Driver(crate::driver::DriverError::Limit { what, asked, allowed }));
        }
        Ok(())
    }

    /// Submits a command for every free slot that the case and the budget allow.
    fn fill<R: Registers>(
        &mut self,
        driver: &mut Driver<R>,
        case: Case,
        slots: &mut [Option<InFlight>; MAX_IN_FLIGHT],
        wanted: usize,
        budget: Budget,
        submitted: u64,
    ) -> Result<u64, WorkloadError> {
        let allowed = match budget {
            Budget::Commands(limit) => limit - submitted,
            Budget::Time(_) => u64::MAX,
        };
        let mut count = 0;
        for slot in 0..wanted {
            if slots[slot].is_some() || count == allowed {
                continue;
            }
            let at = self.place(case, slots);
            if case.write {
                self.contents.stamp(self.buffer(case, slot), at)?;
            }
            let buffer = self.buffer(case, slot);
            let block = at / driver.namespace().block_bytes;
            let io = if case.write { Io::Write { block, from: buffer } } else { Io::Read { block, into: buffer } };
            slots[slot] = Some(InFlight { at, submitted: Instant::now() });
            driver.submit(self.queue, &io, slot as u64)?;
            count += 1;
        }
        Ok(count)
    }

    /// Takes what has completed.
    fn collect<R: Registers>(
        &mut self,
        driver: &mut Driver<R>,
        case: Case,
        slots: &mut [Option<InFlight>; MAX_IN_FLIGHT],
        latencies: &mut Latencies,
    ) -> Result<u64, WorkloadError> {
        let mut failed = None;
        let (contents, watch) = (&mut self.contents, self.watch);
        let found = driver.reap(self.queue, |done: Completion| {
            let slot = usize::try_from(done.token).ok().and_then(|slot| slots.get_mut(slot));
            let Some(command) = slot.and_then(Option::take) else {
                failed = Some(WorkloadError::Slot { case: case.name, token: done.token });
                return;
            };
            latencies.record_ns(watch.since(command.submitted));
            if !done.status.ok() {
                failed = Some(WorkloadError::Command { case: case.name, status: done.status });
            } else if case.write {
                contents.written(command.at, case.bytes);
            }
        })?;
        failed.map_or(Ok(found as u64), Err)
    }

    fn buffer(&self, case: Case, slot: usize) -> &crate::driver::DmaBuffer {
        if case.bytes == super::UNIT_BYTES { &self.small[slot] } else { &self.large[slot] }
    }

    /// Where the next command goes. Never where another is in flight: two writes there would have no defined order.
    fn place(&mut self, case: Case, slots: &[Option<InFlight>]) -> u64 {
        let places = self.contents.len() / case.bytes;
        loop {
            let place = if case.random {
                self.random.random_range(0..places)
            } else {
                self.next_sequential = (self.next_sequential + 1) % places;
                self.next_sequential
            };
            let at = place * case.bytes;
            if !slots.iter().flatten().any(|command| command.at == at) {
                return at;
            }
        }
    }
}

fn check_deadline<R: Registers>(
    driver: &mut Driver<R>,
    slots: &[Option<InFlight>],
    queue: QueueIndex,
) -> Result<(), WorkloadError> {
    let timeout = driver.command_timeout();
    if driver.is_gone() || slots.iter().flatten().any(|command| command.submitted.elapsed() > timeout) {
        return Err(driver.diagnose(queue.0).into());
    }
    Ok(())
}
