//! Tracking: what the kernel says was written is what a deposit reads, and the deposit is what it would have been by hashing everything.
//!
//! 60 of 3,000 pages are written; the scan marks these, the deposit stores 60, and the machine comes out as it is.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use common::{machine, memory_bank, withdraw};
use farbus_machine_bank::lazy::Area;
use farbus_machine_bank::track::{DirtyPages, TrackError, WriteTracker};
use farbus_machine_bank::{Bank, Changes, DepositOptions, PAGE, SectionKind};

const PAGES: usize = 3000;
const LEN: u64 = (PAGES * PAGE) as u64;

fn deposit(bank: &Bank, area: &Area, changes: Changes<'_>) -> u64 {
    let mut deposit = bank.deposit("vm", &DepositOptions::default()).unwrap();
    deposit.section(SectionKind::Memory, "memory", area, changes, &|_| {}).unwrap();
    deposit.commit().unwrap().counts.new
}

fn tracker<'a>(test: &str, area: &'a Area) -> Option<WriteTracker<'a>> {
    match WriteTracker::begin(area) {
        Ok(tracker) => Some(tracker),
        Err(TrackError::Uffd(error)) => {
            eprintln!("{test}: not run: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_deposit_reads_what_was_written_and_finds_all_of_it() {
    for area in [Area::anonymous(LEN).unwrap(), Area::shared(LEN).unwrap()] {
        let (_, bank) = memory_bank();
        let mut bytes = machine(31, PAGES);
        area.memory().write(0, &bytes).unwrap();
        let Some(tracker) = tracker("a tracked deposit", &area) else { return };
        deposit(&bank, &area, Changes::HashAll);
        let mut pages = DirtyPages::none(LEN);
        tracker.take(&mut pages).unwrap();
        assert_eq!(pages.count(), 0, "reading is no writing");
        for round in 0..3_usize {
            // Written pages, some next to each other, and the last.
            let written: Vec<usize> = (0..59).map(|n| (n * 47 + n % 2 + round * 5) % (PAGES - 1)).chain([PAGES - 1]).collect();
            for at in &written {
                let line = format!("round {round}, page {at}");
                bytes[at * PAGE..][..line.len()].copy_from_slice(line.as_bytes());
                area.memory().write((at * PAGE) as u64, line.as_bytes()).unwrap();
            }
            pages.clear();
            tracker.take(&mut pages).unwrap();
            assert!(written.iter().all(|at| pages.is_marked(*at as u64)), "round {round}");
            assert_eq!(pages.count(), 60, "round {round}");
            assert_eq!(deposit(&bank, &area, pages.changes()), 60);
            assert!(withdraw(&bank, "vm", "memory").unwrap() == bytes, "round {round}");
        }
        // The twin that must not pass: a write that is not taken is not deposited.
        area.memory().write(0, b"not taken").unwrap();
        pages.clear();
        assert_eq!(deposit(&bank, &area, pages.changes()), 0);
        assert!(withdraw(&bank, "vm", "memory").unwrap() == bytes);
        tracker.take(&mut pages).unwrap();
        assert_eq!((pages.count(), deposit(&bank, &area, pages.changes())), (1, 1));
    }
}

#[test]
fn memory_that_was_never_touched_is_clean_until_it_is_written() {
    let area = Area::anonymous(LEN).unwrap();
    let Some(tracker) = tracker("untouched memory", &area) else { return };
    area.memory().write(5 * PAGE as u64, b"x").unwrap();
    area.memory().write(2999 * PAGE as u64, b"x").unwrap();
    let mut pages = DirtyPages::none(LEN);
    tracker.take(&mut pages).unwrap();
    assert_eq!((0..3000).filter(|page| pages.is_marked(*page)).collect::<Vec<_>>(), [5, 2999]);
}

#[test]
fn many_written_stretches_take_more_than_one_answer() {
    let len = 8192 * PAGE as u64;
    let area = Area::anonymous(len).unwrap();
    let Some(tracker) = tracker("many stretches", &area) else { return };
    (0..8192).step_by(3).for_each(|page| area.memory().write(page * PAGE as u64, b"x").unwrap());
    let mut pages = DirtyPages::none(len);
    tracker.take(&mut pages).unwrap();
    assert!((0..8192).all(|page| pages.is_marked(page) == (page % 3 == 0)));
}
