//! A small device and a small host for session tests: a copy engine with a 64 KiB buffer, and a record of what reached the guest's side.
//!
//! Writing an address to 0x10, a length to 0x18 and 2 to 0x20 makes it write its buffer there, then eight polled bytes behind it, then raise
//! vector 3.

#![allow(
    dead_code,
    unused_macros,
    unused_imports,
    clippy::unwrap_used,
    reason = "each test file uses a part of it, and a panic is how a test fails"
)]

pub mod links;
pub mod pair;

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};

use farbus_remote_dma::{
    Activity, AttachError, Backend, BarAddress, BarDescription, BarKind, Bus, DeviceDescription, DmaFault, DmaTag, Host,
    InterruptMode, Iova, Mediation, Progress, ResetKind, Ticket, Width,
};
use farbus_transport::{Access, LocalRegion, Memory};

pub const VALUE: u64 = 0;
/// Where in the buffer a transfer begins.
pub const FROM: u64 = 0x08;
pub const IOVA: u64 = 0x10;
pub const LEN: u64 = 0x18;
pub const COMMAND: u64 = 0x20;
pub const FAULTS: u64 = 0x28;
pub const DONE: u64 = 0x30;
/// Makes the polled word of a write differ from that of others.
pub const STAMP: u64 = 0x38;
/// The polled word of a write with stamp 0.
pub const POLLED_WORD: u64 = 0x6472_6f77_7473_616c;
pub const BUFFER_BYTES: u64 = 64 << 10;
pub const READ: u64 = 1;
pub const WRITE: u64 = 2;
pub const RAISE: u64 = 3;
/// The device has a bug and takes its thread with it.
pub const DIE: u64 = 4;

pub fn description() -> DeviceDescription {
    DeviceDescription {
        name: "copy engine".into(),
        vendor_id: 0x1234,
        device_id: 1,
        subsystem_vendor_id: 0,
        subsystem_id: 0,
        revision: 0,
        class_code: 0xff_0000,
        bars: [Some(BarDescription { kind: BarKind::Memory32, size: 4096, prefetchable: false }), None, None, None, None, None],
        pin: true,
        msi_vectors: 4,
        msix: None,
        dma_bits: 64,
        constants: Vec::new(),
        serial: String::new(),
    }
}

/// A transfer that the bus said was done when it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    pub command: u64,
    pub from: u64,
    pub len: u64,
    pub stamp: u64,
}

pub struct CopyEngine {
    description: DeviceDescription,
    pub buffer: Arc<Memory>,
    /// Since the last reset.
    pub told: Arc<Mutex<Vec<Told>>>,
    region: Option<LocalRegion>,
    registers: [u64; 8],
    pending: usize,
    fenced: bool,
}

impl CopyEngine {
    pub fn new() -> Self {
        let buffer = Memory::memfd("engine", BUFFER_BYTES).unwrap();
        let told = Arc::default();
        Self { description: description(), buffer, told, region: None, registers: [0; 8], pending: 0, fenced: false }
    }

    fn start(&mut self, command: u64, bus: &mut dyn Bus) {
        if self.fenced {
            return;
        }
        let from = self.registers[1].min(BUFFER_BYTES);
        let (iova, len) = (Iova(self.registers[2]), self.registers[3].min(BUFFER_BYTES - from) as u32);
        let region = self.region.unwrap();
        let result = match command {
            READ => bus.dma_read(DmaTag(READ), iova, region.span(from, len, Access::WRITE).unwrap()),
            WRITE => bus.dma_write(DmaTag(WRITE), iova, region.span(from, len, Access::READ).unwrap()),
            RAISE => return bus.interrupt(len as u16),
            DIE => panic!("a device's bug"),
            _ => return,
        };
        match result {
            Ok(Progress::Done) => {
                self.told.lock().unwrap().push(Told { command, from, len: u64::from(len), stamp: self.registers[7] });
                self.finish(command, bus);
            }
            Ok(Progress::Pending) => {
                self.pending += 1;
                // What follows a posted write need not wait for it: order is the bus's business.
                if command == WRITE {
                    self.announce(bus);
                }
            }
            Err(_) => self.registers[5] += 1,
        }
    }

    fn announce(&mut self, bus: &mut dyn Bus) {
        let end = Iova(self.registers[2] + self.registers[3]);
        match bus.dma_write_polled(DmaTag(9), end, &(POLLED_WORD ^ self.registers[7]).to_le_bytes()) {
            Ok(Progress::Pending) => self.pending += 1,
            Ok(Progress::Done) => {}
            Err(_) => self.registers[5] += 1,
        }
        bus.interrupt(3);
    }

    fn finish(&mut self, command: u64, bus: &mut dyn Bus) {
        self.registers[6] += 1;
        if command == WRITE {
            self.announce(bus);
        }
    }
}

impl Backend for CopyEngine {
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
    fn bar_read(&mut self, at: BarAddress, _width: Width, _bus: &mut dyn Bus) -> u64 {
        self.registers.get(at.offset as usize / 8).copied().unwrap_or(0)
    }
    fn bar_write(&mut self, at: BarAddress, _width: Width, value: u64, bus: &mut dyn Bus) {
        if let Some(register) = self.registers.get_mut(at.offset as usize / 8) {
            *register = value;
        }
        if at.offset == COMMAND {
            self.start(value, bus);
        }
    }
    fn dma_done(&mut self, tag: DmaTag, result: Result<(), DmaFault>, _bus: &mut dyn Bus) {
        self.pending -= 1;
        match result {
            Ok(()) if tag != DmaTag(9) => self.registers[6] += 1,
            Ok(()) => {}
            Err(_) => self.registers[5] += 1,
        }
    }
    fn poll(&mut self, _bus: &mut dyn Bus) -> Activity {
        Activity::Idle(None)
    }
    fn arm(&mut self) -> bool {
        true
    }
    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn set_interrupt_mode(&mut self, _mode: InterruptMode, _bus: &mut dyn Bus) {}
    fn fence(&mut self) {
        self.fenced = true;
    }
    fn in_flight(&self) -> usize {
        self.pending
    }
    fn reset(&mut self, _kind: ResetKind, _bus: &mut dyn Bus) {
        self.told.lock().unwrap().clear();
        self.registers = [0; 8];
        self.fenced = false;
    }
}

/// What reached the guest's side, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    Interrupt(u16),
    Pin(bool),
    Fetch(Ticket, Iova, u32),
    Store(Ticket, Iova, Vec<u8>, bool),
}

#[derive(Default)]
pub struct Recorder(pub VecDeque<Seen>);

impl Host for Recorder {
    fn interrupt(&mut self, vector: u16) {
        self.0.push_back(Seen::Interrupt(vector));
    }
    fn pin(&mut self, asserted: bool) {
        self.0.push_back(Seen::Pin(asserted));
    }
    fn mediate(&mut self, ticket: Ticket, mediation: Mediation<'_>) {
        self.0.push_back(match mediation {
            Mediation::Fetch { iova, len } => Seen::Fetch(ticket, iova, len),
            Mediation::Store { iova, bytes, polled } => Seen::Store(ticket, iova, bytes.to_vec(), polled),
        });
    }
}

pub fn bar0(offset: u64) -> BarAddress {
    BarAddress { bar: 0, offset }
}
