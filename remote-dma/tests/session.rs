//! A whole session over every real fabric: borrower in this thread, lender in another, the copy engine behind it.
//!
//! The first test is the life of one DMA: map 1 MiB, tell the engine where, see bytes, polled word, dirty pages and vector 3 in that order.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::links::{Connect, on_every_fabric};
use common::pair::{AMPLE, Pair, guest};
use common::{
    BUFFER_BYTES, COMMAND, CopyEngine, DONE, FAULTS, IOVA, LEN, RAISE, READ, Recorder, Seen, VALUE, WRITE, bar0, description,
};
use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::lender::{LenderSession, MAX_MEDIATIONS, PollOptions};
use farbus_remote_dma::wait::Waker;
use farbus_remote_dma::{Attachment, Iova, MapError, MediationAnswer, ResetKind, Width, Window, WindowMemory};
use farbus_transport::{Access, CloseReason, GrantError, Memory, Nanos, Op, Signal};

on_every_fabric! {
    data_then_polled_word_then_mark_then_vector
    dma_outside_the_maps_or_without_bus_mastering_touches_nothing
    after_an_unmap_no_dma_lands_and_the_memory_can_be_mapped_again
    a_reset_clears_the_device_and_keeps_the_maps
    memory_that_is_not_proven_is_reached_through_the_guests_side_until_it_is
    a_refused_mediation_is_a_fault_and_a_reset_does_not_wait_for_the_guests_side
    more_stores_than_staging_slots_do_not_hold_up_the_one_who_must_make_them
    a_dead_lender_answers_all_ones_and_takes_nothing_with_it
    a_burst_longer_than_the_ring_arrives_in_order_both_ways
    a_borrower_that_breaks_the_protocol_is_dropped_and_the_device_survives
    a_peer_that_left_before_its_first_message_was_read_left_and_broke_nothing
    memory_that_cannot_be_registered_is_refused_with_the_fabrics_own_reason
}

fn pages(pair: &mut Pair, memory: &Arc<Memory>) -> Vec<u64> {
    let mut pages = Vec::new();
    pair.session.dirty_log(memory, &mut pair.host).unwrap().take(|page| pages.push(page));
    pages
}

fn data_then_polled_word_then_mark_then_vector(connect: Connect) {
    let mut pair = Pair::new(connect());
    let guest = guest();
    pair.map(0x10_0000, &guest, true).unwrap();
    pair.buffer.write(0, b"from the device").unwrap();
    pair.command(WRITE, 0x10_0ff8, 16);
    assert_eq!(pair.next(), Seen::Interrupt(3));
    let mut seen = [0; 24];
    guest.read(0xff8, &mut seen).unwrap();
    assert_eq!(&seen, b"from the device\0lastword");
    assert_eq!(pages(&mut pair, &guest), [0, 1]);
    pair.until(DONE, 1);
    assert_eq!(pair.read(FAULTS), 0);

    guest.write(0x5000, b"from the guest").unwrap();
    pair.command(READ, 0x10_5000, 14);
    pair.until(DONE, 2);
    let mut seen = [0; 14];
    pair.buffer.read(0, &mut seen).unwrap();
    assert_eq!(&seen, b"from the guest");
    assert_eq!(pages(&mut pair, &guest), [0_u64; 0]);
}

fn dma_outside_the_maps_or_without_bus_mastering_touches_nothing(connect: Connect) {
    let mut pair = Pair::new(connect());
    let guest = guest();
    pair.map(0, &guest, true).unwrap();
    pair.buffer.write(0, &[0xaa; 64]).unwrap();
    for (iova, len) in [((1 << 20) - 32, 64), (1 << 20, 64), (u64::MAX - 10, 64)] {
        pair.command(WRITE, iova, len);
    }
    assert_eq!(pair.read(FAULTS), 3);
    pair.session.set_bus_master(false, &mut pair.host);
    pair.command(WRITE, 0, 64);
    assert_eq!(pair.read(FAULTS), 4);
    let mut seen = vec![0; 1 << 20];
    guest.read(0, &mut seen).unwrap();
    assert!(seen.iter().all(|byte| *byte == 0));
    assert!(pair.host.0.is_empty());
}

