//! What this side has posted: work requests on their way, which of them must report, and what the caller is still to be told.
//!
//! Of 40 writes without a signal, number 32 is made to report, so that the queue's room is known; when its completion comes all places up to it are
//! free. So is each that completes a mebibyte, so that a slow link that carries much is not taken for one that carries nothing. A write that its caller wants to hear of reports with the last request of its batch, a read by itself.

use std::collections::VecDeque;
use std::sync::Arc;

use super::chain::{BATCH, Bytes, Sends, What};
use super::counters::Tally;
use crate::fabric::{Event, OpError, Signal};

/// Work requests that may be posted and not yet known to be done.
pub(super) const DEPTH: u32 = 256;

/// Of the caller's requests at most this many: the rest is for credits, goodbyes and barriers, which must not wait for anybody.
const FOR_CALLERS: u32 = DEPTH - 8;

/// After how many requests without a signal one is made to report.
const SIGNAL_EVERY: u32 = 32;

/// After how many bytes without a report one is made to. Of a link that carries half a mebibyte a second something is then heard before its peer counts
/// as gone (`GIVE_UP` in silence.rs).
const SIGNAL_BYTES: u32 = MAX_PIECE;

/// Bytes of the longest single work request, whatever the device takes.
pub(super) const MAX_PIECE: u32 = 1 << 20;

/// Reports that may wait: one for each request, and as many operations that were refused before they were posted.
pub(super) const MAX_REPORTS: usize = 2 * DEPTH as usize;

/// What the caller is to be told of requests `first` to `last`; of none, where it was refused before it was posted.
struct Report {
    first: u64,
    last: u64,
    signal: Signal,
    outcome: Result<(), OpError>,
}

/// The send side of a queue pair, without the queue pair.
pub(super) struct Outbox {
    pub(super) sends: Sends,
    /// Requests so far; each is named by its number, from 1.
    posted: u64,
    /// All requests up to here are done.
    completed: u64,
    unsignalled: u32,
    /// Bytes of those requests.
    unsignalled_bytes: u32,
    /// A report waits for a request of the present batch that does not report.
    owes_signal: bool,
    reports: VecDeque<Report>,
    pub(super) tally: Arc<Tally>,
}

impl Outbox {
    pub(super) fn new() -> Self {
        Self {
            sends: Sends::new(),
            posted: 0,
            completed: 0,
            unsignalled: 0,
            unsignalled_bytes: 0,
            owes_signal: false,
            reports: VecDeque::with_capacity(MAX_REPORTS),
            tally: Arc::default(),
        }
    }

    /// Whether an operation of the caller's that takes `requests` work requests fits.
    #[inline]
    pub(super) fn has_room(&self, requests: u32) -> bool {
        self.outstanding() + u64::from(requests) <= u64::from(FOR_CALLERS) && self.reports.len() < MAX_REPORTS
    }

    /// Whether a request of the fabric's own fits.
    #[inline]
    pub(super) fn has_reserve(&self) -> bool {
        self.outstanding() < u64::from(DEPTH)
    }

    /// Requests that are not known to be done.
    #[inline]
    pub(super) fn outstanding(&self) -> u64 {
        self.posted - self.completed
    }

    /// The number of the last request.
    pub(super) fn last_posted(&self) -> u64 {
        self.posted
    }

    pub(super) fn is_done(&self, number: u64) -> bool {
        self.completed >= number
    }

    /// Adds a request. The caller made sure that there is room, and flushes when the chain is full.
    #[inline]
    pub(super) fn push(&mut self, signalled: bool, what: What, bytes: Bytes<'_>) -> bool {
        let unsignalled_bytes = self.unsignalled_bytes.saturating_add(bytes.fetched_or_filled());
        let signalled = signalled || self.unsignalled + 1 >= SIGNAL_EVERY || unsignalled_bytes >= SIGNAL_BYTES;
        if !self.sends.push(self.posted + 1, signalled, what, bytes) {
            return false;
        }
        self.posted += 1;
        if signalled {
            self.tally.signalled();
        }
        (self.unsignalled, self.unsignalled_bytes) = if signalled { (0, 0) } else { (self.unsignalled + 1, unsignalled_bytes) };
        self.owes_signal &= !signalled;
        true
    }

