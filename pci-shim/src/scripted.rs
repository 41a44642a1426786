//! For tests: an attachment that writes down all that it is told, and says what the test told it to say.
//!
//! `script.say([Say::Store(Ticket(1), Iova(0x1000), vec![7; 16]), Say::Vector(3)])` makes the next poll, or the next register read, ask for
//! a store and then raise vector 3.

use std::collections::{HashMap, VecDeque};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard};

use farbus_remote_dma::dirty_log::DirtyLog;
use farbus_remote_dma::{
    Activity, Attachment, AttachmentError, BarAddress, BarDescription, BarKind, Constant, DeviceDescription, Host, InterruptMode,
    Iova, MapError, Mediation, MediationAnswer, MsixLocation, ResetKind, Ticket, Width, Window, WindowMemory,
};
use farbus_transport::{CloseReason, Memory, Nanos};

/// What an attachment was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Read(BarAddress, Width),
    Write(BarAddress, Width, u64),
    Map { iova: Iova, len: u64, direct: bool },
    Unmap(Iova, u64),
    Fetched(Ticket, Vec<u8>),
    Stored(Ticket),
    Fault(Ticket),
    Mode(InterruptMode),
    BusMaster(bool),
    Reset(ResetKind),
}

/// What an attachment says.
#[derive(Clone, Debug)]
pub(crate) enum Say {
    Vector(u16),
    Pin(bool),
    Fetch(Ticket, Iova, u32),
    Store(Ticket, Iova, Vec<u8>),
}

#[derive(Debug, Default)]
struct State {
    calls: Vec<Call>,
    saying: VecDeque<Say>,
    saying_in_reset: VecDeque<Say>,
    registers: HashMap<BarAddress, u64>,
    gone: Option<CloseReason>,
    flushes: usize,
}

/// The test's end.
#[derive(Clone, Debug, Default)]
pub(crate) struct Script(Arc<Mutex<State>>);

impl Script {
    pub(crate) fn attachment(&self, description: DeviceDescription) -> Box<dyn Attachment> {
        let script = self.clone();
        Box::new(Scripted { script, description })
    }

    pub(crate) fn say(&self, what: impl IntoIterator<Item = Say>) {
        self.state().saying.extend(what);
    }

    pub(crate) fn say_in_reset(&self, what: impl IntoIterator<Item = Say>) {
        self.state().saying_in_reset.extend(what);
    }

    pub(crate) fn set_register(&self, at: BarAddress, value: u64) {
        self.state().registers.insert(at, value);
    }

    pub(crate) fn go(&self) {
        self.state().gone = Some(CloseReason::PeerClosed);
    }

