//! The verbs fabric against a queue pair of the ibverbs crate, over a real device or soft-RoCE: messages, credits, one-sided operations, the end, and nonsense.
//!
//! `ci/softroce target/oracle/debug/deps/interop-… --ignored --test-threads 1`. The crate builds its own bindings from its own copy of rdma-core, and the
//! peer (tests/peer) its own frames, so that a mistake that both ends of ours share shows here.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a panic is how a test fails")]

mod peer;

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use farbus_transport::link::control::Framed;
use farbus_transport::verbs::{DeviceChoice, VerbsError, VerbsFabric};
use farbus_transport::{Access, CloseReason, Event, Events, Fabric, Grant, Memory, Nanos, Op, OpId, Regions, Signal};

use self::peer::wire::{Attributes, Granted, SLOT, SLOTS, frame, send_frame, slot};
use self::peer::{Got, PATIENCE, Peer, with_peer};

/// Messages each way.
const MESSAGES: u32 = 1000;

/// Slots that the fabric leaves free for its own words.
const RESERVE: u32 = 8;

/// Our end.
struct Ours {
    fabric: VerbsFabric,
    events: VecDeque<Event>,
}

impl Ours {
    fn poll(&mut self) {
        let mut events = Events::new();
        self.fabric.poll(Nanos::now(), &mut events);
        self.events.extend(events.as_slice());
    }

    fn next(&mut self) -> Event {
        let started = Instant::now();
        loop {
            if let Some(event) = self.events.pop_front() {
                return event;
            }
            self.poll();
            assert!(started.elapsed() < PATIENCE, "no event");
        }
    }

    fn message(&mut self) -> Vec<u8> {
        match self.next() {
            Event::Message(message) => message.bytes().to_vec(),
            other => panic!("{other:?} in place of a message"),
        }
    }

    fn send(&mut self, message: &[u8]) {
        self.fabric.post(Signal::No, Op::Send { message }).expect("room for a message");
        self.fabric.flush();
    }

    fn perform(&mut self, op: Op<'_>) {
        self.fabric.post(Signal::Yes(OpId(7)), op).expect("room for an operation");
        self.fabric.flush();
        assert_eq!(self.next(), Event::Done(OpId(7)), "{op:?}");
    }
}

fn ours(socket: UnixStream) -> Result<Ours, VerbsError> {
    let choice = DeviceChoice { device: Some(peer::device()), ..DeviceChoice::default() };
    let control = Framed::new(socket).expect("a control connection");
    Ok(Ours { fabric: VerbsFabric::establish(&choice, Box::new(control))?, events: VecDeque::new() })
}

/// Connects the two and plays both parts at once; the fabric stays until both have played.
fn play(theirs: impl FnOnce(&mut Peer<'_>) + Send, part: impl FnOnce(&mut Ours)) {
    let (left, right) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let other = scope.spawn(move || with_peer(right, theirs));
        let mut ours = ours(left).expect("a link");
        part(&mut ours);
        // What is still on its way to the peer is acknowledged by the device, and what it says meanwhile is taken.
        while !other.is_finished() {
            ours.poll();
        }
        other.join().expect("the peer's part");
    });
}

/// The bytes of message `number` of a side: each length comes, and each message differs.
fn message(side: u8, number: u32) -> Vec<u8> {
    let len = number as usize % 57;
    (0..len).map(|at| (number as u8).wrapping_mul(31) ^ (at as u8).wrapping_mul(7) ^ (number >> 8) as u8 ^ side).collect()
}

