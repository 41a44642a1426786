//! A real `edu` behind VFIO: registers, DMA in both directions into the borrower's memory, MSI and INTx, windows that come and go.
//!
//! Its DMA engine needs 100 ms for each transfer, moves less than 4,096 bytes and has 28 address bits (QEMU, docs/specs/edu.rst); that it
//! is another kind of device than our model of it is the point. `ci/softroce --pci` has it.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod vfio_support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use farbus_bench::driver::Registers as _;
use farbus_pci_shim::irq::Told;
use farbus_remote_dma::dirty_log::PAGE_BYTES;
use farbus_remote_dma::{AttachmentError, Iova, MapError, ResetKind, Width, Window, WindowMemory};
use farbus_tests::edu::{
    ACKNOWLEDGE, BUFFER, COMMAND, COUNT, DESTINATION, FACTORIAL, IDENTIFICATION, INTERRUPT, INTERRUPT_STATUS, LIVENESS, RAISE,
    SOURCE, START, STATUS, TO_GUEST,
};
use farbus_transport::{Access, Memory, Nanos};
use vfio_support::careless::{Careless, LeaveOut};
use vfio_support::{Lent, Registers, is_bus_master, lab, wait_until};

const BASE: u64 = 0x10_0000;
const BYTES: u64 = 64 << 10;
const AMPLE: Duration = Duration::from_secs(20);

struct Machine {
    registers: Registers,
    memory: Arc<Memory>,
    lent: Lent,
}

impl Machine {
    fn new() -> Self {
        Self::over(Lent::here(&lab("FARBUS_LAB_EDU")))
    }

    /// With a backend that leaves something out.
    fn careless(leave_out: LeaveOut) -> Self {
        Self::over(Lent::through(&lab("FARBUS_LAB_EDU"), |vfio| Box::new(Careless { vfio, leave_out })))
    }

    fn over(mut lent: Lent) -> Self {
        let memory = Memory::memfd("guest", BYTES).unwrap();
        let registers = lent.open(&memory, Iova(BASE));
        Self { registers, memory, lent }
    }

    fn read(&mut self, at: u64) -> u64 {
        self.registers.read(at, Width::B4)
    }

    fn write(&mut self, at: u64, value: u64) {
        self.registers.write(at, Width::B4, value);
    }

    /// Enables MSI as a driver does (PCI 3.0, section 6.8.1).
    fn enable_msi(&mut self) {
        let function = self.registers.function_mut();
        let mut at = [0; 1];
        function.config_read(0x34, &mut at).unwrap();
        let mut at = u16::from(at[0]);
        loop {
            let mut head = [0; 2];
            function.config_read(at, &mut head).unwrap();
            if head[0] == 0x05 {
                break;
            }
            at = head[1].into();
            assert_ne!(at, 0, "no MSI capability");
        }
        function.config_write(at + 4, &0xfee0_0000_u32.to_le_bytes()).unwrap();
        let mut control = [0; 2];
        function.config_read(at + 2, &mut control).unwrap();
        function.config_write(at + 2, &(u16::from_le_bytes(control) | 1).to_le_bytes()).unwrap();
    }

    fn told(&mut self) -> Vec<Told> {
        self.registers.poll();
        self.registers.function_mut().sink_mut().take()
    }

    /// One MSI, for the interrupt status `bits`, which are acknowledged.
    #[track_caller]
    fn await_message(&mut self, bits: u64) {
        let mut told = Vec::new();
        wait_until("the message", AMPLE, || {
            told.extend(self.told());
            !told.is_empty()
        });
        assert!(matches!(told[..], [Told::Message(_)]), "{told:?}");
        assert_eq!(self.read(INTERRUPT_STATUS), bits);
        self.write(ACKNOWLEDGE, bits);
        assert_eq!(self.read(INTERRUPT_STATUS), 0);
    }

    fn start_dma(&mut self, source: u64, destination: u64, count: u64, command: u64) {
        for (register, value) in [(SOURCE, source), (DESTINATION, destination), (COUNT, count), (COMMAND, START | command)] {
            self.registers.write(register, Width::B8, value);
        }
    }

    #[track_caller]
    fn await_dma(&mut self) {
        wait_until("the end of a DMA", AMPLE, || self.registers.read(COMMAND, Width::B8) & START == 0);
    }

    #[track_caller]
    fn dma(&mut self, source: u64, destination: u64, count: u64, direction: u64) {
        self.start_dma(source, destination, count, direction);
        self.await_dma();
    }

    fn bytes(&self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.memory.read(at, &mut bytes).unwrap();
        bytes
    }

    fn dirty(&mut self) -> Vec<u64> {
        let memory = Arc::clone(&self.memory);
        let mut pages = Vec::new();
        self.registers.function_mut().dirty_log(&memory).unwrap().take(|page| pages.push(page));
        pages
    }
}

fn pattern(seed: u64, len: u64) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + seed * 31 + 1) as u8).collect()
}

