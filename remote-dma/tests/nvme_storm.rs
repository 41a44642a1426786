//! Many commands at once on eight queues, each checked against a model of the image; and what no guest may achieve with random bytes.
//!
//! Lane 5 owns blocks 2,560 to 3,071: it writes 7 blocks from two pages, zeroes 3, compares, reads all back and finds what its model says, while the
//! other lanes do the same on late or immediate buses, in memory, in a file, with and without mapped guest memory.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod nvme_support;

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use farbus_remote_dma::model::nvme::media::FileMedia;
use farbus_remote_dma::model::{Nvme, NvmeOptions};
use farbus_remote_dma::{Backend, BarAddress, ResetKind, Width};
use farbus_transport::Memory;
use nvme_support::bus::{Random, TestBus};
use nvme_support::driver::{Driver, PAGE, Sqe};
use proptest::prelude::*;

const LANES: usize = 24;
const LANE_BLOCKS: u64 = 512;
const IMAGE_BYTES: u64 = LANES as u64 * LANE_BLOCKS * 512;
const LANE_PAGES: u64 = LANE_BLOCKS / 8 + 1;

/// What a lane has asked for.
enum Asked {
    Nothing,
    Read { block: u64, blocks: u64, offset: u64 },
    Changed { block: u64, bytes: Vec<u8> },
    Compared { equal: bool },
    Flushed,
}

struct Lane {
    model: Vec<u8>,
    pages: Vec<u64>,
    list: u64,
    asked: Asked,
    identifier: u16,
}

impl Lane {
    /// Bytes of guest memory, by page and offset.
    fn guest(&self, driver: &Driver, offset: u64, len: u64) -> Vec<u8> {
        (offset..offset + len)
            .step_by(512)
            .flat_map(|at| {
                let len = 512.min(offset + len - at);
                let (first, second) = (at % PAGE, (at % PAGE + len).saturating_sub(PAGE));
                let page = self.pages[(at / PAGE) as usize];
                let mut bytes = driver.guest_bytes(page + first, (len - second) as usize);
                if second > 0 {
                    bytes.extend(driver.guest_bytes(self.pages[(at / PAGE) as usize + 1], second as usize));
                }
                bytes
            })
            .collect()
    }

    fn fill(&self, driver: &Driver, offset: u64, bytes: &[u8]) {
        for (at, byte) in (offset..).zip(bytes) {
            let page = self.pages[(at / PAGE) as usize];
            driver.bus.guest.write(page + at % PAGE, &[*byte]).unwrap();
        }
    }

    fn prps(&self, driver: &Driver, offset: u64, len: u64, list_at: u64) -> (u64, u64) {
        let used = (offset + len).div_ceil(PAGE) as usize;
        match used {
            1 => (self.pages[0] + offset, 0xdead_0000),
            2 => (self.pages[0] + offset, self.pages[1]),
            _ => {
                // The list starts late in its page, so that longer ones chain to the second page.
                let mut at = self.list + list_at;
                for (index, page) in self.pages[1..used].iter().enumerate() {
                    if (at + 8).is_multiple_of(PAGE) && index + 2 < used {
                        driver.bus.guest.write(at, &(self.list + PAGE).to_le_bytes()).unwrap();
                        at = self.list + PAGE;
                    }
                    driver.bus.guest.write(at, &page.to_le_bytes()).unwrap();
                    at += 8;
                }
                (self.pages[0] + offset, self.list + list_at)
            }
        }
    }

