//! A guest that writes anything to the NVMe controller: registers, doorbells, queue memory, whole commands; no panic, and it comes to rest.
//!
//! With the first byte odd the controller is enabled and has one queue pair already, so that a submission entry made of the next 64 bytes
//! is a read or write of the image, or an admin command, from the first operation on.

use std::sync::Arc;

use farbus_remote_dma::model::nvme::registers::CAP;
use farbus_remote_dma::model::{Nvme, NvmeOptions};
use farbus_remote_dma::native::Native;
use farbus_remote_dma::{
    Activity, Attachment, BarAddress, Host, InterruptMode, Iova, Mediation, ResetKind, Ticket, Width, Window, WindowMemory,
};
use farbus_transport::{Access, Memory, Nanos};

use super::input::Input;

const GUEST_BYTES: u64 = 128 << 10;
const GUEST_IOVA: u64 = 0x1_0000;
const ADMIN_SQ: u64 = GUEST_IOVA;
const ADMIN_CQ: u64 = GUEST_IOVA + 0x1000;
const IO_SQ: u64 = GUEST_IOVA + 0x2000;
const IO_CQ: u64 = GUEST_IOVA + 0x3000;
const ENTRIES: u32 = 16;

struct Guest {
    interrupts: u32,
}

impl Host for Guest {
    fn interrupt(&mut self, vector: u16) {
        assert!(vector < 65, "vector {vector} does not exist");
        self.interrupts += 1;
    }

    fn pin(&mut self, _asserted: bool) {}

    fn mediate(&mut self, _ticket: Ticket, mediation: Mediation<'_>) {
        panic!("all memory is mapped, and yet {mediation:?}");
    }
}

struct Machine {
    device: Native,
    guest: Guest,
    memory: Arc<Memory>,
    tails: [u32; 2],
}

/// A guest's doings.
pub fn nvme_registers(bytes: &[u8]) {
    let mut input = Input(bytes);
    let Some(start) = input.u8() else { return };
    let mut machine = Machine::new();
    if start & 1 != 0 {
        machine.enable();
    }
    while let Some(operation) = input.u8() {
        if machine.act(operation, &mut input).is_none() {
            break;
        }
    }
    machine.settle();
    machine.device.reset(ResetKind::Function, &mut machine.guest).expect("the device comes to rest");
    assert_eq!(machine.read(0x1c, Width::B4), 0, "CSTS after a reset");
    assert_eq!(machine.read(0x00, Width::B8), CAP, "the capabilities changed");
}

impl Machine {
    fn new() -> Self {
        let image = Memory::memfd("fuzz-image", 64 << 10).expect("memory");
        let memory = Memory::memfd("fuzz-guest", GUEST_BYTES).expect("memory");
        let nvme = Nvme::in_memory(image, NvmeOptions::default()).expect("a controller");
        let mut device = Native::inline(Box::new(nvme)).expect("it attaches");
        let mut guest = Guest { interrupts: 0 };
        let mapped = WindowMemory::Mapped { memory: Arc::clone(&memory), offset: 0, proven: true };
        let window = Window { iova: Iova(GUEST_IOVA), len: GUEST_BYTES, access: Access::READ_WRITE, memory: mapped };
        device.map(window, &mut guest).expect("the only window");
        device.set_bus_master(true, &mut guest);
        device.set_interrupt_mode(InterruptMode::Msix, &mut guest);
        Self { device, guest, memory, tails: [0; 2] }
    }

    fn write(&mut self, offset: u64, width: Width, value: u64) {
        self.device.bar_write(BarAddress { bar: 0, offset }, width, value, &mut self.guest);
    }

    fn read(&mut self, offset: u64, width: Width) -> u64 {
        self.device.bar_read(BarAddress { bar: 0, offset }, width, &mut self.guest)
    }

