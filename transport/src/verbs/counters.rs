//! What an end has posted and received so far, counted where it happens and read from any thread.
//!
//! A register read over queue pairs is one work request and one doorbell of the borrower's and one of each of the lender's: a test takes the
//! [`Watch`] of both ends, reads a register 1,000 times, and finds 1,000 more of each.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What was done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Work requests handed to the device.
    pub work_requests: u64,
    /// Times that the device was told of new requests.
    pub doorbells: u64,
    /// Requests that were made to report.
    pub signalled: u64,
    /// Messages and notifications received.
    pub received: u64,
}

impl Counters {
    /// What was done since `earlier`.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            work_requests: self.work_requests - earlier.work_requests,
            doorbells: self.doorbells - earlier.doorbells,
            signalled: self.signalled - earlier.signalled,
            received: self.received - earlier.received,
        }
    }
}

impl std::ops::Add for Counters {
    type Output = Self;
    fn add(self, more: Self) -> Self {
        Self {
            work_requests: self.work_requests + more.work_requests,
            doorbells: self.doorbells + more.doorbells,
            signalled: self.signalled + more.signalled,
            received: self.received + more.received,
        }
    }
}

/// The counters of one end, while another thread drives it. Each figure is exact; together they are of about one moment.
#[derive(Clone, Debug)]
pub struct Watch(Arc<Tally>);

impl Watch {
    /// What the end has done so far.
    pub fn counters(&self) -> Counters {
        self.0.read()
    }
}

/// One writer, any number of readers.
#[derive(Debug, Default)]
pub(super) struct Tally {
    work_requests: AtomicU64,
    doorbells: AtomicU64,
    signalled: AtomicU64,
    received: AtomicU64,
}

/// The one writer needs no locked instruction: nobody else changes the figure between its load and its store.
#[inline]
fn add(figure: &AtomicU64, more: u64) {
    figure.store(figure.load(Ordering::Relaxed) + more, Ordering::Relaxed);
}

impl Tally {
    pub(super) fn watch(this: &Arc<Self>) -> Watch {
        Watch(Arc::clone(this))
    }

    pub(super) fn read(&self) -> Counters {
        let of = |figure: &AtomicU64| figure.load(Ordering::Relaxed);
        Counters {
            work_requests: of(&self.work_requests),
            doorbells: of(&self.doorbells),
            signalled: of(&self.signalled),
            received: of(&self.received),
        }
    }

    #[inline]
    pub(super) fn handing_over(&self, requests: u64) {
        add(&self.work_requests, requests);
        add(&self.doorbells, 1);
    }

    #[inline]
    pub(super) fn signalled(&self) {
        add(&self.signalled, 1);
    }

    #[inline]
    pub(super) fn received(&self) {
        add(&self.received, 1);
    }
}
