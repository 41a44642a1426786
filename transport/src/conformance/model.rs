//! Cases of everything at once: random operations on both sides against a model, and 64 MiB in random pieces.
//!
//! The model keeps each byte's history: when message 812 arrives, a byte that was last written by operation 640 and again by 900 may
//! hold either value, and no other.

use std::collections::VecDeque;

use super::Provider;
use super::rig::{Outcome, Piece, Rig, Stop, ensure};
use crate::fabric::{Event, Op, OpId, Signal};
use crate::span::{Access, RemoteRegion};

const TARGET: u64 = 2048;
const SCRATCH: u64 = 1 << 20;
const OPERATIONS: u64 = 1500;

/// One side as a writer: its peer's memory as it must be, byte by byte, operation by operation.
struct Writer {
    scratch: Piece,
    remote: RemoteRegion,
    /// For each byte of the target, the operations that wrote it, oldest first.
    history: Vec<Vec<(u64, u8)>>,
    posted: u64,
    /// Scratch bytes from here on were never used: a source must not change under its write.
    unused: u64,
    /// Numbers of messages and notifications on their way.
    announced: VecDeque<u64>,
    /// Signalled operations on their way, and for reads what they cover.
    awaited: VecDeque<(u64, Option<Reading>)>,
}

/// `len` bytes from offset `there` of the target into offset `here` of the scratch memory.
struct Reading {
    there: u64,
    here: u64,
    len: u64,
}

impl Writer {
    /// Whether `byte` at `at` can be what an observer sees after operation `seen`: its value then, or a later one.
    fn allows(&self, at: u64, byte: u8, seen: u64) -> bool {
        let history = &self.history[at as usize];
        let then = history.iter().rposition(|(number, _)| *number <= seen).unwrap_or(0);
        history[then..].iter().any(|(_, value)| *value == byte)
    }

    fn check(&self, what: &str, at: u64, bytes: &[u8], seen: u64) -> Outcome {
        for (at, byte) in (at..).zip(bytes) {
            ensure!(
                self.allows(at, *byte, seen),
                "{what} after operation {seen}: byte {at} is {byte:#04x}, its history {:02x?}",
                self.history[at as usize]
            );
        }
        Ok(())
    }
}

pub(super) fn random_operations_match_a_model(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = Rig::new(provider, seed)?;
    let targets = [rig.filled(0, TARGET)?, rig.filled(1, TARGET)?];
    let mut writers = Vec::new();
    for side in [0, 1] {
        let remote = rig.grant(1 - side, &targets[1 - side], Access::READ_WRITE)?;
        let scratch = rig.filled(side, SCRATCH)?;
        let first = targets[1 - side].all()?;
        writers.push(Writer {
            scratch,
            remote,
            history: first.into_iter().map(|byte| vec![(0, byte)]).collect(),
            posted: 0,
            unused: 0,
            announced: VecDeque::new(),
            awaited: VecDeque::new(),
        });
    }

    while writers.iter().any(|writer| writer.posted < OPERATIONS) {
        let side = rig.seed.below(2) as usize;
        for _ in 0..rig.seed.below(12) {
            step(&mut rig, &mut writers[side], side)?;
        }
        if rig.seed.chance(700) {
            rig.flush(side);
        }
        let polled = rig.seed.below(2) as usize;
        rig.poll(polled);
        judge(&mut rig, &mut writers, &targets, polled)?;
    }
    for side in [0, 1] {
        let writer = &mut writers[side];
        writer.posted += 1;
        writer.announced.push_back(writer.posted);
        rig.send(side, &writer.posted.to_le_bytes())?;
        rig.flush(side);
    }
    while writers.iter().any(|writer| !writer.announced.is_empty() || !writer.awaited.is_empty()) {
        for side in [0, 1] {
            rig.poll(side);
            judge(&mut rig, &mut writers, &targets, side)?;
        }
        rig.be_patient("message or completion")?;
    }
    for side in [0, 1] {
        writers[side].check("at the end", 0, &targets[1 - side].all()?, writers[side].posted)?;
    }
    rig.still_works()
}

