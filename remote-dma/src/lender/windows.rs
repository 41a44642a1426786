//! The lender's view of the borrower's memory: what was offered, and which DMA addresses lead where.
//!
//! With key 1 offered (512 MiB, proven) and a window of 512 MiB at 0, the device's 64 bytes at iova 0x1_0450 are bytes 0x1_0450 of key 1; while a
//! memory is unproven, its windows exist but every access to them is mediated.

use std::collections::BTreeMap;
use std::sync::Arc;

use farbus_transport::{Access, Fabric, Grant, Mapped, RemoteRegion};

use super::InUse;
use crate::address::Iova;
use crate::attachment::MapError;
use crate::dirty_log::DirtyLog;
use crate::iova_map::IovaMap;
use crate::message::Outcome;

/// Memories that one borrower may offer.
const MAX_OFFERED: usize = 1024;

/// Offered memory as it is used: through the fabric, or mapped.
#[derive(Clone, Debug)]
pub(super) struct Direct {
    pub(super) region: RemoteRegion,
    /// Where the peer's memory is mapped here, its log is too, and we mark it; elsewhere the borrower is told of each write.
    pub(super) mapped: Option<Mapped>,
    pub(super) dirty: Option<DirtyLog>,
}

struct Offered {
    direct: Direct,
    dirty_region: RemoteRegion,
    proven: bool,
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

    pub(super) fn offer<F: Fabric>(&mut self, fabric: &mut F, memory: Grant, dirty: Grant, proven: bool) -> Outcome {
        if self.offered.len() >= MAX_OFFERED {
            return Outcome::TooMany;
        }
        if self.offered.contains_key(&memory.key) || dirty.len < DirtyLog::log_bytes(memory.len) {
            return Outcome::Grant;
        }
        let imported = fabric.import(&memory).and_then(|region| match fabric.import(&dirty) {
            Ok(dirty_region) => Ok((region, dirty_region)),
            Err(error) => {
                fabric.release(region);
                Err(error)
            }
        });
        let (region, dirty_region) = match imported {
            Ok(regions) => regions,
            Err(error) => {
                tracing::warn!(%error, key = memory.key, "the borrower's memory cannot be used");
                return Outcome::Grant;
            }
        };
        let (mapped, log) = if fabric.limits().peer_mappable {
            (map_whole(fabric, &region), dirty_log(fabric, &dirty_region, memory.len))
        } else {
            (None, None)
        };
        if fabric.limits().peer_mappable && (mapped.is_none() || log.is_none()) {
            fabric.release(region);
            fabric.release(dirty_region);
            return Outcome::Grant;
        }
        self.offered.insert(memory.key, Offered { direct: Direct { region, mapped, dirty: log }, dirty_region, proven });
        Outcome::Done
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

    pub(super) fn prove(&mut self, key: u64) {
        let Some(offered) = self.offered.get_mut(&key) else { return };
        offered.proven = true;
        for target in self.map.targets_mut().filter(|target| target.key == Some(key)) {
            target.direct = Some(offered.direct.clone());
        }
    }

    pub(super) fn withdraw<F: Fabric>(&mut self, fabric: &mut F, key: u64) -> Outcome {
        if self.map.targets().any(|target| target.key == Some(key)) {
            return Outcome::Overlap;
        }
        match self.offered.remove(&key) {
            Some(offered) => {
                fabric.release(offered.direct.region);
                fabric.release(offered.dirty_region);
                Outcome::Done
            }
            None => Outcome::UnknownKey,
        }
    }
}

fn map_whole<F: Fabric>(fabric: &F, region: &RemoteRegion) -> Option<Mapped> {
    // A span is at most 4 GiB, so the memory itself is taken from one of no bytes.
    let empty = fabric.map_remote(region.span(0, 0, Access::NONE).ok()?)?;
    let (memory, start) = empty.parts();
    Mapped::new(Arc::clone(memory), start, region.len()).ok()
}

fn dirty_log<F: Fabric>(fabric: &F, region: &RemoteRegion, len: u64) -> Option<DirtyLog> {
    let mapped = map_whole(fabric, region)?;
    let (memory, start) = mapped.parts();
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
