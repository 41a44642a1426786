//! A device that does what a test tells it, behind a real server on a real socket.
//!
//! `device.play([Step::Store { .. }, Step::Raise(3)])` has the device ask for a store and raise vector 3 in its next poll, in that order; the
//! test then sees, as a client, when each arrives.
#![allow(dead_code, unused_imports, reason = "each test program uses a part")]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use farbus_pci_shim::vfio_user::client::Client;
use farbus_pci_shim::vfio_user::{ClientInterrupts, Ended, Options, Served, Server, StopHandle};
use farbus_pci_shim::{AccessError, MediationKind, MediationRequest};
use farbus_remote_dma::dirty_log::DirtyLog;
use farbus_remote_dma::{
    Activity, Attachment, AttachmentError, BarAddress, BarDescription, BarKind, DeviceDescription, Host, InterruptMode, Iova,
    MapError, Mediation, MediationAnswer, MsixLocation, ResetKind, Ticket, Width, Window, WindowMemory,
};
use farbus_transport::{CloseReason, Memory, Nanos};
use rustix::event::{EventfdFlags, eventfd};

mod memory;
pub use memory::{Guest, SharedGuest};

pub const DEADLINE: Duration = Duration::from_secs(5);

#[derive(Clone, Debug)]
pub enum Step {
    Fetch { iova: u64, len: u32 },
    Store { iova: u64, bytes: Vec<u8>, polled: bool },
    Raise(u16),
    Pin(bool),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Fetched(Vec<u8>),
    Stored,
    Fault,
}

#[derive(Default)]
pub struct State {
    pub bar0: Vec<u8>,
    pub config: Vec<u8>,
    pub windows: Vec<Window>,
    pub most_mappings: usize,
    pub steps: VecDeque<Step>,
    pub answers: Vec<(u32, Answer)>,
    pub resets: usize,
    pub proven: usize,
    pub modes: Vec<InterruptMode>,
    pub gone: Option<CloseReason>,
    /// Claims to hold interrupts back itself, which it does not.
    pub claims_order: bool,
    /// Takes no window into a file, as a lender does whose borrower's memory is not sealed.
    pub refuses_files: bool,
    /// Windows refused for that.
    pub refused: usize,
}

pub struct Scripted {
    description: DeviceDescription,
    interrupts: ClientInterrupts,
    state: Arc<Mutex<State>>,
    wake: Arc<OwnedFd>,
    mediations: VecDeque<MediationRequest>,
    next_ticket: u32,
}

#[derive(Clone)]
pub struct Handle {
    state: Arc<Mutex<State>>,
    wake: Arc<OwnedFd>,
}

impl Handle {
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn play(&self, steps: impl IntoIterator<Item = Step>) {
        self.state().steps.extend(steps);
        rustix::io::write(&self.wake, &1_u64.to_ne_bytes()).unwrap();
    }

    pub fn go(&self, reason: CloseReason) {
        self.state().gone = Some(reason);
        rustix::io::write(&self.wake, &1_u64.to_ne_bytes()).unwrap();
    }

