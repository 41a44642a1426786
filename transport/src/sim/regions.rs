//! The memory side of the simulated fabric: who registered, exported and imported what, and whether that still holds.
//!
//! Side 0 registers 64 KiB as region 3 of generation 5 and exports it as key 0x91; when it deregisters, the slot's generation becomes 6
//! and whatever still names 5, a span, a grant or bytes in flight, is refused.

use std::sync::Arc;

use crate::fabric::{Grant, GrantError, OpError, RegisterError};
use crate::hold::Hold;
use crate::memory::{Memory, MemoryError};
use crate::sim::options::Violation;
use crate::span::{Access, LocalRegion, LocalSpan, RegionName, RemoteRegion, RemoteSpan};

/// Slots that are reused under a new generation.
#[derive(Debug)]
pub(super) struct Table<T> {
    slots: Vec<(u32, Option<T>)>,
    limit: u32,
}

impl<T> Table<T> {
    pub(super) const fn new(limit: u32) -> Self {
        Self { slots: Vec::new(), limit }
    }

    fn insert(&mut self, value: T) -> Result<RegionName, u32> {
        if let Some(index) = self.slots.iter().position(|(_, slot)| slot.is_none()) {
            let (generation, slot) = &mut self.slots[index];
            *slot = Some(value);
            return Ok(name(index, *generation));
        }
        if self.slots.len() >= self.limit as usize {
            return Err(self.limit);
        }
        self.slots.push((1, Some(value)));
        Ok(name(self.slots.len() - 1, 1))
    }

    fn find(&self, wanted: RegionName) -> Option<&T> {
        let (generation, slot) = self.slots.get(wanted.index as usize)?;
        slot.as_ref().filter(|_| *generation == wanted.generation)
    }

    fn remove(&mut self, wanted: RegionName) -> Option<T> {
        let (generation, slot) = self.slots.get_mut(wanted.index as usize)?;
        if *generation != wanted.generation || slot.is_none() {
            return None;
        }
        *generation = generation.wrapping_add(1);
        slot.take()
    }

    fn remove_where(&mut self, condemned: impl Fn(&T) -> bool) -> Vec<T> {
        let mut removed = Vec::new();
        for (generation, slot) in &mut self.slots {
            if slot.as_ref().is_some_and(&condemned) {
                *generation = generation.wrapping_add(1);
                removed.extend(slot.take());
            }
        }
        removed
    }
}

const fn name(index: usize, generation: u32) -> RegionName {
    RegionName { index: index as u32, generation }
}

#[derive(Debug)]
struct Registered {
    memory: Arc<Memory>,
    access: Access,
}

#[derive(Debug)]
struct Exported {
    region: RegionName,
    len: u64,
    access: Access,
    /// Cloned by each mapping in use.
    users: Arc<()>,
}

/// What one side knows of memory.
#[derive(Debug)]
pub(super) struct Book {
    registered: Table<Registered>,
    exported: Table<Exported>,
    /// Keys of the peer's exports.
    imported: Table<u64>,
    /// What was ever there, kept only for the violations that go on using it.
    ghosts: Vec<(RegionName, Arc<Memory>)>,
    ghost_imports: Vec<(RegionName, u64)>,
    scramble: u64,
    violate: Option<Violation>,
}

impl Book {
    pub(super) const fn new(limit: u32, scramble: u64, violate: Option<Violation>) -> Self {
        Self {
            registered: Table::new(limit),
            exported: Table::new(4 * limit),
            imported: Table::new(4 * limit),
            ghosts: Vec::new(),
            ghost_imports: Vec::new(),
            scramble,
            violate,
        }
    }

    fn breaks(&self, violation: Violation) -> bool {
        self.violate == Some(violation)
    }

