//! A link's life in numbers, over a real device: many connects that leave nothing behind, much data that arrives as it was sent, idling that costs
//! nothing.
//!
//! 300 links are made, used and dropped in four ways, and the device then has as many queue pairs and this process as many descriptors as before;
//! with `FARBUS_LAB_FULL` set it is 10,000 links, and 1 GiB in place of 64 MiB.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

mod verbs_support;

use std::ffi::OsStr;
use std::os::fd::BorrowedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_transport::link::control::Framed;
use farbus_transport::sim::Seed;
use farbus_transport::verbs::VerbsFabric;
use farbus_transport::{
    Access, CloseReason, Event, Events, Fabric, Grant, LocalRegion, Memory, Nanos, Op, OpId, Regions, RemoteRegion, Signal,
};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::time::{ClockId, clock_gettime};
use verbs_support::resources::Resources;
use verbs_support::{AMPLE, Link, choice, pair};

fn full() -> bool {
    std::env::var_os("FARBUS_LAB_FULL").is_some()
}

// ---- many lives ----

/// One link, ended in one of four ways; the last has operations under way.
fn live_and_die(way: u64) {
    let mut link = Link::new();
    let (near, far) = (link.memory(0, 64 << 10), link.memory(1, 64 << 10));
    let remote = link.grant(1, &far, Access::READ_WRITE);
    link.write(0, near.span(0, 4096, Access::READ), remote.span(0, 4096, Access::WRITE).unwrap()).unwrap();
    match way % 16 {
        1..6 => {
            link.ends[0].close();
            assert_eq!(link.closed(1), CloseReason::PeerClosed);
            assert_eq!(link.closed(0), CloseReason::Local);
        }
        6..11 => {
            link.ends[1].deregister(far.region).unwrap();
            link.ends[0].deregister(near.region).unwrap();
        }
        // Dropped without a word of its owner's.
        0 => {
            let Link { ends: [left, right], .. } = link;
            drop(right);
            let mut left = left;
            let (mut events, deadline) = (Events::new(), Instant::now() + AMPLE);
            while !matches!(events.as_slice().last(), Some(Event::Closed(CloseReason::PeerClosed))) {
                events.clear();
                left.poll(Nanos::now(), &mut events);
                assert!(Instant::now() < deadline, "the end is not noticed");
            }
        }
        _ => {
            for id in 0..20 {
                let from = near.span(0, 64 << 10, Access::READ);
                let to = remote.span(0, 64 << 10, Access::WRITE).unwrap();
                link.ends[0].post(Signal::Yes(OpId(1000 + id)), Op::Write { from, to }).unwrap();
            }
            link.ends[0].flush();
        }
    }
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn many_connects_and_disconnects_leave_nothing_behind() {
    let links = if full() { 10_000 } else { 300 };
    // What the first ones make for good: the library, the device's probe, the allocator's arenas.
    (0..8).for_each(live_and_die);
    let before = Resources::now();
    // That the counts count: one link, and all but the threads are more.
    let link = Link::new();
    let during = Resources::now();
    assert!(
        during.device != before.device && during.descriptors > before.descriptors && during.pinned > before.pinned,
        "{during:?}"
    );
    drop(link);
    let started = Instant::now();
    (0..links).for_each(live_and_die);
    let each = started.elapsed() / links as u32;
    let after = Resources::now();
    println!("{links} links, {} us each; before: {before:?}; after: {after:?}", each.as_micros());
    // The allocator may keep a few areas more or less.
    let slack = before.mappings.abs_diff(after.mappings);
    assert!(slack <= 8, "{} memory areas before, {} after", before.mappings, after.mappings);
    assert_eq!(Resources { mappings: 0, ..before }, Resources { mappings: 0, ..after });
}

/// The peer of the next test, in a process of its own: writes to the memory that it is granted until it is killed.
fn write_until_killed(path: &OsStr) -> ! {
    let control = Framed::new(UnixStream::connect(path).unwrap()).unwrap();
    let mut end = VerbsFabric::establish(&choice(), Box::new(control)).unwrap();
    let own = end.register(Memory::memfd("child", 1 << 20).unwrap(), Access::READ_WRITE).unwrap();
    end.export(&own, Access::READ_WRITE).unwrap();
    let mut events = Events::new();
    let grant = loop {
        end.poll(Nanos::now(), &mut events);
        if let [Event::Message(message), ..] = events.as_slice() {
            let key = u64::from_le_bytes(message.bytes().try_into().unwrap());
            break Grant { key, len: 1 << 20, access: Access::READ_WRITE };
        }
    };
    let remote = end.import(&grant).unwrap();
    loop {
        let from = own.span(0, 1 << 20, Access::READ).unwrap();
        let _full = end.post(Signal::No, Op::Write { from, to: remote.span(0, 1 << 20, Access::WRITE).unwrap() });
        let _full = end.post(Signal::No, Op::Send { message: b"on" });
        end.flush();
        events.clear();
        end.poll(Nanos::now(), &mut events);
    }
}

struct Peer(Child);

impl Peer {
    fn start(path: &Path) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        // This same test, which then plays the peer.
        let test = "a_peer_whose_process_is_killed_is_known_to_be_gone_and_leaves_nothing_behind";
        command.args(["--ignored", "--exact", test]).env("FARBUS_TEST_SOCKET", path).stdout(Stdio::null());
        Self(command.spawn().unwrap())
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.kill();
    }
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_peer_whose_process_is_killed_is_known_to_be_gone_and_leaves_nothing_behind() {
    if let Some(path) = std::env::var_os("FARBUS_TEST_SOCKET") {
        write_until_killed(&path);
    }
    drop(pair());
    let before = Resources::now();
    for round in 0..5 {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let listener = UnixListener::bind(&path).unwrap();
        let mut child = Peer::start(&path);
        let control = Framed::new(listener.accept().unwrap().0).unwrap();
        let mut end = VerbsFabric::establish(&choice(), Box::new(control)).unwrap();
        let region = end.register_for_peer(Memory::memfd("granted", 1 << 20).unwrap(), Access::READ_WRITE).unwrap();
        let grant = end.export(&region, Access::READ_WRITE).unwrap();
        end.post(Signal::No, Op::Send { message: &grant.key.to_le_bytes() }).unwrap();
        end.flush();
        let (mut events, mut heard, mut killed) = (Events::new(), 0, None);
        let deadline = Instant::now() + AMPLE;
        let reason = loop {
            events.clear();
            end.poll(Nanos::now(), &mut events);
            heard += events.as_slice().len();
            if let Some(Event::Closed(reason)) = events.as_slice().last() {
                break *reason;
            }
            if heard > 5 && killed.is_none() {
                child.kill();
                killed = Some(Instant::now());
            }
            assert!(Instant::now() < deadline, "the end is not noticed; killed {killed:?}");
        };
        let took = killed.map(|at| at.elapsed());
        println!("round {round}: {reason}, {} ms after the process was gone", took.unwrap_or_default().as_millis());
        assert_eq!(reason, CloseReason::PeerGone);
        assert!(took.is_some_and(|took| took < Duration::from_secs(2)), "{took:?}");
        // In whatever order things go.
        if round % 2 == 0 {
            end.deregister(region).unwrap();
        }
    }
    assert_eq!(Resources { mappings: 0, ..Resources::now() }, Resources { mappings: 0, ..before });
}

// ---- much data ----

const PIECE: u32 = 1 << 20;
const BUFFERS: u64 = 8;

/// What piece `number` must hold: a block of chance, turned by a number of its own, with the number in front.
struct Pieces {
    block: Vec<u8>,
    scratch: Vec<u8>,
}

impl Pieces {
    fn new() -> Self {
        let mut block = vec![0; PIECE as usize];
        Seed::new(11).fill(&mut block);
        Self { scratch: block.clone(), block }
    }

    fn bytes(&mut self, number: u64) -> &[u8] {
        let turned = (number.wrapping_mul(7919) % u64::from(PIECE)) as usize;
        let (front, back) = self.block.split_at(turned);
        self.scratch[..back.len()].copy_from_slice(back);
        self.scratch[back.len()..].copy_from_slice(front);
        self.scratch[..8].copy_from_slice(&number.to_le_bytes());
        &self.scratch
    }
}

/// One side of a transfer: its end, its memory, and what it heard.
struct Side {
    end: VerbsFabric,
    memory: Arc<Memory>,
    region: LocalRegion,
    events: Events,
    done: u64,
    messages: u64,
    closed: bool,
}

impl Side {
    fn new(mut end: VerbsFabric) -> Self {
        let memory = Memory::memfd("pieces", BUFFERS * u64::from(PIECE)).unwrap();
        let region = end.register(Arc::clone(&memory), Access::READ_WRITE).unwrap();
        Self { end, memory, region, events: Events::new(), done: 0, messages: 0, closed: false }
    }

    fn place(number: u64) -> u64 {
        number % BUFFERS * u64::from(PIECE)
    }

    fn post(&mut self, signal: Signal, op: Op<'_>) {
        while self.end.post(signal, op).is_err() {
            self.poll();
        }
        self.end.flush();
    }

    fn poll(&mut self) {
        self.events.clear();
        self.end.poll(Nanos::now(), &mut self.events);
        for event in self.events.as_slice() {
            match event {
                Event::Done(id) => {
                    assert_eq!(id.0, self.done, "completions out of order");
                    self.done += 1;
                }
                Event::Message(message) => {
                    assert_eq!(message.bytes(), self.messages.to_le_bytes(), "messages out of order");
                    self.messages += 1;
                }
                // Behind its last word.
                Event::Closed(CloseReason::PeerClosed) => self.closed = true,
                other => panic!("{other:?}"),
            }
        }
    }

    fn until(&mut self, ready: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + AMPLE;
        while !ready(self) {
            assert!(!self.closed, "the peer left early");
            self.poll();
            assert!(Instant::now() < deadline, "nothing moves: {} done, {} messages", self.done, self.messages);
        }
    }

    fn tell(&mut self, number: u64) {
        self.post(Signal::No, Op::Send { message: &number.to_le_bytes() });
    }

    fn fill(&self, number: u64, pieces: &mut Pieces) {
        self.memory.write(Self::place(number), pieces.bytes(number)).unwrap();
    }

    #[track_caller]
    fn holds(&self, number: u64, pieces: &mut Pieces, found: &mut [u8]) {
        self.memory.read(Self::place(number), found).unwrap();
        assert!(found == pieces.bytes(number), "piece {number} is not what was sent");
    }
}

/// Moves `pieces` pieces from the second side to the first or the other way, by operations of the first; whoever receives compares.
fn moves(pieces: u64, reads: bool) -> Duration {
    let (ours, theirs) = pair();
    let (mut ours, mut theirs) = (Side::new(ours), Side::new(theirs));
    let grant = theirs.end.export(&theirs.region, Access::READ_WRITE).unwrap();
    let remote: RemoteRegion = ours.end.import(&grant).unwrap();
    let started = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let (mut contents, mut found) = (Pieces::new(), vec![0; PIECE as usize]);
            for number in 0..pieces {
                if reads {
                    // Filled when its last reader is done with it, and then announced.
                    theirs.until(|side| side.messages + BUFFERS > number);
                    theirs.fill(number, &mut contents);
                } else {
                    theirs.until(|side| side.messages > number);
                    theirs.holds(number, &mut contents, &mut found);
                }
                theirs.tell(number);
            }
            if reads {
                theirs.until(|side| side.messages == pieces);
            }
            // Its last word must have been heard before its end goes.
            theirs.end.close();
        });
        let (mut contents, mut found) = (Pieces::new(), vec![0; PIECE as usize]);
        let near = ours.region;
        let mut posted = 0;
        for number in 0..pieces {
            if reads {
                // As many as are announced are read at once.
                while posted < pieces && posted < number + BUFFERS && (posted == number || ours.messages > posted) {
                    ours.until(|side| side.messages > posted);
                    let from = remote.span(Side::place(posted), PIECE, Access::READ).unwrap();
                    let into = near.span(Side::place(posted), PIECE, Access::WRITE).unwrap();
                    ours.post(Signal::Yes(OpId(posted)), Op::Read { from, into });
                    posted += 1;
                }
                ours.until(|side| side.done > number);
                ours.holds(number, &mut contents, &mut found);
            } else {
                // The peer's buffer is free when it has told of the piece before, and so is ours.
                ours.until(|side| side.messages + BUFFERS > number);
                ours.fill(number, &mut contents);
                let from = near.span(Side::place(number), PIECE, Access::READ).unwrap();
                let to = remote.span(Side::place(number), PIECE, Access::WRITE).unwrap();
                ours.post(Signal::No, Op::Write { from, to });
            }
            ours.tell(number);
        }
        if !reads {
            ours.until(|side| side.messages == pieces);
        }
    });
    started.elapsed()
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn much_data_arrives_as_it_was_sent_in_both_directions() {
    let pieces = if full() { 1024 } else { 64 };
    for reads in [false, true] {
        let took = moves(pieces, reads);
        let rate = pieces as f64 / took.as_secs_f64();
        println!(
            "{pieces} MiB {} and compared in {} ms: {rate:.1} MiB/s",
            if reads { "read" } else { "written" },
            took.as_millis()
        );
    }
}

