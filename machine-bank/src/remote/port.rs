//! One end of a link between banks: messages out and in, one-sided reads into lanes, and sleeping until there is something.
//!
//! A part of 700 KiB in lane 5 of the peer's memory is `port.read(5, …)`, one read or several where the fabric's are shorter, and later
//! `Heard::Landed(5)`; the bytes are then in this side's own memory, which no peer sees.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use farbus_transport::{
    Access, CloseReason, Event, Events, Fabric, Grant, LocalRegion, Memory, Message, Nanos, Op, OpError, OpId, PostError,
    RemoteRegion, Signal,
};
use rustix::event::{PollFd, PollFlags, Timespec};

use super::service::WireCounts;
use super::wire::LANES;

/// How long a full queue is left alone before it is tried again.
const FULL_PAUSE: Duration = Duration::from_micros(100);

/// What a port reports.
#[derive(Debug)]
pub(super) enum Heard {
    /// A message.
    Message(Message),
    /// What was read into a lane is there.
    Landed(usize),
    /// The link has ended.
    Closed(String),
}

enum Out {
    Send(Vec<u8>),
    Read { lane: usize, from: u64, to: u64, len: u32 },
}

/// One end.
pub(super) struct Port<F> {
    fabric: F,
    out: VecDeque<Out>,
    events: Events,
    landing: LocalRegion,
    /// Where reads land; nobody else sees it.
    landed: Arc<Memory>,
    lane: usize,
    remote: Option<(RemoteRegion, usize)>,
    /// Reads of a lane that are under way.
    pieces: [u32; LANES],
    closed: bool,
    pub counts: WireCounts,
}

impl<F: Fabric> Port<F> {
    /// With lanes of `lane` bytes for what is read from the peer.
    pub fn new(mut fabric: F, lane: usize) -> Result<Self, String> {
        let landed = Memory::memfd("farbus-bank-landing", (LANES * lane) as u64).map_err(|error| error.to_string())?;
        let landing = fabric.register(landed.clone(), Access::READ_WRITE).map_err(|error| error.to_string())?;
        Ok(Self {
            fabric,
            out: VecDeque::new(),
            events: Events::new(),
            landing,
            landed,
            lane,
            remote: None,
            pieces: [0; LANES],
            closed: false,
            counts: WireCounts::default(),
        })
    }

    /// Memory of `LANES` lanes that the peer may read: what to tell it, and the memory.
    pub fn grant(&mut self, name: &str, lane: usize) -> Result<((u64, u64), Arc<Memory>), String> {
        let memory = Memory::memfd(name, (LANES * lane) as u64).map_err(|error| error.to_string())?;
        let region = self.fabric.register_for_peer(memory.clone(), Access::READ).map_err(|error| error.to_string())?;
        let grant = self.fabric.export(&region, Access::READ).map_err(|error| error.to_string())?;
        Ok(((grant.key, grant.len), memory))
    }

    /// Takes the peer's memory, which has lanes of `lane` bytes.
    pub fn import(&mut self, (key, len): (u64, u64), lane: usize) -> Result<(), String> {
        if len != (LANES * lane) as u64 || self.remote.is_some() {
            return Err(format!("the peer offers {len} bytes of memory"));
        }
        let region = self.fabric.import(&Grant { key, len, access: Access::READ }).map_err(|error| error.to_string())?;
        self.remote = Some((region, lane));
        Ok(())
    }

    /// What was read.
    pub fn landed(&self) -> &Arc<Memory> {
        &self.landed
    }

    /// Sends a message, as soon as there is room.
    pub fn send(&mut self, message: Vec<u8>) {
        self.counts.messages_sent += 1;
        self.counts.message_bytes += message.len() as u64;
        self.out.push_back(Out::Send(message));
    }

