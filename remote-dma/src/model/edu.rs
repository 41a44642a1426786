//! The register file and DMA engine of QEMU's `edu` device, as docs/specs/edu.rst of QEMU describes it.
//!
//! A driver writes 5 to 0x08, waits until bit 0 of 0x20 is clear and reads 120 there; it writes a guest address to 0x80, 0x40000 to 0x88, 256 to
//! 0x90 and 0b101 to 0x98, and hears by interrupt 0x100 that 256 bytes arrived in the device's 4 KiB buffer.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use farbus_transport::{Access, LocalRegion, LocalSpan, Memory, MemoryError};

use crate::address::{BarAddress, Iova, Width};
use crate::attachment::Activity;
use crate::backend::{AttachError, Backend, Bus, DmaFault, DmaTag, InterruptMode, Progress, ResetKind};
use crate::device::{BarDescription, BarKind, DeviceDescription};

/// Bytes of BAR0.
pub const BAR_BYTES: u64 = 1 << 20;
/// The device's own address of its buffer.
pub const BUFFER_ADDRESS: u64 = 0x4_0000;
/// Bytes of the buffer.
pub const BUFFER_BYTES: u64 = 4096;
/// Address bits of its DMA.
pub const DMA_BITS: u8 = 28;
/// The interrupt status bit of a DMA that is done.
pub const DMA_INTERRUPT: u32 = 0x100;
/// The interrupt status bit of a factorial that is done.
pub const FACTORIAL_INTERRUPT: u32 = 1;

/// Version 1.0 of the device.
const IDENTIFICATION: u32 = 0x0100_00ed;

mod register {
    pub const IDENTIFICATION: u64 = 0x00;
    pub const LIVENESS: u64 = 0x04;
    pub const FACTORIAL: u64 = 0x08;
    pub const STATUS: u64 = 0x20;
    pub const INTERRUPT_STATUS: u64 = 0x24;
    pub const INTERRUPT_RAISE: u64 = 0x60;
    pub const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
    pub const DMA_SOURCE: u64 = 0x80;
    pub const DMA_DESTINATION: u64 = 0x88;
    pub const DMA_COUNT: u64 = 0x90;
    pub const DMA_COMMAND: u64 = 0x98;
}

/// Bits of the status register.
mod status {
    pub const COMPUTING: u32 = 1;
    pub const INTERRUPT_AFTER_FACTORIAL: u32 = 0x80;
}

/// Bits of the DMA command register.
mod command {
    pub const START: u64 = 1;
    pub const TO_GUEST: u64 = 2;
    pub const INTERRUPT: u64 = 4;
}

/// What the DMA engine was told.
#[derive(Clone, Copy, Debug, Default)]
struct Engine {
    source: u64,
    destination: u64,
    count: u64,
    command: u64,
}

/// What happened, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EduCounters {
    /// DMAs done.
    pub dmas: u64,
    /// DMAs refused: a range outside the buffer or above 28 bits, or guest memory that is not there.
    pub refused: u64,
    /// Accesses of a width or place that has no meaning.
    pub ignored_accesses: u64,
}

/// The device.
#[derive(Debug)]
pub struct Edu {
    description: DeviceDescription,
    buffer: Arc<Memory>,
    region: Option<LocalRegion>,
    liveness: u32,
    factorial: u32,
    /// A factorial is to be computed in the next poll.
    computing: bool,
    interrupt_after_factorial: bool,
    interrupts: u32,
    engine: Engine,
    /// A DMA is under way.
    pending: bool,
    epoch: u64,
    fenced: bool,
    mode: InterruptMode,
    pin: bool,
    counters: EduCounters,
}

impl Edu {
    /// A device as after power-on.
    ///
    /// # Errors
    /// [`MemoryError`] where its buffer cannot be made.
    pub fn new() -> Result<Self, MemoryError> {
        Ok(Self {
            description: description(),
            buffer: Memory::memfd("farbus-edu", BUFFER_BYTES)?,
            region: None,
            liveness: 0,
            factorial: 0,
            computing: false,
            interrupt_after_factorial: false,
            interrupts: 0,
            engine: Engine::default(),
            pending: false,
            epoch: 0,
            fenced: false,
            mode: InterruptMode::Pin,
            pin: false,
            counters: EduCounters::default(),
        })
    }

    /// What has happened since the device was made.
    pub const fn counters(&self) -> &EduCounters {
        &self.counters
    }

    fn power_on(&mut self) {
        // The buffer belongs to nobody between two borrowers: nothing of the first one's may be left for the second.
        let cleared = self.buffer.write(0, &[0; BUFFER_BYTES as usize]);
        debug_assert!(cleared.is_ok(), "the buffer is ours and writable");
        self.liveness = 0;
        self.factorial = 0;
        self.computing = false;
        self.interrupt_after_factorial = false;
        self.interrupts = 0;
        self.engine = Engine::default();
        self.pending = false;
        self.epoch = self.epoch.wrapping_add(1);
    }

