//! The NVMe controller through its public face: a driver over a test bus, against a model of the image.
//!
//! The first test is the whole way: enable, identify, two queues, write 12 KiB with a list, read it back, and find it in the image.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod nvme_support;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use farbus_remote_dma::model::nvme::media::MediaError;
use farbus_remote_dma::model::{Nvme, NvmeOptions};
use farbus_remote_dma::{Activity, Backend, InterruptMode, Width};
use farbus_transport::Memory;
use nvme_support::bus::TestBus;
use nvme_support::driver::{Driver, PAGE, Sqe};

const IMAGE_BYTES: u64 = 4 << 20;
const FLUSH: u8 = 0;
const WRITE: u8 = 1;
const READ: u8 = 2;

fn image() -> Arc<Memory> {
    Memory::memfd("test-image", IMAGE_BYTES).unwrap()
}

fn in_memory(image: &Arc<Memory>) -> Nvme {
    Nvme::in_memory(Arc::clone(image), NvmeOptions::default()).unwrap()
}

#[test]
fn a_driver_goes_the_whole_way() {
    for late in [None, Some(1), Some(2)] {
        let image = image();
        let bus = TestBus::new(32 << 20);
        let bus = match late {
            Some(seed) => bus.late(seed),
            None => bus,
        };
        let mut driver = Driver::ready(in_memory(&image), bus, 2, 64);
        let (entry, controller) = driver.identify(1, 0);
        assert_eq!(entry.status, 0);
        assert_eq!(&controller[24..35], b"farbus NVMe");
        let (_, namespace) = driver.identify(0, 1);
        assert_eq!(namespace[..8], (IMAGE_BYTES / 512).to_le_bytes());

        let pages: Vec<u64> = (0..4).map(|_| driver.pages(2)).collect();
        let data: Vec<u8> = (0..12288_u32).map(|at| (at / 7) as u8).collect();
        let mut at = 0;
        for (index, page) in pages.iter().enumerate() {
            let (from, len) = if index == 0 { (512, 3584) } else { (0, 4096.min(12288 - at)) };
            driver.bus.guest.write(page + from, &data[at..at + len]).unwrap();
            at += len;
        }
        let (prp1, prp2) = driver.prps(&pages, 512, 12288);
        let write = Sqe { prp1, prp2, ..Sqe::io(WRITE, 8, 24) };
        assert_eq!(driver.run(2, write).status, 0);
        let mut seen = vec![0; 12288];
        image.read(4096, &mut seen).unwrap();
        assert!(seen == data);

        let target = driver.pages(3);
        let (prp1, prp2) = driver.prps(&[target, target + PAGE, target + 2 * PAGE], 0, 12288);
        let read = Sqe { prp1, prp2, ..Sqe::io(READ, 8, 24) };
        assert_eq!(driver.run(1, read).status, 0);
        assert!(driver.guest_bytes(target, 12288) == data);
        assert_eq!(driver.run(1, Sqe::io(FLUSH, 0, 1)).status, 0);
        driver.settle();
        assert!(driver.bus.interrupts.contains(&1) && driver.bus.interrupts.contains(&2));
        let counters = *driver.nvme.counters();
        assert_eq!(counters.accepted, counters.completed);
        assert_eq!((counters.reads, counters.writes, counters.errors), (1, 1, 0));
    }
}

fn admin(opcode: u8, dwords: [u32; 2]) -> Sqe {
    Sqe { opcode, dwords: [dwords[0], dwords[1], 0, 0, 0, 0], ..Sqe::default() }
}

fn ready(queues: u16, entries: u32) -> Driver {
    Driver::ready(in_memory(&image()), TestBus::new(32 << 20), queues, entries)
}

fn with_latency(latency: Duration, queues: u16, entries: u32) -> Driver {
    let options = NvmeOptions { latency, ..NvmeOptions::default() };
    let nvme = Nvme::in_memory(image(), options).unwrap();
    Driver::ready(nvme, TestBus::new(32 << 20), queues, entries)
}

