//! A lender whose disk hangs: it says so, lends the device to nobody, gets it back when the disk goes on, and ends when it is told, with an error.
//!
//! A driver reads block 0 over a real link, the read hangs, the driver leaves; the next borrower is told why it gets nothing. And a function that leaves on
//! purpose finds its device kept: a stranger is told so, and with the state's token it goes on.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use farbus_bench::driver::{DmaMemory, Driver, DriverOptions, Io, QueueIndex};
use farbus_bench::function::FunctionRegisters;
use farbus_pci_shim::{Function, FunctionOptions, FunctionState, RecorderSink};
use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::model::nvme::media::{Job, JobKind, Media};
use farbus_remote_dma::model::nvme::{Nvme, NvmeOptions};
use farbus_remote_dma::{Attachment, BarAddress, Claim, DeviceDescription, Iova, RestToken, Width, Window, WindowMemory};
use farbus_transport::link::hello::{Hello, Role, SPOKEN};
use farbus_transport::shm::{self, ShmOptions};
use farbus_transport::{Access, Memory};

use super::lend;
use crate::attach::attach;
use crate::cli::LendArgs;
use crate::device_spec::DeviceSpec;
use crate::link_address::LinkAddress;
use crate::security::{AllowArgs, PeerArgs, SecurityArgs};
use crate::service::{Service, ServiceArgs};

const BASE: Iova = Iova(0x1_0000_0000);
const QUIESCE: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(30);

/// A disk whose reads hang until it is let go, and then bring sevens.
struct Hanging {
    jobs: VecDeque<Box<Job>>,
    /// Reads that have come.
    begun: Arc<AtomicUsize>,
    go: Arc<AtomicBool>,
}

impl Media for Hanging {
    fn len(&self) -> u64 {
        1 << 20
    }
    fn volatile_cache(&self) -> bool {
        false
    }
    fn memory(&self) -> Option<&Arc<Memory>> {
        None
    }
    fn identity(&self) -> u64 {
        7
    }
    fn submit(&mut self, job: Box<Job>) {
        self.begun.fetch_add(usize::from(job.kind == JobKind::Read), Ordering::AcqRel);
        self.jobs.push_back(job);
    }
    fn reap(&mut self) -> Option<Box<Job>> {
        let hangs = |job: &Job| job.kind == JobKind::Read && !self.go.load(Ordering::Acquire);
        let at = self.jobs.iter().position(|job| !hangs(job))?;
        let mut job = self.jobs.remove(at)?;
        for buffer in job.buffers.drain(..).filter(|_| job.kind == JobKind::Read) {
            let (memory, start) = buffer.parts();
            memory.write(start, &vec![7; buffer.len() as usize]).unwrap();
        }
        Some(job)
    }
    /// A worker has each of them.
    fn cancel(&mut self) -> Option<Box<Job>> {
        None
    }
    fn busy(&self) -> bool {
        self.jobs.iter().any(|job| job.kind != JobKind::Read || self.go.load(Ordering::Acquire))
    }
    fn arm(&mut self) -> bool {
        true
    }
    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

struct Lender {
    address: LinkAddress,
    begun: Arc<AtomicUsize>,
    go: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<anyhow::Result<()>>>,
    _folder: tempfile::TempDir,
}

impl Lender {
    fn start(once: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let address = LinkAddress::Shm(folder.path().join("link"));
        let (begun, go) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let disk = Hanging { jobs: VecDeque::new(), begun: Arc::clone(&begun), go: Arc::clone(&go) };
        let args = LendArgs {
            hold: Duration::from_secs(5),
            device: DeviceSpec::Nvme { path: PathBuf::from("hanging"), options: NvmeOptions::default() },
            listen: address.clone(),
            once,
            spin: Duration::from_micros(50),
            keep_at_most: Duration::from_secs(60),
            drain: QUIESCE,
            max_bandwidth: None,
            service: ServiceArgs::default(),
            accept_unsealed: false,
            core: None,
            json: true,
            security: SecurityArgs::default(),
            allow: AllowArgs::default(),
        };
        let thread = std::thread::spawn(move || {
            let nvme = Nvme::over("hanging", Box::new(disk), NvmeOptions::default()).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(lend(args, Box::new(nvme), QUIESCE, &Service::unheard("lend")))
        });
        Self { address, begun, go, thread: Some(thread), _folder: folder }
    }

    /// A driver on the device, or why there is none, tried until `wanted`.
    fn borrow(&self, wanted: impl Fn(&Result<Borrowed, String>) -> bool) -> Result<Borrowed, String> {
        let start = Instant::now();
        loop {
            let borrowed = Borrowed::new(&self.address);
            if wanted(&borrowed) || start.elapsed() > PATIENCE {
                return borrowed;
            }
            drop(borrowed);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Has a driver begin a read and leave, and waits until the device is known to be wedged; the driver's memory.
    fn wedge(&self) -> Arc<Memory> {
        let mut borrowed = self.borrow(Result::is_ok).unwrap();
        let before = self.begun.load(Ordering::Acquire);
        borrowed.begin_read();
        // A doorbell that comes with its link's end starts nothing.
        let start = Instant::now();
        while self.begun.load(Ordering::Acquire) == before {
            assert!(start.elapsed() < PATIENCE, "the read does not reach the disk");
            std::thread::yield_now();
        }
        let memory = Arc::clone(&borrowed.memory);
        drop(borrowed);
        let refused = self.borrow(|borrowed| borrowed.as_ref().is_err_and(|why| why.contains("its last borrower")));
        assert!(refused.as_ref().is_err_and(|why| why.contains("does not end")), "{:?}", refused.err());
        memory
    }

    fn end(&mut self) -> anyhow::Result<()> {
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM).unwrap();
        self.thread.take().unwrap().join().unwrap()
    }
}

struct Borrowed {
    driver: Driver<FunctionRegisters<RecorderSink>>,
    memory: Arc<Memory>,
}

impl Borrowed {
    fn new(address: &LinkAddress) -> Result<Self, String> {
        let (security, peer) = (SecurityArgs::default(), PeerArgs::default());
        let session = attach(address, &security, &peer, BorrowerOptions::default(), &Claim::default(), None)
            .map_err(|error| format!("{error:#}"))?;
        let memory = Memory::memfd("driver", 4 << 20).unwrap();
        let registers = FunctionRegisters::open(session, RecorderSink::default(), &memory, BASE).unwrap();
        let driver = Driver::start(registers, DmaMemory::new(Arc::clone(&memory), BASE), DriverOptions::default()).unwrap();
        Ok(Self { driver, memory })
    }

