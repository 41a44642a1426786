//! Cases of order and visibility: what a message, a notification, a read and a completion promise about bytes.
//!
//! Writes of 3 and 700 bytes, then a message: at the moment the receiver's poll hands out the message, both must be in its memory.

use super::Provider;
use super::rig::{Outcome, Piece, Rig, ensure};
use crate::fabric::{Event, MAX_MESSAGE, Op, OpError, OpId, Signal};
use crate::span::{Access, RemoteRegion};

const ROUNDS: u32 = 60;
const REGION: u64 = 64 << 10;

pub(super) fn limits_are_sane(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = Rig::new(provider, seed)?;
    for side in [0, 1] {
        let limits = *rig.end(side).limits();
        ensure!(limits.max_message as usize >= MAX_MESSAGE, "messages of only {} bytes", limits.max_message);
        ensure!(limits.max_op_len >= 4096, "operations of only {} bytes", limits.max_op_len);
        ensure!(limits.queue_depth >= 1, "no operation fits");

        let (source, target) = (rig.filled(side, REGION)?, rig.filled(1 - side, REGION)?);
        let remote = rig.grant(1 - side, &target, Access::READ_WRITE)?;
        let to = remote.span(64, 100, Access::READ_WRITE)?;
        let mapped = rig.end(side).map_remote(to);
        ensure!(
            mapped.is_some() == limits.peer_mappable,
            "peer_mappable is {} and a span maps to {mapped:?}",
            limits.peer_mappable
        );
        if let Some(mapped) = mapped {
            let (memory, offset) = mapped.parts();
            let mut seen = [0; 100];
            memory.read(offset, &mut seen)?;
            ensure!(mapped.len() == 100 && seen[..] == target.bytes(64, 100)?[..], "the mapping shows other bytes");
        }
        if limits.immediate {
            let from = source.region.span(5, 100, Access::READ)?;
            rig.post(side, Signal::No, Op::Write { from, to })?;
            ensure!(target.bytes(64, 100)? == source.bytes(5, 100)?, "an immediate write is not there when post returns");
        }
    }
    rig.still_works()
}

pub(super) fn messages_arrive_in_order_and_exact_at_every_length(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = Rig::new(provider, seed)?;
    for side in [0, 1] {
        let longest = (rig.end(side).limits().max_message as usize).min(MAX_MESSAGE);
        let lengths = (0..=longest).chain((0..=longest).rev());
        let messages: Vec<Vec<u8>> = lengths.map(|len| rig.bytes(len)).collect();
        for message in &messages {
            rig.send(side, message)?;
        }
        rig.flush(side);
        for sent in &messages {
            let got = rig.message(1 - side)?;
            ensure!(got == *sent, "message {sent:02x?} arrived as {got:02x?}");
        }
    }
    rig.settle();
    rig.nothing_left()
}

pub(super) fn a_message_that_is_too_long_is_refused(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = Rig::new(provider, seed)?;
    let limit = rig.end(0).limits().max_message;
    for len in [limit + 1, limit + 200, 1 << 20] {
        let message = rig.bytes(len as usize);
        let refused = Err(OpError::TooLong { len, limit });
        let got = rig.perform(0, Op::Send { message: &message })?;
        ensure!(got == refused, "a message of {len} bytes ended as {got:?}");
        rig.send(0, &message)?;
        rig.flush(0);
        let event = rig.next(0)?;
        ensure!(
            event == Event::Failed(None, OpError::TooLong { len, limit }),
            "an unsignalled message of {len} bytes ended as {event:?}"
        );
    }
    rig.settle();
    ensure!(rig.seen[1].is_empty(), "the peer heard {:?}", rig.seen[1]);
    rig.still_works()
}

/// Random writes of new bytes into `target`; what its memory must be when they have landed.
fn scatter(rig: &mut Rig<'_>, source: &Piece, target: &Piece, remote: &RemoteRegion, count: u64) -> Outcome<Vec<u8>> {
    let fresh = rig.bytes(REGION as usize);
    source.memory.write(0, &fresh)?;
    let mut expected = target.all()?;
    let longest = u64::from(rig.end(0).limits().max_op_len);
    for _ in 0..count {
        let (from, to, len) = place(rig, longest);
        let (write_from, write_to) = (source.region.span(from, len, Access::READ)?, remote.span(to, len, Access::WRITE)?);
        rig.post(0, Signal::No, Op::Write { from: write_from, to: write_to })?;
        let (from, to, len) = (from as usize, to as usize, len as usize);
        expected[to..to + len].copy_from_slice(&fresh[from..from + len]);
    }
    Ok(expected)
}

/// A length from 0 up, mostly short, and two places where it fits.
fn place(rig: &mut Rig<'_>, longest: u64) -> (u64, u64, u32) {
    let bound = [16, 200, 5000, REGION][rig.seed.below(4) as usize].min(longest);
    let len = rig.seed.between(0, bound);
    (rig.seed.between(0, REGION - len), rig.seed.between(0, REGION - len), len as u32)
}

fn difference(got: &[u8], expected: &[u8]) -> String {
    let wrong = got.iter().zip(expected).filter(|(got, expected)| got != expected).count();
    let first = got.iter().zip(expected).position(|(got, expected)| got != expected);
    format!("{wrong} bytes differ, the first at {first:?}")
}

