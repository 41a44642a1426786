//! A bank that others use over links: one thread for each, which reads their requests out of their memory and answers in a slab that they may read.
//!
//! `BankServer::new(bank, options)?` and then, for each client that was let in, `server.serve(fabric, &client, &stop, …)` on a thread of its own: a
//! client that stalls keeps its own thread waiting, one that floods fills its own eight lanes, and neither is anybody else's trouble.

mod bank_server;
mod cut;
mod deposit;
mod failure;
mod fetch;
mod quota;
mod rights;
mod staged;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use farbus_transport::{Fabric, Memory, Nanos, Teller};

pub use bank_server::{BankServer, Client, ServeOptions, Served, Stop};
use failure::{Failure, missing, refused};
use quota::{Share, What};
pub use rights::{Pattern, Rights};

use super::port::{Heard, Port};
use super::wire::{Answer, BODY, Carried, INLINE, LANES, Op, PART, Request, Status, ToClient, ToServer, VERSION, put_objects};
use crate::bank::CONFIG;
use crate::keep::lost::{self, Lost};
use crate::manifest::{Entry, Manifest};
use crate::page::{PageId, Root};
use crate::store::{Guard, Kind, StoreError};

/// How long a client may take for its hello.
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// How long a client may take nothing of what is sent to it.
const STALL_LIMIT: Duration = Duration::from_secs(10);
/// Manifests and leaves that a client's thread remembers.
const REMEMBERED: usize = 16;
/// Pages that clients brought and that are remembered, all clients together: 1 GiB of new pages each costs 4 MiB.
const MOST_BROUGHT: usize = 1 << 22;

/// Half of a page's name: enough to tell pages apart that nobody can make collide.
type Half = [u8; 16];

fn half(id: &PageId) -> Half {
    *id.0.first_chunk().unwrap_or(&[0; 16])
}

/// What keeps others from sweeping or removing. Only a hold allows deposits.
struct Handle {
    is_hold: bool,
    _guard: Option<Box<dyn Guard>>,
    _share: Share,
}

/// What was sent of an object.
struct Stream {
    bytes: Vec<u8>,
    share: Share,
}

/// A request whose body may still be on its way.
struct Queued {
    request: Request,
    ready: bool,
}

type Leaf = ((Root, u16, u32), Arc<[PageId]>);

struct Session<'s, F> {
    server: &'s BankServer,
    client: &'s Client,
    port: Port<F>,
    slab: Arc<Memory>,
    queue: VecDeque<Queued>,
    manifests: VecDeque<Arc<Manifest>>,
    leaves: VecDeque<Leaf>,
    handles: HashMap<u32, Handle>,
    next_handle: u32,
    streams: HashMap<u32, Stream>,
    /// What a client that may not read everything knows, from the machines that it may read.
    known: Option<HashSet<Half>>,
    /// When the client last asked for something, or said that it needs what it holds.
    renewed: Instant,
    /// Whether what it held ended because it did not.
    lapsed: bool,
    /// For a client that may not read everything.
    cutter: Option<cut::Cutter>,
    clock: &'s mut dyn FnMut() -> Nanos,
    /// Hears now and then what went over the link.
    teller: Option<Teller>,
}

