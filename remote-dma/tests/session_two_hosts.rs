//! A device on one host, its borrower on another, and the link between them cut: what the driver sees, and what becomes of the device.
//!
//! `ci/softroce --two-hosts` runs this same program on hosts a (the lender) and b (the borrower). Registers, DMA both ways and interrupts cross two
//! kernels; when host b loses its link its reads are all ones, its memory stays as it is, and host a's device serves the next link.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

mod common;
#[path = "../../transport/tests/verbs_support/hosts.rs"]
#[allow(dead_code, reason = "each test program uses a part of it")]
mod hosts;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::pair::{AMPLE, GUEST_BYTES, guest};
use common::{
    BUFFER_BYTES, COMMAND, CopyEngine, DONE, FAULTS, FROM, IOVA, LEN, READ, Recorder, Seen, VALUE, WRITE, bar0, description,
};
use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::lender::{LenderSession, PollOptions};
use farbus_remote_dma::wait::Waker;
use farbus_remote_dma::{Attachment, Backend, Iova, Width, Window, WindowMemory};
use farbus_transport::verbs::{DeviceChoice, VerbsFabric};
use farbus_transport::{Access, CloseReason, Memory, Nanos};
use hosts::{Lateness, Mended, black_hole, is_a, meet, prepare_cut};

fn choice() -> DeviceChoice {
    DeviceChoice { device: std::env::var("FARBUS_RDMA_DEV").ok(), ..DeviceChoice::default() }
}

/// Lends the engine until the link ends; how it ended.
fn lend(number: u16, engine: Box<dyn Backend>) -> (CloseReason, Box<dyn Backend>) {
    let mut session = LenderSession::new(meet(number), engine).map_err(|(error, _)| error).unwrap();
    let reason = session.run(PollOptions::default(), &Waker::new().unwrap());
    let ending = Instant::now();
    let engine = session.end().unwrap();
    assert!(ending.elapsed() < Duration::from_secs(3), "the device took {} ms to end", ending.elapsed().as_millis());
    (reason, engine)
}

struct Borrower {
    session: BorrowerSession<VerbsFabric>,
    host: Recorder,
    guest: Arc<Memory>,
}

impl Borrower {
    fn new(number: u16) -> Self {
        let options = BorrowerOptions { control_deadline: AMPLE, ..BorrowerOptions::default() };
        let mut session = BorrowerSession::new(meet(number), description(), options).unwrap();
        let (mut host, guest) = (Recorder::default(), guest());
        session.set_bus_master(true, &mut host);
        let memory = WindowMemory::Mapped { memory: Arc::clone(&guest), offset: 0, proven: true };
        session.map(Window { iova: Iova(0), len: GUEST_BYTES, access: Access::READ_WRITE, memory }, &mut host).unwrap();
        Self { session, host, guest }
    }

    fn write(&mut self, offset: u64, value: u64) {
        self.session.bar_write(bar0(offset), Width::B8, value, &mut self.host);
    }

    fn read(&mut self, offset: u64) -> u64 {
        self.session.bar_read(bar0(offset), Width::B8, &mut self.host)
    }

    fn command(&mut self, command: u64, iova: u64, len: u64) {
        for (offset, value) in [(FROM, 0), (IOVA, iova), (LEN, len), (COMMAND, command)] {
            self.write(offset, value);
        }
    }

    fn next(&mut self) -> Seen {
        let deadline = Instant::now() + AMPLE;
        loop {
            if let Some(seen) = self.host.0.pop_front() {
                return seen;
            }
            assert!(Instant::now() < deadline, "nothing came; the link: {:?}", self.session.gone());
            self.session.poll(Nanos::now(), &mut self.host);
        }
    }

    fn bytes(&self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.guest.read(at, &mut bytes).unwrap();
        bytes
    }

    /// 60 KiB to the device and back to another place, with the vector behind them.
    fn round_trip(&mut self, round: u64) {
        let len = BUFFER_BYTES - 4096;
        let sent = (round + 1).to_le_bytes().repeat(len as usize / 8);
        self.guest.write(0, &sent).unwrap();
        let done = self.read(DONE);
        self.command(READ, 0, len);
        let deadline = Instant::now() + AMPLE;
        while self.read(DONE) == done {
            assert!(Instant::now() < deadline, "a read is never done");
        }
        self.command(WRITE, GUEST_BYTES / 2, len);
        assert_eq!(self.next(), Seen::Interrupt(3));
        assert!(self.bytes(GUEST_BYTES / 2, len) == sent, "round {round}: wrong bytes came back");
        assert_eq!(self.read(FAULTS), 0);
    }
}

#[test]
#[ignore = "needs two hosts with RDMA devices; ci/softroce --two-hosts runs it"]
fn a_borrowed_device_works_across_two_hosts_and_survives_its_link() {
    let lateness = Lateness::watch();
    if is_a() {
        let (reason, engine) = lend(90, Box::new(CopyEngine::new()));
        println!("the first borrower: {reason}");
        assert_eq!(reason, CloseReason::PeerGone);
        let (reason, _) = lend(91, engine);
        println!("the second borrower: {reason}");
        assert!(matches!(reason, CloseReason::PeerClosed | CloseReason::PeerGone), "{reason}");
        return;
    }
    let mended = Mended;
    prepare_cut();
    let mut borrower = Borrower::new(90);
    (0..20).for_each(|round| borrower.round_trip(round));
    borrower.write(VALUE, 7);
    assert_eq!(borrower.read(VALUE), 7);

    // DMA is under way when the link goes.
    for _ in 0..20 {
        borrower.command(WRITE, GUEST_BYTES / 2, BUFFER_BYTES - 4096);
    }
    borrower.session.flush();
    black_hole();
    let cut = Instant::now();
    let value = borrower.read(VALUE);
    let answered = cut.elapsed();
    println!("a register read in the cut: {value:#x} after {} ms", answered.as_millis());
    assert_eq!(value, u64::MAX);
    let limit = Duration::from_secs(2) + 2 * lateness.worst();
    assert!(answered <= limit, "a read was answered after {} ms", answered.as_millis());
    let deadline = Instant::now() + AMPLE;
    while borrower.session.gone().is_none() {
        assert!(Instant::now() < deadline, "the borrower does not notice");
        borrower.session.poll(Nanos::now(), &mut borrower.host);
    }
    assert_eq!(borrower.session.gone(), Some(CloseReason::PeerGone));
    println!("gone after {} ms", cut.elapsed().as_millis());
    // From here on the memory is the guest's alone, and its maps can be taken down.
    let before = borrower.bytes(0, GUEST_BYTES);
    borrower.session.unmap(Iova(0), GUEST_BYTES, &mut borrower.host).unwrap();
    drop(mended);
    std::thread::sleep(Duration::from_millis(300));
    assert!(borrower.bytes(0, GUEST_BYTES) == before, "the device wrote after the end of its link");
    drop(borrower);

    let mut borrower = Borrower::new(91);
    assert_eq!(borrower.read(VALUE), 0, "the device is not as after power-on");
    (0..3).for_each(|round| borrower.round_trip(round));
}