fn after_an_unmap_no_dma_lands_and_the_memory_can_be_mapped_again(connect: Connect) {
    let mut pair = Pair::new(connect());
    let guest = guest();
    for round in 1..=20 {
        pair.map(0, &guest, true).unwrap();
        assert!(matches!(pair.map(0x8_0000, &guest, true), Err(MapError::Overlap { .. })));
        pair.buffer.write(0, &[round; 64]).unwrap();
        pair.command(WRITE, 0x100, 64);
        assert_eq!(pair.next(), Seen::Interrupt(3));
        assert!(matches!(pair.session.unmap(Iova(0), 4096, &mut pair.host), Err(MapError::Overlap { .. })));
        pair.session.unmap(Iova(0), 1 << 20, &mut pair.host).unwrap();
        pair.buffer.write(0, &[0xff; 64]).unwrap();
        pair.command(WRITE, 0x100, 64);
        assert_eq!(pair.read(FAULTS), u64::from(round));
        let mut seen = [0; 64];
        guest.read(0x100, &mut seen).unwrap();
        assert_eq!(seen, [round; 64]);
    }
    pair.session.unmap(Iova(0x5000), 4096, &mut pair.host).unwrap();
}

fn a_reset_clears_the_device_and_keeps_the_maps(connect: Connect) {
    let mut pair = Pair::new(connect());
    let guest = guest();
    pair.map(0, &guest, true).unwrap();
    pair.write(VALUE, 7);
    assert_eq!(pair.read(VALUE), 7);
    pair.session.reset(ResetKind::Function, &mut pair.host).unwrap();
    assert_eq!(pair.read(VALUE), 0);
    pair.command(WRITE, 0, 8);
    assert_eq!(pair.next(), Seen::Interrupt(3));
}

fn memory_that_is_not_proven_is_reached_through_the_guests_side_until_it_is(connect: Connect) {
    let mut pair = Pair::new(connect());
    let guest = guest();
    pair.map(0, &guest, false).unwrap();
    // More pages than there are staging slots: the rest waits, and the vector waits behind all of it.
    let len = BUFFER_BYTES - 4096;
    let bytes: Vec<u8> = (0..len).map(|i| (i / 7) as u8).collect();
    pair.buffer.write(0, &bytes).unwrap();
    for _ in 0..3 {
        pair.command(WRITE, 0x800, len);
    }
    let mut stored = Vec::new();
    for _ in 0..3 {
        loop {
            match pair.next() {
                Seen::Store(ticket, iova, bytes, polled) => {
                    assert_eq!(polled, iova.0 == 0x800 + len);
                    if !polled {
                        stored.extend(bytes);
                    }
                    pair.session.answer(ticket, MediationAnswer::Stored, &mut pair.host);
                }
                Seen::Interrupt(3) => break,
                other => panic!("{other:?}"),
            }
        }
    }
    assert!(stored == bytes.repeat(3), "every byte once, in order");
    let mut untouched = [1; 16];
    guest.read(0x800, &mut untouched).unwrap();
    assert_eq!(untouched, [0; 16], "nothing went directly");

    pair.command(READ, 0x1ff0, 32);
    for expected in [0x1ff0, 0x2000] {
        let Seen::Fetch(ticket, iova, 16) = pair.next() else { panic!("no fetch") };
        assert_eq!(iova, Iova(expected));
        pair.session.answer(ticket, MediationAnswer::Fetched(&[expected as u8; 16]), &mut pair.host);
    }
    assert_eq!((pair.read(DONE), pair.read(FAULTS)), (4, 0));
    let mut seen = [0; 32];
    pair.buffer.read(0, &mut seen).unwrap();
    assert_eq!(seen, [[0xf0; 16], [0; 16]].concat()[..]);

    pair.session.prove(&guest, &mut pair.host);
    guest.write(0x3000, b"direct").unwrap();
    pair.command(READ, 0x3000, 6);
    pair.until(DONE, 5);
    pair.buffer.read(0, &mut seen[..6]).unwrap();
    assert_eq!(&seen[..6], b"direct");
}