// ---- idling ----

/// Sleeps on a side's descriptor whenever it may, until `until`; how often it was woken, and what it heard.
fn sleeps(end: &mut VerbsFabric, until: Instant) -> (u32, Vec<Event>) {
    let (mut woken, mut heard, mut events) = (0, Vec::new(), Events::new());
    loop {
        events.clear();
        end.poll(Nanos::now(), &mut events);
        heard.extend_from_slice(events.as_slice());
        if !end.arm() {
            continue;
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || !heard.is_empty() {
            return (woken, heard);
        }
        woken += u32::from(readable(end.wake_fd().unwrap(), left));
    }
}

fn readable(fd: BorrowedFd<'_>, within: Duration) -> bool {
    let timeout = Timespec { tv_sec: within.as_secs() as i64, tv_nsec: i64::from(within.subsec_nanos()) };
    rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap() > 0
}

fn cpu() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn an_idle_link_wakes_a_sleeper_three_times_a_second_at_most_and_a_message_wakes_it() {
    const SECONDS: u32 = 5;
    let (mut left, mut right) = pair();
    let until = Instant::now() + Duration::from_secs(u64::from(SECONDS));
    let idle = |end: &mut VerbsFabric| {
        let before = cpu();
        let (woken, heard) = sleeps(end, until);
        assert_eq!(heard, [], "an idle link is heard of");
        (woken, cpu() - before)
    };
    let (of_left, of_right) = std::thread::scope(|scope| {
        let other = scope.spawn(|| idle(&mut right));
        (idle(&mut left), other.join().unwrap())
    });
    println!("woken and CPU time in {SECONDS} s: {of_left:?}, {of_right:?}");
    for (woken, used) in [of_left, of_right] {
        assert!(woken <= 3 * SECONDS, "woken {woken} times in {SECONDS} s");
        // An emulated machine is slow: each wake-up may take it a few milliseconds.
        assert!(used < Duration::from_millis(20) * (woken + 5), "{} ms of CPU for {woken} wake-ups", used.as_millis());
    }

    // A sleeper is woken by a message, and by nothing much later than that.
    for round in 0..10_u8 {
        let heard = std::thread::scope(|scope| {
            let sleeper = scope.spawn(|| (sleeps(&mut right, Instant::now() + AMPLE), Instant::now()));
            std::thread::sleep(Duration::from_millis(30));
            let sent = Instant::now();
            left.post(Signal::No, Op::Send { message: &[round] }).unwrap();
            left.flush();
            let ((_, heard), at) = sleeper.join().unwrap();
            assert!(at.duration_since(sent) < Duration::from_secs(1), "woken after {:?}", at.duration_since(sent));
            heard
        });
        assert!(matches!(heard[..], [Event::Message(message)] if message.bytes() == [round]), "{heard:?}");
    }
}
