//! What happens on the way: operations are cut into pieces, land late and in any allowed order, and take effect at the peer.
//!
//! The 4 KiB of a write may land as bytes 3000 to 4095, then 0 to 2999; the message behind it is put on the agenda at the later of the
//! two times, never before, and a read that passes in between may sample the one piece and not the other.

use std::cmp::Reverse;
use std::sync::Arc;

use super::options::Violation;
use super::world::{Carried, Inner, Landing, Life, SideIndex, What};
use crate::fabric::{CloseReason, Event, OpError};
use crate::memory::Memory;
use crate::span::{LocalSpan, RemoteSpan};
use crate::time::Nanos;

impl Inner {
    /// Lets everything happen that is due by `to`.
    pub(super) fn advance(&mut self, to: Nanos) {
        while let Some(Reverse(due)) = self.agenda.peek()
            && due.at <= to
            && let Some(Reverse(due)) = self.agenda.pop()
        {
            self.now = self.now.max(due.at);
            self.happen(due.what);
        }
        self.now = self.now.max(to);
    }

    pub(super) fn send_off(&mut self, side: SideIndex, number: u64, op: Carried) {
        let floor = self.sides[side].last_arrival.max(self.now);
        let mut arrive = self.across(side).max(floor);
        match op {
            Carried::Write { from, to, .. } => {
                if self.breaks(Violation::DoneBeforeData) {
                    self.put(self.now, What::Done { side, number });
                }
                let late = self.breaks(Violation::MessageBeforeData) || self.breaks(Violation::NotifyBeforeData);
                for (start, len) in self.pieces(from.len) {
                    let (Some(local), Some(remote)) = (from.part(start, len), to.part(start, len)) else {
                        continue;
                    };
                    let mut at = self.landing(side, &remote);
                    if late || self.breaks(Violation::DoneBeforeData) {
                        at = Nanos(at.0 + 2 * (self.options.latency_max_ns + 1));
                    }
                    if !late {
                        arrive = arrive.max(at);
                    }
                    self.put_piece(at, side, number, (local, remote), true);
                }
            }
            Carried::Read { from, into } => {
                for (start, len) in self.pieces(into.len) {
                    let (Some(local), Some(remote)) = (into.part(start, len), from.part(start, len)) else {
                        continue;
                    };
                    // Bytes are sampled when all earlier writes are there; later ones may be there too.
                    let at = if self.breaks(Violation::ReadPassesWrite) { self.now } else { self.across(side).max(floor) };
                    arrive = arrive.max(at);
                    self.put_piece(at, side, number, (local, remote), false);
                }
                // The read holds up its own completion, not the operations behind it.
                self.put(arrive, What::Arrive { side, number, op });
                return;
            }
            Carried::Send(_) | Carried::Notify(_) | Carried::Nothing => {}
        }
        self.sides[side].last_arrival = arrive;
        self.put(arrive, What::Arrive { side, number, op });
    }

    fn put_piece(&mut self, at: Nanos, side: SideIndex, number: u64, spans: (LocalSpan, RemoteSpan), into_remote: bool) {
        let (local, remote) = spans;
        let keeps = self.breaks(Violation::WriteAfterRevoke) && into_remote;
        let captured = self.remote_memory(side, &remote).ok().filter(|_| keeps);
        self.put(at, What::Piece { side, number, local, remote, into_remote, captured });
    }

    /// When a piece lands: any time, but never before bytes of an earlier write to the same place.
    fn landing(&mut self, side: SideIndex, remote: &RemoteSpan) -> Nanos {
        let mut at = self.across(side);
        let Ok(memory) = self.remote_memory(side, remote) else {
            return at;
        };
        let (memory, start, end) = (Arc::as_ptr(&memory) as usize, remote.offset, remote.offset + u64::from(remote.len));
        let now = self.now;
        let landings = &mut self.sides[side].landings;
        landings.retain(|landing| landing.at >= now);
        for earlier in landings.iter() {
            if earlier.memory == memory && earlier.start < end && start < earlier.end {
                at = at.max(earlier.at);
            }
        }
        landings.push(Landing { memory, start, end, at });
        at
    }

    /// Cuts `len` bytes into pieces, in any order.
    fn pieces(&mut self, len: u32) -> Vec<(u32, u32)> {
        let count = self.seed.between(1, u64::from(self.options.max_pieces.max(1)));
        let mut cuts: Vec<u32> = (1..count).map(|_| self.seed.below(u64::from(len)) as u32).collect();
        cuts.extend([0, len]);
        cuts.sort_unstable();
        let mut pieces: Vec<_> = cuts.windows(2).map(|pair| (pair[0], pair[1] - pair[0])).collect();
        for last in (1..pieces.len()).rev() {
            pieces.swap(last, self.seed.below(last as u64 + 1) as usize);
        }
        pieces
    }

