//! One borrower that floods its lender: it gets what it may have, and the borrower of another device on the same host hardly notices.
//!
//! A driver keeps 32 reads of 128 KiB under way on a drive that is lent with `--max-bandwidth 16M`; another reads 4 KiB at a time from a drive of its own. The median of
//! those is measured in turns with and without the flood, in one run.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use farbus_bench::driver::{DmaMemory, Driver, DriverOptions, Io, QueueIndex};
use farbus_bench::function::FunctionRegisters;
use farbus_pci_shim::RecorderSink;
use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::{DeviceDescription, Iova};
use farbus_tests::Running;
use farbus_tests::place::{Place, assert_end_in_order};
use farbus_tests::process::{AMPLE, run};
use farbus_transport::Memory;
use farbus_transport::link::hello::{Hello, Role, SPOKEN};
use farbus_transport::shm::{self, ShmOptions};

const BASE: Iova = Iova(0x1_0000_0000);
const QUEUE: QueueIndex = QueueIndex(1);
const MIB: u64 = 1 << 20;
const RATE: u64 = 16 * MIB;
/// Reads of the flood that are under way, and bytes of each.
const DEPTH: usize = 32;
const LARGE: u64 = 128 << 10;
/// Of the other's median beside the flood, to its median alone. Beside one that is not bound it is of another order where there are fewer cores than threads.
const MOST_SLOWER: f64 = 4.0;

fn lend(place: &Place, more: &[&str]) -> Running {
    let (device, link) = (place.device("disk.img"), place.link());
    let mut lender = Running::farbus(&[&["lend", "--json", "--device", &device, "--listen", &link], more].concat());
    lender.event("listening", AMPLE);
    lender
}

fn borrow(place: &Place) -> Driver<FunctionRegisters<RecorderSink>> {
    let hello = Hello { versions: SPOKEN, role: Role::Borrower, features: 0, epoch: 0, description: Vec::new() };
    let connection = shm::connect(place.path("link"), &hello, ShmOptions::default()).unwrap();
    let device = DeviceDescription::decode(&connection.agreed.peer.description).unwrap();
    let session = BorrowerSession::new(connection.fabric, device, BorrowerOptions::default()).unwrap();
    let memory = Memory::memfd("driver", 16 << 20).unwrap();
    let registers = FunctionRegisters::open(Box::new(session), RecorderSink::default(), &memory, BASE).unwrap();
    Driver::start(registers, DmaMemory::new(Arc::clone(&memory), BASE), DriverOptions::default()).unwrap()
}

/// Reads without end; the bytes that came are in `moved`.
fn flood(place: &Place, moved: &AtomicU64, paused: &AtomicBool, over: &AtomicBool) {
    let mut driver = borrow(place);
    let buffers: Vec<_> = (0..DEPTH).map(|_| driver.allocate(LARGE).unwrap()).collect();
    let mut under_way = [false; DEPTH];
    while !over.load(Ordering::Relaxed) {
        if !paused.load(Ordering::Relaxed) {
            for (slot, buffer) in buffers.iter().enumerate().filter(|(slot, _)| !under_way[*slot]) {
                driver.submit(QUEUE, &Io::Read { block: 0, into: buffer }, slot as u64).unwrap();
            }
            driver.ring(QUEUE).unwrap();
            under_way.fill(true);
        }
        driver
            .reap(QUEUE, |completion| {
                assert!(completion.status.ok());
                under_way[completion.token as usize] = false;
                moved.fetch_add(LARGE, Ordering::Relaxed);
            })
            .unwrap();
        // A guest would sleep until the interrupt; who polls takes a core from the other.
        std::thread::sleep(Duration::from_micros(500));
    }
}

fn median_of_reads(driver: &mut Driver<FunctionRegisters<RecorderSink>>, buffer: &farbus_bench::driver::DmaBuffer) -> Duration {
    let mut times: Vec<_> = (0..60)
        .map(|read| {
            let start = Instant::now();
            driver.execute(QUEUE, &Io::Read { block: read % 1024, into: buffer }).unwrap();
            start.elapsed()
        })
        .collect();
    times.sort();
    times[30]
}

#[test]
fn who_floods_gets_what_it_may_have_and_the_other_hardly_notices() {
    let (flooded, other) = (Place::new(), Place::new());
    let (one, two) = (lend(&flooded, &["--max-bandwidth", "16M"]), lend(&other, &[]));
    let (moved, paused, over) = (AtomicU64::new(0), AtomicBool::new(true), AtomicBool::new(false));
    let mut driver = borrow(&other);
    let buffer = driver.allocate(4096).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| flood(&flooded, &moved, &paused, &over));
        let mut ratios = Vec::new();
        for _ in 0..5 {
            paused.store(true, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(300));
            let alone = median_of_reads(&mut driver, &buffer);
            paused.store(false, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(100));
            let beside = median_of_reads(&mut driver, &buffer);
            ratios.push(beside.as_secs_f64() / alone.as_secs_f64());
        }
        // The flood by itself: over two seconds it gets its rate, and what it had saved up.
        let (before, start) = (moved.load(Ordering::Relaxed), Instant::now());
        std::thread::sleep(Duration::from_secs(2));
        let rate = (moved.load(Ordering::Relaxed) - before) as f64 / start.elapsed().as_secs_f64();
        over.store(true, Ordering::Relaxed);
        ratios.sort_by(f64::total_cmp);
        println!("the flood: {:.1} MiB/s; the other's median, beside it to alone: {ratios:.2?}", rate / MIB as f64);
        // The least is for a machine that is busy with other things.
        let most = (RATE + 4 * MIB) as f64;
        assert!(rate <= most && rate >= RATE as f64 * 0.5, "{rate} bytes/s");
        assert!(ratios[2] <= MOST_SLOWER, "{ratios:?}");
    });
    drop(driver);
    assert_end_in_order(one);
    assert_end_in_order(two);
}

#[test]
fn only_what_can_be_held_is_bound() {
    let place = Place::new();
    let lend = |device: &str, rate: &str| run(&["lend", "--device", device, "--listen", &place.link(), "--max-bandwidth", rate]);
    lend("edu", "16M").assert_refusal(2, &["--max-bandwidth", "nvme:"]);
    lend(&place.device("disk.img"), "1K").assert_refusal(2, &["less than 1M"]);
}
