//! The borrower's books: which memory was offered to the lender, under which key, with which dirty log, and which windows lead to it.
//!
//! Mapping 64 MiB at 0 and 448 MiB at 0x1_0000_0000 of one memfd offers it once, as key 1; unmapping the second leaves the offer, unmapping
//! both withdraws it, and what the device wrote can still be taken from its log.

use std::sync::Arc;

use farbus_transport::{Access, Fabric, Grant, GrantError, LocalRegion, Memory, RevokeError};

use crate::address::Iova;
use crate::attachment::{MapError, Window, WindowMemory};
use crate::dirty_log::{DirtyLog, DirtyLogs};
use crate::iova_map::IovaMap;

struct Offered {
    key: u64,
    memory: Arc<Memory>,
    log: DirtyLog,
    region: LocalRegion,
    /// Where the lender marks it.
    log_region: Option<LocalRegion>,
    windows: usize,
    proven: bool,
}

/// What a window leads to.
struct Target {
    key: Option<u64>,
    offset: u64,
}

/// Says that there is none.
const NO_GRANT: Grant = Grant { key: 0, len: 0, access: Access::NONE };

/// A fresh offer.
pub(super) struct Offer {
    pub(super) memory: Grant,
    pub(super) dirty: Grant,
}

#[derive(Default)]
pub(super) struct Memories {
    windows: IovaMap<Target>,
    offered: Vec<Offered>,
    logs: DirtyLogs,
}

impl Memories {
    pub(super) fn check_map(&self, window: &Window) -> Result<(), MapError> {
        let (iova, len) = (window.iova, window.len);
        if let WindowMemory::Mapped { memory, offset, .. } = &window.memory
            && offset.checked_add(len).is_none_or(|end| end > memory.len())
        {
            return Err(MapError::Range { iova, len });
        }
        self.windows.check_insert(iova, len)
    }

    pub(super) fn check_unmap(&self, iova: Iova, len: u64) -> Result<usize, MapError> {
        self.windows.check_remove(iova, len)
    }

    pub(super) fn key_of(&self, memory: &Arc<Memory>) -> Option<u64> {
        self.find(memory).map(|offered| offered.key)
    }

    pub(super) fn log_of(&self, memory: &Arc<Memory>) -> Option<&DirtyLog> {
        self.logs.of(memory)
    }

    /// Registers and grants memory that no window used so far, and its dirty log where the lender can mark it: elsewhere that would pin a byte for each
    /// page of the guest's for nothing.
    pub(super) fn offer<F: Fabric>(&mut self, fabric: &mut F, memory: &Arc<Memory>, proven: bool) -> Result<Offer, MapError> {
        self.prune_logs();
        // Where it had windows before, marks of then may wait to be taken.
        let log = self.logs.of_or_new(memory).map_err(GrantError::from)?;
        let access = if memory.writable() { Access::READ_WRITE } else { Access::READ };
        let (region, granted) = grant(fabric, memory, access)?;
        let marked = if fabric.limits().peer_mappable { Some(grant(fabric, log.marks(), Access::READ_WRITE)) } else { None };
        match marked.transpose() {
            Ok(marked) => {
                let (log_region, dirty) = marked.unzip();
                self.offered.push(Offered {
                    key: granted.key,
                    memory: Arc::clone(memory),
                    log,
                    region,
                    log_region,
                    windows: 0,
                    proven,
                });
                Ok(Offer { memory: granted, dirty: dirty.unwrap_or(NO_GRANT) })
            }
            Err(error) => {
                take_back(fabric, region);
                Err(error.into())
            }
        }
    }

    pub(super) fn insert(&mut self, window: Window, key: Option<u64>) -> Result<(), MapError> {
        let offset = if let WindowMemory::Mapped { offset, .. } = window.memory { offset } else { 0 };
        self.windows.insert(window.iova, window.len, window.access, Target { key, offset })?;
        if let Some(offered) = self.offered.iter_mut().find(|offered| Some(offered.key) == key) {
            offered.windows += 1;
        }
        Ok(())
    }

    /// Whether an offer has no window.
    pub(super) fn is_unused(&self, key: u64) -> bool {
        self.by_key(Some(key)).is_some_and(|offered| offered.windows == 0)
    }

    /// Removes windows; the keys of memories that no window uses any more come back.
    pub(super) fn remove(&mut self, iova: Iova, len: u64) -> Result<Vec<u64>, MapError> {
        let mut unused = Vec::new();
        for key in self.windows.remove(iova, len)?.into_iter().filter_map(|target| target.key) {
            let Some(offered) = self.offered.iter_mut().find(|offered| offered.key == key) else { continue };
            offered.windows -= 1;
            if offered.windows == 0 {
                unused.push(key);
            }
        }
        Ok(unused)
    }