fn read_at(page: u64, lba: u64) -> Sqe {
    Sqe { prp1: page, ..Sqe::io(READ, lba, 8) }
}

#[test]
fn the_description_is_what_a_function_can_offer() {
    let nvme = in_memory(&image());
    let description = nvme.description();
    assert_eq!(description.validate(), Ok(()));
    assert_eq!((description.class_code, description.bar_size(0)), (0x01_0802, Some(0x4000)));
    let constants = &description.constants[0].bytes;
    let mut driver = Driver::attached(in_memory(&image()), TestBus::new(1 << 22));
    for (at, byte) in constants.iter().enumerate() {
        assert_eq!(driver.read_register(at as u64, Width::B1), u64::from(*byte), "constant byte {at}");
    }
}

#[test]
fn queues_wrap_and_phases_turn() {
    let mut driver = ready(1, 4);
    let page = driver.pages(1);
    for command in 0..1000_u32 {
        let entry = driver.run(1, read_at(page, u64::from(command)));
        assert_eq!((entry.status, u32::from(entry.queue_head)), (0, (command + 1) % 4));
    }
}

#[test]
fn a_full_completion_queue_holds_commands_back_and_loses_none() {
    let mut driver = ready(1, 1024);
    let (page, small) = (driver.pages(1), driver.pages(1));
    // Another submission queue of 64 entries into a completion queue of 4.
    let cq = driver.pages(1);
    let base = admin(5, [2 | 3 << 16, 2 << 16 | 3]);
    assert_eq!(driver.admin(Sqe { prp1: cq, ..base }).status, 0);
    let base = admin(1, [2 | 63 << 16, 2 << 16 | 1]);
    assert_eq!(driver.admin(Sqe { prp1: small, ..base }).status, 0);
    driver.queues[2].sq = small;
    driver.queues[2].entries = 64;
    let asked: Vec<u16> = (0..60).map(|lba| driver.put(2, &read_at(page, lba))).collect();
    driver.ring(2);
    driver.settle();
    assert!(driver.nvme.counters().queue_full > 0);
    driver.queues[2] = nvme_support::driver::Queue { cq, entries: 4, phase: true, ..driver.queues[2] };
    let mut answered = Vec::new();
    while answered.len() < 60 {
        driver.settle();
        let before = answered.len();
        while let Some(entry) = driver.take(2) {
            assert!(answered.len() - before < 3, "more entries than the queue holds");
            answered.push(entry.identifier);
        }
        driver.ring_completion(2);
    }
    assert_eq!(answered, asked);
    driver.settle();
    assert_eq!(driver.take(2), None);
}

#[test]
fn a_depth_of_1024_is_under_way_at_once() {
    let mut driver = with_latency(Duration::from_millis(1), 1, 1024);
    let page = driver.pages(1);
    for lba in 0..1023 {
        driver.put(1, &read_at(page, lba));
    }
    driver.ring(1);
    while driver.nvme.poll(&mut driver.bus) == Activity::Busy {}
    assert_eq!(driver.nvme.counters().reads, 1023);
    assert_eq!(driver.take(1), None);
    driver.bus.pass(Duration::from_millis(1));
    while driver.nvme.poll(&mut driver.bus) == Activity::Busy {}
    let mut taken = 0;
    while driver.take(1).is_some() {
        taken += 1;
    }
    assert_eq!(taken, 1023);
}

#[test]
fn no_command_completes_before_its_modelled_latency() {
    let latency = Duration::from_micros(80);
    let mut driver = with_latency(latency, 1, 64);
    let page = driver.pages(1);
    driver.put(1, &read_at(page, 0));
    driver.ring(1);
    assert_eq!(driver.nvme.poll(&mut driver.bus), Activity::Idle(Some(latency)));
    driver.bus.pass(latency - Duration::from_nanos(1));
    driver.nvme.poll(&mut driver.bus);
    assert_eq!(driver.take(1), None);
    driver.bus.pass(Duration::from_nanos(1));
    driver.nvme.poll(&mut driver.bus);
    assert_eq!(driver.take(1).unwrap().status, 0);
    assert_eq!(driver.nvme.poll(&mut driver.bus), Activity::Idle(None));
}

