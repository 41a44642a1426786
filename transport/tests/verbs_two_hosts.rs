//! A link between two hosts that is slow, loses packets, is cut and mended: what a user sees of it, at both sides.
//!
//! `ci/softroce --two-hosts` runs this same program on hosts a and b, test by test. A cut of 0.3 s is survived without an error and without a wrong
//! byte; a longer one ends the link as "the peer is gone" within 3 s at both sides, idle or busy, asleep or not, and every operation is answered; a
//! side whose own port goes down is told by its device.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

mod verbs_support;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_transport::verbs::VerbsFabric;
use farbus_transport::{
    Access, CloseReason, Event, Events, Fabric, Grant, LocalRegion, Memory, Nanos, Op, OpError, OpId, Regions, RemoteRegion, Signal,
};
use rustix::event::{PollFd, PollFlags, Timespec};
use verbs_support::AMPLE;
use verbs_support::hosts::{Lateness, Mended, black_hole, is_a, lab_link, meet, packets_lost, prepare_cut, pull_cable, run};

/// Within which a side knows that its peer is gone.
const GONE: Duration = Duration::from_secs(3);

/// What host a needs at most, on a busy machine, to run one program that cuts the link.
const CUTTING: Duration = Duration::from_millis(500);

/// How long a short cut lasts at least.
const SHORT: Duration = Duration::from_millis(200);

/// A cut that must not end a link.
const SURVIVED: Duration = Duration::from_millis(700);

const PAGE: u32 = 4096;
/// Pages that each turn writes.
const PAGES: u64 = 8;
/// Where a side keeps what the other reads.
const SHELF: u64 = PAGES * PAGE as u64;

/// This host's side of a link, its memory, and the peer's.
struct Side {
    end: VerbsFabric,
    near: (Arc<Memory>, LocalRegion),
    far: Arc<Memory>,
    /// Known from the peer's first message.
    remote: Option<RemoteRegion>,
    events: Events,
    heard: Vec<Event>,
    last_id: u64,
    a: bool,
}

impl Side {
    fn meet(number: u16) -> Self {
        let mut end = meet(number);
        let memory = |name| Memory::memfd(name, 2 * SHELF).unwrap();
        let (near, far) = (memory("near"), memory("far"));
        far.write(SHELF, &pattern(is_a(), u64::MAX, PAGE)).unwrap();
        let near = (Arc::clone(&near), end.register(near, Access::READ_WRITE).unwrap());
        let region = end.register_for_peer(Arc::clone(&far), Access::READ_WRITE).unwrap();
        let grant = end.export(&region, Access::READ_WRITE).unwrap();
        let mut side = Self { end, near, far, remote: None, events: Events::new(), heard: Vec::new(), last_id: 0, a: is_a() };
        side.say(grant.key).unwrap();
        let key = side.hear().unwrap();
        side.remote = Some(side.end.import(&Grant { key, ..grant }).unwrap());
        side
    }

    fn remote(&self) -> RemoteRegion {
        self.remote.unwrap()
    }

    fn poll(&mut self) {
        self.events.clear();
        self.end.poll(Nanos::now(), &mut self.events);
        self.heard.extend_from_slice(self.events.as_slice());
    }

    /// Polls until something is heard that `choose` takes; the end of the link is an error.
    fn wait<T>(&mut self, what: &str, choose: impl Fn(&Event) -> Option<T>) -> Result<T, CloseReason> {
        let deadline = Instant::now() + AMPLE;
        loop {
            if let Some((at, found)) = self.heard.iter().enumerate().find_map(|(at, event)| Some((at, choose(event)?))) {
                self.heard.remove(at);
                return Ok(found);
            }
            if let Some(Event::Closed(reason)) = self.heard.last() {
                return Err(*reason);
            }
            assert!(Instant::now() < deadline, "no {what}; heard {:?}", self.heard);
            self.poll();
        }
    }

    fn post(&mut self, signal: Signal, op: Op<'_>) -> Result<(), CloseReason> {
        let deadline = Instant::now() + AMPLE;
        while self.end.post(signal, op).is_err() {
            self.poll();
            if let Some(Event::Closed(reason)) = self.heard.last() {
                return Err(*reason);
            }
            assert!(Instant::now() < deadline, "no room; heard {:?}", self.heard);
        }
        Ok(())
    }

    fn say(&mut self, word: u64) -> Result<(), CloseReason> {
        self.post(Signal::No, Op::Send { message: &word.to_le_bytes() })?;
        self.end.flush();
        Ok(())
    }

