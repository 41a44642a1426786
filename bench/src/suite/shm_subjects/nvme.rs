//! The NVMe rows: the built-in driver over an image in memory, natively and across shared memory, and what an operation asks of the host.
//!
//! The native device has a thread of its own on the lender's core, because hardware runs beside the CPU; `Side::Inline` is the same device
//! inside the doorbell write, with neither a second core nor a link.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use farbus_pci_shim::RecorderSink;
use farbus_remote_dma::Attachment;
use farbus_remote_dma::lender::PollOptions;
use farbus_remote_dma::model::nvme::{Nvme, NvmeOptions};
use farbus_remote_dma::native::Native;
use farbus_remote_dma::wait::Waker;
use farbus_transport::Memory;
use rand::{RngCore, SeedableRng};

use super::{ALWAYS, BASE, driver_memory, ends};
use crate::driver::{DmaMemory, Driver, DriverOptions, QueueIndex};
use crate::function::FunctionRegisters;
use crate::measure::{Latencies, SyscallCounts, allocations_here, count_syscalls, pin_to};
use crate::suite::link::Lender;
use crate::suite::shm::{OperationCounts, Side};
use crate::workload::{Budget, Case, CaseRun, Contents, Workload};

/// Bytes of the image: more than any cache.
const IMAGE_BYTES: u64 = 64 << 20;
/// Longer than any pause of a side that is measured, so that it never sleeps then; short, so that the other soon does.
const SPIN: Duration = Duration::from_millis(2);
/// Before a round counts: as long as it takes until caches and clocks are as they stay.
const WARM_UP: Budget = Budget::Time(Duration::from_millis(20));
const QUEUE: QueueIndex = QueueIndex(1);

/// A driver with its device.
pub(super) struct NvmeSide {
    driver: Driver<FunctionRegisters<RecorderSink>>,
    workload: Workload,
    _lender: Option<Lender>,
}

impl std::fmt::Debug for NvmeSide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NvmeSide").finish_non_exhaustive()
    }
}

impl NvmeSide {
    /// Starts `side` and compares every block that its device answers with the image.
    pub(super) fn start(side: Side, here: usize, there: usize) -> Result<Self> {
        let (nvme, original) = device()?;
        let (attachment, lender): (Box<dyn Attachment>, _) = match side {
            Side::Inline => (Box::new(Native::inline(Box::new(nvme))?), None),
            Side::Native => {
                // A thread begins on the cores of the one that starts it.
                let _pinned = pin_to(there)?;
                (Box::new(Native::threaded(Box::new(nvme), PollOptions { spin: SPIN })?), None)
            }
            Side::Remote => {
                let (lender, session) = Lender::start(ends()?, Box::new(nvme), there, SPIN)?;
                (Box::new(session), Some(lender))
            }
        };
        let _pinned = pin_to(here)?;
        Self::over(attachment, original, lender)
    }

    fn over(attachment: Box<dyn Attachment>, original: File, lender: Option<Lender>) -> Result<Self> {
        let memory = driver_memory()?;
        let registers = FunctionRegisters::open(attachment, RecorderSink::default(), &memory, BASE)?;
        let mut driver = Driver::start(registers, DmaMemory::new(memory, BASE), DriverOptions::default())?;
        let mut workload = Workload::new(&mut driver, QUEUE, Contents::new(original, 1)?, 1)?;
        workload.verify(&mut driver, |_| ())?;
        Ok(Self { driver, workload, _lender: lender })
    }

    /// One round on core `here`.
    pub(super) fn run(&mut self, here: usize, case: Case, budget: Budget) -> Result<CaseRun> {
        let _pinned = pin_to(here)?;
        // The side that went before falls asleep meanwhile.
        std::thread::sleep(2 * SPIN);
        self.workload.run(&mut self.driver, case, WARM_UP)?;
        Ok(self.workload.run(&mut self.driver, case, budget)?)
    }
}

/// A controller over an image in memory, and the image's bytes as a file of their own.
fn device() -> Result<(Nvme, File)> {
    let (image, original) = (Memory::memfd("bench-image", IMAGE_BYTES)?, Memory::memfd("bench-original", IMAGE_BYTES)?);
    let mut random = rand::rngs::SmallRng::seed_from_u64(7);
    let mut piece = vec![0; 1 << 20];
    for at in (0..IMAGE_BYTES).step_by(piece.len()) {
        random.fill_bytes(&mut piece);
        image.write(at, &piece)?;
        original.write(at, &piece)?;
    }
    let (fd, _) = original.file().context("memory without its descriptor")?;
    Ok((Nvme::in_memory(image, NvmeOptions::default())?, File::from(fd.try_clone_to_owned()?)))
}

/// What the lender's thread did while the operations ran.
type Counted = std::sync::mpsc::Receiver<(u64, SyscallCounts)>;

/// `operations` remote reads of 4 KiB at queue depth 1, with both threads' allocations and system calls counted.
pub(super) fn count_operations(here: usize, there: usize, operations: u64) -> Result<OperationCounts> {
    let case = Case::named("randread-4k-qd1").context("the case is gone")?;
    let (nvme, original) = device()?;
    let (warm, over, counting) = (Waker::new()?, Waker::new()?, Arc::new(AtomicBool::new(false)));
    let (counted, theirs): (_, Counted) = std::sync::mpsc::channel();
    let (lender, session) = {
        let (warm, over, counting) = (warm.clone(), over.clone(), Arc::clone(&counting));
        Lender::serve(ends()?, Box::new(nvme), there, move |session, stop| {
            session.run(PollOptions { spin: ALWAYS }, &warm);
            // The very loop that a lender runs, from the first counted operation to the last.
            let (allocations, calls) = count_syscalls(|| {
                let before = allocations_here();
                counting.store(true, Ordering::Release);
                session.run(PollOptions { spin: ALWAYS }, &over);
                allocations_here() - before
            })?;
            counted.send((allocations, calls))?;
            session.run(PollOptions { spin: ALWAYS }, stop);
            Ok(())
        })?
    };
    // A lender that fails before it counts must not be waited for; one that ends is noticed by the driver's deadline.
    let _ended = (Ender(warm.clone()), Ender(over.clone()));
    let _pinned = pin_to(here)?;
    let mut side = NvmeSide::over(Box::new(session), original, None)?;
    side.workload.run(&mut side.driver, case, WARM_UP)?;
    warm.set();
    let started = std::time::Instant::now();
    while !counting.load(Ordering::Acquire) {
        if started.elapsed() > Duration::from_secs(10) {
            drop((warm, over));
            return Err(lender.end().err().unwrap_or_else(|| anyhow!("the lender does not count")));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut latencies = Latencies::new();
    let before = allocations_here();
    let (ran, calls) =
        count_syscalls(|| side.workload.run_into(&mut side.driver, case, Budget::Commands(operations), &mut latencies))?;
    let allocations = allocations_here() - before;
    over.set();
    let (their_allocations, their_calls) = theirs.recv().context("the lender did not count")?;
    let (operations, _) = ran?;
    drop(side);
    lender.end()?;
    Ok(OperationCounts {
        operations,
        allocations: allocations + their_allocations,
        locks: calls.futex + their_calls.futex,
        syscalls: calls.total + their_calls.total,
    })
}

/// Sets a waker also where the caller returns early.
struct Ender(Waker);

impl Drop for Ender {
    fn drop(&mut self) {
        self.0.set();
    }
}
