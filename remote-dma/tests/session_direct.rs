//! Guest memory that threads of the device fill by themselves, as an image's workers do: what waits for them, and what is known of it after.
//!
//! A doorbell makes the device map 100 bytes at iova 0x1ff0; a thread of its own writes them when the test says so; an unmap that was asked
//! for meanwhile is acknowledged after that, and by then pages 1 and 2 are in the dirty log.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

mod common;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use common::{IOVA, LEN, Recorder, bar0, description};
use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::lender::{LenderSession, PollOptions};
use farbus_remote_dma::wait::Waker;
use farbus_remote_dma::{
    Activity, AttachError, Attachment, Backend, BarAddress, Bus, DeviceDescription, DmaFault, DmaTag, InterruptMode, Iova,
    MapError, ResetKind, Width, Window, WindowMemory,
};
use farbus_transport::shm::{ShmFabric, ShmOptions};
use farbus_transport::{Access, CloseReason, Memory, Nanos};

const BYTES: u64 = 1 << 20;
const QUIET: Duration = Duration::from_millis(50);

/// A device whose writes of LEN bytes to an address stored to IOVA are made by threads that wait to be told.
struct Filler {
    description: DeviceDescription,
    len: u64,
    /// One for each thread: what to fill with. A thread whose sender is gone writes nothing.
    orders: Sender<Sender<u8>>,
    /// Told when the session ends or the device is reset.
    fenced: Sender<()>,
    at_work: Arc<AtomicUsize>,
}

impl Filler {
    fn new() -> (Self, Receiver<Sender<u8>>, Receiver<()>) {
        let (orders, taken) = channel();
        let (fenced, was_fenced) = channel();
        (Self { description: description(), len: 0, orders, fenced, at_work: Arc::default() }, taken, was_fenced)
    }
}

impl Backend for Filler {
    fn description(&self) -> &DeviceDescription {
        &self.description
    }
    fn attach(&mut self, _bus: &mut dyn Bus) -> Result<(), AttachError> {
        Ok(())
    }
    fn detach(&mut self) {}
    fn bar_read(&mut self, _at: BarAddress, _width: Width, _bus: &mut dyn Bus) -> u64 {
        self.at_work.load(Ordering::Acquire) as u64
    }
    fn bar_write(&mut self, at: BarAddress, _width: Width, value: u64, bus: &mut dyn Bus) {
        if at.offset == LEN {
            self.len = value;
        }
        if at.offset != IOVA {
            return;
        }
        let buffer = bus.map(Iova(value), self.len, Access::WRITE).unwrap().unwrap();
        let (order, ordered) = channel();
        self.at_work.fetch_add(1, Ordering::AcqRel);
        let at_work = Arc::clone(&self.at_work);
        std::thread::spawn(move || {
            if let Ok(byte) = ordered.recv() {
                let (memory, start) = buffer.parts();
                memory.write(start, &vec![byte; buffer.len() as usize]).unwrap();
            }
            drop(buffer);
            at_work.fetch_sub(1, Ordering::AcqRel);
        });
        self.orders.send(order).unwrap();
    }
    fn dma_done(&mut self, _tag: DmaTag, _result: Result<(), DmaFault>, _bus: &mut dyn Bus) {}
    fn poll(&mut self, _bus: &mut dyn Bus) -> Activity {
        Activity::Idle(None)
    }
    fn arm(&mut self) -> bool {
        true
    }
    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn set_interrupt_mode(&mut self, _mode: InterruptMode, _bus: &mut dyn Bus) {}
    fn fence(&mut self) {
        // Most tests do not wait for it.
        let _nobody = self.fenced.send(());
    }
    fn in_flight(&self) -> usize {
        self.at_work.load(Ordering::Acquire)
    }
    fn reset(&mut self, _kind: ResetKind, _bus: &mut dyn Bus) {}
}

struct Pair {
    session: Option<BorrowerSession<ShmFabric>>,
    host: Recorder,
    orders: Receiver<Sender<u8>>,
    fenced: Option<Receiver<()>>,
    stop: Waker,
    lender: Option<std::thread::JoinHandle<CloseReason>>,
}

impl Pair {
    fn new() -> Self {
        Self::with(BorrowerOptions::default())
    }

