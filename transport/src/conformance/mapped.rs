//! Cases of mapped memory: what a CPU or a system call of this side does to the peer's memory without an operation.
//!
//! A thread holds a mapping of the peer's page for 30 ms and writes to it at the end: the peer, which takes the page back meanwhile, is not told
//! that it has it before that write is there.

use std::time::{Duration, Instant};

use super::Provider;
use super::rig::{Outcome, Rig, Stop, ensure};
use crate::fabric::{Op, OpError, RevokeError, Signal};
use crate::span::Access;

const PAGE: u64 = 4096;
/// How long a mapping is held while its owner wants the memory back.
const HELD: Duration = Duration::from_millis(30);

/// A rig whose first side can map the second's memory.
fn mappable(provider: &dyn Provider, seed: u64) -> Outcome<Rig<'_>> {
    let mut rig = Rig::new(provider, seed)?;
    if rig.end(0).limits().peer_mappable {
        return Ok(rig);
    }
    let (target, bytes) = (rig.filled(1, PAGE)?, [1; 8]);
    let theirs = target.all()?;
    let to = rig.grant(1, &target, Access::READ_WRITE)?.span(0, 8, Access::WRITE)?;
    let got = rig.end(0).store_polled(to, &bytes);
    ensure!(got == Err(OpError::Denied), "memory that cannot be mapped was stored to: {got:?}");
    ensure!(target.all()? == theirs, "a store to memory that cannot be mapped arrived");
    Err(Stop::NotRun("the peer's memory cannot be mapped here".to_owned()))
}

pub(super) fn a_mapping_in_use_makes_its_owner_wait(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = mappable(provider, seed)?;
    // A second grant in use must not matter.
    let (target, other) = (rig.filled(1, PAGE)?, rig.filled(1, PAGE)?);
    let (remote, kept) = (rig.grant(1, &target, Access::READ_WRITE)?, rig.grant(1, &other, Access::READ_WRITE)?);
    let span = remote.span(0, PAGE as u32, Access::READ_WRITE)?;
    let unrelated = rig.end(0).map_remote(kept.span(0, 64, Access::READ)?);
    ensure!(unrelated.is_some(), "granted memory cannot be mapped");
    for round in 0..3 {
        // Those that are not in use any more do not count.
        drop(rig.end(0).map_remote(span));
        let Some(mapped) = rig.end(0).map_remote(span).filter(|_| round == 2) else { continue };
        let fresh = rig.bytes(PAGE as usize);
        let written = fresh.clone();
        let holder = std::thread::spawn(move || {
            std::thread::sleep(HELD);
            let (memory, start) = mapped.parts();
            memory.write(start, &written).is_ok()
        });
        let started = Instant::now();
        let revoked = rig.end(1).deregister(target.region);
        let (took, there) = (started.elapsed(), target.all()?);
        let wrote = holder.join().unwrap_or(false);
        ensure!(wrote && revoked.is_ok(), "memory that was in use for a moment was taken back as {revoked:?}");
        ensure!(there == fresh, "memory was given back after {} us, before a mapping of it was dropped", took.as_micros());
        ensure!(target.all()? == fresh, "memory changed after it was given back");
    }
    ensure!(rig.end(0).map_remote(span).is_none(), "memory that was taken back can be mapped");
    drop(unrelated);
    rig.end(1).deregister(other.region)?;
    rig.still_works()
}

pub(super) fn a_mapping_outlives_its_end_and_its_owner_waits_for_it(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = mappable(provider, seed)?;
    let target = rig.filled(1, PAGE)?;
    let remote = rig.grant(1, &target, Access::READ_WRITE)?;
    let Some(mapped) = rig.end(0).map_remote(remote.span(0, PAGE as u32, Access::READ_WRITE)?) else {
        return Err(Stop::Failed("granted memory cannot be mapped".to_owned()));
    };
    let Rig { pair, .. } = rig;
    let super::Pair { ends: [left, mut right], .. } = pair;
    let holder = std::thread::spawn(move || {
        // The end goes first, with whatever it says to its peer.
        drop(left);
        std::thread::sleep(HELD);
        let (memory, start) = mapped.parts();
        memory.write(start, &[7; PAGE as usize]).is_ok()
    });
    std::thread::sleep(HELD / 3);
    let revoked = right.deregister(target.region);
    let there = target.all()?;
    ensure!(holder.join().unwrap_or(false), "a mapping went with its end");
    ensure!(revoked.is_ok(), "memory of a peer that is leaving was taken back as {revoked:?}");
    ensure!(there == [7; PAGE as usize], "memory was given back while a mapping of it was in use");
    Ok(())
}

pub(super) fn a_mapping_that_is_kept_is_told_of_and_ends_the_link(provider: &dyn Provider, seed: u64) -> Outcome {
    let mut rig = mappable(provider, seed)?;
    let target = rig.filled(1, PAGE)?;
    let remote = rig.grant(1, &target, Access::READ_WRITE)?;
    let mapped = rig.end(0).map_remote(remote.span(0, 64, Access::READ_WRITE)?);
    let revoked = rig.end(1).deregister(target.region);
    ensure!(matches!(revoked, Err(RevokeError::InUse { .. })), "memory that is in use was taken back as {revoked:?}");
    drop(mapped);
    Ok(())
}

pub(super) fn polled_bytes_are_stored_behind_what_was_written_and_not_after_revocation(
    provider: &dyn Provider,
    seed: u64,
) -> Outcome {
    let mut rig = mappable(provider, seed)?;
    let (source, target) = (rig.filled(0, PAGE)?, rig.filled(1, PAGE)?);
    let remote = rig.grant(1, &target, Access::READ_WRITE)?;
    for at in (0..2048).step_by(96) {
        let from = source.region.span(at, 64, Access::READ)?;
        rig.post(0, Signal::No, Op::Write { from, to: remote.span(at, 64, Access::WRITE)? })?;
        let word = rig.bytes(if at.is_multiple_of(64) { 4 } else { 32 });
        let to = remote.span(at + 64, word.len() as u32, Access::WRITE)?;
        rig.end(0).store_polled(to, &word)?;
        let there = target.bytes(at, 64)? == source.bytes(at, 64)?;
        ensure!(there && target.bytes(at + 64, word.len())? == word, "polled bytes, or what was written before them, are missing");
    }
    let theirs = target.all()?;
    for (at, len, access, bytes) in
        [(0, 8, Access::READ, 8), (2, 8, Access::WRITE, 8), (0, 6, Access::WRITE, 6), (0, 8, Access::WRITE, 4)]
    {
        let got = rig.end(0).store_polled(remote.span(at, len, access)?, &[0xee; 8][..bytes]);
        ensure!(got == Err(OpError::Denied), "{bytes} bytes for a span of {len} at {at} made for {access:?} were stored: {got:?}");
    }
    rig.end(1).deregister(target.region)?;
    let got = rig.end(0).store_polled(remote.span(0, 8, Access::WRITE)?, &[0xee; 8]);
    ensure!(got == Err(OpError::Revoked), "a store to memory that was taken back gave {got:?}");
    rig.end(0).release(remote);
    let got = rig.end(0).store_polled(remote.span(0, 8, Access::WRITE)?, &[0xee; 8]);
    ensure!(got == Err(OpError::Revoked), "a store to memory that was released gave {got:?}");
    ensure!(target.all()? == theirs, "a store that was refused arrived");
    rig.still_works()
}
