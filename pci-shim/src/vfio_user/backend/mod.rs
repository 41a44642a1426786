//! A device that any vfio-user server has, as a lender's backend: `farbus lend --device vfio-user:/run/dev.sock`.
//!
//! A borrower's store of 17 to BAR0 + 0x1018 becomes a `REGION_WRITE` that nobody waits for; the server asks for 64 bytes at 0x1_0450_0400 by
//! `DMA_READ`, which is a one-sided read of the guest's memory; it writes data and completion by `DMA_WRITE`, signals vector 3's eventfd, and the
//! guest sees the three in that order.
//!
//! ```text
//!   session ──► VfioUserBackend ──► link (questions, replies) ──► the server's socket
//!     ▲              │ areas: registers that the server shares
//!     └── Bus ◄── dma (DMA_READ, DMA_WRITE), signals (eventfds) ◄────┘
//! ```
//!
//! It is here and not beside the other devices, because it shares the protocol's formats and socket with the server of this crate.

mod areas;
mod asked;
mod describe;
mod device;
mod dma;
mod interrupts;
mod link;
mod open;
mod reply;
mod signals;

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use farbus_remote_dma::{BarAddress, Bus, DeviceDescription, InterruptMode, ReadTicket, SharedWindow, Width};
use farbus_transport::Nanos;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

pub use self::describe::{Controls, DescribeError, HEADER_BYTES, IrqCounts, describe};
pub use self::dma::DmaCounters;
pub use self::open::OpenError;
pub use self::reply::{
    Area, DmaRequest, MAX_REGION_INFO, REGION_CAPS, REGION_MMAP, Region, ServerLimits, dma_request, more_region_info, read_value,
    region, server_limits,
};

use self::areas::Areas;
use self::asked::Ask;
use self::dma::Dma;
use self::link::{Heard, Link, bytes};
use self::open::{Opened, open};
use self::signals::Signals;
use crate::vfio_user::wire::{CONFIG_REGION, DmaUnmap, RegionAccess};

/// How long a server may take to reset its device.
const RESET_LIMIT: Duration = Duration::from_secs(10);
/// Pieces of the socket's bytes that one poll takes.
const MAX_RECEIVES: usize = 64;
/// How long a wait for the server polls before it sleeps.
const SPIN: Duration = Duration::from_micros(50);

/// How a server is treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendOptions {
    /// How long it may owe an answer before it counts as gone; less than the 2 s that a borrower waits for a register.
    pub answer_within: Duration,
    /// Maps registers that it shares in a file that is not sealed: if the file shrinks, the lender dies.
    pub map_unsealed: bool,
    /// Lets the server map guest memory, where the link can share it; else, and without it, every DMA is a message.
    pub share_memory: bool,
}

impl Default for BackendOptions {
    fn default() -> Self {
        Self { answer_within: Duration::from_millis(1500), map_unsealed: false, share_memory: true }
    }
}

/// What happened, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendCounters {
    /// Register reads by message.
    pub reads: u64,
    /// Register writes by message.
    pub writes: u64,
    /// Register accesses in memory that the server shares.
    pub mapped: u64,
    /// Accesses that the server refused.
    pub refused: u64,
    /// Interrupts heard.
    pub interrupts: u64,
}

/// How far a reset is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reset {
    None,
    Asked,
    Done,
}

/// What the server may use.
struct Window {
    len: u64,
    /// Where it has the descriptor.
    shared: Option<SharedWindow>,
}

/// How often what the server writes unseen is counted while its device runs. When it is at rest it is counted anyway.
const MARK_EVERY: Duration = Duration::from_millis(10);

/// The device of a server at a socket.
pub struct VfioUserBackend {
    path: PathBuf,
    options: BackendOptions,
    description: DeviceDescription,
    controls: Controls,
    limits: ServerLimits,
    regions: [Region; farbus_remote_dma::device::BAR_COUNT],
    areas: Areas,
    link: Link,
    signals: Signals,
    dma: Dma,
    /// What the server was told that it may use, by first address.
    windows: BTreeMap<u64, Window>,
    /// Questions about unmaps that are not answered, and the memory that the server may still use meanwhile.
    unmapping: u32,
    leaving: Vec<SharedWindow>,
    /// When all that the server can write was last counted as written.
    marked: Nanos,
    /// Values of reads, behind which the signals of before are still to be told.
    held: VecDeque<(ReadTicket, u64)>,
    answers: VecDeque<(ReadTicket, u64)>,
    reset: Reset,
    bus_master: bool,
    mode: InterruptMode,
    /// The interrupt index that is on at the server.
    enabled: Option<u32>,
    pin: bool,
    /// Messages wait in the socket for room.
    stalled: bool,
    lent: bool,
    counters: BackendCounters,
}