    fn hear(&mut self) -> Result<u64, CloseReason> {
        self.wait("message", |event| match event {
            Event::Message(message) => Some(u64::from_le_bytes(message.bytes().try_into().unwrap())),
            _ => None,
        })
    }

    /// Both are here.
    fn together(&mut self) -> Result<(), CloseReason> {
        self.say(u64::MAX)?;
        assert_eq!(self.hear()?, u64::MAX);
        Ok(())
    }

    /// Eight pages and a message that tells of them, and a page of the peer's that is read and compared.
    fn turn(&mut self, round: u64) -> Result<(), CloseReason> {
        let (memory, near) = self.near.clone();
        memory.write(0, &pattern(self.a, round, SHELF as u32)).unwrap();
        for page in 0..PAGES {
            let at = page * u64::from(PAGE);
            let (from, to) = (near.span(at, PAGE, Access::READ).unwrap(), self.remote().span(at, PAGE, Access::WRITE).unwrap());
            self.post(Signal::No, Op::Write { from, to })?;
        }
        self.last_id += 1;
        let id = OpId(self.last_id);
        let (from, into) = (self.remote().span(SHELF, PAGE, Access::READ).unwrap(), near.span(SHELF, PAGE, Access::WRITE).unwrap());
        self.post(Signal::Yes(id), Op::Read { from, into })?;
        self.say(round)?;
        let done = self.wait("completion of a read", |event| match event {
            Event::Done(done) if *done == id => Some(Ok(())),
            Event::Failed(_, error) => Some(Err(*error)),
            _ => None,
        })?;
        if done.is_err() {
            // Why is said by the end.
            return Err(self.wait("end", |event| if let Event::Closed(reason) = event { Some(*reason) } else { None })?);
        }
        assert!(bytes(&memory, SHELF, PAGE) == pattern(!self.a, u64::MAX, PAGE), "round {round}: wrong bytes were read");
        Ok(())
    }

    /// The peer's turn, every byte of it.
    fn other_turn(&mut self, round: u64) -> Result<(), CloseReason> {
        let heard = self.hear()?;
        assert_eq!(heard, round, "messages out of order");
        assert!(
            bytes(&self.far, 0, SHELF as u32) == pattern(!self.a, round, SHELF as u32),
            "round {round}: wrong bytes were written"
        );
        Ok(())
    }

    /// Turns of both sides, one after the other, until `until` says so at host a.
    fn play(&mut self, mut until: impl FnMut(u64) -> bool) -> Result<u64, CloseReason> {
        const LAST: u64 = u64::MAX - 1;
        for round in 0.. {
            if self.a {
                if until(round) {
                    self.say(LAST)?;
                    return self.together().map(|()| round);
                }
                self.turn(round)?;
                self.other_turn(round)?;
            } else {
                match self.hear()? {
                    LAST => return self.together().map(|()| round),
                    heard => {
                        // As in `other_turn`, whose message this was.
                        assert_eq!(heard, round, "messages out of order");
                        let expected = pattern(true, round, SHELF as u32);
                        assert!(bytes(&self.far, 0, SHELF as u32) == expected, "round {round}: wrong bytes were written");
                    }
                }
                self.turn(round)?;
            }
        }
        unreachable!("the rounds are endless")
    }

    /// Both say goodbye.
    fn leave(mut self) {
        self.end.close();
        let deadline = Instant::now() + AMPLE;
        while !matches!(self.heard.last(), Some(Event::Closed(_))) {
            self.poll();
            assert!(Instant::now() < deadline, "no end");
        }
    }
}

fn pattern(a: bool, round: u64, len: u32) -> Vec<u8> {
    let start = round.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(a);
    (0..u64::from(len / PAGE)).flat_map(|page| (start.wrapping_add(page)).to_le_bytes().repeat(PAGE as usize / 8)).collect()
}

fn bytes(memory: &Memory, at: u64, len: u32) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    memory.read(at, &mut bytes).unwrap();
    bytes
}

/// Operations of one round of both sides: eight writes, a read and a message each.
const OPERATIONS: u64 = 2 * (PAGES + 2);