    fn enable(&mut self) {
        self.write(0x24, Width::B4, u64::from(ENTRIES - 1) << 16 | u64::from(ENTRIES - 1));
        self.write(0x28, Width::B8, ADMIN_SQ);
        self.write(0x30, Width::B8, ADMIN_CQ);
        self.write(0x14, Width::B4, 0x0046_0001);
        self.settle();
        assert_eq!(self.read(0x1c, Width::B4), 1, "CSTS after enabling");
        let create = |opcode: u8, prp1: u64, dword11: u32| {
            let mut entry = [0; 64];
            entry[0] = opcode;
            entry[24..32].copy_from_slice(&prp1.to_le_bytes());
            entry[40..44].copy_from_slice(&(1 | (ENTRIES - 1) << 16).to_le_bytes());
            entry[44..48].copy_from_slice(&dword11.to_le_bytes());
            entry
        };
        self.submit(0, create(0x05, IO_CQ, 1 << 16 | 3));
        self.submit(0, create(0x01, IO_SQ, 1 << 16 | 1));
        self.settle();
        assert!(self.guest.interrupts > 0, "nothing was completed");
        self.write(0x1004, Width::B4, 2);
    }

    fn submit(&mut self, queue: usize, entry: [u8; 64]) {
        let (base, doorbell) = if queue == 0 { (ADMIN_SQ, 0x1000) } else { (IO_SQ, 0x1008) };
        let Some(tail) = self.tails.get_mut(queue) else { return };
        let at = base - GUEST_IOVA + u64::from(*tail) * 64;
        *tail = (*tail + 1) % ENTRIES;
        let tail = u64::from(*tail);
        self.memory.write(at, &entry).expect("the queue lies in the guest");
        self.write(doorbell, Width::B4, tail);
    }

    /// One operation; `None` where the input ends.
    fn act(&mut self, operation: u8, input: &mut Input<'_>) -> Option<()> {
        let width = [Width::B1, Width::B2, Width::B4, Width::B8][usize::from(operation >> 6)];
        match operation % 8 {
            0 => {
                let offset = (u64::from(input.u16()?) % 0x4000) & !(width.bytes() - 1);
                let value = input.u64()?;
                self.write(offset, width, value);
            }
            1 => {
                let offset = (u64::from(input.u16()?) % 0x4000) & !(width.bytes() - 1);
                let value = self.read(offset, width);
                assert_eq!(value, width.truncate(value), "a read of {width:?} has more bits");
            }
            // Doorbells of the first queues, with small values.
            2 => {
                let (doorbell, value) = (input.u8()?, input.u8()?);
                self.write(0x1000 + u64::from(doorbell % 8) * 4, Width::B4, u64::from(value % 20));
            }
            3 | 4 => {
                let queue = usize::from(operation >> 3 & 1);
                let mut entry = input.bytes::<64>()?;
                if operation & 0x10 != 0 {
                    sensible(&mut entry);
                }
                self.submit(queue, entry);
            }
            5 => {
                let (at, piece) = (u64::from(input.u32()?) % GUEST_BYTES, input.piece()?);
                let piece = piece.get(..(GUEST_BYTES - at).min(piece.len() as u64) as usize)?;
                self.memory.write(at, piece).expect("it was cut to fit");
            }
            6 => self.settle(),
            _ => match input.u8()? {
                0 => self.device.reset(ResetKind::Function, &mut self.guest).expect("the device comes to rest"),
                1 => self.device.set_bus_master(false, &mut self.guest),
                2 => self.device.set_interrupt_mode(InterruptMode::Pin, &mut self.guest),
                3 => self.device.set_interrupt_mode(InterruptMode::Msi(4), &mut self.guest),
                4 => self.write(0x14, Width::B4, 0),
                _ => self.device.set_bus_master(true, &mut self.guest),
            },
        }
        Some(())
    }

    fn settle(&mut self) {
        for _ in 0..10_000 {
            if self.device.poll(Nanos(1), &mut self.guest) != Activity::Busy {
                return;
            }
        }
        panic!("the device is busy for ever");
    }
}

/// Bends an entry towards one that is carried out: the namespace exists, pages and blocks are few.
fn sensible(entry: &mut [u8; 64]) {
    entry[1] &= 0x3f;
    entry[4..8].copy_from_slice(&1_u32.to_le_bytes());
    for at in [24, 32] {
        let page = u64::from(entry[at + 1] % 32);
        entry[at..at + 8].copy_from_slice(&(GUEST_IOVA + page * 4096).to_le_bytes());
    }
    if matches!(entry[0], 0..=2) {
        entry[41..48].fill(0);
        entry[49] = 0;
        entry[50] = 0;
    }
}
