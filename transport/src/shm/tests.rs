//! What the shared-memory fabric promises beyond the conformance suite: sealing, and a sleeper that notices a death.
//!
//! A borrower that sleeps on its descriptor wakes when the lender's process is gone, and hears why exactly once.

use super::*;
use crate::fabric::{OpId, Regions};
use crate::span::Access;

fn drain(fabric: &mut ShmFabric) -> Vec<Event> {
    let mut events = Events::new();
    fabric.poll(Nanos::now(), &mut events);
    events.as_slice().to_vec()
}

#[test]
fn a_write_is_there_before_the_message_that_follows_it() {
    let (mut lender, mut borrower) = ShmFabric::pair(ShmOptions::default()).unwrap();
    let guest = Memory::memfd("guest", 8192).unwrap();
    let region = borrower.register(Arc::clone(&guest), Access::READ_WRITE).unwrap();
    let grant = borrower.export(&region, Access::READ_WRITE).unwrap();
    let remote = lender.import(&grant).unwrap();
    let device = Memory::memfd("device", 4096).unwrap();
    device.write(0, b"data").unwrap();
    let from = lender.register(device, Access::READ_WRITE).unwrap().span(0, 4, Access::READ).unwrap();
    let to = remote.span(4096, 4, Access::WRITE).unwrap();
    lender.post(Signal::No, Op::Write { from, to }).unwrap();
    lender.post(Signal::No, Op::Send { message: b"done" }).unwrap();
    lender.flush();
    assert_eq!(drain(&mut borrower), [Event::Message(Message::new(b"done").unwrap())]);
    let mut seen = [0; 4];
    guest.read(4096, &mut seen).unwrap();
    assert_eq!(&seen, b"data");
    lender.release(remote);
    lender.post(Signal::Yes(OpId(7)), Op::Write { from, to }).unwrap();
    assert_eq!(drain(&mut lender), [Event::Failed(Some(OpId(7)), OpError::Revoked)]);
}

#[test]
fn a_peer_that_dies_is_noticed_by_a_sleeper() {
    let (lender, mut borrower) = ShmFabric::pair(ShmOptions::default()).unwrap();
    assert!(borrower.arm());
    drop(lender);
    let mut fds = [rustix::event::PollFd::new(&borrower.wait, rustix::event::PollFlags::IN)];
    assert_eq!(rustix::event::poll(&mut fds, None), Ok(1));
    assert_eq!(drain(&mut borrower), [Event::Closed(CloseReason::PeerClosed)]);
    assert!(drain(&mut borrower).is_empty());
}

#[test]
fn a_peer_that_dies_under_a_poll_without_end_is_noticed_within_30_milliseconds() {
    const STEP: Duration = Duration::from_millis(1);
    for phase in 0..16 {
        let (mut lender, mut borrower) = ShmFabric::pair(ShmOptions::default()).unwrap();
        let mut events = Events::new();
        let mut now = borrower.heard_at;
        for _ in 0..400 + phase {
            now = now + STEP;
            borrower.poll(now, &mut events);
        }
        // The last thing it does is to take a message, as a peer that lives does.
        borrower.post(Signal::No, Op::Send { message: b"are you there" }).unwrap();
        assert_eq!(drain(&mut lender).len(), 1);
        // A process that is killed says no goodbye; its socket closes.
        lender.lifeline = None;
        let died = now;
        while events.as_slice().is_empty() {
            now = now + STEP;
            borrower.poll(now, &mut events);
            assert!(now.since(died) <= Duration::from_millis(31), "phase {phase}: not noticed after {:?}", now.since(died));
        }
        assert_eq!(events.as_slice(), [Event::Closed(CloseReason::PeerGone)]);
    }
}

#[test]
fn a_peer_that_claims_to_have_taken_what_was_never_sent_is_cut_off_at_once() {
    use crate::ring::Lines;
    let (mut lender, borrower) = ShmFabric::pair(ShmOptions::default()).unwrap();
    while lender.post(Signal::No, Op::Send { message: b"x" }).is_ok() {}
    borrower.rx.lines().consumed().store(99_999, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(lender.post(Signal::No, Op::Send { message: b"x" }), Err(PostError::Full));
    let closed = Event::Closed(CloseReason::Protocol("a ring index that cannot be true"));
    assert_eq!(drain(&mut lender), [closed]);
}

#[test]
fn unsealed_memory_is_refused_unless_allowed() {
    for accept_unsealed in [false, true] {
        let (mut lender, mut borrower) = ShmFabric::pair(ShmOptions { accept_unsealed }).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let region = borrower.register(Memory::map_file(file.into(), 0, 4096, true).unwrap(), Access::READ).unwrap();
        let grant = borrower.export(&region, Access::READ).unwrap();
        assert_eq!(lender.import(&grant).is_ok(), accept_unsealed);
    }
}
