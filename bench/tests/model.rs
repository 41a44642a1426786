//! The driver and the cases on the real controller model: inside the function's calls, on a thread of its own, and across shared memory.
//!
//! 32 MiB of this machine's files are packed, read back in full, written to by all six cases, verified, restored, and verified again;
//! then the image itself, looked at behind the device, must equal the file.

mod rig;

use std::sync::atomic::Ordering;
use std::time::Duration;

use farbus_bench::driver::{DriverError, DriverOptions, Io};
use farbus_bench::measure;
use farbus_bench::measure::{CountingAllocator, Latencies, allocations_here, count_syscalls, interleave};
use farbus_bench::report::{CaseReport, DemoReport, Machine, demo_table};
use farbus_bench::workload::{Budget, CASES};
use rig::{Place, QUEUE, Rig, rig};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const BYTES: u64 = 32 << 20;

fn original() -> std::fs::File {
    rig::original(BYTES)
}

#[test]
fn every_byte_is_right_wherever_the_device_is() {
    let original = original();
    for place in [Place::Inline, Place::Threaded, Place::Shm] {
        rig::every_byte_is_right(place, &original, BYTES, 600);
    }
}

#[test]
fn completions_come_by_interrupt_where_vectors_were_asked_for() {
    let original = original();
    for place in [Place::Inline, Place::Threaded, Place::Shm] {
        rig::a_completion_comes_by_interrupt(place, &original, BYTES);
    }
}

#[test]
fn a_lender_that_ends_is_named_and_not_waited_for() {
    let original = original();
    let options = DriverOptions { command_timeout: Duration::from_millis(200), ..DriverOptions::default() };
    let mut rig = rig(Place::Shm, &original, BYTES, options);
    drop(rig.lender.take());
    let into = &rig.driver.allocate(4096).unwrap();
    let error = rig.driver.execute(QUEUE, &Io::Read { block: 0, into }).unwrap_err();
    assert!(matches!(error, DriverError::Gone), "{error}");
}

#[test]
fn native_and_remote_side_by_side() {
    let original = original();
    let native = std::cell::RefCell::new(rig(Place::Inline, &original, BYTES, DriverOptions::default()));
    let remote = std::cell::RefCell::new(rig(Place::Shm, &original, BYTES, DriverOptions::default()));
    let _pinned = measure::pin_to(measure::cores().unwrap()[0]).unwrap();
    let budget = Budget::Time(Duration::from_millis(40));
    let mut cases = Vec::new();
    for case in CASES {
        let side = |rig: &std::cell::RefCell<Rig>| {
            let rig = &mut *rig.borrow_mut();
            rig.workload.run(&mut rig.driver, case, budget)
        };
        let pairs = interleave(5, |_| side(&native), |_| side(&remote)).unwrap();
        cases.push(CaseReport::new(case, &pairs));
    }
    let rig = &mut *remote.borrow_mut();
    let verified = rig.workload.verify(&mut rig.driver, |_| {}).unwrap();
    let report =
        DemoReport { fabric: "shm".to_owned(), verified: true, bytes_verified: verified.bytes, cases, machine: Machine::here() };
    println!("{}", demo_table(&report));
    assert_eq!(report.cases.len(), 6);
    assert!(report.cases.iter().all(|case| case.remote.iops > 0.0 && case.p50_ratio.is_finite()));
}

#[test]
fn the_data_path_does_not_allocate_and_the_borrowers_side_does_not_ask_the_kernel() {
    let original = original();
    for place in [Place::Inline, Place::ShmPolling] {
        let mut rig = rig(place, &original, BYTES, DriverOptions::default());
        // After the rig: a thread that a pinned one starts would share its core.
        let _pinned = measure::pin_to(measure::cores().unwrap()[0]).unwrap();
        let mut latencies = Latencies::new();
        for case in CASES {
            rig.workload.run(&mut rig.driver, case, Budget::Commands(2000)).unwrap();
            let (before, lender_before) = (allocations_here(), rig.lender_allocations.load(Ordering::Relaxed));
            let work = || rig.workload.run_into(&mut rig.driver, case, Budget::Commands(5000), &mut latencies);
            let (run, counts) = count_syscalls(work).unwrap();
            let allocations = allocations_here() - before;
            run.unwrap();
            assert_eq!(allocations, 0, "{place:?} {}", case.name);
            let lender_allocations = rig.lender_allocations.load(Ordering::Relaxed) - lender_before;
            assert_eq!(lender_allocations, 0, "the lender, {place:?} {}", case.name);
            // The fabric looks with ppoll, after many empty polls, whether the peer still lives; a lender that is given no time to run is
            // polled empty for long. Nothing else may ask the kernel.
            let liveness = counts.last == Some(libc::SYS_ppoll as u64) && counts.futex == 0 && place == Place::ShmPolling;
            assert!(counts.total == 0 || liveness, "{place:?} {}: {counts:?}", case.name);
        }
        // All of that while both sides told what they counted, register writes and bytes.
        let told = rig.told.values();
        assert_eq!(place == Place::ShmPolling, told[1] >= 5000 && told[3] >= 5000 * 512, "{place:?}: {told:?}");
    }
}
