//! The borrower's half of mediated DMA: bytes fetched from the guest go into the lender's staging slot, bytes to store come out of ours.
//!
//! Ticket 5 asks for 64 bytes at iova 0x1_0400: when the guest's side has them, they are written to slot 5 over there and `Fetched` follows.
//! A ticket is used once; sizes are what was asked for, or the answer is a fault. The bytes of a store are copied out of their slot when it
//! is asked for, so the slot can be given back before the guest's side has stored them.

use std::sync::Arc;

use farbus_transport::{Access, Fabric, Grant, GrantError, LocalRegion, Memory, Op, RemoteRegion};

use crate::address::Iova;
use crate::attachment::{MediationAnswer, Ticket};
pub(super) use crate::lender::SLOT_BYTES;
use crate::lender::{FIRST_STORE, MAX_STORES, SLOTS, STAGING_BYTES};
use crate::message::ToLender;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Slot {
    Free,
    Fetch(u32),
    /// A store; true while the lender takes its slot for used.
    Store(bool),
}

pub(super) struct Staging {
    /// Indexed by ticket: fetches, then stores as far as there were any at once.
    slots: Vec<Slot>,
    /// Stores whose slots the lender takes for used.
    untaken: Vec<Ticket>,
    stores: Arc<Memory>,
    store_grant: Grant,
    /// Fetched bytes while the fabric carries them.
    replies: Arc<Memory>,
    reply_region: LocalRegion,
    fetch_staging: Option<RemoteRegion>,
}

impl Staging {
    pub(super) fn new<F: Fabric>(fabric: &mut F) -> Result<Self, GrantError> {
        let stores = Memory::memfd("farbus-staging", STAGING_BYTES)?;
        let store_region = fabric.register(Arc::clone(&stores), Access::READ_WRITE)?;
        let store_grant = fabric.export(&store_region, Access::WRITE)?;
        let replies = Memory::memfd("farbus-replies", STAGING_BYTES)?;
        let reply_region = fabric.register(Arc::clone(&replies), Access::READ)?;
        let (slots, untaken) = (vec![Slot::Free; 2 * SLOTS as usize], Vec::with_capacity(SLOTS as usize));
        Ok(Self { slots, untaken, stores, store_grant, replies, reply_region, fetch_staging: None })
    }

    pub(super) fn store_grant(&self) -> Grant {
        self.store_grant
    }

    pub(super) fn set_fetch_staging<F: Fabric>(&mut self, fabric: &mut F, grant: &Grant) -> Result<(), GrantError> {
        if self.fetch_staging.is_some() || grant.len < STAGING_BYTES {
            return Err(GrantError::TooLong { granted: grant.len, actual: STAGING_BYTES });
        }
        match fabric.import(grant) {
            Ok(region) => self.fetch_staging = Some(region),
            // The link ended behind the message that brought the grant, which is no fault; why it ended is said by an event.
            Err(GrantError::Closed) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    pub(super) fn begin_fetch(&mut self, ticket: Ticket, iova: Iova, len: u32) -> Result<(), &'static str> {
        check_page(iova, len)?;
        let slot = self.slots.get_mut(ticket.0 as usize).filter(|_| ticket.0 < FIRST_STORE).ok_or("a fetch with a wild ticket")?;
        if *slot != Slot::Free {
            return Err("a ticket that is in use");
        }
        *slot = Slot::Fetch(len);
        Ok(())
    }

    /// The bytes to store, copied out once.
    pub(super) fn begin_store<'a>(
        &mut self,
        (ticket, place): (Ticket, u8),
        iova: Iova,
        len: u32,
        bytes: &'a mut [u8; SLOT_BYTES as usize],
    ) -> Result<&'a [u8], &'static str> {
        check_page(iova, len)?;
        if ticket.0.checked_sub(FIRST_STORE).is_none_or(|index| index >= MAX_STORES) || u32::from(place) >= SLOTS {
            return Err("a store with a wild ticket or slot");
        }
        // More slots in use at once than there are is the lender's lie.
        if self.untaken.len() >= SLOTS as usize {
            return Err("more stores than slots");
        }
        let index = ticket.0 as usize;
        if self.slots.len() <= index {
            self.slots.resize(index + 1, Slot::Free);
        }
        let slot = self.slots.get_mut(index).filter(|slot| **slot == Slot::Free).ok_or("a ticket that is in use")?;
        let bytes = bytes.get_mut(..len as usize).ok_or("a store of more than a page")?;
        self.stores.read(u64::from(place) * u64::from(SLOT_BYTES), bytes).map_err(|_| "a store outside its slot")?;
        *slot = Slot::Store(true);
        self.untaken.push(ticket);
        Ok(bytes)
    }

    /// A store whose slot can be given back before its answer.
    pub(super) fn take(&mut self) -> Option<Ticket> {
        let ticket = self.untaken.pop()?;
        if let Some(slot) = self.slots.get_mut(ticket.0 as usize) {
            *slot = Slot::Store(false);
        }
        Some(ticket)
    }

    /// What to post for an answer: a write of the bytes, where there are some, and the message that follows it.
    pub(super) fn end(
        &mut self,
        ticket: Ticket,
        answer: MediationAnswer<'_>,
    ) -> Result<(Option<Op<'static>>, ToLender), &'static str> {
        let slot = self.slots.get_mut(ticket.0 as usize).ok_or("no such ticket")?;
        match std::mem::replace(slot, Slot::Free) {
            Slot::Free => Err("the ticket is not in use"),
            Slot::Store(untaken) => {
                if untaken {
                    self.untaken.retain(|other| *other != ticket);
                }
                Ok((None, ToLender::Stored { ticket, ok: answer == MediationAnswer::Stored }))
            }
            Slot::Fetch(len) => {
                let write = match answer {
                    MediationAnswer::Fetched(bytes) if bytes.len() == len as usize => self.reply(ticket, bytes),
                    _ => None,
                };
                Ok((write, ToLender::Fetched { ticket, ok: write.is_some() }))
            }
        }
    }

    fn reply(&self, ticket: Ticket, bytes: &[u8]) -> Option<Op<'static>> {
        let (offset, len) = (u64::from(ticket.0) * u64::from(SLOT_BYTES), u32::try_from(bytes.len()).ok()?);
        self.replies.write(offset, bytes).ok()?;
        let from = self.reply_region.span(offset, len, Access::READ).ok()?;
        let to = self.fetch_staging?.span(offset, len, Access::WRITE).ok()?;
        Some(Op::Write { from, to })
    }
}

fn check_page(iova: Iova, len: u32) -> Result<(), &'static str> {
    let page = u64::from(SLOT_BYTES);
    if len == 0 || iova.0 % page + u64::from(len) > page {
        return Err("a mediation that is not inside one page");
    }
    Ok(())
}
