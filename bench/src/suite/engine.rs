//! The device of the suites' register, DMA and interrupt rows: a register, and a DMA engine that times itself.
//!
//! A write to `START` makes it copy 4 KiB between its buffer and iova 0x1_0000_0000 as often as its order says, look at the clock before and
//! after every 32 copies, and leave the distribution where the order came from.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use farbus_remote_dma::{
    Activity, AttachError, Backend, BarAddress, BarDescription, BarKind, Bus, DeviceDescription, DmaFault, DmaTag, InterruptMode,
    Iova, MsixLocation, Progress, ResetKind, Width,
};
use farbus_transport::{Access, LocalRegion, LocalSpan, Memory};

use super::link::filled;
use crate::measure::{COPIES_PER_LOOK, Latencies, Stopwatch, Wakes};
use crate::suite::shm::Direction;

/// Offsets in BAR 0.
pub(super) mod register {
    /// Reads as written.
    pub(crate) const VALUE: u64 = 0;
    /// Any write: do what was ordered.
    pub(crate) const START: u64 = 8;
    /// Any write: raise vector 0.
    pub(crate) const RAISE: u64 = 16;
}

/// What to do.
#[derive(Clone, Copy, Debug)]
pub(super) enum Job {
    /// `samples` looks at the clock, the same bytes each time.
    Hot { direction: Direction, iova: Iova, bytes: u64, samples: u64 },
    /// `total` bytes in pieces, one after the other through the working set.
    Stream { direction: Direction, iova: Iova, piece: u64, working_set: u64, total: u64 },
}

/// What came of it.
#[derive(Debug)]
pub(super) enum Done {
    /// Nanoseconds of one DMA.
    Latencies(Latencies),
    /// Bytes per second of the median piece.
    Rate(f64),
}

#[derive(Debug, Default)]
struct Desk {
    job: Option<Job>,
    done: Option<Result<Done>>,
}

/// Where jobs are given and results are fetched, beside the registers.
#[derive(Clone, Debug, Default)]
pub(super) struct Orders {
    desk: Arc<Mutex<Desk>>,
    raised: Wakes,
}

impl Orders {
    pub(super) fn give(&self, job: Job) {
        let mut desk = self.desk.lock().unwrap_or_else(PoisonError::into_inner);
        (desk.job, desk.done) = (Some(job), None);
    }

    pub(super) fn take(&self) -> Option<Result<Done>> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner).done.take()
    }

    /// When the device raised its interrupt.
    pub(super) fn raised(&self) -> Wakes {
        self.raised.clone()
    }
}

/// The device.
#[derive(Debug)]
pub(super) struct Engine {
    description: DeviceDescription,
    buffer: Arc<Memory>,
    region: Option<LocalRegion>,
    orders: Orders,
    value: u64,
}

impl Engine {
    pub(super) fn new(buffer_bytes: u64) -> Result<(Self, Orders)> {
        let bar = BarDescription { kind: BarKind::Memory32, size: 8192, prefetchable: false };
        let description = DeviceDescription {
            name: "bench engine".into(),
            vendor_id: 0x1234,
            device_id: 0x0b0b,
            subsystem_vendor_id: 0,
            subsystem_id: 0,
            revision: 0,
            class_code: 0xff_0000,
            bars: [Some(bar), None, None, None, None, None],
            pin: false,
            msi_vectors: 0,
            msix: Some(MsixLocation { vectors: 1, table_bar: 0, table_offset: 4096, pba_bar: 0, pba_offset: 4096 + 2048 }),
            dma_bits: 64,
            constants: Vec::new(),
            serial: String::new(),
        };
        let orders = Orders::default();
        let buffer = filled("bench-device", buffer_bytes)?;
        Ok((Self { description, buffer, region: None, orders: orders.clone(), value: 0 }, orders))
    }

