//! A lent register behind a vCPU's port: the function has a thread of its own, as in a VMM with several vCPUs.
//!
//! `PortedRegister::start(&choice, there)?.mmio_write(2000)` stores 2,000 values through the port and answers what the caller waited for each.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use farbus_pci_shim::{Embedded, FunctionThread, FunctionThreadOptions, RecorderSink, VcpuPort};
use farbus_remote_dma::guest_memory::SliceMemory;
use farbus_remote_dma::{GuestAddress, Width};
use farbus_transport::verbs::{DeviceChoice, VerbsFabric};

use super::lent::{BASE, WRITES_PER_READ, at};
use crate::measure::{Latencies, Stopwatch};
use crate::suite::engine::{Engine, register};
use crate::suite::link::{Lender, filled};

/// Configuration space: command register, memory space and bus master.
const COMMAND: (u16, [u8; 2]) = (0x04, [0b110, 0]);
/// The caller, the function and the lender share two cores, so nobody polls for long.
const SPIN: Duration = Duration::from_micros(100);

/// A device with a register, lent, and a port to it.
pub struct PortedRegister {
    port: VcpuPort,
    /// Before the lender, to whom its function says goodbye.
    _thread: FunctionThread<RecorderSink, SliceMemory>,
    _lender: Lender,
}

impl PortedRegister {
    /// Lends it over `choice`, with its device on core `there`.
    ///
    /// # Errors
    /// Where there is no link over `choice`.
    pub fn start(choice: &DeviceChoice, there: usize) -> Result<Self> {
        let (engine, _) = Engine::new(4096)?;
        let (lender, session) = Lender::start(VerbsFabric::pair(choice)?, Box::new(engine), there, SPIN)?;
        let memory = SliceMemory::new(GuestAddress(BASE.0), filled("bench-guest", 4096)?);
        let function = Embedded::new(Box::new(session), RecorderSink::default(), memory)?;
        let (thread, ports) = FunctionThread::start(function, 1, FunctionThreadOptions { spin: SPIN })?;
        let mut port = ports.into_iter().next().context("a thread with one port has none")?;
        port.config_write(COMMAND.0, &COMMAND.1)?;
        Ok(Self { port, _thread: thread, _lender: lender })
    }

    /// Register writes, and now and then a read that waits for them: what the caller waits for a write.
    ///
    /// # Errors
    /// Where one is lost.
    pub fn mmio_write(&mut self, samples: u64) -> Result<Latencies> {
        let watch = Stopwatch::calibrate();
        let mut latencies = Latencies::new();
        for round in 0..samples.next_multiple_of(WRITES_PER_READ) {
            let start = Instant::now();
            self.port.bar_write(at(register::VALUE), Width::B4, round & 0xffff)?;
            latencies.record_ns(watch.since(start));
            if round % WRITES_PER_READ == WRITES_PER_READ - 1 {
                let value = self.port.bar_read(at(register::VALUE), Width::B4)?;
                ensure!(value == round & 0xffff, "a register read answered {value} where {round} was written");
            }
        }
        Ok(latencies)
    }
}