#[test]
#[ignore = "needs an RDMA device; ci/run oracle runs it in the lab"]
fn a_thousand_messages_each_way_arrive_exact_and_in_order() {
    play(
        |peer| {
            let (started, mut sent, mut received) = (Instant::now(), 0, 0);
            while sent < MESSAGES || received < MESSAGES {
                if sent < MESSAGES && peer.send(&message(1, sent)) {
                    sent += 1;
                }
                for got in peer.take() {
                    match got {
                        Got::Message(bytes) => {
                            assert_eq!(bytes, message(0, received), "message {received} to the peer");
                            received += 1;
                        }
                        Got::Credits => {}
                        other => panic!("{other:?} between messages"),
                    }
                }
                assert!(started.elapsed() < PATIENCE, "{sent} were sent, {received} received");
            }
            peer.settle();
        },
        |ours| {
            let (started, mut sent, mut received) = (Instant::now(), 0, 0);
            while sent < MESSAGES || received < MESSAGES {
                if sent < MESSAGES && ours.fabric.post(Signal::No, Op::Send { message: &message(0, sent) }).is_ok() {
                    sent += 1;
                }
                ours.fabric.flush();
                ours.poll();
                while let Some(event) = ours.events.pop_front() {
                    let Event::Message(got) = event else { panic!("{event:?} between messages") };
                    assert_eq!(got.bytes(), message(1, received), "message {received} to the fabric");
                    received += 1;
                }
                assert!(started.elapsed() < PATIENCE, "{sent} were sent, {received} received");
            }
        },
    );
}

#[test]
#[ignore = "needs an RDMA device; ci/run oracle runs it in the lab"]
fn the_fabric_stops_at_its_reserve_and_goes_on_when_credits_come() {
    let most = SLOTS - RESERVE;
    play(
        move |peer| {
            peer.stingy = true;
            for number in 0..most {
                assert_eq!(peer.next(), Got::Message(message(0, number)));
            }
            // Eight slots are free still, and nothing comes.
            peer.quiet(Duration::from_millis(300));
            peer.stingy = false;
            for number in most..2 * most {
                assert_eq!(peer.next(), Got::Message(message(0, number)));
            }
            assert!(peer.send(b"done"));
            peer.settle();
        },
        |ours| {
            let (started, mut sent, mut stopped_at) = (Instant::now(), 0, None);
            while sent < 2 * most {
                if ours.fabric.post(Signal::No, Op::Send { message: &message(0, sent) }).is_ok() {
                    sent += 1;
                } else if stopped_at.is_none() && ours.events.is_empty() {
                    stopped_at = Some(sent);
                }
                ours.fabric.flush();
                ours.poll();
                assert!(started.elapsed() < PATIENCE, "{sent} were sent, and {:?} came", ours.events);
            }
            assert_eq!(stopped_at, Some(most), "messages that were sent before credits came");
            assert_eq!(ours.message(), b"done");
        },
    );
}

#[test]
#[ignore = "needs an RDMA device; ci/run oracle runs it in the lab"]
fn the_fabric_that_only_listens_gives_its_slots_back() {
    play(
        |peer| {
            let (started, mut sent, mut credits) = (Instant::now(), 0, 0);
            while sent < MESSAGES {
                sent += u32::from(peer.send(&message(1, sent)));
                credits += peer.take().iter().filter(|got| **got == Got::Credits).count();
                assert!(started.elapsed() < PATIENCE, "{sent} were sent");
            }
            peer.settle();
            // All that were sent but the last 255 need credits, and 64 slots are given back at a time.
            assert!(peer.returned() >= MESSAGES - SLOTS, "{} slots were given back", peer.returned());
            assert!((3..=MESSAGES as usize / 64 + 1).contains(&credits), "{credits} times credits alone");
        },
        |ours| (0..MESSAGES).for_each(|number| assert_eq!(ours.message(), message(1, number))),
    );
}

