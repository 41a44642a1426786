//! The order that must never break, each rule with its twin: the same check on a link that breaks the rule must find it broken.
//!
//! A DMA write of 60 KiB and its vector: when the vector is heard all bytes are there. With a lender's end that holds writes back behind the
//! messages that announce them, the check finds the first stale byte, over shared memory here and over queue pairs in the lab.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a panic is how a test fails, in its helpers too")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::links::{Connect, Link, on_every_fabric, over_verbs};
use common::pair::{GUEST_BYTES, Pair, guest};
use common::{BUFFER_BYTES, DONE, POLLED_WORD, RAISE, READ, Seen, VALUE, WRITE};
use farbus_remote_dma::{Attachment, Iova, ResetKind};
use farbus_transport::Memory;
use farbus_transport::wrap::{Breach, Broken};

on_every_fabric! {
    data_is_there_when_its_vector_is_heard
    data_that_comes_after_its_vector_is_found_out
    data_is_there_when_its_completion_says_so
    a_completion_that_comes_before_its_data_is_found_out
    the_answer_to_a_register_read_comes_after_all_dma_of_before
    dma_that_the_answer_to_a_register_read_overtakes_is_found_out
    posted_writes_arrive_in_order
    posted_writes_that_change_places_are_found_out
    after_an_unmap_no_dma_of_before_lands
    dma_that_lands_after_an_unmap_is_found_out
    after_a_reset_no_dma_of_before_lands
    dma_that_lands_after_a_reset_is_found_out
    a_write_with_a_grant_of_before_lands_nowhere
    a_write_with_a_grant_that_should_be_dead_is_found_out
}

/// Bytes of one DMA.
const LEN: u64 = BUFFER_BYTES - 4096;

/// How often a twin is played: a machine that keeps the wrong thread waiting long enough hides what is wrong.
const TRIES: u32 = 5;

/// A link with what is done to each end of it, the lender's first.
type Spoil = fn(Link, Duration) -> Link;

fn honest(link: Link, _late: Duration) -> Link {
    link
}

fn messages_first(link: Link, late: Duration) -> Link {
    Box::new(Broken::new(link, Breach::MessageBeforeData, late))
}

fn done_first(link: Link, late: Duration) -> Link {
    Box::new(Broken::new(link, Breach::DoneBeforeData, late))
}

fn swapped(link: Link, late: Duration) -> Link {
    Box::new(Broken::new(link, Breach::MessagesSwapped, late))
}

fn done_first_and_nothing_released(link: Link, late: Duration) -> Link {
    done_first(Box::new(Broken::new(link, Breach::ReleaseForgotten, late)), late)
}

fn nothing_revoked(link: Link, late: Duration) -> Link {
    Box::new(Broken::new(link, Breach::RevocationForgotten, late))
}

/// A session whose ends are spoilt, and the time after which whatever comes late has come.
struct Case {
    pair: Pair,
    settle: Duration,
}

type Check = fn(&mut Case) -> Result<(), String>;

/// How late a broken end is: longer than the machine keeps a thread waiting.
fn late(connect: Connect) -> Duration {
    let emulated = std::ptr::fn_addr_eq(connect, over_verbs as Connect);
    Duration::from_millis(if emulated { 300 } else { 30 })
}

fn play(connect: Connect, spoil: [Spoil; 2], check: Check) -> Result<(), String> {
    let (late, (lender, borrower)) = (late(connect), connect());
    let pair = Pair::new((spoil[0](lender, late), spoil[1](borrower, late)));
    check(&mut Case { pair, settle: 2 * late })
}

fn holds(connect: Connect, check: Check) {
    play(connect, [honest, honest], check).unwrap();
}

fn is_found_out(connect: Connect, spoil: [Spoil; 2], check: Check) {
    let found = (0..TRIES).find_map(|_| play(connect, spoil, check).err());
    println!("found: {}", found.expect("a broken rule was not noticed"));
}

/// Bytes that no other round has.
fn pattern(round: u64, len: u64) -> Vec<u8> {
    (0..len).map(|at| (at.wrapping_mul(7) ^ at >> 8 ^ round.wrapping_mul(0x3b)) as u8 | 1).collect()
}

