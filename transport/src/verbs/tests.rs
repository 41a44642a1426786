//! What no honest end sends, from inside the fabric: slots of any bytes, credits that were not earned, more than there is room for.
//!
//! Two ends over a real device, of which one pushes raw work requests past its own books; the other must end the link with a reason that names what
//! was wrong. Needs an RDMA device; the soft-RoCE lab runs it.

use std::time::Instant;

use super::chain::{Bytes, What};
use super::wire::SLOTS;
use super::*;
use crate::span::Access;
use crate::{Memory, Regions};

/// Longer than an emulated machine on a busy host needs for anything here.
const AMPLE: Duration = Duration::from_secs(20);

fn pair() -> (VerbsFabric, VerbsFabric) {
    let choice = DeviceChoice { device: std::env::var("FARBUS_RDMA_DEV").ok(), ..DeviceChoice::default() };
    // Asked for by name, so its absence is a failure.
    VerbsFabric::pair(&choice).unwrap_or_else(|error| panic!("no link over {choice:?}: {error}"))
}

/// Sends bytes as they are.
fn send_raw(attacker: &mut VerbsFabric, bytes: &[u8]) {
    assert!(attacker.outbox.push(false, What::Send, Bytes::Copied(bytes)));
    attacker.hand_over();
}

/// All that the victim hears until its link ends, while the attacker polls on.
fn heard(victim: &mut VerbsFabric, attacker: &mut VerbsFabric) -> Vec<Event> {
    let (mut heard, mut events, deadline) = (Vec::new(), Events::new(), Instant::now() + AMPLE);
    while !matches!(heard.last(), Some(Event::Closed(_))) {
        assert!(Instant::now() < deadline, "no end; heard {heard:?}");
        for (end, log) in [(&mut *attacker, None), (&mut *victim, Some(&mut heard))] {
            events.clear();
            end.poll(Nanos::now(), &mut events);
            if let Some(log) = log {
                log.extend_from_slice(events.as_slice());
            }
        }
    }
    heard
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_slot_that_cannot_be_ends_the_link_and_is_not_handed_out() {
    let cases: &[(&[u8], &str)] = &[
        (b"", "a slot of the wrong length"),
        (&[1], "a slot of the wrong length"),
        (&[1, 0, 0, 0, 0, 0, 0], "a slot of the wrong length"),
        (&[0, 0, 0, 0, 0, 0, 0, 0], "a slot of unknown kind"),
        (&[5, 0, 0, 0, 0, 0, 0, 0], "a slot of unknown kind"),
        (&[255, 0, 0, 0, 0, 0, 0, 0], "a slot of unknown kind"),
        (&[1, 0, 1, 0, 0, 0, 0, 0], "a slot with reserved bytes set"),
        (&[1, 0, 0, 128, 0, 0, 0, 0], "a slot with reserved bytes set"),
        (&[1, 2, 0, 0, 0, 0, 0, 0, b'x'], "a slot of the wrong length"),
        (&[1, 255, 0, 0, 0, 0, 0, 0, b'x'], "a slot of the wrong length"),
        (&[1, 0, 0, 0, 0, 0, 0, 0, b'x'], "a slot of the wrong length"),
        (&[2, 1, 0, 0, 0, 0, 0, 0, b'x'], "a slot of unknown kind"),
        (&[3, 1, 0, 0, 0, 0, 0, 0, b'x'], "a slot of unknown kind"),
        (&[4, 0, 0, 0, 0, 0, 0, 0], "a slot of the wrong length"),
        (&[4, 7, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7], "a slot of the wrong length"),
        // Nothing was sent to the attacker yet, so it cannot have taken anything.
        (&[2, 0, 0, 0, 1, 0, 0, 0], "credits that cannot be true"),
        (&[2, 0, 0, 0, 255, 255, 255, 255], "credits that cannot be true"),
        (&[1, 1, 0, 0, 0, 0, 0, 128, b'x'], "credits that cannot be true"),
        (&[9; SLOT + 1], "a message that is longer than a slot"),
        (&[9; 200], "a message that is longer than a slot"),
    ];
    const SLOT: usize = wire::SLOT_BYTES;
    for (bytes, wrong) in cases {
        let (mut attacker, mut victim) = pair();
        send_raw(&mut attacker, bytes);
        let heard = heard(&mut victim, &mut attacker);
        assert_eq!(heard, [Event::Closed(CloseReason::Protocol(wrong))], "{bytes:?}");
    }
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn credits_for_more_than_was_sent_are_not_believed_however_often_they_went_around() {
    let (mut attacker, mut victim) = pair();
    let mut events = Events::new();
    for round in 0..100_u32 {
        victim.post(Signal::No, Op::Send { message: b"one" }).unwrap();
        victim.flush();
        let deadline = Instant::now() + AMPLE;
        while attacker.counters().received <= u64::from(round) {
            assert!(Instant::now() < deadline);
            attacker.poll(Nanos::now(), &mut events);
            events.clear();
        }
    }
    let [a, b, c, d] = 101_u32.to_le_bytes();
    send_raw(&mut attacker, &[2, 0, 0, 0, a, b, c, d]);
    let heard = heard(&mut victim, &mut attacker);
    assert_eq!(heard, [Event::Closed(CloseReason::Protocol("credits that cannot be true"))]);
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn more_than_there_is_room_for_ends_the_link() {
    let (mut attacker, mut victim) = pair();
    let message = [1, 1, 0, 0, 0, 0, 0, 0, b'x'];
    let deadline = Instant::now() + AMPLE;
    for sent in 1..=u64::from(SLOTS) + 1 {
        send_raw(&mut attacker, &message);
        // The victim takes, and says nothing.
        while victim.counters().received < sent {
            assert!(Instant::now() < deadline, "{sent} sent");
            victim.take_now(None);
            attacker.take_now(None);
        }
    }
    let heard = heard(&mut victim, &mut attacker);
    assert_eq!(heard.last(), Some(&Event::Closed(CloseReason::Protocol("more messages than it was given room for"))));
    assert_eq!(heard.len(), SLOTS as usize + 1);
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_flood_into_a_side_that_does_not_poll_breaks_only_the_flooder() {
    let (mut attacker, mut victim) = pair();
    for _ in 0..SLOTS + 20 {
        if !attacker.outbox.has_reserve() {
            break;
        }
        send_raw(&mut attacker, &[2, 0, 0, 0, 0, 0, 0, 0]);
    }
    let mut events = Events::new();
    let deadline = Instant::now() + AMPLE;
    // One that had to wait for room and one that was dropped end alike: the flooder's link is gone, or it waits.
    std::thread::sleep(Duration::from_millis(500));
    let started = Instant::now();
    for _ in 0..50 {
        victim.poll(Nanos::now(), &mut events);
        attacker.poll(Nanos::now(), &mut Events::new());
        assert!(Instant::now() < deadline);
    }
    assert!(started.elapsed() < Duration::from_secs(5), "a poll was held up for {} ms", started.elapsed().as_millis());
    assert!(!events.as_slice().iter().any(|event| matches!(event, Event::Message(_))));
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn grants_taken_back_that_were_never_given_are_not_kept_without_end() {
    let (mut attacker, mut victim) = pair();
    let (mut events, mut closed) = (Events::new(), None);
    let deadline = Instant::now() + AMPLE;
    for number in 0_u64.. {
        let (slot, len) = Slot::Revoke(number).encode(attacker.inbox.sending());
        while !attacker.outbox.has_room(1) || !attacker.inbox.may_send() {
            events.clear();
            attacker.poll(Nanos::now(), &mut events);
            victim.poll(Nanos::now(), &mut events);
            closed = events.as_slice().iter().find_map(|it| if let Event::Closed(reason) = it { Some(*reason) } else { None });
            if closed.is_some() {
                break;
            }
            assert!(Instant::now() < deadline, "{number} taken back");
        }
        if closed.is_some() {
            break;
        }
        send_raw(&mut attacker, &slot[..len]);
    }
    assert_eq!(closed, Some(CloseReason::Protocol("more grants taken back than were given")));
}

/// Keys and addresses straight from the attacker's head, in requests of every kind.
#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn requests_with_made_up_keys_touch_nothing() {
    type Kind = fn(u64, u32) -> What;
    let kinds: [(&str, Kind); 3] = [
        ("write", |address, key| What::Write { address, key }),
        ("notification", |address, key| What::WriteNotify { address, key, notify: 0xdead_beef }),
        ("read", |address, key| What::Read { address, key }),
    ];
    for (name, kind) in kinds {
        for key in [0, 1, 0x100, u32::MAX] {
            let (mut attacker, mut victim) = pair();
            let memory = Memory::memfd("secret", 4096).unwrap();
            memory.write(0, &[0x5a; 4096]).unwrap();
            let region = victim.register(Arc::clone(&memory), Access::READ_WRITE).unwrap();
            victim.export(&region, Access::READ_WRITE).unwrap();
            let own = Memory::memfd("own", 4096).unwrap();
            let ours = attacker.register(Arc::clone(&own), Access::READ_WRITE).unwrap();
            let what = kind(memory.base().as_ptr().addr() as u64, key);
            let local = attacker.books.locals.find(ours.name).unwrap().region.as_ref().unwrap();
            assert!(attacker.outbox.push(true, what, Bytes::Registered { region: local, offset: 0, len: 4096 }));
            attacker.hand_over();
            let heard = heard(&mut victim, &mut attacker);
            assert!(matches!(heard[..], [Event::Closed(CloseReason::Protocol(_))]), "{name}, key {key:#x}: {heard:?}");
            let (mut secret, mut seen) = ([0; 4096], [1; 4096]);
            memory.read(0, &mut secret).unwrap();
            own.read(0, &mut seen).unwrap();
            assert!(secret == [0x5a; 4096] && seen == [0; 4096], "{name}, key {key:#x}");
        }
    }
}