    fn span(&self, offset: u64, bytes: u64, direction: Direction) -> Result<LocalSpan> {
        let access = if direction == Direction::Read { Access::WRITE } else { Access::READ };
        let region = self.region.ok_or_else(|| anyhow!("the device is not attached"))?;
        Ok(region.span(offset, u32::try_from(bytes)?, access)?)
    }

    fn carry_out(&self, job: Job, bus: &mut dyn Bus) -> Result<Done> {
        match job {
            Job::Hot { direction, iova, bytes, samples } => {
                let span = self.span(0, bytes, direction)?;
                let watch = Stopwatch::calibrate();
                let mut latencies = Latencies::new();
                for round in 0..samples + samples / 10 {
                    let start = Instant::now();
                    for _ in 0..COPIES_PER_LOOK {
                        transfer(bus, direction, iova, span)?;
                    }
                    let ns = watch.since(start) / COPIES_PER_LOOK;
                    if round >= samples / 10 {
                        latencies.record_ns(ns);
                    }
                }
                Ok(Done::Latencies(latencies))
            }
            Job::Stream { direction, iova, piece, working_set, total } => {
                let (pieces, copies) = ((working_set / piece).max(1), total.div_ceil(piece));
                let mut copy_piece = |copy: u64| -> Result<()> {
                    let offset = copy % pieces * piece;
                    transfer(bus, direction, Iova(iova.0 + offset), self.span(offset, piece, direction)?)
                };
                // Once through all of it: the lender's mapping of the guest gets its pages now, as the reference's has.
                (0..pieces).try_for_each(&mut copy_piece)?;
                let watch = Stopwatch::calibrate();
                let mut latencies = Latencies::new();
                for copy in 0..copies {
                    let start = Instant::now();
                    copy_piece(copy)?;
                    latencies.record_ns(watch.since(start));
                }
                Ok(Done::Rate(latencies.rate(piece)))
            }
        }
    }
}

#[inline]
fn transfer(bus: &mut dyn Bus, direction: Direction, iova: Iova, span: LocalSpan) -> Result<()> {
    let progress = match direction {
        Direction::Read => bus.dma_read(DmaTag(0), iova, span)?,
        Direction::Write => bus.dma_write(DmaTag(0), iova, span)?,
    };
    if progress == Progress::Pending {
        bail!("a dma over shared memory did not end at once");
    }
    Ok(())
}

impl Backend for Engine {
    fn description(&self) -> &DeviceDescription {
        &self.description
    }

    fn attach(&mut self, bus: &mut dyn Bus) -> Result<(), AttachError> {
        self.region = Some(bus.register(Arc::clone(&self.buffer), Access::READ_WRITE)?);
        Ok(())
    }

    fn detach(&mut self) {
        self.region = None;
    }

    fn bar_read(&mut self, at: BarAddress, _: Width, _: &mut dyn Bus) -> u64 {
        if at.offset == register::VALUE { self.value } else { 0 }
    }

    fn bar_write(&mut self, at: BarAddress, _: Width, value: u64, bus: &mut dyn Bus) {
        match at.offset {
            register::VALUE => self.value = value,
            register::START => {
                let job = self.orders.desk.lock().unwrap_or_else(PoisonError::into_inner).job.take();
                let Some(job) = job else { return };
                let done = self.carry_out(job, bus);
                self.orders.desk.lock().unwrap_or_else(PoisonError::into_inner).done = Some(done);
            }
            register::RAISE => {
                self.orders.raised.now();
                bus.interrupt(0);
            }
            _ => {}
        }
    }

    fn dma_done(&mut self, _: DmaTag, _: Result<(), DmaFault>, _: &mut dyn Bus) {}

    fn poll(&mut self, _: &mut dyn Bus) -> Activity {
        Activity::Idle(None)
    }

    fn arm(&mut self) -> bool {
        true
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn set_interrupt_mode(&mut self, _: InterruptMode, _: &mut dyn Bus) {}

    fn fence(&mut self) {}

    fn in_flight(&self) -> usize {
        0
    }

    fn reset(&mut self, _: ResetKind, _: &mut dyn Bus) {
        self.value = 0;
    }
}