    fn ask(&mut self, number: usize, driver: &mut Driver, random: &mut Random) {
        let block = random.below(LANE_BLOCKS);
        let most = [8, 32, 512][random.below(3) as usize];
        let blocks = 1 + random.below(most.min(LANE_BLOCKS - block));
        let (from, len) = ((block * 512) as usize, blocks * 512);
        let offset = random.below(PAGE / 4) * 4;
        let list_at = PAGE - 8 * (1 + random.below(12));
        let lba = number as u64 * LANE_BLOCKS + block;
        let range = from..from + len as usize;
        let (prp1, prp2) = self.prps(driver, offset, len, list_at);
        let sqe = |opcode| Sqe { prp1, prp2, ..Sqe::io(opcode, lba, blocks as u32) };
        let sqe = match random.below(16) {
            0..6 => {
                self.asked = Asked::Read { block, blocks, offset };
                sqe(2)
            }
            6..11 => {
                let seed = random.next();
                let bytes: Vec<u8> = (0..len).map(|at| (seed >> (at % 57)) as u8 ^ (at / 512) as u8).collect();
                self.fill(driver, offset, &bytes);
                self.asked = Asked::Changed { block, bytes };
                let mut write = sqe(1);
                write.dwords[2] |= u32::from(random.below(8) == 0) << 30;
                write
            }
            11 | 12 => {
                let mut bytes = self.model[range].to_vec();
                let equal = random.below(2) == 0;
                if !equal {
                    let at = random.below(len) as usize;
                    bytes[at] ^= 1;
                }
                self.fill(driver, offset, &bytes);
                self.asked = Asked::Compared { equal };
                sqe(5)
            }
            13 => {
                let bytes = vec![0; len as usize];
                self.asked = Asked::Changed { block, bytes };
                let mut zeroes = sqe(8);
                zeroes.dwords[2] |= (random.below(4) as u32) << 25 & 1 << 25;
                zeroes
            }
            14 => {
                let mut range = [0; 16];
                range[4..8].copy_from_slice(&(blocks as u32).to_le_bytes());
                range[8..].copy_from_slice(&lba.to_le_bytes());
                driver.bus.guest.write(self.pages[0], &range).unwrap();
                let bytes = vec![0; len as usize];
                self.asked = Asked::Changed { block, bytes };
                Sqe { opcode: 9, namespace: 1, prp1: self.pages[0], dwords: [0, 4, 0, 0, 0, 0], ..Sqe::default() }
            }
            _ => {
                self.asked = Asked::Flushed;
                Sqe::io(0, 0, 1)
            }
        };
        let queue = 1 + (number % 8) as u16;
        self.identifier = driver.put(queue, &sqe);
        driver.ring(queue);
    }

    fn answered(&mut self, status: u16, driver: &Driver) {
        match std::mem::replace(&mut self.asked, Asked::Nothing) {
            Asked::Nothing => panic!("a completion that nobody waits for"),
            Asked::Compared { equal } => assert_eq!(status, if equal { 0 } else { 0x285 }),
            _ if status != 0 => panic!("status {status:#x}"),
            Asked::Flushed => {}
            Asked::Changed { block, bytes } => {
                let from = (block * 512) as usize;
                self.model[from..from + bytes.len()].copy_from_slice(&bytes);
            }
            Asked::Read { block, blocks, offset } => {
                let from = (block * 512) as usize;
                let seen = self.guest(driver, offset, blocks * 512);
                assert!(seen == self.model[from..from + seen.len()], "wrong data in blocks {block} + {blocks}");
            }
        }
    }
}

fn storm(nvme: Nvme, bus: TestBus, seed: u64, commands: u32) -> Driver {
    let mut driver = Driver::ready(nvme, bus, 8, 8);
    let mut random = Random(seed | 1);
    let mut lanes: Vec<Lane> = (0..LANES)
        .map(|_| Lane {
            model: vec![0; (LANE_BLOCKS * 512) as usize],
            // Some neighbours, some apart.
            pages: (0..LANE_PAGES)
                .map(|page| {
                    if page % 5 == 3 {
                        driver.pages(1);
                    }
                    driver.pages(1)
                })
                .collect(),
            list: driver.pages(2),
            asked: Asked::Nothing,
            identifier: 0,
        })
        .collect();
    let (mut asked, mut answered) = (0, 0);
    while answered < commands {
        for (number, lane) in lanes.iter_mut().enumerate() {
            if asked < commands && matches!(lane.asked, Asked::Nothing) {
                lane.ask(number, &mut driver, &mut random);
                asked += 1;
            }
        }
        driver.turn();
        for queue in 1..=8 {
            while let Some(entry) = driver.take(queue) {
                let lane = lanes
                    .iter_mut()
                    .find(|lane| lane.identifier == entry.identifier && !matches!(lane.asked, Asked::Nothing))
                    .unwrap();
                lane.answered(entry.status, &driver);
                answered += 1;
                if random.below(3) > 0 {
                    driver.ring_completion(queue);
                }
            }
            driver.ring_completion(queue);
        }
    }
    driver.settle();
    let counters = *driver.nvme.counters();
    assert_eq!(counters.accepted, counters.completed + counters.dropped);
    assert_eq!((driver.nvme.in_flight(), counters.late_faults, counters.fatal), (0, 0, 0));
    driver
}

fn bus() -> TestBus {
    TestBus::new(64 << 20)
}

#[test]
fn memory_is_right_on_an_immediate_bus() {
    let image = Memory::memfd("image", IMAGE_BYTES).unwrap();
    let nvme = Nvme::in_memory(image, NvmeOptions::default()).unwrap();
    let driver = storm(nvme, bus(), 11, 3000);
    assert!(driver.nvme.counters().queue_full == 0);
}