pub(super) fn a_message_implies_every_earlier_write(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = Rig::new(provider, seed)?;
    let (source, target) = (rig.filled(0, REGION)?, rig.filled(1, REGION)?);
    let remote = rig.grant(1, &target, Access::READ_WRITE)?;
    for round in 0..ROUNDS {
        let count = rig.seed.between(1, 6);
        let expected = scatter(&mut rig, &source, &target, &remote, count)?;
        rig.send(0, &round.to_le_bytes())?;
        rig.flush(0);
        let got = rig.message(1)?;
        let bytes = target.all()?;
        ensure!(got == round.to_le_bytes(), "message {round} arrived as {got:02x?}");
        ensure!(bytes == expected, "round {round}: the message is here and its data is not: {}", difference(&bytes, &expected));
    }
    rig.nothing_left()
}

pub(super) fn a_notification_implies_its_write_and_all_earlier_ones(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = Rig::new(provider, seed)?;
    let (source, target) = (rig.filled(0, REGION)?, rig.filled(1, REGION)?);
    let remote = rig.grant(1, &target, Access::READ_WRITE)?;
    for round in 0..ROUNDS {
        let count = rig.seed.between(0, 4);
        let mut expected = scatter(&mut rig, &source, &target, &remote, count)?;
        let longest = u64::from(rig.end(0).limits().max_op_len);
        let (from, to, len) = place(&mut rig, longest);
        let notify = [round, u32::MAX - round][(round % 2) as usize];
        let op = Op::WriteNotify {
            from: source.region.span(from, len, Access::READ)?,
            to: remote.span(to, len, Access::WRITE)?,
            notify,
        };
        rig.post(0, Signal::No, op)?;
        rig.flush(0);
        expected[to as usize..][..len as usize].copy_from_slice(&source.bytes(from, len as usize)?);
        let got = rig.next(1)?;
        let bytes = target.all()?;
        ensure!(got == Event::Notify(notify), "notification {notify:#x} arrived as {got:?}");
        ensure!(
            bytes == expected,
            "round {round}: the notification is here and its data is not: {}",
            difference(&bytes, &expected)
        );
    }
    rig.nothing_left()
}

pub(super) fn a_read_sees_every_earlier_write(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = Rig::new(provider, seed)?;
    let (source, target) = (rig.filled(0, REGION)?, rig.filled(1, REGION)?);
    let back = rig.filled(0, REGION)?;
    let remote = rig.grant(1, &target, Access::READ_WRITE)?;
    for round in 0..ROUNDS {
        let expected = scatter(&mut rig, &source, &target, &remote, 3)?;
        let longest = u64::from(rig.end(0).limits().max_op_len);
        let (into, from, len) = place(&mut rig, longest);
        let op = Op::Read { from: remote.span(from, len, Access::READ)?, into: back.region.span(into, len, Access::WRITE)? };
        let before = back.all()?;
        let done = rig.perform(0, op)?;
        ensure!(done.is_ok(), "round {round}: a read ended as {done:?}");
        let mut wanted = before;
        wanted[into as usize..][..len as usize].copy_from_slice(&expected[from as usize..][..len as usize]);
        let got = back.all()?;
        ensure!(
            got == wanted,
            "round {round}: a read of {len} bytes missed earlier writes or left its span: {}",
            difference(&got, &wanted)
        );
        // The next round's expectation starts from what is there.
        ensure!(target.all()? == expected, "round {round}: a read was done before earlier writes had landed");
    }
    rig.still_works()
}

pub(super) fn a_write_that_is_done_has_landed(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = Rig::new(provider, seed)?;
    let (source, target) = (rig.filled(0, REGION)?, rig.filled(1, REGION)?);
    let remote = rig.grant(1, &target, Access::READ_WRITE)?;
    for round in 0..ROUNDS {
        let mut expected = scatter(&mut rig, &source, &target, &remote, 2)?;
        let longest = u64::from(rig.end(0).limits().max_op_len);
        let (from, to, len) = place(&mut rig, longest);
        let op = Op::Write { from: source.region.span(from, len, Access::READ)?, to: remote.span(to, len, Access::WRITE)? };
        expected[to as usize..][..len as usize].copy_from_slice(&source.bytes(from, len as usize)?);
        let done = rig.perform(0, op)?;
        let bytes = target.all()?;
        ensure!(done.is_ok(), "round {round}: a write ended as {done:?}");
        ensure!(bytes == expected, "round {round}: the write is done and not there: {}", difference(&bytes, &expected));
    }
    rig.still_works()
}

pub(super) fn overlapping_writes_end_as_posted(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = Rig::new(provider, seed)?;
    let (source, target) = (rig.filled(0, REGION)?, rig.filled(1, 64)?);
    let remote = rig.grant(1, &target, Access::WRITE)?;
    let mut expected = target.all()?;
    for round in 0..ROUNDS {
        for step in 0..8 {
            let len = rig.seed.between(1, 64);
            let (from, to) = (rig.seed.between(0, REGION - len), rig.seed.between(0, 64 - len));
            let op = Op::Write {
                from: source.region.span(from, len as u32, Access::READ)?,
                to: remote.span(to, len as u32, Access::WRITE)?,
            };
            rig.post(0, Signal::No, op)?;
            expected[to as usize..][..len as usize].copy_from_slice(&source.bytes(from, len as usize)?);
            if step % 3 == 0 {
                rig.flush(0);
            }
        }
        let id = OpId(u64::from(round));
        rig.post(0, Signal::Yes(id), Op::Send { message: b"x" })?;
        rig.flush(0);
        rig.message(1)?;
        let bytes = target.all()?;
        ensure!(bytes == expected, "round {round}: an older write won: {}", difference(&bytes, &expected));
        let done = rig.outcome(0, id)?;
        ensure!(done.is_ok(), "a message ended as {done:?}");
    }
    rig.nothing_left()
}