    fn status(&self) -> u32 {
        let computing = if self.computing { status::COMPUTING } else { 0 };
        let interrupt = if self.interrupt_after_factorial { status::INTERRUPT_AFTER_FACTORIAL } else { 0 };
        computing | interrupt
    }

    /// Sets interrupt bits and signals them.
    fn raise(&mut self, bits: u32, bus: &mut dyn Bus) {
        self.interrupts |= bits;
        if bits == 0 {
            return;
        }
        if self.mode == InterruptMode::Pin {
            self.update_pin(bus);
        } else {
            bus.interrupt(0);
        }
    }

    fn update_pin(&mut self, bus: &mut dyn Bus) {
        let level = self.mode == InterruptMode::Pin && self.interrupts != 0;
        if level != self.pin {
            self.pin = level;
            bus.set_pin(level);
        }
    }

    /// The guest's address and the buffer's bytes of the DMA that was asked for; `None` where it leaves the buffer or 28 bits.
    fn ranges(&self) -> Option<(Iova, LocalSpan)> {
        let Engine { source, destination, count, command } = self.engine;
        let to_guest = command & command::TO_GUEST != 0;
        let (local, guest) = if to_guest { (source, destination) } else { (destination, source) };
        let last = guest.checked_add(count.checked_sub(1)?)?;
        if last >> DMA_BITS != 0 {
            return None;
        }
        let offset = local.checked_sub(BUFFER_ADDRESS)?;
        let access = if to_guest { Access::READ } else { Access::WRITE };
        let span = self.region?.span(offset, u32::try_from(count).ok()?, access).ok()?;
        Some((Iova(guest), span))
    }

    fn start_dma(&mut self, bus: &mut dyn Bus) {
        if self.fenced || self.pending {
            return;
        }
        let Some((iova, span)) = self.ranges() else {
            return self.end_dma(false, bus);
        };
        let tag = DmaTag(self.epoch);
        self.pending = true;
        let progress = if self.engine.command & command::TO_GUEST != 0 {
            bus.dma_write(tag, iova, span)
        } else {
            bus.dma_read(tag, iova, span)
        };
        match progress {
            Ok(Progress::Pending) => {}
            Ok(Progress::Done) => self.end_dma(true, bus),
            Err(_) => self.end_dma(false, bus),
        }
    }

    /// The start bit falls in any case, so that no driver waits for ever; only a DMA that happened interrupts.
    fn end_dma(&mut self, happened: bool, bus: &mut dyn Bus) {
        self.pending = false;
        let asked = self.engine.command & command::INTERRUPT != 0;
        self.engine.command &= !command::START;
        if !happened {
            self.counters.refused += 1;
            return;
        }
        self.counters.dmas += 1;
        if asked && !self.fenced {
            self.raise(DMA_INTERRUPT, bus);
        }
    }

    fn read_dword(&self, at: u64) -> Option<u32> {
        Some(match at {
            register::IDENTIFICATION => IDENTIFICATION,
            register::LIVENESS => self.liveness,
            register::FACTORIAL => self.factorial,
            register::STATUS => self.status(),
            register::INTERRUPT_STATUS => self.interrupts,
            _ => return None,
        })
    }

    fn read_wide(&self, at: u64) -> Option<u64> {
        Some(match at {
            register::DMA_SOURCE => self.engine.source,
            register::DMA_DESTINATION => self.engine.destination,
            register::DMA_COUNT => self.engine.count,
            register::DMA_COMMAND => self.engine.command,
            _ => return None,
        })
    }

    fn write_dword(&mut self, at: u64, value: u32, bus: &mut dyn Bus) -> bool {
        match at {
            register::LIVENESS => self.liveness = !value,
            register::FACTORIAL if self.computing => {}
            register::FACTORIAL => {
                self.factorial = value;
                self.computing = true;
            }
            register::STATUS => self.interrupt_after_factorial = value & status::INTERRUPT_AFTER_FACTORIAL != 0,
            register::INTERRUPT_RAISE => self.raise(value, bus),
            register::INTERRUPT_ACKNOWLEDGE => {
                self.interrupts &= !value;
                self.update_pin(bus);
            }
            _ => return false,
        }
        true
    }

    /// The DMA registers, while no DMA is under way.
    fn write_wide(&mut self, at: u64, value: u64, bus: &mut dyn Bus) -> bool {
        let busy = self.engine.command & command::START != 0;
        match at {
            register::DMA_SOURCE | register::DMA_DESTINATION | register::DMA_COUNT | register::DMA_COMMAND if busy => {}
            register::DMA_SOURCE => self.engine.source = value,
            register::DMA_DESTINATION => self.engine.destination = value,
            register::DMA_COUNT => self.engine.count = value,
            register::DMA_COMMAND => {
                // The document: the start bit begins a transfer, others are kept for the next.
                self.engine.command = value & (command::START | command::TO_GUEST | command::INTERRUPT);
                if value & command::START != 0 {
                    self.start_dma(bus);
                }
            }
            _ => return false,
        }
        true
    }
}

