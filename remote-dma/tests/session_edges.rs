//! What a session does at its edges: a link that ended, memory that is reached in two ways at once, a borrower that never lets it rest.
//!
//! A doorbell and a goodbye arrive in one poll: the device that the doorbell wakes must be told that its DMA did not happen.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{BUFFER_BYTES, COMMAND, CopyEngine, DONE, FAULTS, IOVA, LEN, READ, Recorder, Seen, WRITE, bar0, description};
use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::lender::{LenderSession, PollOptions};
use farbus_remote_dma::wait::Waker;
use farbus_remote_dma::{Attachment, Iova, MediationAnswer, ResetKind, Width, Window, WindowMemory};
use farbus_transport::shm::{ShmFabric, ShmOptions};
use farbus_transport::{Access, CloseReason, Memory, Nanos};

/// Both sides in one thread, so that what arrives together is up to the test.
struct Steps {
    borrower: Option<BorrowerSession<ShmFabric>>,
    lender: LenderSession<ShmFabric>,
    host: Recorder,
}

impl Steps {
    fn new() -> Self {
        let (lender, borrower) = ShmFabric::pair(ShmOptions::default()).unwrap();
        let lender = LenderSession::new(lender, Box::new(CopyEngine::new())).map_err(|(error, _)| error).unwrap();
        let options = BorrowerOptions {
            read_deadline: Duration::from_millis(500),
            control_deadline: Duration::from_millis(500),
            ..BorrowerOptions::default()
        };
        let borrower = BorrowerSession::new(borrower, description(), options).unwrap();
        let mut steps = Self { borrower: Some(borrower), lender, host: Recorder::default() };
        steps.borrower.as_mut().unwrap().set_bus_master(true, &mut steps.host);
        steps
    }

    /// Asks something of the borrower while the lender works beside it.
    fn meanwhile<T>(&mut self, ask: impl FnOnce(&mut BorrowerSession<ShmFabric>, &mut Recorder) -> T) -> T {
        let Self { borrower, lender, host, .. } = self;
        let stop = Waker::new().unwrap();
        std::thread::scope(|scope| {
            let waker = stop.clone();
            let lending = scope.spawn(move || lender.run(PollOptions::default(), &waker));
            let answer = ask(borrower.as_mut().unwrap(), host);
            stop.set();
            assert_eq!(lending.join().unwrap(), CloseReason::Local);
            answer
        })
    }

    fn map(&mut self, iova: u64, memory: WindowMemory) {
        let window = Window { iova: Iova(iova), len: 1 << 20, access: Access::READ_WRITE, memory };
        self.meanwhile(|borrower, host| borrower.map(window, host)).unwrap();
    }

    fn direct(&mut self, iova: u64) -> Arc<Memory> {
        let memory = Memory::memfd("guest", 1 << 20).unwrap();
        self.map(iova, WindowMemory::Mapped { memory: Arc::clone(&memory), offset: 0, proven: true });
        memory
    }

    fn command(&mut self, command: u64, iova: u64, len: u64) {
        for (offset, value) in [(IOVA, iova), (LEN, len), (COMMAND, command)] {
            self.borrower.as_mut().unwrap().bar_write(bar0(offset), Width::B8, value, &mut self.host);
        }
    }

    fn read(&mut self, offset: u64) -> u64 {
        self.meanwhile(|borrower, host| borrower.bar_read(bar0(offset), Width::B8, host))
    }

    fn borrower_polls(&mut self) {
        self.borrower.as_mut().unwrap().poll(Nanos::now(), &mut self.host);
    }
}

#[test]
fn a_doorbell_that_comes_with_the_end_of_its_link_makes_no_dma_that_claims_to_be_done() {
    for command in [READ, WRITE] {
        let mut steps = Steps::new();
        let guest = steps.direct(0);
        steps.command(command, 0x1000, 64);
        steps.borrower = None;
        steps.lender.pump(Nanos::now());
        assert!(steps.lender.closed().is_some());
        let counters = steps.lender.counters();
        assert_eq!(counters.direct_dma, 0, "command {command}");
        assert_eq!(counters.faults, 1, "command {command}: the device must hear of it");
        let mut polled = [0; 8];
        guest.read(0x1040, &mut polled).unwrap();
        assert_eq!(polled, [0; 8], "a completion without its data");
    }
}

#[test]
fn polled_bytes_in_direct_memory_do_not_overtake_stores_that_the_guests_side_has_not_made() {
    let mut steps = Steps::new();
    steps.map(0, WindowMemory::Mediated);
    let guest = steps.direct(1 << 20);
    // The last page of the data is in the one, the polled word in the other.
    steps.command(WRITE, (1 << 20) - 4096, 4096);
    steps.lender.pump(Nanos::now());
    steps.borrower_polls();
    let Some(Seen::Store(data, _, _, false)) = steps.host.0.pop_front() else { panic!("no store") };
    let mut polled = [0; 8];
    guest.read(0, &mut polled).unwrap();
    assert_eq!(polled, [0; 8], "the guest sees a completion whose data it does not have");
    steps.borrower.as_mut().unwrap().answer(data, MediationAnswer::Stored, &mut steps.host);
    let Some(Seen::Store(word, _, bytes, true)) = steps.host.0.pop_front() else { panic!("no polled store: {:?}", steps.host.0) };
    assert_eq!(bytes, b"lastword");
    steps.borrower.as_mut().unwrap().answer(word, MediationAnswer::Stored, &mut steps.host);
    assert_eq!(steps.host.0.pop_front(), Some(Seen::Interrupt(3)));
    steps.lender.pump(Nanos::now());
    assert_eq!((steps.read(DONE), steps.read(FAULTS)), (1, 0));
    // Nothing is outstanding: directly again.
    steps.command(WRITE, 1 << 20, 16);
    steps.lender.pump(Nanos::now());
    guest.read(16, &mut polled).unwrap();
    assert_eq!(&polled, b"lastword");
}

#[test]
fn a_reset_is_answered_while_more_stores_wait_than_there_are_slots() {
    let mut steps = Steps::new();
    steps.map(0, WindowMemory::Mediated);
    for _ in 0..3 {
        steps.command(WRITE, 0, BUFFER_BYTES - 4096);
    }
    steps.lender.pump(Nanos::now());
    steps.meanwhile(|borrower, host| borrower.reset(ResetKind::Function, host)).unwrap();
    assert_eq!(steps.borrower.as_ref().unwrap().gone(), None);
}

#[test]
fn an_unmap_is_answered_while_more_stores_wait_than_there_are_slots() {
    let mut steps = Steps::new();
    steps.map(0, WindowMemory::Mediated);
    for _ in 0..3 {
        steps.command(WRITE, 0, BUFFER_BYTES - 4096);
    }
    steps.lender.pump(Nanos::now());
    steps.meanwhile(|borrower, host| borrower.unmap(Iova(0), 1 << 20, host)).unwrap();
}
