//! A borrowed `edu` device, driven as its document says: factorials, DMA both ways, interrupts by eventfd.
//!
//! The VMM is a vfio-user client with 64 KiB of guest memory: its first DMAs come as messages, and when a store has shown that the descriptor
//! is the guest's memory, the lender's device reaches it without asking.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_pci_shim::vfio_user::client::{Client, ClientMemory};
use farbus_pci_shim::vfio_user::wire::{CONFIG_REGION, MAP_READABLE, MAP_WRITEABLE, MSI, SET_ACTION_TRIGGER, SET_DATA_EVENTFD};
use farbus_tests::Running;
use farbus_tests::edu::{
    ACKNOWLEDGE, BUFFER, COMMAND, COUNT, DESTINATION, FACTORIAL, IDENTIFICATION, INTERRUPT, INTERRUPT_STATUS, LIVENESS, SOURCE,
    START, STATUS, TO_GUEST,
};
use farbus_tests::process::{AMPLE, text};
use farbus_transport::Memory;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd};
use rustix::io::Errno;

const GUEST_BASE: u64 = 0x10_0000;
const GUEST_BYTES: u64 = 64 << 10;

struct Guest(Arc<Memory>);

impl ClientMemory for Guest {
    fn read(&mut self, iova: u64, into: &mut [u8]) -> Result<(), Errno> {
        self.0.read(iova.checked_sub(GUEST_BASE).ok_or(Errno::FAULT)?, into).map_err(|_| Errno::FAULT)
    }

    fn write(&mut self, iova: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.0.write(iova.checked_sub(GUEST_BASE).ok_or(Errno::FAULT)?, bytes).map_err(|_| Errno::FAULT)
    }
}

struct Machine {
    vmm: Client,
    guest: Guest,
    vector: OwnedFd,
}

impl Machine {
    fn start(socket: &Path) -> Self {
        let mut vmm = Client::open(socket, AMPLE).unwrap();
        let memory = Memory::memfd("guest", GUEST_BYTES).unwrap();
        let (fd, offset) = memory.file().unwrap();
        vmm.dma_map(GUEST_BASE, GUEST_BYTES, MAP_READABLE | MAP_WRITEABLE, Some((fd, offset))).unwrap();
        let vector = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        vmm.set_irqs(MSI, SET_DATA_EVENTFD | SET_ACTION_TRIGGER, 0, 1, &[], &[vector.as_fd()]).unwrap();
        // Command register: memory space and bus mastering (PCI 3.0, section 6.2.2).
        vmm.region_write(CONFIG_REGION, 4, &6_u16.to_le_bytes()).unwrap();
        Self { vmm, guest: Guest(Arc::clone(&memory)), vector }
    }

    fn read(&mut self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        self.vmm.region_read(0, at, &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    }

    fn write(&mut self, at: u64, value: u32) {
        self.vmm.region_write(0, at, &value.to_le_bytes()).unwrap();
    }

    fn write_wide(&mut self, at: u64, value: u64) {
        self.vmm.region_write(0, at, &value.to_le_bytes()).unwrap();
    }

    /// Serves the device's DMA until it interrupts; gives how many messages that took.
    fn await_interrupt(&mut self, bits: u32) -> usize {
        let started = Instant::now();
        let mut answered = 0;
        loop {
            answered += self.vmm.answer_dma(&mut self.guest, Duration::from_millis(2)).unwrap();
            let mut fds = [PollFd::new(&self.vector, PollFlags::IN)];
            let moment = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
            if rustix::event::poll(&mut fds, Some(&moment)).unwrap() == 1 {
                break;
            }
            assert!(started.elapsed() < AMPLE, "no interrupt for {bits:#x}");
        }
        let mut count = [0; 8];
        rustix::io::read(&self.vector, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 1, "one interrupt");
        assert_eq!(self.read(INTERRUPT_STATUS), bits);
        self.write(ACKNOWLEDGE, bits);
        assert_eq!(self.read(INTERRUPT_STATUS), 0);
        answered
    }

    fn dma(&mut self, source: u64, destination: u64, count: u64, direction: u64) -> usize {
        for (register, value) in [(SOURCE, source), (DESTINATION, destination), (COUNT, count)] {
            self.write_wide(register, value);
        }
        self.write_wide(COMMAND, START | INTERRUPT | direction);
        let answered = self.await_interrupt(0x100);
        assert_eq!(u64::from(self.read(COMMAND)) & START, 0);
        answered
    }
}

fn pattern(round: u64, len: u64) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + round * 31 + 1) as u8).collect()
}