impl VfioUserBackend {
    /// Connects to the server at `path` and asks it what its device is. Blocks, for a few round trips; at most for
    /// [`BackendOptions::answer_within`] each, and 10 s for the reset.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: impl AsRef<Path>, options: BackendOptions) -> Result<Self, OpenError> {
        let path = path.as_ref();
        let Opened { socket, input, description, controls, limits, regions, areas } = open(path, &options)?;
        let vectors = description.msix.as_ref().map_or(0, |msix| msix.vectors).max(u16::from(description.msi_vectors));
        let signals = Signals::new(socket.as_fd(), usize::from(vectors))
            .map_err(|source| OpenError::Host { what: "make an eventfd for each vector (see `ulimit -n`)", source })?;
        let dma =
            Dma::new().map_err(|error| OpenError::Host { what: "make memory for dma", source: std::io::Error::other(error) })?;
        Ok(Self {
            path: path.to_owned(),
            link: Link::new(socket, input, options.answer_within),
            options,
            description,
            controls,
            limits,
            regions,
            areas,
            signals,
            dma,
            windows: BTreeMap::new(),
            unmapping: 0,
            leaving: Vec::new(),
            marked: Nanos(0),
            held: VecDeque::new(),
            answers: VecDeque::new(),
            reset: Reset::None,
            bus_master: false,
            mode: InterruptMode::Pin,
            enabled: None,
            pin: false,
            stalled: false,
            lent: false,
            counters: BackendCounters::default(),
        })
    }

    /// What happened since it was made.
    pub fn counters(&self) -> (BackendCounters, DmaCounters) {
        (self.counters, self.dma.counters)
    }

    /// Takes what the server sent and signalled, and hands it to the bus in its order; true where there was something.
    fn advance(&mut self, bus: &mut dyn Bus) -> bool {
        let found = self.signals.collect();
        let (mut busy, mut drained) = (found.raised, true);
        if found.writable {
            self.link.flush();
        }
        if found.readable || self.stalled {
            let (some, all) = self.receive(bus);
            busy |= some;
            drained = all;
        }
        let answered = self.held.len();
        if answered > 0 {
            // What was signalled before an answer was sent is told before it.
            self.signals.collect();
        }
        if self.signals.pin_raised || !self.signals.raised.is_empty() {
            // What was asked before a signal was made is done before it.
            if drained {
                drained = self.receive(bus).1;
            }
            if drained {
                self.mark_sometimes();
                self.tell_interrupts(bus);
            }
            busy = true;
        }
        if drained && answered > 0 {
            self.mark_sometimes();
            self.answers.extend(self.held.drain(..answered));
            busy = true;
        }
        self.signals.set_wants_room(self.link.socket(), self.link.down().is_none() && self.link.backlog() > 0);
        if self.link.down().is_some() {
            self.mourn();
        }
        busy
    }

    /// Carries out what lies in the socket: whether there was something, and whether nothing is left of it.
    fn receive(&mut self, bus: &mut dyn Bus) -> (bool, bool) {
        let mut some = false;
        self.stalled = false;
        for _ in 0..MAX_RECEIVES {
            loop {
                if !self.dma.has_room() {
                    // Not beyond: a read's answer behind a write must not be told before the write is made.
                    self.stalled = true;
                    return (some, false);
                }
                match self.link.next() {
                    None => break,
                    Some(Heard::Request(header, body)) => match self.dma.accept(&header, body) {
                        Ok(index) => self.dma.begin(index, &mut self.link, bus),
                        Err(errno) => self.dma.refuse(&header, errno, &mut self.link),
                    },
                    Some(Heard::Answer(ask, answer)) => {
                        let value = match (ask, answer) {
                            (Ask::Read { access, .. }, Ok(body)) => read_value(body, &access).map(Ok),
                            (_, Ok(_)) => Some(Ok(0)),
                            (_, Err(errno)) => Some(Err(errno)),
                        };
                        match value {
                            Some(value) => self.answered(ask, value),
                            None => {
                                self.link.fail("its server's answer does not fit the question");
                                // Who waits for it is not left waiting.
                                self.answered(ask, Err(Errno::PROTO));
                            }
                        }
                    }
                }
                some = true;
            }
            if !self.link.receive() {
                return (some, true);
            }
            some = true;
        }
        (some, false)
    }

    fn answered(&mut self, ask: Ask, value: Result<u64, Errno>) {
        if let Err(errno) = value {
            tracing::debug!(?ask, %errno, "the server refused");
        }
        match (ask, value) {
            (Ask::Read { ticket, width, .. }, value) => {
                self.counters.refused += u64::from(value.is_err());
                if let Some(ticket) = ticket {
                    self.held.push_back((ticket, value.unwrap_or(width.all_ones())));
                }
            }
            (Ask::Write, Err(_)) => self.counters.refused += 1,
            (Ask::Map, Err(_)) => self.link.fail("its server refused to map guest memory"),
            (Ask::Irqs, Err(_)) => self.link.fail("its server refused to signal interrupts"),
            (Ask::Unmap, _) => {
                self.unmapping = self.unmapping.saturating_sub(1);
                if self.unmapping == 0 {
                    self.let_go();
                }
            }
            (Ask::Reset, Ok(_)) => {
                self.reset = Reset::Done;
                self.mark();
            }
            (Ask::Reset, Err(_)) => self.link.fail("its server refused to reset the device"),
            (Ask::Write | Ask::Config | Ask::IrqsOff | Ask::Map | Ask::Irqs, _) => {}
        }
    }

    /// The server is gone: nobody answers what it was asked.
    fn mourn(&mut self) {
        self.let_go_of_all();
        self.answers.append(&mut self.held);
        let answers = &mut self.answers;
        self.link.asked().give_up_reads(|ticket, width| answers.push_back((ticket, width.all_ones())));
    }

    /// A register of the server's; `None` where the access lies behind its region's end.
    fn access(&self, at: BarAddress, width: Width) -> Option<RegionAccess> {
        let region = self.regions.get(usize::from(at.bar))?;
        let inside = at.offset.checked_add(width.bytes()).is_some_and(|end| end <= region.size);
        inside.then_some(RegionAccess { offset: at.offset, region: u32::from(at.bar), count: width.bytes() as u32 })
    }

    fn config_write(&mut self, at: u8, value: u16) {
        let access = RegionAccess { offset: u64::from(at), region: CONFIG_REGION, count: 2 };
        self.link.ask(Ask::Config, [bytes(&access), &value.to_le_bytes()], Nanos::now());
    }

    /// Counts all that the server may have written as written: it maps the memory itself, so nobody sees what it writes.
    fn mark(&mut self) {
        self.windows.values().filter_map(|window| window.shared.as_ref()).chain(&self.leaving).for_each(SharedWindow::mark_all);
        self.marked = Nanos::now();
    }

    fn mark_sometimes(&mut self) {
        if self.shares() && Nanos::now().since(self.marked) >= MARK_EVERY {
            self.mark();
        }
    }

    /// Whether the server has a descriptor of guest memory.
    fn shares(&self) -> bool {
        !self.leaving.is_empty() || self.windows.values().any(|window| window.shared.is_some())
    }

    /// The server is out of what was unmapped: whoever waits for that memory has it.
    fn let_go(&mut self) {
        for window in self.leaving.drain(..) {
            window.mark_all();
        }
    }

    /// A server that is gone and had guest memory is out of it when it has closed its end.
    fn let_go_of_all(&mut self) {
        if self.shares() && self.link.has_left() {
            self.leaving.extend(std::mem::take(&mut self.windows).into_values().filter_map(|window| window.shared));
            self.let_go();
        }
    }

    fn unmap(&mut self, iova: u64, Window { len, shared }: Window) {
        let unmap = DmaUnmap { argsz: size_of::<DmaUnmap>() as u32, flags: 0, address: iova, size: len };
        self.leaving.extend(shared);
        self.unmapping += 1;
        self.link.ask(Ask::Unmap, [bytes(&unmap), &[]], Nanos::now());
    }

    /// Carries on with what the server asks until `done`, or it is gone.
    fn wait(&mut self, bus: &mut dyn Bus, done: impl Fn(&Self) -> bool) {
        let mut quiet_since = Nanos::now();
        while !done(self) && self.link.down().is_none() {
            let busy = self.advance(bus);
            let now = Nanos::now();
            self.link.check_deadline(now);
            if busy {
                quiet_since = now;
            } else if now.since(quiet_since) > SPIN {
                let mut fds = [PollFd::from_borrowed_fd(self.signals.fd(), PollFlags::IN)];
                let moment = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
                if let Err(errno) = rustix::event::poll(&mut fds, Some(&moment)) {
                    tracing::debug!(%errno, "a wait for the server was cut short");
                }
            }
        }
        if self.link.down().is_some() {
            self.mourn();
        }
    }
}
