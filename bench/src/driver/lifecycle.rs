//! How a controller comes up and goes down: reset, admin queue, identify, I/O queues, and the way back (NVMe 1.4, sections 7.6.1 and 7.6.2).
//!
//! CC.EN = 0, wait for CSTS.RDY = 0, AQA = 0x001f001f, ASQ, ACQ, CC.EN = 1, wait for CSTS.RDY = 1: 32 admin entries are in use from there on.

use std::time::{Duration, Instant};

use farbus_remote_dma::Width;

use super::command::Command;
use super::dma::{DmaBuffer, DmaMemory, PAGE_BYTES};
use super::error::DriverError;
use super::identify::{IDENTIFY_BYTES, Identity, Namespace};
use super::queue::QueuePair;
use super::registers::{
    ACQ, AQA, ASQ, CAP, CC, CC_ENABLE, CC_ENTRY_SIZES, CC_SHUTDOWN_NORMAL, CSTS, Capabilities, Registers, Status,
};
use super::{Driver, DriverOptions, Patience};

/// Entries of the admin queues.
const ADMIN_DEPTH: u16 = 32;
/// CAP.TO may be zero; no controller is given less than this.
const LEAST_READY_MS: u64 = 1000;
/// No controller is given longer for its shutdown: RTD3 entry latency is not asked for.
const SHUTDOWN_MS: u64 = 10_000;

impl<R: Registers> Driver<R> {
    /// Resets the controller behind `registers` and brings it up with the queues of `options`, which lie in `dma`.
    ///
    /// # Errors
    /// [`DriverError`]: the controller is gone, failed, too slow, cannot do what is needed, or `dma` is too small.
    pub fn start(mut registers: R, mut dma: DmaMemory, options: DriverOptions) -> Result<Self, DriverError> {
        let cap = read_wide(&mut registers, CAP);
        if cap == u64::MAX {
            return Err(DriverError::Gone);
        }
        let capabilities = Capabilities::parse(cap);
        if !capabilities.nvm_command_set {
            return Err(DriverError::Unsupported("it does not offer the NVM command set"));
        }
        if capabilities.min_page_bytes != PAGE_BYTES {
            return Err(DriverError::Unsupported("it does not offer memory pages of 4096 bytes"));
        }
        check_options(&options, &capabilities)?;
        disable(&mut registers, &capabilities)?;

        let admin = QueuePair::new(0, ADMIN_DEPTH, PAGE_BYTES, &capabilities, &mut dma)?;
        let zero_based = u64::from(ADMIN_DEPTH - 1);
        registers.write(AQA, Width::B4, zero_based | (zero_based << 16));
        write_wide(&mut registers, ASQ, admin.submissions().iova().0);
        write_wide(&mut registers, ACQ, admin.completions().iova().0);
        registers.write(CC, Width::B4, u64::from(CC_ENTRY_SIZES | CC_ENABLE));
        await_status(&mut registers, "become ready", ready_timeout(&capabilities), Status::ready)?;

        let scratch = dma.allocate(PAGE_BYTES)?;
        let mut driver = Self {
            registers,
            dma,
            capabilities,
            max_transfer: options.max_transfer,
            options,
            identity: Identity::parse(&[0; IDENTIFY_BYTES], PAGE_BYTES),
            namespace: Namespace { id: 0, blocks: 0, block_bytes: 512 },
            admin,
            queues: Vec::new(),
        };
        driver.identify(&scratch)?;
        driver.create_queues()?;
        Ok(driver)
    }

    /// Takes the controller down in order: waits for what is in flight, deletes the queues, then a normal shutdown. The registers come back.
    ///
    /// # Errors
    /// [`DriverError`]; the controller should be reset then.
    pub fn shutdown(mut self) -> Result<R, DriverError> {
        for index in 1..=self.queues() {
            let queue = super::QueueIndex(index);
            while self.in_flight(queue)? > 0 {
                self.ring(queue)?;
                self.reap_some(queue, |_| {})?;
            }
            self.admin("delete a submission queue", &Command::delete_submission_queue(index), None)?;
            self.admin("delete a completion queue", &Command::delete_completion_queue(index), None)?;
        }
        let request = CC_ENTRY_SIZES | CC_ENABLE | CC_SHUTDOWN_NORMAL;
        self.registers.write(CC, Width::B4, u64::from(request));
        await_status(&mut self.registers, "shut down", SHUTDOWN_MS, Status::shutdown_complete)?;
        Ok(self.registers)
    }

    /// Gives up without a word to the controller, whose commands in flight may still write to the memory of the driver: reset it first.
    pub fn into_registers(self) -> R {
        self.registers
    }

    fn identify(&mut self, scratch: &DmaBuffer) -> Result<(), DriverError> {
        let mut data = [0; IDENTIFY_BYTES];
        self.admin("identify the controller", &Command::identify(1, 0), Some(scratch))?;
        scratch.read(0, &mut data)?;
        self.identity = Identity::parse(&data, self.capabilities.min_page_bytes);
        self.max_transfer = self.identity.max_transfer.unwrap_or(u64::MAX).min(self.options.max_transfer);

        self.admin("list the namespaces", &Command::identify(2, 0), Some(scratch))?;
        let mut first = [0; 4];
        scratch.read(0, &mut first)?;
        let id = u32::from_le_bytes(first);
        if id == 0 {
            return Err(DriverError::Unsupported("it has no active namespace"));
        }
        self.admin("identify the namespace", &Command::identify(0, id), Some(scratch))?;
        scratch.read(0, &mut data)?;
        self.namespace = Namespace::parse(id, &data)?;
        Ok(())
    }