    /// Takes an offer back.
    ///
    /// # Errors
    /// [`RevokeError`]: the lender may still be in it.
    pub(super) fn forget<F: Fabric>(&mut self, fabric: &mut F, key: u64) -> Result<(), RevokeError> {
        let Some(at) = self.offered.iter().position(|offered| offered.key == key) else {
            return Ok(());
        };
        let Offered { region, log_region, .. } = self.offered.swap_remove(at);
        let revoked = fabric.deregister(region);
        if let Some(log_region) = log_region {
            take_back(fabric, log_region);
        }
        self.prune_logs();
        revoked
    }

    /// Takes all offers back, because the link is given up. Windows stay in the books, and what was written can still be taken.
    ///
    /// # Errors
    /// [`RevokeError`]: the lender may still be in one of them.
    pub(super) fn revoke_all<F: Fabric>(&mut self, fabric: &mut F) -> Result<(), RevokeError> {
        let mut revoked = Ok(());
        for Offered { region, log_region, log, .. } in self.offered.drain(..) {
            let out = fabric.deregister(region);
            if let Some(log_region) = log_region {
                take_back(fabric, log_region);
            }
            // A lender that was killed lets go of nothing. Where it may still be in the memory, it holds for good.
            if out.is_ok() {
                log.let_go();
            }
            revoked = revoked.and(out);
        }
        revoked
    }

    fn prune_logs(&mut self) {
        let offered = &self.offered;
        self.logs.prune(|memory| offered.iter().any(|offered| Arc::ptr_eq(&offered.memory, memory)));
    }

    /// The key of memory that was not proven before.
    pub(super) fn prove(&mut self, memory: &Arc<Memory>) -> Option<u64> {
        let offered = self.offered.iter_mut().find(|offered| Arc::ptr_eq(&offered.memory, memory))?;
        (!std::mem::replace(&mut offered.proven, true)).then_some(offered.key)
    }

    /// Stores bytes that a guest may be polling; false where nothing is mapped there.
    pub(super) fn store_polled(&self, iova: Iova, bytes: &[u8]) -> bool {
        let len = bytes.len() as u64;
        let Ok(piece) = self.windows.piece(iova, len, Access::WRITE) else { return false };
        let Some(offered) = self.by_key(piece.target.key).filter(|_| piece.len == len) else { return false };
        let offset = piece.target.offset + piece.offset;
        // Stored, then marked: whoever takes the mark and copies the page finds the bytes.
        let stored = offered.memory.store_last_word_last(offset, bytes).is_ok();
        if stored {
            offered.log.mark(offset, len);
        }
        stored
    }

    /// Marks what the fabric wrote; false where a part of it is not mapped.
    pub(super) fn mark(&self, iova: Iova, len: u64) -> bool {
        let (mut at, mut left) = (iova, len);
        while left > 0 {
            let Ok(piece) = self.windows.piece(at, left, Access::WRITE) else { return false };
            if let Some(offered) = self.by_key(piece.target.key) {
                offered.log.mark(piece.target.offset + piece.offset, piece.len);
            }
            left -= piece.len;
            let Some(next) = at.checked_add(piece.len) else { return left == 0 };
            at = next;
        }
        true
    }

    fn find(&self, memory: &Arc<Memory>) -> Option<&Offered> {
        self.offered.iter().find(|offered| Arc::ptr_eq(&offered.memory, memory))
    }

    fn by_key(&self, key: Option<u64>) -> Option<&Offered> {
        self.offered.iter().find(|offered| Some(offered.key) == key)
    }
}

/// Registers memory and grants all of it.
fn grant<F: Fabric>(fabric: &mut F, memory: &Arc<Memory>, access: Access) -> Result<(LocalRegion, Grant), GrantError> {
    let region = fabric.register_for_peer(Arc::clone(memory), access)?;
    match fabric.export(&region, access) {
        Ok(granted) => Ok((region, granted)),
        Err(error) => {
            take_back(fabric, region);
            Err(error)
        }
    }
}

/// Takes back memory that no guest uses: who is still in it harms nobody.
fn take_back<F: Fabric>(fabric: &mut F, region: LocalRegion) {
    if let Err(error) = fabric.deregister(region) {
        tracing::warn!(%error, "the lender keeps memory that it was given for its own use");
    }
}
