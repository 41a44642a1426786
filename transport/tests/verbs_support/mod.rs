//! What the tests on an RDMA device share: the device that was promised, connected ends with what they heard, and what the machine has lent out.
//!
//! `FARBUS_RDMA_DEV=rxe0` promises rxe0: `Link::new()` then has two connected ends over it, `link.closed(1)` says why the second one ended, and a
//! device that is not there fails the test.

#![allow(dead_code, clippy::unwrap_used, reason = "each test program uses a part of it, and a panic is how a test fails")]

pub mod hosts;
pub mod middle;
pub mod resources;

use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_transport::verbs::{DeviceChoice, VerbsFabric};
use farbus_transport::{
    Access, CloseReason, Event, Events, Fabric, LocalRegion, LocalSpan, Memory, Nanos, Op, OpError, OpId, Regions, RemoteRegion,
    RemoteSpan, Signal,
};

/// Longer than an emulated machine on a busy host needs for anything here.
pub const AMPLE: Duration = Duration::from_secs(20);

/// The device that the environment names; without a name, the only one with an active port.
pub fn choice() -> DeviceChoice {
    DeviceChoice { device: std::env::var("FARBUS_RDMA_DEV").ok(), ..DeviceChoice::default() }
}

/// Two connected ends in this process.
pub fn pair() -> (VerbsFabric, VerbsFabric) {
    pair_over(&choice())
}

/// As [`pair`], with a choice of one's own.
pub fn pair_over(choice: &DeviceChoice) -> (VerbsFabric, VerbsFabric) {
    // Asked for by name, so its absence is a failure.
    VerbsFabric::pair(choice).unwrap_or_else(|error| panic!("no link over {choice:?}: {error}"))
}

/// Registered memory of one side.
pub struct Piece {
    pub memory: Arc<Memory>,
    pub region: LocalRegion,
}

impl Piece {
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.memory.len() as usize];
        self.memory.read(0, &mut bytes).unwrap();
        bytes
    }

    pub fn span(&self, offset: u64, len: u32, access: Access) -> LocalSpan {
        self.region.span(offset, len, access).unwrap()
    }
}

/// Two ends that are polled in turn, and what each has heard.
pub struct Link {
    pub ends: [VerbsFabric; 2],
    pub heard: [Vec<Event>; 2],
    events: Events,
    last_id: u64,
}

impl Link {
    pub fn new() -> Self {
        Self::of(pair())
    }

    pub fn of((left, right): (VerbsFabric, VerbsFabric)) -> Self {
        Self { ends: [left, right], heard: Default::default(), events: Events::new(), last_id: 0 }
    }

    /// Memory of `side` with bytes that differ from page to page and from side to side.
    pub fn memory(&mut self, side: usize, len: u64) -> Piece {
        let memory = Memory::memfd("test", len).unwrap();
        for at in (0..len).step_by(64) {
            memory.write(at, &(at << 1 | side as u64 | 1 << 40).to_le_bytes()).unwrap();
        }
        let region = self.ends[side].register(Arc::clone(&memory), Access::READ_WRITE).unwrap();
        Piece { memory, region }
    }

    /// Lets the other side of `side` use its memory.
    pub fn grant(&mut self, side: usize, piece: &Piece, access: Access) -> RemoteRegion {
        let grant = self.ends[side].export(&piece.region, access).unwrap();
        self.ends[1 - side].import(&grant).unwrap()
    }

    pub fn poll(&mut self, side: usize) {
        self.events.clear();
        self.ends[side].poll(Nanos::now(), &mut self.events);
        self.heard[side].extend_from_slice(self.events.as_slice());
    }

    /// Polls both until `side` has heard what `choose` takes, and takes it out.
    #[track_caller]
    pub fn wait<T>(&mut self, side: usize, what: &str, choose: impl Fn(&Event) -> Option<T>) -> T {
        let deadline = Instant::now() + AMPLE;
        loop {
            let found = self.heard[side].iter().enumerate().find_map(|(at, event)| Some((at, choose(event)?)));
            if let Some((at, found)) = found {
                self.heard[side].remove(at);
                return found;
            }
            assert!(Instant::now() < deadline, "no {what}; heard: {:?}", self.heard);
            self.poll(1 - side);
            self.poll(side);
        }
    }

    /// Why `side` ended.
    #[track_caller]
    pub fn closed(&mut self, side: usize) -> CloseReason {
        self.wait(side, "end of the link", |event| if let Event::Closed(reason) = event { Some(*reason) } else { None })
    }

    /// Posts one operation of `side` and waits for its outcome.
    #[track_caller]
    pub fn perform(&mut self, side: usize, op: Op<'_>) -> Result<(), OpError> {
        self.last_id += 1;
        let id = OpId(self.last_id);
        while self.ends[side].post(Signal::Yes(id), op).is_err() {
            self.poll(side);
        }
        self.ends[side].flush();
        self.wait(side, "outcome of an operation", |event| match event {
            Event::Done(done) if *done == id => Some(Ok(())),
            Event::Failed(Some(failed), error) if *failed == id => Some(Err(*error)),
            _ => None,
        })
    }

    pub fn write(&mut self, side: usize, from: LocalSpan, to: RemoteSpan) -> Result<(), OpError> {
        self.perform(side, Op::Write { from, to })
    }

    /// A message crosses in both directions, and nothing else was heard.
    #[track_caller]
    pub fn works(&mut self) {
        for side in [0, 1] {
            self.perform(side, Op::Send { message: b"still here" }).unwrap();
            let got = self.wait(1 - side, "message", |event| if let Event::Message(got) = event { Some(*got) } else { None });
            assert_eq!(got.bytes(), b"still here");
        }
        assert_eq!(self.heard, [vec![], vec![]], "unexpected events");
    }
}