    /// The caller wants to hear how the last `requests` requests ended.
    #[inline]
    pub(super) fn report(&mut self, signal: Signal, requests: u32) {
        if signal == Signal::No {
            return;
        }
        let last = self.posted;
        self.reports.push_back(Report { first: last + 1 - u64::from(requests), last, signal, outcome: Ok(()) });
        self.owes_signal = self.unsignalled > 0;
    }

    /// An operation was refused before it was posted; said in its turn.
    #[cold]
    pub(super) fn refuse(&mut self, signal: Signal, error: OpError) {
        self.reports.push_back(Report { first: 0, last: 0, signal, outcome: Err(error) });
    }

    /// Makes the batch ready to go; false where there is nothing to send.
    #[inline]
    pub(super) fn prepare(&mut self) -> bool {
        let count = self.sends.len();
        if count == 0 {
            return false;
        }
        if self.owes_signal {
            self.sends.signal_last();
            self.tally.signalled();
            self.owes_signal = false;
            (self.unsignalled, self.unsignalled_bytes) = (0, 0);
        }
        self.tally.handing_over(count as u64);
        true
    }

    /// All requests up to `number` are done. False where no such request is under way.
    #[inline]
    pub(super) fn complete(&mut self, number: u64) -> bool {
        if number > self.posted {
            return false;
        }
        self.completed = self.completed.max(number);
        true
    }

    /// Request `number` failed; those before it are done, those after it will never be.
    #[cold]
    pub(super) fn fail(&mut self, number: u64, error: OpError) {
        if number > self.posted || number <= self.completed {
            return;
        }
        self.completed = number - 1;
        let at = self.reports.iter().position(|report| report.last >= number).unwrap_or(self.reports.len());
        match self.reports.get_mut(at).filter(|report| report.first <= number) {
            Some(report) => (report.last, report.outcome) = (0, Err(error)),
            // The end of the link says as much, and the request may have been the fabric's own.
            None if error == OpError::Closed => {}
            None => self.reports.insert(at, Report { first: 0, last: 0, signal: Signal::No, outcome: Err(error) }),
        }
    }

    /// Nothing that is not done will be.
    #[cold]
    pub(super) fn end(&mut self) {
        for report in self.reports.iter_mut().filter(|report| report.last > self.completed) {
            (report.last, report.outcome) = (0, Err(OpError::Closed));
        }
    }

    /// The next thing to tell the caller.
    #[inline]
    pub(super) fn next_event(&mut self) -> Option<Event> {
        self.reports.front().filter(|report| report.last <= self.completed)?;
        let report = self.reports.pop_front()?;
        Some(match (report.signal, report.outcome) {
            (Signal::Yes(id), Ok(())) => Event::Done(id),
            (Signal::Yes(id), Err(error)) => Event::Failed(Some(id), error),
            // An unsignalled operation makes a report only by failing.
            (Signal::No, outcome) => Event::Failed(None, outcome.err().unwrap_or(OpError::Closed)),
        })
    }
}

