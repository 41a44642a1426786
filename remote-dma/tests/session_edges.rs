//! What a session does at its edges: a link that ended, memory that is reached in two ways at once, a borrower that never lets it rest.
//!
//! A doorbell and a goodbye arrive in one poll: the device that the doorbell wakes must be told that its DMA did not happen.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

mod common;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::links::{Connect, Link, on_every_fabric, over_shm};
use common::{BUFFER_BYTES, COMMAND, CopyEngine, DONE, FAULTS, IOVA, LEN, READ, Recorder, Seen, WRITE, bar0, description};
use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::dirty_log::DirtyLog;
use farbus_remote_dma::lender::{LenderSession, PollOptions};
use farbus_remote_dma::message::{ToBorrower, ToLender};
use farbus_remote_dma::wait::Waker;
use farbus_remote_dma::{
    Activity, AttachError, Attachment, Backend, BarAddress, Bus, DeviceDescription, DmaFault, DmaTag, InterruptMode, Iova,
    MediationAnswer, ResetKind, Width, Window, WindowMemory,
};
use farbus_transport::shm::{ShmFabric, ShmOptions};
use farbus_transport::{Access, CloseReason, Event, Events, Fabric, Grant, Memory, Nanos, Op, Regions, Signal};

/// Longer than an emulated machine on a busy host needs for anything here.
const AMPLE: Duration = Duration::from_secs(20);

on_every_fabric! {
    polled_bytes_in_direct_memory_do_not_overtake_stores_that_the_guests_side_has_not_made
    a_reset_is_answered_while_more_stores_wait_than_there_are_slots
    an_unmap_is_answered_while_more_stores_wait_than_there_are_slots
    a_borrower_hears_that_its_session_failed_only_when_nothing_touches_its_memory_any_more
    memory_that_is_announced_and_never_delivered_ends_the_session_and_nothing_behind_it_is_obeyed
    a_session_that_never_rests_stops_when_it_is_told
}

/// Both sides in one thread, so that what arrives together is up to the test.
struct Steps {
    borrower: Option<BorrowerSession<Link>>,
    lender: LenderSession<Link>,
    host: Recorder,
    commands: u64,
}

impl Steps {
    fn new((lender, borrower): (Link, Link)) -> Self {
        let lender = LenderSession::new(lender, Box::new(CopyEngine::new())).map_err(|(error, _)| error).unwrap();
        let options = BorrowerOptions { read_deadline: AMPLE, control_deadline: AMPLE, ..BorrowerOptions::default() };
        let borrower = BorrowerSession::new(borrower, description(), options).unwrap();
        let mut steps = Self { borrower: Some(borrower), lender, host: Recorder::default(), commands: 0 };
        steps.borrower.as_mut().unwrap().set_bus_master(true, &mut steps.host);
        steps
    }

    /// Asks something of the borrower while the lender works beside it.
    fn meanwhile<T>(&mut self, ask: impl FnOnce(&mut BorrowerSession<Link>, &mut Recorder) -> T) -> T {
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
        let borrower = self.borrower.as_mut().unwrap();
        for (offset, value) in [(IOVA, iova), (LEN, len), (COMMAND, command)] {
            borrower.bar_write(bar0(offset), Width::B8, value, &mut self.host);
        }
        borrower.flush();
        self.commands += 1;
    }

    /// The lender works until it has obeyed all commands.
    fn lender_obeys(&mut self) {
        let deadline = Instant::now() + AMPLE;
        while self.lender.counters().bar_writes < 3 * self.commands {
            assert!(Instant::now() < deadline, "{:?}", self.lender.counters());
            self.lender.pump(Nanos::now());
        }
    }

    fn read(&mut self, offset: u64) -> u64 {
        self.meanwhile(|borrower, host| borrower.bar_read(bar0(offset), Width::B8, host))
    }

    /// What the guest's side hears next.
    fn next(&mut self) -> Seen {
        let deadline = Instant::now() + AMPLE;
        loop {
            if let Some(seen) = self.host.0.pop_front() {
                return seen;
            }
            assert!(Instant::now() < deadline, "nothing came");
            self.borrower.as_mut().unwrap().poll(Nanos::now(), &mut self.host);
        }
    }
}

