//! What the peer sends: slots posted before it may send into them, taken, given back, and counted so that it never sends into none.
//!
//! 256 slots are posted at the start. When 64 were taken and nothing of ours went the other way meanwhile, a slot that carries only the count
//! goes back; a sender keeps eight in hand for such and other words of the fabric's own, and the last for such alone, so that two sides that are
//! both full can still tell each other.

use super::chain::Receives;
use super::wire::SLOTS;

/// Slots that ordinary messages leave free at the peer.
const RESERVE: u32 = 8;

/// Taken slots after which the peer is told, though there is nothing else to say.
const TELL_AFTER: u32 = SLOTS / 4;

/// Taken slots that are posted again though there is work to do; fewer wait for a poll that finds nothing, because to post them takes as long as
/// half a message.
const POST_AT_LAST: u32 = SLOTS / 8;

/// Slots of both sides.
pub(super) struct Inbox {
    pub(super) receives: Receives,
    /// Slots of ours that were taken and are posted again, counted around.
    returned: u32,
    /// Of those, what the peer was told.
    told: u32,
    /// Slots of the peer's that we have sent into, counted around.
    sent: u32,
    /// Of those, what the peer has posted again.
    returned_by_peer: u32,
}

impl Inbox {
    pub(super) fn new(receives: Receives) -> Self {
        Self { receives, returned: 0, told: 0, sent: 0, returned_by_peer: 0 }
    }

    fn free_at_peer(&self) -> u32 {
        SLOTS.saturating_sub(self.sent.wrapping_sub(self.returned_by_peer))
    }

    /// Whether the peer has a slot for a message of the caller's.
    #[inline]
    pub(super) fn may_send(&self) -> bool {
        self.free_at_peer() > RESERVE
    }

    /// Whether the peer has a slot for a word of the fabric's own. The last one is for credits: where nothing else were in the way of two sides that are
    /// both full, neither could tell the other that it has taken anything.
    #[inline]
    pub(super) fn may_send_own(&self) -> bool {
        self.free_at_peer() > 1
    }

    /// Whether the peer has a slot for the count of those that it may fill again.
    #[inline]
    pub(super) fn may_send_credits(&self) -> bool {
        self.free_at_peer() > 0
    }

    /// A slot was sent into; the count to send along.
    #[inline]
    pub(super) fn sending(&mut self) -> u32 {
        self.sent = self.sent.wrapping_add(1);
        self.told = self.returned;
        self.returned
    }

    /// A notification uses a slot and carries no count.
    #[inline]
    pub(super) fn notifying(&mut self) {
        self.sent = self.sent.wrapping_add(1);
    }

    /// The peer's count. False where it cannot be true.
    #[inline]
    pub(super) fn credited(&mut self, count: u32) -> bool {
        let plausible = count.wrapping_sub(self.returned_by_peer) <= self.sent.wrapping_sub(self.returned_by_peer);
        if plausible {
            self.returned_by_peer = count;
        }
        plausible
    }

    /// Whether so many slots wait for their post that it must not wait for an idle moment.
    #[inline]
    pub(super) fn must_post(&self) -> bool {
        self.receives.len() >= POST_AT_LAST
    }

    /// Whether the peer has sent more than it was ever told that there is room for.
    #[inline]
    pub(super) fn overrun(&self) -> bool {
        self.returned.wrapping_add(self.receives.len()).wrapping_sub(self.told) > SLOTS
    }

    /// The slots taken so far are posted again.
    #[inline]
    pub(super) fn posted_again(&mut self, count: u32) {
        self.returned = self.returned.wrapping_add(count);
    }

    /// Whether the peer must be told of free slots although there is nothing else to say.
    #[inline]
    pub(super) fn owes_credits(&self) -> bool {
        self.returned.wrapping_sub(self.told) >= TELL_AFTER
    }
}