#[test]
#[ignore = "needs two hosts with RDMA devices; ci/softroce --two-hosts runs it"]
fn a_slow_link_carries_everything() {
    let _mended = Mended;
    lab_link("delay 1ms");
    let mut side = Side::meet(1);
    let started = Instant::now();
    let rounds = side.play(|round| round == 30).unwrap();
    println!("{} operations in {} ms over a link with 1 ms each way", rounds * OPERATIONS, started.elapsed().as_millis());
    // A message there and one back cannot be faster than the link.
    assert!(started.elapsed() >= Duration::from_millis(2) * rounds as u32, "the link is not slow");
    side.leave();
}

#[test]
#[ignore = "needs two hosts with RDMA devices; ci/softroce --two-hosts runs it"]
fn a_link_that_loses_packets_corrupts_nothing() {
    let _mended = Mended;
    lab_link("loss 0.1%");
    let mut side = Side::meet(2);
    let started = Instant::now();
    let rounds = side.play(|round| round == 400).unwrap();
    println!("{} operations verified in {} ms with 0.1 % loss", rounds * OPERATIONS, started.elapsed().as_millis());
    side.leave();
}

#[test]
#[ignore = "needs two hosts with RDMA devices; ci/softroce --two-hosts runs it"]
fn a_link_that_loses_much_corrupts_nothing() {
    let _mended = Mended;
    lab_link("loss 2%");
    let mut side = Side::meet(3);
    let started = Instant::now();
    let rounds = side.play(|round| round == 25).unwrap();
    let lost = packets_lost();
    println!(
        "{} operations verified in {} ms, {lost} packets of this side lost",
        rounds * OPERATIONS,
        started.elapsed().as_millis()
    );
    assert!(lost > 0, "the link lost nothing");
    side.leave();
}

#[test]
#[ignore = "needs two hosts with RDMA devices; ci/softroce --two-hosts runs it"]
fn a_short_cut_is_survived_without_an_error() {
    /// A machine that is too slow for a cut this short tries again.
    const TRIES: u16 = 10;
    let _mended = Mended;
    for attempt in 0..TRIES {
        let mut side = Side::meet(20 + attempt);
        let mut cut = None;
        let (mut longest, mut last) = (Duration::ZERO, Instant::now());
        let outcome = side.play(|round| {
            longest = longest.max(last.elapsed());
            last = Instant::now();
            if round == 20 {
                cut = Some(std::thread::spawn(|| {
                    let started = Instant::now();
                    run("tc qdisc replace dev eth0 root netem loss 100%");
                    std::thread::sleep(SHORT);
                    run("tc qdisc del dev eth0 root");
                    started.elapsed()
                }));
            }
            // At least 20 more, all of which are after the cut.
            round >= 40 && cut.as_ref().is_none_or(|cut| cut.is_finished())
        });
        let lasted = cut.map(|cut| cut.join().unwrap());
        match (outcome, lasted) {
            (Ok(rounds), lasted) => {
                println!("{rounds} rounds, with a cut of {lasted:?}; the longest took {} ms", longest.as_millis());
                assert!(lasted.is_none() || longest >= SHORT, "the link was not cut");
                return side.leave();
            }
            (Err(reason), Some(lasted)) if lasted < SURVIVED => panic!("a cut of {} ms: {reason}", lasted.as_millis()),
            // Longer than was wanted, which the other side does not know.
            (Err(reason), _) => println!("a cut of {lasted:?}: {reason}"),
        }
    }
    panic!("no cut was short enough to be survived");
}

/// What a side does while the link is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Busy {
    /// Signalled writes, as many as fit.
    Writing,
    Polling,
    Asleep,
}

fn readable(fd: BorrowedFd<'_>, within: Duration) {
    let timeout = Timespec { tv_sec: within.as_secs() as i64, tv_nsec: i64::from(within.subsec_nanos()) };
    rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap();
}

