//! The thread that owns a client's end of the link: it sends what other threads ask for, fetches the parts of answers, and says when they are here.
//!
//! Two threads that withdraw have a leaf each under way: their requests go out at once, and while one of them decompresses a part the next one is being read.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use farbus_transport::{Fabric, Nanos};

use super::port::{Heard, Port};
use super::service::WireCounts;
use super::wire::{Answer, Carried, LANES, Request, Status, ToClient, ToServer};

/// How long a server may say nothing while something is asked of it.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// How often a client that asks for nothing says that it is there, and at least how often one says that it needs what it holds.
const PING: Duration = Duration::from_secs(20);

/// A part of an answer.
#[derive(Debug)]
pub(super) struct Reply {
    pub status: Status,
    pub last: bool,
    pub bytes: Bytes,
}

/// Where its bytes are.
#[derive(Debug)]
pub(super) enum Bytes {
    Here(Vec<u8>),
    Landed { lane: usize, len: usize },
}

/// What the thread is told.
pub(super) struct Asked {
    pub request: Request,
    /// Ends with the link: the error is then in [`State::over`].
    pub reply: Sender<Reply>,
}

/// What the thread and those who ask share.
#[derive(Debug)]
pub(super) struct State {
    free: Mutex<Vec<u8>>,
    freed: Condvar,
    /// Why there is no link any more.
    over: Mutex<Option<String>>,
    counts: Mutex<WireCounts>,
    /// Holds and pins at the server.
    pub held: AtomicUsize,
    pub wake: OwnedFd,
}

impl State {
    pub fn new(wake: OwnedFd) -> Self {
        let free = Mutex::new((0..LANES as u8).collect());
        Self { free, freed: Condvar::new(), over: Mutex::new(None), counts: Mutex::default(), held: AtomicUsize::new(0), wake }
    }

