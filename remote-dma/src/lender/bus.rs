//! The bus a device sees at the lender, as the session keeps it: windows, what is under way, and what was asked of the guest's side.
//!
//! An unmap of 1 MiB at 0 takes the windows, gives the session a token whose count falls to zero with the last DMA under way, and fails what
//! was to be asked of the guest's side for that range. What the device itself calls is in `lender/dma.rs`.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Weak;

use farbus_transport::{Access, CloseReason, Events, Fabric, Grant, Nanos, Op, OpId, Signal};

use super::InUse;
use super::counters::Counters;
use super::mediation::Mediator;
use super::windows::Windows;
use crate::address::Iova;
use crate::attachment::Ticket;
use crate::backend::{AttachError, DeviceWindow, DmaFault, DmaTag};
use crate::endpoint::Endpoint;
use crate::message::{Outcome, ToBorrower};
use crate::shared_window::SharedWindow;

/// A DMA of several operations or mediations.
pub(super) struct Pending {
    tag: DmaTag,
    pub(super) left: u32,
    fault: Option<DmaFault>,
    generation: u32,
    /// Keeps an unmap waiting while the fabric may still touch guest memory; mediated DMA never does.
    in_use: Option<InUse>,
}

pub(super) struct LenderBus<F> {
    pub(super) link: Endpoint<F>,
    pub(super) now: Nanos,
    pub(super) windows: Windows,
    pub(super) mediator: Mediator,
    pub(super) bus_master: bool,
    pub(super) pending: Vec<Option<Pending>>,
    free: Vec<u32>,
    generation: u32,
    finished: VecDeque<(DmaTag, Result<(), DmaFault>)>,
    pub(super) fault: Option<CloseReason>,
    pub(super) counters: Counters,
}

impl<F: Fabric> LenderBus<F> {
    pub(super) fn new(mut fabric: F) -> Result<Self, AttachError> {
        let mediator = Mediator::new(&mut fabric)?;
        // As many operations as the queue holds: direct DMA that is under way never makes these grow.
        let depth = fabric.limits().queue_depth as usize;
        let mut bus = Self {
            link: Endpoint::new(fabric),
            now: Nanos::now(),
            windows: Windows::new(),
            mediator,
            bus_master: false,
            pending: Vec::with_capacity(depth),
            free: Vec::with_capacity(depth),
            generation: 0,
            finished: VecDeque::with_capacity(depth),
            fault: None,
            counters: Counters::default(),
        };
        let staging = bus.mediator.fetch_grant();
        bus.post_message(ToBorrower::Staging(staging));
        bus.flush();
        Ok(bus)
    }

    pub(super) fn set_now(&mut self, now: Nanos) {
        self.now = now;
    }

    pub(super) fn poll(&mut self, events: &mut Events) {
        self.link.poll(self.now, events);
    }

    pub(super) fn flush(&mut self) {
        self.link.flush();
    }

    pub(super) fn arm(&mut self) -> bool {
        self.finished.is_empty() && self.link.arm()
    }

