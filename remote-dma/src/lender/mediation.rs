//! DMA that the guest's side must carry out itself, page by page, through staging memory on both sides.
//!
//! A read of 64 bytes at iova 0x1_0400 in memory without a descriptor: the lender asks for ticket 5, the borrower writes the bytes into slot 5
//! of the lender's staging memory and says so. A write is put into a slot of the borrower's, and has a ticket of its own, because the
//! borrower may take the bytes out long before they are in guest memory.
//!
//! Writes, and whatever is said after one and could reveal it, wait in one queue: interrupts, and answers to register reads. Reads wait in
//! another: they pass no write, but writes pass them, as PCI wants it (PCIe 5.0, section 2.4.1), or nothing would move while the guest's side
//! waits for an answer and makes no access.

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
/// Writes that are asked for and not answered at most: what the guest's side holds of them is 256 MiB then.
pub(crate) const MAX_STORES: u32 = 1 << 16;
/// Mediations of both kinds that a lender asks for and that are not answered, at most.
pub const MAX_MEDIATIONS: usize = (MAX_STORES + SLOTS) as usize;

/// Tickets of stores begin here; those of fetches at 0.
pub(crate) const FIRST_STORE: u32 = SLOTS;

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

    fn touches(&self, iova: Iova, len: u64) -> bool {
        let end = self.iova.0.saturating_add(u64::from(self.len));
        iova.0 < end && self.iova.0 < iova.0.saturating_add(len)
    }
}

/// What keeps its order.
enum Queued {
    /// A store and its number.
    Store(u64, Chunk),
    Message(ToBorrower),
}

/// What a fetch's slot is used for.
enum Fetch {
    Free,
    Asked(PendingName, LocalSpan, Iova, u32),
    /// Given up by us, not answered yet.
    Forgotten,
}

/// What a store's ticket stands for.
enum Store {
    Free,
    Asked(PendingName, Iova, u32),
    /// Given up by us, not answered yet.
    Forgotten,
}

/// What can be sent now: perhaps a write into staging memory, then a message.
pub(super) struct Step {
    pub(super) write: Option<(LocalSpan, RemoteSpan)>,
    pub(super) message: ToBorrower,
}

/// All stores that the borrower was asked for, by ticket, and the slots that their bytes are in.
struct Stores {
    by_ticket: Vec<(Store, Option<u8>)>,
    free: Vec<u32>,
    /// A bit for each slot that is free.
    free_slots: u32,
    /// Tickets that are not free.
    unanswered: u32,
}

impl Stores {
    fn new() -> Self {
        Self { by_ticket: Vec::new(), free: Vec::new(), free_slots: (1 << SLOTS) - 1, unanswered: 0 }
    }

    /// A ticket and a slot; `None` where one of them is missing.
    fn begin(&mut self, pending: PendingName, iova: Iova, len: u32) -> Option<(Ticket, u8)> {
        let slot = self.free_slots.trailing_zeros();
        if slot >= SLOTS || self.unanswered >= MAX_STORES {
            return None;
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.by_ticket.push((Store::Free, None));
            (self.by_ticket.len() - 1) as u32
        });
        *self.by_ticket.get_mut(index as usize)? = (Store::Asked(pending, iova, len), Some(slot as u8));
        self.free_slots &= !(1 << slot);
        self.unanswered += 1;
        Some((Ticket(FIRST_STORE + index), slot as u8))
    }

    /// The bytes are out of their slot. False where that is said of none, or again.
    fn taken(&mut self, ticket: Ticket) -> bool {
        let index = ticket.0.wrapping_sub(FIRST_STORE) as usize;
        let slot = self.by_ticket.get_mut(index).and_then(|(_, slot)| slot.take());
        self.free_slots |= slot.map_or(0, |slot| 1 << slot);
        slot.is_some()
    }

    /// A store ended; what it was for.
    fn end(&mut self, ticket: Ticket) -> Store {
        let index = ticket.0.wrapping_sub(FIRST_STORE);
        self.taken(ticket);
        let Some((store, _)) = self.by_ticket.get_mut(index as usize) else { return Store::Free };
        let ended = std::mem::replace(store, Store::Free);
        if !matches!(ended, Store::Free) {
            self.unanswered -= 1;
            self.free.push(index);
        }
        ended
    }

    fn forget(&mut self) {
        for (store, _) in &mut self.by_ticket {
            if matches!(store, Store::Asked(..)) {
                *store = Store::Forgotten;
            }
        }
    }
}

