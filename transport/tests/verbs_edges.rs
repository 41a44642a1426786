//! A link at its edges, over a real device: operations longer than the device takes at once, memory given back under them, queues that are full at both ends.
//!
//! A notification of 8 MiB and a page is two work requests over a device that takes 8 MiB; when it is heard the last byte of the page is there, and it is heard once.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

mod verbs_support;

use std::time::{Duration, Instant};

use farbus_transport::verbs::devices;
use farbus_transport::{Access, CloseReason, Event, Fabric, GrantError, Op, OpId, Regions, Signal};
use verbs_support::{AMPLE, Link, choice};

const PAGE: u64 = 4096;

/// The longest single work request of the device that was promised.
fn longest_request() -> u32 {
    let wanted = choice().device;
    let devices = devices().unwrap();
    let device = devices.iter().find(|device| wanted.as_ref().is_none_or(|wanted| device.name == *wanted)).unwrap();
    device.ports[0].max_message_bytes
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_notification_of_several_requests_is_heard_once_and_behind_the_last_of_them() {
    let mut link = Link::new();
    let len = longest_request().saturating_add(PAGE as u32);
    if len > link.ends[0].limits().max_op_len {
        eprintln!("not run: the device takes the longest operation at once");
        return;
    }
    let (near, far) = (link.memory(0, u64::from(len)), link.memory(1, u64::from(len)));
    let remote = link.grant(1, &far, Access::WRITE);
    let wanted = near.bytes();
    let (from, to) = (near.span(0, len, Access::READ), remote.span(0, len, Access::WRITE).unwrap());
    link.ends[0].post(Signal::Yes(OpId(1)), Op::WriteNotify { from, to, notify: 7 }).unwrap();
    link.ends[0].flush();
    let word = link.wait(1, "notification", |event| if let Event::Notify(word) = event { Some(*word) } else { None });
    let found = far.bytes();
    assert_eq!(word, 7);
    assert!(found == wanted, "the notification is here and its data is not");
    link.wait(0, "report", |event| (*event == Event::Done(OpId(1))).then_some(()));
    // Nothing else was heard, so not a second one either.
    link.works();
}

/// What the device still fills for a read of ours must not be somebody else's by then, and to wait for it must not cost the link.
#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn memory_that_is_given_back_under_operations_of_its_own_side_waits_for_them() {
    for reads in [true, false] {
        let mut link = Link::new();
        let (near, far) = (link.memory(0, 1 << 20), link.memory(1, 1 << 20));
        let remote = link.grant(1, &far, Access::READ_WRITE);
        let (before, theirs) = (near.bytes(), far.bytes());
        let (here, there) = (near.span(0, 1 << 20, Access::READ_WRITE), remote.span(0, 1 << 20, Access::READ_WRITE).unwrap());
        let op = if reads { Op::Read { from: there, into: here } } else { Op::Write { from: here, to: there } };
        link.ends[0].post(Signal::Yes(OpId(1)), op).unwrap();
        link.ends[0].flush();
        link.ends[0].deregister(near.region).unwrap();
        let (ours_then, theirs_then) = (near.bytes(), far.bytes());
        link.wait(0, "report", |event| (*event == Event::Done(OpId(1))).then_some(()));
        assert!(if reads { ours_then == theirs } else { theirs_then == before }, "it did not wait; reads: {reads}");
        link.works();
        assert!(near.bytes() == ours_then, "memory that was given back was written");
    }
}

/// Messages up to the last slot that is theirs, then more grants taken back than there are slots left: each side can still say what it has taken.
#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn two_sides_that_have_filled_each_others_slots_find_out_of_it() {
    let mut link = Link::new();
    let pieces = [link.memory(0, PAGE), link.memory(1, PAGE)];
    let mut sent = [0, 0];
    for side in [0, 1] {
        for _ in 0..12 {
            link.ends[side].export(&pieces[side].region, Access::READ).unwrap();
        }
    }
    for side in [0, 1] {
        while link.ends[side].post(Signal::No, Op::Send { message: b"full" }).is_ok() {
            sent[side] += 1;
        }
        link.ends[side].flush();
    }
    for side in [0, 1] {
        link.ends[side].deregister(pieces[side].region).unwrap();
    }
    let deadline = Instant::now() + AMPLE;
    let mut again = [false, false];
    while again != [true, true] {
        assert!(Instant::now() < deadline, "neither side can say anything any more");
        for side in [0, 1] {
            link.poll(side);
            again[side] = again[side] || link.ends[side].post(Signal::No, Op::Send { message: b"again" }).is_ok();
            link.ends[side].flush();
        }
    }
    for side in [0, 1] {
        for _ in 0..=sent[1 - side] {
            link.wait(side, "message", |event| matches!(event, Event::Message(_)).then_some(()));
        }
    }
    link.works();
}

/// A grant that the peer does not hear of is of no use to it, and nothing can follow it on the control connection.
#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_peer_that_leaves_the_control_connection_unread_loses_the_link() {
    let mut link = Link::new();
    let piece = link.memory(0, PAGE);
    let started = Instant::now();
    let error = loop {
        if let Err(error) = link.ends[0].export(&piece.region, Access::READ) {
            break error;
        }
    };
    assert!(matches!(error, GrantError::Closed), "{error}");
    assert!(started.elapsed() < Duration::from_secs(5) + AMPLE, "blocked for {} ms", started.elapsed().as_millis());
    assert_eq!(link.closed(0), CloseReason::PeerGone);
}
