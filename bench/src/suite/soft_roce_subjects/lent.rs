//! A device that is lent over queue pairs, with both sides' counters in sight: what an operation of a guest costs in work requests.
//!
//! `LentRegister::start(&choice, there)?` has a register on core `there`; `count_reads(1000)` reads it 1,000 times and answers that the borrower and the lender
//! posted 1,000 work requests each, with 1,000 doorbells each.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use farbus_pci_shim::{Function, RecorderSink};
use farbus_remote_dma::model::nvme::{Nvme, NvmeOptions};
use farbus_remote_dma::{Backend, BarAddress, Iova, Width};
use farbus_transport::verbs::{Counters, DeviceChoice, VerbsFabric, Watch};
use farbus_transport::{Memory, Nanos};

use crate::driver::{DmaBuffer, DmaMemory, Driver, DriverOptions, Io, QueueIndex};
use crate::function::FunctionRegisters;
use crate::measure::{Latencies, Stopwatch};
use crate::suite::engine::{Engine, register};
use crate::suite::link::{Lender, Turns, filled};

/// Where the device finds the guest's memory; above 4 GiB, so that nothing works by having 32 bits only.
pub(super) const BASE: Iova = Iova(0x1_0000_0000);
/// Bytes of the lent image of [`LentNvme`].
const IMAGE_BYTES: u64 = 1 << 20;
/// Bytes of a read of it.
const READ_BYTES: u64 = 4096;
/// Bytes of the guest's memory.
const GUEST_BYTES: u64 = 4 << 20;
/// After so long without a change both sides have come to rest; shorter than the time after which a side asks whether its peer is there.
const QUIET: Duration = Duration::from_millis(20);
/// Posted writes between two reads that wait for them: fewer than the peer has slots for.
pub(super) const WRITES_PER_READ: u64 = 32;

/// What both sides did in some operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Operations.
    pub operations: u64,
    /// The borrower's end.
    pub borrower: Counters,
    /// The lender's end.
    pub lender: Counters,
}

impl Traffic {
    /// A figure of the borrower's end, for one operation.
    pub fn of_borrower(&self, figure: impl Fn(&Counters) -> u64) -> f64 {
        figure(&self.borrower) as f64 / self.operations as f64
    }

    /// A figure of the lender's end, for one operation.
    pub fn of_lender(&self, figure: impl Fn(&Counters) -> u64) -> f64 {
        figure(&self.lender) as f64 / self.operations as f64
    }

    /// Both sides' sum of a figure, for one operation.
    pub fn of_both(&self, figure: impl Fn(&Counters) -> u64) -> f64 {
        self.of_borrower(&figure) + self.of_lender(&figure)
    }
}

/// Both sides' counters.
#[derive(Clone, Debug)]
struct Watches {
    borrower: Watch,
    lender: Watch,
}

impl Watches {
    fn link(choice: &DeviceChoice) -> Result<((VerbsFabric, VerbsFabric), Self)> {
        let (lender, borrower) = VerbsFabric::pair(choice)?;
        let watches = Self { borrower: borrower.watch(), lender: lender.watch() };
        Ok(((lender, borrower), watches))
    }

    /// Both sides', once nothing is under way: what is polled by nobody is not counted yet.
    fn settled(&self, function: &mut Function<RecorderSink>) -> [Counters; 2] {
        let read = || [self.borrower.counters(), self.lender.counters()];
        let (mut seen, mut quiet_since) = (read(), Instant::now());
        while quiet_since.elapsed() < QUIET {
            function.poll(Nanos::now());
            let now = read();
            if now != seen {
                (seen, quiet_since) = (now, Instant::now());
            }
        }
        seen
    }
}

/// What happened between two looks.
fn traffic(operations: u64, before: [Counters; 2], after: [Counters; 2]) -> Traffic {
    Traffic { operations, borrower: after[0].since(before[0]), lender: after[1].since(before[1]) }
}

pub(super) fn at(offset: u64) -> BarAddress {
    BarAddress { bar: 0, offset }
}

/// A device with a register, lent.
pub struct LentRegister {
    registers: FunctionRegisters<RecorderSink>,
    watches: Watches,
    turns: Turns,
    /// After `turns`, without which it ends.
    _lender: Lender,
}

