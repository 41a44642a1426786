//! A device that was reset, in the hands of its profile: fresh memory at the guest's addresses first, then the guest's own around it, then the guest's alone.
//!
//! A queue at `0x1_0450_0000` of a machine with 512 MiB at 0 is lent as 4 KiB of ours; when the guest's memory is given, the device has the 512 MiB in two pieces
//! around it; at the end a third piece takes the place of ours.

use std::sync::Arc;

use farbus_remote_dma::{Activity, Attachment, BarAddress, Iova, MapError, Width, Window, WindowMemory};
use farbus_transport::{Access, Memory, Nanos};

use super::front::Front;
use super::windows::Windows;
use crate::irq::IrqSink;
use crate::profile::{Peek, ReviveError, Reviving};

/// A device on memory of ours.
pub(super) struct Workbench<'f, S: IrqSink> {
    attachment: &'f mut dyn Attachment,
    front: &'f mut Front<S>,
    guest: &'f Windows,
    lent: Vec<(Iova, u64)>,
    /// The device has the guest's memory where none is lent.
    given: bool,
    /// Polls in vain since something came.
    in_vain: u32,
}

/// Polls in vain after which the core is offered to others: where there are fewer cores than threads, the lender's may be among them.
const EAGER_POLLS: u32 = 500;

impl<'f, S: IrqSink> Workbench<'f, S> {
    pub(super) fn new(attachment: &'f mut dyn Attachment, front: &'f mut Front<S>, guest: &'f Windows) -> Self {
        Self { attachment, front, guest, lent: Vec::new(), given: false, in_vain: 0 }
    }

    /// The device has all of the guest's memory, and none of ours.
    pub(super) fn end(mut self) -> Result<(), MapError> {
        let lent = std::mem::take(&mut self.lent);
        for (iova, len) in &lent {
            self.attachment.unmap(*iova, *len, self.front)?;
        }
        for window in self.guest.iter() {
            let whole = (window.iova.0, window.iova.0 + (window.len - 1));
            if !self.given {
                self.attachment.map(window.clone(), self.front)?;
                continue;
            }
            for (iova, len) in &lent {
                let (first, last) = (whole.0.max(iova.0), whole.1.min(iova.0 + (len - 1)));
                if first <= last {
                    self.attachment.map(part(window, first, last), self.front)?;
                }
            }
        }
        Ok(())
    }
}

/// Bytes `first` to `last` of a window, both inside it.
fn part(window: &Window, first: u64, last: u64) -> Window {
    let memory = match &window.memory {
        WindowMemory::Mapped { memory, offset, proven } => {
            let offset = offset + (first - window.iova.0);
            WindowMemory::Mapped { memory: Arc::clone(memory), offset, proven: *proven }
        }
        WindowMemory::Mediated => WindowMemory::Mediated,
    };
    Window { iova: Iova(first), len: last - first + 1, access: window.access, memory }
}

impl<S: IrqSink> Reviving for Workbench<'_, S> {
    fn lend_memory(&mut self, iova: Iova, len: u64) -> Result<Arc<Memory>, ReviveError> {
        let failed = |error: String| ReviveError::Unknown(format!("{len:#x} bytes at {iova} cannot be lent to it: {error}"));
        let memory = Memory::memfd("farbus-revive", len).map_err(|error| failed(error.to_string()))?;
        let behind = WindowMemory::Mapped { memory: Arc::clone(&memory), offset: 0, proven: true };
        let window = Window { iova, len, access: Access::READ_WRITE, memory: behind };
        self.attachment.map(window, self.front).map_err(|error| failed(error.to_string()))?;
        self.lent.push((iova, len));
        Ok(memory)
    }

    fn write(&mut self, at: BarAddress, width: Width, value: u64) {
        self.attachment.bar_write(at, width, value, self.front);
        self.attachment.flush();
    }

    fn read(&mut self, at: BarAddress, width: Width) -> u64 {
        self.attachment.bar_read(at, width, self.front)
    }

    fn give_guest_memory(&mut self, keep: &[Iova]) -> Result<(), ReviveError> {
        let failed = |error: MapError| ReviveError::Device(format!("the guest's memory cannot be mapped for it: {error}"));
        let (mut kept, taken): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.lent).into_iter().partition(|(iova, _)| keep.contains(iova));
        for (iova, len) in taken {
            self.attachment.unmap(iova, len, self.front).map_err(failed)?;
        }
        kept.sort_unstable();
        for window in self.guest.iter() {
            let last = window.iova.0 + (window.len - 1);
            let mut next = Some(window.iova.0);
            for (iova, len) in &kept {
                let Some(first) = next.filter(|first| *first <= last) else { break };
                if iova.0 > last || iova.0 + (len - 1) < first {
                    continue;
                }
                if first < iova.0 {
                    self.attachment.map(part(window, first, iova.0 - 1), self.front).map_err(failed)?;
                }
                next = iova.0.checked_add(*len);
            }
            if let Some(first) = next.filter(|first| *first <= last) {
                self.attachment.map(part(window, first, last), self.front).map_err(failed)?;
            }
        }
        (self.lent, self.given) = (kept, true);
        Ok(())
    }

    fn may_reach_guest(&self) -> bool {
        self.front.space.bus_master()
    }

    fn guest(&self) -> &dyn Peek {
        self.guest
    }

    fn work(&mut self) -> Result<(), ReviveError> {
        self.in_vain = match self.attachment.poll(Nanos::now(), self.front) {
            Activity::Busy => 0,
            Activity::Idle(_) => self.in_vain.saturating_add(1),
        };
        if self.in_vain > EAGER_POLLS {
            std::thread::yield_now();
        }
        if self.front.mediations.waiting() {
            return Err(ReviveError::Unknown("it asks for memory that only the function's owner can reach".into()));
        }
        match self.attachment.gone() {
            Some(reason) => Err(ReviveError::Device(reason.to_string())),
            None => Ok(()),
        }
    }
}