const _: () = assert!(BATCH as u32 <= DEPTH && SIGNAL_EVERY < FOR_CALLERS);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fabric::OpId;

    /// As the fabric posts: a full batch goes before the next request.
    fn write(outbox: &mut Outbox, signal: Signal, requests: u32) {
        for _ in 0..requests {
            if outbox.sends.is_full() {
                hand_over(outbox);
            }
            assert!(outbox.push(false, What::Write { address: 0, key: 0 }, Bytes::Copied(b"x")));
        }
        outbox.report(signal, requests);
    }

    fn hand_over(outbox: &mut Outbox) {
        outbox.prepare();
        outbox.sends.link();
    }

    #[test]
    fn reports_come_in_the_order_posted_with_refusals_between() {
        let mut outbox = Outbox::new();
        write(&mut outbox, Signal::Yes(OpId(1)), 1);
        outbox.refuse(Signal::Yes(OpId(2)), OpError::Denied);
        write(&mut outbox, Signal::Yes(OpId(3)), 1);
        assert_eq!(outbox.next_event(), None);
        assert!(outbox.complete(1));
        assert_eq!(outbox.next_event(), Some(Event::Done(OpId(1))));
        assert_eq!(outbox.next_event(), Some(Event::Failed(Some(OpId(2)), OpError::Denied)));
        assert_eq!(outbox.next_event(), None);
        assert!(outbox.complete(2) && !outbox.complete(3));
        assert_eq!(outbox.next_event(), Some(Event::Done(OpId(3))));
    }

    #[test]
    fn a_failure_is_told_to_whom_it_belongs_and_the_rest_is_closed() {
        for (signal, expected) in [
            (Signal::Yes(OpId(7)), Event::Failed(Some(OpId(7)), OpError::Revoked)),
            (Signal::No, Event::Failed(None, OpError::Revoked)),
        ] {
            let mut outbox = Outbox::new();
            write(&mut outbox, Signal::Yes(OpId(1)), 1);
            write(&mut outbox, signal, 3);
            write(&mut outbox, Signal::Yes(OpId(2)), 1);
            outbox.fail(3, OpError::Revoked);
            outbox.end();
            let events: Vec<_> = std::iter::from_fn(|| outbox.next_event()).collect();
            assert_eq!(events, [Event::Done(OpId(1)), expected, Event::Failed(Some(OpId(2)), OpError::Closed)]);
        }
    }

    #[test]
    fn a_request_that_nobody_waits_for_ends_with_its_link_and_without_a_word() {
        let mut outbox = Outbox::new();
        write(&mut outbox, Signal::Yes(OpId(1)), 1);
        write(&mut outbox, Signal::No, 1);
        outbox.fail(2, OpError::Closed);
        outbox.end();
        let events: Vec<_> = std::iter::from_fn(|| outbox.next_event()).collect();
        assert_eq!(events, [Event::Done(OpId(1))]);
    }

    #[test]
    fn one_request_in_thirty_two_reports_and_a_batch_with_a_report_ends_with_one() {
        let mut outbox = Outbox::new();
        write(&mut outbox, Signal::No, 200);
        assert_eq!(outbox.tally.read().signalled, 200 / 32);
        outbox.prepare();
        outbox.sends.link();
        let before = outbox.tally.read().signalled;
        for number in 0..20 {
            write(&mut outbox, Signal::Yes(OpId(number)), 1);
        }
        assert!(outbox.prepare());
        assert!(outbox.tally.read().signalled - before <= 2);
    }

    #[test]
    fn the_last_request_of_a_full_batch_can_still_be_made_to_report() {
        let mut outbox = Outbox::new();
        write(&mut outbox, Signal::No, 1);
        hand_over(&mut outbox);
        write(&mut outbox, Signal::No, BATCH as u32 - 1);
        let before = outbox.tally.read().signalled;
        write(&mut outbox, Signal::Yes(OpId(1)), 1);
        assert!(outbox.sends.is_full());
        hand_over(&mut outbox);
        assert_eq!(outbox.tally.read().signalled, before + 1);
    }

    #[test]
    fn callers_leave_a_reserve() {
        let mut outbox = Outbox::new();
        assert!(outbox.has_room(FOR_CALLERS) && !outbox.has_room(FOR_CALLERS + 1));
        write(&mut outbox, Signal::No, FOR_CALLERS);
        assert!(!outbox.has_room(1) && outbox.has_reserve());
    }
}