#[test]
fn memory_is_right_on_late_buses() {
    for seed in 0..6 {
        let image = Memory::memfd("image", IMAGE_BYTES).unwrap();
        let nvme = Nvme::in_memory(image, NvmeOptions::default()).unwrap();
        storm(nvme, bus().late(seed), seed + 100, 600);
    }
}

fn file() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(IMAGE_BYTES).unwrap();
    file
}

/// With workers, also where temporary files are in memory.
fn over_file(file: &tempfile::NamedTempFile, options: NvmeOptions) -> Nvme {
    let media = FileMedia::open(file.path(), options.read_only).unwrap();
    Nvme::over("file", Box::new(media), options).unwrap()
}

#[test]
fn a_file_is_right_by_direct_access() {
    for late in [false, true] {
        let file = file();
        let nvme = over_file(&file, NvmeOptions::default());
        let driver = storm(nvme, if late { bus().late(3) } else { bus() }, 12, 1500);
        let counters = driver.nvme.counters();
        assert!(counters.direct_jobs > 500 && counters.writes > 200, "{counters:?}");
        assert!(!driver.bus.direct.is_clean(), "direct writes go into the dirty log");
    }
}

#[test]
fn a_file_is_right_through_buffers() {
    for late in [false, true] {
        let file = file();
        let nvme = over_file(&file, NvmeOptions::default());
        let mut bus = if late { bus().late(4) } else { bus() };
        bus.mappable = false;
        let driver = storm(nvme, bus, 13, 1500);
        assert_eq!(driver.nvme.counters().direct_jobs, 0);
        assert!(driver.bus.direct.is_clean());
    }
}

#[test]
fn modelled_latency_changes_no_data() {
    let image = Memory::memfd("image", IMAGE_BYTES).unwrap();
    let options = NvmeOptions { latency: Duration::from_micros(80), ..NvmeOptions::default() };
    storm(Nvme::in_memory(image, options).unwrap(), bus().late(9), 14, 600);
}

/// Resets while everything is under way: all is dropped or done, nothing comes later, and the next life works.
#[test]
fn a_reset_under_io_leaves_nothing_behind() {
    for seed in 1..20 {
        let file = file();
        let mut random = Random(seed * 77 + 1);
        let in_memory = seed % 2 == 0;
        let nvme = if in_memory {
            Nvme::in_memory(Memory::memfd("image", IMAGE_BYTES).unwrap(), NvmeOptions::default()).unwrap()
        } else {
            over_file(&file, NvmeOptions::default())
        };
        let mut bus = bus().late(seed);
        bus.mappable = seed % 3 == 0;
        let mut driver = Driver::ready(nvme, bus, 4, 64);
        let data = driver.pages(64);
        for round in 0..3 {
            for command in 0..120_u64 {
                let queue = 1 + (command % 4) as u16;
                let sqe = Sqe {
                    prp1: data + random.below(32) * PAGE,
                    prp2: data + 63 * PAGE,
                    ..Sqe::io(1 + (command % 2) as u8, random.below(1000), 16)
                };
                driver.put(queue, &sqe);
                driver.ring(queue);
                if random.below(4) == 0 {
                    driver.turn();
                }
            }
            if round == 1 {
                // The session's way: fence, wait, reset.
                driver.nvme.fence();
                let dmas = driver.bus.dmas;
                driver.until(|driver| driver.nvme.in_flight() == 0);
                assert_eq!(driver.bus.dmas, dmas, "a fenced device starts nothing");
                driver.nvme.reset(ResetKind::Function, &mut driver.bus);
                driver.nvme.set_interrupt_mode(farbus_remote_dma::InterruptMode::Msix, &mut driver.bus);
                assert_eq!(driver.status(), 0);
            } else {
                driver.disable();
                assert_eq!(driver.nvme.in_flight(), 0);
            }
            let counters = *driver.nvme.counters();
            assert_eq!(counters.accepted, counters.completed + counters.dropped);
            driver.enable();
            for queue in 1..=4 {
                assert_eq!(driver.create(queue, 64), 0);
            }
        }
        let check = Sqe { prp1: data, ..Sqe::io(2, 0, 8) };
        assert_eq!(driver.run(3, check).status, 0);
        // The borrower leaves mid-way; the next one finds a controller as after power-on.
        for _ in 0..20 {
            driver.put(1, &check);
        }
        driver.ring(1);
        driver.nvme.detach();
        driver.bus.end();
        assert_eq!(driver.nvme.in_flight(), 0);
        driver.nvme.attach(&mut driver.bus).unwrap();
        driver.nvme.set_interrupt_mode(farbus_remote_dma::InterruptMode::Msix, &mut driver.bus);
        assert_eq!(driver.status(), 0);
        driver.enable();
        assert_eq!(driver.create(1, 16), 0);
        assert_eq!(driver.run(1, check).status, 0);
    }
}

