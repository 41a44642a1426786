//! A driver over a function whose device is in this process, on a thread, or across a link, and the cases that run on it.
//!
//! `rig(Place::Verbs, &original, 8 << 20, DriverOptions::default())` puts a controller with 8 MiB of the file behind a queue pair, maps guest
//! memory for it, and brings it up through the driver; a device that `FARBUS_RDMA_DEV` promises and that is not there fails the test.

#![allow(dead_code, clippy::unwrap_used, reason = "each test program uses a part of it, and a panic is how a test fails")]

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use farbus_bench::driver::{DmaMemory, Driver, DriverOptions, Io, QueueIndex};
use farbus_bench::function::FunctionRegisters;
use farbus_bench::measure::allocations_here;
use farbus_bench::workload::{Budget, CASES, Contents, Workload};
use farbus_bench::{image, measure};
use farbus_pci_shim::vfio_user::{BackendOptions, ClientInterrupts, Options, Server, StopHandle, VfioUserBackend};
use farbus_pci_shim::{Counters, Function, FunctionOptions, InterruptOwner, IrqSink, MessageInterrupt};
use farbus_remote_dma::borrower::{self, BorrowerOptions, BorrowerSession};
use farbus_remote_dma::lender::{LenderSession, PollOptions};
use farbus_remote_dma::model::nvme::{Nvme, NvmeOptions};
use farbus_remote_dma::native::Native;
use farbus_remote_dma::wait::Waker;
use farbus_remote_dma::{Attachment, Backend, DeviceDescription, Iova};
use farbus_transport::shm::{ShmFabric, ShmOptions};
use farbus_transport::verbs::{DeviceChoice, VerbsFabric};
use farbus_transport::{Fabric, Memory, Nanos, Tally};

pub const BASE: Iova = Iova(0x1_0000_0000);
pub const QUEUE: QueueIndex = QueueIndex(1);

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Place {
    Inline,
    Threaded,
    Shm,
    /// As `Shm`, with a lender that never sleeps: what "while polling" means.
    ShmPolling,
    /// As `Shm`, with the device behind a vfio-user server that the lender is a client of.
    VfioUser,
    /// As `VfioUser`, with a server that maps the guest's memory itself.
    VfioUserMapped,
    Verbs,
    VerbsPolling,
}

impl Place {
    fn connect(self) -> (Box<dyn Fabric>, Box<dyn Fabric>) {
        if matches!(self, Self::Shm | Self::ShmPolling | Self::VfioUser | Self::VfioUserMapped) {
            let (lender, borrower) = ShmFabric::pair(ShmOptions::default()).unwrap();
            return (Box::new(lender), Box::new(borrower));
        }
        let (lender, borrower) = verbs_pair();
        (Box::new(lender), Box::new(borrower))
    }
}

/// Two connected ends over the device that `FARBUS_RDMA_DEV` promises.
pub fn verbs_pair() -> (VerbsFabric, VerbsFabric) {
    let choice = DeviceChoice { device: std::env::var("FARBUS_RDMA_DEV").ok(), ..DeviceChoice::default() };
    VerbsFabric::pair(&choice).unwrap_or_else(|error| panic!("no link over {choice:?}: {error}"))
}

#[derive(Default)]
pub struct CountingSink(Arc<AtomicU64>);

impl IrqSink for CountingSink {
    fn pin(&mut self, _: bool) {}

    fn message(&mut self, irq: MessageInterrupt) {
        // Vector 0, the admin queue's, may still be on its way.
        self.0.fetch_add(u64::from(irq.vector == 1), Ordering::Relaxed);
    }
}

pub struct Lender {
    stop: Waker,
    thread: Option<JoinHandle<()>>,
    /// After the session, whose device it is.
    _served: Option<Box<Served>>,
}

/// A vfio-user server with a controller: in its own process, for which memory must have a descriptor, or borrowed itself, for which it need not.
pub struct Served {
    pub path: std::path::PathBuf,
    _folder: tempfile::TempDir,
    stop: StopHandle,
    thread: Option<JoinHandle<()>>,
    _lender: Option<Lender>,
}

