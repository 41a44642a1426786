//! Cases of flow: limits on length, queues that fill, floods, and who hears of which completion.
//!
//! 10,000 numbered messages go to a receiver that polls once where the sender polls fifty times: `Full` must come, and no number may be missing.

use std::collections::VecDeque;
use std::ops::Range;

use super::Provider;
use super::rig::{Outcome, Rig, Stop, ensure};
use crate::fabric::{Event, Op, OpError, OpId, Signal};
use crate::span::Access;

const MESSAGES: u32 = 10_000;

pub(super) fn spans_of_two_lengths_are_refused(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = Rig::new(provider, seed)?;
    let (source, target) = (rig.filled(0, 4096)?, rig.filled(1, 4096)?);
    let remote = rig.grant(1, &target, Access::READ_WRITE)?;
    let (ours, theirs) = (source.all()?, target.all()?);
    for (here, there) in [(8, 9), (9, 8), (0, 1), (4096, 4095)] {
        let local = source.region.span(0, here, Access::READ_WRITE)?;
        let far = remote.span(0, there, Access::READ_WRITE)?;
        let outgoing = OpError::Mismatch { from: here, to: there };
        let incoming = OpError::Mismatch { from: there, to: here };
        let notify = 7;
        for (op, error) in [
            (Op::Write { from: local, to: far }, outgoing),
            (Op::WriteNotify { from: local, to: far, notify }, outgoing),
            (Op::Read { from: far, into: local }, incoming),
        ] {
            let got = rig.perform(0, op)?;
            ensure!(got == Err(error), "spans of {here} and {there} bytes ended as {got:?}");
            let got = rig.fail(0, op)?;
            ensure!(got == error, "an unsignalled mismatch failed with {got:?}");
        }
    }
    ensure!(source.all()? == ours && target.all()? == theirs, "a refused operation moved bytes");
    rig.still_works()
}

pub(super) fn an_unsignalled_operation_that_fails_is_told_once(provider: &dyn Provider, seed: u64) -> Outcome {
    const KINDS: usize = 3;
    // Where the first failure ends the link, each kind of operation has one of its own.
    let rounds = if refused_operations(provider, seed, 0..1)? { 1..KINDS } else { 0..5 * KINDS };
    if rounds.start == 0 {
        return refused_operations(provider, seed, rounds).map(drop);
    }
    rounds.into_iter().try_for_each(|kind| refused_operations(provider, seed, kind..kind + 1).map(drop))
}

/// Operations of the kinds `kinds` (a write, a read, a write with a notification, and so on in turn) on memory that was taken back; whether that ends a link.
fn refused_operations(provider: &dyn Provider, seed: u64, kinds: Range<usize>) -> Outcome<bool> {
    let mut rig = Rig::new(provider, seed)?;
    let (source, target) = (rig.filled(0, 4096)?, rig.filled(1, 4096)?);
    let remote = rig.grant(1, &target, Access::READ_WRITE)?;
    let (near, far) = (source.region.span(0, 64, Access::READ_WRITE)?, remote.span(0, 64, Access::READ_WRITE)?);
    let (to, from) = (Op::Write { from: near, to: far }, Op::Read { from: far, into: near });
    // While all is well nothing is said of them.
    for op in [to, from] {
        rig.post(0, Signal::No, op)?;
    }
    rig.flush(0);
    rig.settle();
    rig.nothing_left()?;
    rig.end(1).deregister(target.region)?;
    // New bytes, so that what gets through shows.
    let fresh = rig.bytes(4096);
    source.memory.write(0, &fresh)?;
    let theirs = target.all()?;
    let ops = [to, from, Op::WriteNotify { from: near, to: far, notify: 9 }];
    for op in ops.iter().cycle().skip(kinds.start).take(kinds.len()) {
        let error = rig.fail(0, *op)?;
        ensure!(error == OpError::Revoked, "an access to memory that was revoked failed with {error:?}");
    }
    rig.settle();
    ensure!(source.all()? == fresh && target.all()? == theirs, "a refused operation moved bytes");
    let ends_link = rig.end(0).limits().revocation_ends_link;
    if !ends_link {
        rig.still_works()?;
    }
    Ok(ends_link)
}

