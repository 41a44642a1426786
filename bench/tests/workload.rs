//! The cases and the verification on a controller in memory: what they count, what they find, and what they must not do.
//!
//! 3,000 random writes, then a device whose byte 5,000,003 was flipped behind the driver's back: the verification names that byte.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a panic is how a test fails")]

mod stub_controller;

use std::fs::File;
use std::io::Write;

use farbus_bench::driver::{Driver, DriverOptions, QueueIndex};
use farbus_bench::measure::{CountingAllocator, Latencies, allocations_here, count_syscalls};
use farbus_bench::workload::{Budget, CASES, Case, Contents, Workload, WorkloadError};
use stub_controller::{BLOCK, Fault, StubController, pair};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const BYTES: u64 = 16 << 20;
const QUEUE: QueueIndex = QueueIndex(1);

fn original() -> (tempfile::TempDir, File, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("original");
    let bytes: Vec<u8> = (0..BYTES).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 13) as u8).collect();
    File::create(&path).unwrap().write_all(&bytes).unwrap();
    (folder, File::open(path).unwrap(), bytes)
}

fn set_up(fault: Fault) -> (Driver<StubController>, Workload, Vec<u8>) {
    let (_folder, file, bytes) = original();
    let (mut stub, dma) = pair(BYTES / BLOCK);
    stub.disk.write(0, &bytes).unwrap();
    stub.fault = fault;
    let mut driver = Driver::start(stub, dma, DriverOptions::default()).unwrap();
    let contents = Contents::new(file, 7).unwrap();
    let workload = Workload::new(&mut driver, QUEUE, contents, 1).unwrap();
    (driver, workload, bytes)
}

fn run_all(driver: &mut Driver<StubController>, workload: &mut Workload) {
    for case in CASES {
        let run = workload.run(driver, case, Budget::Commands(3000)).unwrap();
        assert_eq!((run.commands, run.latencies.count()), (3000, 3000), "{}", case.name);
        assert!(run.iops() > 0.0);
    }
}

#[test]
fn after_all_cases_every_byte_is_known_and_after_the_restore_it_is_the_originals() {
    for fault in [Fault::None, Fault::OutOfOrder] {
        let (mut driver, mut workload, bytes) = set_up(fault);
        assert_eq!(workload.verify(&mut driver, |_| {}).unwrap().original, BYTES);
        run_all(&mut driver, &mut workload);
        let verified = workload.verify(&mut driver, |_| {}).unwrap();
        assert_eq!(verified.bytes, BYTES);
        assert!(verified.patterned > 0);
        let mut last = 0;
        workload.restore(&mut driver, |progress| last = progress.done).unwrap();
        assert_eq!(last, BYTES);
        let verified = workload.verify(&mut driver, |_| {}).unwrap();
        assert_eq!((verified.original, verified.patterned), (BYTES, 0));
        let stub = driver.shutdown().unwrap();
        let mut disk = vec![0; BYTES as usize];
        stub.disk.read(0, &mut disk).unwrap();
        assert!(disk == bytes, "the device holds the original again, byte for byte");
    }
}

#[test]
fn one_flipped_byte_is_found_and_named() {
    let (mut driver, mut workload, bytes) = set_up(Fault::None);
    let at = 5_000_003;
    let wrong = [!bytes[at as usize]];
    driver.registers_mut().disk.write(at, &wrong).unwrap();
    let error = workload.verify(&mut driver, |_| {}).unwrap_err();
    assert!(matches!(&error, WorkloadError::WrongData { at: 5_000_003, .. }), "{error}");
    assert!(error.to_string().contains("as in the file"), "{error}");
}

#[test]
fn a_lost_write_and_a_write_to_the_wrong_place_are_found() {
    let sequential = Case { write: true, ..Case::named("write-128k").unwrap() };
    for misplace in [false, true] {
        let (mut driver, mut workload, bytes) = set_up(Fault::None);
        workload.run(&mut driver, sequential, Budget::Commands(BYTES / sequential.bytes)).unwrap();
        workload.verify(&mut driver, |_| {}).unwrap();
        let disk = std::sync::Arc::clone(&driver.registers_mut().disk);
        if misplace {
            disk.copy_from(40_960, &disk, 8192, 512).unwrap();
        } else {
            disk.write(40_960, &bytes[40_960..41_472]).unwrap();
        }
        let error = workload.verify(&mut driver, |_| {}).unwrap_err();
        assert!(matches!(&error, WorkloadError::WrongData { at: 40_960..=40_967, .. }), "{error}");
        assert!(error.to_string().contains("write 1 of this run to unit 10"), "{error}");
    }
}

#[test]
fn a_device_that_completes_before_its_data_arrives_is_caught() {
    let (mut driver, mut workload, _) = set_up(Fault::DataLate);
    let error = workload.verify(&mut driver, |_| {}).unwrap_err();
    assert!(matches!(error, WorkloadError::WrongData { .. }), "{error}");
}

#[test]
fn a_failing_command_ends_a_case_with_its_status() {
    let (mut driver, mut workload, _) = set_up(Fault::Refuse);
    let error = workload.run(&mut driver, CASES[0], Budget::Commands(10)).unwrap_err();
    assert_eq!(error.to_string(), "randread-4k-qd1: a command failed: LBA out of range (status 0/0x80)");
}

#[test]
fn a_million_commands_allocate_nothing_and_ask_the_kernel_nothing() {
    let (mut driver, mut workload, _) = set_up(Fault::None);
    let mut latencies = Latencies::new();
    for case in CASES {
        let commands = if case.bytes > 4096 { 2000 } else { 250_000 };
        workload.run(&mut driver, case, Budget::Commands(100)).unwrap();
        let before = allocations_here();
        let (run, counts) =
            count_syscalls(|| workload.run_into(&mut driver, case, Budget::Commands(commands), &mut latencies)).unwrap();
        let allocations = allocations_here() - before;
        assert_eq!(run.unwrap().0, commands);
        assert_eq!((allocations, counts.total), (0, 0), "{}", case.name);
    }
    // The counters can count: what they say above means something.
    let before = allocations_here();
    drop(std::hint::black_box(Box::new(7)));
    assert_eq!(allocations_here() - before, 1);
}

#[test]
fn a_device_of_another_size_than_the_file_is_refused() {
    let (_folder, file, _) = original();
    let (stub, dma) = pair(BYTES / BLOCK - 8);
    let mut driver = Driver::start(stub, dma, DriverOptions::default()).unwrap();
    let contents = Contents::new(file, 7).unwrap();
    assert!(matches!(Workload::new(&mut driver, QUEUE, contents, 1), Err(WorkloadError::Size { .. })));
}
