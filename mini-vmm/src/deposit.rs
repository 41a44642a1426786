//! A machine with its function in a bank: frozen for as long as it takes to scan and to save, deposited while its guest runs on, and taken out elsewhere.
//!
//! 16 MiB of which the guest wrote 30 pages and the device 12 since the last deposit: the device comes to rest, 42 pages are copied, the guest runs on, and only
//! then are those pages hashed and stored. The first deposit copies all of it.
//!
//! A machine is four sections: `memory`, `cpu` (whatever the VMM says of its CPUs), `function.nvme0` (the function's state, [`farbus_pci_shim::state`]).

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use farbus_machine_bank::bank::FindError;
use farbus_machine_bank::deposit::DepositReport;
use farbus_machine_bank::keep::lost_pages;
use farbus_machine_bank::lazy::Area;
use farbus_machine_bank::track::{DirtyPages, WriteTracker};
use farbus_machine_bank::{Bank, Changes, DepositOptions, Entry, PAGE, Parent, SectionKind, Source};
use farbus_pci_shim::{Embedded, FunctionState, IrqSink};
use farbus_remote_dma::GuestMemory;
use farbus_transport::Memory;

/// The section of guest memory.
pub const MEMORY: &str = "memory";
/// The section of the CPUs.
pub const CPU: &str = "cpu";
/// The section of the function.
pub const FUNCTION: &str = "function.nvme0";
/// How long a device may take to come to rest.
const REST: Duration = Duration::from_secs(10);

/// Which pages changed since the last deposit, by whoever can tell.
pub struct Depositor<'a> {
    area: &'a Area,
    /// The very memory that the device has windows of: its dirty log is kept by it.
    memory: Arc<Memory>,
    /// `None`: nobody tells what the CPUs wrote, so all of it may have changed.
    tracker: Option<WriteTracker<'a>>,
    pages: DirtyPages,
    last: Option<String>,
}

/// How long the machine stood still, by what it waited for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pause {
    /// For the device to end what it had begun.
    pub rest: Duration,
    /// For the pages that were written to be found.
    pub scan: Duration,
    /// For the states of the CPUs and of the function.
    pub save: Duration,
    /// For the pages to be copied.
    pub copy: Duration,
}

impl Pause {
    /// All of it.
    pub fn total(&self) -> Duration {
        self.rest + self.scan + self.save + self.copy
    }
}

/// A machine at a moment, as far as it differs from its last deposit.
pub struct Frozen {
    pages: DirtyPages,
    /// The marked pages one behind the other, and for each 64 pages how many came before.
    copies: Vec<u8>,
    before: Vec<u64>,
    len: u64,
    cpu: Vec<u8>,
    function: Vec<u8>,
    parent: Option<String>,
    /// How long that took.
    pub pause: Pause,
}

impl<'a> Depositor<'a> {
    /// Of the machine whose memory is `area`, of which the device has windows ([`Area::share`]). Where the kernel does not tell writes, every deposit looks at all pages.
    ///
    /// # Errors
    /// The area cannot be shared with a device.
    pub fn new(area: &'a Area) -> Result<Self> {
        let memory = area.share().context("the machine's memory cannot be shared with a device")?;
        let tracker = WriteTracker::begin(area);
        let tracker =
            tracker.inspect_err(|error| tracing::info!(%error, "writes are not tracked: deposits look at all of the memory")).ok();
        let mut pages = DirtyPages::none(area.len());
        pages.mark_all(0..u64::MAX);
        Ok(Self { area, memory, tracker, pages, last: None })
    }

    /// Whether only what changed is looked at.
    pub fn tracks(&self) -> bool {
        self.tracker.is_some()
    }