    fn with(options: BorrowerOptions) -> Self {
        let (lender, borrower) = ShmFabric::pair(ShmOptions::default()).unwrap();
        let (filler, orders, fenced) = Filler::new();
        let stop = Waker::new().unwrap();
        let waker = stop.clone();
        let lender = std::thread::spawn(move || {
            let mut session = LenderSession::new(lender, Box::new(filler)).map_err(|(error, _)| error).unwrap();
            let reason = session.run(PollOptions::default(), &waker);
            session.end().unwrap();
            reason
        });
        let mut session = BorrowerSession::new(borrower, description(), options).unwrap();
        let mut host = Recorder::default();
        session.set_bus_master(true, &mut host);
        Self { session: Some(session), host, orders, fenced: Some(fenced), stop, lender: Some(lender) }
    }

    fn session(&mut self) -> (&mut BorrowerSession<ShmFabric>, &mut Recorder) {
        (self.session.as_mut().unwrap(), &mut self.host)
    }

    fn map(&mut self, iova: u64, memory: &Arc<Memory>) {
        let memory = WindowMemory::Mapped { memory: Arc::clone(memory), offset: 0, proven: true };
        let window = Window { iova: Iova(iova), len: BYTES, access: Access::READ_WRITE, memory };
        let (session, host) = self.session();
        session.map(window, host).unwrap();
    }

    /// Has the device begin to write, and gives what tells it to go on.
    fn begin(&mut self, iova: u64, len: u64) -> Sender<u8> {
        for (offset, value) in [(LEN, len), (IOVA, iova)] {
            let (session, host) = self.session();
            session.bar_write(bar0(offset), Width::B8, value, host);
            session.flush();
        }
        self.orders.recv_timeout(Duration::from_secs(10)).unwrap()
    }

    fn pages(&mut self, memory: &Arc<Memory>) -> Option<Vec<u64>> {
        let mut pages = Vec::new();
        let (session, host) = self.session();
        session.dirty_log(memory, host)?.take(|page| pages.push(page));
        Some(pages)
    }

    /// Unmaps, while `meanwhile` says when the device goes on.
    fn unmap(&mut self, iova: u64, meanwhile: impl FnOnce() + Send) {
        std::thread::scope(|scope| {
            scope.spawn(meanwhile);
            let (session, host) = self.session();
            session.unmap(Iova(iova), BYTES, host).unwrap();
        });
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.stop.set();
        if let Some(lender) = self.lender.take() {
            lender.join().unwrap();
        }
    }
}

fn holds(memory: &Memory, at: u64, byte: u8) -> bool {
    let mut bytes = [0; 100];
    memory.read(at, &mut bytes).unwrap();
    bytes == [byte; 100]
}

#[test]
fn an_unmap_waits_for_the_devices_threads_and_by_then_all_they_wrote_is_marked() {
    for windows in 1..=2 {
        let mut pair = Pair::new();
        let guest = Memory::memfd("guest", BYTES).unwrap();
        for window in 0..windows {
            pair.map(window * BYTES, &guest);
        }
        let go = pair.begin(0x1ff0, 100);
        assert_eq!(pair.pages(&guest).unwrap(), [0_u64; 0], "nothing is written yet");
        let seen = Arc::clone(&guest);
        pair.unmap(0, move || {
            std::thread::sleep(QUIET);
            assert!(holds(&seen, 0x1ff0, 0));
            go.send(7).unwrap();
        });
        assert!(holds(&guest, 0x1ff0, 7), "acknowledged before the write");
        // With one window the memory has none any more: what was written to it can still be asked for, once.
        assert_eq!(pair.pages(&guest).unwrap(), [1, 2], "{windows} windows");
        assert!(pair.pages(&guest).is_none_or(|pages| pages.is_empty()));
    }
}

#[test]
fn what_was_written_before_the_last_window_went_is_known_when_the_memory_is_mapped_again() {
    let mut pair = Pair::new();
    let (guest, other) = (Memory::memfd("guest", BYTES).unwrap(), Memory::memfd("other", BYTES).unwrap());
    pair.map(0, &guest);
    let go = pair.begin(0x5000, 100);
    pair.unmap(0, move || go.send(1).unwrap());
    // In its place is other memory, which was not written.
    pair.map(0, &other);
    assert_eq!(pair.pages(&other).unwrap(), [0_u64; 0]);
    pair.map(BYTES, &guest);
    let go = pair.begin(BYTES + 0x9000, 100);
    pair.unmap(BYTES, move || go.send(2).unwrap());
    assert_eq!(pair.pages(&guest).unwrap(), [5, 9]);
    assert_eq!(pair.pages(&other).unwrap(), [0_u64; 0]);
}

