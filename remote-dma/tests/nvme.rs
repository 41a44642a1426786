//! The NVMe controller through its public face: a driver over a test bus, against a model of the image.
//!
//! The first test is the whole way: enable, identify, two queues, write 12 KiB with a list, read it back, and find it in the image.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod nvme_support;

use farbus_remote_dma::model::{Nvme, NvmeOptions};
use farbus_transport::Memory;
use nvme_support::bus::TestBus;
use nvme_support::driver::{Driver, PAGE, Sqe};
use std::sync::Arc;

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
        let write = Sqe {
            prp1,
            prp2,
            ..Sqe::io(WRITE, 8, 24)
        };
        assert_eq!(driver.run(2, write).status, 0);
        let mut seen = vec![0; 12288];
        image.read(4096, &mut seen).unwrap();
        assert!(seen == data);

        let target = driver.pages(3);
        let (prp1, prp2) = driver.prps(&[target, target + PAGE, target + 2 * PAGE], 0, 12288);
        let read = Sqe {
            prp1,
            prp2,
            ..Sqe::io(READ, 8, 24)
        };
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
