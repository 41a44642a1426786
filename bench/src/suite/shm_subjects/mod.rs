//! What `farbus bench shm` measures, for real: sessions over a pair of shared-memory fabrics, one side on each of two cores.
//!
//! `ShmSession::new()?.mmio_read(50_000)` starts a lender on the second core, reads a register of its device 50,000 times through the function
//! that a guest would see, and ends the lender again. The NVMe sides stay from round to round and sleep while it is not their turn.

mod nvme;
mod served;

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use farbus_pci_shim::{Function, IrqfdSink, RecorderSink};
use farbus_remote_dma::{BarAddress, Iova, Width};
use farbus_transport::shm::{ShmFabric, ShmOptions};
use farbus_transport::{Memory, Nanos};

use self::nvme::NvmeSide;
use super::engine::{self, Engine, Job, register};
use super::link::{self, Lender};
use super::shm::{Direction, OperationCounts, ShmSubjects, Side};
use crate::function::FunctionRegisters;
use crate::measure::{Latencies, Stopwatch, Wake, eventfd_sleeper, pin_to, two_cores};
use crate::workload::{Budget, Case, CaseRun};

/// Where the device finds the guest's memory; above 4 GiB, so that nothing works by having 32 bits only.
const BASE: Iova = Iova(0x1_0000_0000);
/// How long a side polls that is alone while it is measured: for ever.
const ALWAYS: Duration = Duration::from_secs(3600);

/// The subjects over shared memory.
#[derive(Debug)]
pub struct ShmSession {
    /// Where the caller runs: the guest's and the borrower's side.
    here: usize,
    /// Where the device runs: the lender's side, or the native device's thread.
    there: usize,
    native: Option<NvmeSide>,
    inline: Option<NvmeSide>,
    remote: Option<NvmeSide>,
}

impl ShmSession {
    /// Ready to measure between the first two cores that this thread may use.
    ///
    /// # Errors
    /// Where there is only one.
    pub fn new() -> Result<Self> {
        let [here, there] = two_cores()?;
        Ok(Self { here, there, native: None, inline: None, remote: None })
    }

    fn engine<S: farbus_pci_shim::IrqSink>(&self, sink: S, guest_bytes: u64, buffer_bytes: u64) -> Result<Bench<S>> {
        let (engine, orders) = Engine::new(buffer_bytes)?;
        let (lender, session) = Lender::start(ends()?, Box::new(engine), self.there, ALWAYS)?;
        let guest = link::filled("bench-guest", guest_bytes)?;
        let registers = FunctionRegisters::open(Box::new(session), sink, &guest, BASE)?;
        Ok(Bench { registers, orders, _lender: lender })
    }

    fn side(&mut self, side: Side) -> Result<&mut NvmeSide> {
        let (here, there) = (self.here, self.there);
        let kept = match side {
            Side::Native => &mut self.native,
            Side::Inline => &mut self.inline,
            Side::Remote => &mut self.remote,
        };
        if kept.is_none() {
            *kept = Some(NvmeSide::start(side, here, there)?);
        }
        kept.as_mut().context("a side was just started")
    }
}

/// A function whose device is the [`Engine`] of a lender on the other core.
struct Bench<S: farbus_pci_shim::IrqSink> {
    registers: FunctionRegisters<S>,
    orders: engine::Orders,
    _lender: Lender,
}

impl<S: farbus_pci_shim::IrqSink> Bench<S> {
    fn function(&mut self) -> &mut Function<S> {
        self.registers.function_mut()
    }

    /// Has the device do `job` and waits for its end.
    fn carry_out(&mut self, job: Job) -> Result<engine::Done> {
        self.orders.give(job);
        self.function().bar_write(at(register::START), Width::B4, 1)?;
        // The device does the whole job inside the write, so the read behind it is answered when it is over.
        self.function().bar_read(at(register::VALUE), Width::B4)?;
        self.orders.take().context("the device did not do its job")?
    }
}

fn at(offset: u64) -> BarAddress {
    BarAddress { bar: 0, offset }
}

impl ShmSubjects for ShmSession {
    fn mmio_read(&mut self, samples: u64) -> Result<Latencies> {
        let mut bench = self.engine(RecorderSink::default(), 4096, 4096)?;
        let _pinned = pin_to(self.here)?;
        let watch = Stopwatch::calibrate();
        let mut latencies = Latencies::new();
        let warm_up = samples / 10 + 1;
        for round in 0..warm_up + samples {
            bench.function().bar_write(at(register::VALUE), Width::B4, round & 0xffff)?;
            // The write has been taken when the read begins, as when a driver reads a status now and then.
            pause();
            let start = Instant::now();
            let value = bench.function().bar_read(at(register::VALUE), Width::B4)?;
            let ns = watch.since(start);
            anyhow::ensure!(value == round & 0xffff, "a register read answered {value} where {} was written", round & 0xffff);
            if round >= warm_up {
                latencies.record_ns(ns);
            }
        }
        Ok(latencies)
    }