    /// Marks what `bank` has lost of the last deposit, so that the next one brings it back; how many pages that are. Where that deposit is not there any more, all
    /// pages are to be deposited. To be called before each freeze.
    ///
    /// # Errors
    /// The bank cannot be read. What is marked is what was.
    pub fn mark_lost(&mut self, bank: &Bank) -> Result<u64> {
        let before = self.pages.count();
        match self.lost(bank)? {
            Some(lost) => lost.into_iter().for_each(|page| self.pages.mark(page)),
            None => {
                self.last = None;
                self.pages.mark_all(0..u64::MAX);
            }
        }
        Ok(self.pages.count() - before)
    }

    /// What the bank has lost of the last deposit; `None`: all of it.
    fn lost(&self, bank: &Bank) -> Result<Option<Vec<u64>>> {
        let Some(last) = &self.last else { return Ok(Some(Vec::new())) };
        match bank.find(last) {
            Ok(entry) => Ok(Some(lost_pages(bank, &entry, MEMORY)?)),
            Err(FindError::None(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The same for a machine that is frozen and has stood still since, its function too: its memory is as it was, and what the bank has lost meanwhile is copied
    /// from it.
    ///
    /// # Errors
    /// The bank cannot be read, or the host's fault. What is frozen is what was.
    pub fn add_lost(&self, bank: &Bank, frozen: &mut Frozen) -> Result<u64> {
        let mut pages = frozen.pages.clone();
        let lost = self.lost(bank)?;
        match &lost {
            Some(lost) => lost.iter().for_each(|page| pages.mark(*page)),
            None => pages.mark_all(0..u64::MAX),
        }
        let more = pages.count() - frozen.pages.count();
        if more > 0 {
            (frozen.copies, frozen.before) = self.copy(&pages)?;
            frozen.pages = pages;
        }
        if lost.is_none() {
            frozen.parent = None;
        }
        Ok(more)
    }

    /// The machine at this moment. Its CPUs stand still, by the caller's doing; `cpu` says what they are like. The device goes on when this returns.
    ///
    /// # Errors
    /// The device does not come to rest, or the host's fault. The machine can go on.
    pub fn freeze<S: IrqSink, M: GuestMemory>(
        &mut self,
        device: &mut Embedded<S, M>,
        cpu: impl FnOnce() -> Result<Vec<u8>>,
    ) -> Result<Frozen> {
        let began = Instant::now();
        device.quiesce(REST).context("the device does not come to rest")?;
        let frozen = self.freeze_at_rest(device, cpu, began);
        device.resume();
        frozen
    }

    /// What changed since the last time, while the machine runs: pages may be of any moment since, and those that are written meanwhile come again the next time.
    ///
    /// # Errors
    /// The host's fault.
    pub fn look_ahead<S: IrqSink, M: GuestMemory>(&mut self, device: &mut Embedded<S, M>) -> Result<Frozen> {
        self.scan(device)?;
        // The marks are taken: what is written from here on is marked again.
        let (copies, before) = self.copy(&self.pages)?;
        let pages = std::mem::replace(&mut self.pages, DirtyPages::none(self.area.len()));
        let (cpu, function, parent) = (Vec::new(), Vec::new(), None);
        Ok(Frozen { pages, copies, before, len: self.area.len(), cpu, function, parent, pause: Pause::default() })
    }

    /// As [`Depositor::freeze`], of a machine that goes elsewhere: its function leaves, and the device is kept for it for `lease`.
    ///
    /// # Errors
    /// As [`Depositor::freeze`]; where only the leaving failed, the machine can go on.
    pub fn freeze_and_leave<S: IrqSink, M: GuestMemory>(
        &mut self,
        device: &mut Embedded<S, M>,
        lease: Duration,
        cpu: impl FnOnce() -> Result<Vec<u8>>,
    ) -> Result<Frozen> {
        let began = Instant::now();
        device.quiesce(REST).context("the device does not come to rest")?;
        let frozen = self.freeze_at_rest(device, cpu, began);
        let left = frozen.and_then(|frozen| match device.leave(lease) {
            Ok(()) => Ok(frozen),
            Err(error) => {
                self.failed(&frozen);
                Err(error.into())
            }
        });
        if left.is_err() {
            device.resume();
        }
        left
    }

    fn freeze_at_rest<S: IrqSink, M: GuestMemory>(
        &mut self,
        device: &mut Embedded<S, M>,
        cpu: impl FnOnce() -> Result<Vec<u8>>,
        began: Instant,
    ) -> Result<Frozen> {
        let at_rest = Instant::now();
        self.scan(device)?;
        let scanned = Instant::now();
        let (cpu, function) = (cpu()?, device.save()?);
        let saved = Instant::now();
        let (copies, before) = self.copy(&self.pages)?;
        let copied = Instant::now();
        let pages = std::mem::replace(&mut self.pages, DirtyPages::none(self.area.len()));
        let pause = Pause { rest: at_rest - began, scan: scanned - at_rest, save: saved - scanned, copy: copied - saved };
        Ok(Frozen { pages, copies, before, len: self.area.len(), cpu, function, parent: self.last.clone(), pause })
    }

    /// Marks what was written, by the CPUs and by the device.
    fn scan<S: IrqSink, M: GuestMemory>(&mut self, device: &mut Embedded<S, M>) -> Result<()> {
        match &self.tracker {
            Some(tracker) => {
                // Until the scan has succeeded nothing is known.
                let scanned = tracker.take(&mut self.pages);
                if scanned.is_err() {
                    self.pages.mark_all(0..u64::MAX);
                }
                scanned.context("cannot tell what the guest wrote")?;
            }
            None => self.pages.mark_all(0..u64::MAX),
        }
        if let Some(log) = device.function_mut().dirty_log(&self.memory) {
            log.take(|page| self.pages.mark(page));
        }
        Ok(())
    }

    fn copy(&self, pages: &DirtyPages) -> Result<(Vec<u8>, Vec<u64>)> {
        let mut copies = vec![0; usize::try_from(pages.count())? * PAGE];
        let mut before = Vec::new();
        let mut at = 0;
        for page in 0..self.area.len().div_ceil(PAGE as u64) {
            if page % 64 == 0 {
                before.push(at);
            }
            if pages.is_marked(page) {
                let offset = page * PAGE as u64;
                let len = (self.area.len() - offset).min(PAGE as u64) as usize;
                let place = at as usize * PAGE;
                let place = copies.get_mut(place..place + len).context("a page too many")?;
                self.area.memory().read(offset, place)?;
                at += 1;
            }
        }
        Ok((copies, before))
    }

    /// The machine came out of the bank as this deposit, and what is known to have changed since is all that changed.
    pub fn follow(&mut self, entry: &Entry) {
        self.last = Some(entry.root.to_string());
        self.pages.clear();
    }

    /// `frozen` is in the bank: the next deposit is what differs from it.
    pub fn done(&mut self, report: &DepositReport) {
        self.last = Some(report.root.clone());
    }

    /// `frozen` is not in the bank, and what it had is still to be deposited.
    pub fn failed(&mut self, frozen: &Frozen) {
        let pages = self.area.len().div_ceil(PAGE as u64);
        (0..pages).filter(|page| frozen.pages.is_marked(*page)).for_each(|page| self.pages.mark(page));
    }
}

impl Frozen {
    /// Pages that are read.
    pub fn pages(&self) -> u64 {
        self.pages.count()
    }

    /// Each page that is read, in order, with its bytes; the last one of memory that ends within it is filled up with zeros.
    ///
    /// # Errors
    /// What `each` fails with.
    pub fn each_page(&self, mut each: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        let marked = (0..self.len.div_ceil(PAGE as u64)).filter(|page| self.pages.is_marked(*page));
        marked.zip(self.copies.chunks(PAGE)).try_for_each(|(page, bytes)| each(page, bytes))
    }

    /// The states of the CPUs and of the function.
    pub fn states(&self) -> (&[u8], &[u8]) {
        (&self.cpu, &self.function)
    }

    /// Deposits it as `machine`. Takes its time, while the machine runs on.
    ///
    /// # Errors
    /// Nothing was deposited: tell [`Depositor::failed`].
    pub fn put(&self, bank: &Bank, machine: &str) -> Result<DepositReport> {
        let parent = self.parent.clone().map_or(Parent::None, Parent::Named);
        let changes = if self.parent.is_some() { self.pages.changes() } else { Changes::HashAll };
        let mut deposit = bank.deposit(machine, &DepositOptions { parent })?;
        deposit.section(SectionKind::Memory, MEMORY, self, changes, &|_| {})?;
        deposit.section(SectionKind::DeviceState, CPU, &&self.cpu[..], Changes::HashAll, &|_| {})?;
        deposit.section(SectionKind::DeviceState, FUNCTION, &&self.function[..], Changes::HashAll, &|_| {})?;
        Ok(deposit.commit()?)
    }
}

/// The pages that were copied; others must not be read, because the guest may have changed them since.
impl Source for Frozen {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let (page, inside) = (at / PAGE as u64, (at % PAGE as u64) as usize);
            let len = (PAGE - inside).min(buf.len() - done);
            let from = self.place(page)? + inside;
            let (Some(to), Some(from)) = (buf.get_mut(done..done + len), self.copies.get(from..from + len)) else {
                return Err(io::ErrorKind::UnexpectedEof.into());
            };
            to.copy_from_slice(from);
            done += len;
        }
        Ok(())
    }
}

impl Frozen {
    /// Where in the copies a page is.
    fn place(&self, page: u64) -> io::Result<usize> {
        if !self.pages.is_marked(page) {
            return Err(io::Error::other(format!("page {page} of a frozen machine was not copied")));
        }
        let earlier = (page / 64 * 64..page).filter(|page| self.pages.is_marked(*page)).count() as u64;
        let before = self.before.get((page / 64) as usize).copied().ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok((before + earlier) as usize * PAGE)
    }
}

/// A machine taken out of a bank.
pub struct Withdrawn {
    /// Its memory, all of it there.
    pub area: Area,
    /// What the VMM had said of its CPUs.
    pub cpu: Vec<u8>,
    /// The state of its function.
    pub function: Vec<u8>,
    /// Which deposit it is.
    pub entry: Entry,
}

impl Withdrawn {
    /// `machine` as people write it: `vm7`, `vm7@3`.
    ///
    /// # Errors
    /// There is no such machine, it is damaged, or none of a VMM like this one.
    pub fn from_bank(bank: &Bank, machine: &str) -> Result<Self> {
        let entry = bank.find(machine)?;
        let withdrawal = bank.withdraw(&entry)?;
        let len = |name| {
            let section = withdrawal.manifest().section(name).and_then(|at| withdrawal.manifest().head.sections.get(at));
            section.map(|section| section.len).with_context(|| format!("{machine} has no section {name}"))
        };
        let area = Area::shared(len(MEMORY)?)?;
        let file = |memory: &Memory| -> Result<File> {
            let (file, _) = memory.file().context("memory without a descriptor")?;
            Ok(file.try_clone_to_owned()?.into())
        };
        withdrawal.section(MEMORY, &file(area.memory())?, &|_| {})?;
        let bytes = |name| -> Result<Vec<u8>> {
            let len = len(name)?;
            if len > farbus_pci_shim::state::MOST_BYTES as u64 {
                bail!("section {name} of {machine} has {len} bytes");
            }
            let memory = Memory::memfd("section", len.max(1))?;
            let mut bytes = vec![0; usize::try_from(len)?];
            if len > 0 {
                withdrawal.section(name, &file(&memory)?, &|_| {})?;
                memory.read(0, &mut bytes)?;
            }
            Ok(bytes)
        };
        let (cpu, function) = (bytes(CPU)?, bytes(FUNCTION)?);
        Ok(Self { area, cpu, function, entry })
    }

    /// The state of its function, parsed.
    ///
    /// # Errors
    /// It is none that this version reads.
    pub fn state(&self) -> Result<FunctionState> {
        Ok(FunctionState::parse(&self.function)?)
    }
}
