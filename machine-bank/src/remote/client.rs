//! The client's side of a link to a bank, for any number of threads: requests that are sent, and their answers part by part.
//!
//! `RemoteStore::connect(fabric, "rdma:nas:7001", …)` says hello; `Bank::open(Box::new(store), None)` is then a bank like any other, except that who
//! serves it decides which machines there are, and that nothing is removed from here. A `Flight` is a request under way; `part` waits for its next part.
//! With `RemoteStore::reconnecting` a link that ended is made anew (`client/again.rs`).

mod again;
mod guards;
mod store;

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use farbus_transport::{Fabric, Memory, Nanos};
use rustix::event::EventfdFlags;

use super::courier::{ANSWER_LIMIT, Asked, Bytes, Courier, Reply, State};
use super::port::{Heard, Port};
use super::wire::{BODY, Carried, INLINE, Op, PART, Request, Status, ToClient, ToServer, VERSION};
use crate::store::{Kind, StoreError};

pub use again::Reconnect;
pub(super) use again::Remote;
pub(super) use store::list;

/// How long a server may take to say hello.
const HELLO_LIMIT: Duration = Duration::from_secs(10);

/// A bank at the other end of a link.
#[derive(Debug)]
pub struct RemoteStore(Arc<Remote>);

/// A link whose server has said hello.
#[derive(Debug)]
pub struct Link(Arc<Client>);

/// One link, which ends once.
pub(super) struct Client {
    address: String,
    state: Arc<State>,
    asked: Mutex<Option<Sender<Asked>>>,
    area: Arc<Memory>,
    landed: Arc<Memory>,
    pub streams: AtomicU32,
    courier: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("address", &self.address).finish_non_exhaustive()
    }
}

/// A request under way. Dropped, it waits for its end: until then its lanes are in use.
pub(super) struct Flight {
    client: Arc<Client>,
    replies: Receiver<Reply>,
    /// The request's own lane, by which its answers are known: it is given back when nothing of it is under way.
    own: usize,
    /// Whether what landed in it was copied already.
    copied: bool,
    ended: bool,
}

impl RemoteStore {
    /// Says hello to the bank at the other end of `fabric`. `clock` is the time for the fabric. When the link ends, so does the store.
    ///
    /// # Errors
    /// The link's fault, or nobody there speaks the protocol.
    pub fn connect<F: Fabric + 'static>(
        fabric: F,
        address: impl Into<String>,
        clock: impl FnMut() -> Nanos + Send + 'static,
    ) -> Result<Self, StoreError> {
        Link::open(fabric, address, clock).map(Self::over)
    }

    /// The same with a limit for the server's silence while something is asked of it.
    ///
    /// # Errors
    /// As [`RemoteStore::connect`].
    pub fn connect_within<F: Fabric + 'static>(
        fabric: F,
        address: impl Into<String>,
        clock: impl FnMut() -> Nanos + Send + 'static,
        limit: Duration,
    ) -> Result<Self, StoreError> {
        Link::open_within(fabric, address, clock, limit).map(Self::over)
    }

    /// Over a link, for as long as it lasts.
    pub fn over(Link(client): Link) -> Self {
        Self(Arc::new(Remote::new(client, None)))
    }

    /// Over a link, and when that has ended over what `make` makes. What only asks is asked again; a deposit goes on between two objects, and what was in the middle
    /// of one is [`StoreError::Gone`]. Holds and pins are taken anew; where one cannot be, what rests on it fails, and [`Guard::check`](crate::store::Guard) says why.
    ///
    /// `make` is called by whoever needs the link, one at a time. Its [`StoreError::Refused`] is final; after any other error it is called again.
    pub fn reconnecting(
        Link(client): Link,
        times: Reconnect,
        make: impl Fn() -> Result<Link, StoreError> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(Remote::new(client, Some((times, Box::new(make))))))
    }
}