#[test]
fn abort_ends_a_command_that_waits_and_says_so_where_it_cannot() {
    let mut driver = with_latency(Duration::from_secs(1), 1, 64);
    let page = driver.pages(1);
    let victim = driver.put(1, &read_at(page, 0));
    driver.ring(1);
    let abort = admin(8, [1 | u32::from(victim) << 16, 0]);
    assert_eq!(driver.admin(abort).result, 0);
    let entry = driver.take(1).unwrap();
    assert_eq!((entry.identifier, entry.status), (victim, 0x07));
    driver.ring_completion(1);
    assert_eq!(driver.admin(abort).result, 1);
    driver.settle();
    assert_eq!(driver.take(1), None, "one completion only");
}

#[test]
fn invalid_doorbells_are_told_by_one_event_until_the_log_is_read() {
    let mut driver = ready(1, 64);
    let request = driver.put(0, &admin(0x0c, [0, 0]));
    driver.ring(0);
    assert_eq!(driver.take(0), None);
    // A queue that does not exist, then values outside queue 1.
    driver.write_register(0x1000 + 8 * 9, Width::B4, 1);
    let entry = driver.take(0).unwrap();
    assert_eq!((entry.identifier, entry.result), (request, 0x0001_0000));
    driver.ring_completion(0);
    driver.put(0, &admin(0x0c, [0, 0]));
    driver.ring(0);
    driver.write_register(0x1008, Width::B4, 64);
    driver.write_register(0x100c, Width::B4, 5);
    assert_eq!((driver.take(0), driver.nvme.counters().invalid_doorbells), (None, 3));
    // The log page is read; the event that was held back comes.
    let page = driver.pages(1);
    let base = admin(2, [1 | 15 << 16, 0]);
    driver.put(0, &Sqe { prp1: page, ..base });
    driver.ring(0);
    let results = [driver.take(0).unwrap(), driver.take(0).unwrap()].map(|entry| entry.result);
    assert!(results.contains(&0x0001_0100), "{results:x?}");
    // The fifth request is one too many.
    driver.ring_completion(0);
    for _ in 0..4 {
        driver.put(0, &admin(0x0c, [0, 0]));
    }
    driver.ring(0);
    assert_eq!(driver.take(0), None);
    assert_eq!(driver.admin(admin(0x0c, [0, 0])).status, 0x105);
}

#[test]
fn wild_queues_set_the_fatal_bit_and_a_reset_clears_it() {
    let mut driver = ready(0, 64);
    let wild = 0x7fff_0000_0000_u64;
    // A submission queue that is nowhere.
    let cq = driver.pages(1);
    let base = admin(5, [1 | 15 << 16, 3]);
    assert_eq!(driver.admin(Sqe { prp1: cq, ..base }).status, 0);
    let base = admin(1, [1 | 15 << 16, 1 << 16 | 1]);
    assert_eq!(driver.admin(Sqe { prp1: wild, ..base }).status, 0);
    driver.write_register(0x1008, Width::B4, 1);
    assert_eq!(driver.status() & 2, 2);
    driver.write_register(0x1000, Width::B4, 1);
    driver.disable();
    assert_eq!(driver.status(), 0);
    // A completion queue that is nowhere.
    driver.enable();
    let sq = driver.pages(1);
    let base = admin(5, [1 | 15 << 16, 3]);
    assert_eq!(driver.admin(Sqe { prp1: wild, ..base }).status, 0);
    let base = admin(1, [1 | 15 << 16, 1 << 16 | 1]);
    assert_eq!(driver.admin(Sqe { prp1: sq, ..base }).status, 0);
    driver.bus.guest.write(sq, &Sqe::io(FLUSH, 0, 1).bytes(1)).unwrap();
    driver.write_register(0x1008, Width::B4, 1);
    assert_eq!((driver.status() & 2, driver.nvme.counters().fatal), (2, 2));
    driver.disable();
    // Admin queues that are nowhere, and a configuration that nobody has.
    driver.write_register(0x28, Width::B8, wild);
    driver.write_register(0x14, Width::B4, 0x0046_0001);
    assert_eq!(driver.status() & 1, 1);
    driver.write_register(0x1000, Width::B4, 1);
    assert_eq!(driver.status() & 2, 2);
    driver.disable();
    driver.write_register(0x14, Width::B4, 0x0046_0071);
    assert_eq!(driver.status() & 3, 2);
    driver.write_register(0x14, Width::B4, 0);
    driver.enable();
    assert_eq!(driver.identify(1, 0).0.status, 0);
}