    pub(super) fn remote_memory(&self, side: SideIndex, span: &RemoteSpan) -> Result<Arc<Memory>, OpError> {
        self.sides[side].book.remote(span, &self.sides[1 - side].book)
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Cut => self.cut(),
            What::Gone { side } => self.end(side, CloseReason::PeerGone),
            _ if self.cut => {}
            What::Piece { side, number, local, remote, into_remote, captured } => {
                let moved = self.move_bytes(side, &local, &remote, into_remote, captured);
                if let Err(error) = moved {
                    self.fail(side, number, error);
                }
            }
            What::Arrive { side, number, op } => self.arrive(side, number, op),
            What::Done { side, number } => {
                if let Some(out) = self.sides[side].find(number) {
                    out.done = true;
                }
                self.rouse(side);
            }
            What::Credit { side } => self.sides[side].credits += 1,
            What::Goodbye { side } => {
                if !self.breaks(Violation::LoseClose) {
                    self.end(1 - side, CloseReason::PeerClosed);
                }
            }
        }
    }

    pub(super) fn move_bytes(
        &mut self,
        side: SideIndex,
        local: &LocalSpan,
        remote: &RemoteSpan,
        into_remote: bool,
        captured: Option<Arc<Memory>>,
    ) -> Result<(), OpError> {
        // A peer that closed its end has not taken its memory back by that: what is under way to it may land until it does.
        if self.cut {
            return Err(OpError::Closed);
        }
        let here = self.sides[side].book.local(local)?;
        let there = captured.map_or_else(|| self.remote_memory(side, remote), Ok)?;
        let (len, here_at, there_at) = (u64::from(local.len), local.offset, remote.offset);
        let copied = if into_remote {
            there.copy_from(there_at, &here, here_at, len)
        } else {
            here.copy_from(here_at, &there, there_at, len)
        };
        if into_remote && len > 0 && self.breaks(Violation::FlipBit) && self.seed.chance(20) {
            let (at, mut byte) = (there_at + self.seed.below(len), [0]);
            let flipped = there.read(at, &mut byte).and_then(|()| there.write(at, &[byte[0] ^ 0x10]));
            debug_assert!(flipped.is_ok());
        }
        // The grant was compared with the memory when it was imported, so this is a region that changed since.
        copied.map_err(|_| OpError::Revoked)
    }

    fn arrive(&mut self, side: SideIndex, number: u64, op: Carried) {
        if !self.is_open(1 - side) {
            return;
        }
        let event = match op {
            Carried::Send(message) => Some(Event::Message(message)),
            Carried::Notify(notify) => Some(Event::Notify(notify)),
            Carried::Write { notify, to, .. } => {
                let stands = self.remote_memory(side, &to);
                if let Err(error) = stands {
                    self.fail(side, number, error);
                }
                let failed = self.sides[side].find(number).is_some_and(|out| out.result.is_err());
                // A failed write notifies nobody, so the place kept for its notification is free again.
                if failed && notify.is_some() {
                    self.sides[side].credits += 1;
                }
                notify.filter(|_| !failed).map(Event::Notify)
            }
            Carried::Read { .. } | Carried::Nothing => None,
        };
        if let Some(event) = event {
            self.deliver(1 - side, event);
        }
        let done = self.across(1 - side);
        self.put(done, What::Done { side, number });
    }

    fn deliver(&mut self, to: SideIndex, event: Event) {
        let is_message = matches!(event, Event::Message(_));
        let repeat = is_message && self.breaks(Violation::RepeatMessage) && self.seed.chance(50);
        let swap = is_message && self.breaks(Violation::ReorderMessages);
        let inbox = &mut self.sides[to].inbox;
        match inbox.len().checked_sub(1).filter(|_| swap) {
            Some(before_last) => inbox.insert(before_last, event),
            None => inbox.push_back(event),
        }
        if repeat {
            inbox.push_back(event);
        }
        self.rouse(to);
    }

    fn fail(&mut self, side: SideIndex, number: u64, error: OpError) {
        if let Some(out) = self.sides[side].find(number) {
            out.result = Err(error);
        }
    }

    /// The link is over for `side`: what it waits for fails, and the reason is reported behind that.
    pub(super) fn end(&mut self, side: SideIndex, reason: CloseReason) {
        if !self.is_open(side) {
            return;
        }
        let reports_left = if self.breaks(Violation::CloseTwice) { 2 } else { 1 };
        let this = &mut self.sides[side];
        this.life = Life::Ended { reason, reports_left };
        for out in this.outstanding.iter_mut().filter(|out| !out.done) {
            out.done = true;
            out.result = Err(OpError::Closed);
        }
        self.rouse(side);
    }

    pub(super) fn rouse(&mut self, side: SideIndex) {
        if !self.sides[side].armed || !self.has_events(side) {
            return;
        }
        if self.breaks(Violation::LoseWake) && self.seed.chance(20) {
            return;
        }
        if let Some(wake) = &self.sides[side].wake {
            // The counter cannot overflow: it is cleared by every poll, and one write is made for each time a side is armed.
            let written = rustix::io::write(wake, &1_u64.to_ne_bytes());
            debug_assert!(written.is_ok(), "an eventfd of our own refused a write");
        }
    }
}