impl Link {
    /// Says hello, as [`RemoteStore::connect`].
    ///
    /// # Errors
    /// As there.
    pub fn open<F: Fabric + 'static>(
        fabric: F,
        address: impl Into<String>,
        clock: impl FnMut() -> Nanos + Send + 'static,
    ) -> Result<Self, StoreError> {
        Self::open_within(fabric, address, clock, ANSWER_LIMIT)
    }

    /// The same with a limit for the server's silence while something is asked of it.
    ///
    /// # Errors
    /// As there.
    pub fn open_within<F: Fabric + 'static>(
        fabric: F,
        address: impl Into<String>,
        mut clock: impl FnMut() -> Nanos + Send + 'static,
        limit: Duration,
    ) -> Result<Self, StoreError> {
        let address = address.into();
        let gone = |why: String| StoreError::Gone(format!("{address}: {why}"));
        let mut port = Port::new(fabric, PART).map_err(gone)?;
        let (grant, area) = port.grant("farbus-bank-requests", BODY).map_err(gone)?;
        port.send(ToServer::Hello { version: VERSION, grant }.encode());
        let grant = welcome(&mut port, &mut clock).map_err(gone)?;
        port.import(grant, PART).map_err(gone)?;
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let state = Arc::new(State::new(wake.map_err(|errno| gone(errno.to_string()))?));
        let (asked, receive) = channel();
        let landed = port.landed().clone();
        let courier = Courier { port, state: state.clone(), asked: receive, clock: Box::new(clock), limit };
        let thread = std::thread::Builder::new().name("farbus-bank-link".to_owned()).spawn(move || courier.run());
        let thread = thread.map_err(|error| gone(error.to_string()))?;
        let client = Client {
            address,
            state,
            asked: Mutex::new(Some(asked)),
            area,
            landed,
            streams: AtomicU32::new(0),
            courier: Mutex::new(Some(thread)),
        };
        Ok(Self(Arc::new(client)))
    }
}

/// Waits for the server's hello.
fn welcome<F: Fabric>(port: &mut Port<F>, clock: &mut impl FnMut() -> Nanos) -> Result<(u64, u64), String> {
    let (until, mut heard) = (Instant::now() + HELLO_LIMIT, VecDeque::new());
    loop {
        port.pump();
        port.poll(clock(), &mut heard);
        match heard.pop_front() {
            Some(Heard::Message(message)) => match ToClient::parse(message.bytes()) {
                Ok(ToClient::Welcome { version: VERSION, grant }) => return Ok(grant),
                Ok(ToClient::Welcome { version, .. }) => {
                    return Err(format!(
                        "the bank there speaks version {version} of the protocol, and this program version {VERSION}"
                    ));
                }
                Ok(_) => return Err("the bank there breaks the protocol: it does not begin with a welcome".to_owned()),
                Err(error) => return Err(format!("the bank there breaks the protocol: {error}")),
            },
            Some(Heard::Closed(why)) => return Err(why),
            Some(Heard::Landed(_)) => {}
            None if Instant::now() > until => {
                return Err(format!("the bank there has not said hello for {} s", HELLO_LIMIT.as_secs()));
            }
            None => port.sleep(&[], Duration::from_millis(100)),
        }
    }
}

impl Client {
    /// Whether the link has ended.
    pub fn is_over(&self) -> bool {
        self.state.over().is_some()
    }

    /// How many holds and pins there are, which have to be renewed.
    fn keep(&self, held: usize) {
        self.state.held.store(held, Ordering::Release);
    }

    fn gone(&self) -> StoreError {
        StoreError::Gone(format!("{}: {}", self.address, self.state.over().unwrap_or_else(|| "the link is closed".to_owned())))
    }

    pub fn wrong(&self, what: impl fmt::Display) -> StoreError {
        StoreError::Gone(format!("{}: the bank there breaks the protocol: {what}", self.address))
    }

    /// Sends a request whose body is `head` and `rest`, and which may have up to `lanes` parts under way.
    pub fn send(self: &Arc<Self>, op: u8, head: &[u8], rest: &[u8], lanes: usize) -> Result<Flight, StoreError> {
        let taken = self.state.take(lanes).ok_or_else(|| self.gone())?;
        let (lent, lane) = (taken.iter().fold(0, |mask, lane| mask | 1_u8 << lane), taken.last().copied().unwrap_or_default());
        let (reply, replies) = channel();
        let sent = self.body(lane, head, rest).and_then(|body| {
            let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
            let request = Request { op, lane, lent, body };
            let sent = asked.as_ref().is_some_and(|asked| asked.send(Asked { request, reply }).is_ok());
            if sent { Ok(()) } else { Err(self.gone()) }
        });
        if let Err(error) = sent {
            taken.iter().for_each(|lane| self.state.give(*lane));
            return Err(error);
        }
        self.state.rouse();
        Ok(Flight { client: self.clone(), replies, own: lane.into(), copied: false, ended: false })
    }