#[test]
fn refusals_carry_the_status_of_the_specification() {
    let mut driver = ready(1, 64);
    let page = driver.pages(1);
    let blocks = IMAGE_BYTES / 512;
    let io = |sqe: Sqe| Sqe { prp1: page, ..sqe };
    let cases = [
        (io(Sqe::io(READ, blocks - 7, 8)), 0x80),
        (io(Sqe::io(READ, u64::MAX, 8)), 0x80),
        (io(Sqe::io(READ, 0, 4096)), 0x02),
        (io(Sqe::io(0x7f, 0, 1)), 0x01),
        (Sqe { namespace: 2, ..io(Sqe::io(READ, 0, 1)) }, 0x0b),
        (Sqe { prp1: page + 2, ..Sqe::io(READ, 0, 1) }, 0x13),
        (Sqe { prp1: 0x7fff_0000_0000, ..Sqe::io(READ, 0, 1) }, 0x04),
        (Sqe { prp1: 0x7fff_0000_0000, ..Sqe::io(WRITE, 0, 1) }, 0x04),
        (Sqe { prp2: page + 8, ..io(Sqe::io(READ, 0, 16)) }, 0x13),
        (Sqe { prp2: 0x7fff_0000_0000, ..io(Sqe::io(READ, 0, 32)) }, 0x04),
        (Sqe { prp2: page + 4, ..io(Sqe::io(READ, 0, 32)) }, 0x13),
    ];
    for (sqe, status) in cases {
        assert_eq!(driver.run(1, sqe).status, status, "{sqe:x?}");
    }
    let queue = |opcode, a, b, prp1| Sqe { prp1, ..admin(opcode, [a, b]) };
    let cases = [
        (queue(5, 1 | 15 << 16, 1, page), 0x101),
        (queue(5, 65 | 15 << 16, 1, page), 0x101),
        (queue(5, 0, 1, page), 0x101),
        (queue(5, 2, 1, page), 0x102),
        (queue(5, 2 | 2048 << 16, 1, page), 0x102),
        (queue(5, 2 | 15 << 16, 0, page), 0x02),
        (queue(5, 2 | 15 << 16, 1, page + 64), 0x13),
        (queue(5, 2 | 15 << 16, 65 << 16 | 3, page), 0x108),
        (queue(1, 2 | 15 << 16, 2 << 16 | 1, page), 0x100),
        (queue(1, 2 | 15 << 16, 1, page), 0x101),
        (queue(4, 1, 0, 0), 0x10c),
        (queue(4, 2, 0, 0), 0x101),
        (queue(0, 0, 0, 0), 0x101),
        (queue(2, 0x77, 0, page), 0x109),
        (queue(9, 7 | 1 << 31, 0, 0), 0x10d),
        (queue(9, 7, 0, 0), 0x0c),
        (queue(10, 3, 0, page), 0x02),
        (queue(10, 6, 0, page), 0x02),
        (queue(0x80, 0, 0, page), 0x01),
        (queue(6, 0x77, 0, page), 0x02),
    ];
    for (sqe, status) in cases {
        assert_eq!(driver.admin(sqe).status, status, "{sqe:x?}");
    }
    assert_eq!(driver.identify(0, 0).0.status, 0x0b);
    assert_eq!(driver.admin(admin(10, [7, 0])).result, 0x003f_003f);
    // Every refusal is in the error log, newest first.
    let base = admin(2, [1 | 15 << 16, 0]);
    assert_eq!(driver.admin(Sqe { prp1: page, ..base }).status, 0);
    assert_eq!(driver.guest_bytes(page, 8), 32_u64.to_le_bytes());
    assert_eq!(driver.guest_bytes(page + 12, 2), (0x400b_u16 << 1).to_le_bytes());
}