    /// What the attachment was told since the last call.
    pub(crate) fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.state().calls)
    }

    /// How often it was told to send what waits.
    pub(crate) fn flushes(&self) -> usize {
        self.state().flushes
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Like the built-in NVMe controller, with more kinds of BARs and interrupts than one device ever has.
pub(crate) fn description() -> DeviceDescription {
    let bar = |kind, size, prefetchable| Some(BarDescription { kind, size, prefetchable });
    DeviceDescription {
        name: "scripted".into(),
        vendor_id: 0x1d1d,
        device_id: 0x1f1f,
        subsystem_vendor_id: 0x1af4,
        subsystem_id: 0x1100,
        revision: 2,
        class_code: 0x01_0802,
        bars: [
            bar(BarKind::Memory64, 0x4000, false),
            None,
            bar(BarKind::Memory32, 0x1000, true),
            bar(BarKind::Io, 32, false),
            bar(BarKind::Memory64, 8 << 30, true),
            None,
        ],
        pin: true,
        msi_vectors: 8,
        msix: Some(MsixLocation { vectors: 65, table_bar: 0, table_offset: 0x2000, pba_bar: 0, pba_offset: 0x3000 }),
        dma_bits: 64,
        constants: vec![Constant { bar: 0, offset: 0, bytes: CAP.to_le_bytes().to_vec() }],
        serial: String::new(),
    }
}

/// CAP of the described controller: 1,024 entries, doorbell stride 0.
pub(crate) const CAP: u64 = 0x0000_0020_1e01_03ff;

struct Scripted {
    script: Script,
    description: DeviceDescription,
}

impl Scripted {
    fn note(&self, call: Call) {
        self.script.state().calls.push(call);
    }

    fn speak(mut from: VecDeque<Say>, host: &mut dyn Host) -> bool {
        let any = !from.is_empty();
        for say in from.drain(..) {
            match say {
                Say::Vector(vector) => host.interrupt(vector),
                Say::Pin(asserted) => host.pin(asserted),
                Say::Fetch(ticket, iova, len) => host.mediate(ticket, Mediation::Fetch { iova, len }),
                Say::Store(ticket, iova, bytes) => {
                    let (bytes, polled) = (bytes.as_slice(), true);
                    host.mediate(ticket, Mediation::Store { iova, bytes, polled });
                }
            }
        }
        any
    }
}

impl Attachment for Scripted {
    fn description(&self) -> &DeviceDescription {
        &self.description
    }

    fn bar_read(&mut self, at: BarAddress, width: Width, host: &mut dyn Host) -> u64 {
        self.note(Call::Read(at, width));
        let saying = std::mem::take(&mut self.script.state().saying);
        Self::speak(saying, host);
        let state = self.script.state();
        if state.gone.is_some() {
            return width.all_ones();
        }
        state.registers.get(&at).copied().unwrap_or(0)
    }

    fn bar_write(&mut self, at: BarAddress, width: Width, value: u64, _host: &mut dyn Host) {
        self.note(Call::Write(at, width, value));
    }

    fn flush(&mut self) {
        self.script.state().flushes += 1;
    }

    fn map(&mut self, window: Window, _host: &mut dyn Host) -> Result<(), MapError> {
        let Window { iova, len, memory, .. } = window;
        let direct = matches!(memory, WindowMemory::Mapped { proven: true, .. });
        self.note(Call::Map { iova, len, direct });
        Ok(())
    }

    fn unmap(&mut self, iova: Iova, len: u64, host: &mut dyn Host) -> Result<(), MapError> {
        self.note(Call::Unmap(iova, len));
        let saying = std::mem::take(&mut self.script.state().saying);
        Self::speak(saying, host);
        Ok(())
    }

    fn prove(&mut self, _memory: &Arc<Memory>, _host: &mut dyn Host) {}

    fn answer(&mut self, ticket: Ticket, answer: MediationAnswer<'_>, _host: &mut dyn Host) {
        self.note(match answer {
            MediationAnswer::Fetched(bytes) => Call::Fetched(ticket, bytes.to_vec()),
            MediationAnswer::Stored => Call::Stored(ticket),
            MediationAnswer::Fault => Call::Fault(ticket),
        });
    }

    fn set_interrupt_mode(&mut self, mode: InterruptMode, _host: &mut dyn Host) {
        self.note(Call::Mode(mode));
    }

    fn set_bus_master(&mut self, enabled: bool, _host: &mut dyn Host) {
        self.note(Call::BusMaster(enabled));
    }

    fn reset(&mut self, kind: ResetKind, host: &mut dyn Host) -> Result<(), AttachmentError> {
        self.note(Call::Reset(kind));
        let saying = std::mem::take(&mut self.script.state().saying_in_reset);
        Self::speak(saying, host);
        self.gone().map_or(Ok(()), |reason| Err(AttachmentError::Gone(reason)))
    }

    fn poll(&mut self, _now: Nanos, host: &mut dyn Host) -> Activity {
        let saying = std::mem::take(&mut self.script.state().saying);
        if Self::speak(saying, host) { Activity::Busy } else { Activity::Idle(None) }
    }

    fn arm(&mut self) -> bool {
        self.script.state().saying.is_empty()
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn gone(&self) -> Option<CloseReason> {
        self.script.state().gone
    }

    fn dirty_log(&mut self, _memory: &Arc<Memory>, _host: &mut dyn Host) -> Option<&DirtyLog> {
        None
    }
}
