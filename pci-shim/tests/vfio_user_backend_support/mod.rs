//! A vfio-user server that a test plays message by message, and the bus of a lent device that writes down what reaches it.
//!
//! `let (mut backend, mut server) = lent();` answers the backend's first questions as an NVMe-like device would; then `server.request(Command::DmaWrite,
//! …)` asks for a store, `backend.poll(&mut bus)` makes it, and `bus.seen` has `Seen::Polled(0x1000, 16)`.
#![allow(dead_code, reason = "each test program uses a part")]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_pci_shim::vfio_user::socket::{Incoming, Input, Received};
use farbus_pci_shim::vfio_user::wire::{
    Command, DeviceInfo, DmaAccess, FLAG_ERROR, FLAGS_REPLY, Header, IrqInfo, RegionAccess, RegionInfo,
};
use farbus_pci_shim::vfio_user::{BackendOptions, OpenError, VfioUserBackend};
use farbus_remote_dma::{Backend, Bus, DmaBuffer, DmaFault, DmaTag, Iova, Progress};
use farbus_transport::local::LocalRegions;
use farbus_transport::{Access, LocalRegion, LocalSpan, Memory, Nanos, RegisterError};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use zerocopy::{FromBytes, IntoBytes};

mod driving;
pub use driving::*;

pub const DEADLINE: Duration = Duration::from_secs(5);
/// Where the guest's memory begins, and how long it is.
pub const BASE: u64 = 0x1_0000;
pub const BYTES: u64 = 1 << 20;

/// What a server says of its device, for a test to change.
#[derive(Clone)]
pub struct Facts {
    pub version: Vec<u8>,
    pub device: DeviceInfo,
    pub config: [u8; 256],
    /// By region: the body of its information, and a file beside it.
    pub regions: Vec<(Vec<u8>, Option<Arc<Memory>>)>,
    pub irqs: [u32; 5],
    /// A change to any reply of the handshake.
    pub spoil: Option<fn(&mut Header, &mut Vec<u8>)>,
    /// Descriptors beside each reply of the handshake.
    pub extra_fds: usize,
}

pub fn region(index: u32, size: u64, flags: u32) -> Vec<u8> {
    RegionInfo { argsz: 32, flags, index, cap_offset: 0, size, offset: 0 }.as_bytes().to_vec()
}

impl Default for Facts {
    fn default() -> Self {
        let mut config = [0; 256];
        config[..4].copy_from_slice(&[0x36, 0x1b, 0x10, 0]);
        config[6] = 0x10;
        config[8..12].copy_from_slice(&[2, 2, 8, 1]);
        config[0x10] = 4;
        config[0x34] = 0x40;
        config[0x3d] = 1;
        config[0x40..0x4c].copy_from_slice(&[0x11, 0x50, 19, 0, 0, 0x20, 0, 0, 0, 0x30, 0, 0]);
        config[0x50..0x54].copy_from_slice(&[0x05, 0, 2 << 1, 0]);
        let mut regions: Vec<_> = (0..9).map(|index| (region(index, 0, 0), None)).collect();
        regions[0].0 = region(0, 16 << 10, 3);
        regions[7].0 = region(7, 4096, 3);
        Self {
            version: b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":1048576}}\0".to_vec(),
            device: DeviceInfo { argsz: 16, flags: 3, num_regions: 9, num_irqs: 5 },
            config,
            regions,
            irqs: [1, 4, 20, 1, 1],
            spoil: None,
            extra_fds: 0,
        }
    }
}

/// A server's end of a connection.
pub struct Server {
    pub stream: UnixStream,
    input: Input,
    facts: Facts,
    next_id: u16,
}

/// What the backend sent.
pub struct Got {
    pub header: Header,
    pub body: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Got {
    pub fn is(&self, command: Command) -> bool {
        self.header.is_command() && self.header.command == command.number()
    }
}

/// Where a server listens.
pub struct Place {
    pub path: PathBuf,
    listener: UnixListener,
    _folder: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("dev.sock");
        Self { listener: UnixListener::bind(&path).unwrap(), path, _folder: folder }
    }

    /// Answers the next client's first questions with `facts` while `connect` connects.
    pub fn meet<T>(&self, facts: Facts, connect: impl FnOnce() -> T) -> (T, Server) {
        std::thread::scope(|scope| {
            let server = scope.spawn(|| {
                let mut server = Server { stream: self.listener.accept().unwrap().0, input: Input::new(), facts, next_id: 0x100 };
                server.shake_hands();
                server
            });
            let connected = connect();
            (connected, server.join().unwrap())
        })
    }
}

/// The outcome of opening a device whose server says `facts`.
pub fn open(facts: Facts, options: BackendOptions) -> (Result<VfioUserBackend, OpenError>, Server) {
    let place = Place::new();
    place.meet(facts, || VfioUserBackend::open(&place.path, options))
}

