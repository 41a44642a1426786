//! A link at its edges, over a real device: operations longer than a work request, memory given back under them, queues that are full at both ends.
//!
//! A notification of 16 MiB is 16 work requests; when it is heard the last byte of the last is there, and it is heard once.

mod verbs_support;

use std::time::{Duration, Instant};

use farbus_transport::{Access, CloseReason, Event, Events, Fabric, GrantError, Nanos, Op, OpId, Regions, Signal};
use verbs_support::{AMPLE, Link};

const PAGE: u64 = 4096;

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_notification_of_several_requests_is_heard_once_and_behind_the_last_of_them() {
    let (mut link, len) = (Link::new(), 16_u32 << 20);
    let (near, far) = (link.memory(0, u64::from(len)), link.memory(1, u64::from(len)));
    let remote = link.grant(1, &far, Access::WRITE);
    let end = u64::from(len) - 64;
    let (mut wanted, mut found) = ([0; 64], [0; 64]);
    near.memory.read(end, &mut wanted).unwrap();
    let (from, to) = (near.span(0, len, Access::READ), remote.span(0, len, Access::WRITE).unwrap());
    let [ours, theirs] = &mut link.ends;
    // Heard by a thread of its own: soft-RoCE carries much out inside of the call that hands it over.
    let word = std::thread::scope(|scope| {
        let hearing = scope.spawn(|| {
            let (mut events, deadline) = (Events::new(), Instant::now() + AMPLE);
            while events.as_slice().is_empty() {
                assert!(Instant::now() < deadline, "no notification");
                theirs.poll(Nanos::now(), &mut events);
            }
            far.memory.read(end, &mut found).unwrap();
            events.as_slice()[0]
        });
        ours.post(Signal::Yes(OpId(1)), Op::WriteNotify { from, to, notify: 7 }).unwrap();
        ours.flush();
        hearing.join().unwrap()
    });
    assert_eq!(word, Event::Notify(7));
    assert!(found == wanted && far.bytes() == near.bytes(), "the notification is here and its data is not");
    link.wait(0, "report", |event| (*event == Event::Done(OpId(1))).then_some(()));
    // Nothing else was heard, so not a second one either.
    link.works();
}

/// A link that carries much and slowly must not be taken for one that carries nothing, so nothing long is under way without a report.
#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn each_half_mebibyte_that_is_carried_is_reported() {
    const HALF_MIB: u32 = 512 << 10;
    let mut link = Link::new();
    let (near, far) = (link.memory(0, 16 << 20), link.memory(1, 16 << 20));
    let remote = link.grant(1, &far, Access::READ_WRITE);
    for (len, count) in [(32 * HALF_MIB, 1), (HALF_MIB / 4, 128)] {
        let (here, there) = (near.span(0, len, Access::READ_WRITE), remote.span(0, len, Access::READ_WRITE).unwrap());
        for op in [Op::Write { from: here, to: there }, Op::Read { from: there, into: here }] {
            let before = link.ends[0].counters();
            for _ in 0..count {
                link.ends[0].post(Signal::No, op).unwrap();
            }
            link.ends[0].flush();
            let made = link.ends[0].counters().since(before);
            assert_eq!(made.signalled, 32, "{op:?}: {made:?}");
            link.works();
        }
    }
}

/// What the device still fills for reads of ours must not be somebody else's by then, and to wait for it must not cost the link.
#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn memory_that_is_given_back_under_operations_of_its_own_side_waits_for_them() {
    /// More than soft-RoCE carries out inside of the call that hands them over.
    const OPERATIONS: u64 = 14;
    const BYTES: u32 = 1 << 20;
    for reads in [true, false] {
        let mut link = Link::new();
        let (near, far) = (link.memory(0, u64::from(BYTES)), link.memory(1, u64::from(BYTES)));
        let remote = link.grant(1, &far, Access::READ_WRITE);
        let wanted = if reads { far.bytes() } else { near.bytes() };
        let (here, there) = (near.span(0, BYTES, Access::READ_WRITE), remote.span(0, BYTES, Access::READ_WRITE).unwrap());
        let op = if reads { Op::Read { from: there, into: here } } else { Op::Write { from: here, to: there } };
        for id in 0..OPERATIONS {
            link.ends[0].post(Signal::Yes(OpId(id)), op).unwrap();
        }
        link.ends[0].flush();
        link.ends[0].deregister(near.region).unwrap();
        let found = if reads { near.bytes() } else { far.bytes() };
        for id in 0..OPERATIONS {
            link.wait(0, "report", |event| (*event == Event::Done(OpId(id))).then_some(()));
        }
        assert!(found == wanted, "it did not wait; reads: {reads}");
        link.works();
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