    pub fn wait(&self, what: &str, holds: impl Fn(&State) -> bool) {
        let start = Instant::now();
        while !holds(&self.state()) {
            assert!(start.elapsed() < DEADLINE, "{what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

pub fn description() -> DeviceDescription {
    let mut bars = [None; 6];
    bars[0] = Some(BarDescription { kind: BarKind::Memory64, size: 16 << 10, prefetchable: false });
    bars[2] = Some(BarDescription { kind: BarKind::Memory32, size: 4 << 10, prefetchable: false });
    DeviceDescription {
        name: "scripted".into(),
        vendor_id: 0x1b36,
        device_id: 0x0010,
        subsystem_vendor_id: 0,
        subsystem_id: 0,
        revision: 0,
        class_code: 0x01_0802,
        bars,
        pin: true,
        msi_vectors: 4,
        msix: Some(MsixLocation { vectors: 65, table_bar: 0, table_offset: 0x2000, pba_bar: 0, pba_offset: 0x3000 }),
        dma_bits: 64,
        constants: vec![],
        serial: String::new(),
    }
}

impl Scripted {
    pub fn new() -> (Self, Handle) {
        let state = Arc::new(Mutex::new(State {
            bar0: vec![0; 16 << 10],
            config: (0..4096).map(|i| (i % 251) as u8).collect(),
            ..State::default()
        }));
        let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap());
        let description = description();
        let device = Self {
            interrupts: ClientInterrupts::new(&description),
            description,
            state: Arc::clone(&state),
            wake: Arc::clone(&wake),
            mediations: VecDeque::new(),
            next_ticket: 0,
        };
        (device, Handle { state, wake })
    }

    fn mediate(&mut self, iova: u64, kind: MediationKind) {
        self.next_ticket += 1;
        self.mediations.push_back(MediationRequest { ticket: Ticket(self.next_ticket), iova: Iova(iova), kind });
    }
}

fn range(state: &State, at: BarAddress, width: Width) -> Result<std::ops::Range<usize>, AccessError> {
    let inside = at.bar == 0 && at.offset.checked_add(width.bytes()).is_some_and(|end| end <= state.bar0.len() as u64);
    if !inside || !width.aligned(at.offset) {
        return Err(AccessError::NoBar { bar: at.bar });
    }
    Ok(at.offset as usize..(at.offset + width.bytes()) as usize)
}

impl Served for Scripted {
    fn description(&self) -> &DeviceDescription {
        &self.description
    }

    fn config_read(&mut self, offset: u16, into: &mut [u8]) -> Result<(), AccessError> {
        let from = usize::from(offset);
        into.copy_from_slice(
            self.state.lock().unwrap().config.get(from..from + into.len()).ok_or(AccessError::Config { offset, len: from })?,
        );
        Ok(())
    }

    fn config_write(&mut self, offset: u16, bytes: &[u8]) -> Result<(), AccessError> {
        let from = usize::from(offset);
        let mut state = self.state.lock().unwrap();
        state.config.get_mut(from..from + bytes.len()).ok_or(AccessError::Config { offset, len: from })?.copy_from_slice(bytes);
        Ok(())
    }

    fn bar_read(&mut self, at: BarAddress, width: Width) -> Result<u64, AccessError> {
        let state = self.state.lock().unwrap();
        let range = range(&state, at, width)?;
        if state.gone.is_some() {
            return Ok(width.all_ones());
        }
        let mut bytes = [0; 8];
        bytes[..range.len()].copy_from_slice(&state.bar0[range]);
        Ok(u64::from_le_bytes(bytes))
    }

    fn bar_write(&mut self, at: BarAddress, width: Width, value: u64) -> Result<(), AccessError> {
        let mut state = self.state.lock().unwrap();
        let range = range(&state, at, width)?;
        let len = range.len();
        state.bar0[range].copy_from_slice(&value.to_le_bytes()[..len]);
        Ok(())
    }

    fn flush(&mut self) {}

    fn map(&mut self, window: Window) -> Result<(), MapError> {
        let mut state = self.state.lock().unwrap();
        if state.refuses_files && matches!(window.memory, WindowMemory::Mapped { .. }) {
            state.refused += 1;
            return Err(AttachmentError::Refused("the memory is not sealed").into());
        }
        state.windows.push(window);
        let mut distinct: Vec<*const Memory> = vec![];
        for window in &state.windows {
            if let WindowMemory::Mapped { memory, .. } = &window.memory
                && !distinct.contains(&Arc::as_ptr(memory))
            {
                distinct.push(Arc::as_ptr(memory));
            }
        }
        state.most_mappings = state.most_mappings.max(distinct.len());
        Ok(())
    }

    fn unmap(&mut self, iova: Iova, len: u64) -> Result<(), MapError> {
        let inside = |window: &Window| window.iova >= iova && window.iova.0 + window.len <= iova.0 + len;
        self.state.lock().unwrap().windows.retain(|window| !inside(window));
        Ok(())
    }

    fn prove(&mut self, memory: &Arc<Memory>) {
        let mut state = self.state.lock().unwrap();
        state.proven += 1;
        for window in &mut state.windows {
            if let WindowMemory::Mapped { memory: mapped, proven, .. } = &mut window.memory {
                *proven |= Arc::ptr_eq(mapped, memory);
            }
        }
    }

    fn next_mediation(&mut self) -> Option<MediationRequest> {
        self.mediations.pop_front()
    }

    fn answer(&mut self, ticket: Ticket, answer: MediationAnswer<'_>) {
        let answer = match answer {
            MediationAnswer::Fetched(bytes) => Answer::Fetched(bytes.to_vec()),
            MediationAnswer::Stored => Answer::Stored,
            MediationAnswer::Fault => Answer::Fault,
        };
        self.state.lock().unwrap().answers.push((ticket.0, answer));
    }

    fn set_client_interrupts(&mut self, mode: InterruptMode) {
        self.state.lock().unwrap().modes.push(mode);
    }

    fn reset(&mut self, _: ResetKind) -> Result<(), AttachmentError> {
        let mut state = self.state.lock().unwrap();
        state.resets += 1;
        state.bar0.fill(0);
        Ok(())
    }

    fn resets(&self) -> u64 {
        self.state.lock().unwrap().resets as u64
    }

    fn poll(&mut self, _: Nanos) -> Activity {
        // As a session does after a sleep: take the signal, then what it announces.
        let _ = rustix::io::read(&self.wake, &mut [0_u8; 8]);
        let steps = std::mem::take(&mut self.state.lock().unwrap().steps);
        let busy = !steps.is_empty();
        for step in steps {
            match step {
                Step::Fetch { iova, len } => self.mediate(iova, MediationKind::Fetch { len }),
                Step::Store { iova, bytes, polled } => self.mediate(iova, MediationKind::Store { bytes, polled }),
                Step::Raise(vector) => self.interrupts.message(vector),
                Step::Pin(level) => self.interrupts.pin(level),
            }
        }
        if busy { Activity::Busy } else { Activity::Idle(None) }
    }

    fn arm(&mut self) -> bool {
        self.state.lock().unwrap().steps.is_empty()
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wake.as_fd())
    }

    fn gone(&self) -> Option<CloseReason> {
        self.state.lock().unwrap().gone
    }

    fn orders_interrupts(&self) -> bool {
        self.state.lock().unwrap().claims_order
    }

    fn interrupts(&mut self) -> &mut ClientInterrupts {
        &mut self.interrupts
    }
}

/// A server on a thread; stopped and joined when dropped.
pub struct Running {
    pub path: PathBuf,
    pub device: Handle,
    pub stop: StopHandle,
    thread: Option<JoinHandle<Ended>>,
    _directory: tempfile::TempDir,
}

pub fn serve(options: Options) -> Running {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("device.sock");
    let mut server = Server::bind(&path).unwrap();
    let stop = server.stop_handle();
    let (mut device, handle) = Scripted::new();
    let thread = std::thread::spawn(move || server.serve(&mut device, &options).unwrap());
    Running { path, device: handle, stop, thread: Some(thread), _directory: directory }
}

impl Running {
    pub fn client(&self) -> Client {
        Client::open(&self.path, DEADLINE).unwrap()
    }

    pub fn end(&mut self) -> Ended {
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            assert!(thread.join().is_ok() || std::thread::panicking(), "the server panicked");
        }
    }
}

pub fn eventfds(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()).collect()
}