    fn create_queues(&mut self) -> Result<(), DriverError> {
        let asked = self.options.queues;
        let granted = self.admin("set the number of queues", &Command::number_of_queues(asked), None)?;
        let allowed = 1 + u64::from((granted & 0xffff).min(granted >> 16));
        if u64::from(asked) > allowed {
            return Err(DriverError::Limit { what: "I/O queue pairs", asked: u64::from(asked), allowed });
        }
        self.queues.reserve_exact(usize::from(asked));
        for index in 1..=asked {
            let depth = self.options.depth;
            let pair = QueuePair::new(index, depth, self.max_transfer, &self.capabilities, &mut self.dma)?;
            let vector = self.options.vectors.get(usize::from(index) - 1).copied();
            let completion = Command::create_completion_queue(pair.id(), pair.depth(), vector);
            self.admin("create a completion queue", &completion, Some(pair.completions()))?;
            let submission = Command::create_submission_queue(pair.id(), pair.depth());
            self.admin("create a submission queue", &submission, Some(pair.submissions()))?;
            self.queues.push(pair);
        }
        Ok(())
    }

    /// One admin command; the answer is word 0 of its completion. Queues are passed as data: only their first address (PRP1) counts.
    fn admin(&mut self, what: &'static str, command: &Command, data: Option<&DmaBuffer>) -> Result<u32, DriverError> {
        // A queue is named by PRP1 alone, so no list is built for it.
        let first_page = data.and_then(|data| data.slice(0, data.len().min(PAGE_BYTES)));
        self.admin.submit(command, first_page.as_ref(), 0)?;
        self.admin.ring(&mut self.registers);
        let mut patience = Patience::new(self.options.command_timeout);
        let mut completion = None;
        while self.admin.reap(&mut self.registers, |done| completion = Some(done))? == 0 {
            self.registers.poll();
            if patience.exhausted(&self.registers) {
                return Err(self.diagnose(0));
            }
            std::hint::spin_loop();
        }
        match completion {
            Some(done) if done.status.ok() => Ok(done.result),
            Some(done) => Err(DriverError::Command { command: what, status: done.status }),
            None => Err(self.diagnose(0)),
        }
    }
}

fn check_options(options: &DriverOptions, capabilities: &Capabilities) -> Result<(), DriverError> {
    let check = |what, asked: u64, least: u64, allowed: u64| {
        if (least..=allowed).contains(&asked) { Ok(()) } else { Err(DriverError::Limit { what, asked, allowed }) }
    };
    let entries = u64::from(capabilities.max_queue_entries);
    check("entries of a queue", u64::from(options.depth), 2, entries)?;
    check("I/O queue pairs", u64::from(options.queues), 1, u64::from(u16::MAX))?;
    check("bytes of a transfer", options.max_transfer, 512, 1 << 30)
}

fn disable(registers: &mut impl Registers, capabilities: &Capabilities) -> Result<(), DriverError> {
    let configuration = registers.read(CC, Width::B4) as u32;
    if configuration & CC_ENABLE != 0 {
        registers.write(CC, Width::B4, u64::from(configuration & !CC_ENABLE));
    }
    // A fatal status is left by exactly this reset, so it is no reason to stop here.
    let timeout_ms = ready_timeout(capabilities);
    let deadline = Instant::now() + Duration::from_millis(timeout_ms);
    loop {
        let csts = registers.read(CSTS, Width::B4) as u32;
        match Status(csts) {
            status if status.gone() => return Err(DriverError::Gone),
            status if !status.ready() => return Ok(()),
            _ if Instant::now() > deadline => {
                let what = "leave the ready state";
                return Err(DriverError::Ready { what, timeout_ms, csts });
            }
            _ => registers.poll(),
        }
    }
}

fn await_status(
    registers: &mut impl Registers,
    what: &'static str,
    timeout_ms: u64,
    reached: impl Fn(Status) -> bool,
) -> Result<(), DriverError> {
    let deadline = Instant::now() + Duration::from_millis(timeout_ms);
    loop {
        let csts = registers.read(CSTS, Width::B4) as u32;
        match Status(csts) {
            status if status.gone() => return Err(DriverError::Gone),
            status if status.fatal() => return Err(DriverError::Fatal { csts }),
            status if reached(status) => return Ok(()),
            _ if Instant::now() > deadline => return Err(DriverError::Ready { what, timeout_ms, csts }),
            _ => registers.poll(),
        }
    }
}

fn ready_timeout(capabilities: &Capabilities) -> u64 {
    capabilities.ready_timeout_ms.max(LEAST_READY_MS)
}

/// An 8-byte register in two accesses of 4 bytes, low half first: every controller takes that (section 3.1).
fn read_wide(registers: &mut impl Registers, offset: u64) -> u64 {
    let low = registers.read(offset, Width::B4);
    low | (registers.read(offset + 4, Width::B4) << 32)
}

fn write_wide(registers: &mut impl Registers, offset: u64, value: u64) {
    registers.write(offset, Width::B4, Width::B4.truncate(value));
    registers.write(offset + 4, Width::B4, value >> 32);
}
