//! A borrower that leaves on purpose: the device comes to rest, is kept for who has the token, and goes on in another session as if nothing had been.
//!
//! The register AQA that the first borrower wrote is read by the second, who came with the token; the third, who came with another, gets nothing, and one
//! whose borrower merely vanished finds a device after its reset.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a panic is how a test fails")]

mod common;

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::links::{Connect, Link, on_every_fabric};
use common::pair::{AMPLE, Pair, guest};
use common::{Recorder, bar0};
use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::lender::{LenderSession, PollOptions};
use farbus_remote_dma::model::{Nvme, NvmeOptions};
use farbus_remote_dma::wait::Waker;
use farbus_remote_dma::{
    Attachment, AttachmentError, Backend, Continued, DeviceDescription, Iova, Kept, Rest, RestToken, Width, Window, WindowMemory,
};
use farbus_transport::{Access, CloseReason, Memory, Nanos};

const AQA: u64 = 0x24;
const LEASE: Duration = Duration::from_secs(600);

fn nvme() -> Box<dyn Backend> {
    Box::new(Nvme::in_memory(Memory::memfd("image", 1 << 20).unwrap(), NvmeOptions::default()).unwrap())
}

/// A lender's thread, whose end is the device, kept or reset.
type Lender = JoinHandle<Result<Kept, Box<dyn Backend>>>;

fn serve(mut session: LenderSession<Link>) -> Result<Kept, Box<dyn Backend>> {
    session.run(PollOptions::default(), &Waker::new().unwrap());
    session.into_kept().map_err(|session| session.end().unwrap())
}

fn lend(connect: Connect, device: Box<dyn Backend>) -> (Lender, BorrowerSession<Link>) {
    let (lender, borrower) = connect();
    let description = device.description().clone();
    let thread = std::thread::spawn(move || serve(LenderSession::new(lender, device).map_err(|(error, _)| error).unwrap()));
    (thread, borrow(borrower, description))
}

fn lend_on(connect: Connect, device: Continued, token: RestToken) -> (Lender, BorrowerSession<Link>) {
    let (lender, borrower) = connect();
    let description = device.device().description().clone();
    let thread = std::thread::spawn(move || serve(LenderSession::continued(lender, device).map_err(|(error, _)| error).unwrap()));
    (thread, borrow(borrower, description).continuing(token))
}

fn borrow(link: Link, description: DeviceDescription) -> BorrowerSession<Link> {
    let options = BorrowerOptions { read_deadline: AMPLE, control_deadline: AMPLE, ..BorrowerOptions::default() };
    BorrowerSession::new(link, description, options).unwrap()
}

fn rest(session: &mut BorrowerSession<Link>, token: RestToken) -> Result<Rest, AttachmentError> {
    let mut host = Recorder::default();
    session.pause(token, &mut host)?;
    let deadline = Instant::now() + AMPLE;
    loop {
        if let Some(rest) = session.rest()? {
            return Ok(rest);
        }
        assert!(Instant::now() < deadline, "the device never comes to rest");
        session.poll(Nanos::now(), &mut host);
    }
}

fn map(session: &mut BorrowerSession<Link>, memory: &Arc<Memory>) {
    let behind = WindowMemory::Mapped { memory: Arc::clone(memory), offset: 0, proven: true };
    let window = Window { iova: Iova(0x10_0000), len: memory.len(), access: Access::READ_WRITE, memory: behind };
    session.map(window, &mut Recorder::default()).unwrap();
}

fn read(session: &mut BorrowerSession<Link>, offset: u64) -> u64 {
    session.bar_read(bar0(offset), Width::B4, &mut Recorder::default())
}

fn write(session: &mut BorrowerSession<Link>, offset: u64, value: u64) {
    session.bar_write(bar0(offset), Width::B4, value, &mut Recorder::default());
}

on_every_fabric! {
    a_device_goes_on_where_its_borrower_left_it_for_who_has_the_token
    a_borrower_that_vanishes_leaves_a_device_that_is_reset
    a_device_that_cannot_rest_says_so_and_goes_on
    what_happens_after_the_rest_makes_it_none
}

fn a_device_goes_on_where_its_borrower_left_it_for_who_has_the_token(connect: Connect) {
    let (lender, mut first) = lend(connect, nvme());
    map(&mut first, &guest());
    write(&mut first, AQA, 0x001f_001f);
    let token = RestToken::random().unwrap();
    let resting = rest(&mut first, token).unwrap();
    assert!(resting.token == token && resting.mark.is_some());
    first.keep(LEASE, &mut Recorder::default()).unwrap();
    assert_eq!(first.gone(), Some(CloseReason::Local), "an attachment that left is good for something");
    assert_eq!(read(&mut first, AQA), 0xffff_ffff);
    let Ok(kept) = lender.join().unwrap() else { panic!("the device was not kept") };
    let kept = kept.claim(&RestToken::random().unwrap()).expect_err("another token claimed it");

    let (lender, mut second) = lend_on(connect, kept.claim(&token).unwrap(), token);
    assert_eq!(second.continues(), Some(token));
    assert_eq!(read(&mut second, AQA), 0x001f_001f, "the device forgot what it was told");
    // Nothing of the first borrower's memory is left: the same addresses can be mapped again.
    map(&mut second, &guest());
    second.resume(&mut Recorder::default());
    drop(second);
    assert!(lender.join().unwrap().is_err(), "a device was kept that nobody asked to keep");
}

fn a_borrower_that_vanishes_leaves_a_device_that_is_reset(connect: Connect) {
    let (lender, mut first) = lend(connect, nvme());
    write(&mut first, AQA, 0x001f_001f);
    rest(&mut first, RestToken::random().unwrap()).unwrap();
    drop(first);
    let Err(device) = lender.join().unwrap() else { panic!("a device at rest was kept without being asked") };
    let (_lender, mut second) = lend(connect, device);
    assert_eq!(read(&mut second, AQA), 0);
}

fn a_device_that_cannot_rest_says_so_and_goes_on(connect: Connect) {
    let mut pair = Pair::new(connect());
    pair.session.pause(RestToken::random().unwrap(), &mut pair.host).unwrap();
    let deadline = Instant::now() + AMPLE;
    let refused = loop {
        pair.session.poll(Nanos::now(), &mut pair.host);
        match pair.session.rest() {
            Ok(None) => assert!(Instant::now() < deadline, "no answer"),
            other => break other,
        }
    };
    assert!(matches!(refused, Err(AttachmentError::Refused(_))), "{refused:?}");
    assert!(pair.session.keep(LEASE, &mut pair.host).is_err());
    pair.write(common::VALUE, 7);
    assert_eq!(pair.read(common::VALUE), 7);
}

fn what_happens_after_the_rest_makes_it_none(connect: Connect) {
    let (_lender, mut session) = lend(connect, nvme());
    let token = RestToken::random().unwrap();
    rest(&mut session, token).unwrap();
    write(&mut session, AQA, 0x0003_0003);
    assert_eq!(session.rest(), Ok(None), "a device that was written to counts as at rest");
    assert!(session.keep(LEASE, &mut Recorder::default()).is_err());
    // It stays paused, so it comes to rest again at once.
    assert_eq!(rest(&mut session, token).unwrap().token, token);
    session.keep(LEASE, &mut Recorder::default()).unwrap();
}