    /// Takes 1 to `most` lanes; nothing where the link is over.
    pub fn take(&self, most: usize) -> Option<Vec<u8>> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if self.over().is_some() {
                return None;
            }
            if !free.is_empty() {
                let rest = free.len().saturating_sub(most.max(1));
                return Some(free.split_off(rest));
            }
            free = self.freed.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Gives a lane back.
    pub fn give(&self, lane: u8) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(lane);
        self.freed.notify_one();
    }

    pub fn over(&self) -> Option<String> {
        self.over.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn end(&self, why: String) {
        self.over.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
        // Whoever looks for a lane has looked whether it is over, or hears this.
        drop(self.free.lock().unwrap_or_else(PoisonError::into_inner));
        self.freed.notify_all();
    }

    pub fn counts(&self) -> WireCounts {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the thread.
    pub fn rouse(&self) {
        if let Err(errno) = rustix::io::write(&self.wake, &1_u64.to_ne_bytes()) {
            tracing::debug!(%errno, "a wake-up was there already");
        }
    }
}

struct Flight {
    reply: Sender<Reply>,
    /// Lanes of the slab that the answer may still use, its own among them.
    lent: u8,
    /// Parts that are being read.
    reading: u32,
    /// Whether the last part was announced.
    complete: bool,
}

/// A part whose bytes are being read.
struct Landing {
    of: usize,
    status: Status,
    len: usize,
}

/// The thread.
pub(super) struct Courier<F> {
    pub port: Port<F>,
    pub state: Arc<State>,
    pub asked: Receiver<Asked>,
    pub clock: Box<dyn FnMut() -> Nanos + Send>,
    /// How long the server may say nothing.
    pub limit: Duration,
}

impl<F: Fabric> Courier<F> {
    /// Until the link ends, or nobody can ask any more.
    pub fn run(mut self) {
        // Who waits hears the end of what it waits for, and then finds why.
        let mut flights = Default::default();
        let why = self.serve(&mut flights);
        let Self { mut port, state, asked, mut clock, .. } = self;
        state.end(why);
        // Those who asked meanwhile hear it too.
        drop((asked, flights));
        port.close(&mut clock);
    }

    fn serve(&mut self, flights: &mut [Option<Flight>; LANES]) -> String {
        let mut landings: [Option<Landing>; LANES] = Default::default();
        let mut heard = VecDeque::new();
        let (mut last_heard, mut last_said, mut last_kept) = (Instant::now(), Instant::now(), Instant::now());
        let keep_every = (self.limit / 3).min(PING);
        loop {
            let mut idle = true;
            loop {
                match self.asked.try_recv() {
                    Ok(Asked { request, reply }) => {
                        idle = false;
                        if flights.iter().all(Option::is_none) {
                            last_heard = Instant::now();
                        }
                        last_said = Instant::now();
                        if let Some(flight) = flights.get_mut(usize::from(request.lane)) {
                            *flight = Some(Flight { reply, lent: request.lent, reading: 0, complete: false });
                        }
                        if let Carried::Lane(len) = request.body {
                            self.port.counts.offered_bytes += u64::from(len);
                        }
                        self.port.send(ToServer::Request(request).encode());
                    }
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return "closed here".to_owned(),
                }
            }
            self.port.pump();
            self.port.poll((self.clock)(), &mut heard);
            while let Some(heard) = heard.pop_front() {
                (idle, last_heard) = (false, Instant::now());
                let done = match heard {
                    Heard::Closed(why) => return why,
                    Heard::Landed(lane) => {
                        self.landed(lane, flights, &mut landings);
                        Ok(())
                    }
                    Heard::Message(message) => match ToClient::parse(message.bytes()) {
                        Ok(ToClient::Answer(answer)) => self.answer(answer, flights, &mut landings),
                        Ok(ToClient::Wait) => Ok(()),
                        Ok(ToClient::Welcome { .. }) => Err("it says welcome twice".to_owned()),
                        Err(error) => Err(error.to_string()),
                    },
                };
                if let Err(error) = done {
                    return format!("the bank there breaks the protocol: {error}");
                }
            }
            *self.state.counts.lock().unwrap_or_else(PoisonError::into_inner) = self.port.counts;
            let flying = flights.iter().any(Option::is_some);
            if flying && last_heard.elapsed() > self.limit {
                return format!("the bank there has not answered for {:?}", self.limit);
            }
            if last_kept.elapsed() >= keep_every {
                (last_kept, idle) = (Instant::now(), false);
                if self.state.held.load(Ordering::Acquire) > 0 {
                    last_said = Instant::now();
                    self.port.send(ToServer::Keep.encode());
                }
            }
            if last_said.elapsed() > PING {
                last_said = Instant::now();
                self.port.send(ToServer::Ping.encode());
                idle = false;
            }
            if idle {
                let state = self.state.clone();
                self.port.sleep(&[state.wake.as_fd()], keep_every.min(Duration::from_secs(1)));
                let mut count = [0; 8];
                if let Err(errno) = rustix::io::read(&state.wake, &mut count) {
                    tracing::trace!(%errno, "woken by something else");
                }
            }
        }
    }

    fn answer(
        &mut self,
        answer: Answer,
        flights: &mut [Option<Flight>; LANES],
        landings: &mut [Option<Landing>; LANES],
    ) -> Result<(), String> {
        let Answer { status, lane, last, part: (part, part_lane) } = answer;
        let of = usize::from(lane);
        let flight = flights.get_mut(of).and_then(Option::as_mut).filter(|flight| !flight.complete);
        let flight = flight.ok_or("it answers what was not asked")?;
        flight.complete = last;
        match part {
            Carried::Inline(bytes) => tell(&self.state, flights, of, status, Bytes::Here(bytes)),
            Carried::Lane(len) => {
                let bit = 1_u8.checked_shl(part_lane.into()).unwrap_or(0);
                if flight.lent & bit == 0 {
                    return Err("it answers in a lane that it was not lent".to_owned());
                }
                flight.lent &= !bit;
                flight.reading += 1;
                let at = usize::from(part_lane);
                self.port.read(at, len)?;
                if let Some(landing) = landings.get_mut(at) {
                    *landing = Some(Landing { of, status, len: len as usize });
                }
            }
        }
        Ok(())
    }

    fn landed(&self, lane: usize, flights: &mut [Option<Flight>; LANES], landings: &mut [Option<Landing>; LANES]) {
        let Some(Landing { of, status, len }) = landings.get_mut(lane).and_then(Option::take) else { return };
        if let Some(flight) = flights.get_mut(of).and_then(Option::as_mut) {
            flight.reading = flight.reading.saturating_sub(1);
        }
        tell(&self.state, flights, of, status, Bytes::Landed { lane, len });
    }
}

/// Hands a part to who asked. The last is the one with which nothing is announced or read any more.
fn tell(state: &State, flights: &mut [Option<Flight>; LANES], of: usize, status: Status, bytes: Bytes) {
    let Some(slot) = flights.get_mut(of) else { return };
    let Some(flight) = slot else { return };
    let last = flight.complete && flight.reading == 0;
    // Who asked may have given up, and then waits for nothing.
    if flight.reply.send(Reply { status, last, bytes }).is_err() {
        tracing::debug!("an answer came that nobody waits for");
    }
    if last {
        // What no part has landed in is free; the others are given back by who copies from them.
        let unused = flight.lent;
        *slot = None;
        (0..LANES as u8).filter(|lane| unused >> lane & 1 == 1).for_each(|lane| state.give(lane));
    }
}
