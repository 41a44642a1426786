//! What a vfio-user server between the lender and its device costs: the same register and the same NVMe read, with and without it.
//!
//! `cargo bench -p farbus-bench --bench hop` prints the time of a 4-byte read of CSTS and of a 4 KiB read at depth 1 over shared memory, then with
//! a server that maps the guest's memory, then with one that asks for each byte; and the two ratios to the first.

#![expect(clippy::unwrap_used, reason = "a benchmark that cannot run must not report")]

use std::time::{Duration, Instant};

use farbus_bench::driver::{DriverOptions, Io};
use farbus_bench::measure::CountingAllocator;
use farbus_remote_dma::{BarAddress, Width};

#[path = "../tests/rig/mod.rs"]
mod rig;

use rig::{Place, QUEUE, Rig};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const BYTES: u64 = 8 << 20;
/// Rounds of each place, in turns, of which the median counts.
const ROUNDS: usize = 9;
const EACH: u32 = 400;

fn register_reads(rig: &mut Rig) -> Duration {
    let function = rig.driver.registers_mut().function_mut();
    let start = Instant::now();
    for _ in 0..EACH {
        let status = function.bar_read(BarAddress { bar: 0, offset: 0x1c }, Width::B4).unwrap();
        assert_eq!(status & 1, 1, "the controller is ready");
    }
    start.elapsed() / EACH
}

fn nvme_reads(rig: &mut Rig) -> Duration {
    let into = rig.driver.allocate(4096).unwrap();
    let start = Instant::now();
    for block in 0..EACH {
        rig.driver.execute(QUEUE, &Io::Read { block: u64::from(block) * 8, into: &into }).unwrap();
    }
    start.elapsed() / EACH
}

fn main() {
    let original = rig::original(BYTES);
    let places = [Place::Shm, Place::VfioUserMapped, Place::VfioUser];
    let mut rigs = places.map(|place| rig::rig(place, &original, BYTES, DriverOptions::default()));
    for (what, measure) in [("register read", register_reads as fn(&mut Rig) -> Duration), ("nvme 4 KiB read, depth 1", nvme_reads)]
    {
        let mut times = [const { Vec::new() }; 3];
        for _ in 0..ROUNDS {
            for (rig, times) in rigs.iter_mut().zip(&mut times) {
                times.push(measure(rig));
            }
        }
        let medians = times.map(|mut times| {
            times.sort_unstable();
            times[ROUNDS / 2]
        });
        for (place, median) in places.iter().zip(medians) {
            let ratio = median.as_secs_f64() / medians[0].as_secs_f64();
            println!("{what:<26} {:<16} {:>8.1} us  {ratio:>6.1} x", format!("{place:?}"), median.as_secs_f64() * 1e6);
        }
    }
}