    /// Reads `len` bytes of a lane of the peer's into the same lane here.
    pub fn read(&mut self, lane: usize, len: u32) -> Result<(), String> {
        let theirs = self.remote.as_ref().map_or(0, |(_, lane)| *lane);
        if lane >= LANES || len as usize > theirs.min(self.lane) || self.pieces[lane] != 0 {
            return Err(format!("{len} bytes in lane {lane} cannot be read"));
        }
        let (from, to) = ((lane * theirs) as u64, (lane * self.lane) as u64);
        let most = self.fabric.limits().max_op_len.max(1);
        let mut at = 0;
        while at < len {
            let piece = most.min(len - at);
            self.out.push_back(Out::Read { lane, from: from + u64::from(at), to: to + u64::from(at), len: piece });
            self.pieces[lane] += 1;
            self.counts.reads += 1;
            at += piece;
        }
        self.counts.read_bytes += u64::from(len);
        Ok(())
    }

    /// Posts what there is room for. False where the peer takes nothing just now.
    pub fn pump(&mut self) -> bool {
        while let Some(out) = self.out.front() {
            let posted = match out {
                Out::Send(message) => self.fabric.post(Signal::No, Op::Send { message }),
                Out::Read { lane, from, to, len } => {
                    let spans = self.remote.as_ref().and_then(|(region, _)| {
                        Some((region.span(*from, *len, Access::READ).ok()?, self.landing.span(*to, *len, Access::WRITE).ok()?))
                    });
                    // `read` has checked both against the same lengths.
                    let Some((from, into)) = spans else { break };
                    self.fabric.post(Signal::Yes(OpId(*lane as u64)), Op::Read { from, into })
                }
            };
            if posted == Err(PostError::Full) {
                break;
            }
            self.out.pop_front();
        }
        self.fabric.flush();
        self.out.is_empty()
    }

    /// Adds what has happened to `heard`.
    pub fn poll(&mut self, now: Nanos, heard: &mut VecDeque<Heard>) {
        self.events.clear();
        self.fabric.poll(now, &mut self.events);
        for event in self.events.as_slice() {
            match event {
                Event::Message(message) => {
                    self.counts.messages_received += 1;
                    self.counts.message_bytes += message.bytes().len() as u64;
                    heard.push_back(Heard::Message(*message));
                }
                Event::Done(OpId(lane)) => {
                    let lane = *lane as usize;
                    if let Some(left) = self.pieces.get_mut(lane) {
                        *left = left.saturating_sub(1);
                        if *left == 0 {
                            heard.push_back(Heard::Landed(lane));
                        }
                    }
                }
                // Why it ended is said behind it.
                Event::Failed(_, OpError::Closed) => {}
                Event::Failed(_, error) => heard.push_back(Heard::Closed(error.to_string())),
                Event::Closed(reason) => {
                    self.closed = true;
                    heard.push_back(Heard::Closed(reason_text(*reason)));
                }
                Event::Notify(_) => {}
            }
        }
    }

    /// Sleeps until the fabric or one of `fds` has something, or `limit` has passed.
    pub fn sleep(&mut self, others: &[BorrowedFd<'_>], limit: Duration) {
        if !self.fabric.arm() {
            return;
        }
        // That there is room again wakes nobody.
        let limit = if self.out.is_empty() { limit } else { limit.min(FULL_PAUSE) };
        let Some(wake) = self.fabric.wake_fd() else {
            // A simulated link: time passes by polling.
            std::thread::yield_now();
            return;
        };
        let mut fds: Vec<_> = others.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        fds.push(PollFd::from_borrowed_fd(wake, PollFlags::IN));
        let limit = Timespec { tv_sec: limit.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: limit.subsec_nanos().into() };
        if let Err(errno) = rustix::event::poll(&mut fds, Some(&limit))
            && errno != rustix::io::Errno::INTR
        {
            tracing::warn!(%errno, "a sleep failed");
        }
    }

    /// Says goodbye, and waits a bounded time until the peer cannot reach what it was granted.
    pub fn close(&mut self, clock: &mut dyn FnMut() -> Nanos) {
        self.fabric.close();
        self.fabric.flush();
        for _ in 0..1000 {
            if self.closed {
                return;
            }
            let mut heard = VecDeque::new();
            self.poll(clock(), &mut heard);
            if !self.closed {
                self.sleep(&[], Duration::from_millis(2));
            }
        }
    }
}

fn reason_text(reason: CloseReason) -> String {
    match reason {
        CloseReason::PeerClosed => "the other side closed the link".to_owned(),
        CloseReason::PeerGone => "the other side is gone".to_owned(),
        other => other.to_string(),
    }
}
