//! A session whose peer is no session: whatever comes, it ends with the peer named as the cause, in time, and the device serves the next borrower.
//!
//! A raw end writes nothing with the word 0xdeadbeef behind it, which no session ever does: the lender's session ends as "a notification that was not
//! asked for", its device is reset, and a new session on a new link reads its register.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::links::{Connect, Link, on_every_fabric};
use common::pair::{AMPLE, GUEST_BYTES, guest};
use common::{BUFFER_BYTES, CopyEngine, IOVA, LEN, Recorder, VALUE, WRITE, bar0, description};
use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::lender::{LenderSession, PollOptions};
use farbus_remote_dma::message::{Outcome, ToBorrower, ToLender};
use farbus_remote_dma::wait::Waker;
use farbus_remote_dma::{Attachment, Backend, Iova, Ticket, Width};
use farbus_transport::{Access, CloseReason, Event, Events, Fabric, Grant, LocalRegion, Memory, Nanos, Op, RemoteRegion, Signal};

on_every_fabric! {
    a_notification_ends_a_lenders_session
    a_notification_ends_a_borrowers_session
    nonsense_ends_a_lenders_session_and_its_device_serves_the_next
    nonsense_ends_a_borrowers_session_and_its_reads_are_all_ones
    questions_that_cannot_be_are_refused_or_end_the_session
    a_borrower_that_vanishes_in_the_middle_of_its_dma_leaves_the_device_as_new
}

/// How long a session may take to notice.
const NOTICED: Duration = Duration::from_secs(5);

/// The raw end of a link, with memory of its own.
struct Raw {
    link: Link,
    own: LocalRegion,
    heard: Vec<Event>,
}

impl Raw {
    fn new(mut link: Link) -> Self {
        let memory = Memory::memfd("raw", 64 << 10).unwrap();
        let own = link.register(memory, Access::READ_WRITE).unwrap();
        Self { link, own, heard: Vec::new() }
    }

    fn poll(&mut self) {
        let mut events = Events::new();
        self.link.poll(Nanos::now(), &mut events);
        self.heard.extend_from_slice(events.as_slice());
    }

    fn post(&mut self, op: Op<'_>) {
        let deadline = Instant::now() + AMPLE;
        while self.link.post(Signal::No, op).is_err() {
            if self.heard.iter().any(|event| matches!(event, Event::Closed(_))) {
                return;
            }
            self.poll();
            assert!(Instant::now() < deadline, "no room");
        }
        self.link.flush();
    }

    fn send(&mut self, message: &[u8]) {
        self.post(Op::Send { message });
    }

    /// The grant of the session's staging memory, the first thing that it sends.
    fn staging(&mut self, parse: fn(&[u8]) -> Option<Grant>) -> RemoteRegion {
        let deadline = Instant::now() + AMPLE;
        loop {
            let grant = self.heard.iter().find_map(|event| match event {
                Event::Message(message) => parse(message.bytes()),
                _ => None,
            });
            if let Some(grant) = grant {
                return self.link.import(&grant).unwrap();
            }
            assert!(Instant::now() < deadline, "no staging memory; heard {:?}", self.heard);
            self.poll();
        }
    }

    fn notify(&mut self, staging: RemoteRegion, notify: u32) {
        let (from, to) = (self.own.span(0, 0, Access::READ).unwrap(), staging.span(0, 0, Access::WRITE).unwrap());
        self.post(Op::WriteNotify { from, to, notify });
    }

    fn is_closed(&mut self) -> bool {
        self.poll();
        self.heard.iter().any(|event| matches!(event, Event::Closed(_)))
    }
}

/// How a lender's session ends that this is done to; its device then serves an honest borrower.
fn lender_against(connect: Connect, attack: impl FnOnce(&mut Raw)) -> CloseReason {
    let (lender, raw) = connect();
    let (told, hear) = std::sync::mpsc::channel();
    let session = std::thread::spawn(move || {
        let mut session = LenderSession::new(lender, Box::new(CopyEngine::new())).map_err(|(error, _)| error).unwrap();
        told.send(session.run(PollOptions::default(), &Waker::new().unwrap())).unwrap();
        session.end().unwrap()
    });
    let mut raw = Raw::new(raw);
    attack(&mut raw);
    let deadline = Instant::now() + NOTICED;
    let reason = loop {
        if let Ok(reason) = hear.try_recv() {
            break reason;
        }
        assert!(Instant::now() < deadline, "the session goes on");
        raw.poll();
    };
    let engine = session.join().unwrap();
    let deadline = Instant::now() + NOTICED;
    while !raw.is_closed() {
        assert!(Instant::now() < deadline, "the peer does not hear of the end");
    }
    serves(connect, engine);
    reason
}