/// n! modulo 2^32: from 34 on it is 0, because 2^32 divides it.
fn factorial(n: u32) -> u32 {
    if n >= 34 { 0 } else { (1..=n).fold(1, u32::wrapping_mul) }
}

fn description() -> DeviceDescription {
    DeviceDescription {
        name: "edu".to_owned(),
        vendor_id: 0x1234,
        device_id: 0x11e8,
        subsystem_vendor_id: 0x1af4,
        subsystem_id: 0x1100,
        revision: 0x10,
        // Base class 0xff: fits no other.
        class_code: 0xff_0000,
        bars: [
            Some(BarDescription { kind: BarKind::Memory32, size: BAR_BYTES, prefetchable: false }),
            None,
            None,
            None,
            None,
            None,
        ],
        pin: true,
        msi_vectors: 1,
        msix: None,
        dma_bits: DMA_BITS,
        constants: Vec::new(),
        serial: String::new(),
    }
}

impl Backend for Edu {
    fn description(&self) -> &DeviceDescription {
        &self.description
    }

    fn attach(&mut self, bus: &mut dyn Bus) -> Result<(), AttachError> {
        self.region = Some(bus.register(Arc::clone(&self.buffer), Access::READ_WRITE)?);
        self.power_on();
        self.fenced = false;
        self.pin = false;
        self.mode = InterruptMode::Pin;
        Ok(())
    }

    fn detach(&mut self) {
        self.fenced = true;
        self.region = None;
        self.power_on();
    }

    /// Below 0x80 dwords only, from there dwords and qwords, as the document says; all else reads as ones.
    fn bar_read(&mut self, at: BarAddress, width: Width, _bus: &mut dyn Bus) -> u64 {
        let value = match width {
            Width::B4 => self.read_dword(at.offset).map(u64::from).or_else(|| self.read_wide(at.offset)),
            Width::B8 => self.read_wide(at.offset),
            Width::B1 | Width::B2 => None,
        };
        match value.filter(|_| at.bar == 0) {
            Some(value) => width.truncate(value),
            None => {
                self.counters.ignored_accesses += 1;
                width.all_ones()
            }
        }
    }

    fn bar_write(&mut self, at: BarAddress, width: Width, value: u64, bus: &mut dyn Bus) {
        let value = width.truncate(value);
        let known = at.bar == 0
            && match width {
                Width::B4 => self.write_dword(at.offset, value as u32, bus) || self.write_wide(at.offset, value, bus),
                Width::B8 => self.write_wide(at.offset, value, bus),
                Width::B1 | Width::B2 => false,
            };
        self.counters.ignored_accesses += u64::from(!known);
    }

    fn dma_done(&mut self, tag: DmaTag, result: Result<(), DmaFault>, bus: &mut dyn Bus) {
        // One of an earlier life has no meaning any more.
        if self.pending && tag == DmaTag(self.epoch) {
            self.end_dma(result.is_ok(), bus);
        }
    }

    fn poll(&mut self, bus: &mut dyn Bus) -> Activity {
        if self.fenced || !self.computing {
            return Activity::Idle(None);
        }
        self.factorial = factorial(self.factorial);
        self.computing = false;
        if self.interrupt_after_factorial {
            self.raise(FACTORIAL_INTERRUPT, bus);
        }
        Activity::Busy
    }

    fn arm(&mut self) -> bool {
        self.fenced || !self.computing
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn set_interrupt_mode(&mut self, mode: InterruptMode, bus: &mut dyn Bus) {
        self.mode = mode;
        self.update_pin(bus);
    }

    fn fence(&mut self) {
        self.fenced = true;
    }

    fn in_flight(&self) -> usize {
        usize::from(self.pending)
    }

    fn reset(&mut self, _kind: ResetKind, bus: &mut dyn Bus) {
        debug_assert!(!self.pending, "reset with a dma under way");
        self.power_on();
        self.fenced = false;
        self.update_pin(bus);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factorials_are_modulo_two_to_the_32() {
        assert_eq!([0, 1, 5, 12].map(factorial), [1, 1, 120, 479_001_600]);
        assert_eq!(factorial(13), (6_227_020_800_u64 % (1 << 32)) as u32);
        assert_eq!((factorial(33), factorial(34), factorial(u32::MAX)), (2_147_483_648, 0, 0));
    }

    #[test]
    fn the_description_is_valid() {
        assert_eq!(description().validate(), Ok(()));
    }
}