pub(super) fn the_longest_operation_passes_and_a_longer_one_is_refused(provider: &dyn Provider, seed: u64) -> Outcome {
    /// More than this is not worth the memory of a test machine.
    const AFFORDABLE: u32 = 64 << 20;
    let mut rig = Rig::new(provider, seed)?;
    let limit = rig.end(0).limits().max_op_len;
    let longest = limit.min(AFFORDABLE);
    let len = u64::from(longest) + 1;
    let (source, target) = (rig.filled(0, len)?, rig.memory(1, len, Access::READ_WRITE)?);
    let remote = rig.grant(1, &target, Access::READ_WRITE)?;
    let whole = |span_len| -> Outcome<_> {
        Ok((source.region.span(0, span_len, Access::READ_WRITE)?, remote.span(0, span_len, Access::READ_WRITE)?))
    };

    let (local, far) = whole(longest)?;
    let done = rig.perform(0, Op::Write { from: local, to: far })?;
    ensure!(done.is_ok(), "a write of {longest} bytes ended as {done:?}");
    let mut expected = source.all()?;
    *expected.last_mut().unwrap_or(&mut 0) = 0;
    ensure!(target.all()? == expected, "a write of {longest} bytes arrived changed");
    source.memory.write(0, &vec![0; len as usize])?;
    let done = rig.perform(0, Op::Read { from: far, into: local })?;
    ensure!(done.is_ok(), "a read of {longest} bytes ended as {done:?}");
    ensure!(source.all()? == expected, "a read of {longest} bytes arrived changed");

    if longest < limit {
        return Err(Stop::NotRun(format!("the limit of {limit} bytes is more than a test can hold; {longest} bytes passed")));
    }
    target.memory.write(0, &vec![0; len as usize])?;
    let (local, far) = whole(longest + 1)?;
    for op in [Op::Write { from: local, to: far }, Op::Read { from: far, into: local }] {
        let refused = OpError::Mismatch { from: longest + 1, to: longest + 1 };
        let got = rig.perform(0, op)?;
        ensure!(got == Err(refused), "{} bytes, one more than the limit, ended as {got:?}", longest + 1);
    }
    let untouched = target.all()?.iter().all(|byte| *byte == 0);
    ensure!(untouched && source.all()? == expected, "a refused operation moved bytes");
    rig.still_works()
}

pub(super) fn a_full_queue_pushes_back_and_loses_nothing(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = Rig::new(provider, seed)?;
    let (mut sent, mut received, mut fulls) = (0_u32, 0_u32, 0_u32);
    // While the receiver does nothing at all, the sender must be stopped some time.
    let mut silent = true;
    let mut tries = 0_u32;
    while received < MESSAGES {
        while sent < MESSAGES || silent {
            let message = sent.to_le_bytes();
            if rig.try_post(0, Signal::No, Op::Send { message: &message }).is_err() {
                fulls += 1;
                break;
            }
            sent += 1;
            ensure!(sent < 1_000_000, "a receiver that does nothing is sent {sent} messages and no Full");
            if sent % 7 == 0 {
                rig.flush(0);
            }
        }
        rig.flush(0);
        rig.poll(0);
        tries += 1;
        // Completions alone must not make room for ever: the receiver has not polled.
        silent = silent && tries < 500;
        if tries.is_multiple_of(50) && !silent {
            rig.poll(1);
        }
        while let Some(event) = rig.seen[1].pop_front() {
            let Event::Message(message) = event else {
                return Err(Stop::Failed(format!("{event:?} where message {received} was due")));
            };
            ensure!(message.bytes() == received.to_le_bytes(), "{message:02x?} where message {received} was due");
            received += 1;
        }
        rig.be_patient("message")?;
    }
    while received < sent {
        let got = rig.message(1)?;
        ensure!(got == received.to_le_bytes(), "{got:02x?} where message {received} was due");
        received += 1;
    }
    ensure!(fulls > 0, "no Full in {sent} messages");
    rig.still_works()
}

