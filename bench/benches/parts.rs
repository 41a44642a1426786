//! The small parts on their own: one command through the driver, a PRP list, a histogram's record.
//!
//! `cargo bench -p farbus-bench` says that submit, ring and reap of a 4 KiB read over a controller that answers at once take so many
//! nanoseconds, the copy of the data included.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a benchmark that cannot run must not report")]

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use farbus_bench::driver::{Driver, DriverOptions, Io, PrpError, QueueIndex, build_prps};
use farbus_bench::measure::Latencies;
use farbus_machine_bank::PAGE;
use farbus_machine_bank::page::Identity;
use farbus_remote_dma::Iova;

#[path = "../tests/stub_controller/mod.rs"]
mod stub_controller;

fn driver(criterion: &mut Criterion) {
    let (stub, dma) = stub_controller::pair(8192);
    let mut driver = Driver::start(stub, dma, DriverOptions::default()).expect("the stub starts");
    let buffer = driver.allocate(128 << 10).expect("there is room");
    let queue = QueueIndex(1);
    for (name, bytes) in [("read-4k", 4096), ("read-128k", 128 << 10)] {
        let into = buffer.slice(0, bytes).expect("inside");
        criterion.bench_function(&format!("driver/submit-ring-reap/{name}"), |bencher| {
            bencher.iter(|| {
                driver.submit(queue, &Io::Read { block: 8, into: &into }, 1).expect("room");
                driver.ring(queue).expect("a queue");
                driver.reap(queue, |done| assert!(done.status.ok())).expect("no stray completion")
            });
        });
    }
}

fn page_names(criterion: &mut Criterion) {
    let pages: Vec<[u8; PAGE]> = (0..16u8).map(|n| std::array::from_fn(|at| (at as u8).wrapping_mul(31) ^ n)).collect();
    let identity = Identity::plain();
    criterion.bench_function("names/16-pages-one-by-one", |bencher| {
        bencher.iter(|| black_box(&pages).iter().map(|page| identity.page(page).0[0]).fold(0, u8::wrapping_add));
    });
    criterion.bench_function("names/16-pages-at-once", |bencher| {
        let mut names = Vec::new();
        bencher.iter(|| {
            identity.pages(black_box(&pages), &mut names);
            names[0].0[0]
        });
    });
}

fn parts(criterion: &mut Criterion) {
    criterion.bench_function("prp/list-of-31", |bencher| {
        let mut list = [0_u64; 512];
        bencher.iter(|| {
            let first = black_box(Iova(0x10_0000));
            build_prps::<PrpError>(first, 128 << 10, Iova(0x1000), 1, |offset, entry| {
                list[(offset / 8) as usize] = entry;
                Ok(())
            })
        });
    });
    criterion.bench_function("latencies/record", |bencher| {
        let mut latencies = Latencies::new();
        let mut ns = 1000;
        bencher.iter(|| {
            ns = (ns * 7 + 13) % 10_000;
            latencies.record_ns(black_box(ns));
        });
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1)).sample_size(20);
    targets = driver, page_names, parts
}
criterion_main!(benches);
