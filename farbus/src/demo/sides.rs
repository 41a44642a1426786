//! The two sides of a comparison: the same driver and the same cases over a device in this process and over a borrowed one.
//!
//! The native device has a thread of its own, as hardware has; the remote one is a `farbus lend` process. Everything else is equal: both
//! devices have the second core, one at a time, and the driver has the first.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use farbus_bench::driver::{DmaMemory, Driver, DriverOptions, QueueIndex};
use farbus_bench::function::FunctionRegisters;
use farbus_bench::measure::{Pinned, pin_to, two_cores};
use farbus_bench::workload::{Budget, Case, CaseRun, Contents, Progress, Verified, Workload};
use farbus_pci_shim::RecorderSink;
use farbus_remote_dma::borrower::BorrowerOptions;
use farbus_remote_dma::lender::PollOptions;
use farbus_remote_dma::model::nvme::{Nvme, NvmeOptions};
use farbus_remote_dma::native::Native;
use farbus_remote_dma::{Attachment, Claim, Iova};
use farbus_transport::Memory;

use super::far_side::FarSide;
use crate::attach::attach;

/// Bytes of the driver's memory: queues, and buffers for every case.
const DRIVER_BYTES: u64 = 16 << 20;
/// Where the device finds them; above 4 GiB, so that nothing works by having 32 bits only.
const DRIVER_BASE: Iova = Iova(0x1_0000_0000);
const QUEUE: QueueIndex = QueueIndex(1);

/// How long a side polls before it sleeps: longer than its pauses while it is measured, so that it never does then; short, so that it soon
/// leaves its core to the other side.
const SPIN: Duration = Duration::from_millis(2);
/// Before a round counts: as long as it takes until caches and clocks are as they stay.
const WARM_UP: Budget = Budget::Time(Duration::from_millis(20));

/// Where things run; on a machine with one core, wherever the kernel puts them.
#[derive(Clone, Copy, Debug)]
pub struct Cores(Option<[usize; 2]>);

impl Cores {
    /// The first two.
    pub fn new() -> Self {
        Self(two_cores().inspect_err(|error| tracing::warn!(%error, "the two sides of each link share a core")).ok())
    }

    /// Keeps the calling thread where the driver runs.
    pub fn drive(self) -> anyhow::Result<Option<Pinned>> {
        Ok(self.0.map(|[here, _]| pin_to(here)).transpose()?)
    }

    /// The core of the devices.
    pub fn device(self) -> Option<usize> {
        self.0.map(|[_, there]| there)
    }
}

/// A driver, its cases, and what must be on its device.
pub struct DriverSide {
    driver: Driver<FunctionRegisters<RecorderSink>>,
    workload: Workload,
}

/// The device that is lent at `far`.
pub fn remote(far: &FarSide, original: &Path) -> anyhow::Result<DriverSide> {
    let options = BorrowerOptions { spin: SPIN, ..BorrowerOptions::default() };
    let session = attach(&far.address, &far.security, &far.peer, options, &Claim::default(), None)?;
    DriverSide::new(session, original).context("the borrowed device")
}

/// A device of this process over `image`.
pub fn native(image: &Path, original: &Path, cores: Cores) -> anyhow::Result<DriverSide> {
    let nvme = Nvme::open(image, NvmeOptions::default())?;
    let native = {
        // A thread begins on the cores of the one that starts it. The workers of an image on a disk are there already, on any core.
        let _pinned = cores.device().map(pin_to).transpose()?;
        Native::threaded(Box::new(nvme), PollOptions { spin: SPIN })?
    };
    DriverSide::new(Box::new(native), original).context("the native device")
}

impl DriverSide {
    fn new(attachment: Box<dyn Attachment>, original: &Path) -> anyhow::Result<Self> {
        let memory = Memory::memfd("farbus-driver", DRIVER_BYTES)?;
        let registers = FunctionRegisters::open(attachment, RecorderSink::default(), &memory, DRIVER_BASE)?;
        let mut driver = Driver::start(registers, DmaMemory::new(memory, DRIVER_BASE), DriverOptions::default())?;
        let original = File::open(original).with_context(|| format!("cannot read {}", original.display()))?;
        let contents = Contents::new(original, u64::from(std::process::id()))?;
        let workload = Workload::new(&mut driver, QUEUE, contents, 1)?;
        Ok(Self { driver, workload })
    }

    /// Runs a case once, when the other side has fallen asleep.
    pub fn run(&mut self, case: Case, budget: Budget) -> anyhow::Result<CaseRun> {
        std::thread::sleep(2 * SPIN);
        self.workload.run(&mut self.driver, case, WARM_UP)?;
        Ok(self.workload.run(&mut self.driver, case, budget)?)
    }

    /// Compares every block with what must be there.
    pub fn verify(&mut self, progress: impl FnMut(Progress)) -> anyhow::Result<Verified> {
        Ok(self.workload.verify(&mut self.driver, progress)?)
    }

    /// Takes the controller down in order.
    pub fn shut_down(self) -> anyhow::Result<()> {
        self.driver.shutdown()?;
        Ok(())
    }
}
