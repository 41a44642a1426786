//! One machine whose memory comes when it is used: what is there, what is asked for, and how a group gets where it belongs.
//!
//! A fault at page 37 makes group 2 wanted: if the cache has it, its 16 pages are placed at once; if not, it goes to the front of what the
//! machine's pager fetches. Whoever places and whoever reads the machine's events takes one lock for it: a page that a balloon gave back in the
//! meantime is zero, and never what it was.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::io::Errno;

use super::cache::{CachedImage, Held};
use super::image::{Fetched, pages_of};
use super::regions::Regions;
use super::report::{Failure, LazyReport, OnFailure};
use super::state::{State, bytes_of, runs};
use super::uffd::{Event, PlaceError, Placed, Uffd};
use crate::pack::{GROUP, GROUP_PAGES};
use crate::page::PAGE;

/// Events that are read of one machine before others have their turn.
const TURN: usize = 64;
/// Groups that are fetched ahead together: about a millisecond in which the store does nothing else for the machine.
const AHEAD: usize = 4;
/// Before a page is placed again in a range that was changing: the event that says so is read by then.
const CHANGING: Duration = Duration::from_micros(100);
/// Before a page is placed again that the host had no memory for.
const SCARCE: Duration = Duration::from_millis(10);
/// Zeros for kernels and mappings that know no page of zeros.
static ZEROS: [u8; GROUP] = [0; GROUP];

pub(super) struct Served {
    pub uffd: Uffd,
    pub regions: Regions,
    pub cached: Arc<CachedImage>,
    /// Whether the memory is a private view of the cache.
    pub share: bool,
    pub pages: u64,
    /// Readable when its process is gone, where that is another one.
    pub process: Option<OwnedFd>,
    /// How often the store was asked again.
    pub retries: AtomicU64,
    on_failure: OnFailure,
    pub(super) state: Mutex<State>,
    pub(super) changed: Condvar,
}

/// What a pager does next.
pub(super) enum Next {
    /// [`Served::answer_again`], at this address.
    Again(u64),
    /// These, because somebody waits.
    Demand(u64),
    /// These, because somebody will.
    Ahead(Vec<u64>),
    /// Nothing any more.
    Over,
}

