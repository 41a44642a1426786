//! The server's device as a session uses it.
//!
//! A register read is a question whose value comes back by [`Backend::next_read`]; a reset fences, asks, and counts as in flight until the server has
//! answered; an unmap is done when the server says so.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use farbus_remote_dma::{
    Activity, AttachError, Backend, BarAddress, Bus, DeviceDescription, DmaBuffer, DmaFault, DmaTag, InterruptMode, Iova, Progress,
    ReadTicket, ResetKind, SharedWindow, Width,
};
use farbus_transport::{Access, LocalRegion, LocalSpan, Memory, Nanos, RegisterError};

use super::asked::Ask;
use super::link::bytes;
use super::open::OpenError;
use super::{Reset, VfioUserBackend, Window};
use crate::vfio_user::wire::{DmaMap, MAP_READABLE, MAP_WRITEABLE, PAGE_BYTES};

/// The ticket of a read that is waited for here.
const WAITED_FOR: ReadTicket = ReadTicket(u32::MAX);

impl Backend for VfioUserBackend {
    fn description(&self) -> &DeviceDescription {
        &self.description
    }

    fn attach(&mut self, bus: &mut dyn Bus) -> Result<(), AttachError> {
        // Hears whether the server left while nobody had its device.
        self.advance(&mut NoBus);
        if self.link.down().is_some() {
            self.revive()?;
        }
        self.dma.attach(bus)?;
        self.lent = true;
        self.bus_master = false;
        self.mode = InterruptMode::Pin;
        self.listen();
        Ok(())
    }

    fn detach(&mut self) {
        self.lent = false;
        self.bus_master = false;
        self.silence();
        self.set_command();
        for (iova, window) in std::mem::take(&mut self.windows) {
            self.wait(&mut NoBus, |backend| backend.link.has_room());
            self.unmap(iova, window);
        }
        self.wait(&mut NoBus, |backend| backend.link.open_questions() == 0);
        self.unmapping = 0;
        // Its reset is over, so nothing writes there; who did not answer has lost its connection.
        self.let_go();
        self.held.clear();
        self.answers.clear();
        self.pin = false;
        self.dma.detach();
    }

    fn bar_read(&mut self, at: BarAddress, width: Width, bus: &mut dyn Bus) -> u64 {
        if let Some(value) = self.bar_read_later(WAITED_FOR, at, width, bus) {
            return value;
        }
        let waited_for = |(ticket, _): &(ReadTicket, u64)| *ticket == WAITED_FOR;
        self.wait(bus, |backend| backend.answers.iter().any(waited_for));
        let found = self.answers.iter().position(waited_for).and_then(|at| self.answers.remove(at));
        found.map_or(width.all_ones(), |(_, value)| value)
    }

    fn bar_read_later(&mut self, ticket: ReadTicket, at: BarAddress, width: Width, bus: &mut dyn Bus) -> Option<u64> {
        let Some(access) = self.access(at, width).filter(|_| self.link.down().is_none()) else {
            return Some(width.all_ones());
        };
        if !self.link.has_room() {
            self.wait(bus, |backend| backend.link.has_room());
        }
        // Memory is not ahead of what was written by message.
        let shared = if self.link.open_questions() == 0 { self.areas.load(at, width) } else { None };
        match shared {
            Some(value) => {
                self.counters.mapped += 1;
                self.held.push_back((ticket, value));
            }
            None => {
                self.counters.reads += 1;
                self.link.ask(Ask::Read { ticket: Some(ticket), access, width }, [bytes(&access), &[]], Nanos::now());
            }
        }
        self.end_of_interrupt(bus);
        if self.link.down().is_some() {
            self.mourn();
        }
        None
    }

    fn next_read(&mut self) -> Option<(ReadTicket, u64)> {
        self.answers.pop_front()
    }

    fn bar_write(&mut self, at: BarAddress, width: Width, value: u64, bus: &mut dyn Bus) {
        let Some(access) = self.access(at, width).filter(|_| self.link.down().is_none()) else { return };
        if !self.link.has_room() {
            // As a posted write waits where the way to the device is full.
            self.wait(bus, |backend| backend.link.has_room());
        }
        // Nor does a store to memory pass what was written by message.
        if self.link.open_questions() == 0 && self.areas.store(at, width, value) {
            self.counters.mapped += 1;
        } else {
            self.counters.writes += 1;
            let data = value.to_le_bytes();
            let data = data.get(..access.count as usize).unwrap_or_default();
            self.link.ask(Ask::Write, [bytes(&access), data], Nanos::now());
        }
        self.end_of_interrupt(bus);
    }

    fn dma_done(&mut self, tag: DmaTag, result: Result<(), DmaFault>, bus: &mut dyn Bus) {
        self.dma.done(tag, result, &mut self.link, bus);
    }

    fn poll(&mut self, bus: &mut dyn Bus) -> Activity {
        let busy = self.advance(bus);
        let deadline = self.link.check_deadline(Nanos::now());
        if self.link.down().is_some() {
            self.mourn();
        }
        if busy { Activity::Busy } else { Activity::Idle(deadline) }
    }

    fn arm(&mut self) -> bool {
        self.held.is_empty() && self.answers.is_empty() && (self.link.down().is_some() || self.signals.is_quiet())
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.link.down().is_none().then(|| self.signals.fd())
    }

