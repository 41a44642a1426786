//! Cases of memory rights: what was revoked, released, never given or made up must not be reachable, and must not end the link.
//!
//! A peer's region is deregistered while 40 writes to it are under way: from the moment `deregister` returns its bytes stay as they are.

use std::time::{Duration, Instant};

use super::Provider;
use super::rig::{Outcome, Piece, Rig, ensure};
use crate::fabric::{Event, Grant, GrantError, Op, OpError, OpId, Signal};
use crate::span::{Access, LocalSpan, RemoteRegion, RemoteSpan, SpanError};

const PAGE: u64 = 4096;

/// Every way to touch `far` with `near`.
fn all_ops(near: LocalSpan, far: RemoteSpan) -> [Op<'static>; 3] {
    [Op::Write { from: near, to: far }, Op::WriteNotify { from: near, to: far, notify: 9 }, Op::Read { from: far, into: near }]
}

/// Whatever is tried with these spans is refused with `error` (any, where `None`), signalled or not.
fn refused(rig: &mut Rig<'_>, near: LocalSpan, far: RemoteSpan, error: Option<OpError>) -> Outcome {
    for op in all_ops(near, far) {
        let got = rig.perform(0, op)?;
        ensure!(got.is_err() && error.is_none_or(|error| got == Err(error)), "{op:?} ended as {got:?} where {error:?} was due");
        let got = rig.fail(0, op)?;
        ensure!(error.is_none_or(|error| got == error), "an unsignalled {op:?} failed with {got:?} where {error:?} was due");
    }
    Ok(())
}

fn spans(near: &Piece, far: &RemoteRegion) -> Outcome<(LocalSpan, RemoteSpan)> {
    Ok((near.region.span(0, 256, Access::READ_WRITE)?, far.span(0, 256, Access::READ_WRITE)?))
}

pub(super) fn deregistered_memory_is_never_touched_again(provider: &dyn Provider, seed: u64) -> Outcome {
    for round in 0..10_u64 {
        let mut rig = Rig::new(provider, seed ^ (round << 32))?;
        let (near, target) = (rig.filled(0, 16 * PAGE)?, rig.filled(1, 16 * PAGE)?);
        let remote = rig.grant(1, &target, Access::READ_WRITE)?;
        let (mut posted, mut told) = (Vec::new(), Vec::new());
        for number in 0..40 {
            let at = rig.seed.below(15) * PAGE;
            let op = Op::Write {
                from: near.region.span(at, PAGE as u32, Access::READ)?,
                to: remote.span(rig.seed.below(15) * PAGE, PAGE as u32, Access::WRITE)?,
            };
            // What does not fit before the region is gone is not posted: waiting would let the others finish.
            if rig.try_post(0, Signal::Yes(OpId(number)), op).is_err() {
                break;
            }
            posted.push(OpId(number));
        }
        rig.flush(0);
        // In every other round nothing is under way any more, so that no fabric has a reason to end the link.
        let quiet = round % 2 == 1;
        if quiet {
            rig.settle();
        } else {
            for _ in 0..rig.seed.below(12) {
                rig.pump();
            }
        }
        let ends_link = rig.end(0).limits().revocation_ends_link;
        let may_end = ends_link && !quiet;
        rig.end(1).deregister(target.region)?;
        let (ours, theirs) = (near.all()?, target.all()?);
        let forgotten = rig.end(1).local_memory(&target.region).is_none();
        ensure!(forgotten, "a deregistered region still has memory");
        for id in &posted {
            let outcome = rig.outcome(0, *id)?;
            told.push(*id);
            let fits = matches!(outcome, Ok(()) | Err(OpError::Revoked)) || (may_end && outcome == Err(OpError::Closed));
            ensure!(fits, "a write to memory that was revoked under it ended as {outcome:?}");
        }
        if ends_link {
            // Whoever posts before it has polled what the owner said would lose the link, too.
            rig.settle();
            let ended = |side: usize| rig.seen[side].iter().any(|event| matches!(event, Event::Closed(_)));
            if ended(0) || ended(1) {
                ensure!(may_end, "round {round}: a revocation ended a link on which nothing was under way");
                ensure!(target.all()? == theirs, "round {round}: bytes were written after deregister returned");
                ensure!(near.all()? == ours, "round {round}: bytes were read after deregister returned");
                continue;
            }
        }
        let (from, to) = spans(&near, &remote)?;
        refused(&mut rig, from, to, Some(OpError::Revoked))?;
        rig.settle();
        ensure!(target.all()? == theirs, "round {round}: bytes were written after deregister returned");
        ensure!(near.all()? == ours, "round {round}: bytes were read after deregister returned");
        let again = rig.end(1).export(&target.region, Access::READ);
        ensure!(matches!(again, Err(GrantError::NotRegistered)), "exporting a deregistered region gave {again:?}");
        rig.still_works()?;
    }
    Ok(())
}

