//! The two sides of a comparison: the same driver and the same cases over a device in this process and over a borrowed one.
//!
//! The native device has a thread of its own, as hardware has; the remote one is a `farbus lend` process. Everything else is equal.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use farbus_bench::driver::{DmaMemory, Driver, DriverOptions, QueueIndex};
use farbus_bench::function::FunctionRegisters;
use farbus_bench::workload::{Budget, Case, CaseRun, Contents, Progress, Verified, Workload};
use farbus_pci_shim::RecorderSink;
use farbus_remote_dma::borrower::BorrowerOptions;
use farbus_remote_dma::lender::PollOptions;
use farbus_remote_dma::model::nvme::{Nvme, NvmeOptions};
use farbus_remote_dma::native::Native;
use farbus_remote_dma::{Attachment, Iova};
use farbus_transport::Memory;

use crate::borrow::attach;
use crate::link_address::LinkAddress;

/// Bytes of the driver's memory: queues, and buffers for every case.
const DRIVER_BYTES: u64 = 16 << 20;
/// Where the device finds them; above 4 GiB, so that nothing works by having 32 bits only.
const DRIVER_BASE: Iova = Iova(0x1_0000_0000);
const QUEUE: QueueIndex = QueueIndex(1);

/// A driver, its cases, and what must be on its device.
pub struct DriverSide {
    driver: Driver<FunctionRegisters<RecorderSink>>,
    workload: Workload,
}

/// The device at `from`.
pub fn remote(from: &LinkAddress, original: &Path) -> anyhow::Result<DriverSide> {
    // As long as the lender's: a reader that waits does not sleep while it is measured.
    let options = BorrowerOptions { spin: Duration::from_millis(5), ..BorrowerOptions::default() };
    DriverSide::new(Box::new(attach(from, options)?), original).context("the borrowed device")
}

/// A device of this process over `image`.
pub fn native(image: &Path, original: &Path) -> anyhow::Result<DriverSide> {
    let nvme = Nvme::open(image, NvmeOptions::default())?;
    let native = Native::threaded(Box::new(nvme), PollOptions { spin: Duration::from_millis(5) })?;
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

    /// Runs a case once.
    pub fn run(&mut self, case: Case, budget: Budget) -> anyhow::Result<CaseRun> {
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