    fn set_interrupt_mode(&mut self, mode: InterruptMode, bus: &mut dyn Bus) {
        self.mode = mode;
        if std::mem::take(&mut self.pin) {
            bus.set_pin(false);
        }
        self.listen();
    }

    fn fence(&mut self) {
        self.dma.fence(&mut self.link);
        self.answers.append(&mut self.held);
        let answers = &mut self.answers;
        self.link.asked().give_up_reads(|ticket, width| answers.push_back((ticket, width.all_ones())));
        if self.reset == Reset::None {
            self.reset = Reset::Asked;
            self.link.ask(Ask::Reset, [&[], &[]], Nanos::now());
        }
    }

    /// The reset is under way until the server says that it is over: its device may write until then.
    fn in_flight(&self) -> usize {
        let down = self.link.down().is_some();
        let resetting = self.reset == Reset::Asked && !down;
        // One that does not answer, and has not closed its end, may still write.
        self.dma.in_flight() + usize::from(resetting || down && self.shares())
    }

    fn reset(&mut self, _kind: ResetKind, bus: &mut dyn Bus) {
        self.reset = Reset::None;
        self.dma.fenced = false;
        if std::mem::take(&mut self.pin) {
            bus.set_pin(false);
        }
        // The device's own registers for them were reset.
        self.listen();
    }

    fn set_bus_master(&mut self, enabled: bool) {
        self.bus_master = enabled;
        self.set_command();
    }

    fn window_mapped(&mut self, iova: Iova, len: u64, access: Access, shared: Option<SharedWindow>, bus: &mut dyn Bus) {
        if !self.link.has_room() {
            self.wait(bus, |backend| backend.link.has_room());
        }
        let flags = if access.read { MAP_READABLE } else { 0 } | if access.write { MAP_WRITEABLE } else { 0 };
        let mut map = DmaMap { argsz: size_of::<DmaMap>() as u32, flags, offset: 0, address: iova.0, size: len };
        let shared = shared.filter(|shared| {
            let whole_pages = shared.file().is_some_and(|(_, offset)| offset.is_multiple_of(PAGE_BYTES));
            self.options.share_memory && whole_pages && self.link.down().is_none()
        });
        if self.windows.len() as u64 >= self.limits.max_maps {
            return self.link.fail("its server takes no more maps of guest memory");
        }
        // A doorbell that comes behind it finds it there, because a server does one thing after the other.
        match shared.as_ref().and_then(SharedWindow::file) {
            Some((fd, offset)) => {
                map.offset = offset;
                self.link.share();
                self.link.ask_with(Ask::Map, bytes(&map), &[fd], Nanos::now());
            }
            None => self.link.ask(Ask::Map, [bytes(&map), &[]], Nanos::now()),
        }
        self.windows.insert(iova.0, Window { len, shared });
    }

    fn window_unmapped(&mut self, iova: Iova, len: u64, bus: &mut dyn Bus) {
        let last = iova.0.saturating_add(len.saturating_sub(1));
        let inside: Vec<u64> = self.windows.range(iova.0..=last).map(|(start, _)| *start).collect();
        for (start, window) in inside.into_iter().filter_map(|start| self.windows.remove_entry(&start)).collect::<Vec<_>>() {
            if !self.link.has_room() {
                self.wait(bus, |backend| backend.link.has_room());
            }
            self.unmap(start, window);
        }
    }

    fn is_unmapping(&self) -> bool {
        if self.link.down().is_some() { self.shares() } else { self.unmapping > 0 }
    }

    fn gone(&self) -> Option<&'static str> {
        self.link.down()
    }

    fn revive(&mut self) -> Result<(), AttachError> {
        let gone = |error: OpenError| AttachError::Device(format!("{}: {error}", self.path.display()));
        let mut fresh = Self::open(&self.path, self.options).map_err(gone)?;
        if fresh.description != self.description {
            return Err(gone(OpenError::Changed));
        }
        (fresh.counters, fresh.dma.counters) = (self.counters, self.dma.counters);
        *self = fresh;
        Ok(())
    }
}

/// What a device has that nobody has borrowed: nothing can be reached, and nobody hears it.
struct NoBus;

impl Bus for NoBus {
    fn now(&self) -> Nanos {
        Nanos::now()
    }

    fn register(&mut self, _: Arc<Memory>, _: Access) -> Result<LocalRegion, RegisterError> {
        Err(RegisterError::TooMany { limit: 0 })
    }

    fn dma_read(&mut self, _: DmaTag, _: Iova, _: LocalSpan) -> Result<Progress, DmaFault> {
        Err(DmaFault::Fenced)
    }

    fn dma_write(&mut self, _: DmaTag, _: Iova, _: LocalSpan) -> Result<Progress, DmaFault> {
        Err(DmaFault::Fenced)
    }

    fn dma_write_polled(&mut self, _: DmaTag, _: Iova, _: &[u8]) -> Result<Progress, DmaFault> {
        Err(DmaFault::Fenced)
    }

    fn map(&mut self, _: Iova, _: u64, _: Access) -> Result<Option<DmaBuffer>, DmaFault> {
        Err(DmaFault::Fenced)
    }

    fn interrupt(&mut self, _: u16) {}

    fn set_pin(&mut self, _: bool) {}
}
