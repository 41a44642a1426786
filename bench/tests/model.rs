//! The driver and the cases on the real controller model: inside the function's calls, on a thread of its own, and across shared memory.
//!
//! 32 MiB of this machine's files are packed, read back in full, written to by all six cases, verified, restored, and verified again;
//! then the image itself, looked at behind the device, must equal the file.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use farbus_bench::driver::{DmaMemory, Driver, DriverError, DriverOptions, Io, QueueIndex};
use farbus_bench::function::FunctionRegisters;
use farbus_bench::measure::{CountingAllocator, Latencies, allocations_here, count_syscalls, interleave};
use farbus_bench::report::{CaseReport, DemoReport, demo_table};
use farbus_bench::workload::{Budget, CASES, Contents, Workload};
use farbus_bench::{image, measure};
use farbus_pci_shim::{IrqSink, MessageInterrupt};
use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::lender::{LenderSession, PollOptions};
use farbus_remote_dma::model::nvme::{Nvme, NvmeOptions};
use farbus_remote_dma::native::Native;
use farbus_remote_dma::wait::Waker;
use farbus_remote_dma::{Attachment, Backend, Iova};
use farbus_transport::Memory;
use farbus_transport::shm::{ShmFabric, ShmOptions};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const BASE: Iova = Iova(0x1_0000_0000);
const BYTES: u64 = 32 << 20;
const QUEUE: QueueIndex = QueueIndex(1);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Inline,
    Threaded,
    Shm,
    /// As `Shm`, with a lender that never sleeps: what "while polling" means.
    ShmPolling,
}

#[derive(Default)]
struct CountingSink(Arc<AtomicU64>);

impl IrqSink for CountingSink {
    fn pin(&mut self, _: bool) {}

    fn message(&mut self, irq: MessageInterrupt) {
        // Vector 0, the admin queue's, may still be on its way.
        self.0.fetch_add(u64::from(irq.vector == 1), Ordering::Relaxed);
    }
}