pub fn signals(fd: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    rustix::io::read(fd, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
}

pub fn wait_signal(fd: &OwnedFd) {
    let start = Instant::now();
    while signals(fd) == 0 {
        assert!(start.elapsed() < DEADLINE, "an interrupt is missing");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The scripted device behind a real function.
pub struct Lent(Scripted);

impl Lent {
    pub fn new() -> (Self, Handle) {
        let (device, handle) = Scripted::new();
        (Self(device), handle)
    }

    fn hand_over(&mut self, host: &mut dyn Host) {
        while let Some(request) = self.0.mediations.pop_front() {
            let mediation = match &request.kind {
                MediationKind::Fetch { len } => Mediation::Fetch { iova: request.iova, len: *len },
                MediationKind::Store { bytes, polled } => Mediation::Store { iova: request.iova, bytes, polled: *polled },
            };
            host.mediate(request.ticket, mediation);
        }
    }
}

impl Attachment for Lent {
    fn description(&self) -> &DeviceDescription {
        &self.0.description
    }
    fn bar_read(&mut self, at: BarAddress, width: Width, _: &mut dyn Host) -> u64 {
        Served::bar_read(&mut self.0, at, width).unwrap()
    }
    fn bar_write(&mut self, at: BarAddress, width: Width, value: u64, _: &mut dyn Host) {
        Served::bar_write(&mut self.0, at, width, value).unwrap();
    }

    fn flush(&mut self) {
        self.0.flush();
    }
    fn map(&mut self, window: Window, _: &mut dyn Host) -> Result<(), MapError> {
        Served::map(&mut self.0, window)
    }
    fn unmap(&mut self, iova: Iova, len: u64, _: &mut dyn Host) -> Result<(), MapError> {
        Served::unmap(&mut self.0, iova, len)
    }
    fn prove(&mut self, memory: &Arc<Memory>, _: &mut dyn Host) {
        Served::prove(&mut self.0, memory);
    }
    fn answer(&mut self, ticket: Ticket, answer: MediationAnswer<'_>, _: &mut dyn Host) {
        Served::answer(&mut self.0, ticket, answer);
    }
    fn set_interrupt_mode(&mut self, mode: InterruptMode, _: &mut dyn Host) {
        Served::set_client_interrupts(&mut self.0, mode);
    }
    fn set_bus_master(&mut self, _: bool, _: &mut dyn Host) {}
    fn reset(&mut self, kind: ResetKind, _: &mut dyn Host) -> Result<(), AttachmentError> {
        Served::reset(&mut self.0, kind)
    }
    fn poll(&mut self, now: Nanos, host: &mut dyn Host) -> Activity {
        let _ = rustix::io::read(&self.0.wake, &mut [0_u8; 8]);
        let _ = now;
        let steps = std::mem::take(&mut self.0.state.lock().unwrap().steps);
        let busy = !steps.is_empty();
        for step in steps {
            match step {
                Step::Fetch { iova, len } => self.0.mediate(iova, MediationKind::Fetch { len }),
                Step::Store { iova, bytes, polled } => self.0.mediate(iova, MediationKind::Store { bytes, polled }),
                Step::Raise(vector) => host.interrupt(vector),
                Step::Pin(level) => host.pin(level),
            }
            self.hand_over(host);
        }
        if busy { Activity::Busy } else { Activity::Idle(None) }
    }
    fn arm(&mut self) -> bool {
        Served::arm(&mut self.0)
    }
    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Served::wake_fd(&self.0)
    }
    fn gone(&self) -> Option<CloseReason> {
        Served::gone(&self.0)
    }
    fn dirty_log(&mut self, _: &Arc<Memory>, _: &mut dyn Host) -> Option<&DirtyLog> {
        None
    }
}