#[test]
fn a_deleted_queue_ends_its_commands_first() {
    for late in [None, Some(8)] {
        let options = NvmeOptions { latency: Duration::from_millis(3), ..NvmeOptions::default() };
        let nvme = Nvme::in_memory(image(), options).unwrap();
        let bus = TestBus::new(32 << 20);
        let bus = match late {
            Some(seed) => bus.late(seed),
            None => bus,
        };
        let mut driver = Driver::ready(nvme, bus, 2, 16);
        let page = driver.pages(1);
        for lba in 0..15 {
            driver.put(1, &read_at(page, lba));
        }
        driver.ring(1);
        assert_eq!(driver.admin(admin(0, [1, 0])).status, 0);
        let counters = *driver.nvme.counters();
        assert_eq!(counters.accepted, counters.completed + counters.dropped);
        let posted = counters.completed;
        driver.settle();
        assert_eq!(driver.nvme.counters().completed, posted, "nothing of a deleted queue comes later");
        assert_eq!(driver.admin(admin(4, [1, 0])).status, 0);
        assert_eq!(driver.create(1, 16), 0);
        assert_eq!(driver.run(1, read_at(page, 0)).status, 0);
        assert_eq!(driver.run(2, read_at(page, 0)).status, 0);
    }
}

#[test]
fn the_pin_follows_unread_entries_and_its_mask() {
    let mut driver = ready(1, 16);
    driver.nvme.set_interrupt_mode(InterruptMode::Pin, &mut driver.bus);
    let page = driver.pages(1);
    assert!(!driver.bus.pin);
    driver.put(1, &read_at(page, 0));
    driver.put(1, &read_at(page, 8));
    driver.ring(1);
    assert!(driver.bus.pin);
    driver.write_register(0x0c, Width::B4, 2);
    assert!(!driver.bus.pin, "masked by INTMS");
    driver.write_register(0x10, Width::B4, 2);
    assert!(driver.bus.pin, "unmasked by INTMC");
    driver.take(1).unwrap();
    driver.ring_completion(1);
    assert!(driver.bus.pin, "one entry is unread");
    driver.take(1).unwrap();
    driver.ring_completion(1);
    assert!(!driver.bus.pin);
}

#[test]
fn one_vector_announces_a_batch() {
    let mut driver = ready(1, 64);
    let page = driver.pages(1);
    driver.bus.interrupts.clear();
    for lba in 0..32 {
        driver.put(1, &read_at(page, lba));
    }
    driver.ring(1);
    assert_eq!(driver.bus.interrupts, [1]);
    let dmas = driver.bus.dmas;
    driver.put(1, &read_at(page, 0));
    driver.ring(1);
    assert_eq!(driver.bus.dmas - dmas, 3, "entry, data, completion");
}