    /// Puts a body where the server finds it.
    fn body(&self, lane: u8, head: &[u8], rest: &[u8]) -> Result<Carried, StoreError> {
        let len = head.len() + rest.len();
        if len <= INLINE {
            return Ok(Carried::Inline([head, rest].concat()));
        }
        if len > BODY {
            return Err(self.wrong(format!("a request of {len} bytes")));
        }
        let at = u64::from(lane) * BODY as u64;
        let written = self.area.write(at, head).and_then(|()| self.area.write(at + head.len() as u64, rest));
        written.map_err(|error| self.wrong(error))?;
        Ok(Carried::Lane(len as u32))
    }

    /// Asks what has a short answer.
    pub fn call(self: &Arc<Self>, op: &Op) -> Result<Vec<u8>, StoreError> {
        let flight = self.send(op.code(), &op.body(), &[], 1)?;
        let mut bytes = Vec::new();
        flight.only(&mut bytes).map_err(|error| named(error, op))?;
        Ok(bytes)
    }

    fn failure(&self, status: Status, text: &[u8]) -> StoreError {
        // It is shown to people, so it must not steer their terminal.
        let text: String = String::from_utf8_lossy(text).chars().filter(|letter| !letter.is_control()).take(400).collect();
        let other = |kind| io::Error::new(kind, text.clone());
        match status {
            Status::Done => self.wrong("a failure that is none"),
            Status::Missing => StoreError::Missing { kind: Kind::Manifest, name: String::new() },
            Status::Refused => StoreError::Refused(text),
            Status::Busy | Status::Overtaken => StoreError::Busy { by: text },
            Status::Quota => StoreError::Full(other(io::ErrorKind::QuotaExceeded)),
            Status::Full => StoreError::Full(other(io::ErrorKind::StorageFull)),
            Status::ReadOnly => StoreError::ReadOnly(other(io::ErrorKind::ReadOnlyFilesystem)),
            Status::Failed => StoreError::Io { what: format!("the bank at {}", self.address), source: other(io::ErrorKind::Other) },
        }
    }
}

/// What is missing is what was asked for.
fn named(error: StoreError, op: &Op) -> StoreError {
    let StoreError::Missing { .. } = error else { return error };
    let (kind, name) = match op {
        Op::Config(name) => (Kind::Config, name.clone()),
        Op::Head(root, _) | Op::Leaf(root, ..) | Op::Fetch(root, ..) | Op::Pin(root) => (Kind::Manifest, root.to_string()),
        _ => (Kind::Manifest, "of that name".to_owned()),
    };
    StoreError::Missing { kind, name }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.state.rouse();
        let courier = self.courier.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(courier) = courier
            && courier.join().is_err()
        {
            tracing::error!("the thread of a link to a bank panicked");
        }
    }
}

impl Flight {
    /// The next part in `bytes`, and whether it is the last.
    pub fn part(&mut self, bytes: &mut Vec<u8>) -> Result<bool, StoreError> {
        let (status, last, landed) = self.next(Some(bytes))?;
        landed?;
        if status == Status::Done { Ok(last) } else { Err(self.client.failure(status, bytes)) }
    }

    /// Takes the next reply: how it went, whether it is the last, and whether its bytes could be copied.
    fn next(&mut self, bytes: Option<&mut Vec<u8>>) -> Result<(Status, bool, Result<(), StoreError>), StoreError> {
        let Ok(Reply { status, last, bytes: from }) = self.replies.recv() else {
            self.ended = true;
            return Err(self.client.gone());
        };
        self.ended |= last;
        let mut copied = Ok(());
        match (from, bytes) {
            (Bytes::Here(here), Some(bytes)) => *bytes = here,
            (Bytes::Here(_), None) => {}
            (Bytes::Landed { lane, len }, bytes) => {
                if let Some(bytes) = bytes {
                    // Not cleared first: what is overwritten need not be zeroed.
                    bytes.resize(len, 0);
                    let read = self.client.landed.read((lane * PART) as u64, bytes);
                    copied = read.map_err(|error| self.client.wrong(error));
                }
                if lane == self.own {
                    self.copied = true;
                } else {
                    self.client.state.give(lane as u8);
                }
            }
        }
        if last && self.copied {
            self.client.state.give(self.own as u8);
        }
        Ok((status, last, copied))
    }

    /// An answer of one part.
    pub fn only(mut self, bytes: &mut Vec<u8>) -> Result<(), StoreError> {
        if self.part(bytes)? { Ok(()) } else { Err(self.client.wrong("an answer of several parts")) }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        // Without the thread that answers nothing is under way any more.
        while !self.ended && self.next(None).is_ok() {}
    }
}

impl Client {
    /// A number for a new stream.
    pub fn stream(&self) -> u32 {
        self.streams.fetch_add(1, Ordering::Relaxed)
    }
}
