//! Memory of both sides: what the device may use here, what the peer was granted, and what the peer granted us.
//!
//! Each grant is a memory region of its own with just the access given, because rxe does not hold a memory window to its bounds. The grant that the
//! caller hands to its peer carries a number; address and key come on the control connection, and only from there are they believed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::chain::{Bytes, What};
use super::establish::by_chance;
use super::objects::{MemoryRegion, ProtectionDomain};
use super::sys::{IBV_ACCESS_LOCAL_WRITE, IBV_ACCESS_REMOTE_READ, IBV_ACCESS_REMOTE_WRITE};
use super::wire::{Announcement, Frame, Slot};
use super::{VerbsFabric, outbox};
use crate::fabric::{CloseReason, Grant, GrantError, Regions, RegisterError};
use crate::link::control::{Control, ControlError, receive_by};
use crate::memory::{Mapped, Memory, MemoryError};
use crate::span::{Access, LocalRegion, LocalSpan, RegionName, RemoteRegion, RemoteSpan};
use crate::table::{MAX_REGIONS, Table};

/// How long a grant may take to come on the control connection after it was heard of on the queue pair.
const GRANT_LIMIT: Duration = Duration::from_secs(2);

/// Memory of this side.
pub(super) struct Local {
    pub(super) memory: Arc<Memory>,
    /// `None` where it is only to be granted, and where it has no bytes.
    pub(super) region: Option<MemoryRegion>,
    access: Access,
}

/// Memory of the peer's.
pub(super) struct Remote {
    pub(super) address: u64,
    pub(super) key: u32,
    number: u64,
}

/// A grant of ours that lives.
struct Granted {
    number: u64,
    of: RegionName,
    /// Held: the peer can reach the memory as long as this lives.
    _region: Option<MemoryRegion>,
}

/// All memory that one end knows of.
pub(super) struct Books {
    domain: Arc<ProtectionDomain>,
    pub(super) locals: Table<Local>,
    pub(super) remotes: Table<Remote>,
    granted: Vec<Granted>,
    last_grant: u64,
    /// Grants of the peer's by number, imported or not.
    announced: BTreeMap<u64, Announcement>,
}

impl Books {
    pub(super) fn new(domain: Arc<ProtectionDomain>) -> Self {
        Self {
            domain,
            locals: Table::default(),
            remotes: Table::default(),
            granted: Vec::new(),
            // Somewhere among 2^63, so that a made-up number is no grant.
            last_grant: by_chance() >> 1,
            announced: BTreeMap::new(),
        }
    }

    /// Takes the frames that have come.
    ///
    /// # Errors
    /// Why the link ends.
    pub(super) fn take_frames(&mut self, control: &mut dyn Control) -> Result<(), CloseReason> {
        loop {
            match control.receive() {
                Ok(None) => return Ok(()),
                Ok(Some(frame)) => self.take_frame(&frame)?,
                Err(error) => return Err(reason(&error)),
            }
        }
    }

    fn take_frame(&mut self, frame: &[u8]) -> Result<(), CloseReason> {
        let Frame::Grant(grant) = Frame::parse(frame).map_err(CloseReason::Protocol)? else {
            return Err(CloseReason::Protocol("a control frame that was not asked for"));
        };
        if self.announced.len() >= MAX_REGIONS as usize {
            return Err(CloseReason::Protocol("more grants than a side may hold"));
        }
        match self.announced.insert(grant.number, grant) {
            None => Ok(()),
            Some(_) => Err(CloseReason::Protocol("two grants of one number")),
        }
    }

    /// The peer is about to take a grant back; operations on it would end the link, so they are refused here.
    pub(super) fn revoked_by_peer(&mut self, number: u64) {
        self.announced.remove(&number);
        self.remotes.remove_where(|remote| remote.number == number);
    }
}

fn reason(error: &ControlError) -> CloseReason {
    match error {
        ControlError::TooLong { .. } | ControlError::Flood => CloseReason::Protocol("control frames out of bounds"),
        ControlError::Gone | ControlError::Stuck | ControlError::Host(_) => CloseReason::PeerGone,
    }
}

fn region_of(domain: &Arc<ProtectionDomain>, memory: &Arc<Memory>, flags: u32) -> Result<Option<MemoryRegion>, MemoryError> {
    if memory.is_empty() { Ok(None) } else { MemoryRegion::new(domain, memory, flags).map(Some) }
}

impl VerbsFabric {
    fn add_local(&mut self, memory: Arc<Memory>, access: Access, used_here: bool) -> Result<LocalRegion, RegisterError> {
        if access.write && !memory.writable() {
            return Err(MemoryError::ReadOnly.into());
        }
        let flags = if access.write { IBV_ACCESS_LOCAL_WRITE } else { 0 };
        let region = if used_here { region_of(&self.books.domain, &memory, flags)? } else { None };
        let len = memory.len();
        let name =
            self.books.locals.insert(Local { memory, region, access }).ok_or(RegisterError::TooMany { limit: MAX_REGIONS })?;
        Ok(LocalRegion { name, len, access })
    }
}