impl<F: Fabric> Session<'_, F> {
    /// Until the link ends, and why.
    fn run(&mut self, grant: (u64, u64), stop: &Stop) -> String {
        let mut heard = VecDeque::new();
        let (mut greeted, mut last_heard, mut clear_at) = (false, Instant::now(), Instant::now());
        loop {
            if stop.is_set() {
                return "this side ends".to_owned();
            }
            let clear = self.port.pump();
            if clear {
                clear_at = Instant::now();
            } else if clear_at.elapsed() > STALL_LIMIT.min(self.server.options.silence) {
                return "it takes nothing of what is sent to it".to_owned();
            }
            let mut idle = true;
            self.port.poll((self.clock)(), &mut heard);
            while let Some(heard) = heard.pop_front() {
                (idle, last_heard) = (false, Instant::now());
                let done = match heard {
                    Heard::Closed(why) => return why,
                    Heard::Landed(lane) => {
                        self.queue
                            .iter_mut()
                            .filter(|queued| usize::from(queued.request.lane) == lane)
                            .for_each(|queued| queued.ready = true);
                        Ok(())
                    }
                    Heard::Message(message) => match ToServer::parse(message.bytes()) {
                        Ok(ToServer::Hello { version, grant: theirs }) if !greeted => {
                            greeted = true;
                            self.port.send(ToClient::Welcome { version: VERSION, grant }.encode());
                            if version == VERSION {
                                self.port.import(theirs, BODY)
                            } else {
                                Err(format!("it speaks version {version}"))
                            }
                        }
                        Ok(ToServer::Request(request)) if greeted => self.queue(request),
                        Ok(ToServer::Ping) if greeted => Ok(()),
                        Ok(ToServer::Keep) if greeted => {
                            self.renewed = Instant::now();
                            Ok(())
                        }
                        Ok(_) => Err("it does not begin with one hello".to_owned()),
                        Err(error) => Err(error.to_string()),
                    },
                };
                if let Err(error) = done {
                    // A client of another version still hears which one this is.
                    self.port.pump();
                    return format!("it breaks the protocol: {error}");
                }
            }
            if clear
                && self.queue.front().is_some_and(|queued| queued.ready)
                && let Some(Queued { request, .. }) = self.queue.pop_front()
            {
                idle = false;
                self.process(&request);
                last_heard = Instant::now();
                self.renewed = last_heard;
            }
            if !self.handles.is_empty() && self.renewed.elapsed() > self.server.options.hold {
                tracing::info!(client = self.client.name, "what a client held ended, because it did not renew it");
                self.handles.clear();
                self.streams.clear();
                self.lapsed = true;
            }
            let limit = if greeted { self.server.options.silence } else { HELLO_LIMIT };
            if last_heard.elapsed() > limit {
                return format!("it said nothing for {limit:?}");
            }
            self.tell();
            if idle {
                let pause = Duration::from_millis(500).min(self.server.options.hold / 4);
                self.port.sleep(&[stop.fd()], pause.max(Duration::from_millis(1)));
            }
        }
    }

    fn tell(&mut self) {
        if let Some(teller) = &mut self.teller {
            teller.tell(&self.port.counts.values());
        }
    }

    /// Takes a request, and fetches its body.
    fn queue(&mut self, request: Request) -> Result<(), String> {
        let lane = request.lane;
        if self.queue.iter().any(|queued| queued.request.lane == lane) {
            return Err(format!("two requests in lane {lane}"));
        }
        let ready = match request.body {
            Carried::Inline(_) => true,
            Carried::Lane(len) => {
                self.port.read(lane.into(), len)?;
                false
            }
        };
        self.queue.push_back(Queued { request, ready });
        Ok(())
    }

    fn process(&mut self, request: &Request) {
        let body = match &request.body {
            Carried::Inline(bytes) => Ok(bytes.clone()),
            Carried::Lane(len) => {
                let mut bytes = vec![0; *len as usize];
                let read = self.port.landed().read(u64::from(request.lane) * BODY as u64, &mut bytes);
                read.map(|()| bytes).map_err(|error| Failure(Status::Failed, error.to_string()))
            }
        };
        let done = body.and_then(|body| Ok(Op::parse(request.op, &body)?)).and_then(|op| self.obey(request, op));
        match done {
            Ok(Some(bytes)) => self.answer(request, Status::Done, &bytes),
            // Its parts are on their way.
            Ok(None) => {}
            Err(failure) => {
                // What a bank that is away does not have is not missing.
                let Failure(status, text) =
                    if failure.0 == Status::Missing { self.is_there().err().unwrap_or(failure) } else { failure };
                tracing::debug!(client = self.client.name, text, "a request was refused");
                self.answer(request, status, &text.as_bytes()[..text.len().min(1000)]);
            }
        }
    }

    fn obey(&mut self, request: &Request, op: Op) -> Result<Option<Vec<u8>>, Failure> {
        match op {
            Op::List(kind, after) => self.list(kind, &after).map(Some),
            Op::Config(name) => self.config(&name).map(Some),
            Op::Head(root, offset) => self.head(&root, offset as usize).map(Some),
            Op::Leaf(root, section, leaf) => {
                let ids = self.leaf(root, section, leaf)?;
                Ok(Some(match crate::manifest::leaf::encode(&ids, None) {
                    crate::manifest::leaf::Encoded::Full(bytes) => bytes,
                    _ => vec![0; ids.len().div_ceil(8)],
                }))
            }
            Op::Fetch(root, section, leaf, wanted) => self.fetch(request, root, section, leaf, &wanted).map(|()| None),
            Op::Have(ids) => self.have(&ids).map(Some),
            Op::Hold(wait) => self.hold(Duration::from_millis(wait.into())).map(Some),
            Op::Pin(root) => {
                let entry = self.entry(&root)?;
                let share = self.share(What::Pins)?;
                let pin = self.busy(|server| server.bank.pin(&entry))?;
                Ok(Some(self.handle(Handle { is_hold: false, _guard: pin, _share: share })))
            }
            Op::LetGo(handle) => {
                self.handles.remove(&handle);
                Ok(Some(Vec::new()))
            }
            Op::Stage(stream, offset, bytes) => self.stage(stream, offset, &bytes).map(|()| Some(Vec::new())),
            Op::Pack(stream, len, id) => self.pack(stream, len, crate::pack::PackId(id)).map(|()| Some(Vec::new())),
            Op::Commit(stream, len, root, number, machine) => self.commit(stream, len, root, number, &machine).map(Some),
            Op::Discard(stream) => {
                self.streams.remove(&stream);
                Ok(Some(Vec::new()))
            }
        }
    }

    /// Answers in one part.
    fn answer(&mut self, request: &Request, status: Status, bytes: &[u8]) {
        let lane = lanes(request.lent, request.lane).next();
        self.part(request, status, [bytes, &[]], lane, true);
    }

    /// Answers in part, with both pieces one behind the other; bytes that no message holds need a lane.
    fn part(&mut self, request: &Request, status: Status, [front, back]: [&[u8]; 2], lane: Option<u8>, last: bool) {
        let len = front.len() + back.len();
        let mut answer = Answer { status, lane: request.lane, last, part: (Carried::Inline(Vec::new()), 0xff) };
        if len <= INLINE {
            answer.part.0 = Carried::Inline([front, back].concat());
        } else {
            let written = lane.filter(|_| len <= PART).map(|lane| {
                let at = u64::from(lane) * PART as u64;
                (lane, self.slab.write(at, front).and_then(|()| self.slab.write(at + front.len() as u64, back)))
            });
            match written {
                Some((lane, Ok(()))) => {
                    self.port.counts.offered_bytes += len as u64;
                    answer.part = (Carried::Lane(len as u32), lane);
                }
                // Without a lane that it lent only this can be said.
                _ => answer.status = Status::Refused,
            }
        }
        self.port.send(ToClient::Answer(answer).encode());
    }

    /// Tells the client that it is not forgotten.
    fn wait(&mut self) {
        self.port.send(ToClient::Wait.encode());
        self.port.pump();
    }

    /// Whether the bank is where it was: the folder of a file system that is not mounted has no packs either.
    fn is_there(&self) -> Result<(), Failure> {
        if self.server.bank.store().list(Kind::Config)?.iter().any(|object| object.name == CONFIG) {
            return Ok(());
        }
        Err(Failure(Status::Failed, format!("there is no bank in {} now", self.server.bank.store().address())))
    }

    /// What the bank says of itself, and which pages it lost: a client that may not read every machine is told that any page may be.
    fn config(&self, name: &str) -> Result<Vec<u8>, Failure> {
        let store = self.server.bank.store();
        match name {
            CONFIG => Ok(store.read_all(Kind::Config, name, PART as u64)?),
            lost::OBJECT if !self.client.rights.reads_all() => {
                store.len(Kind::Config, name)?;
                Ok(Lost::note_of_all())
            }
            lost::OBJECT => match store.read_all(Kind::Config, name, PART as u64) {
                Err(StoreError::TooLong { .. }) => Ok(Lost::note_of_all()),
                note => Ok(note?),
            },
            _ => Err(missing()),
        }
    }

    fn list(&self, kind: Kind, after: &str) -> Result<Vec<u8>, Failure> {
        let rights = &self.client.rights;
        let mut objects = match kind {
            Kind::Manifest => {
                let mut objects = self.server.bank.store().list(kind)?;
                objects.retain(|object| Entry::parse(object).is_some_and(|entry| rights.reads(&entry.machine)));
                objects
            }
            Kind::Pack | Kind::Index if rights.reads_all() => self.server.bank.store().list(kind)?,
            _ => return Err(refused("only who may read every machine is told what the bank holds in all")),
        };
        if objects.is_empty() {
            self.is_there()?;
        }
        objects.retain(|object| object.name.as_str() > after);
        objects.sort_by(|a, b| a.name.cmp(&b.name));
        // A name of 200 bytes, its length and two numbers.
        let most = (PART - 5) / 217;
        let more = objects.len() > most;
        objects.truncate(most);
        let mut part = Vec::new();
        put_objects(&mut part, &objects, more);
        Ok(part)
    }

    /// A machine that this client may read.
    fn entry(&self, root: &Root) -> Result<Entry, Failure> {
        let listing = self.server.bank.listing()?;
        listing.0.into_iter().find(|entry| entry.root == *root && self.client.rights.reads(&entry.machine)).ok_or_else(missing)
    }

    fn manifest(&mut self, root: &Root) -> Result<Arc<Manifest>, Failure> {
        if let Some(found) = self.manifests.iter().find(|manifest| manifest.root == *root) {
            return Ok(found.clone());
        }
        let entry = self.entry(root)?;
        let manifest = self.server.bank.manifest(&entry)?;
        remember(&mut self.manifests, manifest.clone());
        Ok(manifest)
    }

    fn head(&mut self, root: &Root, offset: usize) -> Result<Vec<u8>, Failure> {
        let manifest = self.manifest(root)?;
        let head = manifest.head.encode();
        let rest = head.get(offset..).ok_or_else(|| refused("a head does not have so many bytes"))?;
        let mut part = vec![manifest.table.depth];
        part.extend_from_slice(&(head.len() as u32).to_le_bytes());
        part.extend_from_slice(&rest[..rest.len().min(PART - 5)]);
        Ok(part)
    }

    /// The names of a leaf's pages, of a machine that this client may read.
    fn leaf(&mut self, root: Root, section: u16, leaf: u32) -> Result<Arc<[PageId]>, Failure> {
        let key = (root, section, leaf);
        if let Some((_, ids)) = self.leaves.iter().find(|(other, _)| *other == key) {
            return Ok(ids.clone());
        }
        let manifest = self.manifest(&root)?;
        let (section, leaf) = (usize::from(section), leaf as usize);
        if manifest.head.sections.get(section).is_none_or(|about| leaf >= about.leaves.len()) {
            return Err(refused("the machine has no such leaf"));
        }
        let bank = &self.server.bank;
        let ids: Arc<[PageId]> = manifest.leaf(bank.store(), bank.identity(), section, leaf)?.into();
        remember(&mut self.leaves, (key, ids.clone()));
        Ok(ids)
    }

    fn handle(&mut self, handle: Handle) -> Vec<u8> {
        let number = self.next_handle;
        self.next_handle = self.next_handle.wrapping_add(1);
        self.handles.insert(number, handle);
        number.to_le_bytes().to_vec()
    }

    /// Room for a hold or a pin more.
    fn share(&self, what: What) -> Result<Share, Failure> {
        let options = &self.server.options;
        let (most, of) = if what == What::Holds { (options.holds, "deposits") } else { (options.pins, "withdrawals") };
        let mut share = self.server.quotas.share(&self.client.name, what);
        if share.grow(1, most) {
            Ok(share)
        } else {
            Err(Failure(Status::Quota, format!("a client may have {most} {of} under way, and this one has them")))
        }
    }

    /// Does what may take long beside this thread, which tells the client that it is worked on.
    fn busy<T: Send>(&mut self, work: impl FnOnce(&BankServer) -> T + Send) -> T {
        let server = self.server;
        std::thread::scope(|scope| {
            let (tell, told) = channel();
            let thread = scope.spawn(move || {
                let done = work(server);
                // Whoever waits is there: it is this scope.
                drop(tell);
                done
            });
            while told.recv_timeout(server.options.word) == Err::<(), _>(RecvTimeoutError::Timeout) {
                self.wait();
            }
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

fn remember<T>(all: &mut VecDeque<T>, one: T) {
    if all.len() >= REMEMBERED {
        all.pop_front();
    }
    all.push_back(one);
}

/// Lanes that were lent, the request's own last: while a part is in it the request is under way.
fn lanes(lent: u8, own: u8) -> impl Iterator<Item = u8> {
    let others = (0..LANES as u8).filter(move |lane| *lane != own && lent >> lane & 1 == 1);
    others.chain((lent >> own & 1 == 1).then_some(own))
}