fn equal(what: &str, memory: &Memory, at: u64, wanted: &[u8]) -> Result<(), String> {
    let mut found = vec![0; wanted.len()];
    memory.read(at, &mut found).unwrap();
    match found.iter().zip(wanted).position(|(found, wanted)| found != wanted) {
        None => Ok(()),
        Some(first) => Err(format!("{what}: byte {first} of {} is {:#x}, not {:#x}", wanted.len(), found[first], wanted[first])),
    }
}

impl Case {
    fn mapped(&mut self, iova: u64) -> Arc<Memory> {
        let guest = guest();
        self.pair.map(iova, &guest, true).unwrap();
        guest
    }

    /// Lets pass what may still be under way.
    fn settle(&mut self) {
        std::thread::sleep(self.settle);
    }
}

// ---- data, then what announces it ----

fn data_then_vector(case: &mut Case) -> Result<(), String> {
    let guest = case.mapped(0);
    for round in 0..20 {
        let bytes = pattern(round, LEN);
        case.pair.buffer.write(0, &bytes).unwrap();
        case.pair.command(WRITE, 0x1000, LEN);
        let heard = case.pair.next();
        equal("data when its vector is heard", &guest, 0x1000, &bytes)?;
        equal("the polled word", &guest, 0x1000 + LEN, &POLLED_WORD.to_le_bytes())?;
        if heard != Seen::Interrupt(3) {
            return Err(format!("{heard:?} where vector 3 was due"));
        }
        let mut pages = Vec::new();
        case.pair.session.dirty_log(&guest, &mut case.pair.host).unwrap().take(|page| pages.push(page));
        if !pages.iter().copied().eq(1..=LEN / 4096 + 1) {
            return Err(format!("dirty pages {pages:?}"));
        }
        case.pair.until(DONE, round + 1);
    }
    Ok(())
}

fn data_is_there_when_its_vector_is_heard(connect: Connect) {
    holds(connect, data_then_vector);
}

fn data_that_comes_after_its_vector_is_found_out(connect: Connect) {
    is_found_out(connect, [messages_first, honest], data_then_vector);
}

// ---- data, then its completion ----

fn data_then_completion(case: &mut Case) -> Result<(), String> {
    let guest = case.mapped(0);
    for round in 0..20 {
        let bytes = pattern(round, LEN);
        guest.write(0, &bytes).unwrap();
        case.pair.command(READ, 0, LEN);
        case.pair.until(DONE, round + 1);
        equal("what a DMA that is done has read", &case.pair.buffer, 0, &bytes)?;
    }
    Ok(())
}

fn data_is_there_when_its_completion_says_so(connect: Connect) {
    holds(connect, data_then_completion);
}

fn a_completion_that_comes_before_its_data_is_found_out(connect: Connect) {
    is_found_out(connect, [done_first, honest], data_then_completion);
}

// ---- DMA, then the answer to a register read ----

fn dma_then_answer(case: &mut Case) -> Result<(), String> {
    let guest = case.mapped(0);
    for round in 0..20 {
        let bytes = pattern(round, LEN);
        case.pair.buffer.write(0, &bytes).unwrap();
        case.pair.command(WRITE, 0x1000, LEN);
        case.pair.read(VALUE);
        equal("data of a DMA before a register read", &guest, 0x1000, &bytes)?;
        equal("the polled word", &guest, 0x1000 + LEN, &POLLED_WORD.to_le_bytes())?;
        // The buffer is the device's until the DMA is done.
        case.pair.until(DONE, round + 1);
        guest.write(0x1000 + LEN, &[0; 8]).unwrap();
    }
    Ok(())
}

fn the_answer_to_a_register_read_comes_after_all_dma_of_before(connect: Connect) {
    holds(connect, dma_then_answer);
}

fn dma_that_the_answer_to_a_register_read_overtakes_is_found_out(connect: Connect) {
    is_found_out(connect, [messages_first, honest], dma_then_answer);
}