/// Posts one random operation, where there is room.
fn step(rig: &mut Rig<'_>, writer: &mut Writer, side: usize) -> Outcome {
    let bound = [8, 64, 600][rig.seed.below(3) as usize];
    let len = rig.seed.between(0, bound);
    if writer.unused + len > SCRATCH {
        // Sources of operations that are not known to be done must stay as they are.
        return Ok(());
    }
    let (there, here) = (rig.seed.between(0, TARGET - len), writer.unused);
    let number = writer.posted + 1;
    let near = writer.scratch.region.span(here, len as u32, Access::READ_WRITE)?;
    let far = writer.remote.span(there, len as u32, Access::READ_WRITE)?;
    let signalled = rig.seed.chance(200);
    let message = number.to_le_bytes();
    let kind = rig.seed.below(10);
    let (op, signalled) = match kind {
        0..=4 => (Op::Write { from: near, to: far }, signalled),
        5 => {
            let notify = number as u32;
            (Op::WriteNotify { from: near, to: far, notify }, signalled)
        }
        6 | 7 => (Op::Read { from: far, into: near }, true),
        _ => (Op::Send { message: &message }, signalled),
    };
    let signal = if signalled { Signal::Yes(OpId(number)) } else { Signal::No };
    let source = writer.scratch.bytes(here, len as usize)?;
    if rig.try_post(side, signal, op).is_err() {
        return Ok(());
    }
    writer.posted = number;
    if kind <= 7 {
        writer.unused += len;
    }
    if kind <= 5 {
        for (at, byte) in (there as usize..).zip(source) {
            writer.history[at].push((number, byte));
        }
    }
    if kind == 5 || kind > 7 {
        writer.announced.push_back(number);
    }
    if signalled {
        let read = (kind == 6 || kind == 7).then_some(Reading { there, here, len });
        writer.awaited.push_back((number, read));
    }
    Ok(())
}

/// Holds all that a side has reported against the model.
fn judge(rig: &mut Rig<'_>, writers: &mut [Writer], targets: &[Piece; 2], side: usize) -> Outcome {
    while let Some(event) = rig.seen[side].pop_front() {
        let number = match event {
            Event::Message(message) => message.bytes().try_into().map_or(u64::MAX, u64::from_le_bytes),
            Event::Notify(number) => u64::from(number),
            Event::Done(OpId(id)) => {
                let writer = &mut writers[side];
                let due = writer.awaited.pop_front();
                let (number, read) =
                    due.ok_or_else(|| Stop::Failed(format!("operation {id} is done twice or was never posted")))?;
                ensure!(number == id, "operation {id} is done where {number} was due");
                if let Some(Reading { there, here, len }) = read {
                    let bytes = writer.scratch.bytes(here, len as usize)?;
                    writer.check("a read", there, &bytes, number)?;
                }
                continue;
            }
            other => return Err(Stop::Failed(format!("{other:?} in the middle of valid operations"))),
        };
        let writer = &mut writers[1 - side];
        let due = writer.announced.pop_front();
        ensure!(due == Some(number), "number {number} was announced where {due:?} was due");
        writer.check("what is there", 0, &targets[side].all()?, number)?;
    }
    Ok(())
}

pub(super) fn bulk_data_arrives_intact(provider: &dyn Provider, seed: u64) -> Outcome {
    const BUFFER: u64 = 4 << 20;
    const TOTAL: u64 = 64 << 20;
    let mut rig = Rig::new(provider, seed)?;
    let (source, target) = (rig.filled(0, BUFFER)?, rig.memory(1, BUFFER, Access::READ_WRITE)?);
    let back = rig.memory(0, BUFFER, Access::READ_WRITE)?;
    let remote = rig.grant(1, &target, Access::READ_WRITE)?;
    let longest = u64::from(rig.end(0).limits().max_op_len).min(1 << 20);
    for pass in 0..TOTAL / BUFFER / 2 {
        let fresh = rig.bytes(BUFFER as usize);
        source.memory.write(0, &fresh)?;
        for (piece, memory) in [(&source, &target), (&back, &back)] {
            let reading = std::ptr::eq(piece, memory);
            let mut at = 0;
            while at < BUFFER {
                let len = rig.seed.between(1, longest).min(BUFFER - at) as u32;
                let near = piece.region.span(at, len, Access::READ_WRITE)?;
                let far = remote.span(at, len, Access::READ_WRITE)?;
                let op = if reading { Op::Read { from: far, into: near } } else { Op::Write { from: near, to: far } };
                at += u64::from(len);
                // The last one tells when all are done.
                let signal = if at == BUFFER { Signal::Yes(OpId(pass)) } else { Signal::No };
                rig.post(0, signal, op)?;
            }
            rig.flush(0);
            let done = rig.outcome(0, OpId(pass))?;
            ensure!(done.is_ok(), "pass {pass}: an operation ended as {done:?}");
            ensure!(memory.all()? == fresh, "pass {pass}: {BUFFER} bytes arrived changed (reading: {reading})");
        }
    }
    rig.still_works()
}