pub(super) fn floods_in_both_directions_arrive_complete(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = Rig::new(provider, seed)?;
    let mut pieces = Vec::new();
    for side in [0, 1] {
        let (source, target) = (rig.filled(side, 4096)?, rig.filled(1 - side, 4096)?);
        let remote = rig.grant(1 - side, &target, Access::WRITE)?;
        pieces.push((source, target, remote));
    }
    let (mut sent, mut received) = ([0_u32; 2], [0_u32; 2]);
    while received != [MESSAGES; 2] {
        for side in [0, 1] {
            let (source, _, remote) = &pieces[side];
            for _ in 0..rig.seed.below(40) {
                let number = sent[side];
                let message = number.to_le_bytes();
                // Every third is a notification, so that the two kinds are kept in one order.
                let op = if number.is_multiple_of(3) {
                    Op::WriteNotify {
                        from: source.region.span(0, 64, Access::READ)?,
                        to: remote.span(0, 64, Access::WRITE)?,
                        notify: number,
                    }
                } else {
                    Op::Send { message: &message }
                };
                if number == MESSAGES || rig.try_post(side, Signal::No, op).is_err() {
                    break;
                }
                sent[side] += 1;
            }
            rig.flush(side);
            let at = rig.seed.below(2) as usize;
            rig.poll(at);
        }
        for side in [0, 1] {
            while let Some(event) = rig.seen[side].pop_front() {
                let due = received[side];
                let right = match event {
                    Event::Notify(number) => due.is_multiple_of(3) && number == due,
                    Event::Message(message) => !due.is_multiple_of(3) && message.bytes() == due.to_le_bytes(),
                    _ => false,
                };
                ensure!(right, "{event:?} where number {due} was due");
                received[side] += 1;
            }
        }
        rig.be_patient("message")?;
    }
    rig.still_works()
}

pub(super) fn signalled_operations_are_reported_once_and_in_order(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = Rig::new(provider, seed)?;
    let (local, target) = (rig.filled(0, 4096)?, rig.filled(1, 4096)?);
    let remote = rig.grant(1, &target, Access::READ_WRITE)?;
    let immediate = rig.end(0).limits().immediate;
    let mut due: VecDeque<Event> = VecDeque::new();
    for number in 0..1000_u64 {
        let len = rig.seed.between(0, 512) as u32;
        let (near, far) = (local.region.span(0, len, Access::READ_WRITE)?, remote.span(0, len, Access::READ_WRITE)?);
        let longer = remote.span(0, len + 1, Access::READ_WRITE)?;
        let mut error = None;
        let op = match rig.seed.below(5) {
            0 => Op::Write { from: near, to: far },
            1 => Op::WriteNotify { from: near, to: far, notify: 1 },
            2 => Op::Read { from: far, into: near },
            3 => Op::Send { message: b"order" },
            _ => {
                error = Some(OpError::Mismatch { from: len, to: len + 1 });
                Op::Write { from: near, to: longer }
            }
        };
        // Ids are the caller's: far apart, and not in numeric order.
        let id = OpId(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let signalled = rig.seed.chance(400);
        let told = rig.offer(0, if signalled { Signal::Yes(id) } else { Signal::No }, op)?;
        let at_once = immediate && !signalled && error.is_some();
        ensure!(told == at_once, "{op:?} was posted, and that it failed was said: {told}");
        match (signalled, error) {
            (true, None) => due.push_back(Event::Done(id)),
            (_, Some(error)) => due.push_back(Event::Failed(signalled.then_some(id), error)),
            (false, None) => {}
        }
        if rig.seed.chance(200) {
            rig.flush(0);
            rig.pump();
        }
        rig.seen[1].clear();
    }
    rig.flush(0);
    for due in due {
        let got = rig.next(0)?;
        ensure!(got == due, "{got:?} was reported where {due:?} was due");
    }
    rig.settle();
    rig.seen[1].clear();
    rig.still_works()
}