/// The device answers an honest borrower as after power-on.
fn serves(connect: Connect, engine: Box<dyn Backend>) {
    let (lender, borrower) = connect();
    let (stop, mut host) = (Waker::new().unwrap(), Recorder::default());
    let waker = stop.clone();
    let lending = std::thread::spawn(move || {
        LenderSession::new(lender, engine).map_err(|(error, _)| error).unwrap().run(PollOptions::default(), &waker)
    });
    let options = BorrowerOptions { read_deadline: AMPLE, ..BorrowerOptions::default() };
    let mut session = BorrowerSession::new(borrower, description(), options).unwrap();
    assert_eq!(session.bar_read(bar0(VALUE), Width::B8, &mut host), 0);
    session.bar_write(bar0(VALUE), Width::B8, 9, &mut host);
    assert_eq!(session.bar_read(bar0(VALUE), Width::B8, &mut host), 9);
    stop.set();
    lending.join().unwrap();
}

/// How a borrower's session ends that this is done to; its reads are all ones from then on.
fn borrower_against(connect: Connect, attack: impl FnOnce(&mut Raw)) -> CloseReason {
    let (raw, borrower) = connect();
    let (mut raw, mut host) = (Raw::new(raw), Recorder::default());
    let mut session = BorrowerSession::new(borrower, description(), BorrowerOptions::default()).unwrap();
    attack(&mut raw);
    let deadline = Instant::now() + NOTICED;
    while session.gone().is_none() {
        assert!(Instant::now() < deadline, "the session goes on");
        raw.poll();
        session.poll(Nanos::now(), &mut host);
    }
    let started = Instant::now();
    assert_eq!(session.bar_read(bar0(VALUE), Width::B4, &mut host), 0xffff_ffff);
    assert!(started.elapsed() < Duration::from_millis(500), "a read waited for a link that has ended");
    session.gone().unwrap()
}

fn lenders_staging(bytes: &[u8]) -> Option<Grant> {
    match ToBorrower::parse(bytes) {
        Ok((ToBorrower::Staging(grant), _)) => Some(grant),
        _ => None,
    }
}

fn borrowers_staging(bytes: &[u8]) -> Option<Grant> {
    match ToLender::parse(bytes) {
        Ok((ToLender::Staging(grant), _)) => Some(grant),
        _ => None,
    }
}

const WORDS: [u32; 4] = [0, 1, 0xdead_beef, u32::MAX];
const NOT_ASKED_FOR: CloseReason = CloseReason::Protocol("a notification that was not asked for");

fn a_notification_ends_a_lenders_session(connect: Connect) {
    for word in WORDS {
        let reason = lender_against(connect, |raw| {
            let staging = raw.staging(lenders_staging);
            raw.notify(staging, word);
        });
        assert_eq!(reason, NOT_ASKED_FOR, "{word:#x}");
    }
}

fn a_notification_ends_a_borrowers_session(connect: Connect) {
    for word in WORDS {
        let reason = borrower_against(connect, |raw| {
            let staging = raw.staging(borrowers_staging);
            raw.notify(staging, word);
        });
        assert_eq!(reason, NOT_ASKED_FOR, "{word:#x}");
    }
}

fn nonsense_ends_a_lenders_session_and_its_device_serves_the_next(connect: Connect) {
    let good = ToLender::BusMaster(true).encode();
    let behind = [good.as_slice(), &[0]].concat();
    let fetched = ToLender::Fetched { ticket: Ticket(3), ok: true }.encode();
    let stored = ToLender::Stored { ticket: Ticket(u32::MAX), ok: true }.encode();
    let cases: [&[u8]; 8] = [b"", &[0], &[99, 1, 2, 3], &behind, &[9, 2], fetched.as_slice(), stored.as_slice(), &[1; 56]];
    for message in cases {
        let reason = lender_against(connect, |raw| raw.send(message));
        assert!(matches!(reason, CloseReason::Protocol(_)), "{message:?}: {reason}");
    }
}