#[test]
#[ignore = "needs a PCI device behind an IOMMU; ci/softroce --pci has it"]
fn a_real_edu_computes_moves_memory_both_ways_and_interrupts_by_msi() {
    let mut machine = Machine::new();
    assert_eq!(machine.read(IDENTIFICATION) & 0xff, 0xed);
    machine.write(LIVENESS, 0x1234_5678);
    assert_eq!(machine.read(LIVENESS), !0x1234_5678 & 0xffff_ffff);
    machine.enable_msi();
    machine.write(STATUS, 0x80);
    machine.write(FACTORIAL, 12);
    machine.await_message(1);
    assert_eq!(machine.read(FACTORIAL), 479_001_600);

    for round in 0..6 {
        // Never 4,096 bytes, and both within pages and across them.
        let (len, from, to) = (1 + round * 811, 0x100 + round * 64, 0x8ff0 + round * 96);
        let bytes = pattern(round, len);
        machine.memory.write(from, &bytes).unwrap();
        machine.memory.write(to - 8, &vec![0xaa; len as usize + 16]).unwrap();
        machine.dma(BASE + from, BUFFER, len, 0);
        machine.start_dma(BUFFER, BASE + to, len, TO_GUEST | INTERRUPT);
        machine.await_message(0x100);
        assert_eq!(machine.bytes(to, len), bytes, "round {round}");
        assert_eq!(
            (machine.bytes(to - 8, 8), machine.bytes(to + len, 8)),
            (vec![0xaa; 8], vec![0xaa; 8]),
            "round {round}: beside it"
        );
    }
    assert_eq!(machine.lent.counters.dma_faults.load(Ordering::Relaxed), 0);
    assert_eq!(machine.lent.counters.interrupts.load(Ordering::Relaxed), 7);
}

#[test]
#[ignore = "needs a PCI device behind an IOMMU; ci/softroce --pci has it"]
fn a_real_pin_rises_until_the_driver_has_looked_after_the_device() {
    let mut machine = Machine::new();
    for round in 0..3 {
        machine.write(RAISE, 1 << round);
        let mut told = Vec::new();
        wait_until("the pin", AMPLE, || {
            told.extend(machine.told());
            told.last() == Some(&Told::Pin(true))
        });
        // Looking alone does not lower it for long: the device insists.
        assert_eq!(machine.read(INTERRUPT_STATUS), 1 << round);
        told.clear();
        wait_until("the pin again", AMPLE, || {
            told.extend(machine.told());
            told.last() == Some(&Told::Pin(true))
        });
        machine.write(ACKNOWLEDGE, 1 << round);
        assert_eq!(machine.read(INTERRUPT_STATUS), 0);
        std::thread::sleep(Duration::from_millis(50));
        told.extend(machine.told());
        assert_eq!(told.last(), Some(&Told::Pin(false)), "round {round}: {told:?}");
    }
}

#[test]
#[ignore = "needs a PCI device behind an IOMMU; ci/softroce --pci has it"]
fn what_is_unmapped_or_was_never_mapped_faults_and_is_counted_and_no_byte_moves() {
    let mut machine = Machine::new();
    machine.memory.write(0, &pattern(1, 2048)).unwrap();
    machine.dma(BASE, BUFFER, 2048, 0);
    let memory = Arc::clone(&machine.memory);

    assert!(!lands_after_unmap(&mut machine), "a byte landed after the unmap was acknowledged");
    assert_eq!(machine.lent.counters.windows.load(Ordering::Relaxed), 0);
    wait_until("the fault", AMPLE, || machine.lent.counters.dma_faults.load(Ordering::Relaxed) >= 1);

    // Read-only memory is not written.
    let read_only = Window {
        iova: Iova(BASE),
        len: BYTES,
        access: Access::READ,
        memory: WindowMemory::Mapped { memory: Arc::clone(&memory), offset: 0, proven: true },
    };
    machine.registers.function_mut().map(read_only.clone()).unwrap();
    let before = machine.lent.counters.dma_faults.load(Ordering::Relaxed);
    machine.dma(BUFFER, BASE + 0x6000, 1024, TO_GUEST);
    assert_eq!(machine.bytes(0x6000, 1024), [0; 1024]);
    wait_until("the second fault", AMPLE, || machine.lent.counters.dma_faults.load(Ordering::Relaxed) > before);

    // And where the IOMMU has no addresses, there is no window.
    let msi_range = Window { iova: Iova(0xfee0_0000), ..read_only };
    let refused = machine.registers.function_mut().map(msi_range);
    assert!(matches!(refused, Err(MapError::Attachment(_))), "{refused:?}");
    assert!(machine.registers.function_mut().attachment_mut().gone().is_none());
}