pub(super) struct Mediator {
    /// Stores, and the messages behind them.
    queue: VecDeque<Queued>,
    /// Fetches, each with the number of the first store that it need not wait for.
    fetches_queued: VecDeque<(u64, Chunk)>,
    /// Stores queued so far.
    numbered: u64,
    fetches: Vec<Fetch>,
    stores: Stores,
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
        Ok(Self {
            queue: VecDeque::new(),
            fetches_queued: VecDeque::new(),
            numbered: 0,
            fetches: (0..SLOTS).map(|_| Fetch::Free).collect(),
            stores: Stores::new(),
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

    /// Whether no store waits, so that messages may go at once.
    #[inline]
    pub(super) fn is_idle(&self) -> bool {
        self.queue.is_empty()
    }

    /// Whether every store that was asked for is in guest memory, so that polled bytes cannot be seen before it.
    #[inline]
    pub(super) fn is_quiet(&self) -> bool {
        self.stores.unanswered == 0 && self.queue.is_empty()
    }

    pub(super) fn queue(&mut self, chunk: Chunk) {
        if matches!(chunk.kind, ChunkKind::Fetch(_)) {
            self.fetches_queued.push_back((self.numbered, chunk));
        } else {
            self.queue.push_back(Queued::Store(self.numbered, chunk));
            self.numbered += 1;
        }
    }

    /// Keeps a message behind the stores that are queued; false where so many are that the borrower must be leaving stores unanswered on purpose.
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
        self.fetches_queued.clear();
        for fetch in &mut self.fetches {
            if matches!(fetch, Fetch::Asked(..)) {
                *fetch = Fetch::Forgotten;
            }
        }
        self.stores.forget();
    }

    /// Takes out what is queued for a range; the DMAs that it belonged to, one name for each chunk.
    pub(super) fn withdraw(&mut self, iova: Iova, len: u64) -> Vec<PendingName> {
        let mut withdrawn = Vec::new();
        let mut stays = |chunk: &Chunk| {
            let touches = chunk.touches(iova, len);
            if touches {
                withdrawn.push(chunk.pending);
            }
            !touches
        };
        self.queue.retain(|queued| match queued {
            Queued::Store(_, chunk) => stays(chunk),
            Queued::Message(_) => true,
        });
        self.fetches_queued.retain(|(_, chunk)| stays(chunk));
        withdrawn
    }

    /// The next thing that can be sent now; `None` where nothing waits or what waits lacks a slot.
    pub(super) fn next<F: Fabric>(&mut self, fabric: &F) -> Option<Step> {
        debug_assert!(fabric.limits().max_op_len >= SLOT_BYTES, "a page fits every fabric's operations");
        let first_store = match self.queue.front() {
            Some(Queued::Message(message)) => {
                let step = Step { write: None, message: *message };
                self.queue.pop_front();
                return Some(step);
            }
            Some(Queued::Store(number, _)) => *number,
            None => u64::MAX,
        };
        if let Some(fetch) = self.next_fetch(first_store) {
            return Some(fetch);
        }
        self.next_store()
    }

    /// The next fetch, if all stores before it are sent.
    fn next_fetch(&mut self, first_store: u64) -> Option<Step> {
        let (_, chunk) = self.fetches_queued.front().filter(|(after, _)| *after <= first_store)?;
        let ChunkKind::Fetch(into) = chunk.kind else { return None };
        let (index, slot) = self.fetches.iter_mut().enumerate().find(|(_, fetch)| matches!(fetch, Fetch::Free))?;
        *slot = Fetch::Asked(chunk.pending, into, chunk.iova, chunk.len);
        let message = ToBorrower::Fetch { ticket: Ticket(index as u32), iova: chunk.iova, len: chunk.len };
        self.fetches_queued.pop_front();
        Some(Step { write: None, message })
    }

    fn next_store(&mut self) -> Option<Step> {
        let staging = self.store_staging?;
        let Some(Queued::Store(_, chunk)) = self.queue.front() else { return None };
        let (iova, len) = (chunk.iova, chunk.len);
        let (ticket, slot) = self.stores.begin(chunk.pending, iova, len)?;
        let offset = u64::from(slot) * u64::from(SLOT_BYTES);
        // Both fit: slot and length were checked when the slot was given and the chunk was cut.
        let to = staging.span(offset, len, Access::WRITE).ok()?;
        let (from, polled) = match &chunk.kind {
            ChunkKind::Store(from) => (*from, false),
            ChunkKind::StorePolled(bytes) => {
                self.polled_memory.write(offset, bytes).ok()?;
                (self.polled_region.span(offset, len, Access::READ).ok()?, true)
            }
            ChunkKind::Fetch(_) => return None,
        };
        self.queue.pop_front();
        Some(Step { write: Some((from, to)), message: ToBorrower::Store { ticket, slot, iova, len, polled } })
    }

    /// A fetch was answered: copies its bytes to the device. `None` where no such fetch is under way.
    pub(super) fn fetched<F: Fabric>(&mut self, fabric: &F, ticket: Ticket, ok: bool) -> Option<(u32, u32, Result<(), DmaFault>)> {
        let fetch = self.fetches.get_mut(ticket.0 as usize)?;
        match std::mem::replace(fetch, Fetch::Free) {
            Fetch::Asked((index, generation), into, iova, len) => {
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
            Fetch::Forgotten => Some((u32::MAX, 0, Ok(()))),
            Fetch::Free => None,
        }
    }

    /// The slot of a store is free before its answer. False where it has none.
    pub(super) fn taken(&mut self, ticket: Ticket) -> bool {
        self.stores.taken(ticket)
    }

    /// A store was answered. `None` where no such store is under way.
    pub(super) fn stored(&mut self, ticket: Ticket, ok: bool) -> Option<(u32, u32, Result<(), DmaFault>)> {
        match self.stores.end(ticket) {
            Store::Asked((index, generation), iova, len) => {
                let fault = DmaFault::Unmapped { iova, len: u64::from(len) };
                Some((index, generation, if ok { Ok(()) } else { Err(fault) }))
            }
            Store::Forgotten => Some((u32::MAX, 0, Ok(()))),
            Store::Free => None,
        }
    }
}
