//! What is the simulation's own: cuts at any moment, peers of any speed, one history per seed, and all the disorder that the contract allows.
//!
//! In 60 drawn links some reader must see half of a write before its message, a later write before an earlier one, and a read whose two
//! halves come from different times: a simulation that is kinder than an adapter tests nothing.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::sync::Arc;
use std::time::Duration;

use farbus_transport::sim::{self, Seed, SimFabric, SimOptions, World};
use farbus_transport::{
    Access, CloseReason, Event, Events, Fabric, GrantError, LocalRegion, Memory, Nanos, Op, OpError, OpId, Regions, RemoteRegion,
    Signal,
};

struct Link {
    ends: [SimFabric; 2],
    world: World,
    near: (Arc<Memory>, LocalRegion),
    far: Arc<Memory>,
    remote: RemoteRegion,
}

const LEN: u64 = 4096;

impl Link {
    fn new(seed: u64, options: SimOptions) -> Self {
        let (mut left, mut right, world) = sim::pair(seed, options);
        let (near, far) = (Memory::memfd("near", LEN).unwrap(), Memory::memfd("far", LEN).unwrap());
        let near_region = left.register(Arc::clone(&near), Access::READ_WRITE).unwrap();
        let far_region = right.register(Arc::clone(&far), Access::READ_WRITE).unwrap();
        let grant = right.export(&far_region, Access::READ_WRITE).unwrap();
        let remote = left.import(&grant).unwrap();
        Self { ends: [left, right], world, near: (near, near_region), far, remote }
    }

    fn write(&mut self, signal: Signal, at: u64, len: u32) -> bool {
        let from = self.near.1.span(at, len, Access::READ).unwrap();
        let to = self.remote.span(at, len, Access::WRITE).unwrap();
        self.ends[0].post(signal, Op::Write { from, to }).is_ok()
    }

    fn poll(&mut self, side: usize) -> Vec<Event> {
        let mut events = Events::new();
        self.ends[side].poll(self.world.step(), &mut events);
        events.as_slice().to_vec()
    }

    fn far_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; LEN as usize];
        self.far.read(0, &mut bytes).unwrap();
        bytes
    }
}

#[test]
fn a_cut_at_any_moment_answers_everything_and_is_heard_once_by_both() {
    for seed in 0..200 {
        let mut options = SimOptions::drawn(&mut Seed::new(seed));
        let cut_at_ns = seed * 700;
        options.cut_at_ns = Some(cut_at_ns);
        let detection_ns = options.detection_ns;
        let mut link = Link::new(seed, options);
        link.near.0.write(0, &[7; LEN as usize]).unwrap();
        let (mut posted, mut heard) = (Vec::new(), [Vec::new(), Vec::new()]);
        let mut closed_at = [None; 2];
        let mut at_cut = None;
        for round in 0..3000 {
            if closed_at[0].is_none() && round < 200 && link.write(Signal::Yes(OpId(round)), (round * 16) % 4000, 16) {
                posted.push(OpId(round));
            }
            link.ends[0].flush();
            for side in [0, 1] {
                let events = link.poll(side);
                if link.world.now() >= Nanos(cut_at_ns) {
                    at_cut.get_or_insert_with(|| link.far_bytes());
                }
                if matches!(events.last(), Some(Event::Closed(_))) {
                    closed_at[side] = Some(link.world.now());
                }
                heard[side].extend(events);
            }
        }
        let answered: Vec<_> = heard[0]
            .iter()
            .filter_map(|event| match event {
                Event::Done(id) | Event::Failed(Some(id), OpError::Closed) => Some(*id),
                _ => None,
            })
            .collect();
        assert_eq!(answered, posted, "seed {seed}");
        for side in [0, 1] {
            let ends = heard[side].iter().filter(|event| matches!(event, Event::Closed(_))).count();
            assert_eq!(ends, 1, "seed {seed}, side {side}");
            assert_eq!(heard[side].last(), Some(&Event::Closed(CloseReason::PeerGone)), "seed {seed}, side {side}");
            let noticed = closed_at[side].unwrap().since(Nanos(cut_at_ns)).as_nanos() as u64;
            assert!(noticed >= detection_ns.0, "seed {seed}, side {side}: noticed after {noticed} ns");
        }
        assert_eq!(at_cut.unwrap(), link.far_bytes(), "seed {seed}: bytes crossed a link that was cut");
        let grant = link.ends[0].export(&link.near.1, Access::READ);
        assert!(matches!(grant, Err(GrantError::Closed)), "seed {seed}: {grant:?}");
    }
}

