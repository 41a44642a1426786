//! An NVMe 1.4 controller with one namespace, as a [`Backend`]: this file has the object that owns everything and the calls of a session.
//!
//! A guest stores 17 to BAR0 + 0x1018: `control` finds submission queue 3's tail doorbell, `fetch` gets slots 9 to 16 with one DMA and `engine` takes
//! each command as far as it gets, `completion` posts the entries and then raises vector 3 once. What is missing on the way
//! (a DMA, the media, room) leaves the command in its slot until `dma_done` or `poll` brings it.
//!
//! ```text
//!   doorbell ─► fetch ─► parse ─► admin | io ─► PRP walk ─► DMA straight to or from the image          ─► completion entry ─► vector
//!                                                        └► job on guest pages (or a bounce buffer) ─┘
//! ```

mod admin;
pub mod command;
mod completion;
mod control;
mod counters;
mod engine;
mod events;
mod features;
mod fetch;
mod identify;
mod io;
mod log_pages;
pub mod media;
pub mod prp;
mod queues;
pub mod registers;
mod rest;
mod scratch;
mod slots;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use farbus_transport::{Access, LocalRegion, Memory, MemoryError, Nanos};

use crate::address::{BarAddress, Width};
use crate::attachment::Activity;
use crate::backend::{AttachError, Backend, Bus, DmaFault, DmaTag, InterruptMode, ResetKind};
use crate::device::{BarDescription, BarKind, Constant, DeviceDescription, MsixLocation};
use crate::holder::HolderNote;
use crate::journal::Journal;

pub use counters::Counters;
use events::Events;
use features::Features;
use log_pages::ErrorLog;
use media::{BLOCK_BYTES, Job, MAX_JOBS, Media, MediaError, MemoryMedia};
use queues::{CompletionQueue, SubmissionQueue};
use registers::Registers;
use scratch::Scratch;
use slots::{SLOTS, Slots};

/// IO queue pairs that a driver can have; their identifiers are 1 to 64.
pub const IO_QUEUES: u16 = 64;
/// MSI-X vectors: one for the admin queue and one for each IO completion queue.
pub const VECTORS: u16 = IO_QUEUES + 1;
/// Bytes that one command moves at most (MDTS 8 in units of 4 KiB).
pub const MAX_TRANSFER_BYTES: u32 = 1 << 20;

const QUEUE_COUNT: u16 = IO_QUEUES + 1;
/// Commands that one call of the session begins at most, so that no register access waits for more.
const COMMANDS_PER_CALL: u32 = 64;
/// Bytes after which a call leaves further commands to the next poll.
const BYTES_PER_CALL: u64 = 1 << 20;

/// How a namespace is lent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NvmeOptions {
    /// Writes are refused with the write-protected status.
    pub read_only: bool,
    /// IO commands complete no earlier than this after the controller began them; zero for as fast as possible.
    pub latency: Duration,
    /// Serial number, up to 20 printable ASCII characters; made from the image's identity where `None`.
    pub serial: Option<String>,
}

/// What the controller may do at present.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Life {
    /// CC.EN is 0.
    #[default]
    Disabled,
    /// CSTS.RDY is 1.
    Ready,
    /// CSTS.CFS is 1: nothing is processed until the driver resets.
    Failed,
    /// CC.EN went to 0 and DMA or the media is still at work.
    Resetting,
}

/// The controller.
pub struct Nvme {
    description: DeviceDescription,
    options: NvmeOptions,
    identity: identify::Identity,
    media: Box<dyn Media>,
    counters: Counters,

    life: Life,
    fenced: bool,
    /// Nothing more is fetched.
    paused: bool,
    journal: Journal,
    /// Counts lives, so that nothing of an earlier one is taken for one of this.
    epoch: u32,
    registers: Registers,
    features: Features,
    events: Events,
    errors: ErrorLog,

    submission: Vec<SubmissionQueue>,
    completion: Vec<CompletionQueue>,
    /// Submission queues with commands to fetch and no fetch under way, one bit each.
    ready: u128,
    /// The queue whose turn it is.
    turn: u16,

    slots: Slots,
    scratch: Scratch,
    /// The image, where DMA reaches it.
    image: Option<LocalRegion>,
    /// Slots that lack a buffer or a job, or whose turn comes in the next call.
    waiting: VecDeque<u32>,
    /// Something that a waiting slot may need was given back.
    released: bool,
    timers: BinaryHeap<Reverse<(Nanos, u32)>>,
    /// Bytes moved in this call.
    call_bytes: u64,