impl Served {
    pub fn new(
        uffd: Uffd,
        regions: Regions,
        cached: Arc<CachedImage>,
        share: bool,
        pages: u64,
        process: Option<OwnedFd>,
        on_failure: OnFailure,
    ) -> Self {
        let groups = pages.div_ceil(GROUP_PAGES as u64);
        let left = (0..groups).filter(|group| regions.pieces(bytes_of(*group, pages)).next().is_some()).count() as u64;
        let state = State::new(groups, pages, left);
        Self {
            uffd,
            regions,
            cached,
            share,
            pages,
            process,
            retries: AtomicU64::new(0),
            on_failure,
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn report(&self) -> LazyReport {
        LazyReport { retries: self.retries.load(Ordering::Relaxed), ..self.lock().report }
    }

    /// Groups in the order of their first faults.
    pub fn order(&self) -> Vec<u64> {
        self.lock().order.clone()
    }

    pub fn end(&self) {
        self.lock().over = true;
        self.changed.notify_all();
    }

    pub fn is_over(&self) -> bool {
        self.lock().over
    }

    /// Has these fetched before they are asked for, and then all others if `rest`.
    pub fn fetch_ahead(&self, groups: &[u64], rest: bool) {
        let mut state = self.lock();
        let there = |group: &&u64| self.regions.pieces(bytes_of(**group, self.pages)).next().is_some();
        state.ahead.extend(groups.iter().filter(there));
        state.rest = rest.then_some(0);
        state.planned = true;
        drop(state);
        self.changed.notify_all();
    }

    /// Reads what the kernel tells, and answers what can be answered at once. Called by the handler thread, which never waits here.
    pub fn events(&self) {
        let mut state = self.lock();
        for _ in 0..TURN {
            match self.uffd.event() {
                Ok(None) => break,
                Ok(Some(Event::Fault { address })) => self.fault(&mut state, address),
                Ok(Some(Event::Remove { start, end })) => {
                    for range in self.regions.offsets(start..end) {
                        state.removed.set_all(range.start / PAGE as u64..range.end / PAGE as u64);
                    }
                }
                Ok(Some(Event::Other(event))) => tracing::warn!(event, "an event of a machine's memory that is not served"),
                Err(error) => {
                    tracing::error!(%error, "the events of a machine cannot be read");
                    state.over = true;
                    self.changed.notify_all();
                    break;
                }
            }
        }
    }

    fn fault(&self, state: &mut State, address: u64) {
        state.report.faults += 1;
        let Some(offset) = self.regions.offset(address) else {
            state.report.stray += 1;
            tracing::error!(address, "a fault outside of the machine's memory is not answered");
            return;
        };
        let (page, group) = (offset / PAGE as u64, offset / GROUP as u64);
        if state.touched.set(group) {
            state.order.push(group);
        }
        if state.removed.get(page) || state.bad.get(page) {
            if !self.answer_without(state, page, address) {
                state.again.push(address);
                self.changed.notify_all();
            }
            return;
        }
        match self.place(state, group) {
            Ok(Some(())) => {
                state.report.hits += 1;
                self.done(state, group, true);
            }
            Ok(None) | Err(PlaceError::Changing | PlaceError::NotCached | PlaceError::Host(_)) => {
                if state.queued.set(group) {
                    state.demand.push_back(group);
                    self.changed.notify_all();
                }
            }
            Err(PlaceError::Gone) => self.note(state, Err(PlaceError::Gone)),
        }
    }

    /// Answers for a page that was given back, by zeros, or cannot be had; false: the range is changing, and it has to be tried again.
    fn answer_without(&self, state: &mut State, page: u64, address: u64) -> bool {
        let bad = state.bad.get(page);
        match if bad { self.uffd.poison(address, PAGE as u64) } else { self.zero(address, PAGE as u64) } {
            Err(PlaceError::Changing) => return false,
            answer => self.note(state, answer.map(|_| ())),
        }
        true
    }

    /// Answers what could not be answered at once. Called by the pager, which may wait.
    pub fn answer_again(&self, address: u64) {
        let Some(offset) = self.regions.offset(address) else { return };
        loop {
            let mut state = self.lock();
            if state.over || self.answer_without(&mut state, offset / PAGE as u64, address) {
                return;
            }
            drop(state);
            std::thread::sleep(CHANGING);
        }
    }

    /// Places a group that the cache has; `None`: it has not.
    fn place(&self, state: &mut State, group: u64) -> Result<Option<()>, PlaceError> {
        let at = usize::try_from(group).unwrap_or(usize::MAX);
        self.cached.with(at, |held, memory| {
            let put = |address, offset, len| match held {
                Held::Absent => Ok(None),
                Held::Zero => self.zero(address, len).map(Some),
                Held::There if self.share => self.uffd.map_cached(address, len).map(Some),
                Held::There => self.uffd.copy_memory(address, memory, offset, len).map(Some),
            };
            for (address, offset, len) in runs(&self.regions, bytes_of(group, self.pages), state) {
                let Some(Placed { pages, .. }) = put(address, offset, len)? else { return Ok(None) };
                let report = &mut state.report;
                *match held {
                    Held::There if self.share => &mut report.mapped,
                    Held::There => &mut report.copied,
                    _ => &mut report.zero,
                } += pages;
            }
            Ok((held != Held::Absent).then_some(()))
        })
    }

    fn zero(&self, address: u64, len: u64) -> Result<Placed, PlaceError> {
        match self.uffd.zero(address, len) {
            Err(PlaceError::Host(Errno::INVAL)) => self.uffd.copy(address, &ZEROS[..len as usize]),
            other => other,
        }
    }

    fn note(&self, state: &mut State, answer: Result<(), PlaceError>) {
        match answer {
            Ok(()) | Err(PlaceError::Changing) => {}
            Err(PlaceError::Gone) => {
                state.over = true;
                self.changed.notify_all();
            }
            Err(error) => tracing::error!(%error, "a fault is not answered"),
        }
    }

    fn done(&self, state: &mut State, group: u64, demanded: bool) {
        if state.queued.clear(group) {
            self.wake_given_back(state, group);
        }
        if state.placed.set(group) {
            *if demanded { &mut state.report.demanded } else { &mut state.report.ahead } += 1;
            state.left = state.left.saturating_sub(1);
            if state.left == 0 {
                self.changed.notify_all();
            }
        }
    }

    /// Lets those fault again who waited for a page of a group that was given back while the group was on its way: it was not placed, and is zero.
    fn wake_given_back(&self, state: &mut State, group: u64) {
        let range = bytes_of(group, self.pages);
        if state.removed.any(range.start / PAGE as u64..range.end / PAGE as u64) {
            for piece in self.regions.pieces(range) {
                let woken = self.uffd.wake(piece.address, piece.len);
                self.note(state, woken);
            }
        }
    }

    /// What to fetch next; waits for it.
    pub fn next(&self) -> Next {
        let groups = self.pages.div_ceil(GROUP_PAGES as u64);
        let mut state = self.lock();
        loop {
            state.busy = true;
            if state.over {
                return Next::Over;
            }
            if let Some(address) = state.again.pop() {
                return Next::Again(address);
            }
            if let Some(group) = state.demand.pop_front() {
                return Next::Demand(group);
            }
            let mut ahead = Vec::with_capacity(AHEAD);
            while ahead.len() < AHEAD {
                let Some(group) = state.ahead.pop_front() else { break };
                if group < groups && !state.placed.get(group) && !ahead.contains(&group) {
                    ahead.push(group);
                }
            }
            while ahead.len() < AHEAD
                && let Some(group) = state.rest
            {
                state.rest = (group + 1 < groups).then_some(group + 1);
                if !state.placed.get(group) && self.regions.pieces(bytes_of(group, self.pages)).next().is_some() {
                    ahead.push(group);
                }
            }
            if !ahead.is_empty() {
                return Next::Ahead(ahead);
            }
            state.busy = false;
            self.changed.notify_all();
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Places a group that the cache has; whether it did. A fault is answered then.
    pub fn put_cached(&self, group: u64, demanded: bool) -> bool {
        let mut state = self.lock();
        if state.over {
            return false;
        }
        let placed = matches!(self.place(&mut state, group), Ok(Some(())));
        if placed {
            self.done(&mut state, group, demanded);
        }
        placed
    }

    /// Places a group that was fetched: from the cache where it still is, else from the bytes.
    pub fn put(&self, fetched: &Fetched<'_>, demanded: bool) {
        let first = fetched.group * GROUP_PAGES as u64;
        loop {
            let mut state = self.lock();
            if state.over {
                return;
            }
            let cached = if fetched.bad.is_empty() { self.place(&mut state, fetched.group) } else { Ok(None) };
            let answer = match cached {
                Ok(None) => self.put_bytes(&mut state, fetched),
                other => other.map(|_| ()),
            };
            match answer {
                Ok(()) => return self.done(&mut state, fetched.group, demanded),
                Err(PlaceError::Changing | PlaceError::NotCached) if !state.over => {}
                Err(PlaceError::Gone) => return self.note(&mut state, Err(PlaceError::Gone)),
                Err(PlaceError::Host(Errno::NOMEM)) => {
                    // The page is there, and the host may have room for it later.
                    drop(self.changed.wait_timeout(state, SCARCE).unwrap_or_else(PoisonError::into_inner));
                    continue;
                }
                Err(error) => {
                    drop(state);
                    let pages = pages_of(fetched.group, self.pages);
                    return self.fail(first..first + (pages.end - pages.start), &error.to_string());
                }
            }
            // The handler reads the event that it is about, and takes the lock for it.
            drop(state);
            std::thread::sleep(CHANGING);
        }
    }

    fn put_bytes(&self, state: &mut State, fetched: &Fetched<'_>) -> Result<(), PlaceError> {
        let range = bytes_of(fetched.group, self.pages);
        let first = range.start / PAGE as u64;
        fetched.bad.iter().for_each(|page| state.bad.set_all(first + *page as u64..first + *page as u64 + 1));
        for (address, offset, len) in runs(&self.regions, range.clone(), state) {
            let from = (offset - range.start) as usize;
            let placed = match fetched.bytes.and_then(|bytes| bytes.get(from..from + len as usize)) {
                Some(bytes) => self.uffd.copy(address, bytes)?,
                None => self.zero(address, len)?,
            };
            *if fetched.bytes.is_some() { &mut state.report.copied } else { &mut state.report.zero } += placed.pages;
        }
        Ok(())
    }

    /// Pages that cannot be had: whoever uses one gets a SIGBUS, and never another byte.
    pub fn fail(&self, pages: std::ops::Range<u64>, reason: &str) {
        if self.is_over() {
            return;
        }
        let range = pages.start * PAGE as u64..pages.end * PAGE as u64;
        tracing::error!(offset = range.start, len = range.end - range.start, reason, "a part of a machine cannot be had");
        // Before anybody dies of it.
        (self.on_failure)(&Failure { offset: range.start, len: range.end - range.start, reason: reason.to_owned() });
        let mut state = self.lock();
        state.bad.set_all(pages.clone());
        for piece in self.regions.pieces(range.clone()) {
            match self.uffd.poison(piece.address, piece.len) {
                Ok(placed) => state.report.poisoned += placed.pages,
                Err(PlaceError::Gone) => self.note(&mut state, Err(PlaceError::Gone)),
                Err(error) => {
                    // To stop watching would answer with zeros. So whoever uses the page waits, which is no wrong byte.
                    state.report.stuck += piece.len / PAGE as u64;
                    tracing::error!(%error, offset = piece.offset, "a page cannot be had, and its use cannot be refused");
                }
            }
        }
        self.done(&mut state, pages.start / GROUP_PAGES as u64, true);
    }
}