#[test]
fn a_borrowed_edu_computes_moves_memory_both_ways_and_interrupts() {
    let folder = tempfile::tempdir().unwrap();
    let (mut lender, borrower) = lend_and_borrow("edu", folder.path(), "vmm");
    assert_works(&folder.path().join("vmm"));
    end(&mut lender, borrower);
    lender.terminate();
    assert_eq!(lender.wait(AMPLE).code(), Some(0));
}

#[test]
fn an_edu_that_is_lent_on_by_a_client_of_its_server_does_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let (mut lender, borrower) = lend_and_borrow("edu", folder.path(), "first");
    let device = format!("vfio-user:{}", folder.path().join("first").display());
    let (mut second, last) = lend_and_borrow(&device, folder.path(), "second");
    assert_works(&folder.path().join("second"));
    end(&mut second, last);
    second.terminate();
    assert_eq!(second.wait(AMPLE).code(), Some(0));
    end(&mut lender, borrower);
}

fn lend_and_borrow(device: &str, folder: &Path, name: &str) -> (Running, Running) {
    let (link, socket) = (format!("shm:{}/{name}.link", folder.display()), folder.join(name));
    let mut lender = Running::farbus(&["lend", "--json", "--device", device, "--listen", &link]);
    lender.event("listening", AMPLE);
    let mut borrower = Running::farbus(&["borrow", "--json", "--from", &link, "--vfio-user", text(&socket)]);
    borrower.event("serving", AMPLE);
    (lender, borrower)
}

fn end(lender: &mut Running, borrower: Running) {
    borrower.terminate();
    assert_eq!(borrower.wait(AMPLE).code(), Some(0));
    lender.event("returned", AMPLE);
}

fn assert_works(socket: &Path) {
    for life in 0..2 {
        let mut machine = Machine::start(socket);
        assert_eq!(machine.read(IDENTIFICATION), 0x0100_00ed);
        assert_eq!(machine.read(LIVENESS), 0, "life {life}: a register of the last VM");
        machine.write(LIVENESS, 0x1234_5678);
        assert_eq!(machine.read(LIVENESS), !0x1234_5678);

        machine.write(STATUS, 0x80);
        machine.write(FACTORIAL, 12);
        machine.await_interrupt(1);
        assert_eq!((machine.read(STATUS), machine.read(FACTORIAL)), (0x80, 479_001_600));

        // The buffer of a new VM is empty, whatever the last one left in it.
        machine.dma(BUFFER, GUEST_BASE + 0x8000, 4096, TO_GUEST);
        let mut seen = vec![0xff; 4096];
        machine.guest.0.read(0x8000, &mut seen).unwrap();
        assert_eq!(seen, [0; 4096], "life {life}");

        let mut messages = 0;
        for round in 0..20 {
            let (len, from, to) = (1 + round * 199, 0x100 + round * 64, 0x4000 + round * 96);
            let bytes = pattern(round, len);
            machine.guest.0.write(from, &bytes).unwrap();
            messages = machine.dma(GUEST_BASE + from, BUFFER, len, 0);
            messages += machine.dma(BUFFER, GUEST_BASE + to, len, TO_GUEST);
            let mut seen = vec![0; len as usize + 8];
            machine.guest.0.read(to, &mut seen).unwrap();
            assert_eq!(seen[..len as usize], bytes, "round {round}");
        }
        assert_eq!(messages, 0, "the descriptor is the guest's memory, and every store showed it");
        drop(machine);
    }
}
