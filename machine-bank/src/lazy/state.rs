//! What is there of a machine, what is asked for and in which order, and what may not be placed: the part of [`Served`](super::served::Served) under its lock.
//!
//! Of group 2 the pages 32 to 47 are wanted; page 40 was given back by a balloon: two runs are to be placed, of 8 and of 7 pages.

use std::collections::VecDeque;
use std::ops::Range;

use super::bits::Bits;
use super::image::pages_of;
use super::regions::Regions;
use super::report::LazyReport;
use crate::page::PAGE;

#[derive(Debug)]
pub(super) struct State {
    pub demand: VecDeque<u64>,
    /// Pages that were given back or cannot be had, whose faults could not be answered while the range was changing.
    pub again: Vec<u64>,
    pub ahead: VecDeque<u64>,
    /// The next group of the rest, where all of the machine is wanted.
    pub rest: Option<u64>,
    /// Whether the pager knows what to fetch ahead.
    pub planned: bool,
    /// Whether it is fetching.
    pub busy: bool,
    pub queued: Bits,
    pub placed: Bits,
    pub left: u64,
    pub touched: Bits,
    pub order: Vec<u64>,
    pub removed: Bits,
    pub bad: Bits,
    pub over: bool,
    /// Whether the pager has ended.
    pub pager_gone: bool,
    pub report: LazyReport,
}

impl State {
    /// Of a machine of so many groups and pages, of which `left` groups lie in a region.
    pub fn new(groups: u64, pages: u64, left: u64) -> Self {
        Self {
            demand: VecDeque::new(),
            again: Vec::new(),
            ahead: VecDeque::new(),
            rest: None,
            planned: false,
            busy: false,
            queued: Bits::new(groups),
            placed: Bits::new(groups),
            left,
            touched: Bits::new(groups),
            order: Vec::new(),
            removed: Bits::new(pages),
            bad: Bits::new(pages),
            over: false,
            pager_gone: false,
            report: LazyReport::default(),
        }
    }
}

/// The bytes of a group of a section of `pages`.
pub(super) fn bytes_of(group: u64, pages: u64) -> Range<u64> {
    let pages = pages_of(group, pages);
    pages.start * PAGE as u64..pages.end * PAGE as u64
}

/// Stretches of a range that are to be placed, as address, offset and length: all but pages that were given back or cannot be had.
pub(super) fn runs(regions: &Regions, range: Range<u64>, state: &State) -> Vec<(u64, u64, u64)> {
    let mut runs: Vec<(u64, u64, u64)> = Vec::new();
    for piece in regions.pieces(range) {
        let first = piece.offset / PAGE as u64;
        let pages = first..first + piece.len / PAGE as u64;
        if !state.removed.any(pages.clone()) && !state.bad.any(pages.clone()) {
            runs.push((piece.address, piece.offset, piece.len));
            continue;
        }
        let mut open = false;
        for page in pages {
            let at = (page - first) * PAGE as u64;
            let wanted = !state.removed.get(page) && !state.bad.get(page);
            match runs.last_mut().filter(|_| open && wanted) {
                Some(run) => run.2 += PAGE as u64,
                None if wanted => runs.push((piece.address + at, piece.offset + at, PAGE as u64)),
                None => {}
            }
            open = wanted;
        }
    }
    runs
}