fn nonsense_ends_a_borrowers_session_and_its_reads_are_all_ones(connect: Connect) {
    let fetch = ToBorrower::Fetch { ticket: Ticket(77), iova: Iova(0), len: 4 }.encode();
    let across = ToBorrower::Store { ticket: Ticket(16), slot: 0, iova: Iova(4095), len: 2, polled: false }.encode();
    let cases: [&[u8]; 7] = [b"", &[0], &[10, 1], &[3, 0, 0, 1, 0], &[2, 1, 0, 0, 0, 200], fetch.as_slice(), across.as_slice()];
    for message in cases {
        let reason = borrower_against(connect, |raw| raw.send(message));
        assert!(matches!(reason, CloseReason::Protocol(_)), "{message:?}: {reason}");
    }
}

fn questions_that_cannot_be_are_refused_or_end_the_session(connect: Connect) {
    let map = |iova, len, memory, offset| ToLender::Map {
        sequence: 5,
        iova: Iova(iova),
        len,
        memory,
        offset,
        access: Access::READ_WRITE,
    };
    let refused = [
        (map(0, 0, None, 0), Outcome::Range),
        (map(u64::MAX - 4095, 8192, None, 0), Outcome::Range),
        (map(0, 4096, Some(77), 0), Outcome::UnknownKey),
        (ToLender::Withdraw { sequence: 5, key: 77 }, Outcome::UnknownKey),
    ];
    let reason = lender_against(connect, |raw| {
        for (question, outcome) in refused {
            raw.heard.clear();
            raw.send(question.encode().as_slice());
            let deadline = Instant::now() + AMPLE;
            let answer = loop {
                let answer = raw.heard.iter().find_map(|event| match event {
                    Event::Message(message) => match ToBorrower::parse(message.bytes()) {
                        Ok((ToBorrower::Ack { sequence: 5, outcome }, _)) => Some(outcome),
                        _ => None,
                    },
                    _ => None,
                });
                if let Some(answer) = answer {
                    break answer;
                }
                assert!(Instant::now() < deadline, "{question:?} is not answered; heard {:?}", raw.heard);
                raw.poll();
            };
            assert_eq!(answer, outcome, "{question:?}");
        }
        // A range of nothing at all, and the session's own limit of what may wait.
        raw.send(ToLender::BarWrite { at: bar0(4092), width: Width::B8, value: 1 }.encode().as_slice());
    });
    assert_eq!(reason, CloseReason::Protocol("a register write outside the device"));
}

fn a_borrower_that_vanishes_in_the_middle_of_its_dma_leaves_the_device_as_new(connect: Connect) {
    let (lender, borrower) = connect();
    let session = std::thread::spawn(move || {
        let mut session = LenderSession::new(lender, Box::new(CopyEngine::new())).map_err(|(error, _)| error).unwrap();
        let reason = session.run(PollOptions::default(), &Waker::new().unwrap());
        (reason, session.end().unwrap())
    });
    let mut host = Recorder::default();
    let options = BorrowerOptions { control_deadline: AMPLE, ..BorrowerOptions::default() };
    let mut borrower = BorrowerSession::new(borrower, description(), options).unwrap();
    borrower.set_bus_master(true, &mut host);
    let guest = guest();
    let memory = farbus_remote_dma::WindowMemory::Mapped { memory: Arc::clone(&guest), offset: 0, proven: true };
    let window = farbus_remote_dma::Window { iova: Iova(0), len: GUEST_BYTES, access: Access::READ_WRITE, memory };
    borrower.map(window, &mut host).unwrap();
    for (offset, value) in [(IOVA, 0), (LEN, BUFFER_BYTES - 4096)] {
        borrower.bar_write(bar0(offset), Width::B8, value, &mut host);
    }
    for _ in 0..50 {
        borrower.bar_write(bar0(common::COMMAND), Width::B8, WRITE, &mut host);
    }
    borrower.flush();
    let vanished = Instant::now();
    drop(borrower);
    let (reason, engine) = session.join().unwrap();
    assert!(vanished.elapsed() < NOTICED, "{reason} after {} ms", vanished.elapsed().as_millis());
    println!("{reason}");
    // What lands in memory that is no longer granted is nothing; the guest's is its own again.
    let before = bytes_of(&guest);
    std::thread::sleep(Duration::from_millis(200));
    assert!(bytes_of(&guest) == before, "DMA after the borrower's end was gone");
    serves(connect, engine);
}

fn bytes_of(memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; memory.len() as usize];
    memory.read(0, &mut bytes).unwrap();
    bytes
}
