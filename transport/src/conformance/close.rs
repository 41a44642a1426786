//! Cases of the end: every side hears of it once, after everything that came before, and nothing follows.
//!
//! A side sends 20 messages and closes; the peer, which polls only later, gets all 20 and then `Closed(PeerClosed)`, once.

use super::Provider;
use super::rig::{Outcome, Rig, Stop, ensure};
use crate::fabric::{CloseReason, Event, Events, Op, OpId, Signal};
use crate::link::{self, Action, State, Transition};
use crate::span::Access;

/// What a side in `state` reports when `event` happens, by the table of link states: the fabrics are held to it here.
fn reported(state: State, event: link::Event) -> Outcome<CloseReason> {
    match link::next(state, event) {
        Ok(Transition { to: State::Closed, action: Action::Report(reason) }) => Ok(reason),
        other => Err(Stop::Failed(format!("{event:?} in {state:?} ends no link: {other:?}"))),
    }
}

/// The next events of a side up to and with its end; whatever follows fails the case.
fn to_the_end(rig: &mut Rig<'_>, side: usize) -> Outcome<(Vec<Event>, CloseReason)> {
    let mut before = Vec::new();
    let reason = loop {
        match rig.next(side)? {
            Event::Closed(reason) => break reason,
            event => before.push(event),
        }
    };
    rig.settle();
    ensure!(rig.seen[side].is_empty(), "after the end came {:?}", rig.seen[side]);
    Ok((before, reason))
}

/// A closed side takes operations or refuses them, but reports nothing about them.
fn dead(rig: &mut Rig<'_>, side: usize) -> Outcome {
    for _ in 0..3 {
        let _refused_or_dropped = rig.try_post(side, Signal::Yes(OpId(1)), Op::Send { message: b"too late" });
        rig.flush(side);
        rig.end(side).close();
    }
    rig.settle();
    rig.nothing_left()
}

pub(super) fn a_close_is_seen_once_and_last(provider: &dyn Provider, seed: u64) -> Outcome {
    for closing in [0, 1] {
        let mut rig = Rig::new(provider, seed)?;
        let mut messages = Vec::new();
        for number in 0..20_u8 {
            // A receiver that does not poll may fill up first.
            if rig.try_post(closing, Signal::No, Op::Send { message: &[number] }).is_err() {
                break;
            }
            messages.push(number);
        }
        rig.flush(closing);
        rig.end(closing).close();
        for _ in 0..100 {
            rig.poll(closing);
        }
        let (before, reason) = to_the_end(&mut rig, 1 - closing)?;
        let due = reported(State::PeerDraining, link::Event::Drained)?;
        ensure!(reason == due, "the peer of a side that closed hears: {reason}, not: {due}");
        let mut got = Vec::new();
        for event in before {
            let Event::Message(message) = event else {
                return Err(Stop::Failed(format!("{event:?} at the peer of a side that closed")));
            };
            got.extend_from_slice(message.bytes());
        }
        ensure!(got == messages, "messages {messages:?} were sent before the close, {got:?} arrived");
        let own: Vec<_> = std::mem::take(&mut rig.seen[closing]).into();
        let closed = Event::Closed(reported(State::Draining, link::Event::Drained)?);
        let once = own.iter().filter(|event| matches!(event, Event::Closed(_))).count() == 1;
        ensure!(once && own.last() == Some(&closed), "the side that closed heard {own:?}");
        dead(&mut rig, closing)?;
        dead(&mut rig, 1 - closing)?;
    }
    Ok(())
}

pub(super) fn both_sides_may_close_at_once(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = Rig::new(provider, seed)?;
    rig.end(0).close();
    rig.end(1).close();
    for side in [0, 1] {
        let (before, reason) = to_the_end(&mut rig, side)?;
        ensure!(before.is_empty(), "{before:?} on a link without traffic");
        // Whoever did it first at a side decides what is reported there.
        let due = [reported(State::Draining, link::Event::Drained)?, reported(State::PeerDraining, link::Event::Drained)?];
        ensure!(due.contains(&reason), "a link closed by both ended as: {reason}");
    }
    dead(&mut rig, 0)
}

pub(super) fn a_vanished_peer_is_noticed_once(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = Rig::new(provider, seed)?;
    rig.still_works()?;
    // What is outstanding would be answered, too.
    rig.settle();
    let Rig { pair, .. } = rig;
    let super::Pair { ends: [left, right], mut clock } = pair;
    drop(left);
    let mut right = right;
    let (mut events, mut seen) = (Events::new(), Vec::new());
    let started = std::time::Instant::now();
    let mut polls_after = 0;
    while polls_after < 300 {
        events.clear();
        right.poll(clock(), &mut events);
        seen.extend_from_slice(events.as_slice());
        polls_after += i32::from(!seen.is_empty());
        ensure!(
            started.elapsed() < provider.patience(),
            "a peer that vanished was not noticed within {} ms",
            started.elapsed().as_millis()
        );
    }
    // An end that is dropped may still say goodbye.
    let due = [reported(State::Ready, link::Event::PeerGone)?, reported(State::PeerDraining, link::Event::Drained)?];
    let fits = matches!(seen[..], [Event::Closed(reason)] if due.contains(&reason));
    ensure!(fits, "a side whose peer vanished heard {seen:?}");
    Ok(())
}

pub(super) fn outstanding_operations_are_answered_before_the_end(provider: &dyn Provider, seed: u64) -> Outcome {
    for closing in [0, 1] {
        let mut rig = Rig::new(provider, seed)?;
        let (near, target) = (rig.filled(0, 4096)?, rig.filled(1, 4096)?);
        let remote = rig.grant(1, &target, Access::READ_WRITE)?;
        let mut posted = Vec::new();
        for number in 0..20 {
            let from = near.region.span(0, 4096, Access::READ)?;
            let to = remote.span(0, 4096, Access::WRITE)?;
            if rig.try_post(0, Signal::Yes(OpId(number)), Op::Write { from, to }).is_err() {
                break;
            }
            posted.push(OpId(number));
        }
        rig.flush(0);
        for _ in 0..rig.seed.below(10) {
            rig.pump();
        }
        rig.end(closing).close();
        let (before, _) = to_the_end(&mut rig, 0)?;
        let mut answered = Vec::new();
        for event in before {
            match event {
                Event::Done(id) | Event::Failed(Some(id), _) => answered.push(id),
                other => return Err(Stop::Failed(format!("{other:?} where a write's outcome was due"))),
            }
        }
        ensure!(answered == posted, "operations {posted:?} were posted, {answered:?} were answered");
    }
    Ok(())
}