    #[expect(clippy::vec_box, reason = "a job is handed to the workers and back: 8 bytes move, not the job")]
    jobs: Vec<Box<Job>>,
    jobs_running: usize,
    /// DMAs pending, and slots taken for entries that are being fetched.
    dmas: usize,
    slots_reserved: u32,
    /// The flush of a shutdown is still to be started.
    shutdown_flush: bool,

    mode: InterruptMode,
    /// Vectors with entries not announced, one bit each.
    raised: u128,
    pin: bool,
}

impl std::fmt::Debug for Nvme {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nvme")
            .field("name", &self.description.name)
            .field("life", &self.life)
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

impl Nvme {
    /// A controller over an image file or a block device; a sealed memfd is mapped ([`media::open`]).
    ///
    /// # Errors
    /// [`MediaError`] where the image cannot be lent.
    pub fn open(path: &Path, options: NvmeOptions) -> Result<Self, MediaError> {
        let media = media::open(path, options.read_only)?;
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
        Self::over(&name, media, options)
    }

    /// A controller over an image in memory: its data goes by DMA straight between image and guest.
    ///
    /// # Errors
    /// [`MediaError`] where the image has no whole number of blocks, or cannot be written and is not lent read-only.
    pub fn in_memory(image: Arc<Memory>, options: NvmeOptions) -> Result<Self, MediaError> {
        if !image.writable() && !options.read_only {
            return Err(MediaError::Memory(MemoryError::ReadOnly));
        }
        Self::over("memory", Box::new(MemoryMedia::new(image)?), options)
    }

    /// A controller over any media; `name` is for people.
    ///
    /// # Errors
    /// [`MediaError::Memory`] where the controller's own memory cannot be made.
    pub fn over(name: &str, media: Box<dyn Media>, options: NvmeOptions) -> Result<Self, MediaError> {
        let short: String = name.chars().filter(|c| !c.is_control()).take(60).collect();
        let identity = identify::Identity::new(media.identity(), options.serial.as_deref());
        Ok(Self {
            description: description(format!("nvme {short}"), identity.serial()),
            identity,
            features: Features::new(media.volatile_cache() && !options.read_only),
            options,
            media,
            counters: Counters::default(),
            life: Life::Disabled,
            fenced: false,
            paused: false,
            journal: Journal::new(),
            epoch: 0,
            registers: Registers::default(),
            events: Events::default(),
            errors: ErrorLog::default(),
            submission: vec![SubmissionQueue::ABSENT; usize::from(QUEUE_COUNT)],
            completion: vec![CompletionQueue::ABSENT; usize::from(QUEUE_COUNT)],
            ready: 0,
            turn: 0,
            slots: Slots::new(),
            scratch: Scratch::new()?,
            image: None,
            waiting: VecDeque::with_capacity(SLOTS as usize),
            released: false,
            timers: BinaryHeap::with_capacity(SLOTS as usize),
            call_bytes: 0,
            jobs: (0..MAX_JOBS).map(|_| Box::new(Job::with_room())).collect(),
            jobs_running: 0,
            dmas: 0,
            slots_reserved: 0,
            shutdown_flush: false,
            mode: InterruptMode::Pin,
            raised: 0,
            pin: false,
        })
    }

    /// What has happened since the controller was made.
    pub const fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Logical blocks of the namespace.
    pub fn blocks(&self) -> u64 {
        self.media.len() / BLOCK_BYTES
    }

    /// Whether commands may go on.
    fn running(&self) -> bool {
        self.life == Life::Ready && !self.fenced
    }

    fn register_memory(&mut self, bus: &mut dyn Bus) -> Result<(), AttachError> {
        let region = bus.register(Arc::clone(self.scratch.memory()), Access::READ_WRITE)?;
        let image = match self.media.memory() {
            Some(image) if self.options.read_only => Some(bus.register(Arc::clone(image), Access::READ)?),
            Some(image) => Some(bus.register(Arc::clone(image), Access::READ_WRITE)?),
            None => None,
        };
        self.scratch.set_region(Some(region));
        self.image = image;
        Ok(())
    }

    fn page_bytes(&self) -> u32 {
        1 << self.registers.configuration.page_shift()
    }
}

fn description(name: String, serial: String) -> DeviceDescription {
    let mut constants = registers::CAP.to_le_bytes().to_vec();
    constants.extend_from_slice(&registers::VS.to_le_bytes());
    DeviceDescription {
        name,
        vendor_id: 0x1b36,
        device_id: 0x0010,
        subsystem_vendor_id: 0x1af4,
        subsystem_id: 0x1100,
        revision: 2,
        class_code: 0x01_0802,
        bars: [
            Some(BarDescription { kind: BarKind::Memory64, size: registers::BAR_BYTES, prefetchable: false }),
            None,
            None,
            None,
            None,
            None,
        ],
        pin: true,
        msi_vectors: 0,
        msix: Some(MsixLocation {
            vectors: VECTORS,
            table_bar: 0,
            table_offset: registers::MSIX_TABLE,
            pba_bar: 0,
            pba_offset: registers::MSIX_PENDING,
        }),
        dma_bits: 64,
        constants: vec![Constant { bar: 0, offset: registers::offset::CAP, bytes: constants }],
        serial,
    }
}

impl Backend for Nvme {
    fn description(&self) -> &DeviceDescription {
        &self.description
    }