#[derive(Clone, Debug)]
enum Deed {
    Register(u16, u8, u64),
    Doorbell(u8, u16),
    Command { queue: u8, bytes: Vec<u8> },
    Plausible { queue: u8, opcode: u8, prp1: u64, prp2: u64, dwords: [u32; 3] },
    Turn(u8),
    Take(u8),
    Enable,
    Fence,
}

fn deed() -> impl Strategy<Value = Deed> {
    let address = prop_oneof![0_u64..1 << 24, any::<u64>(), (0_u64..1 << 12).prop_map(|page| page << 12)];
    prop_oneof![
        1 => (0_u16..0x4000, 0_u8..4, any::<u64>()).prop_map(|(at, width, value)| Deed::Register(at, width, value)),
        1 => (0_u16..0x40, 0_u8..4, any::<u64>()).prop_map(|(at, width, value)| Deed::Register(at, width, value)),
        3 => (0_u8..140, 0_u16..40).prop_map(|(index, value)| Deed::Doorbell(index, value)),
        4 => (0_u8..4, proptest::collection::vec(any::<u8>(), 64)).prop_map(|(queue, bytes)| Deed::Command { queue, bytes }),
        12 => (0_u8..4, 0_u8..14, address.clone(), address, any::<[u16; 6]>()).prop_map(|(queue, opcode, prp1, prp2, small)| Deed::Plausible {
            queue, opcode, prp1, prp2,
            dwords: [u32::from(small[0] % 80) | u32::from(small[1] % 64) << 16, u32::from(small[2] % 8) | u32::from(small[3] % 70) << 16, u32::from(small[4] % 3000) | u32::from(small[5] & 0x4200) << 16],
        }),
        6 => (1_u8..20).prop_map(Deed::Turn),
        4 => (0_u8..4).prop_map(Deed::Take),
        1 => Just(Deed::Enable),
        1 => Just(Deed::Fence),
    ]
}

fn misbehave(nvme: Nvme, mut bus: TestBus, faults: u64, deeds: &[Deed]) -> Result<(), TestCaseError> {
    bus.holes.push(0x40_0000..0x48_0000);
    let mut driver = Driver::ready(nvme, bus, 3, 16);
    driver.bus.late_faults_permille = faults;
    let mut seen = std::collections::HashMap::new();
    for deed in deeds {
        match deed {
            Deed::Register(at, width, value) => {
                let width = [Width::B1, Width::B2, Width::B4, Width::B8][usize::from(*width)];
                let at = u64::from(*at) & !(width.bytes() - 1);
                driver.write_register(at, width, width.truncate(*value));
                driver.read_register(at, width);
            }
            Deed::Doorbell(index, value) => driver.write_register(0x1000 + u64::from(*index) * 4, Width::B4, u64::from(*value)),
            Deed::Command { queue, bytes } => {
                let bytes: [u8; 64] = bytes.as_slice().try_into().unwrap();
                driver.put_bytes(u16::from(*queue), &bytes);
                driver.ring(u16::from(*queue));
            }
            Deed::Plausible { queue, opcode, prp1, prp2, dwords } => {
                let [a, b, c] = *dwords;
                let sqe = Sqe { opcode: *opcode, namespace: 1, prp1: *prp1, prp2: *prp2, dwords: [a, b, c, 0, 0, 0] };
                let identifier = driver.put(u16::from(*queue), &sqe);
                *seen.entry(identifier).or_insert(0) += 0;
                driver.ring(u16::from(*queue));
            }
            Deed::Turn(count) => (0..*count).for_each(|_| {
                driver.turn();
            }),
            Deed::Take(queue) => {
                while driver.take(u16::from(*queue)).is_some() {}
                driver.ring_completion(u16::from(*queue));
            }
            Deed::Enable => {
                driver.write_register(0x14, Width::B4, 0x0046_0000);
                driver.settle();
                prop_assert_eq!(driver.status() & 3, 0);
                let (pages, holes) = (driver.pages(2), std::mem::take(&mut driver.bus.holes));
                driver.bus.guest.write(pages, &[0; 8192]).unwrap();
                driver.write_register(0x24, Width::B4, 0x000f_000f);
                driver.write_register(0x28, Width::B8, pages);
                driver.write_register(0x30, Width::B8, pages + PAGE);
                driver.write_register(0x14, Width::B4, 0x0046_0001);
                driver.bus.holes = holes;
            }
            Deed::Fence => {
                driver.nvme.fence();
                driver.until(|driver| driver.nvme.in_flight() == 0);
                driver.nvme.reset(ResetKind::Conventional, &mut driver.bus);
            }
        }
    }
    let counters = *driver.nvme.counters();
    prop_assert!(counters.accepted >= counters.completed + counters.dropped);
    // Whatever was done: a reset brings the controller back.
    driver.bus.late_faults_permille = 0;
    driver.write_register(0x14, Width::B4, 0);
    driver.settle();
    prop_assert_eq!((driver.status() & 3, driver.nvme.in_flight()), (0, 0));
    let counters = *driver.nvme.counters();
    prop_assert_eq!(counters.accepted, counters.completed + counters.dropped);
    driver.bus.holes.clear();
    driver.nvme.set_interrupt_mode(farbus_remote_dma::InterruptMode::Msix, &mut driver.bus);
    driver.enable();
    let (entry, _) = driver.identify(1, 0);
    prop_assert_eq!(entry.status, 0);
    Ok(())
}