#[test]
fn a_session_that_is_dropped_takes_its_memory_back_from_the_devices_threads() {
    let mut pair = Pair::new();
    let guest = Memory::memfd("guest", BYTES).unwrap();
    pair.map(0, &guest);
    let go = pair.begin(0x1000, 100);
    let late = std::thread::spawn(move || {
        std::thread::sleep(QUIET);
        go.send(7).unwrap();
    });
    pair.session = None;
    assert!(holds(&guest, 0x1000, 7), "the memory was free while a thread of the device's was in it");
    late.join().unwrap();
}

#[test]
fn memory_of_a_lender_that_is_given_up_is_free_only_when_its_threads_are_out_of_it() {
    let control_deadline = Duration::from_millis(100);
    let mut pair = Pair::with(BorrowerOptions { control_deadline, ..BorrowerOptions::default() });
    let guest = Memory::memfd("guest", BYTES).unwrap();
    pair.map(0, &guest);
    let go = pair.begin(0x1000, 100);
    let fenced = pair.fenced.take().unwrap();
    pair.unmap(0, move || {
        // By then the borrower has given up, and its lender has heard so.
        fenced.recv_timeout(Duration::from_secs(10)).unwrap();
        go.send(7).unwrap();
    });
    assert!(pair.session().0.gone().is_some(), "an unmap that took longer than its deadline");
    assert!(holds(&guest, 0x1000, 7), "the memory was free while a thread of the device's was in it");
    assert_eq!(pair.pages(&guest).unwrap(), [1], "and what it wrote is known");
}

#[test]
fn memory_that_the_device_never_lets_go_of_is_not_said_to_be_free() {
    let control_deadline = Duration::from_millis(100);
    let mut pair = Pair::with(BorrowerOptions { control_deadline, ..BorrowerOptions::default() });
    let guest = Memory::memfd("guest", BYTES).unwrap();
    pair.map(0, &guest);
    let go = pair.begin(0x1000, 100);
    for _ in 0..2 {
        let (session, host) = pair.session();
        let refused = session.unmap(Iova(0), BYTES, host);
        assert!(matches!(refused, Err(MapError::Attachment(_))), "{refused:?}");
    }
    go.send(7).unwrap();
}

#[test]
fn a_device_that_does_not_end_its_work_is_wedged_and_its_borrower_is_not_told_that_its_memory_is_free() {
    let (lender, borrower) = ShmFabric::pair(ShmOptions::default()).unwrap();
    let (filler, orders, _fenced) = Filler::new();
    let stop = Waker::new().unwrap();
    let waker = stop.clone();
    let lending = std::thread::spawn(move || {
        let mut session = LenderSession::new(lender, Box::new(filler)).map_err(|(error, _)| error).unwrap();
        session.run(PollOptions::default(), &waker);
        session
    });
    let mut host = Recorder::default();
    let mut session = BorrowerSession::new(borrower, description(), BorrowerOptions::default()).unwrap();
    session.set_bus_master(true, &mut host);
    let guest = Memory::memfd("guest", BYTES).unwrap();
    let memory = WindowMemory::Mapped { memory: Arc::clone(&guest), offset: 0, proven: true };
    session.map(Window { iova: Iova(0), len: BYTES, access: Access::READ_WRITE, memory }, &mut host).unwrap();
    for (offset, value) in [(LEN, 100), (IOVA, 0x1000)] {
        session.bar_write(bar0(offset), Width::B8, value, &mut host);
    }
    session.flush();
    let go = orders.recv_timeout(Duration::from_secs(10)).unwrap();
    stop.set();
    let wedged = lending.join().unwrap().end_within(QUIET).err().unwrap();
    assert_eq!(wedged.in_flight(), 1);
    let wedged = wedged.wait(QUIET).err().unwrap();
    session.poll(Nanos::now(), &mut host);
    assert_eq!(session.gone(), None, "told that the lender has left, with its thread in the guest's memory");
    go.send(7).unwrap();
    let backend = wedged.wait(Duration::from_secs(10)).unwrap();
    session.poll(Nanos::now(), &mut host);
    assert_eq!(session.gone(), Some(CloseReason::PeerClosed));
    session.unmap(Iova(0), BYTES, &mut host).unwrap();
    assert!(holds(&guest, 0x1000, 7));
    // And the device can be lent again.
    let (lender, _borrower) = ShmFabric::pair(ShmOptions::default()).unwrap();
    assert!(LenderSession::new(lender, backend).is_ok());
}