/// A device that is lent over `bus`; what was asked for that is answered.
pub fn lent_with(facts: Facts, bus: &mut TestBus) -> (VfioUserBackend, Server) {
    let (backend, mut server) =
        open(facts, BackendOptions { answer_within: Duration::from_millis(300), ..BackendOptions::default() });
    let mut backend = backend.unwrap();
    backend.attach(bus).unwrap();
    server.answer_all(&mut backend, bus);
    (backend, server)
}

pub fn lent() -> (VfioUserBackend, Server, TestBus) {
    let mut bus = TestBus::new();
    let (backend, server) = lent_with(Facts::default(), &mut bus);
    (backend, server, bus)
}

impl Server {
    /// The next message within `wait`.
    pub fn next(&mut self, wait: Duration) -> Option<Got> {
        let started = Instant::now();
        loop {
            if let Some(incoming) = self.input.next_message() {
                let Incoming::Message { header, body, fds, .. } = incoming else { panic!("the backend sends what is no message") };
                return Some(Got { header, body: body.to_vec(), fds });
            }
            match self.input.receive(self.stream.as_fd(), false) {
                Ok(Received::Bytes) => {}
                Ok(Received::Nothing) if started.elapsed() < wait => std::thread::sleep(Duration::from_micros(50)),
                Ok(Received::Nothing | Received::Closed) | Err(_) => return None,
            }
        }
    }

    /// What is there now, of one kind.
    pub fn expect(&mut self, command: Command) -> Got {
        let got = self.next(DEADLINE).unwrap_or_else(|| panic!("no {command:?} came"));
        assert_eq!(got.header.command, command.number(), "{:?}", got.header);
        got
    }

    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        // A backend that has hung up is one of its right answers.
        let _gone = rustix::net::sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
    }

    pub fn reply(&self, to: &Header, body: &[u8]) {
        self.send(&[to.reply(body.len()).as_bytes(), body].concat(), &[]);
    }

    /// Asks for an access to the guest's memory; the number of the message.
    pub fn request(&mut self, command: Command, address: u64, count: u64, data: &[u8]) -> u16 {
        self.next_id += 1;
        let access = DmaAccess { address, count };
        let header = Header::command(self.next_id, command, 16 + data.len());
        self.send(&[header.as_bytes(), access.as_bytes(), data].concat(), &[]);
        self.next_id
    }

    /// Answers all that comes with success, until nothing does while the backend is polled.
    pub fn answer_all(&mut self, backend: &mut VfioUserBackend, bus: &mut TestBus) -> Vec<Got> {
        let mut all = Vec::new();
        loop {
            backend.poll(bus);
            let Some(got) = self.next(Duration::from_millis(2)) else { break };
            if got.header.is_command() {
                self.acknowledge(&got);
            }
            all.push(got);
        }
        backend.poll(bus);
        all
    }

    /// Does what is asked: reads give the low bytes of their offset.
    pub fn acknowledge(&self, got: &Got) {
        let Ok((access, _)) = RegionAccess::read_from_prefix(&got.body) else { return self.reply(&got.header, &[]) };
        match Command::from_number(got.header.command) {
            Some(Command::RegionRead) => {
                let value = access.offset.to_le_bytes();
                self.reply(&got.header, &[access.as_bytes(), &value[..access.count as usize]].concat());
            }
            Some(Command::RegionWrite) => self.reply(&got.header, access.as_bytes()),
            Some(Command::DmaUnmap) => self.reply(&got.header, &got.body),
            _ => self.reply(&got.header, &[]),
        }
    }

    fn shake_hands(&mut self) {
        while let Some(Got { header, body, .. }) = self.next(Duration::from_millis(700)) {
            let mut answer = match Command::from_number(header.command) {
                Some(Command::Version) => self.facts.version.clone(),
                Some(Command::DeviceInfo) => self.facts.device.as_bytes().to_vec(),
                Some(Command::RegionInfo) => {
                    let (asked, _) = RegionInfo::read_from_prefix(&body).unwrap();
                    let (mut info, file) = self.facts.regions[asked.index as usize].clone();
                    info.truncate((asked.argsz as usize).max(32));
                    let fds: Vec<_> = file.iter().map(|file| file.file().unwrap().0.try_clone_to_owned().unwrap()).collect();
                    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                    self.send(&[header.reply(info.len()).as_bytes(), &info].concat(), &fds);
                    continue;
                }
                Some(Command::IrqInfo) => {
                    let (asked, _) = IrqInfo::read_from_prefix(&body).unwrap();
                    let count = self.facts.irqs[asked.index as usize];
                    IrqInfo { argsz: 16, flags: 1, index: asked.index, count }.as_bytes().to_vec()
                }
                Some(Command::RegionRead) => {
                    let (asked, _) = RegionAccess::read_from_prefix(&body).unwrap();
                    let at = asked.offset as usize;
                    [asked.as_bytes(), &self.facts.config[at..at + asked.count as usize]].concat()
                }
                _ => Vec::new(),
            };
            let mut reply = header.reply(answer.len());
            if let Some(spoil) = self.facts.spoil {
                spoil(&mut reply, &mut answer);
            }
            let null = std::fs::File::open("/dev/null").unwrap();
            self.send(&[reply.as_bytes(), &answer].concat(), &vec![null.as_fd(); self.facts.extra_fds]);
            let last = RegionAccess::read_from_prefix(&body).is_ok_and(|(asked, _)| asked.offset == 248);
            if header.command == Command::RegionRead.number() && last {
                break;
            }
        }
    }
}

