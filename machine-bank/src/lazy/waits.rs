//! What is waited for of one machine, by whom: its owner for its groups, its pager for a store that is away, and its end for its pager.
//!
//! `served.hold_out(until)` is the 2 s in which the store is not asked again: a group that another machine's pager brought into the cache in the meantime is placed.

use std::sync::PoisonError;
use std::time::{Duration, Instant, SystemTime};

use super::cache::Held;
use super::served::Served;
use super::state::State;

impl Served {
    /// Waits until all groups are there; false: they are not, in that time, or never will.
    pub fn wait_whole(&self, most: Duration) -> bool {
        self.wait_until(most, |state| state.left == 0)
    }

    /// Waits until nothing is to be fetched ahead any more.
    pub fn wait_ahead(&self, most: Duration) -> bool {
        self.wait_until(most, |state| state.planned && !state.busy && state.ahead.is_empty() && state.rest.is_none())
    }

    /// Waits until its process or memory is gone; whether it is.
    pub fn wait_over(&self, most: Duration) -> bool {
        self.wait_until(most, |state| state.over)
    }

    fn wait_until(&self, most: Duration, done: impl Fn(&State) -> bool) -> bool {
        let end = Instant::now() + most;
        let mut state = self.lock();
        while !done(&state) && !state.over {
            let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else { break };
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        done(&state)
    }

    /// The pager has ended.
    pub fn left(&self) {
        self.lock().pager_gone = true;
        self.changed.notify_all();
    }

    /// Waits until it has; false: it has not, in that time.
    pub fn wait_left(&self, most: Duration) -> bool {
        let state = self.lock();
        self.changed.wait_timeout_while(state, most, |state| !state.pager_gone).unwrap_or_else(PoisonError::into_inner).0.pager_gone
    }

    /// The store is away since then.
    pub fn away(&self, since: Option<SystemTime>) {
        let since = since.and_then(|since| since.duration_since(SystemTime::UNIX_EPOCH).ok());
        self.lock().report.away_since_ms = since.map(|since| since.as_millis() as u64);
    }

    /// It is back, after so long.
    pub fn back(&self, away: Duration) {
        let report = &mut self.lock().report;
        report.away_since_ms = None;
        report.away += 1;
        report.away_ms += away.as_millis() as u64;
    }

    /// These could not be fetched yet. What is wanted goes behind what else is wanted, which may be where the store is not away.
    pub fn later(&self, groups: &[u64], demanded: bool) {
        let mut state = self.lock();
        if demanded {
            state.demand.extend(groups);
        } else {
            groups.iter().rev().for_each(|group| state.ahead.push_front(*group));
        }
    }

    /// Until then the store is not asked; what can be answered without it is. False: it is over.
    pub fn hold_out(&self, until: Instant) -> bool {
        let mut state = self.lock();
        loop {
            if state.over {
                return false;
            }
            if let Some(address) = state.again.pop() {
                drop(state);
                self.answer_again(address);
                state = self.lock();
                continue;
            }
            let cached = state.demand.iter().position(|group| self.cached.held(*group as usize) != Held::Absent);
            if let Some(group) = cached.and_then(|at| state.demand.remove(at)) {
                drop(state);
                let placed = self.put_cached(group, true);
                state = self.lock();
                if placed {
                    continue;
                }
                // It is tried again when something changes, or with the store.
                state.demand.push_back(group);
            }
            let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else { return true };
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
