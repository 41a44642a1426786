//! A bank at the other end of a link, as a store: its machines are listed and read, its pages fetched, and what is deposited is sent to it.
//!
//! `RemoteStore::connect(fabric, "rdma:nas:7001", …)` says hello; `Bank::open(Box::new(store), None)` is then a bank like any other, except that who
//! serves it decides which machines there are, and that nothing is removed from here.

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
use super::draft::RemoteDraft;
use super::port::{Heard, Port};
use super::service::{Fetched, Service, WireCounts};
use super::wire::{BITMAP, BODY, Carried, INLINE, LANES, MOST_NAMES, Op, PART, Request, Status, ToClient, ToServer, VERSION};
use super::wire::{parse_objects, parse_part};
use crate::codec::Input;
use crate::manifest::head::MOST_HEAD;
use crate::page::{PAGE, PageId, Root};
use crate::store::{Draft, Guard, Hold, Kind, Object, Pin, Store, StoreError};

/// How long a server may take to say hello.
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// Objects of one listing that are taken at most.
const MOST_OBJECTS: usize = 1 << 22;
/// Lanes of one fetch at most, so that another thread's can be under way too.
const FETCH_LANES: usize = LANES / 2;

/// A bank at the other end of a link.
#[derive(Debug)]
pub struct RemoteStore(Arc<Client>);

