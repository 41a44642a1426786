//! The function's own book of its windows: which DMA addresses are mapped to what, for saving them, and for looking at what a driver wrote there.
//!
//! With 512 MiB mapped at 0 the NVMe profile reads the 64 bytes of an admin command at `0x1_0450_0000` out of the same memory that the device reads. What is not
//! proven to be the guest's memory cannot be looked at.

use std::sync::Arc;

use farbus_remote_dma::iova_map::IovaMap;
use farbus_remote_dma::{Iova, MapError, Window, WindowMemory};
use farbus_transport::{Access, Memory};

use crate::profile::Peek;
use crate::state::WindowState;

/// The windows of one function.
#[derive(Debug, Default)]
pub(crate) struct Windows(IovaMap<Window>);

impl Windows {
    /// Notes a window that the attachment has mapped.
    pub(crate) fn insert(&mut self, window: Window) -> Result<(), MapError> {
        let (iova, len, access) = (window.iova, window.len, window.access);
        self.0.insert(iova, len, access, window)
    }

    /// Forgets those inside a range that the attachment has unmapped.
    pub(crate) fn remove(&mut self, iova: Iova, len: u64) -> Result<(), MapError> {
        self.0.remove(iova, len).map(|_| ())
    }

    /// `memory` is what the guest sees.
    pub(crate) fn prove(&mut self, known: &Arc<Memory>) {
        for window in self.0.targets_mut() {
            if let WindowMemory::Mapped { memory, proven, .. } = &mut window.memory
                && Arc::ptr_eq(memory, known)
            {
                *proven = true;
            }
        }
    }

    /// All, in address order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Window> {
        self.0.targets()
    }

    /// For a saved state.
    pub(crate) fn save(&self) -> Vec<WindowState> {
        self.0.targets().map(state_of).collect()
    }
}

/// A window as it is saved.
pub(crate) fn state_of(window: &Window) -> WindowState {
    let mapped = matches!(window.memory, WindowMemory::Mapped { .. });
    WindowState { iova: window.iova.0, len: window.len, access: window.access, mapped }
}

impl Peek for Windows {
    fn peek(&self, iova: Iova, into: &mut [u8]) -> bool {
        let (mut at, mut into) = (iova, into);
        while !into.is_empty() {
            let Ok(piece) = self.0.piece(at, into.len() as u64, Access::NONE) else { return false };
            let WindowMemory::Mapped { memory, offset, proven: true } = &piece.target.memory else { return false };
            let (now, later) = into.split_at_mut(piece.len as usize);
            if memory.read(offset + piece.offset, now).is_err() {
                return false;
            }
            let Some(next) = at.checked_add(now.len() as u64) else { return later.is_empty() };
            (at, into) = (next, later);
        }
        true
    }
}
