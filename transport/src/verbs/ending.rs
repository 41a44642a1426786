//! How a link ends, and what makes it end without a completion: a failed request, a device event, a connection that is gone, a peer that is silent.
//!
//! A peer whose host lost power acknowledges nothing: 0.8 s after the last word of it a write of no bytes asks its device, the retries of that write are used
//! up a second later, and the link ends as "the peer is gone". Where our own device says nothing of it either, the link ends after 2 s all the same.

use std::time::{Duration, Instant};

use super::silence::Due;
use super::sys::{
    self, IBV_WC_LOC_PROT_ERR, IBV_WC_REM_ACCESS_ERR, IBV_WC_REM_INV_REQ_ERR, IBV_WC_REM_OP_ERR, IBV_WC_RETRY_EXC_ERR,
    IBV_WC_RNR_RETRY_EXC_ERR, IBV_WC_SUCCESS, IBV_WC_WR_FLUSH_ERR, ibv_wc,
};
use super::{DRAIN_LIMIT, Phase, READY_ENOUGH, RECEIVE, VerbsFabric};
use crate::fabric::{CloseReason, OpError};
use crate::time::Nanos;

impl VerbsFabric {
    /// Completion `index` of the `count` found failed: the queue pair is dead, and the first that says more than "flushed" is the cause.
    #[cold]
    pub(super) fn broken(&mut self, index: usize, count: usize) {
        if matches!(self.phase, Phase::Ended(_) | Phase::Over) {
            return;
        }
        let Some(completion) = self.cause(index, count) else {
            return self.end(self.why_flushed());
        };
        let receive = completion.wr_id & RECEIVE != 0;
        let (error, reason) = match completion.status {
            IBV_WC_LOC_PROT_ERR => (OpError::Revoked, CloseReason::Device("it may not use memory of this side")),
            // A request of the peer's: each receive has the whole slot, so what does not fit is too long.
            _ if receive => (OpError::Closed, CloseReason::Protocol("a message that is longer than a slot")),
            IBV_WC_REM_ACCESS_ERR | IBV_WC_REM_INV_REQ_ERR | IBV_WC_REM_OP_ERR => {
                (OpError::Revoked, CloseReason::Protocol("an operation on memory that its owner had revoked"))
            }
            // No acknowledgement, however often it was sent.
            IBV_WC_RETRY_EXC_ERR => (OpError::Closed, CloseReason::PeerGone),
            IBV_WC_RNR_RETRY_EXC_ERR => {
                (OpError::Closed, CloseReason::Protocol("it has no receive slot where it said that it has one"))
            }
            _ if self.port_is_down() => (OpError::Closed, CloseReason::Device("its port is down")),
            _ => (OpError::Closed, CloseReason::Device("a work request failed")),
        };
        tracing::debug!(status = completion.status, receive, %reason, "the queue pair broke");
        if !receive {
            self.outbox.fail(completion.wr_id, error);
        }
        self.end(reason);
    }

    /// The first failure that is more than "flushed", among the completions from `index` on and those that have come meanwhile.
    #[cold]
    pub(super) fn cause(&mut self, mut index: usize, mut count: usize) -> Option<ibv_wc> {
        loop {
            let found = self.found.get(index..count).unwrap_or_default().iter();
            let mut failed = found.filter(|it| !matches!(it.status, IBV_WC_SUCCESS | IBV_WC_WR_FLUSH_ERR));
            if let Some(cause) = failed.next() {
                return Some(*cause);
            }
            (index, count) = (0, self.completions.poll(&mut self.found).unwrap_or(0));
            if count == 0 {
                return None;
            }
        }
    }

    /// As far as the device has said; its events may not have been looked at yet.
    #[cold]
    fn port_is_down(&mut self) -> bool {
        while let Some(event) = self.context.next_async_event() {
            self.port_down = event == sys::IBV_EVENT_PORT_ERR || (self.port_down && event != sys::IBV_EVENT_PORT_ACTIVE);
        }
        self.port_down
    }

