//! The lender's view of the borrower's memory: what was offered, and which DMA addresses lead where.
//!
//! With key 1 offered (512 MiB, proven) and a window of 512 MiB at 0, the device's 64 bytes at iova 0x1_0450 are bytes 0x1_0450 of key 1; while a
//! memory is unproven, its windows exist but every access to them is mediated.

use std::collections::BTreeMap;
use std::sync::Arc;

use farbus_transport::{Access, Fabric, Grant, GrantError, RemoteRegion};

use super::InUse;
use crate::address::Iova;
use crate::attachment::MapError;
use crate::backend::DeviceWindow;
use crate::dirty_log::DirtyLog;
use crate::dma_buffer::DmaBuffer;
use crate::iova_map::IovaMap;
use crate::message::Outcome;

/// Bytes of a piece of a device's window: a span is at most 4 GiB.
const DEVICE_PIECE: u64 = 1 << 30;
/// Memories that one borrower may offer.
const MAX_OFFERED: usize = 1024;

/// Offered memory as it is used: through the fabric, access by access, so that its owner can take it back between two of them.
#[derive(Clone, Debug)]
pub(super) struct Direct {
    pub(super) region: RemoteRegion,
    /// Where the peer's memory can be mapped here, so is its log, and we mark it; elsewhere the borrower is told of each write. The log is no
    /// guest memory and stays mapped: a mark that comes after its revocation harms nobody.
    pub(super) dirty: Option<DirtyLog>,
}

struct Offered {
    direct: Direct,
    /// Its log, where that can be mapped here.
    dirty_region: Option<RemoteRegion>,
    proven: bool,
}

impl Offered {
    fn release<F: Fabric>(self, fabric: &mut F) {
        fabric.release(self.direct.region);
        if let Some(dirty_region) = self.dirty_region {
            fabric.release(dirty_region);
        }
    }
}

/// What a window leads to.
#[derive(Debug)]
pub(super) struct Target {
    key: Option<u64>,
    pub(super) offset: u64,
    /// `None` where every access is mediated.
    pub(super) direct: Option<Direct>,
}

/// All windows of one borrower.
pub(super) struct Windows {
    pub(super) map: IovaMap<Target>,
    offered: BTreeMap<u64, Offered>,
    /// Held by everything in flight that began with the present windows.
    pub(super) in_use: InUse,
}

impl Windows {
    pub(super) fn new() -> Self {
        Self { map: IovaMap::default(), offered: BTreeMap::new(), in_use: Arc::new(()) }
    }

    /// Takes memory into use, or answers why not.
    ///
    /// # Errors
    /// [`GrantError::Missing`]: the borrower announced memory that it did not deliver. Waiting for it blocks the session for seconds, so
    /// whoever does that once must not be able to do it again.
    pub(super) fn offer<F: Fabric>(
        &mut self,
        fabric: &mut F,
        memory: Grant,
        dirty: Grant,
        proven: bool,
    ) -> Result<Outcome, GrantError> {
        if self.offered.len() >= MAX_OFFERED {
            return Ok(Outcome::TooMany);
        }
        let mappable = fabric.limits().peer_mappable;
        if self.offered.contains_key(&memory.key) || (mappable && dirty.len < DirtyLog::log_bytes(memory.len)) {
            return Ok(Outcome::Grant);
        }
        let imported = fabric.import(&memory).and_then(|region| match mappable.then(|| fabric.import(&dirty)).transpose() {
            Ok(dirty_region) => Ok((region, dirty_region)),
            Err(error) => {
                fabric.release(region);
                Err(error)
            }
        });
        let (region, dirty_region) = match imported {
            Ok(regions) => regions,
            Err(missing @ GrantError::Missing { .. }) => return Err(missing),
            Err(error) => {
                tracing::warn!(%error, key = memory.key, "the borrower's memory cannot be used");
                return Ok(Outcome::Grant);
            }
        };
        let log = dirty_region.as_ref().and_then(|dirty_region| dirty_log(fabric, dirty_region, memory.len));
        let offered = Offered { direct: Direct { region, dirty: log }, dirty_region, proven };
        if mappable && offered.direct.dirty.is_none() {
            offered.release(fabric);
            return Ok(Outcome::Grant);
        }
        self.offered.insert(memory.key, offered);
        Ok(Outcome::Done)
    }