    pub(super) fn register(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError> {
        if access.write && !memory.writable() {
            return Err(MemoryError::ReadOnly.into());
        }
        let len = memory.len();
        let name = self.registered.insert(Registered { memory, access }).map_err(|limit| RegisterError::TooMany { limit })?;
        Ok(LocalRegion { name, len, access })
    }

    /// Ends the use of a region; what its mappings in use hold comes back, to be waited for.
    pub(super) fn deregister(&mut self, region: &LocalRegion) -> Vec<Arc<()>> {
        let Some(registered) = self.registered.remove(region.name) else {
            return Vec::new();
        };
        if self.breaks(Violation::UseAfterDeregister) {
            self.ghosts.push((region.name, registered.memory));
        }
        let ended = self.exported.remove_where(|exported| exported.region == region.name);
        let waits = !self.breaks(Violation::ForgetMappings);
        ended.into_iter().filter(|_| waits).map(|exported| exported.users).collect()
    }

    pub(super) fn memory(&self, name: RegionName) -> Option<&Arc<Memory>> {
        let ghost = || self.ghosts.iter().find(|(ghost, _)| *ghost == name).map(|(_, memory)| memory);
        self.registered.find(name).map(|found| &found.memory).or_else(ghost)
    }

    pub(super) fn export(&mut self, region: &LocalRegion, access: Access) -> Result<Grant, GrantError> {
        let registered = self.registered.find(region.name).ok_or(GrantError::NotRegistered)?;
        if !registered.access.allows(access) && !self.breaks(Violation::WidenExports) {
            return Err(GrantError::Widened { asked: access, allowed: registered.access });
        }
        let len = registered.memory.len();
        let exported = Exported { region: region.name, len, access, users: Arc::new(()) };
        let name = self.exported.insert(exported).map_err(|limit| GrantError::TooMany { limit })?;
        let key = u64::from(name.generation) << 32 | u64::from(name.index);
        Ok(Grant { key: key ^ self.scramble, len, access })
    }

    fn exported(&self, key: u64) -> Option<&Exported> {
        let key = key ^ self.scramble;
        self.exported.find(name(key as u32 as usize, (key >> 32) as u32))
    }

    /// Takes a grant of `peer`'s.
    pub(super) fn import(&mut self, grant: &Grant, peer: &Self) -> Result<RemoteRegion, GrantError> {
        let exported = peer.exported(grant.key).ok_or(GrantError::Missing { key: grant.key })?;
        if !self.breaks(Violation::TrustGrants) {
            if grant.len > exported.len {
                return Err(GrantError::TooLong { granted: grant.len, actual: exported.len });
            }
            if !exported.access.allows(grant.access) {
                return Err(GrantError::Widened { asked: grant.access, allowed: exported.access });
            }
        }
        let name = self.imported.insert(grant.key).map_err(|limit| GrantError::TooMany { limit })?;
        Ok(RemoteRegion { name, len: grant.len, access: grant.access })
    }

    pub(super) fn release(&mut self, region: &RemoteRegion) {
        if let Some(key) = self.imported.remove(region.name)
            && self.breaks(Violation::UseAfterRelease)
        {
            self.ghost_imports.push((region.name, key));
        }
    }

    /// Begins the use of a mapping of `peer`'s memory.
    pub(super) fn hold(&self, span: &RemoteSpan, peer: &Self) -> Option<(Arc<Memory>, Hold)> {
        let exported = peer.exported(*self.imported.find(span.name)?)?;
        Some((Arc::clone(peer.memory(exported.region)?), Hold::local(&exported.users)))
    }

    /// The memory of this side behind a span, if it still stands.
    pub(super) fn local(&self, span: &LocalSpan) -> Result<Arc<Memory>, OpError> {
        self.memory(span.name).cloned().ok_or(OpError::Revoked)
    }

    /// The memory of `peer` behind a span, if grant and region still stand.
    pub(super) fn remote(&self, span: &RemoteSpan, peer: &Self) -> Result<Arc<Memory>, OpError> {
        let ghost = || self.ghost_imports.iter().find(|(ghost, _)| *ghost == span.name).map(|(_, key)| key);
        let key = self.imported.find(span.name).or_else(ghost).ok_or(OpError::Revoked)?;
        let exported = peer.exported(*key).ok_or(OpError::Revoked)?;
        peer.memory(exported.region).cloned().ok_or(OpError::Revoked)
    }
}