pub(super) fn a_released_region_is_refused_even_when_its_place_is_taken(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = Rig::new(provider, seed)?;
    let near = rig.filled(0, PAGE)?;
    let (target, next) = (rig.filled(1, PAGE)?, rig.filled(1, PAGE)?);
    let remote = rig.grant(1, &target, Access::READ_WRITE)?;
    let (from, to) = spans(&near, &remote)?;
    let done = rig.perform(0, Op::Write { from, to })?;
    ensure!(done.is_ok(), "a write to a granted region ended as {done:?}");

    rig.end(0).release(remote);
    // New bytes, so that a write that gets through shows.
    let fresh = rig.bytes(PAGE as usize);
    near.memory.write(0, &fresh)?;
    let (ours, theirs, others) = (near.all()?, target.all()?, next.all()?);
    refused(&mut rig, from, to, Some(OpError::Revoked))?;
    ensure!(rig.end(0).map_remote(to).is_none(), "a released region can still be mapped");
    let another = rig.grant(1, &next, Access::READ_WRITE)?;
    refused(&mut rig, from, to, Some(OpError::Revoked))?;
    rig.settle();
    ensure!(near.all()? == ours && target.all()? == theirs && next.all()? == others, "a span of a released region moved bytes");
    let (from, to) = spans(&near, &another)?;
    let done = rig.perform(0, Op::Write { from, to })?;
    ensure!(done.is_ok(), "a write to a region granted later ended as {done:?}");
    rig.still_works()
}

pub(super) fn a_deregistered_local_region_is_refused_even_when_its_place_is_taken(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = Rig::new(provider, seed)?;
    let (near, target) = (rig.filled(0, PAGE)?, rig.filled(1, PAGE)?);
    let remote = rig.grant(1, &target, Access::READ_WRITE)?;
    let (from, to) = spans(&near, &remote)?;
    rig.end(0).deregister(near.region)?;
    let (ours, theirs) = (near.all()?, target.all()?);
    refused(&mut rig, from, to, Some(OpError::Revoked))?;
    let next = rig.filled(0, PAGE)?;
    let others = next.all()?;
    refused(&mut rig, from, to, Some(OpError::Revoked))?;
    rig.settle();
    ensure!(near.all()? == ours && target.all()? == theirs && next.all()? == others, "a span of a deregistered region moved bytes");
    rig.still_works()
}

pub(super) fn access_is_denied_where_it_was_not_given(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = Rig::new(provider, seed)?;
    let (near, target) = (rig.filled(0, PAGE)?, rig.filled(1, PAGE)?);
    for (given, denied) in [(Access::READ, Access::WRITE), (Access::WRITE, Access::READ)] {
        let remote = rig.grant(1, &target, given)?;
        for needed in [denied, Access::READ_WRITE] {
            let span = remote.span(0, 16, needed);
            let refused = Err(SpanError::Denied { needed, allowed: given });
            ensure!(span == refused, "a span for {needed:?} of a region with {given:?} gave {span:?}");
        }
        let narrow = rig.memory(0, PAGE, given)?;
        ensure!(narrow.region.span(0, 16, denied).is_err(), "a local span for {denied:?} of {given:?}");
    }

    // Spans made for one direction and used for the other.
    let remote = rig.grant(1, &target, Access::READ_WRITE)?;
    let (ours, theirs) = (near.all()?, target.all()?);
    let local = |access| near.region.span(0, 256, access);
    let far = |access| remote.span(256, 256, access);
    for (near_access, far_access, writes) in [
        (Access::READ, Access::READ, true),
        (Access::WRITE, Access::WRITE, true),
        (Access::READ, Access::READ, false),
        (Access::WRITE, Access::WRITE, false),
    ] {
        let op = if writes {
            Op::Write { from: local(near_access)?, to: far(far_access)? }
        } else {
            Op::Read { from: far(far_access)?, into: local(near_access)? }
        };
        let got = rig.perform(0, op)?;
        ensure!(got.is_err(), "{op:?} ended as {got:?} with spans made for something else");
    }
    rig.settle();
    ensure!(near.all()? == ours && target.all()? == theirs, "bytes moved against the access of a span");
    rig.still_works()
}

