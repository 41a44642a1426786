//! The memory side of the shared-memory fabric: descriptors go to the peer with each grant, and what comes back is mapped here.
//!
//! A borrower exports 512 MiB of guest memory: its memfd crosses the socket, the lender maps it and checks that it is sealed; `deregister` ends
//! the grant's life and returns when the lender is out of the memory.

use std::sync::Arc;

use super::revoke::Slot;
use super::socket::Delivered;
use super::{Remote, ShmFabric};
use crate::fabric::{CloseReason, Grant, GrantError, Regions, RegisterError, RevokeError};
use crate::memory::{Mapped, Memory, MemoryError, is_sealed};
use crate::span::{Access, LocalRegion, LocalSpan, RemoteRegion, RemoteSpan};
use crate::table::MAX_REGIONS;

impl Regions for ShmFabric {
    fn register(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError> {
        self.locals.register(memory, access)
    }

    fn deregister(&mut self, region: LocalRegion) -> Result<(), RevokeError> {
        let (ended, alive): (Vec<_>, Vec<_>) = self.granted.drain(..).partition(|(name, _)| *name == region.name);
        self.granted = alive;
        let slots: Vec<Slot> = ended.into_iter().map(|(_, slot)| slot).collect();
        let Self { revocations, socket, .. } = self;
        let revoked = revocations.end(&slots, || socket.peer_is_there());
        if revoked.is_err() {
            self.closed.get_or_insert(CloseReason::Protocol("an operation on revoked memory that does not end"));
        }
        self.locals.deregister(region);
        revoked
    }

    fn local_memory(&self, region: &LocalRegion) -> Option<Arc<Memory>> {
        self.locals.memory(region)
    }

    fn map_local(&self, span: LocalSpan) -> Option<Mapped> {
        self.locals.map(span)
    }

    fn export(&mut self, region: &LocalRegion, access: Access) -> Result<Grant, GrantError> {
        let memory = self.locals.memory(region).ok_or(GrantError::NotRegistered)?;
        if !region.access.allows(access) {
            return Err(GrantError::Widened { asked: access, allowed: region.access });
        }
        let (fd, offset) = memory.file().ok_or(GrantError::NoDescriptor)?;
        let slot = self.revocations.begin().ok_or(GrantError::TooMany { limit: MAX_REGIONS })?;
        let grant = Grant { key: slot.key(), len: region.len, access };
        self.granted.push((region.name, slot));
        self.socket.send_grant(&grant, fd, offset).map_err(|_| GrantError::Closed)?;
        Ok(grant)
    }

    fn import(&mut self, grant: &Grant) -> Result<RemoteRegion, GrantError> {
        if self.closed.is_some() {
            return Err(GrantError::Closed);
        }
        let slot = Slot::from_key(grant.key).ok_or(GrantError::Missing { key: grant.key })?;
        let Delivered { fd, offset, granted, .. } = self.socket.receive_grant(grant)?;
        // What the owner sent with the descriptor counts; a grant that says more was altered on its way.
        if grant.len > granted.len {
            return Err(GrantError::TooLong { granted: grant.len, actual: granted.len });
        }
        if !granted.access.allows(grant.access) {
            return Err(GrantError::Widened { asked: grant.access, allowed: granted.access });
        }
        // Before its length is looked at: whoever shrinks a file and seals it between the two could make every later access fault.
        if !is_sealed(&fd) && !self.options.accept_unsealed {
            return Err(GrantError::NotSealed);
        }
        let memory = Memory::map_file(fd, offset, grant.len, grant.access.write).map_err(|error| match error {
            MemoryError::FileTooShort { actual, .. } => GrantError::TooLong { granted: grant.len, actual },
            other => GrantError::Memory(other),
        })?;
        let name = self.remotes.insert(Remote { memory, slot }).ok_or(GrantError::TooMany { limit: MAX_REGIONS })?;
        Ok(RemoteRegion { name, len: grant.len, access: grant.access })
    }

    fn release(&mut self, region: RemoteRegion) {
        self.remotes.remove(region.name);
    }

    fn map_remote(&self, span: RemoteSpan) -> Option<Mapped> {
        let remote = self.remotes.find(span.name)?;
        let hold = self.revocations.hold(remote.slot, self.lifeline.as_ref()?)?;
        let mapped = Mapped::new(Arc::clone(&remote.memory), span.offset, u64::from(span.len)).ok()?;
        Some(mapped.held(hold))
    }
}
