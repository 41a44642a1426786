//! What `farbus bench soft-roce` measures, for real: ends and sessions over an RDMA device of this host, beside perftest over the same.
//!
//! `SoftRoce::new(&choice)?.read(4096, 2000)` makes a link and reads 4 KiB of the peer's memory 2,000 times. Each round has a link of its own, as
//! perftest has: where its queues happen to lie makes a tenth of a difference, and must not favour a side for all rounds.

mod connecting;
mod ends;
mod lent;
mod ported;

use anyhow::Result;
use farbus_transport::verbs::DeviceChoice;

use self::connecting::Visited;
use self::ends::Ends;
pub use self::lent::{LentNvme, LentRegister, Traffic, pinned_by_a_link};
use self::ported::PortedRegister;
use super::perftest::{Figures, Perftest, Test};
use super::shm::Direction;
use super::soft_roce::{BURST, PostedWrites, RoceSubjects};
use crate::measure::{Latencies, pin_to, two_cores};

/// The subjects over an RDMA device, and perftest.
pub struct SoftRoce {
    choice: DeviceChoice,
    perftest: Perftest,
    /// Where the caller runs: perftest's client, our end, the borrower.
    here: usize,
    /// Where the peer runs: perftest's server, the lender.
    there: usize,
}

impl SoftRoce {
    /// Ready to measure over the device that `choice` means, between the first two cores that this thread may use.
    ///
    /// # Errors
    /// Where there is no such device, perftest is not installed, or there is only one core.
    pub fn new(choice: &DeviceChoice) -> Result<Self> {
        let choice = choice.resolve()?;
        let [here, there] = two_cores()?;
        let perftest = Perftest::new(&choice, here, there)?;
        Ok(Self { choice, perftest, here, there })
    }

    fn ends(&self) -> Result<Ends> {
        Ends::new(&self.choice, self.there)
    }

    fn register(&self) -> Result<LentRegister> {
        LentRegister::start(&self.choice, self.there)
    }
}

impl RoceSubjects for SoftRoce {
    fn perftest(&mut self, test: Test, bytes: u64, iterations: u64) -> Result<Figures> {
        self.perftest.run(test, bytes, iterations)
    }

    fn notify(&mut self, samples: u64) -> Result<Latencies> {
        let mut ends = self.ends()?;
        let _pinned = pin_to(self.here)?;
        ends.notify(samples)
    }

    fn read(&mut self, bytes: u64, samples: u64) -> Result<Latencies> {
        let mut ends = self.ends()?;
        let _pinned = pin_to(self.here)?;
        ends.read(u32::try_from(bytes)?, samples)
    }

    fn stream(&mut self, direction: Direction, operations: u64) -> Result<f64> {
        let mut ends = self.ends()?;
        let _pinned = pin_to(self.here)?;
        ends.stream(direction, operations)
    }

    fn mmio_read(&mut self, samples: u64) -> Result<Latencies> {
        let mut register = self.register()?;
        let _pinned = pin_to(self.here)?;
        register.mmio_read(samples)
    }

    fn mmio_write(&mut self, samples: u64) -> Result<PostedWrites> {
        // Before this thread is pinned: the function's thread goes where there is room.
        let mut ported = PortedRegister::start(&self.choice, self.there)?;
        let _pinned = pin_to(self.here)?;
        let at_a_port = ported.mmio_write(samples)?;
        drop(ported);
        let [with_doorbell, in_bursts] = self.register()?.mmio_write(samples, BURST)?;
        Ok(PostedWrites { at_a_port, with_doorbell, in_bursts })
    }

    fn handshake(&mut self, samples: u64) -> Result<Latencies> {
        let visited = Visited::new(&self.choice, self.there)?;
        let _pinned = pin_to(self.here)?;
        visited.handshake(samples)
    }

    fn connect(&mut self, samples: u64) -> Result<Latencies> {
        let visited = Visited::new(&self.choice, self.there)?;
        let _pinned = pin_to(self.here)?;
        visited.connect(samples)
    }

    fn count_mmio_reads(&mut self, operations: u64) -> Result<Traffic> {
        self.register()?.count_reads(operations)
    }

    fn count_bursts(&mut self, bursts: u64) -> Result<Traffic> {
        self.register()?.count_bursts(bursts, BURST)
    }

    fn count_nvme_reads(&mut self, operations: u64) -> Result<Traffic> {
        LentNvme::start(&self.choice, self.there)?.count_reads(operations)
    }

    fn pinned(&mut self) -> Result<u64> {
        pinned_by_a_link(&self.choice, self.there, 64 << 20)
    }
}