struct Lender {
    stop: Waker,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Lender {
    fn drop(&mut self) {
        self.stop.set();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

struct Rig {
    driver: Driver<FunctionRegisters<CountingSink>>,
    workload: Workload,
    image: Arc<Memory>,
    interrupts: Arc<AtomicU64>,
    lender: Option<Lender>,
}

fn rig(place: Place, original: &File, options: DriverOptions) -> Rig {
    let image = Memory::memfd("image", BYTES).unwrap();
    let mut bytes = vec![0; BYTES as usize];
    std::os::unix::fs::FileExt::read_exact_at(original, &mut bytes, 0).unwrap();
    image.write(0, &bytes).unwrap();
    let nvme = Nvme::in_memory(Arc::clone(&image), NvmeOptions::default()).unwrap();
    let mut lender = None;
    let attachment: Box<dyn Attachment> = match place {
        Place::Inline => Box::new(Native::inline(Box::new(nvme)).unwrap()),
        Place::Threaded => Box::new(Native::threaded(Box::new(nvme), PollOptions::default()).unwrap()),
        Place::Shm | Place::ShmPolling => {
            let spin = if place == Place::Shm { PollOptions::default().spin } else { Duration::from_secs(3600) };
            let (theirs, ours) = ShmFabric::pair(ShmOptions::default()).unwrap();
            let description = nvme.description().clone();
            let stop = Waker::new().unwrap();
            let waker = stop.clone();
            let core = *measure::cores().unwrap().last().unwrap();
            let thread = std::thread::spawn(move || {
                let _pinned = measure::pin_to(core).unwrap();
                let mut session = LenderSession::new(theirs, Box::new(nvme)).map_err(|(error, _)| error).unwrap();
                session.run(PollOptions { spin }, &waker);
                session.end().unwrap();
            });
            lender = Some(Lender { stop, thread: Some(thread) });
            Box::new(BorrowerSession::new(ours, description, BorrowerOptions::default()).unwrap())
        }
    };
    let memory = Memory::memfd("guest", 64 << 20).unwrap();
    let sink = CountingSink::default();
    let interrupts = Arc::clone(&sink.0);
    let mut registers = FunctionRegisters::open(attachment, sink, &memory, BASE).unwrap();
    if !options.vectors.is_empty() {
        registers.enable_msix(2).unwrap();
    }
    let mut driver = Driver::start(registers, DmaMemory::new(memory, BASE), options).unwrap();
    let contents = Contents::new(original.try_clone().unwrap(), 3).unwrap();
    let workload = Workload::new(&mut driver, QUEUE, contents, 5).unwrap();
    Rig { driver, workload, image, interrupts, lender }
}

fn original() -> File {
    let mut file = tempfile::tempfile().unwrap();
    let packed = image::pack(&mut file, BYTES, &image::sources(), |_| {}).unwrap();
    assert!(packed.files > 0);
    file
}

#[test]
fn every_byte_is_right_wherever_the_device_is() {
    let original = original();
    let mut bytes = vec![0; BYTES as usize];
    std::os::unix::fs::FileExt::read_exact_at(&original, &mut bytes, 0).unwrap();
    for place in [Place::Inline, Place::Threaded, Place::Shm] {
        let options = DriverOptions { queues: 8, depth: 256, ..DriverOptions::default() };
        let Rig { mut driver, mut workload, image, lender, .. } = rig(place, &original, options);
        assert_eq!(driver.namespace().bytes(), BYTES);
        assert_eq!(workload.verify(&mut driver, |_| {}).unwrap().original, BYTES);
        for case in CASES {
            let run = workload.run(&mut driver, case, Budget::Commands(600)).unwrap();
            assert_eq!(run.commands, 600, "{place:?} {}", case.name);
        }
        assert!(workload.verify(&mut driver, |_| {}).unwrap().patterned > 0);
        workload.restore(&mut driver, |_| {}).unwrap();
        assert_eq!(workload.verify(&mut driver, |_| {}).unwrap().patterned, 0);
        drop(driver.shutdown().unwrap());
        drop(lender);
        let mut behind = vec![0; BYTES as usize];
        image.read(0, &mut behind).unwrap();
        assert!(behind == bytes, "{place:?}: the image equals the file again");
    }
}

#[test]
fn completions_come_by_interrupt_where_vectors_were_asked_for() {
    let original = original();
    for place in [Place::Inline, Place::Threaded, Place::Shm] {
        let options = DriverOptions { vectors: vec![1], ..DriverOptions::default() };
        let mut rig = rig(place, &original, options);
        let into = &rig.driver.allocate(4096).unwrap();
        let before = rig.interrupts.load(Ordering::Relaxed);
        rig.driver.submit(QUEUE, &Io::Read { block: 8, into }, 7).unwrap();
        rig.driver.ring(QUEUE).unwrap();
        let mut done = None;
        let wait = |registers: &mut FunctionRegisters<CountingSink>, _: u16, _: Duration| {
            registers.function_mut().poll(farbus_transport::Nanos::now());
            Ok(())
        };
        rig.driver.reap_by_interrupt(QUEUE, wait, |completion| done = Some(completion.token)).unwrap();
        assert_eq!(done, Some(7));
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while rig.interrupts.load(Ordering::Relaxed) == before {
            assert!(std::time::Instant::now() < deadline, "{place:?}: no interrupt");
            rig.driver.registers_mut().function_mut().poll(farbus_transport::Nanos::now());
        }
        assert_eq!(rig.interrupts.load(Ordering::Relaxed) - before, 1, "{place:?}: one message, of vector 1");
    }
}

#[test]
fn a_lender_that_ends_is_named_and_not_waited_for() {
    let original = original();
    let options = DriverOptions { command_timeout: Duration::from_millis(200), ..DriverOptions::default() };
    let mut rig = rig(Place::Shm, &original, options);
    drop(rig.lender.take());
    let into = &rig.driver.allocate(4096).unwrap();
    let error = rig.driver.execute(QUEUE, &Io::Read { block: 0, into }).unwrap_err();
    assert!(matches!(error, DriverError::Gone), "{error}");
}

#[test]
fn native_and_remote_side_by_side() {
    let original = original();
    let native = std::cell::RefCell::new(rig(Place::Inline, &original, DriverOptions::default()));
    let remote = std::cell::RefCell::new(rig(Place::Shm, &original, DriverOptions::default()));
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
    let report = DemoReport { fabric: "shm".to_owned(), verified: true, bytes_verified: verified.bytes, cases };
    println!("{}", demo_table(&report));
    assert_eq!(report.cases.len(), 6);
    assert!(report.cases.iter().all(|case| case.remote.iops > 0.0 && case.p50_ratio.is_finite()));
}

#[test]
fn the_borrowers_side_of_the_data_path_neither_allocates_nor_asks_the_kernel() {
    let original = original();
    for place in [Place::Inline, Place::ShmPolling] {
        let mut rig = rig(place, &original, DriverOptions::default());
        // After the rig: a thread that a pinned one starts would share its core.
        let _pinned = measure::pin_to(measure::cores().unwrap()[0]).unwrap();
        let mut latencies = Latencies::new();
        for case in CASES {
            rig.workload.run(&mut rig.driver, case, Budget::Commands(2000)).unwrap();
            let before = allocations_here();
            let work = || rig.workload.run_into(&mut rig.driver, case, Budget::Commands(5000), &mut latencies);
            let (run, counts) = count_syscalls(work).unwrap();
            let allocations = allocations_here() - before;
            run.unwrap();
            assert_eq!(allocations, 0, "{place:?} {}", case.name);
            // The fabric looks with ppoll, after many empty polls, whether the peer still lives; a lender that is given no time to run is
            // polled empty for long. Nothing else may ask the kernel.
            let liveness = counts.last == Some(libc::SYS_ppoll as u64) && counts.futex == 0 && place == Place::ShmPolling;
            assert!(counts.total == 0 || liveness, "{place:?} {}: {counts:?}", case.name);
        }
    }
}
