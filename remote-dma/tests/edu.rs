//! The edu device: registers as its document says, DMA both ways on immediate and late buses, and no harm from any write.
//!
//! 256 bytes go from guest page 2 to the buffer's offset 16 and from there to page 3, each with interrupt 0x100.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod nvme_support;

use farbus_remote_dma::model::Edu;
use farbus_remote_dma::{Backend, BarAddress, InterruptMode, ResetKind, Width};
use nvme_support::bus::TestBus;
use proptest::prelude::*;

struct Machine {
    edu: Edu,
    bus: TestBus,
}

impl Machine {
    fn new(bus: TestBus) -> Self {
        let mut machine = Self { edu: Edu::new().unwrap(), bus };
        machine.edu.attach(&mut machine.bus).unwrap();
        machine
    }

    fn write(&mut self, offset: u64, width: Width, value: u64) {
        self.edu.bar_write(BarAddress { bar: 0, offset }, width, value, &mut self.bus);
    }

    fn read(&mut self, offset: u64, width: Width) -> u64 {
        self.edu.bar_read(BarAddress { bar: 0, offset }, width, &mut self.bus)
    }

    fn dma(&mut self, source: u64, destination: u64, count: u64, command: u64) {
        self.write(0x80, Width::B8, source);
        self.write(0x88, Width::B8, destination);
        self.write(0x90, Width::B8, count);
        self.write(0x98, Width::B8, command);
        self.settle();
    }

    fn settle(&mut self) {
        while self.bus.advance(&mut self.edu, 1) {}
    }
}

#[test]
fn registers_answer_as_the_document_says() {
    let mut machine = Machine::new(TestBus::new(1 << 20));
    assert_eq!(machine.read(0, Width::B4), 0x0100_00ed);
    machine.write(4, Width::B4, 0x1234_5678);
    assert_eq!(machine.read(4, Width::B4), 0xedcb_a987);
    machine.write(0x20, Width::B4, 0x80);
    machine.write(8, Width::B4, 5);
    assert_eq!(machine.read(0x20, Width::B4), 0x81);
    machine.edu.poll(&mut machine.bus);
    assert_eq!((machine.read(8, Width::B4), machine.read(0x20, Width::B4)), (120, 0x80));
    assert!(machine.bus.pin);
    assert_eq!(machine.read(0x24, Width::B4), 1);
    machine.write(0x60, Width::B4, 0x30);
    machine.write(0x64, Width::B4, 0x21);
    assert!(machine.bus.pin && machine.read(0x24, Width::B4) == 0x10);
    machine.write(0x64, Width::B4, 0x10);
    assert!(!machine.bus.pin);
    machine.edu.set_interrupt_mode(InterruptMode::Msi(1), &mut machine.bus);
    machine.write(0x60, Width::B4, 1);
    assert_eq!(machine.bus.interrupts, [0]);
    assert_eq!(machine.read(0x24, Width::B2), 0xffff);
    machine.edu.fence();
    machine.edu.reset(ResetKind::Function, &mut machine.bus);
    assert_eq!((machine.read(0x24, Width::B4), machine.read(4, Width::B4)), (0, 0));
}

#[test]
fn dma_goes_both_ways() {
    for late in [false, true] {
        let bus = TestBus::new(1 << 20);
        let mut machine = Machine::new(if late { bus.late(5) } else { bus });
        let data: Vec<u8> = (0..=255).collect();
        machine.bus.guest.write(0x2000, &data).unwrap();
        machine.dma(0x2000, 0x4_0010, 256, 0b101);
        assert_eq!(machine.read(0x98, Width::B8), 0b100);
        assert_eq!(machine.read(0x24, Width::B4), 0x100);
        machine.dma(0x4_0010, 0x3000, 256, 0b011);
        let mut seen = vec![0; 256];
        machine.bus.guest.read(0x3000, &mut seen).unwrap();
        assert_eq!(seen, data);
        // All of the buffer may go at once.
        machine.dma(0x4_0000, 0x5000, 4096, 0b011);
        assert_eq!(machine.edu.counters().dmas, 3);
        machine.bus.guest.read(0x5010, &mut seen).unwrap();
        assert_eq!(seen, data);
    }
}

#[test]
fn ranges_outside_are_refused_and_harm_nobody() {
    let mut machine = Machine::new(TestBus::new(1 << 20));
    machine.bus.guest.write(0x2000, &[7; 4096]).unwrap();
    for (source, destination, count) in [
        (0x2000, 0x4_0000, 4097),
        (0x2000, 0x4_0ffc, 8),
        (0x2000, 0x3_fffc, 8),
        (0x2000, 0, 8),
        (1 << 28, 0x4_0000, 8),
        ((1 << 28) - 4, 0x4_0000, 8),
        (u64::MAX, 0x4_0000, u64::MAX),
        (0x2000, 0x4_0000, 0),
        (0xff000, 0x4_0000, 4096 + 1),
        (0x80_0000, 0x4_0000, 8),
    ] {
        machine.dma(source, destination, count, 0b101);
        assert_eq!(machine.read(0x98, Width::B8) & 1, 0);
    }
    assert_eq!((machine.edu.counters().refused, machine.edu.counters().dmas), (10, 0));
    assert_eq!(machine.read(0x24, Width::B4), 0);
    machine.dma(0x4_0000, 0x6000, 4096, 0b011);
    let mut seen = vec![1; 4096];
    machine.bus.guest.read(0x6000, &mut seen).unwrap();
    assert!(seen.iter().all(|byte| *byte == 0), "a refused dma left something in the buffer");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_sequence_of_accesses_upsets_it(late: bool, seed: u64, accesses in proptest::collection::vec((0_u64..0xa0, 0_u8..4, any::<u64>(), any::<bool>()), 1..200)) {
        let bus = TestBus::new(1 << 20);
        let mut machine = Machine::new(if late { bus.late(seed) } else { bus });
        for (at, width, value, small) in accesses {
            let width = [Width::B1, Width::B2, Width::B4, Width::B8][usize::from(width)];
            let value = if small { value & 0x4_1fff } else { value };
            machine.write(at & !(width.bytes() - 1), width, value);
            machine.read(at & !(width.bytes() - 1), width);
            machine.edu.poll(&mut machine.bus);
            if value % 3 == 0 { machine.settle(); }
        }
        machine.edu.fence();
        machine.settle();
        prop_assert_eq!(machine.edu.in_flight(), 0);
        machine.edu.reset(ResetKind::Function, &mut machine.bus);
        machine.settle();
        prop_assert!(!machine.bus.pin);
        prop_assert_eq!(machine.read(0, Width::B4), 0x0100_00ed);
    }
}