fn a_refused_mediation_is_a_fault_and_a_reset_does_not_wait_for_the_guests_side(connect: Connect) {
    let mut pair = Pair::new(connect());
    let window = Window { iova: Iova(0), len: 1 << 20, access: Access::READ_WRITE, memory: WindowMemory::Mediated };
    pair.session.map(window, &mut pair.host).unwrap();
    pair.command(READ, 0, 64);
    let Seen::Fetch(ticket, ..) = pair.next() else { panic!("no fetch") };
    pair.session.answer(ticket, MediationAnswer::Fault, &mut pair.host);
    assert_eq!(pair.read(FAULTS), 1);
    pair.command(READ, 0, 64);
    let Seen::Fetch(ticket, ..) = pair.next() else { panic!("no fetch") };
    pair.session.reset(ResetKind::Function, &mut pair.host).unwrap();
    // The answer comes too late and harms nobody.
    pair.session.answer(ticket, MediationAnswer::Fetched(&[1; 64]), &mut pair.host);
    assert_eq!(pair.read(DONE), 0);
    assert_eq!(pair.session.gone(), None);
}

fn more_stores_than_staging_slots_do_not_hold_up_the_one_who_must_make_them(connect: Connect) {
    for question in 0..3 {
        let mut pair = Pair::new(connect());
        let guest = guest();
        pair.map(0x100_0000, &guest, true).unwrap();
        let window = Window { iova: Iova(0), len: 1 << 20, access: Access::READ_WRITE, memory: WindowMemory::Mediated };
        pair.session.map(window, &mut pair.host).unwrap();
        pair.write(VALUE, 7);
        pair.command(WRITE, 0, BUFFER_BYTES - 4096);
        pair.command(WRITE, 0, BUFFER_BYTES - 4096);
        // Nobody makes a store while this thread waits for its answer.
        match question {
            0 => {
                assert_eq!(pair.read(VALUE), 7);
                // What the device did before it answered is at the guest's side: 15 pages and a polled word for each write, then its vector.
                let stores = pair.host.0.iter().filter(|seen| matches!(seen, Seen::Store(..))).count();
                let vectors = pair.host.0.iter().filter(|seen| **seen == Seen::Interrupt(3)).count();
                assert_eq!((stores, vectors), (2 * (15 + 1), 2), "the answer passed stores");
            }
            1 => pair.session.unmap(Iova(0x100_0000), 1 << 20, &mut pair.host).unwrap(),
            _ => pair.session.reset(ResetKind::Function, &mut pair.host).unwrap(),
        }
        assert_eq!(pair.session.gone(), None);
    }
}

/// Over shared memory only: over an emulated RDMA device its 67,000 stores take minutes.
#[test]
fn a_read_behind_more_stores_than_the_guests_side_can_hold_is_all_ones_and_all_goes_on() {
    const WRITES: usize = MAX_MEDIATIONS / 2 + 1000;
    let mut pair = Pair::with(common::links::over_shm(), Duration::from_secs(3));
    let window = Window { iova: Iova(0), len: 1 << 20, access: Access::READ_WRITE, memory: WindowMemory::Mediated };
    pair.session.map(window, &mut pair.host).unwrap();
    for (offset, value) in [(VALUE, 7), (IOVA, 0), (LEN, 4)] {
        pair.write(offset, value);
    }
    // Each is a store of four bytes and one of a polled word.
    for _ in 0..WRITES {
        pair.write(COMMAND, WRITE);
    }
    assert_eq!(pair.read(VALUE), u64::MAX, "an answer came before what it should have flushed");
    let mut made = 0;
    while made < 2 * WRITES {
        if let Seen::Store(ticket, ..) = pair.next() {
            made += 1;
            pair.session.answer(ticket, MediationAnswer::Stored, &mut pair.host);
        }
    }
    assert_eq!((pair.read(VALUE), pair.read(DONE), pair.read(FAULTS)), (7, WRITES as u64, 0));
}