/// What reached the guest, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    Read(u64, u32),
    Write(u64, u32),
    Polled(u64, u32),
    Interrupt(u16),
    Pin(bool),
}

enum Late {
    Read(DmaTag, u64, LocalSpan),
    Write(DmaTag, u64, LocalSpan),
    Polled(DmaTag, u64, Vec<u8>),
}

/// The bus of one device: guest memory at [`BASE`], at once or late.
pub struct TestBus {
    pub guest: Arc<Memory>,
    pub seen: Vec<Seen>,
    pub late: bool,
    waiting: Vec<Late>,
    locals: LocalRegions,
}

impl TestBus {
    pub fn new() -> Self {
        let guest = Memory::memfd("guest", BYTES).unwrap();
        Self { guest, seen: Vec::new(), late: false, waiting: Vec::new(), locals: LocalRegions::default() }
    }

    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.guest.read(address - BASE, &mut bytes).unwrap();
        bytes
    }

    /// Carries out what waits, the last first.
    pub fn finish(&mut self, backend: &mut VfioUserBackend) {
        while let Some(late) = self.waiting.pop() {
            let tag = match late {
                Late::Read(tag, at, into) => {
                    self.copy(at, into, true);
                    tag
                }
                Late::Write(tag, at, from) => {
                    self.copy(at, from, false);
                    tag
                }
                Late::Polled(tag, at, bytes) => {
                    self.guest.write(at, &bytes).unwrap();
                    tag
                }
            };
            backend.dma_done(tag, Ok(()), self);
        }
    }

    fn at(&self, iova: Iova, len: u64) -> Result<u64, DmaFault> {
        let offset = iova.0.checked_sub(BASE).filter(|offset| offset + len <= BYTES);
        offset.ok_or(DmaFault::Unmapped { iova, len })
    }

    fn copy(&self, at: u64, span: LocalSpan, read: bool) {
        let (memory, offset) = self.locals.resolve(span).unwrap();
        let len = u64::from(span.len());
        if read { memory.copy_from(offset, &self.guest, at, len) } else { self.guest.copy_from(at, memory, offset, len) }.unwrap();
    }
}

impl Bus for TestBus {
    fn now(&self) -> Nanos {
        Nanos::now()
    }

    fn register(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError> {
        self.locals.register(memory, access)
    }

    fn dma_read(&mut self, tag: DmaTag, iova: Iova, into: LocalSpan) -> Result<Progress, DmaFault> {
        let at = self.at(iova, u64::from(into.len()))?;
        self.seen.push(Seen::Read(iova.0, into.len()));
        if self.late {
            self.waiting.push(Late::Read(tag, at, into));
            return Ok(Progress::Pending);
        }
        self.copy(at, into, true);
        Ok(Progress::Done)
    }

    fn dma_write(&mut self, tag: DmaTag, iova: Iova, from: LocalSpan) -> Result<Progress, DmaFault> {
        let at = self.at(iova, u64::from(from.len()))?;
        self.seen.push(Seen::Write(iova.0, from.len()));
        if self.late {
            self.waiting.push(Late::Write(tag, at, from));
            return Ok(Progress::Pending);
        }
        self.copy(at, from, false);
        Ok(Progress::Done)
    }

    fn dma_write_polled(&mut self, tag: DmaTag, iova: Iova, bytes: &[u8]) -> Result<Progress, DmaFault> {
        let at = self.at(iova, bytes.len() as u64)?;
        assert!(
            bytes.len() <= 32
                && bytes.len().is_multiple_of(4)
                && iova.0.is_multiple_of(4)
                && iova.0 % 4096 + bytes.len() as u64 <= 4096
        );
        self.seen.push(Seen::Polled(iova.0, bytes.len() as u32));
        if self.late {
            self.waiting.push(Late::Polled(tag, at, bytes.to_vec()));
            return Ok(Progress::Pending);
        }
        self.guest.write(at, bytes).unwrap();
        Ok(Progress::Done)
    }

    fn map(&mut self, _: Iova, _: u64, _: Access) -> Result<Option<DmaBuffer>, DmaFault> {
        Ok(None)
    }

    fn interrupt(&mut self, vector: u16) {
        self.seen.push(Seen::Interrupt(vector));
    }

    fn set_pin(&mut self, asserted: bool) {
        self.seen.push(Seen::Pin(asserted));
    }
}

/// Whether a reply says no.
pub fn refused(got: &Got) -> bool {
    got.header.flags == FLAGS_REPLY | FLAG_ERROR
}
