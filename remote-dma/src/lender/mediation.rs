//! DMA that the guest's side must carry out itself, page by page, through staging memory on both sides.
//!
//! A read of 64 bytes at iova 0x1_0400 in memory without a descriptor: the lender asks for ticket 5, the borrower writes the bytes into slot 5
//! of the lender's staging memory and says so. Whatever is said after a mediated write, and could reveal it, waits in one queue behind it.

use std::collections::VecDeque;
use std::sync::Arc;

use farbus_transport::{
    Access, Fabric, Grant, GrantError, LocalRegion, LocalSpan, Memory, RegisterError, RemoteRegion, RemoteSpan,
};

use crate::address::Iova;
use crate::attachment::Ticket;
use crate::backend::{AttachError, DmaFault, MAX_POLLED_WRITE};
use crate::message::ToBorrower;

/// Staging slots in each direction.
pub(crate) const SLOTS: u32 = 16;
/// Bytes of a slot: a page, which no mediation crosses.
pub(crate) const SLOT_BYTES: u32 = 4096;
/// Bytes of the staging memory of one direction.
pub(crate) const STAGING_BYTES: u64 = SLOTS as u64 * SLOT_BYTES as u64;

/// Tickets of stores begin here; those of fetches at 0.
const FIRST_STORE: u32 = SLOTS;

/// Chunks and messages that wait, above which no more messages are kept: 4,096 commands of 1 MiB are 2^20 chunks, and nothing honest says as
/// much about them again.
const MAX_QUEUED: usize = 1 << 21;

/// Names the DMA that a part belongs to: index and generation.
type PendingName = (u32, u32);

/// What a chunk moves.
pub(super) enum ChunkKind {
    Fetch(LocalSpan),
    Store(LocalSpan),
    StorePolled([u8; MAX_POLLED_WRITE]),
}

/// At most one page of a mediated DMA.
pub(super) struct Chunk {
    pub(super) pending: PendingName,
    pub(super) iova: Iova,
    pub(super) len: u32,
    pub(super) kind: ChunkKind,
}

impl Chunk {
    /// How many of `len` bytes from `at` lie in its page.
    pub(super) fn fitting(at: Iova, len: u32) -> u32 {
        let room = SLOT_BYTES - (at.0 % u64::from(SLOT_BYTES)) as u32;
        len.min(room)
    }
}

enum Queued {
    Chunk(Chunk),
    Message(ToBorrower),
}

/// What a slot is used for.
enum Slot {
    Free,
    Fetch(PendingName, LocalSpan, Iova, u32),
    Store(PendingName, Iova, u32),
    /// Given up by us, not answered yet.
    Forgotten,
}

/// Something to post: a write into the peer's staging memory, then a message.
pub(super) struct Step {
    pub(super) write: Option<(LocalSpan, RemoteSpan)>,
    pub(super) message: ToBorrower,
}

pub(super) struct Mediator {
    queue: VecDeque<Queued>,
    fetches: Vec<Slot>,
    stores: Vec<Slot>,
    /// Slots of `stores` that are not free.
    unanswered_stores: u32,
    fetch_memory: Arc<Memory>,
    fetch_grant: Grant,
    /// Where polled bytes wait while the fabric carries them: one line a store slot.
    polled_memory: Arc<Memory>,
    polled_region: LocalRegion,
    store_staging: Option<RemoteRegion>,
}

impl Mediator {
    pub(super) fn new<F: Fabric>(fabric: &mut F) -> Result<Self, AttachError> {
        let memory = |name| Memory::memfd(name, STAGING_BYTES).map_err(RegisterError::from);
        let fetch_memory = memory("farbus-staging")?;
        let fetch_region = fabric.register(Arc::clone(&fetch_memory), Access::READ_WRITE)?;
        let fetch_grant = fabric.export(&fetch_region, Access::WRITE).map_err(|error| AttachError::Device(error.to_string()))?;
        let polled_memory = memory("farbus-polled")?;
        let polled_region = fabric.register(Arc::clone(&polled_memory), Access::READ)?;
        let slots = || (0..SLOTS).map(|_| Slot::Free).collect();
        Ok(Self {
            queue: VecDeque::new(),
            fetches: slots(),
            stores: slots(),
            unanswered_stores: 0,
            fetch_memory,
            fetch_grant,
            polled_memory,
            polled_region,
            store_staging: None,
        })
    }

    pub(super) fn fetch_grant(&self) -> Grant {
        self.fetch_grant
    }