/// Whether the device, which needs 100 ms for it, writes to memory whose unmap was acknowledged meanwhile.
fn lands_after_unmap(machine: &mut Machine) -> bool {
    machine.memory.write(0x4000, &[0xaa; 2048]).unwrap();
    machine.start_dma(BUFFER, BASE + 0x4000, 2048, TO_GUEST);
    machine.registers.function_mut().unmap(Iova(BASE), BYTES).unwrap();
    let at_unmap = machine.bytes(0x4000, 2048);
    machine.await_dma();
    machine.bytes(0x4000, 2048) != at_unmap
}

/// Whether it writes to memory after its reset was acknowledged.
fn lands_after_reset(machine: &mut Machine) -> bool {
    machine.memory.write(0x4000, &[0xaa; 2048]).unwrap();
    machine.start_dma(BUFFER, BASE + 0x4000, 2048, TO_GUEST);
    machine.registers.function_mut().reset(ResetKind::Function).unwrap();
    let at_reset = machine.bytes(0x4000, 2048);
    std::thread::sleep(Duration::from_millis(500));
    machine.bytes(0x4000, 2048) != at_reset
}

#[test]
#[ignore = "needs a PCI device behind an IOMMU; ci/softroce --pci has it"]
fn what_was_under_way_does_not_land_after_a_reset() {
    let mut machine = Machine::new();
    machine.memory.write(0, &pattern(1, 2048)).unwrap();
    machine.dma(BASE, BUFFER, 2048, 0);
    assert!(!lands_after_reset(&mut machine));
}

#[test]
#[ignore = "needs a PCI device behind an IOMMU; ci/softroce --pci has it"]
fn a_backend_that_leaves_the_device_in_memory_is_found_out() {
    let moved = |leave_out| {
        let mut machine = Machine::careless(leave_out);
        machine.memory.write(0, &pattern(1, 2048)).unwrap();
        machine.dma(BASE, BUFFER, 2048, 0);
        machine
    };
    assert!(lands_after_reset(&mut moved(LeaveOut::Quiet)), "nobody noticed");
    // The memory itself knows that somebody is in it: the unmap is not done, whatever the lender acknowledged.
    let mut machine = moved(LeaveOut::Unmap);
    let refused = machine.registers.function_mut().unmap(Iova(BASE), BYTES);
    assert!(matches!(refused, Err(MapError::Attachment(AttachmentError::Refused(_)))), "{refused:?}");
}

#[test]
#[ignore = "needs a PCI device behind an IOMMU; ci/softroce --pci has it"]
fn what_hardware_may_write_counts_as_written_until_it_is_unmapped_and_once_more() {
    let mut machine = Machine::new();
    let all: Vec<u64> = (0..BYTES / PAGE_BYTES).collect();
    assert_eq!(machine.dirty(), all);
    assert_eq!(machine.dirty(), all);
    let memory = Arc::clone(&machine.memory);
    // A second window onto the middle of it, and then only that one.
    let middle = Window {
        iova: Iova(BASE + BYTES),
        len: 4 * PAGE_BYTES,
        access: Access::READ_WRITE,
        memory: WindowMemory::Mapped { memory: Arc::clone(&memory), offset: 4 * PAGE_BYTES, proven: true },
    };
    machine.registers.function_mut().map(middle).unwrap();
    machine.registers.function_mut().unmap(Iova(BASE), BYTES).unwrap();
    assert_eq!(machine.dirty(), all);
    assert_eq!(machine.dirty(), [4, 5, 6, 7]);
    machine.registers.function_mut().unmap(Iova(BASE + BYTES), 4 * PAGE_BYTES).unwrap();
    assert_eq!(machine.dirty(), [4, 5, 6, 7]);
    let mut left = 0;
    if let Some(log) = machine.registers.function_mut().dirty_log(&memory) {
        log.take(|_| left += 1);
    }
    assert_eq!(left, 0);
}

#[test]
#[ignore = "needs a PCI device behind an IOMMU; ci/softroce --pci has it"]
fn bus_mastering_is_the_drivers_to_switch_and_off_when_the_borrower_has_gone() {
    let edu = lab("FARBUS_LAB_EDU");
    let mut machine = Machine::new();
    assert_eq!(machine.read(IDENTIFICATION) & 0xff, 0xed);
    assert!(is_bus_master(&edu));
    machine.registers.function_mut().config_write(4, &2_u16.to_le_bytes()).unwrap();
    assert_eq!(machine.read(IDENTIFICATION) & 0xff, 0xed);
    assert!(!is_bus_master(&edu));
    machine.memory.write(0, &[0x55; 64]).unwrap();
    machine.dma(BUFFER, BASE, 64, TO_GUEST);
    assert_eq!(machine.bytes(0, 64), [0x55; 64], "DMA without bus mastering");
    machine.registers.function_mut().config_write(4, &6_u16.to_le_bytes()).unwrap();
    machine.registers.function_mut().poll(Nanos::now());
    assert_eq!(machine.read(IDENTIFICATION) & 0xff, 0xed);
    assert!(is_bus_master(&edu));
    let Machine { registers, lent, .. } = machine;
    drop(registers);
    drop(lent);
    assert!(!is_bus_master(&edu));
}