#[test]
fn a_hand_can_cut_the_link_and_slow_a_peer() {
    let arrival = |slow: Option<u64>| {
        let options = SimOptions { latency_min_ns: 1000, latency_max_ns: 1000, tail_permille: 0, ..SimOptions::default() };
        let mut link = Link::new(3, options);
        if let Some(times) = slow {
            link.world.slow(0, times);
        }
        let message = Op::Send { message: b"how far" };
        link.ends[0].post(Signal::No, message).unwrap();
        link.ends[0].flush();
        while link.poll(1).is_empty() {}
        let arrived = link.world.now();
        link.world.cut();
        link.ends[0].post(Signal::No, message).unwrap();
        link.ends[0].flush();
        link.world.advance(Duration::from_secs(1));
        assert_eq!(link.poll(1), [Event::Closed(CloseReason::PeerGone)]);
        arrived.0
    };
    assert_eq!((arrival(None), arrival(Some(20))), (1000, 20_000));
}

#[test]
fn nothing_is_on_the_wire_before_flush_and_time_stands_still_by_itself() {
    let options = SimOptions { eager_permille: 0, ..SimOptions::default() };
    let mut link = Link::new(1, options);
    link.ends[0].post(Signal::No, Op::Send { message: b"wait" }).unwrap();
    link.world.advance(Duration::from_secs(1));
    assert_eq!((link.poll(1), link.world.next_at()), (Vec::new(), None));
    link.ends[0].flush();
    assert!(link.world.next_at().is_some());
    let now = link.world.now();
    assert_eq!(link.world.now(), now);
}

#[test]
fn all_the_disorder_that_the_contract_allows_is_seen() {
    let (mut halves, mut swaps, mut torn) = (0, 0, 0);
    for seed in 0..60 {
        let mut link = Link::new(seed, SimOptions::drawn(&mut Seed::new(seed)));
        link.near.0.write(0, &[1; LEN as usize]).unwrap();
        // Two writes, the first in one half and the second in the other, then a message.
        link.write(Signal::No, 0, 2048);
        link.write(Signal::No, 2048, 2048);
        link.ends[0].flush();
        let (mut half, mut swap) = (false, false);
        for _ in 0..200 {
            link.poll(1);
            link.poll(0);
            let bytes = link.far_bytes();
            let landed = |range: std::ops::Range<usize>| bytes[range].iter().filter(|byte| **byte == 1).count();
            half |= (1..2048).contains(&landed(0..2048));
            swap |= landed(0..2048) < 2048 && landed(2048..4096) > 0;
        }
        halves += u32::from(half);
        swaps += u32::from(swap);

        // The peer's CPU changes its memory while a read is under way.
        let from = link.remote.span(0, 2048, Access::READ).unwrap();
        let into = link.near.1.span(0, 2048, Access::WRITE).unwrap();
        link.ends[0].post(Signal::Yes(OpId(1)), Op::Read { from, into }).unwrap();
        link.ends[0].flush();
        let mut value = 100;
        while !link.poll(0).contains(&Event::Done(OpId(1))) {
            value += 1;
            link.far.write(0, &[value; 2048]).unwrap();
        }
        let mut read = [0; 2048];
        link.near.0.read(0, &mut read).unwrap();
        torn += u32::from(read.iter().any(|byte| *byte != read[0]));
    }
    assert!(halves > 5 && swaps > 5 && torn > 5, "{halves} halves, {swaps} swaps, {torn} torn reads");
}

#[test]
fn one_seed_is_one_history() {
    let history = |seed| {
        let mut link = Link::new(seed, SimOptions::drawn(&mut Seed::new(seed)));
        let mut log = String::new();
        for round in 0..300 {
            let posted = link.write(Signal::Yes(OpId(round)), round, 8);
            link.ends[0].flush();
            for side in [0, 1] {
                let events = link.poll(side);
                log.push_str(&format!("{posted} {:?} {events:?}\n", link.world.now()));
            }
        }
        log
    };
    assert_eq!(history(5), history(5));
    assert_ne!(history(5), history(6));
}