impl VerbsFabric {
    /// A write of no bytes that reports: when it is done, so is everything before it. No key is looked at for it (InfiniBand Architecture
    /// Specification 1.4, volume 1, C9-88).
    fn push_barrier(&mut self) -> bool {
        let pushed = self.outbox.has_reserve() && self.outbox.push(true, What::Write { address: 0, key: 0 }, Bytes::Nothing);
        self.hand_over();
        pushed
    }
}

impl Regions for VerbsFabric {
    fn register(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError> {
        self.add_local(memory, access, true)
    }

    fn register_for_peer(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError> {
        self.add_local(memory, access, false)
    }

    fn deregister(&mut self, region: LocalRegion) {
        let (ended, alive): (Vec<_>, Vec<_>) = self.books.granted.drain(..).partition(|granted| granted.of == region.name);
        self.books.granted = alive;
        for granted in &ended {
            // Where there is no room to say it, a peer that uses the grant once more loses the link.
            self.say(Slot::Revoke(granted.number), false);
        }
        self.hand_over();
        // The device may still be reading or filling the memory for operations of ours.
        if self.outbox.outstanding() > 0 && self.pair.is_some() && self.push_barrier() {
            let last = self.outbox.last_posted();
            if !self.drain(|fabric| fabric.outbox.is_done(last)) {
                self.end(CloseReason::Protocol("an operation on memory that is given back does not end"));
            }
        }
        // With the regions the peer's access ends: whatever arrives from now on is refused by the device.
        drop(ended);
        self.books.locals.remove(region.name);
    }

    fn local_memory(&self, region: &LocalRegion) -> Option<Arc<Memory>> {
        self.books.locals.find(region.name).map(|local| Arc::clone(&local.memory))
    }

    fn map_local(&self, span: LocalSpan) -> Option<Mapped> {
        let local = self.books.locals.find(span.name)?;
        Mapped::new(Arc::clone(&local.memory), span.offset, u64::from(span.len)).ok()
    }

    fn export(&mut self, region: &LocalRegion, access: Access) -> Result<Grant, GrantError> {
        let local = self.books.locals.find(region.name).ok_or(GrantError::NotRegistered)?;
        if !local.access.allows(access) {
            return Err(GrantError::Widened { asked: access, allowed: local.access });
        }
        if self.pair.is_none() {
            return Err(GrantError::Closed);
        }
        if self.books.granted.len() >= MAX_REGIONS as usize {
            return Err(GrantError::TooMany { limit: MAX_REGIONS });
        }
        let read = if access.read { IBV_ACCESS_REMOTE_READ } else { 0 };
        // The device writes for the peer, so it must be allowed to write at all.
        let write = if access.write { IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_LOCAL_WRITE } else { 0 };
        let granted = region_of(&self.books.domain, &local.memory, read | write)?;
        let (address, key) = granted.as_ref().map_or((0, 0), |region| (region.address(), region.rkey()));
        self.books.last_grant += 1;
        let announcement = Announcement { number: self.books.last_grant, address, len: region.len, key, access };
        self.control.send(&Frame::Grant(announcement).encode()).map_err(|error| {
            tracing::debug!(%error, "a grant cannot be told");
            GrantError::Closed
        })?;
        self.books.granted.push(Granted { number: announcement.number, of: region.name, _region: granted });
        Ok(Grant { key: announcement.number, len: region.len, access })
    }

    fn import(&mut self, grant: &Grant) -> Result<RemoteRegion, GrantError> {
        let deadline = Instant::now() + GRANT_LIMIT;
        let announced = loop {
            if self.pair.is_none() {
                return Err(GrantError::Closed);
            }
            if let Some(announced) = self.books.announced.get(&grant.key) {
                break *announced;
            }
            let taken = match receive_by(&mut *self.control, deadline) {
                Ok(Some(frame)) => self.books.take_frame(&frame),
                Ok(None) => return Err(GrantError::Missing { key: grant.key }),
                Err(error) => Err(reason(&error)),
            };
            if let Err(reason) = taken {
                self.end(reason);
                return Err(GrantError::Closed);
            }
        };
        // What the owner said counts; a grant that says more was altered on its way.
        if grant.len > announced.len {
            return Err(GrantError::TooLong { granted: grant.len, actual: announced.len });
        }
        if !announced.access.allows(grant.access) {
            return Err(GrantError::Widened { asked: grant.access, allowed: announced.access });
        }
        let remote = Remote { address: announced.address, key: announced.key, number: announced.number };
        let name = self.books.remotes.insert(remote).ok_or(GrantError::TooMany { limit: MAX_REGIONS })?;
        Ok(RemoteRegion { name, len: grant.len, access: grant.access })
    }

    fn release(&mut self, region: RemoteRegion) {
        self.books.remotes.remove(region.name);
    }

    fn map_remote(&self, _span: RemoteSpan) -> Option<Mapped> {
        None
    }
}

const _: () = assert!(MAX_REGIONS > outbox::DEPTH);
