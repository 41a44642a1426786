//! A whole session: the borrower in the test's thread, the lender in another, the copy engine behind it.
//!
//! `pair.command(WRITE, 0x10_0ff8, 16)` makes three register writes; `pair.next()` is then what the guest's side hears, vector 3 say.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::lender::{LenderSession, PollOptions};
use farbus_remote_dma::wait::Waker;
use farbus_remote_dma::{Attachment, Iova, MapError, Width, Window, WindowMemory};
use farbus_transport::{Access, CloseReason, Memory, Nanos};

use super::links::Link;
use super::{COMMAND, CopyEngine, IOVA, LEN, Recorder, Seen, bar0, description};

/// Longer than an emulated machine on a busy host needs for anything here.
pub const AMPLE: Duration = Duration::from_secs(20);

/// Bytes of the guest memory that tests map.
pub const GUEST_BYTES: u64 = 1 << 20;

pub struct Pair {
    pub session: BorrowerSession<Link>,
    pub host: Recorder,
    /// The engine's own memory.
    pub buffer: Arc<Memory>,
    pub stop: Waker,
    pub lender: Option<JoinHandle<CloseReason>>,
}

impl Pair {
    pub fn new(ends: (Link, Link)) -> Self {
        Self::with(ends, AMPLE)
    }

    /// With another deadline for register reads.
    pub fn with((lender, borrower): (Link, Link), read_deadline: Duration) -> Self {
        let stop = Waker::new().unwrap();
        let engine = CopyEngine::new();
        let buffer = Arc::clone(&engine.buffer);
        let waker = stop.clone();
        let lender = std::thread::spawn(move || {
            let mut session = LenderSession::new(lender, Box::new(engine)).map_err(|(error, _)| error).unwrap();
            let reason = session.run(PollOptions::default(), &waker);
            session.end().unwrap();
            reason
        });
        let options = BorrowerOptions { read_deadline, control_deadline: AMPLE, ..BorrowerOptions::default() };
        let session = BorrowerSession::new(borrower, description(), options).unwrap();
        let mut pair = Self { session, host: Recorder::default(), buffer, stop, lender: Some(lender) };
        pair.session.set_bus_master(true, &mut pair.host);
        pair
    }

    pub fn map(&mut self, iova: u64, memory: &Arc<Memory>, proven: bool) -> Result<(), MapError> {
        let memory = WindowMemory::Mapped { memory: Arc::clone(memory), offset: 0, proven };
        self.session.map(Window { iova: Iova(iova), len: GUEST_BYTES, access: Access::READ_WRITE, memory }, &mut self.host)
    }

    pub fn write(&mut self, offset: u64, value: u64) {
        self.session.bar_write(bar0(offset), Width::B8, value, &mut self.host);
    }

    pub fn read(&mut self, offset: u64) -> u64 {
        self.session.bar_read(bar0(offset), Width::B8, &mut self.host)
    }

    /// Reads a register until it has the value: DMA that takes a while is not waited for by a register read.
    #[track_caller]
    pub fn until(&mut self, offset: u64, value: u64) {
        let deadline = Instant::now() + AMPLE;
        loop {
            let found = self.read(offset);
            if found == value {
                return;
            }
            assert!(Instant::now() < deadline, "register {offset:#x} stays {found} and never becomes {value}");
        }
    }

    pub fn command(&mut self, command: u64, iova: u64, len: u64) {
        self.write(IOVA, iova);
        self.write(LEN, len);
        self.write(COMMAND, command);
    }

    #[track_caller]
    pub fn next(&mut self) -> Seen {
        let deadline = Instant::now() + AMPLE;
        loop {
            if let Some(seen) = self.host.0.pop_front() {
                return seen;
            }
            assert!(Instant::now() < deadline, "nothing came; the link: {:?}", self.session.gone());
            self.session.poll(Nanos::now(), &mut self.host);
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.stop.set();
        if let Some(lender) = self.lender.take() {
            let ended = lender.join();
            // A panic of the test itself says more.
            assert!(ended.is_ok() || std::thread::panicking(), "the lender panicked");
        }
    }
}

pub fn guest() -> Arc<Memory> {
    Memory::memfd("guest", GUEST_BYTES).unwrap()
}
