//! A peer that means harm, over a real device: whatever it sends, the link ends with a reason, in time, and no byte outside of a grant is touched.
//!
//! An honest end whose idea of a grant was lengthened on its way writes past the end of the granted page: the device refuses, both links end, and
//! the page and what lies around it are as before.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

mod verbs_support;

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use farbus_transport::sim::Seed;
use farbus_transport::verbs::{VerbsError, VerbsFabric};
use farbus_transport::{Access, CloseReason, Event, Fabric, Grant, Op, OpError, Regions, Signal};
use verbs_support::middle::{GrantFrame, establish_against, framed, pair_with_middle, pair_with_writer};
use verbs_support::resources::Resources;
use verbs_support::{AMPLE, Link, choice, pair};

const PAGE: u64 = 4096;

/// How long a side may take to notice what its peer did wrong, on a machine that is emulated and busy.
const NOTICED: Duration = Duration::from_secs(5);

// ---- the control connection ----

/// A description of a queue pair that could be: number 0x11, sequence number 1, this host's own address, MTU 1024, 16 reads, 256 slots.
fn attributes() -> Vec<u8> {
    let wanted = choice().device;
    let devices = farbus_transport::verbs::devices().unwrap();
    let device = devices.iter().find(|device| wanted.as_ref().is_none_or(|wanted| device.name == *wanted)).unwrap();
    let gid = device.ports[0].gids.iter().find(|gid| gid.roce_v2 && !gid.address.is_unicast_link_local()).unwrap();
    let mut frame = vec![1];
    frame.extend_from_slice(&0x11_u32.to_le_bytes());
    frame.extend_from_slice(&1_u32.to_le_bytes());
    frame.extend_from_slice(&gid.address.octets());
    frame.extend_from_slice(&0_u16.to_le_bytes());
    frame.extend_from_slice(&[3, 16]);
    frame.extend_from_slice(&256_u32.to_le_bytes());
    frame
}