#[test]
fn a_shutdown_is_complete_after_the_flush() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let nvme = Nvme::open(file.path(), NvmeOptions::default()).unwrap();
    let mut driver = Driver::ready(nvme, TestBus::new(16 << 20), 1, 16);
    let page = driver.pages(1);
    driver.bus.guest.write(page, b"kept").unwrap();
    let write = Sqe { prp1: page, ..Sqe::io(WRITE, 3, 1) };
    assert_eq!(driver.run(1, write).status, 0);
    driver.write_register(0x14, Width::B4, 0x0046_4001);
    assert_eq!(driver.status() >> 2 & 3, 1, "occurring");
    driver.until(|driver| driver.status() >> 2 & 3 == 2);
    driver.disable();
    assert_eq!(driver.status(), 0);
    drop(driver);
    assert_eq!(&std::fs::read(file.path()).unwrap()[1536..1540], b"kept");
}

#[test]
fn a_read_only_image_stays_as_it_is() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let options = NvmeOptions { read_only: true, serial: Some("S1".into()), ..NvmeOptions::default() };
    let nvme = Nvme::open(file.path(), options.clone()).unwrap();
    // Readers share.
    let second = Nvme::open(file.path(), options).unwrap();
    drop(second);
    let mut driver = Driver::ready(nvme, TestBus::new(16 << 20), 1, 16);
    let page = driver.pages(1);
    for opcode in [WRITE, 8, 9] {
        let mut sqe = Sqe { prp1: page, ..Sqe::io(opcode, 0, 1) };
        sqe.dwords[1] = if opcode == 9 { 4 } else { 0 };
        assert_eq!(driver.run(1, sqe).status, 0x20);
    }
    assert_eq!(driver.run(1, read_at(page, 0)).status, 0);
    assert_eq!(driver.identify(0, 1).1[99], 1);
    assert_eq!(&driver.identify(1, 0).1[4..8], b"S1  ");
}

#[test]
fn images_that_cannot_be_lent_are_refused_with_a_reason() {
    let open = |path: &Path| Nvme::open(path, NvmeOptions::default()).map(|_| ()).unwrap_err();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    assert!(matches!(open(&path), MediaError::Missing { .. }));
    assert!(matches!(open(folder.path()), MediaError::Directory { .. }));
    assert!(matches!(open(Path::new("/dev/null")), MediaError::Kind { .. }));
    std::fs::write(&path, b"").unwrap();
    assert!(matches!(open(&path), MediaError::Empty { .. }));
    std::fs::write(&path, vec![0; 513]).unwrap();
    assert!(matches!(open(&path), MediaError::Unaligned { len: 513, .. }));
    std::fs::write(&path, vec![0; 512]).unwrap();
    let first = Nvme::open(&path, NvmeOptions::default()).unwrap();
    let locked = open(&path);
    assert!(locked.to_string().contains("in use by another lender"), "{locked}");
    drop(first);
    Nvme::open(&path, NvmeOptions::default()).unwrap();
}

#[test]
fn all_64_queue_pairs_work() {
    let mut driver = ready(64, 16);
    let page = driver.pages(1);
    for queue in 1..=64 {
        assert_eq!(driver.run(queue, read_at(page, 0)).status, 0);
    }
    assert_eq!(driver.bus.interrupts.iter().filter(|vector| **vector == 64).count(), 1);
}

#[test]
fn data_lost_after_its_success_was_said_stops_the_controller_until_a_reset() {
    let mut driver = Driver::ready(in_memory(&image()), TestBus::new(32 << 20).late(3), 1, 16);
    let page = driver.pages(1);
    driver.bus.late_writes_fault = true;
    driver.put(1, &read_at(page, 0));
    driver.ring(1);
    driver.settle();
    let counters = *driver.nvme.counters();
    assert_eq!((counters.completed, counters.errors, counters.late_faults, counters.fatal), (2 + 1, 0, 1, 1));
    assert_eq!(driver.status() & 2, 2, "CSTS.CFS");
    driver.bus.late_writes_fault = false;
    driver.disable();
    driver.enable();
    assert_eq!(driver.create(1, 16), 0);
    assert_eq!(driver.run(1, read_at(page, 0)).status, 0);
}