    pub(super) fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.link.wake_fd()
    }

    /// Says goodbye.
    pub(super) fn close(&mut self) {
        self.link.close();
    }

    /// Carries out no DMA and sends nothing from now on.
    pub(super) fn refuse(&mut self) {
        self.link.refuse();
    }

    pub(super) fn fault(&mut self) -> Option<CloseReason> {
        self.fault.take().or_else(|| self.link.stalled())
    }

    pub(super) fn counters(&self) -> Counters {
        self.counters
    }

    pub(super) fn set_bus_master(&mut self, enabled: bool) {
        self.bus_master = enabled;
    }

    pub(super) fn offer(&mut self, memory: Grant, dirty: Grant, proven: bool) -> Outcome {
        self.windows.offer(&mut self.link.fabric, memory, dirty, proven).unwrap_or_else(|missing| {
            tracing::error!(%missing, "the borrower announced memory that it did not deliver");
            self.fault = Some(CloseReason::Protocol("memory that was announced and not delivered"));
            Outcome::Grant
        })
    }

    pub(super) fn map_window(&mut self, iova: Iova, len: u64, key: Option<u64>, offset: u64, access: Access) -> Outcome {
        self.windows.map(iova, len, key, offset, access)
    }

    /// A window's memory, for a device that maps it itself; `None` where it is reached access by access only.
    pub(super) fn shared_window(&mut self, iova: Iova, len: u64, access: Access) -> Option<SharedWindow> {
        let piece = self.windows.map.piece(iova, len, access).ok()?;
        let direct = piece.target.direct.as_ref()?;
        let log = direct.dirty.clone()?;
        let offset = piece.target.offset;
        let held = self.link.fabric.map_remote(direct.region.span(0, 0, Access::NONE).ok()?)?;
        Some(SharedWindow::new(held, offset, len, access.write.then_some((log, offset))))
    }

    pub(super) fn unmap_windows(&mut self, iova: Iova, len: u64) -> Result<Weak<()>, Outcome> {
        let in_use = self.windows.unmap(iova, len)?;
        // What was asked of the guest's side is ahead of the acknowledgement; what waits for a slot would come behind it.
        for (index, generation) in self.mediator.withdraw(iova, len) {
            self.part_done(index, generation, Err(DmaFault::Unmapped { iova, len }));
        }
        self.advance();
        Ok(in_use)
    }

    pub(super) fn withdraw(&mut self, key: u64) -> Outcome {
        self.windows.withdraw(&mut self.link.fabric, key)
    }

    /// The windows that may be accessed directly from now on.
    pub(super) fn prove(&mut self, key: u64) -> Vec<(Iova, u64)> {
        self.windows.prove(key)
    }

    /// A window for a device that reaches memory by itself.
    pub(super) fn device_window(&self, iova: Iova, len: u64) -> Option<DeviceWindow> {
        self.windows.for_device(&self.link.fabric, iova, len)
    }

    /// Ends every window and every offer; false where something is still in one.
    pub(super) fn let_go_of_all(&mut self) -> bool {
        self.bus_master = false;
        !self.has_pending() && self.windows.let_go_of_all(&mut self.link.fabric)
    }

    pub(super) fn set_store_staging(&mut self, grant: &Grant) {
        if let Err(error) = self.mediator.set_store_staging(&mut self.link.fabric, grant) {
            tracing::error!(%error, "the borrower's staging memory cannot be used");
            self.fault = Some(CloseReason::Protocol("staging memory that cannot be used"));
        }
    }

    pub(super) fn next_finished(&mut self) -> Option<(DmaTag, Result<(), DmaFault>)> {
        self.finished.pop_front()
    }

    /// Whether DMA is in flight that has not been handed back.
    pub(super) fn has_pending(&self) -> bool {
        !self.finished.is_empty() || self.pending.iter().any(Option::is_some)
    }

    /// Ends as fenced what the guest's side was asked to do; with `all` also what the fabric still does, because its link is gone.
    pub(super) fn fail_pending(&mut self, all: bool) {
        self.mediator.forget();
        for (index, slot) in self.pending.iter_mut().enumerate() {
            if let Some(pending) = slot.take_if(|pending| all || pending.in_use.is_none()) {
                self.finished.push_back((pending.tag, Err(DmaFault::Fenced)));
                self.free.push(index as u32);
            }
        }
        // What waited behind them waits for nothing now.
        self.advance();
    }

    /// An operation of a pending DMA ended.
    pub(super) fn operation_done(&mut self, id: OpId, result: Result<(), DmaFault>) {
        let (index, generation) = (id.0 as u32, (id.0 >> 32) as u32);
        self.part_done(index, generation, result);
    }

    pub(super) fn fetched(&mut self, ticket: Ticket, ok: bool) {
        match self.mediator.fetched(&self.link.fabric, ticket, ok) {
            Some((index, generation, result)) => self.part_done(index, generation, result),
            None => self.fault = Some(CloseReason::Protocol("an answer to a read that was not asked for")),
        }
        self.advance();
    }

    pub(super) fn taken(&mut self, ticket: Ticket) {
        if !self.mediator.taken(ticket) {
            self.fault = Some(CloseReason::Protocol("a slot was given back that was not in use"));
        }
        self.advance();
    }

    pub(super) fn stored(&mut self, ticket: Ticket, ok: bool) {
        match self.mediator.stored(ticket, ok) {
            Some((index, generation, result)) => self.part_done(index, generation, result),
            None => self.fault = Some(CloseReason::Protocol("an answer to a write that was not asked for")),
        }
        self.advance();
    }

    /// Sends a message that must not pass mediated writes which still wait for a staging slot: one that could reveal them. Who waits for the
    /// answer to a register read frees the slots meanwhile.
    #[inline]
    pub(super) fn send_in_order(&mut self, message: ToBorrower) {
        if self.mediator.is_idle() {
            self.post_message(message);
        } else if !self.mediator.hold(message) {
            self.fault = Some(CloseReason::Protocol("stores that are never answered"));
        }
    }

    /// Acknowledges a question of the borrower. It may pass mediated writes that wait for a staging slot: it says nothing of what they bring.
    #[inline]
    pub(super) fn send_answer(&mut self, message: ToBorrower) {
        self.post_message(message);
    }

    fn part_done(&mut self, index: u32, generation: u32, result: Result<(), DmaFault>) {
        let Some(slot) = self.pending.get_mut(index as usize) else {
            return;
        };
        let Some(pending) = slot.as_mut().filter(|pending| pending.generation == generation) else {
            return;
        };
        pending.left = pending.left.saturating_sub(1);
        if let Err(fault) = result {
            pending.fault.get_or_insert(fault);
        }
        if pending.left == 0 {
            let outcome = pending.fault.map_or(Ok(()), Err);
            self.counters.faults += u64::from(outcome.is_err());
            self.finished.push_back((pending.tag, outcome));
            *slot = None;
            self.free.push(index);
        }
    }

    pub(super) fn start(&mut self, tag: DmaTag, left: u32, in_use: Option<InUse>) -> (u32, u32) {
        self.generation = self.generation.wrapping_add(1);
        let pending = Pending { tag, left, fault: None, generation: self.generation, in_use };
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                self.pending.push(None);
                (self.pending.len() - 1) as u32
            }
        };
        if let Some(slot) = self.pending.get_mut(index as usize) {
            *slot = Some(pending);
        }
        (index, self.generation)
    }

    #[inline]
    pub(super) fn post_message(&mut self, message: ToBorrower) {
        let encoded = message.encode();
        self.link.send(encoded.as_slice());
    }

    /// Sends what waits for staging slots, as far as there are some.
    pub(super) fn advance(&mut self) {
        while self.fault.is_none() {
            let Some(step) = self.mediator.next(&self.link.fabric) else {
                break;
            };
            if let Some((from, to)) = step.write
                && !self.link.post(Signal::No, Op::Write { from, to })
            {
                // What lies in the slot is not what the message would say. The session ends now.
                break;
            }
            self.post_message(step.message);
        }
    }
}