#[test]
#[ignore = "needs an RDMA device; ci/run oracle runs it in the lab"]
fn the_fabric_writes_reads_and_notifies_in_memory_of_the_ibverbs_crate() {
    const LEN: usize = 256 << 10;
    const NUMBER: u64 = 0x1234_5678_9abc_def0;
    let pattern = |salt: u8| -> Vec<u8> { (0..LEN).map(|at| (at as u8) ^ (at >> 8) as u8 ^ (at >> 16) as u8 ^ salt).collect() };
    play(
        |peer| {
            let mut memory = peer.memory(LEN);
            memory.copy_from_slice(&pattern(1));
            let address = memory.as_ptr().addr() as u64;
            let granted = Granted { number: NUMBER, address, len: LEN as u64, key: memory.rkey().key, access: 3 };
            send_frame(&mut peer.socket, &granted.bytes()).unwrap();
            assert!(peer.send(b"granted"));
            // What comes before a notification is there when it is.
            assert_eq!(peer.next(), Got::Notify(0xdead_beef));
            assert!(memory[..] == pattern(2), "the fabric's write arrived changed");
            assert!(peer.revoke(NUMBER));
            assert!(peer.send(b"revoked"));
            peer.settle();
            assert_eq!(peer.next(), Got::Message(b"bye".to_vec()));
        },
        |ours| {
            let memory = Memory::memfd("interop", LEN as u64).unwrap();
            let near = ours.fabric.register(memory.clone(), Access::READ_WRITE).unwrap();
            assert_eq!(ours.message(), b"granted");
            let grant = Grant { key: NUMBER, len: LEN as u64, access: Access::READ_WRITE };
            let far = ours.fabric.import(&grant).unwrap();
            let (local, remote) = (near.span(0, LEN as u32, Access::READ_WRITE), far.span(0, LEN as u32, Access::READ_WRITE));
            let (local, remote) = (local.unwrap(), remote.unwrap());
            let mut got = vec![0; LEN];
            ours.perform(Op::Read { from: remote, into: local });
            memory.read(0, &mut got).unwrap();
            assert!(got == pattern(1), "the fabric's read arrived changed");
            memory.write(0, &pattern(2)).unwrap();
            // The first half as a long write, an odd byte inline, the rest with the notification.
            let half = LEN as u32 / 2;
            let part = |from, len| (local.part(from, len).unwrap(), remote.part(from, len).unwrap());
            let ((a, b), (c, d), (e, f)) = (part(0, half), part(half, 1), part(half + 1, half - 1));
            ours.fabric.post(Signal::No, Op::Write { from: a, to: b }).unwrap();
            ours.fabric.post(Signal::No, Op::Write { from: c, to: d }).unwrap();
            ours.perform(Op::WriteNotify { from: e, to: f, notify: 0xdead_beef });
            assert_eq!(ours.message(), b"revoked");
            ours.fabric.post(Signal::Yes(OpId(9)), Op::Write { from: a, to: b }).unwrap();
            assert!(matches!(ours.next(), Event::Failed(Some(OpId(9)), _)), "a write by a grant that was taken back");
            ours.send(b"bye");
        },
    );
}

#[test]
#[ignore = "needs an RDMA device; ci/run oracle runs it in the lab"]
fn a_grant_of_the_fabric_is_announced_and_taken_back() {
    play(
        |peer| {
            assert_eq!(peer.next(), Got::Message(b"exported".to_vec()));
            let granted = Granted::of(&frame(&mut peer.socket).unwrap());
            assert_eq!((granted.len, granted.access), (8192, 1), "{granted:?}");
            assert!(granted.key != 0 && granted.address.is_multiple_of(4096) && granted.number != 0, "{granted:?}");
            assert!(peer.send(&granted.number.to_le_bytes()));
            assert_eq!(peer.next(), Got::Revoke(granted.number));
        },
        |ours| {
            let region = ours.fabric.register_for_peer(Memory::memfd("interop", 8192).unwrap(), Access::READ_WRITE).unwrap();
            let grant = ours.fabric.export(&region, Access::READ).unwrap();
            ours.send(b"exported");
            assert_eq!(ours.message(), grant.key.to_le_bytes());
            ours.fabric.deregister(region).unwrap();
        },
    );
}