    fn mmio_write(&mut self, samples: u64) -> Result<Latencies> {
        let mut bench = self.engine(RecorderSink::default(), 4096, 4096)?;
        let _pinned = pin_to(self.here)?;
        let watch = Stopwatch::calibrate();
        let mut latencies = Latencies::new();
        let warm_up = samples / 10 + 1;
        for round in 0..warm_up + samples {
            let start = Instant::now();
            bench.function().bar_write(at(register::VALUE), Width::B4, round)?;
            let ns = watch.since(start);
            if round >= warm_up {
                latencies.record_ns(ns);
            }
            pause();
        }
        let last = bench.function().bar_read(at(register::VALUE), Width::B4)?;
        anyhow::ensure!(last == (warm_up + samples - 1) & 0xffff_ffff, "the last write was lost");
        Ok(latencies)
    }

    fn dma(&mut self, direction: Direction, bytes: u64, samples: u64) -> Result<Latencies> {
        let mut bench = self.engine(RecorderSink::default(), bytes, bytes)?;
        let _pinned = pin_to(self.here)?;
        match bench.carry_out(Job::Hot { direction, iova: BASE, bytes, samples })? {
            engine::Done::Latencies(latencies) => Ok(latencies),
            engine::Done::Rate(_) => anyhow::bail!("the device measured something else"),
        }
    }

    fn dma_stream(&mut self, direction: Direction, piece: u64, working_set: u64, total: u64) -> Result<f64> {
        let mut bench = self.engine(RecorderSink::default(), working_set, working_set)?;
        let _pinned = pin_to(self.here)?;
        match bench.carry_out(Job::Stream { direction, iova: BASE, piece, working_set, total })? {
            engine::Done::Rate(bytes_per_second) => Ok(bytes_per_second),
            engine::Done::Latencies(_) => anyhow::bail!("the device measured something else"),
        }
    }

    fn interrupt(&mut self, samples: u64) -> Result<Latencies> {
        let sink = IrqfdSink::new(1, |_| ())?;
        let event = sink.vector_fd(0).context("a sink without its vector")?.try_clone_to_owned()?;
        // The sleeper blocks in its read, as the reference's does.
        rustix::fs::fcntl_setfl(&event, rustix::fs::OFlags::empty())?;
        let mut bench = self.engine(sink, 4096, 4096)?;
        bench.registers.enable_msix(1)?;
        let raised = bench.orders.raised();
        let _pinned = pin_to(self.here)?;
        let there = self.there;
        let latencies = eventfd_sleeper(&event, there, samples, &raised, |wake| -> Result<()> {
            match wake {
                Wake::Now => bench.function().bar_write(at(register::RAISE), Width::B4, 0)?,
                Wake::Idle => {
                    bench.function().poll(Nanos::now());
                }
            }
            Ok(())
        })?;
        Ok(latencies)
    }

    fn nvme(&mut self, side: Side, case: Case, budget: Budget) -> Result<CaseRun> {
        let here = self.here;
        self.side(side)?.run(here, case, budget)
    }

    fn region_read(&mut self, samples: u64) -> Result<Latencies> {
        self.end_nvme();
        served::region_read(self.here, self.there, samples)
    }

    fn data_path(&mut self, operations: u64) -> Result<OperationCounts> {
        self.end_nvme();
        nvme::count_operations(self.here, self.there, operations)
    }
}

impl ShmSession {
    /// Nothing of the NVMe sides may disturb what comes after them.
    fn end_nvme(&mut self) {
        (self.native, self.inline, self.remote) = (None, None, None);
    }
}

/// Long enough for the other core to have taken a message: about half a microsecond.
fn pause() {
    for _ in 0..32 {
        std::hint::spin_loop();
    }
}

/// Both ends of a link.
fn ends() -> Result<(ShmFabric, ShmFabric)> {
    Ok(ShmFabric::pair(ShmOptions::default())?)
}

/// The memory of a driver: queues, and buffers for every case.
fn driver_memory() -> Result<std::sync::Arc<Memory>> {
    const DRIVER_BYTES: u64 = 16 << 20;
    link::filled("bench-driver", DRIVER_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suite::shm::{Effort, run};

    #[test]
    fn every_row_is_measured_by_real_sessions_and_the_data_path_takes_no_lock() {
        let effort = Effort { rounds: 5, samples: 300, stream_bytes: 64 << 20, nvme: Duration::from_millis(5), operations: 2000 };
        let mut subjects = match ShmSession::new() {
            Ok(subjects) => subjects,
            Err(error) => return eprintln!("not run: {error}"),
        };
        let report = run(&mut subjects, &effort, |_| ());
        for row in &report.rows {
            assert!(row.value.is_some(), "{row:?}");
        }
        let locks = report.rows.iter().find(|row| row.case == "locks").and_then(|row| row.value);
        assert_eq!(locks, Some(0.0));
    }
}