    fn attach(&mut self, bus: &mut dyn Bus) -> Result<(), AttachError> {
        self.register_memory(bus)?;
        self.fenced = false;
        self.power_on();
        Ok(())
    }

    fn detach(&mut self) {
        self.fence();
        // Nobody will say that the pending DMAs ended: their regions are gone, and with them every access to the guest but the workers'.
        self.dmas = 0;
        self.await_media();
        self.power_on();
        self.scratch.set_region(None);
        self.image = None;
    }

    fn bar_read(&mut self, at: BarAddress, width: Width, _bus: &mut dyn Bus) -> u64 {
        if at.bar == 0 && at.offset < registers::DOORBELLS {
            return self.registers.read(at.offset, width);
        }
        // Doorbells read as zero (section 3.1.24 leaves it open); the MSI-X table belongs to the function.
        self.counters.ignored_accesses += 1;
        0
    }

    fn bar_write(&mut self, at: BarAddress, width: Width, value: u64, bus: &mut dyn Bus) {
        self.call_bytes = 0;
        if at.bar == 0 {
            self.register_write(at.offset, width, value, bus);
        } else {
            self.counters.ignored_accesses += 1;
        }
        self.announce(bus);
    }

    fn dma_done(&mut self, tag: DmaTag, result: Result<(), DmaFault>, bus: &mut dyn Bus) {
        self.call_bytes = 0;
        // Interrupts wait for the poll that follows, so that one vector announces the completions of many DMAs.
        self.dma_ended(tag, result, bus);
    }

    fn poll(&mut self, bus: &mut dyn Bus) -> Activity {
        self.call_bytes = 0;
        let worked = self.background(bus);
        self.announce(bus);
        if worked || self.has_work() {
            return Activity::Busy;
        }
        // A controller that failed or is fenced completes nothing, however long it waits.
        let next = self.timers.peek().filter(|_| self.running());
        Activity::Idle(next.map(|Reverse((due, _))| due.since(bus.now())))
    }

    fn arm(&mut self) -> bool {
        !self.has_work() && self.media.arm()
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.media.wake_fd()
    }

    fn set_interrupt_mode(&mut self, mode: InterruptMode, bus: &mut dyn Bus) {
        if self.mode == mode {
            return;
        }
        self.mode = mode;
        if mode != InterruptMode::Pin && self.pin {
            self.pin = false;
            bus.set_pin(false);
        }
        self.announce(bus);
    }

    fn fence(&mut self) {
        self.fenced = true;
        self.cancel_jobs();
        self.reap_without_effect();
    }

    /// Falls in `dma_done` and, for the workers' jobs, in `poll`.
    fn in_flight(&self) -> usize {
        self.dmas + self.jobs_running
    }

    fn reset(&mut self, _kind: ResetKind, bus: &mut dyn Bus) {
        self.fence();
        debug_assert!(self.in_flight() == 0, "reset with accesses to the guest under way");
        self.dmas = 0;
        self.await_media();
        self.power_on();
        self.fenced = false;
        self.counters.resets += 1;
        if self.pin {
            self.pin = false;
            bus.set_pin(false);
        }
    }

    fn pause(&mut self) -> bool {
        self.paused = true;
        true
    }

    fn is_at_rest(&self) -> bool {
        self.has_come_to_rest()
    }

    fn resume(&mut self, bus: &mut dyn Bus) {
        self.paused = false;
        self.call_bytes = 0;
        self.pump(bus);
        self.announce(bus);
    }

    fn park(&mut self) {
        debug_assert!(self.has_come_to_rest(), "parked in the middle of something");
        self.scratch.set_region(None);
        self.image = None;
    }

    fn unpark(&mut self, bus: &mut dyn Bus) -> Result<(), AttachError> {
        self.register_memory(bus)
    }

    fn holder(&self) -> Option<HolderNote> {
        self.media.holder()
    }

    fn note_holder(&mut self, note: HolderNote) {
        self.media.note_holder(note);
    }

    fn journal(&self) -> Option<&Journal> {
        Some(&self.journal)
    }
}