pub(super) fn a_nonsense_grant_reaches_nothing(provider: &dyn Provider, seed: u64) -> Outcome {
    /// "May block for a bounded time" has to mean something.
    const BOUND: Duration = Duration::from_secs(10);
    let mut rig = Rig::new(provider, seed)?;
    let (near, target) = (rig.filled(0, PAGE)?, rig.filled(1, PAGE)?);
    let real = rig.end(1).export(&target.region, Access::READ_WRITE)?;
    let (ours, theirs) = (near.all()?, target.all()?);
    let keys = [0, 1, u64::MAX, real.key ^ 1, real.key ^ (1 << 32), rig.seed.draw()];
    for key in keys {
        let made_up = Grant { key, ..real };
        let started = Instant::now();
        let imported = rig.end(0).import(&made_up);
        let took = started.elapsed();
        ensure!(took < BOUND, "importing {made_up:?} took {} ms", took.as_millis());
        if let Ok(remote) = imported {
            let (from, to) = spans(&near, &remote)?;
            refused(&mut rig, from, to, None)?;
        }
    }
    rig.settle();
    ensure!(near.all()? == ours && target.all()? == theirs, "a made-up grant moved bytes");
    let remote = rig.end(0).import(&real)?;
    let (from, to) = spans(&near, &remote)?;
    let done = rig.perform(0, Op::Write { from, to })?;
    ensure!(done.is_ok(), "after made-up grants, a write by the real one ended as {done:?}");
    rig.still_works()
}

pub(super) fn a_widened_grant_reaches_nothing_more(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = Rig::new(provider, seed)?;
    let near = rig.filled(0, 4 * PAGE)?;
    for allowed in [Access::READ, Access::WRITE, Access::NONE] {
        let narrow = rig.memory(1, PAGE, allowed)?;
        let asked = Access::READ_WRITE;
        let got = rig.end(1).export(&narrow.region, asked);
        ensure!(matches!(got, Err(GrantError::Widened { .. })), "a region with {allowed:?} was exported with {asked:?}: {got:?}");
    }

    // Grants that were changed on their way. The narrow access comes from the export, then from the region.
    for access in [Access::READ_WRITE, Access::READ] {
        let target = rig.memory(1, PAGE, access)?;
        let theirs = target.all()?;
        let honest = rig.end(1).export(&target.region, Access::READ)?;
        let widened = Grant { access: Access::READ_WRITE, ..honest };
        if let Ok(remote) = rig.end(0).import(&widened) {
            let from = near.region.span(0, 256, Access::READ)?;
            let to = remote.span(0, 256, Access::WRITE)?;
            let got = rig.perform(0, Op::Write { from, to })?;
            ensure!(got.is_err(), "a write by a grant for reading ended as {got:?}");
        }
        let honest = rig.end(1).export(&target.region, Access::READ)?;
        let lengthened = Grant { len: 2 * PAGE, ..honest };
        if let Ok(remote) = rig.end(0).import(&lengthened) {
            let into = near.region.span(0, PAGE as u32, Access::WRITE)?;
            let from = remote.span(PAGE, PAGE as u32, Access::READ)?;
            let got = rig.perform(0, Op::Read { from, into })?;
            ensure!(got.is_err(), "a read behind the end of a region ended as {got:?}");
        }
        rig.settle();
        ensure!(target.all()? == theirs, "a widened grant wrote");
    }
    rig.still_works()
}