    /// All that was under way was flushed, and no request of ours failed: the device refused a request of the peer's. Some say so by an event.
    #[cold]
    pub(super) fn why_flushed(&self) -> CloseReason {
        while let Some(event) = self.context.next_async_event() {
            match event {
                sys::IBV_EVENT_DEVICE_FATAL => return CloseReason::Device("it failed"),
                sys::IBV_EVENT_QP_FATAL | sys::IBV_EVENT_CQ_ERR => return CloseReason::Device("its queues failed"),
                other => tracing::debug!(device = self.context.name(), event = other, "the device reports"),
            }
        }
        CloseReason::Protocol("it used memory that it was not granted, or made a request that does not exist")
    }

    /// The link ends now: the queue pair goes, so that the device touches nothing of ours any more, and what is not done will not be.
    #[cold]
    pub(super) fn end(&mut self, reason: CloseReason) {
        if matches!(self.phase, Phase::Ended(_) | Phase::Over) {
            return;
        }
        let reason = if matches!(self.phase, Phase::Closing { .. }) { CloseReason::Local } else { reason };
        self.phase = Phase::Ended(reason);
        // A queue pair with a bound window is slow to go: rxe takes 51 s.
        self.books.free_windows();
        self.pair = None;
        self.answer_all();
    }

    #[cold]
    pub(super) fn answer_all(&mut self) {
        self.outbox.end();
        while let Some(event) = self.outbox.next_event() {
            self.ready.push_back(event);
        }
    }

    /// Takes completions until `done`, the end, or the limit; events wait for the next poll.
    #[cold]
    pub(super) fn drain(&mut self, done: impl Fn(&Self) -> bool) -> bool {
        let mut deadline = Instant::now() + DRAIN_LIMIT;
        let mut empty = 0_u32;
        while self.pair.is_some() && !done(self) {
            if Instant::now() > deadline {
                return false;
            }
            // No credits are told meanwhile, so that the peer's slots and our own reports bound what comes.
            if self.take_now(None) > 0 {
                // A slow link is no dead one.
                deadline = Instant::now() + DRAIN_LIMIT;
                empty = 0;
                continue;
            }
            empty = empty.saturating_add(1);
            if empty > 1000 {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        true
    }

    #[cold]
    pub(super) fn look(&mut self, now: Nanos) {
        self.looked_at = now;
        if let Err(reason) = self.books.take_frames(&mut *self.control) {
            // A goodbye that the device has taken already is better news than a connection that ended after it.
            while self.take(None) > 0 {}
            return self.end(reason);
        }
        while let Some(event) = self.context.next_async_event() {
            match event {
                sys::IBV_EVENT_DEVICE_FATAL => return self.end(CloseReason::Device("it failed")),
                sys::IBV_EVENT_QP_ACCESS_ERR | sys::IBV_EVENT_QP_REQ_ERR => {
                    return self.end(CloseReason::Protocol("it used memory that it was not granted"));
                }
                sys::IBV_EVENT_QP_FATAL | sys::IBV_EVENT_CQ_ERR => return self.end(CloseReason::Device("its queues failed")),
                // It may come back before the retries are used up; if not, they end the link.
                sys::IBV_EVENT_PORT_ERR => {
                    self.port_down = true;
                    tracing::warn!(device = self.context.name(), "the port is down");
                }
                sys::IBV_EVENT_PORT_ACTIVE => {
                    self.port_down = false;
                    tracing::info!(device = self.context.name(), "the port is up");
                }
                other => tracing::debug!(device = self.context.name(), event = other, "the device reports"),
            }
        }
        if self.phase != Phase::Open || self.ready.len() > READY_ENOUGH || self.silence.due(now) == Due::Nothing {
            return;
        }
        self.take_now(None);
        if self.phase != Phase::Open {
            return;
        }
        match self.silence.due(now) {
            Due::Nothing => {}
            Due::Question => {
                self.silence.asked(now);
                self.push_nothing();
            }
            Due::End => {
                tracing::warn!(device = self.context.name(), "the device reports neither an answer nor that there is none");
                let down = self.port_is_down();
                self.end(if down { CloseReason::Device("its port is down") } else { CloseReason::PeerGone });
            }
        }
    }
}
