//! What the data path costs: allocations counted over reads in the steady state, and, on request, nanoseconds a command.
//!
//! 100,000 reads of 4 KiB from an image in memory make 0 allocations; `cargo test --release --test nvme_data_path -- --ignored --nocapture` prints
//! the time of one.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod nvme_support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use farbus_remote_dma::model::{Nvme, NvmeOptions};
use farbus_remote_dma::{Activity, Backend, BarAddress, Width};
use farbus_transport::Memory;
use nvme_support::bus::{Random, TestBus};
use nvme_support::driver::{Driver, Sqe};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Reads of 4 KiB from a file that the page cache holds, `depth` at once.
fn file_reads(mappable: bool, depth: u64) -> u64 {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![1; 8 << 20]).unwrap();
    let nvme = Nvme::open(file.path(), NvmeOptions::default()).unwrap();
    let mut bus = TestBus::new(32 << 20);
    bus.mappable = mappable;
    let mut driver = Driver::ready(nvme, bus, 1, 1024);
    let pages = driver.pages(depth);
    let mut random = Random(5);
    let (start, rounds) = (Instant::now(), 40_000 / depth);
    for _ in 0..rounds {
        for slot in 0..depth {
            let sqe = Sqe { prp1: pages + slot * 4096, ..Sqe::io(2, random.below(2048) * 8, 8) };
            driver.put(1, &sqe);
        }
        driver.ring(1);
        let mut left = depth;
        while left > 0 {
            driver.nvme.poll(&mut driver.bus);
            while driver.take(1).is_some() {
                left -= 1;
            }
        }
        driver.ring_completion(1);
        driver.bus.interrupts.clear();
    }
    start.elapsed().as_nanos() as u64 / (rounds * depth)
}

fn ready(image_bytes: u64) -> Driver {
    let image = Memory::memfd("test-image", image_bytes).unwrap();
    for at in (0..image_bytes).step_by(4096) {
        image.write(at, &at.to_le_bytes()).unwrap();
    }
    let nvme = Nvme::in_memory(Arc::clone(&image), NvmeOptions::default()).unwrap();
    Driver::ready(nvme, TestBus::new(32 << 20), 1, 1024)
}

/// `count` random 4 KiB reads, `depth` for each doorbell.
fn reads(driver: &mut Driver, count: u64, depth: u64, blocks: u64, pages: u64) {
    let mut random = Random(7);
    let mut expected = [0_u64; 512];
    for _ in 0..count / depth {
        for slot in 0..depth {
            let page = random.below(blocks);
            expected[slot as usize] = page * 4096;
            let sqe = Sqe { prp1: pages + slot * 4096, ..Sqe::io(2, page * 8, 8) };
            driver.put(1, &sqe);
        }
        driver.ring(1);
        let mut left = depth;
        while left > 0 {
            match driver.take(1) {
                Some(entry) => {
                    assert_eq!(entry.status, 0);
                    left -= 1;
                }
                None => assert_eq!(driver.nvme.poll(&mut driver.bus), Activity::Busy),
            }
        }
        driver.ring_completion(1);
        for slot in 0..depth {
            let mut word = [0; 8];
            driver.bus.guest.read(pages + slot * 4096, &mut word).unwrap();
            assert_eq!(u64::from_le_bytes(word), expected[slot as usize]);
        }
        driver.bus.interrupts.clear();
    }
}

#[test]
fn a_read_in_the_steady_state_allocates_nothing() {
    let mut driver = ready(8 << 20);
    let pages = driver.pages(512);
    reads(&mut driver, 2_000, 1, 2048, pages);
    for depth in [1, 32, 500] {
        reads(&mut driver, 1_000, depth, 2048, pages);
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        reads(&mut driver, 10_000, depth, 2048, pages);
        assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0, "depth {depth}");
    }
    // The counter does count: the sentence above could be false.
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    drop(std::hint::black_box(vec![1_u8; 100]));
    assert!(ALLOCATIONS.load(Ordering::Relaxed) > before);
}

#[test]
#[ignore = "a measurement: run it alone, with --release --nocapture"]
fn time_of_a_command() {
    let mut driver = ready(8 << 20);
    let pages = driver.pages(512);
    for depth in [1, 32, 128] {
        reads(&mut driver, 200_000, depth, 1024, pages);
        let start = Instant::now();
        let count = 1_000_000;
        reads(&mut driver, count, depth, 1024, pages);
        println!("depth {depth}: {} ns a read of 4 KiB, driver and checks included", start.elapsed().as_nanos() as u64 / count);
    }
    // The device's part alone: entries are laid out before, only the doorbells are timed.
    let depth = 32_u64;
    let mut random = Random(3);
    let (mut device, mut commands) = (0, 0);
    for _ in 0..30_000 {
        for slot in 0..depth {
            let sqe = Sqe { prp1: pages + slot * 4096, ..Sqe::io(2, random.below(1024) * 8, 8) };
            driver.put(1, &sqe);
        }
        let tail = u64::from(driver.queues[1].tail);
        let at = BarAddress { bar: 0, offset: 0x1008 };
        let start = Instant::now();
        driver.nvme.bar_write(at, Width::B4, tail, &mut driver.bus);
        device += start.elapsed().as_nanos() as u64;
        commands += depth;
        let mut taken = 0;
        while driver.take(1).is_some() {
            taken += 1;
        }
        assert_eq!(taken, depth);
        driver.ring_completion(1);
        driver.bus.interrupts.clear();
    }
    println!("device and bus: {} ns a read of 4 KiB", device / commands);
    for (mappable, depth) in [(true, 1), (true, 32), (false, 32)] {
        let time = file_reads(mappable, depth);
        println!("file, depth {depth}, guest memory mappable {mappable}: {time} ns a read of 4 KiB");
    }
    let (from, to) = (Memory::memfd("a", 4 << 20).unwrap(), Memory::memfd("b", 1 << 20).unwrap());
    let start = Instant::now();
    for _ in 0..1_000_000 {
        to.copy_from(random.below(32) * 4096, &from, random.below(1024) * 4096, 4096).unwrap();
    }
    println!("copying 4 KiB: {} ns", start.elapsed().as_nanos() / 1_000_000);
}