fn a_dead_lender_answers_all_ones_and_takes_nothing_with_it(connect: Connect) {
    let mut pair = Pair::new(connect());
    let guest = guest();
    pair.map(0, &guest, true).unwrap();
    pair.stop.set();
    pair.lender.take().unwrap().join().unwrap();
    assert_eq!(pair.session.bar_read(bar0(VALUE), Width::B4, &mut pair.host), 0xffff_ffff);
    assert_eq!(pair.session.gone(), Some(CloseReason::PeerClosed));
    pair.write(VALUE, 1);
    pair.session.unmap(Iova(0), 1 << 20, &mut pair.host).unwrap();
    assert!(pair.map(0, &guest, true).is_err());
}

fn a_burst_longer_than_the_ring_arrives_in_order_both_ways(connect: Connect) {
    let mut pair = Pair::new(connect());
    for vector in 0..2000 {
        pair.command(RAISE, 0, vector);
    }
    for vector in 0..2000 {
        assert_eq!(pair.next(), Seen::Interrupt(vector));
    }
}

fn a_borrower_that_breaks_the_protocol_is_dropped_and_the_device_survives(connect: Connect) {
    let nonsense: [&[u8]; 6] = [
        b"",
        b"\xff\xff\xff",
        &[1, 9, 4, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
        &[2, 0, 4, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0],
        &[1, 0, 8, 0xf9, 0x0f, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
        &[12, 3, 0, 0, 0, 1],
    ];
    for message in nonsense {
        let (lender, mut borrower) = connect();
        let mut session = LenderSession::new(lender, Box::new(CopyEngine::new())).map_err(|(error, _)| error).unwrap();
        borrower.post(Signal::No, Op::Send { message }).unwrap();
        borrower.flush();
        let reason = session.run(PollOptions::default(), &Waker::new().unwrap());
        assert!(matches!(reason, CloseReason::Protocol(_)), "{message:?}: {reason:?}");
        let engine = session.end().unwrap();
        let (lender, _borrower) = connect();
        assert!(LenderSession::new(lender, engine).is_ok());
    }
}

fn a_peer_that_left_before_its_first_message_was_read_left_and_broke_nothing(connect: Connect) {
    let left = |reason| matches!(reason, CloseReason::PeerClosed | CloseReason::PeerGone);
    let both = || {
        let (lender, borrower) = connect();
        let lender = LenderSession::new(lender, Box::new(CopyEngine::new())).map_err(|(error, _)| error).unwrap();
        (lender, BorrowerSession::new(borrower, description(), BorrowerOptions::default()).unwrap())
    };
    let (mut lender, borrower) = both();
    drop(borrower);
    let reason = lender.run(PollOptions::default(), &Waker::new().unwrap());
    assert!(left(reason), "{reason}");

    let (lender, mut borrower) = both();
    lender.end().unwrap();
    let deadline = Instant::now() + AMPLE;
    while borrower.gone().is_none() {
        assert!(Instant::now() < deadline, "the borrower does not hear of it");
        borrower.poll(Nanos::now(), &mut Recorder::default());
    }
    assert_eq!(borrower.gone(), Some(CloseReason::PeerClosed));
}

fn memory_that_cannot_be_registered_is_refused_with_the_fabrics_own_reason(connect: Connect) {
    const LIMIT: u32 = 4096;
    // With all places taken, and with just those free that a session takes for itself.
    for free in [0, 2] {
        let (_lender, mut borrower) = connect();
        let page = Memory::memfd("page", 4096).unwrap();
        for _ in free..LIMIT {
            borrower.register_for_peer(Arc::clone(&page), Access::READ_WRITE).unwrap();
        }
        let session = BorrowerSession::new(borrower, description(), BorrowerOptions::default());
        let why: Result<(), _> = session.and_then(|mut session| {
            let memory = WindowMemory::Mapped { memory: guest(), offset: 0, proven: true };
            let window = Window { iova: Iova(0), len: 4096, access: Access::READ_WRITE, memory };
            match session.map(window, &mut Recorder::default()) {
                Err(MapError::Grant(error)) => Err(error),
                other => panic!("{other:?}"),
            }
        });
        assert!(matches!(why, Err(GrantError::TooMany { limit: LIMIT })), "{free} free: {:?}", why.err());
    }
}