    fn begin_read(&mut self) {
        let buffer = self.driver.allocate(4096).unwrap();
        self.driver.submit(QueueIndex(1), &Io::Read { block: 0, into: &buffer }, 1).unwrap();
        self.driver.ring(QueueIndex(1)).unwrap();
    }
}

fn sevens(memory: &Memory) -> usize {
    let mut bytes = vec![0; memory.len() as usize];
    memory.read(0, &mut bytes).unwrap();
    bytes.chunks(4096).filter(|page| page.iter().all(|byte| *byte == 7)).count()
}

/// A signal is for the whole process, so no two lenders run at a time.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn a_device_is_kept_for_the_function_that_left_it_and_for_nobody_else() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut lender = Lender::start(true);
    lender.go.store(true, Ordering::Release);
    let mut first = lender.borrow(Result::is_ok).unwrap();
    let function = first.driver.registers_mut().function_mut();
    function.quiesce(PATIENCE).unwrap();
    let state = function.save().unwrap();
    function.leave(PATIENCE).unwrap();
    let token = FunctionState::parse(&state).unwrap().rest().token;

    let refused = |token| session(&lender.address, token).err().unwrap();
    // Until the lender knows that the first has left, the device is lent.
    let start = Instant::now();
    while !refused(None).contains("is kept for a function") {
        assert!(start.elapsed() < PATIENCE, "{}", refused(None));
    }
    assert!(refused(Some(RestToken::random().unwrap())).contains("is kept for a function"));
    let session = session(&lender.address, Some(token)).unwrap();
    let behind = WindowMemory::Mapped { memory: Arc::clone(&first.memory), offset: 0, proven: true };
    let window = Window { iova: BASE, len: first.memory.len(), access: Access::READ_WRITE, memory: behind };
    let options = FunctionOptions::default();
    let (mut function, restored) = Function::restore(session, RecorderSink::default(), options, &state, vec![window]).unwrap();
    assert!(!restored.revived, "the device was reset");
    function.resume();
    // CSTS: ready, as the first driver left it.
    assert_eq!(function.bar_read(BarAddress { bar: 0, offset: 0x1c }, Width::B4).unwrap(), 1);
    drop(function);
    // It was not asked to keep the device again.
    lender.thread.take().unwrap().join().unwrap().unwrap();
}

/// A session, for a new function or for one that left the device under a token.
fn session(address: &LinkAddress, token: Option<RestToken>) -> Result<Box<dyn Attachment>, String> {
    let LinkAddress::Shm(path) = address else { panic!("a link of this host") };
    let description = Claim { rest: token, holding: None }.encode();
    let hello = Hello { versions: SPOKEN, role: Role::Borrower, features: 0, epoch: 0, description };
    let connection = shm::connect(path, &hello, ShmOptions::default()).map_err(|error| error.to_string())?;
    let device = DeviceDescription::decode(&connection.agreed.peer.description).unwrap();
    let session = BorrowerSession::new(connection.fabric, device, BorrowerOptions::default()).unwrap();
    Ok(Box::new(token.map_or_else(|| panic!("a stranger was let in"), |token| session.continuing(token))))
}

#[test]
fn a_device_whose_disk_hangs_is_lent_to_nobody_until_it_goes_on_and_does_not_keep_the_command_from_ending() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut lender = Lender::start(false);
    let memory = lender.wedge();
    assert_eq!(sevens(&memory), 0);
    lender.go.store(true, Ordering::Release);
    // What hung ends, in the memory of who asked for it, and then the device is another's.
    let mut next = lender.borrow(Result::is_ok).unwrap();
    assert_eq!(sevens(&memory), 1, "the device was lent again before its old work had ended");
    next.begin_read();
    assert_eq!(next.driver.reap_some(QueueIndex(1), |completion| assert!(completion.status.ok())).unwrap(), 1);
    assert_eq!((sevens(&memory), sevens(&next.memory)), (1, 1));
    drop(next);
    lender.go.store(false, Ordering::Release);
    lender.wedge();
    let start = Instant::now();
    let error = lender.end().unwrap_err().to_string();
    assert!(error.contains("1 accesses") && error.contains("ends without it"), "{error}");
    assert!(start.elapsed() < PATIENCE / 3, "the command took {:?} to end", start.elapsed());
    // The session's thread is still there, as it would be in a process that ends now.
    lender.go.store(true, Ordering::Release);
}