#[test]
#[ignore = "needs an RDMA device; ci/run oracle runs it in the lab"]
fn a_goodbye_of_either_side_ends_the_link() {
    play(
        |peer| {
            assert!(peer.send(b"last") && peer.goodbye());
            peer.settle();
        },
        |ours| {
            assert_eq!(ours.message(), b"last");
            assert_eq!(ours.next(), Event::Closed(CloseReason::PeerClosed));
        },
    );
    play(
        |peer| {
            assert_eq!(peer.next(), Got::Message(b"last".to_vec()));
            assert_eq!(peer.next(), Got::Goodbye);
        },
        |ours| {
            ours.send(b"last");
            ours.fabric.close();
            assert_eq!(ours.next(), Event::Closed(CloseReason::Local));
        },
    );
}

#[test]
#[ignore = "needs an RDMA device; ci/run oracle runs it in the lab"]
fn nonsense_in_a_slot_ends_the_link_with_its_reason() {
    let with = |at: usize, byte: u8| {
        let mut bytes = slot(1, b"hello", 0);
        bytes[at] = byte;
        bytes
    };
    let nonsense = [
        ("no kind", slot(0, b"", 0)),
        ("a kind of tomorrow", slot(5, b"", 0)),
        ("a reserved byte", with(2, 1)),
        ("the other reserved byte", with(3, 0x80)),
        ("a length of less than there is", with(1, 4)),
        ("a length of more than there is", with(1, 6)),
        ("a length of more than a slot has", with(1, 255)),
        ("credits with a body", slot(2, b"x", 0)),
        ("a revocation that is cut", slot(4, &[0; 7], 0)),
        ("credits for what was never sent", slot(2, b"", 1)),
        ("credits from below zero", slot(1, b"hello", u32::MAX)),
        ("less than a header", slot(1, b"", 0)[..7].to_vec()),
    ];
    for (what, bytes) in nonsense {
        play(
            move |peer| {
                assert!(peer.send_raw(&bytes));
                peer.settle();
            },
            |ours| {
                let ended = ours.next();
                assert!(matches!(ended, Event::Closed(CloseReason::Protocol(_))), "{what}: {ended:?}");
            },
        );
    }
    play(
        |peer| {
            assert!(peer.send_raw(&[1; SLOT + 1]));
            peer.refused();
        },
        |ours| assert_eq!(ours.next(), Event::Closed(CloseReason::Protocol("a message that is longer than a slot"))),
    );
}

#[test]
#[ignore = "needs an RDMA device; ci/run oracle runs it in the lab"]
fn a_queue_pair_described_wrongly_is_refused_before_it_is_used() {
    let good = Attributes { queue_pair: 0x11, first_psn: 0, gid: [0; 16], lid: 0, mtu: 3, reads_served: 16, slots: SLOTS };
    let wrong = [
        ("an MTU of 0", Attributes { mtu: 0, ..good }.bytes().to_vec()),
        ("an MTU of 8,192", Attributes { mtu: 6, ..good }.bytes().to_vec()),
        ("no reads at all", Attributes { reads_served: 0, ..good }.bytes().to_vec()),
        ("other slots", Attributes { slots: 255, ..good }.bytes().to_vec()),
        ("a queue pair of 25 bits", Attributes { queue_pair: 1 << 24, ..good }.bytes().to_vec()),
        ("a packet number of 25 bits", Attributes { first_psn: 1 << 24, ..good }.bytes().to_vec()),
        ("a frame that is cut", good.bytes()[..32].to_vec()),
        ("a frame that is too long", [&good.bytes()[..], &[0]].concat()),
        ("no frame", vec![]),
        ("a frame of tomorrow", vec![4]),
        ("readiness too early", vec![3]),
    ];
    for (what, bytes) in wrong {
        let (left, mut right) = UnixStream::pair().unwrap();
        send_frame(&mut right, &bytes).unwrap();
        match ours(left) {
            Err(VerbsError::Attributes(_)) => {}
            Err(other) => panic!("{what}: {other}"),
            Ok(_) => panic!("{what}: a link"),
        }
    }
    let (left, right) = UnixStream::pair().unwrap();
    drop(right);
    assert!(matches!(ours(left), Err(VerbsError::Control(_))), "a peer that leaves at once");
}