/// What was seen of the end: when the last operation was done, when the link ended and why. All that was posted was answered, in order.
fn until_the_end(side: &mut Side, busy: Busy) -> (Instant, Instant, CloseReason) {
    let (mut posted, mut answered, mut failed) = (0_u64, 0_u64, 0_u64);
    let (started, mut last_done) = (Instant::now(), Instant::now());
    loop {
        if busy == Busy::Writing && posted - answered < 32 {
            let from = side.near.1.span(0, PAGE, Access::READ).unwrap();
            let to = side.remote().span(0, PAGE, Access::WRITE).unwrap();
            posted += u64::from(side.end.post(Signal::Yes(OpId(posted)), Op::Write { from, to }).is_ok());
            side.end.flush();
        }
        side.poll();
        for event in std::mem::take(&mut side.heard) {
            match event {
                Event::Done(id) => {
                    assert_eq!((id.0, failed), (answered, 0), "answered out of order");
                    answered += 1;
                    last_done = Instant::now();
                }
                Event::Failed(Some(id), OpError::Closed) => {
                    assert_eq!(id.0, answered, "answered out of order");
                    answered += 1;
                    failed += 1;
                }
                Event::Closed(reason) => {
                    let ended = Instant::now();
                    assert_eq!(answered, posted, "operations without an answer");
                    assert_eq!(failed > 0, busy == Busy::Writing, "{failed} of {posted} failed");
                    assert!(side.end.post(Signal::No, Op::Send { message: b"on" }).is_err());
                    return (last_done, ended, reason);
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(started.elapsed() < AMPLE, "no end: {posted} posted, {answered} answered");
        if busy == Busy::Asleep && side.end.arm() {
            readable(side.end.wake_fd().unwrap(), AMPLE);
        }
    }
}

/// Host a cuts the link; both must know soon that the peer is gone, and a new link works when it is mended.
fn a_cut_ends_the_link(number: u16, pulled: bool, busy: Busy) {
    let how = if pulled { pull_cable } else { black_hole };
    let lateness = Lateness::watch();
    let mut side = Side::meet(number);
    let mended = is_a().then_some(Mended);
    if is_a() {
        prepare_cut();
    }
    side.play(|round| round == 3).unwrap();
    side.heard.clear();
    let go = Instant::now();
    let cut = is_a().then(|| {
        std::thread::spawn(move || {
            let started = Instant::now();
            how();
            (started, Instant::now())
        })
    });
    let (last_done, ended, reason) = until_the_end(&mut side, busy);
    let cut = cut.map(|cut| cut.join().unwrap());
    drop(mended);
    // The first moment at which the link may have been cut, as far as this side can know.
    let since = match cut {
        _ if busy == Busy::Writing => last_done,
        Some((started, _)) => started,
        None => go,
    };
    if let Some((started, done)) = cut {
        println!("the cut took {} ms to take effect", (done - started).as_millis());
    }
    // From the first moment at which it may have been cut, so the time that this takes at host a counts as well.
    let slack = if busy == Busy::Writing { Duration::ZERO } else { CUTTING };
    let (took, late) = (ended.saturating_duration_since(since), lateness.worst());
    println!("{busy:?}: {reason} after {} ms; this machine was late by up to {} ms", took.as_millis(), late.as_millis());
    // Whose own port is down hears of it from its device, whose requests fail a moment before or after it says why; all others hear nothing, and
    // that is how they know.
    let fits = if is_a() && pulled { matches!(reason, CloseReason::Device(_)) } else { reason == CloseReason::PeerGone };
    assert!(fits, "{reason}");
    assert!(took <= GONE + slack + 2 * late, "noticed after {} ms", took.as_millis());
    drop(side);
    // Mended: as if nothing had been.
    let mut side = Side::meet(number + 1);
    side.play(|round| round == 3).unwrap();
    side.leave();
}

#[test]
#[ignore = "needs two hosts with RDMA devices; ci/softroce --two-hosts runs it"]
fn a_black_hole_ends_a_busy_link_at_both_sides_in_time() {
    a_cut_ends_the_link(40, false, Busy::Writing);
}

#[test]
#[ignore = "needs two hosts with RDMA devices; ci/softroce --two-hosts runs it"]
fn a_black_hole_ends_an_idle_link_at_both_sides_in_time() {
    a_cut_ends_the_link(50, false, Busy::Polling);
}

#[test]
#[ignore = "needs two hosts with RDMA devices; ci/softroce --two-hosts runs it"]
fn a_black_hole_ends_a_sleeping_link_at_both_sides_in_time() {
    a_cut_ends_the_link(60, false, Busy::Asleep);
}

#[test]
#[ignore = "needs two hosts with RDMA devices; ci/softroce --two-hosts runs it"]
fn a_pulled_cable_ends_a_busy_link_at_both_sides_in_time() {
    a_cut_ends_the_link(70, true, Busy::Writing);
}

#[test]
#[ignore = "needs two hosts with RDMA devices; ci/softroce --two-hosts runs it"]
fn a_pulled_cable_ends_a_sleeping_link_at_both_sides_in_time() {
    a_cut_ends_the_link(80, true, Busy::Asleep);
}