/// What guards and drafts share with the store.
pub(super) struct Client {
    address: String,
    state: Arc<State>,
    asked: Mutex<Option<Sender<Asked>>>,
    area: Arc<Memory>,
    landed: Arc<Memory>,
    config: Vec<u8>,
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
    /// Says hello to the bank at the other end of `fabric`. `clock` is the time for the fabric.
    ///
    /// # Errors
    /// The link's fault, or nobody there speaks the protocol.
    pub fn connect<F: Fabric + 'static>(
        fabric: F,
        address: impl Into<String>,
        clock: impl FnMut() -> Nanos + Send + 'static,
    ) -> Result<Self, StoreError> {
        Self::connect_within(fabric, address, clock, ANSWER_LIMIT)
    }

    /// The same with a limit for the server's silence while something is asked of it.
    ///
    /// # Errors
    /// As [`RemoteStore::connect`].
    pub fn connect_within<F: Fabric + 'static>(
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
        let mut client = Client {
            address,
            state,
            asked: Mutex::new(Some(asked)),
            area,
            landed,
            config: Vec::new(),
            streams: AtomicU32::new(0),
            courier: Mutex::new(Some(thread)),
        };
        client = {
            let client = Arc::new(client);
            let config = client.call(&Op::Config)?;
            let mut client = Arc::into_inner(client).ok_or_else(|| StoreError::Gone("the link is in use".to_owned()))?;
            client.config = config;
            client
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
        Op::Config => (Kind::Config, "bank".to_owned()),
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

/// A hold or a pin at the server.
#[derive(Debug)]
struct RemoteGuard {
    client: Arc<Client>,
    handle: u32,
}

impl Guard for RemoteGuard {}

impl Drop for RemoteGuard {
    fn drop(&mut self) {
        // With the link it ends anyhow.
        if let Err(error) = self.client.call(&Op::LetGo(self.handle)) {
            tracing::debug!(%error, "a hold on a bank ended with its link");
        }
    }
}

/// A hold that the server takes by itself when it is needed.
#[derive(Debug)]
struct Unneeded;

impl Guard for Unneeded {}

impl RemoteStore {
    fn guard(&self, op: &Op) -> Result<Box<dyn Guard>, StoreError> {
        let handle = self.0.call(op)?;
        let handle = handle.first_chunk::<4>().map(|bytes| u32::from_le_bytes(*bytes));
        let handle = handle.ok_or_else(|| self.0.wrong("a hold without a number"))?;
        Ok(Box::new(RemoteGuard { client: self.0.clone(), handle }))
    }

    fn not_here<T>(&self, what: &str) -> Result<T, StoreError> {
        Err(StoreError::Refused(format!("{what} over a link; it is done on the host that has the bank")))
    }
}

impl Store for RemoteStore {
    fn address(&self) -> String {
        self.0.address.clone()
    }

    fn service(&self) -> Option<&dyn Service> {
        Some(self)
    }

    fn list(&self, kind: Kind) -> Result<Vec<Object>, StoreError> {
        let mut all: Vec<Object> = Vec::new();
        loop {
            let after = all.last().map(|object| object.name.clone()).unwrap_or_default();
            let part = self.0.call(&Op::List(kind, after.clone()))?;
            let (objects, more) = parse_objects(&part).map_err(|error| self.0.wrong(error))?;
            let sorted = objects.first().is_none_or(|first| first.name > after) && objects.is_sorted_by(|a, b| a.name < b.name);
            if !sorted || (more && objects.is_empty()) || all.len() + objects.len() > MOST_OBJECTS {
                return Err(self.0.wrong("a listing without order or end"));
            }
            all.extend(objects);
            if !more {
                return Ok(all);
            }
        }
    }

    fn read(&self, kind: Kind, name: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        if kind != Kind::Config {
            return self.not_here("packs, indexes and manifests are not read as they are");
        }
        let from = usize::try_from(offset).ok().and_then(|from| self.0.config.get(from..)?.get(..buf.len()));
        let wanted = offset.saturating_add(buf.len() as u64);
        buf.copy_from_slice(from.ok_or_else(|| StoreError::Ends { kind, name: name.to_owned(), wanted })?);
        Ok(())
    }

    fn len(&self, kind: Kind, name: &str) -> Result<u64, StoreError> {
        if kind == Kind::Config {
            return Ok(self.0.config.len() as u64);
        }
        let object = self.list(kind)?.into_iter().find(|object| object.name == name);
        object.map(|object| object.len).ok_or_else(|| StoreError::Missing { kind, name: name.to_owned() })
    }

    fn create(&self, kind: Kind) -> Result<Box<dyn Draft>, StoreError> {
        match kind {
            Kind::Pack | Kind::Manifest => Ok(Box::new(RemoteDraft::new(self.0.clone(), kind))),
            Kind::Config => self.not_here("no bank is made"),
            Kind::Index => self.not_here("no index is written"),
        }
    }

    /// Before a manifest is seen the server makes durable what it rests on, and then the manifest itself.
    fn sync(&self, _: Kind) -> Result<(), StoreError> {
        Ok(())
    }

    fn remove(&self, _: Kind, _: &str) -> Result<(), StoreError> {
        self.not_here("nothing is removed")
    }

    fn hold(&self, hold: Hold, wait: Duration) -> Result<Box<dyn Guard>, StoreError> {
        match hold {
            Hold::Deposit => self.guard(&Op::Hold(u32::try_from(wait.as_millis()).unwrap_or(u32::MAX))),
            // The server gives numbers, one at a time.
            Hold::Commit => Ok(Box::new(Unneeded)),
            Hold::Sweep => self.not_here("nothing is swept"),
        }
    }

    fn pin(&self, root: Root) -> Result<Box<dyn Guard>, StoreError> {
        self.guard(&Op::Pin(root))
    }

    fn pins(&self) -> Result<Vec<Pin>, StoreError> {
        self.not_here("nobody is told who withdraws what")
    }

    fn tidy(&self) -> Result<u64, StoreError> {
        self.not_here("nothing is tidied")
    }
}

impl Service for RemoteStore {
    fn head(&self, root: &Root) -> Result<(u8, Vec<u8>), StoreError> {
        let mut head = Vec::new();
        loop {
            let part = self.0.call(&Op::Head(*root, head.len() as u32))?;
            let mut input = Input::new(&part);
            let fields = (|| Ok::<_, crate::codec::Malformed>((input.u8()?, input.u32()? as usize, input.take(input.left())?)))();
            let (depth, total, piece) = fields.map_err(|error| self.0.wrong(error))?;
            head.extend_from_slice(piece);
            if total > MOST_HEAD || head.len() > total || piece.is_empty() {
                return Err(self.0.wrong("a head without end"));
            }
            if head.len() == total {
                return Ok((depth, head));
            }
        }
    }

    fn leaf(&self, root: &Root, section: usize, leaf: usize) -> Result<Vec<u8>, StoreError> {
        self.0.call(&Op::Leaf(*root, section as u16, leaf as u32))
    }

    fn fetch(
        &self,
        root: &Root,
        section: usize,
        leaf: usize,
        pages: &[u16],
        buffer: &mut Vec<u8>,
        sink: &mut dyn FnMut(Fetched<'_>),
    ) -> Result<(), StoreError> {
        let mut wanted = Box::new([0_u8; BITMAP]);
        for page in pages {
            if let Some(byte) = wanted.get_mut(usize::from(*page) / 8) {
                *byte |= 1 << (page % 8);
            }
        }
        let mut left: usize = wanted.iter().map(|byte| byte.count_ones() as usize).sum();
        while left > 0 {
            let before = left;
            let op = Op::Fetch(*root, section as u16, leaf as u32, wanted.clone());
            let lanes = (left * PAGE / PART + 1).min(FETCH_LANES);
            let mut flight = self.0.send(op.code(), &op.body(), &[], lanes)?;
            loop {
                let last = flight.part(buffer).map_err(|error| named(error, &op))?;
                let (missing, groups) = parse_part(buffer).map_err(|error| self.0.wrong(error))?;
                let pages = missing.iter().chain(groups.iter().flat_map(|group| group.pages.iter().map(|(page, _)| page)));
                for page in pages {
                    let (byte, bit) = (&mut wanted[usize::from(*page) / 8], 1 << (page % 8));
                    if *byte & bit == 0 {
                        return Err(self.0.wrong("a page that was not asked for"));
                    }
                    *byte &= !bit;
                    left -= 1;
                }
                missing.iter().for_each(|page| sink(Fetched::Missing(*page)));
                groups.iter().for_each(|group| sink(Fetched::Group(&buffer[group.bytes.clone()], &group.pages)));
                if last {
                    break;
                }
            }
            if left == before {
                return Err(self.0.wrong("an answer without pages"));
            }
        }
        Ok(())
    }

    fn have(&self, ids: &[PageId]) -> Result<Vec<bool>, StoreError> {
        let mut have = Vec::with_capacity(ids.len());
        for ids in ids.chunks(MOST_NAMES) {
            let bitmap = self.0.call(&Op::Have(ids.to_vec()))?;
            if bitmap.len() != ids.len().div_ceil(8) {
                return Err(self.0.wrong(format!("{} bytes about {} pages", bitmap.len(), ids.len())));
            }
            have.extend((0..ids.len()).map(|at| bitmap[at / 8] >> (at % 8) & 1 == 1));
        }
        Ok(have)
    }

    fn wire(&self) -> WireCounts {
        self.0.state.counts()
    }
}

impl Client {
    /// A number for a new stream.
    pub fn stream(&self) -> u32 {
        self.streams.fetch_add(1, Ordering::Relaxed)
    }
}