    pub(super) fn set_store_staging<F: Fabric>(&mut self, fabric: &mut F, grant: &Grant) -> Result<(), GrantError> {
        if self.store_staging.is_some() || grant.len < STAGING_BYTES {
            return Err(GrantError::TooLong { granted: grant.len, actual: STAGING_BYTES });
        }
        match fabric.import(grant) {
            Ok(region) => self.store_staging = Some(region),
            // The link ended behind the message that brought the grant, which is no fault; why it ended is said by an event.
            Err(GrantError::Closed) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Whether nothing waits, so that messages may go at once.
    #[inline]
    pub(super) fn is_idle(&self) -> bool {
        self.queue.is_empty()
    }

    /// Whether every store that was asked for is in guest memory, so that polled bytes cannot be seen before it.
    #[inline]
    pub(super) fn is_quiet(&self) -> bool {
        self.unanswered_stores == 0 && self.queue.is_empty()
    }

    pub(super) fn queue(&mut self, chunk: Chunk) {
        self.queue.push_back(Queued::Chunk(chunk));
    }

    /// Keeps a message behind what is queued; false where so many are that the borrower must be leaving stores unanswered on purpose.
    pub(super) fn hold(&mut self, message: ToBorrower) -> bool {
        let fits = self.queue.len() < MAX_QUEUED;
        if fits {
            self.queue.push_back(Queued::Message(message));
        }
        fits
    }

    /// Gives up what is queued or under way; answers that still come are ignored. Messages that were held are still sent:
    /// a spurious vector does no harm, a pin level that is never lowered does.
    pub(super) fn forget(&mut self) {
        self.queue.retain(|queued| matches!(queued, Queued::Message(_)));
        for slot in self.fetches.iter_mut().chain(&mut self.stores) {
            if !matches!(slot, Slot::Free) {
                *slot = Slot::Forgotten;
            }
        }
    }

    /// Takes out what is queued for a range; the DMAs that it belonged to, one name for each chunk.
    pub(super) fn withdraw(&mut self, iova: Iova, len: u64) -> Vec<PendingName> {
        let mut withdrawn = Vec::new();
        self.queue.retain(|queued| match queued {
            Queued::Chunk(chunk) => {
                let end = chunk.iova.0.saturating_add(u64::from(chunk.len));
                let stays = end <= iova.0 || chunk.iova.0 >= iova.0.saturating_add(len);
                if !stays {
                    withdrawn.push(chunk.pending);
                }
                stays
            }
            Queued::Message(_) => true,
        });
        withdrawn
    }

    /// The next thing that can be sent now; `None` where nothing waits or no slot is free.
    pub(super) fn next<F: Fabric>(&mut self, fabric: &F) -> Option<Step> {
        let staging = self.store_staging;
        let chunk = match self.queue.front()? {
            Queued::Message(message) => {
                let step = Step { write: None, message: *message };
                self.queue.pop_front();
                return Some(step);
            }
            Queued::Chunk(chunk) => chunk,
        };
        let (pending, iova, len) = (chunk.pending, chunk.iova, chunk.len);
        let slots = if matches!(chunk.kind, ChunkKind::Fetch(_)) { &mut self.fetches } else { &mut self.stores };
        let index = slots.iter().position(|slot| matches!(slot, Slot::Free))? as u32;
        let slot = slots.get_mut(index as usize)?;
        let offset = u64::from(index) * u64::from(SLOT_BYTES);
        let step = match &chunk.kind {
            ChunkKind::Fetch(into) => {
                *slot = Slot::Fetch(pending, *into, iova, len);
                Step { write: None, message: ToBorrower::Fetch { ticket: Ticket(index), iova, len } }
            }
            ChunkKind::Store(from) => {
                let to = staging?.span(offset, len, Access::WRITE).ok()?;
                *slot = Slot::Store(pending, iova, len);
                let message = ToBorrower::Store { ticket: Ticket(FIRST_STORE + index), iova, len, polled: false };
                Step { write: Some((*from, to)), message }
            }
            ChunkKind::StorePolled(bytes) => {
                let to = staging?.span(offset, len, Access::WRITE).ok()?;
                self.polled_memory.write(offset, bytes).ok()?;
                let from = self.polled_region.span(offset, len, Access::READ).ok()?;
                *slot = Slot::Store(pending, iova, len);
                let message = ToBorrower::Store { ticket: Ticket(FIRST_STORE + index), iova, len, polled: true };
                Step { write: Some((from, to)), message }
            }
        };
        debug_assert!(fabric.limits().max_op_len >= SLOT_BYTES, "a page fits every fabric's operations");
        self.unanswered_stores += u32::from(!matches!(chunk.kind, ChunkKind::Fetch(_)));
        self.queue.pop_front();
        Some(step)
    }

    /// A fetch was answered: copies its bytes to the device. `None` where no such fetch is under way.
    pub(super) fn fetched<F: Fabric>(&mut self, fabric: &F, ticket: Ticket, ok: bool) -> Option<(u32, u32, Result<(), DmaFault>)> {
        let slot = self.fetches.get_mut(ticket.0 as usize)?;
        match std::mem::replace(slot, Slot::Free) {
            Slot::Fetch((index, generation), into, iova, len) => {
                let offset = u64::from(ticket.0) * u64::from(SLOT_BYTES);
                let copied = ok
                    && fabric.map_local(into).is_some_and(|local| {
                        let (memory, start) = local.parts();
                        memory.copy_from(start, &self.fetch_memory, offset, u64::from(len)).is_ok()
                    });
                let fault = DmaFault::Unmapped { iova, len: u64::from(len) };
                Some((index, generation, if copied { Ok(()) } else { Err(fault) }))
            }
            // Nobody waits any more; generation 0 is never in use.
            Slot::Forgotten => Some((u32::MAX, 0, Ok(()))),
            Slot::Free | Slot::Store(..) => None,
        }
    }

    /// A store was answered. `None` where no such store is under way.
    pub(super) fn stored(&mut self, ticket: Ticket, ok: bool) -> Option<(u32, u32, Result<(), DmaFault>)> {
        let slot = self.stores.get_mut(ticket.0.checked_sub(FIRST_STORE)? as usize)?;
        let answered = std::mem::replace(slot, Slot::Free);
        self.unanswered_stores -= u32::from(!matches!(answered, Slot::Free));
        match answered {
            Slot::Store((index, generation), iova, len) => {
                let fault = DmaFault::Unmapped { iova, len: u64::from(len) };
                Some((index, generation, if ok { Ok(()) } else { Err(fault) }))
            }
            Slot::Forgotten => Some((u32::MAX, 0, Ok(()))),
            Slot::Free | Slot::Fetch(..) => None,
        }
    }
}