impl LentRegister {
    /// Lends it over `choice`, with its device on core `there`.
    ///
    /// # Errors
    /// Where there is no link over `choice`.
    pub fn start(choice: &DeviceChoice, there: usize) -> Result<Self> {
        let (engine, _) = Engine::new(4096)?;
        let (ends, watches) = Watches::link(choice)?;
        let (lender, turns, session) = Lender::in_turns(ends, Box::new(engine), there)?;
        let turn = turns.begin()?;
        let registers = FunctionRegisters::open(Box::new(session), RecorderSink::default(), &filled("bench-guest", 4096)?, BASE)?;
        drop(turn);
        Ok(Self { registers, watches, turns, _lender: lender })
    }

    fn write(&mut self, value: u64) -> Result<()> {
        Ok(self.registers.function_mut().bar_write(at(register::VALUE), Width::B4, value)?)
    }

    /// As one of several, which `flush` sends.
    fn post(&mut self, value: u64) -> Result<()> {
        Ok(self.registers.function_mut().post_write(at(register::VALUE), Width::B4, value)?)
    }

    fn read(&mut self, wanted: u64) -> Result<()> {
        let value = self.registers.function_mut().bar_read(at(register::VALUE), Width::B4)?;
        ensure!(value == wanted, "a register read answered {value} where {wanted} was written");
        Ok(())
    }

    /// Register reads, one after the other: from the call until the value is there.
    ///
    /// # Errors
    /// Where one does not answer what was written.
    pub fn mmio_read(&mut self, samples: u64) -> Result<Latencies> {
        let _turn = self.turns.begin()?;
        self.write(7)?;
        let watch = Stopwatch::calibrate();
        let mut latencies = Latencies::new();
        let warm_up = samples / 10 + 1;
        for round in 0..warm_up + samples {
            let start = Instant::now();
            self.read(7)?;
            let ns = watch.since(start);
            if round >= warm_up {
                latencies.record_ns(ns);
            }
        }
        Ok(latencies)
    }

    /// Register writes of the thread that owns the function, alone and in bursts of `burst`: what it waits for one.
    ///
    /// # Errors
    /// Where the last one of a burst is lost.
    pub fn mmio_write(&mut self, samples: u64, burst: u64) -> Result<[Latencies; 2]> {
        let _turn = self.turns.begin()?;
        let watch = Stopwatch::calibrate();
        let (mut alone, mut in_bursts) = (Latencies::new(), Latencies::new());
        for round in 0..samples {
            let start = Instant::now();
            self.write(round & 0xffff)?;
            alone.record_ns(watch.since(start));
            if round % WRITES_PER_READ == WRITES_PER_READ - 1 {
                self.read(round & 0xffff)?;
            }
        }
        self.read((samples - 1) & 0xffff)?;
        for round in 0..samples.div_ceil(burst) {
            let first = round * burst;
            let start = Instant::now();
            (first..first + burst).try_for_each(|value| self.post(value & 0xffff))?;
            self.registers.function_mut().flush();
            in_bursts.record_ns(watch.since(start) / burst);
            self.read((first + burst - 1) & 0xffff)?;
        }
        Ok([alone, in_bursts])
    }

    /// What `operations` register reads cost.
    ///
    /// # Errors
    /// Where one does not answer what was written.
    pub fn count_reads(&mut self, operations: u64) -> Result<Traffic> {
        let _turn = self.turns.begin()?;
        self.write(7)?;
        let before = self.settled();
        (0..operations).try_for_each(|_| self.read(7))?;
        Ok(traffic(operations, before, self.settled()))
    }

    /// What `bursts` bursts of `writes` posted register writes each cost, until the lender has taken them; without the reads that look whether it has.
    ///
    /// # Errors
    /// Where the last write of a burst is lost.
    pub fn count_bursts(&mut self, bursts: u64, writes: u64) -> Result<Traffic> {
        let _turn = self.turns.begin()?;
        let mut sum = Traffic { operations: bursts, ..Traffic::default() };
        for burst in 0..bursts {
            let first = burst * writes;
            let before = self.settled();
            (first..first + writes).try_for_each(|value| self.post(value & 0xffff))?;
            self.registers.function_mut().flush();
            let one = traffic(1, before, self.settled());
            sum.borrower = sum.borrower + one.borrower;
            sum.lender = sum.lender + one.lender;
            self.read((first + writes - 1) & 0xffff)?;
        }
        Ok(sum)
    }

    fn settled(&mut self) -> [Counters; 2] {
        self.watches.settled(self.registers.function_mut())
    }
}