    pub(super) fn map(&mut self, iova: Iova, len: u64, key: Option<u64>, offset: u64, access: Access) -> Outcome {
        let direct = match key {
            None => None,
            Some(key) => {
                let Some(offered) = self.offered.get(&key) else {
                    return Outcome::UnknownKey;
                };
                if offset.checked_add(len).is_none_or(|end| end > offered.direct.region.len()) {
                    return Outcome::Range;
                }
                if !offered.direct.region.access().allows(access) {
                    return Outcome::Grant;
                }
                offered.proven.then(|| offered.direct.clone())
            }
        };
        outcome(self.map.insert(iova, len, access, Target { key, offset, direct }))
    }

    /// Removes windows; what they were used for ends when the returned token's count is zero.
    pub(super) fn unmap(&mut self, iova: Iova, len: u64) -> Result<std::sync::Weak<()>, Outcome> {
        match self.map.remove(iova, len) {
            Ok(_) => {
                let old = std::mem::replace(&mut self.in_use, Arc::new(()));
                Ok(Arc::downgrade(&old))
            }
            Err(error) => Err(outcome(Err(error))),
        }
    }

    /// A window for a device that reaches memory by itself, in pieces; `None` where its memory is not to be accessed directly, or not any more.
    pub(super) fn for_device<F: Fabric>(&self, fabric: &F, iova: Iova, len: u64) -> Option<DeviceWindow> {
        let piece = self.map.piece(iova, len, Access::NONE).ok()?;
        let direct = piece.target.direct.as_ref().filter(|_| piece.len == len)?;
        let log = direct.dirty.as_ref()?;
        let access = self.map.access(iova)?;
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < len {
            let part = (len - done).min(DEVICE_PIECE);
            let offset = piece.target.offset + piece.offset + done;
            let mapped = fabric.map_remote(direct.region.span(offset, part as u32, access).ok()?)?;
            pieces.push(if access.write { DmaBuffer::held(mapped, log.clone(), offset) } else { DmaBuffer::read(mapped, None) });
            done += part;
        }
        Some(DeviceWindow { iova, access, pieces })
    }

    /// Memory may be accessed directly from now on; the windows for which that is new.
    pub(super) fn prove(&mut self, key: u64) -> Vec<(Iova, u64)> {
        let Some(offered) = self.offered.get_mut(&key) else { return Vec::new() };
        if std::mem::replace(&mut offered.proven, true) {
            return Vec::new();
        }
        for target in self.map.targets_mut().filter(|target| target.key == Some(key)) {
            target.direct = Some(offered.direct.clone());
        }
        self.map.ranges(|target| target.key == Some(key))
    }

    /// Forgets everything; false where a window is still in use, and nothing changed.
    pub(super) fn let_go_of_all<F: Fabric>(&mut self, fabric: &mut F) -> bool {
        if Arc::strong_count(&self.in_use) > 1 {
            return false;
        }
        self.map = IovaMap::default();
        std::mem::take(&mut self.offered).into_values().for_each(|offered| offered.release(fabric));
        true
    }

    pub(super) fn withdraw<F: Fabric>(&mut self, fabric: &mut F, key: u64) -> Outcome {
        if self.map.targets().any(|target| target.key == Some(key)) {
            return Outcome::Overlap;
        }
        match self.offered.remove(&key) {
            Some(offered) => {
                offered.release(fabric);
                Outcome::Done
            }
            None => Outcome::UnknownKey,
        }
    }
}

/// The log of `len` bytes in a region; its memory is taken from a mapping of no bytes, because a span is at most 4 GiB.
fn dirty_log<F: Fabric>(fabric: &F, region: &RemoteRegion, len: u64) -> Option<DirtyLog> {
    let empty = fabric.map_remote(region.span(0, 0, Access::NONE).ok()?)?;
    let (memory, start) = empty.parts();
    (start == 0).then(|| DirtyLog::over(Arc::clone(memory), len).ok()).flatten()
}

fn outcome(result: Result<(), MapError>) -> Outcome {
    match result {
        Ok(()) => Outcome::Done,
        Err(MapError::Overlap { .. }) => Outcome::Overlap,
        Err(MapError::TooMany { .. }) => Outcome::TooMany,
        Err(_) => Outcome::Range,
    }
}