// ---- posted writes ----

fn posted_in_order(case: &mut Case) -> Result<(), String> {
    for vector in 0..600_u16 {
        case.pair.command(RAISE, 0, u64::from(vector));
        case.pair.session.flush();
    }
    for vector in 0..600 {
        let heard = case.pair.next();
        if heard != Seen::Interrupt(vector) {
            return Err(format!("{heard:?} where vector {vector} was due"));
        }
    }
    Ok(())
}

fn posted_writes_arrive_in_order(connect: Connect) {
    holds(connect, posted_in_order);
}

fn posted_writes_that_change_places_are_found_out(connect: Connect) {
    is_found_out(connect, [honest, swapped], posted_in_order);
}

// ---- an unmap or a reset, then nothing of before ----

/// DMA writes are under way while `fence` is asked for; from its answer on the guest's bytes are the guest's.
fn nothing_after(case: &mut Case, fence: fn(&mut Pair), unmaps: bool) -> Result<(), String> {
    let guest = case.mapped(0);
    // A second window keeps the memory granted, so that only the fence is between it and the DMA.
    case.pair.map(2 * GUEST_BYTES, &guest, true).unwrap();
    let fresh = vec![0; GUEST_BYTES as usize];
    for round in 0..6 {
        case.pair.buffer.write(0, &pattern(round, LEN)).unwrap();
        for place in 0..8 {
            case.pair.command(WRITE, place * BUFFER_BYTES, LEN);
        }
        fence(&mut case.pair);
        guest.write(0, &fresh).unwrap();
        case.settle();
        equal("guest memory after the fence", &guest, 0, &fresh)?;
        if unmaps {
            case.pair.map(0, &guest, true).unwrap();
        }
    }
    Ok(())
}

fn nothing_after_an_unmap(case: &mut Case) -> Result<(), String> {
    nothing_after(case, |pair| pair.session.unmap(Iova(0), GUEST_BYTES, &mut pair.host).unwrap(), true)
}

fn nothing_after_a_reset(case: &mut Case) -> Result<(), String> {
    nothing_after(case, |pair| pair.session.reset(ResetKind::Function, &mut pair.host).unwrap(), false)
}

fn after_an_unmap_no_dma_of_before_lands(connect: Connect) {
    holds(connect, nothing_after_an_unmap);
}

fn dma_that_lands_after_an_unmap_is_found_out(connect: Connect) {
    is_found_out(connect, [done_first, honest], nothing_after_an_unmap);
}

fn after_a_reset_no_dma_of_before_lands(connect: Connect) {
    holds(connect, nothing_after_a_reset);
}

fn dma_that_lands_after_a_reset_is_found_out(connect: Connect) {
    is_found_out(connect, [done_first, honest], nothing_after_a_reset);
}

// ---- grants of before ----

/// Memory is granted, taken back and granted again while a write with the first grant is still held back at the lender.
fn stale_grant(case: &mut Case) -> Result<(), String> {
    let guest = case.mapped(0);
    case.pair.buffer.write(0, &pattern(0, LEN)).unwrap();
    case.pair.command(WRITE, 0, LEN);
    // Answered although the write waits: the lender's end said that it was done.
    case.pair.session.unmap(Iova(0), GUEST_BYTES, &mut case.pair.host).unwrap();
    let fresh = vec![0; GUEST_BYTES as usize];
    guest.write(0, &fresh).unwrap();
    // Where the write was refused meanwhile the link is gone, and its memory with it.
    if let Err(error) = case.pair.map(0, &guest, true) {
        println!("the link ended before: {error}");
    }
    case.settle();
    equal("guest memory that was granted anew", &guest, 0, &fresh)
}

fn a_write_with_a_grant_of_before_lands_nowhere(connect: Connect) {
    for lender in [honest, done_first] {
        play(connect, [lender, honest], stale_grant).unwrap();
    }
}

fn a_write_with_a_grant_that_should_be_dead_is_found_out(connect: Connect) {
    is_found_out(connect, [done_first_and_nothing_released, nothing_revoked], stale_grant);
}