fn with(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut frame = attributes();
    change(&mut frame);
    framed(&frame)
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_description_that_cannot_be_is_refused_and_leaves_nothing_behind() {
    let good = framed(&attributes());
    let mut seed = Seed::new(7);
    let mut cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", vec![]),
        ("an empty frame", framed(&[])),
        ("half a length", vec![34, 0]),
        ("half a frame", good[..20].to_vec()),
        ("a frame that is too long for any", u32::MAX.to_le_bytes().to_vec()),
        ("ready before all", framed(&[3])),
        ("a grant before all", framed(&GrantFrame { number: 1, address: 0, len: 1, key: 1, access: 3 }.encode())),
        ("an unknown kind", framed(&[9, 9, 9])),
        ("a queue pair of 32 bits", with(|frame| frame[4] = 1)),
        ("a sequence number of 32 bits", with(|frame| frame[8] = 1)),
        ("no MTU", with(|frame| frame[27] = 0)),
        ("a wild MTU", with(|frame| frame[27] = 6)),
        ("no reads", with(|frame| frame[28] = 0)),
        ("other slots", with(|frame| frame[29] = 1)),
        ("a byte too many", with(|frame| frame.push(0))),
        ("twice the description", [good.clone(), good.clone()].concat()),
        ("a grant for ready", [good, framed(&GrantFrame { number: 1, address: 0, len: 1, key: 1, access: 3 }.encode())].concat()),
    ];
    for kind in 0..20 {
        let mut frame = vec![0; seed.between(1, 60) as usize];
        seed.fill(&mut frame);
        cases.push(("anything without a frame", frame.clone()));
        frame[0] = kind % 4;
        cases.push(("anything of a kind that exists", framed(&frame)));
        frame.resize(attributes().len(), 0);
        cases.push(("anything of the right length", framed(&frame)));
        cases.push(("anything for an address", with(|good| good[9..25].copy_from_slice(&frame[..16]))));
    }
    // The first may make what stays: the library, the probe of the device.
    drop(pair());
    let before = Resources::now();
    for (what, bytes) in cases {
        let started = Instant::now();
        let outcome = establish_against(&bytes, false);
        let error = outcome.err().unwrap_or_else(|| panic!("{what}: a link came of it"));
        assert!(!matches!(error, VerbsError::NoRdma(_)), "{what}: {error}");
        assert!(started.elapsed() < NOTICED, "{what}: {error} after {} ms", started.elapsed().as_millis());
        println!("{what}: {error}");
    }
    assert_eq!(Resources::now(), before);
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_peer_that_says_nothing_is_given_up() {
    let started = Instant::now();
    let error = establish_against(&[], true).unwrap_err();
    assert!(matches!(error, VerbsError::Deadline { .. }), "{error}");
    assert_eq!(error.to_string(), "no queue pair from the peer within 5000 ms");
    let waited = started.elapsed();
    assert!(waited >= Duration::from_secs(5) && waited < Duration::from_secs(5) + NOTICED, "{waited:?}");
}

/// What a victim whose link is up makes of bytes on the control connection.
fn ends_with(bytes: &[u8]) -> CloseReason {
    let (attacker, victim, mut writer) = pair_with_writer();
    let mut link = Link::of((attacker, victim));
    link.works();
    writer.write_all(bytes).unwrap();
    let started = Instant::now();
    let reason = link.closed(1);
    assert!(started.elapsed() < NOTICED, "{reason} after {} ms", started.elapsed().as_millis());
    assert_eq!(link.heard[1], [], "something before the end, or behind it");
    assert!(link.ends[1].post(Signal::No, Op::Send { message: b"on" }).is_err(), "an ended link takes messages");
    reason
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn any_bytes_on_the_control_connection_of_a_link_end_it_as_the_peers_fault() {
    let grant = GrantFrame { number: 7, address: 0x1000, len: PAGE, key: 5, access: 3 };
    let cases: [(&str, Vec<u8>); 10] = [
        ("an empty frame", framed(&[])),
        ("a frame that is too long for any", 4097_u32.to_le_bytes().to_vec()),
        ("a second description", framed(&attributes())),
        ("a second ready", framed(&[3])),
        ("an unknown kind", framed(&[4])),
        ("half a grant", framed(&grant.encode()[..12])),
        ("a grant with more than one says", framed(&[&grant.encode()[..], &[0]].concat())),
        ("a grant with an access that does not exist", framed(&GrantFrame { access: 4, ..grant }.encode())),
        ("a grant that wraps", framed(&GrantFrame { address: u64::MAX - 10, ..grant }.encode())),
        ("a grant that repeats", framed(&grant.encode()).repeat(2)),
    ];
    for (what, bytes) in cases {
        let reason = ends_with(&bytes);
        assert!(matches!(reason, CloseReason::Protocol(_)), "{what}: {reason}");
        println!("{what}: {reason}");
    }
    let many: Vec<u8> = (0..5000).flat_map(|number| framed(&GrantFrame { number, ..grant }.encode())).collect();
    let reason = ends_with(&many);
    assert!(matches!(reason, CloseReason::Protocol(_)), "grants without end: {reason}");
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn half_a_frame_holds_nobody_up_and_the_end_of_the_connection_ends_the_link() {
    let (attacker, victim, mut writer) = pair_with_writer();
    let mut link = Link::of((attacker, victim));
    writer.write_all(&[200, 0, 0, 0, 2]).unwrap();
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(300));
        link.works();
    }
    writer.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(link.closed(1), CloseReason::PeerGone);
}

// ---- keys ----

/// What became of one operation of an attacker.
struct Attack {
    outcome: Result<(), OpError>,
    attacker: CloseReason,
    victim: CloseReason,
}

/// Memory of 4 pages at the victim, of which the attacker is told what `change` makes of its grant; then one operation of the attacker's with that
/// region, and not a byte of the victim's may be another afterwards.
fn attack(
    given: Access,
    change: fn(GrantFrame) -> GrantFrame,
    grant: fn(Grant) -> Grant,
    offset: u64,
    len: u32,
    reads: bool,
) -> Attack {
    let mut link = Link::of(pair_with_middle(change));
    let (own, target) = (link.memory(0, 4 * PAGE), link.memory(1, 4 * PAGE));
    let secret = link.memory(1, 4 * PAGE);
    let (own_before, before, secret_before) = (own.bytes(), target.bytes(), secret.bytes());
    let honest = link.ends[1].export(&target.region, given).unwrap();
    let remote = link.ends[0].import(&grant(honest)).unwrap();
    let started = Instant::now();
    let outcome = if reads {
        let (from, into) = (remote.span(offset, len, Access::READ).unwrap(), own.span(0, len, Access::WRITE));
        link.perform(0, Op::Read { from, into })
    } else {
        let (from, to) = (own.span(0, len, Access::READ), remote.span(offset, len, Access::WRITE).unwrap());
        link.perform(0, Op::Write { from, to })
    };
    let (attacker, victim) = (link.closed(0), link.closed(1));
    assert!(started.elapsed() < NOTICED, "noticed after {} ms", started.elapsed().as_millis());
    assert!(target.bytes() == before && secret.bytes() == secret_before, "memory of the victim's was written");
    assert!(own.bytes() == own_before, "memory of the victim's was read");
    Attack { outcome, attacker, victim }
}

fn is_refused(what: &str, attack: &Attack) {
    println!("{what}: {:?}; the attacker: {}; the victim: {}", attack.outcome, attack.attacker, attack.victim);
    assert_eq!(attack.outcome, Err(OpError::Revoked), "{what}");
    assert!(matches!(attack.attacker, CloseReason::Protocol(_)), "{what}: {}", attack.attacker);
    assert!(matches!(attack.victim, CloseReason::Protocol(_)), "{what}: {}", attack.victim);
}

const ALL: Access = Access::READ_WRITE;

fn as_is<T>(it: T) -> T {
    it
}

fn longer(grant: Grant) -> Grant {
    Grant { len: grant.len + PAGE, ..grant }
}

fn both_ways(grant: Grant) -> Grant {
    Grant { access: ALL, ..grant }
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn one_byte_outside_of_a_grant_is_refused_by_the_device() {
    let behind = |frame: GrantFrame| GrantFrame { len: frame.len + PAGE, ..frame };
    let before = |frame: GrantFrame| GrantFrame { address: frame.address - 1, ..frame };
    for reads in [false, true] {
        is_refused("the byte behind", &attack(ALL, behind, longer, 4 * PAGE, 1, reads));
        is_refused("across the end", &attack(ALL, behind, longer, 4 * PAGE - 1, 2, reads));
        is_refused("all and one byte", &attack(ALL, behind, longer, PAGE, 3 * PAGE as u32 + 1, reads));
        is_refused("the byte before", &attack(ALL, before, as_is, 0, 1, reads));
    }
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn what_a_grant_does_not_allow_is_refused_by_the_device() {
    let widened = |frame: GrantFrame| GrantFrame { access: 3, ..frame };
    is_refused("a write where reading was granted", &attack(Access::READ, widened, both_ways, 0, 64, false));
    is_refused("a read where writing was granted", &attack(Access::WRITE, widened, both_ways, 0, 64, true));
    is_refused("a long write where reading was granted", &attack(Access::READ, widened, both_ways, 0, 2 * PAGE as u32, false));
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_key_that_was_never_given_is_refused_by_the_device() {
    for (what, change) in [
        ("key 0", (|frame| GrantFrame { key: 0, ..frame }) as fn(GrantFrame) -> GrantFrame),
        ("all ones", |frame| GrantFrame { key: u32::MAX, ..frame }),
        ("another use of the same place", |frame| GrantFrame { key: frame.key ^ 1, ..frame }),
        ("a neighbour", |frame| GrantFrame { key: frame.key ^ 0x100, ..frame }),
    ] {
        for reads in [false, true] {
            is_refused(what, &attack(ALL, change, as_is, 0, 64, reads));
        }
    }
}

/// An attacker with two links to one host uses on the second what it was granted on the first.
#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_key_of_another_link_is_refused_by_the_device() {
    let seen = Arc::new(Mutex::new(None));
    let listener = Arc::clone(&seen);
    let mut first = Link::of(pair_with_middle(move |frame| {
        *listener.lock().unwrap() = Some(frame);
        frame
    }));
    let target = first.memory(1, PAGE);
    let before = target.bytes();
    let granted = first.grant(1, &target, ALL);
    let of_first: GrantFrame = seen.lock().unwrap().unwrap();

    let mut second = Link::of(pair_with_middle(move |frame| GrantFrame { address: of_first.address, key: of_first.key, ..frame }));
    let (own, other) = (second.memory(0, PAGE), second.memory(1, PAGE));
    let stolen = second.grant(1, &other, ALL);
    let outcome = second.write(0, own.span(0, 64, Access::READ), stolen.span(0, 64, Access::WRITE).unwrap());
    assert_eq!(outcome, Err(OpError::Revoked));
    assert!(matches!(second.closed(0), CloseReason::Protocol(_)));
    second.closed(1);
    assert!(target.bytes() == before, "a key worked on another link");

    // The first link and its grant are as they were.
    first.works();
    let mine = first.memory(0, PAGE);
    first.write(0, mine.span(0, 64, Access::READ), granted.span(0, 64, Access::WRITE).unwrap()).unwrap();
    assert!(target.bytes()[..64] == mine.bytes()[..64]);
}

/// A grant of before: the owner took it back and granted the same memory again; who kept the old key reaches nothing with it.
#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_key_of_a_grant_of_before_is_refused_by_the_device() {
    const BIT: u64 = 1 << 62;
    // Under another number the attacker's end does not notice that the grant is taken back.
    let mut link = Link::of(pair_with_middle(|frame| GrantFrame { number: frame.number ^ BIT, ..frame }));
    let (own, target) = (link.memory(0, PAGE), link.memory(1, PAGE));
    let first = link.ends[1].export(&target.region, ALL).unwrap();
    let old = link.ends[0].import(&Grant { key: first.key ^ BIT, ..first }).unwrap();
    link.write(0, own.span(0, 64, Access::READ), old.span(0, 64, Access::WRITE).unwrap()).unwrap();

    link.ends[1].deregister(target.region).unwrap();
    let region = link.ends[1].register(Arc::clone(&target.memory), ALL).unwrap();
    let second = link.ends[1].export(&region, ALL).unwrap();
    let new = link.ends[0].import(&Grant { key: second.key ^ BIT, ..second }).unwrap();
    target.memory.write(0, &[0xee; PAGE as usize]).unwrap();
    link.works();
    link.write(0, own.span(0, 8, Access::READ), new.span(PAGE - 8, 8, Access::WRITE).unwrap()).unwrap();

    let outcome = link.write(0, own.span(0, 64, Access::READ), old.span(0, 64, Access::WRITE).unwrap());
    assert_eq!(outcome, Err(OpError::Revoked));
    assert!(matches!(link.closed(0), CloseReason::Protocol(_)));
    link.closed(1);
    assert!(target.bytes()[..PAGE as usize - 8].iter().all(|byte| *byte == 0xee), "an operation of before landed");
}

/// A peer that never takes its grants: announced, taken back, and forgotten here too, in whatever order the two words come.
#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn grants_that_are_never_taken_are_forgotten_when_they_are_taken_back() {
    let mut link = Link::new();
    let piece = link.memory(1, PAGE);
    // More than a side may hold at once.
    for round in 0..21 {
        for _ in 0..200 {
            let region = link.ends[1].register_for_peer(Arc::clone(&piece.memory), ALL).unwrap();
            link.ends[1].export(&region, ALL).unwrap_or_else(|error| panic!("round {round}: {error}"));
            link.ends[1].deregister(region).unwrap();
            link.poll(0);
            link.poll(1);
        }
        // The control connection is looked at a few times a second only.
        std::thread::sleep(Duration::from_millis(300));
        link.works();
    }
}

// ---- a side that does not take part ----

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_peer_that_polls_nothing_makes_the_queue_full_and_breaks_nothing() {
    let (mut ours, mut theirs) = pair();
    let mut events = farbus_transport::Events::new();
    let mut sent = 0_u64;
    let until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until {
        if ours.post(Signal::No, Op::Send { message: &sent.to_le_bytes() }).is_ok() {
            sent += 1;
        }
        ours.flush();
        events.clear();
        ours.poll(farbus_transport::Nanos::now(), &mut events);
        assert_eq!(events.as_slice(), [], "after {sent} messages");
    }
    assert!((100..256).contains(&sent), "{sent} messages");
    // All of them, in order, when it polls again.
    let (mut heard, deadline) = (0_u64, Instant::now() + AMPLE);
    while heard < sent {
        events.clear();
        theirs.poll(farbus_transport::Nanos::now(), &mut events);
        for event in events.as_slice() {
            assert!(matches!(event, Event::Message(got) if got.bytes() == heard.to_le_bytes()), "{event:?} for message {heard}");
            heard += 1;
        }
        assert!(Instant::now() < deadline, "only {heard} of {sent}");
    }
    let mut link = Link::of((ours, theirs));
    link.works();
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn what_is_outstanding_when_a_peer_leaves_is_answered_once() {
    let mut link = Link::new();
    let (own, target) = (link.memory(0, 1 << 20), link.memory(1, 1 << 20));
    let remote = link.grant(1, &target, ALL);
    let Link { ends: [mut ours, theirs], .. } = link;
    let mut posted = 0;
    for id in 0..40 {
        let op = Op::Write { from: own.span(0, 1 << 20, Access::READ), to: remote.span(0, 1 << 20, Access::WRITE).unwrap() };
        posted += u64::from(ours.post(Signal::Yes(farbus_transport::OpId(id)), op).is_ok());
    }
    ours.flush();
    drop(theirs);
    let reason = answered(&mut ours, posted);
    assert_eq!(reason, CloseReason::PeerClosed);
}

/// Polls until the end; all `posted` signalled operations, numbered from 0, must have been answered, in their order.
fn answered(fabric: &mut VerbsFabric, posted: u64) -> CloseReason {
    let (mut events, mut next, deadline) = (farbus_transport::Events::new(), 0, Instant::now() + AMPLE);
    loop {
        events.clear();
        fabric.poll(farbus_transport::Nanos::now(), &mut events);
        for event in events.as_slice() {
            match event {
                Event::Done(id) | Event::Failed(Some(id), _) => {
                    assert_eq!(id.0, next, "answered out of order");
                    next += 1;
                }
                Event::Closed(reason) => {
                    assert_eq!(next, posted, "operations without an answer");
                    return *reason;
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(Instant::now() < deadline, "{next} of {posted} answered, and no end");
    }
}