/// The session works until it has ended.
fn ends(session: &mut LenderSession<Link>) -> CloseReason {
    let deadline = Instant::now() + AMPLE;
    loop {
        session.pump(Nanos::now());
        if let Some(reason) = session.closed() {
            return reason;
        }
        assert!(Instant::now() < deadline, "the session goes on");
    }
}

/// Over shared memory only: elsewhere it is not up to a test what arrives in one poll.
#[test]
fn a_doorbell_that_comes_with_the_end_of_its_link_makes_no_dma_that_claims_to_be_done() {
    for command in [READ, WRITE] {
        let mut steps = Steps::new(over_shm());
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

fn polled_bytes_in_direct_memory_do_not_overtake_stores_that_the_guests_side_has_not_made(connect: Connect) {
    let mut steps = Steps::new(connect());
    steps.map(0, WindowMemory::Mediated);
    let guest = steps.direct(1 << 20);
    // The last page of the data is in the one, the polled word in the other.
    steps.command(WRITE, (1 << 20) - 4096, 4096);
    steps.lender_obeys();
    let Seen::Store(data, _, _, false) = steps.next() else { panic!("no store") };
    let mut polled = [0; 8];
    guest.read(0, &mut polled).unwrap();
    assert_eq!(polled, [0; 8], "the guest sees a completion whose data it does not have");
    steps.borrower.as_mut().unwrap().answer(data, MediationAnswer::Stored, &mut steps.host);
    let Seen::Store(word, _, bytes, true) = steps.next() else { panic!("no polled store") };
    assert_eq!(bytes, b"lastword");
    steps.borrower.as_mut().unwrap().answer(word, MediationAnswer::Stored, &mut steps.host);
    assert_eq!(steps.next(), Seen::Interrupt(3));
    // Read in the same poll as the last answer, and still after it.
    assert_eq!((steps.read(DONE), steps.read(FAULTS)), (1, 0));
    // Nothing is outstanding: directly again.
    steps.command(WRITE, 1 << 20, 16);
    steps.lender_obeys();
    assert_eq!(steps.next(), Seen::Interrupt(3));
    guest.read(16, &mut polled).unwrap();
    assert_eq!(&polled, b"lastword");
}

fn a_reset_is_answered_while_more_stores_wait_than_there_are_slots(connect: Connect) {
    let mut steps = Steps::new(connect());
    steps.map(0, WindowMemory::Mediated);
    for _ in 0..3 {
        steps.command(WRITE, 0, BUFFER_BYTES - 4096);
    }
    steps.lender_obeys();
    steps.meanwhile(|borrower, host| borrower.reset(ResetKind::Function, host)).unwrap();
    assert_eq!(steps.borrower.as_ref().unwrap().gone(), None);
}

fn an_unmap_is_answered_while_more_stores_wait_than_there_are_slots(connect: Connect) {
    let mut steps = Steps::new(connect());
    steps.map(0, WindowMemory::Mediated);
    for _ in 0..3 {
        steps.command(WRITE, 0, BUFFER_BYTES - 4096);
    }
    steps.lender_obeys();
    steps.meanwhile(|borrower, host| borrower.unmap(Iova(0), 1 << 20, host)).unwrap();
}

fn a_borrower_hears_that_its_session_failed_only_when_nothing_touches_its_memory_any_more(connect: Connect) {
    let (lender, mut borrower) = connect();
    let mut session = LenderSession::new(lender, Box::new(CopyEngine::new())).map_err(|(error, _)| error).unwrap();
    borrower.post(Signal::No, Op::Send { message: b"nonsense" }).unwrap();
    borrower.flush();
    assert!(matches!(ends(&mut session), CloseReason::Protocol(_)));
    let mut closed = |within| {
        let (mut events, deadline) = (Events::new(), Instant::now() + within);
        loop {
            borrower.poll(Nanos::now(), &mut events);
            let closed = events.as_slice().iter().any(|event| matches!(event, Event::Closed(_)));
            if closed || Instant::now() > deadline {
                return closed;
            }
            events.clear();
        }
    };
    assert!(!closed(Duration::from_millis(50)), "the device has not been fenced yet");
    session.end().unwrap();
    assert!(closed(AMPLE));
}

fn memory_that_is_announced_and_never_delivered_ends_the_session_and_nothing_behind_it_is_obeyed(connect: Connect) {
    let (lender, mut borrower) = connect();
    let mut session = LenderSession::new(lender, Box::new(CopyEngine::new())).map_err(|(error, _)| error).unwrap();
    let grant = |key| Grant { key, len: 1 << 20, access: Access::READ_WRITE };
    let offer = ToLender::Offer { sequence: 1, memory: grant(u64::MAX), dirty: grant(u64::MAX - 1), proven: true };
    let store = ToLender::BarWrite { at: bar0(LEN), width: Width::B8, value: 1 };
    for message in [store, offer, store] {
        borrower.post(Signal::No, Op::Send { message: message.encode().as_slice() }).unwrap();
    }
    borrower.flush();
    assert_eq!(ends(&mut session), CloseReason::Protocol("memory that was announced and not delivered"));
    assert_eq!(session.counters().bar_writes, 1, "what came behind the fault");
    session.end().unwrap();

    // The same in one slot, where nothing comes between the messages.
    let (lender, mut borrower) = connect();
    let mut session = LenderSession::new(lender, Box::new(CopyEngine::new())).map_err(|(error, _)| error).unwrap();
    let slot: Vec<u8> =
        [ToLender::Staging(grant(u64::MAX)), store].iter().flat_map(|message| message.encode().as_slice().to_vec()).collect();
    borrower.post(Signal::No, Op::Send { message: &slot }).unwrap();
    borrower.flush();
    assert_eq!(ends(&mut session), CloseReason::Protocol("staging memory that cannot be used"));
    assert_eq!(session.counters().bar_writes, 0, "what came behind the fault in its slot");
    session.end().unwrap();
}

#[test]
fn dma_to_memory_that_its_owner_took_back_is_a_fault_and_never_done() {
    for command in [READ, WRITE] {
        // A borrower that says each message itself, so that it can break its word.
        let (lender, mut borrower) = ShmFabric::pair(ShmOptions::default()).unwrap();
        let mut session = LenderSession::new(lender, Box::new(CopyEngine::new())).map_err(|(error, _)| error).unwrap();
        let guest = Memory::memfd("guest", 1 << 20).unwrap();
        let log = DirtyLog::new(1 << 20).unwrap();
        let [memory, marks] =
            [&guest, log.marks()].map(|memory| borrower.register(Arc::clone(memory), Access::READ_WRITE).unwrap());
        let [memory_grant, dirty] = [memory, marks].map(|region| borrower.export(&region, Access::READ_WRITE).unwrap());
        let mut say = |borrower: &mut ShmFabric, messages: &[ToLender]| {
            for message in messages {
                borrower.post(Signal::No, Op::Send { message: message.encode().as_slice() }).unwrap();
            }
            session.pump(Nanos::now());
        };
        let window = |key| ToLender::Map {
            sequence: 2,
            iova: Iova(0),
            len: 1 << 20,
            memory: Some(key),
            offset: 0,
            access: Access::READ_WRITE,
        };
        let store = |offset, value| ToLender::BarWrite { at: bar0(offset), width: Width::B8, value };
        say(
            &mut borrower,
            &[
                ToLender::Offer { sequence: 1, memory: memory_grant, dirty, proven: true },
                window(memory_grant.key),
                ToLender::BusMaster(true),
                store(IOVA, 0x1000),
                store(LEN, 64),
            ],
        );
        borrower.deregister(memory).unwrap();
        say(&mut borrower, &[store(COMMAND, command)]);
        let counters = session.counters();
        assert_eq!((counters.direct_dma, counters.faults, counters.interrupts), (0, 1, 0), "command {command}: {counters:?}");
        session.pump(Nanos::now());
        assert_eq!(session.closed(), Some(CloseReason::Protocol("an operation on the peer's memory failed")));
        let mut events = Events::new();
        borrower.poll(Nanos::now(), &mut events);
        let announced = events.as_slice().iter().any(|event| match event {
            Event::Message(message) => matches!(ToBorrower::parse(message.bytes()), Ok((ToBorrower::Interrupt { .. }, _))),
            _ => false,
        });
        assert!(!announced, "command {command}: a vector announced what did not happen");
        let mut seen = vec![1; 1 << 20];
        guest.read(0, &mut seen).unwrap();
        assert!(seen.iter().all(|byte| *byte == 0), "command {command}: revoked memory changed");
        session.end().unwrap();
    }
}

/// A device that always has something to do.
struct Restless(CopyEngine);

impl Backend for Restless {
    fn description(&self) -> &DeviceDescription {
        self.0.description()
    }
    fn attach(&mut self, bus: &mut dyn Bus) -> Result<(), AttachError> {
        self.0.attach(bus)
    }
    fn detach(&mut self) {
        self.0.detach();
    }
    fn bar_read(&mut self, at: BarAddress, width: Width, bus: &mut dyn Bus) -> u64 {
        self.0.bar_read(at, width, bus)
    }
    fn bar_write(&mut self, at: BarAddress, width: Width, value: u64, bus: &mut dyn Bus) {
        self.0.bar_write(at, width, value, bus);
    }
    fn dma_done(&mut self, tag: DmaTag, result: Result<(), DmaFault>, bus: &mut dyn Bus) {
        self.0.dma_done(tag, result, bus);
    }
    fn poll(&mut self, _bus: &mut dyn Bus) -> Activity {
        Activity::Busy
    }
    fn arm(&mut self) -> bool {
        false
    }
    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn set_interrupt_mode(&mut self, mode: InterruptMode, bus: &mut dyn Bus) {
        self.0.set_interrupt_mode(mode, bus);
    }
    fn fence(&mut self) {
        self.0.fence();
    }
    fn in_flight(&self) -> usize {
        self.0.in_flight()
    }
    fn reset(&mut self, kind: ResetKind, bus: &mut dyn Bus) {
        self.0.reset(kind, bus);
    }
}

fn a_session_that_never_rests_stops_when_it_is_told(connect: Connect) {
    let (lender, borrower) = connect();
    let stop = Waker::new().unwrap();
    let waker = stop.clone();
    let (told, hear) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let restless = Box::new(Restless(CopyEngine::new()));
        let mut session = LenderSession::new(lender, restless).map_err(|(error, _)| error).unwrap();
        told.send(session.run(PollOptions::default(), &waker)).unwrap();
    });
    stop.set();
    let reason = hear.recv_timeout(Duration::from_secs(10));
    // Dropped only now: its goodbye must not be what ends the session. It also ends a thread that does not stop.
    drop(borrower);
    assert_eq!(reason, Ok(CloseReason::Local));
}

#[test]
fn refused_maps_do_not_use_up_the_memories_that_a_borrower_may_offer() {
    let mut steps = Steps::new(over_shm());
    let window = |memory, access| {
        let memory = WindowMemory::Mapped { memory, offset: 0, proven: true };
        Window { iova: Iova(0), len: 4096, access, memory }
    };
    let readable = || {
        let memory = Memory::memfd("guest", 4096).unwrap();
        let (fd, _) = memory.file().unwrap();
        Memory::map_file(fd.try_clone_to_owned().unwrap(), 0, 4096, false).unwrap()
    };
    steps.meanwhile(|borrower, host| {
        // More than the 1,024 that a lender takes; each is offered, and then its window asks for more than it allows.
        for _ in 0..1100 {
            let error = borrower.map(window(readable(), Access::READ_WRITE), host).unwrap_err();
            assert!(error.to_string().contains("cannot be used there"), "{error}");
        }
        borrower.map(window(readable(), Access::READ), host).unwrap();
    });
}