/// 128 cases, or as many as PROPTEST_CASES says.
fn fuzz_config() -> ProptestConfig {
    let default = ProptestConfig::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { default.cases } else { 128 };
    ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 200, max_shrink_time: 20_000, ..default }
}

proptest! {
    #![proptest_config(fuzz_config())]

    #[test]
    fn no_guest_can_upset_a_controller_over_memory(late: bool, seed: u64, faults in 0_u64..50, deeds in proptest::collection::vec(deed(), 1..160)) {
        let image = Memory::memfd("image", 1 << 20).unwrap();
        let nvme = Nvme::in_memory(Arc::clone(&image), NvmeOptions::default()).unwrap();
        let bus = if late { TestBus::new(16 << 20).late(seed) } else { TestBus::new(16 << 20) };
        misbehave(nvme, bus, faults, &deeds)?;
    }

    #[test]
    fn no_guest_can_upset_a_controller_over_a_file(late: bool, mappable: bool, latency in 0_u64..3, seed: u64, faults in 0_u64..50, deeds in proptest::collection::vec(deed(), 1..120)) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&vec![7; 1 << 20]).unwrap();
        let options = NvmeOptions { latency: Duration::from_micros(latency * 20), ..NvmeOptions::default() };
        let nvme = over_file(&file, options);
        let mut bus = if late { TestBus::new(16 << 20).late(seed) } else { TestBus::new(16 << 20) };
        bus.mappable = mappable;
        misbehave(nvme, bus, faults, &deeds)?;
        // No write of the guest made the image longer or shorter.
        prop_assert_eq!(file.as_file().metadata().unwrap().len(), 1 << 20);
    }
}

/// The twin of the storm: a device that answers from the wrong block is found out.
#[test]
#[should_panic(expected = "wrong data")]
fn a_storm_notices_a_block_that_changed_by_itself() {
    let image = Memory::memfd("image", IMAGE_BYTES).unwrap();
    for block in 0..IMAGE_BYTES / 512 {
        image.write(block * 512, b"not zero").unwrap();
    }
    storm(Nvme::in_memory(image, NvmeOptions::default()).unwrap(), bus(), 15, 300);
}

/// The twin of the late storms: the controller posts a completion behind its data without waiting for it, which is right only on a bus that
/// keeps that order. On one that does not, the driver finds old data.
#[test]
#[should_panic(expected = "wrong data")]
fn a_storm_notices_completions_that_overtake_their_data() {
    let image = Memory::memfd("image", IMAGE_BYTES).unwrap();
    let mut bus = bus().late(21);
    bus.overtaking = true;
    storm(Nvme::in_memory(image, NvmeOptions::default()).unwrap(), bus, 16, 2000);
}

#[test]
fn accesses_outside_bar_0_mean_nothing() {
    let image = Memory::memfd("image", 1 << 20).unwrap();
    let mut driver = Driver::ready(Nvme::in_memory(image, NvmeOptions::default()).unwrap(), bus(), 1, 16);
    let at = BarAddress { bar: 3, offset: 0x1000 };
    driver.nvme.bar_write(at, Width::B4, 5, &mut driver.bus);
    assert_eq!(driver.nvme.bar_read(at, Width::B4, &mut driver.bus), 0);
    assert_eq!(driver.nvme.counters().ignored_accesses, 2);
}