impl Served {
    pub fn start(nvme: Nvme, maps: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nvme.sock");
        let mut server = Server::bind(&path).unwrap();
        let stop = server.stop_handle();
        let mut nvme = Some(nvme);
        let (lender, link) = if maps { (None, None) } else { Self::lend(nvme.take().unwrap()) };
        let thread = std::thread::spawn(move || {
            let attachment: Box<dyn Attachment> = match link {
                Some((fabric, description)) => {
                    Box::new(BorrowerSession::new(fabric, description, BorrowerOptions::default()).unwrap())
                }
                None => Box::new(Native::inline(Box::new(nvme.unwrap())).unwrap()),
            };
            let sink = ClientInterrupts::new(attachment.description());
            let options = FunctionOptions { interrupts: InterruptOwner::Client };
            let mut function = Function::new(attachment, sink, options).unwrap();
            server.serve(&mut function, &Options::default()).unwrap();
        });
        Self { path, _folder: folder, stop, thread: Some(thread), _lender: lender }
    }

    fn lend(nvme: Nvme) -> (Option<Lender>, Option<(ShmFabric, DeviceDescription)>) {
        let (theirs, ours) = ShmFabric::pair(ShmOptions::default()).unwrap();
        let description = nvme.description().clone();
        let stop = Waker::new().unwrap();
        let waker = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut session = LenderSession::new(theirs, Box::new(nvme)).map_err(|(error, _)| error).unwrap();
            session.run(PollOptions::default(), &waker);
            session.end().unwrap();
        });
        (Some(Lender { stop, thread: Some(thread), _served: None }), Some((ours, description)))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Lender {
    fn drop(&mut self) {
        self.stop.set();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

pub struct Rig {
    pub driver: Driver<FunctionRegisters<CountingSink>>,
    pub workload: Workload,
    pub image: Arc<Memory>,
    pub interrupts: Arc<AtomicU64>,
    pub lender: Option<Lender>,
    /// Allocations of the lender's thread so far, where it polls.
    pub lender_allocations: Arc<AtomicU64>,
    /// What the lender tells of itself while it serves.
    pub told: Arc<Tally>,
}

pub fn rig(place: Place, original: &File, bytes: u64, options: DriverOptions) -> Rig {
    let image = Memory::memfd("image", bytes).unwrap();
    image.write(0, &contents(original, bytes)).unwrap();
    let nvme = Nvme::in_memory(Arc::clone(&image), NvmeOptions::default()).unwrap();
    let mut lender = None;
    let lender_allocations = Arc::new(AtomicU64::new(0));
    let told = Tally::new(farbus_remote_dma::lender::Counters::NAMES);
    let attachment: Box<dyn Attachment> = match place {
        Place::Inline => Box::new(Native::inline(Box::new(nvme)).unwrap()),
        Place::Threaded => Box::new(Native::threaded(Box::new(nvme), PollOptions::default()).unwrap()),
        Place::Shm | Place::ShmPolling | Place::VfioUser | Place::VfioUserMapped | Place::Verbs | Place::VerbsPolling => {
            let (theirs, ours) = place.connect();
            let (device, served): (Box<dyn Backend>, _) = if matches!(place, Place::VfioUser | Place::VfioUserMapped) {
                let maps = place == Place::VfioUserMapped;
                let served = Served::start(nvme, maps);
                let options = BackendOptions { share_memory: maps, ..BackendOptions::default() };
                (Box::new(VfioUserBackend::open(&served.path, options).unwrap()), Some(Box::new(served)))
            } else {
                (Box::new(nvme), None)
            };
            let description = device.description().clone();
            let stop = Waker::new().unwrap();
            let waker = stop.clone();
            let polls = matches!(place, Place::ShmPolling | Place::VerbsPolling);
            let allocations = Arc::clone(&lender_allocations);
            let tally = Arc::clone(&told);
            let core = *measure::cores().unwrap().last().unwrap();
            let thread = std::thread::spawn(move || {
                let _pinned = measure::pin_to(core).unwrap();
                let session = LenderSession::new(theirs, device).map_err(|(error, _)| error).unwrap();
                // As `farbus lend` has it: what is counted is told while it is polled.
                let mut session = session.telling(tally);
                if polls {
                    while !waker.is_set() && session.closed().is_none() {
                        session.pump(Nanos::now());
                        allocations.store(allocations_here(), Ordering::Relaxed);
                    }
                } else {
                    session.run(PollOptions::default(), &waker);
                }
                session.end().unwrap();
            });
            lender = Some(Lender { stop, thread: Some(thread), _served: served });
            let session = BorrowerSession::new(ours, description, BorrowerOptions::default()).unwrap();
            Box::new(session.telling(Tally::new(borrower::Counters::NAMES)))
        }
    };
    let memory = Memory::memfd("guest", 16 << 20).unwrap();
    let sink = CountingSink::default();
    let interrupts = Arc::clone(&sink.0);
    let mut registers = FunctionRegisters::open(attachment, sink, &memory, BASE).unwrap();
    registers.function_mut().tell(Tally::new(Counters::NAMES));
    if !options.vectors.is_empty() {
        registers.enable_msix(2).unwrap();
    }
    let mut driver = Driver::start(registers, DmaMemory::new(memory, BASE), options).unwrap();
    let contents = Contents::new(original.try_clone().unwrap(), 3).unwrap();
    let workload = Workload::new(&mut driver, QUEUE, contents, 5).unwrap();
    Rig { driver, workload, image, interrupts, lender, lender_allocations, told }
}

/// All of the original file.
pub fn contents(original: &File, bytes: u64) -> Vec<u8> {
    let mut contents = vec![0; bytes as usize];
    std::os::unix::fs::FileExt::read_exact_at(original, &mut contents, 0).unwrap();
    contents
}

/// `bytes` of this machine's files.
pub fn original(bytes: u64) -> File {
    let mut file = tempfile::tempfile().unwrap();
    let packed = image::pack(&mut file, bytes, &image::sources(), |_| {}).unwrap();
    assert!(packed.files > 0);
    file
}

/// Reads all back, runs every case for `commands` commands, verifies, restores, verifies again, and looks at the image behind the device.
pub fn every_byte_is_right(place: Place, original: &File, bytes: u64, commands: u64) {
    let options = DriverOptions { queues: 8, depth: 256, ..DriverOptions::default() };
    let Rig { mut driver, mut workload, image, lender, .. } = rig(place, original, bytes, options);
    assert_eq!(driver.namespace().bytes(), bytes);
    assert_eq!(workload.verify(&mut driver, |_| {}).unwrap().original, bytes);
    for case in CASES {
        let run = workload.run(&mut driver, case, Budget::Commands(commands)).unwrap();
        assert_eq!(run.commands, commands, "{place:?} {}", case.name);
    }
    assert!(workload.verify(&mut driver, |_| {}).unwrap().patterned > 0);
    workload.restore(&mut driver, |_| {}).unwrap();
    assert_eq!(workload.verify(&mut driver, |_| {}).unwrap().patterned, 0);
    drop(driver.shutdown().unwrap());
    drop(lender);
    let mut behind = vec![0; bytes as usize];
    image.read(0, &mut behind).unwrap();
    assert!(behind == contents(original, bytes), "{place:?}: the image equals the file again");
}

/// One read whose completion is announced by vector 1, once.
pub fn a_completion_comes_by_interrupt(place: Place, original: &File, bytes: u64) {
    let options = DriverOptions { vectors: vec![1], ..DriverOptions::default() };
    let mut rig = rig(place, original, bytes, options);
    let into = &rig.driver.allocate(4096).unwrap();
    let before = rig.interrupts.load(Ordering::Relaxed);
    rig.driver.submit(QUEUE, &Io::Read { block: 8, into }, 7).unwrap();
    rig.driver.ring(QUEUE).unwrap();
    let mut done = None;
    let wait = |registers: &mut FunctionRegisters<CountingSink>, _: u16, _: Duration| {
        registers.function_mut().poll(Nanos::now());
        Ok(())
    };
    rig.driver.reap_by_interrupt(QUEUE, wait, |completion| done = Some(completion.token)).unwrap();
    assert_eq!(done, Some(7));
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    while rig.interrupts.load(Ordering::Relaxed) == before {
        assert!(std::time::Instant::now() < deadline, "{place:?}: no interrupt");
        rig.driver.registers_mut().function_mut().poll(Nanos::now());
    }
    assert_eq!(rig.interrupts.load(Ordering::Relaxed) - before, 1, "{place:?}: one message, of vector 1");
}