/// An NVMe controller over an image in memory, lent, with the built-in driver and interrupts.
pub struct LentNvme {
    driver: Driver<FunctionRegisters<RecorderSink>>,
    image: Arc<Memory>,
    watches: Watches,
    turns: Turns,
    /// After `turns`, without which it ends.
    _lender: Lender,
}

impl LentNvme {
    /// Lends it over `choice`, with its device on core `there`.
    ///
    /// # Errors
    /// Where there is no link over `choice`, or the driver does not find its device.
    pub fn start(choice: &DeviceChoice, there: usize) -> Result<Self> {
        const VECTORS: u16 = 2;
        let image = filled("bench-image", IMAGE_BYTES)?;
        let device: Box<dyn Backend> = Box::new(Nvme::in_memory(Arc::clone(&image), NvmeOptions::default())?);
        let (ends, watches) = Watches::link(choice)?;
        let (lender, turns, session) = Lender::in_turns(ends, device, there)?;
        let turn = turns.begin()?;
        let guest = filled("bench-guest", GUEST_BYTES)?;
        let mut registers = FunctionRegisters::open(Box::new(session), RecorderSink::default(), &guest, BASE)?;
        registers.enable_msix(VECTORS)?;
        let options = DriverOptions { vectors: vec![1], ..DriverOptions::default() };
        let driver = Driver::start(registers, DmaMemory::new(guest, BASE), options)?;
        drop(turn);
        Ok(Self { driver, image, watches, turns, _lender: lender })
    }

    /// What `operations` reads of 4 KiB add to a series of such, one in flight at a time, each with its interrupt. The last of a series costs more: its
    /// completion queue's head has no command to go with.
    ///
    /// # Errors
    /// Where a read fails or brings wrong bytes.
    pub fn count_reads(&mut self, operations: u64) -> Result<Traffic> {
        let _turn = self.turns.begin()?;
        let buffer = self.driver.allocate(READ_BYTES)?;
        let alone = self.series(1, &buffer)?;
        let series = self.series(1 + operations, &buffer)?;
        Ok(Traffic { operations, borrower: series[0].since(alone[0]), lender: series[1].since(alone[1]) })
    }

    fn series(&mut self, reads: u64, buffer: &DmaBuffer) -> Result<[Counters; 2]> {
        let blocks_per_read = READ_BYTES / self.driver.namespace().block_bytes;
        let (mut found, mut wanted) = ([0; READ_BYTES as usize], [0; READ_BYTES as usize]);
        let places = IMAGE_BYTES / READ_BYTES;
        let before = self.settled();
        for read in 0..reads {
            let place = read * 37 % places;
            self.driver.execute(QueueIndex(1), &Io::Read { block: place * blocks_per_read, into: buffer })?;
            buffer.read(0, &mut found)?;
            self.image.read(place * READ_BYTES, &mut wanted)?;
            ensure!(found == wanted, "wrong bytes at {}", place * READ_BYTES);
        }
        let Traffic { borrower, lender, .. } = traffic(reads, before, self.settled());
        Ok([borrower, lender])
    }

    fn settled(&mut self) -> [Counters; 2] {
        self.watches.settled(self.driver.registers_mut().function_mut())
    }
}

/// What a link with both its sides in this process has pinned beyond the guest's memory, with `guest` bytes of it mapped for a device without DMA memory
/// of its own.
///
/// # Errors
/// Where there is no link over `choice`, or the kernel does not say.
pub fn pinned_by_a_link(choice: &DeviceChoice, there: usize, guest: u64) -> Result<u64> {
    let before = pinned_bytes()?;
    let (engine, _) = Engine::new(4096)?;
    let (ends, _) = Watches::link(choice)?;
    let (_lender, turns, session) = Lender::in_turns(ends, Box::new(engine), there)?;
    let _turn = turns.begin()?;
    let _registers = FunctionRegisters::open(Box::new(session), RecorderSink::default(), &filled("bench-guest", guest)?, BASE)?;
    let with_guest = pinned_bytes()? - before;
    ensure!(with_guest >= guest, "{with_guest} bytes are pinned with a guest of {guest}: the kernel counts them elsewhere");
    Ok(with_guest - guest)
}

/// Bytes that this process has pinned, its own and the kernel's for its devices (proc_pid_status(5)).
fn pinned_bytes() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmPin:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    Ok(kib.ok_or_else(|| anyhow::anyhow!("no VmPin in /proc/self/status"))? * 1024)
}
