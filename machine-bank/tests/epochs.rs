//! Epochs: a machine that is written while it is deposited comes out as it was when the epoch began, page for page.
//!
//! Two threads write 2,000 pages without end; the epoch begins between two writes, a copy of the memory is made at that instant, and the deposit that is
//! read meanwhile is that copy. The same without an epoch is not, which shows that the writers do their part.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use common::{machine, memory_bank, withdraw};
use farbus_machine_bank::deposit::{DepositError, DepositReport};
use farbus_machine_bank::lazy::Area;
use farbus_machine_bank::track::{Epoch, EpochError, Epochs, TrackError};
use farbus_machine_bank::{Bank, Changes, DepositOptions, PAGE, SectionKind, Source};
use farbus_transport::Memory;

const PAGES: usize = 2000;
const LEN: u64 = (PAGES * PAGE) as u64;

fn watch(test: &str, area: &Arc<Area>, most: u64) -> Option<Epochs> {
    match Epochs::watch(area.clone(), most) {
        Ok(epochs) => Some(epochs),
        Err(EpochError::Track(TrackError::Uffd(error))) => {
            eprintln!("{test}: not run: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn deposit(bank: &Bank, source: &dyn Source, changes: Changes<'_>) -> Result<DepositReport, DepositError> {
    let mut deposit = bank.deposit("vm", &DepositOptions::default())?;
    deposit.section(SectionKind::Memory, "memory", source, changes, &|_| {})?;
    deposit.commit()
}

fn contents(area: &Area) -> Vec<u8> {
    let mut bytes = vec![0; LEN as usize];
    area.memory().read(0, &mut bytes).unwrap();
    bytes
}

/// Runs `meanwhile` while two threads write all over the area; holding the lock for writing stops them.
fn written_all_over<R>(area: &Area, meanwhile: impl FnOnce(&RwLock<()>) -> R) -> R {
    let (running, over) = (RwLock::new(()), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for thread in 0..2u64 {
            let (running, over) = (&running, &over);
            scope.spawn(move || {
                let mut round = thread;
                while !over.load(Ordering::Relaxed) {
                    let _running = running.read().unwrap();
                    let page = round * 7 % PAGES as u64;
                    area.memory().write(page * PAGE as u64 + round % 500 * 8, &round.to_le_bytes()).unwrap();
                    round += 2;
                }
            });
        }
        let result = meanwhile(&running);
        over.store(true, Ordering::Relaxed);
        result
    })
}

/// A deposit that takes its time, so that the writers are everywhere first.
struct Slow<'a>(&'a dyn Source);

impl Source for Slow<'_> {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        std::thread::sleep(Duration::from_millis(2));
        self.0.read_at(offset, buf)
    }
}

#[test]
fn a_machine_that_runs_on_comes_out_as_it_was_when_the_epoch_began() {
    for area in [Area::anonymous(LEN).unwrap(), Area::shared(LEN).unwrap()] {
        let area = Arc::new(area);
        let (_, bank) = memory_bank();
        area.memory().write(0, &machine(61, PAGES)).unwrap();
        let Some(epochs) = watch("an epoch under writes", &area, LEN) else { return };
        written_all_over(&area, |running| {
            for round in 0..4 {
                let (epoch, before, pause) = {
                    let _stopped = running.write().unwrap();
                    let before = contents(&area);
                    let since = Instant::now();
                    let epoch = epochs.begin().unwrap();
                    (epoch, before, since.elapsed())
                };
                eprintln!("round {round}: {} pages, a pause of {pause:?}", epoch.count());
                assert!(round > 0 || epoch.count() == PAGES as u64, "the first epoch has all pages");
                assert!(matches!(epochs.begin(), Err(EpochError::Running)));
                deposit(&bank, &Slow(&epoch), epoch.changes()).unwrap();
                epoch.deposited();
                assert!(withdraw(&bank, "vm", "memory").unwrap() == before, "round {round}");
            }
            assert!(epochs.set_aside() > 0, "no page was written before it was read");
            // The twin that must not pass: memory that is read while it is written is no machine of any instant.
            let before = {
                let _stopped = running.write().unwrap();
                contents(&area)
            };
            deposit(&bank, &Slow(&*area), Changes::HashAll).unwrap();
            assert!(withdraw(&bank, "vm", "memory").unwrap() != before, "nobody wrote meanwhile");
        });
    }
}

#[test]
fn an_epoch_has_what_was_written_and_what_was_not_deposited() {
    let area = Arc::new(Area::shared(LEN).unwrap());
    let (_, bank) = memory_bank();
    let mut bytes = machine(62, PAGES);
    area.memory().write(0, &bytes).unwrap();
    let Some(epochs) = watch("what an epoch has", &area, LEN) else { return };
    let whole = epochs.begin().unwrap();
    deposit(&bank, &whole, whole.changes()).unwrap();
    whole.deposited();
    let mut put = |page: usize| {
        let line = format!("page {page}");
        bytes[page * PAGE..][..line.len()].copy_from_slice(line.as_bytes());
        area.memory().write((page * PAGE) as u64, line.as_bytes()).unwrap();
    };
    [3, 4, 5, 511, 512, 1999].into_iter().for_each(&mut put);
    let lost = epochs.begin().unwrap();
    assert_eq!(lost.count(), 6);
    put(900);
    drop(lost);
    let again = epochs.begin().unwrap();
    assert_eq!(again.count(), 7, "those of the epoch that was not deposited, and one that was written since");
    let report = deposit(&bank, &again, again.changes()).unwrap();
    assert_eq!(report.counts.new, 7);
    again.deposited();
    assert!(withdraw(&bank, "vm", "memory").unwrap() == bytes);
    assert_eq!(epochs.begin().unwrap().count(), 0);
}

#[test]
fn a_page_that_changed_after_it_was_read_is_no_page_of_the_epoch() {
    let area = Arc::new(Area::anonymous(LEN).unwrap());
    let Some(epochs) = watch("a page that is read twice", &area, LEN) else { return };
    let epoch = epochs.begin().unwrap();
    let mut page = [1; PAGE];
    epoch.read_at(0, &mut page).unwrap();
    epoch.read_at(0, &mut page).unwrap();
    area.memory().write(0, b"x").unwrap();
    assert!(epoch.read_at(0, &mut page).unwrap_err().to_string().contains("page 0 changed"));
    assert!(epoch.read_at(LEN, &mut page).is_err());
    // Who watched goes: writes go on, and what the epoch was is not known any more.
    drop(epochs);
    area.memory().write(5 * PAGE as u64, b"x").unwrap();
    assert!(epoch.read_at(5 * PAGE as u64, &mut page).is_err());
}

#[test]
fn writes_wait_where_there_is_no_room_for_what_they_change() {
    let area = Arc::new(Area::anonymous(LEN).unwrap());
    let (_, bank) = memory_bank();
    area.memory().write(0, &machine(63, PAGES)).unwrap();
    let Some(epochs) = watch("writes that wait", &area, 4 * PAGE as u64) else { return };
    written_all_over(&area, |running| {
        let (epoch, before) = {
            let _stopped = running.write().unwrap();
            (epochs.begin().unwrap(), contents(&area))
        };
        deposit(&bank, &Slow(&epoch), epoch.changes()).unwrap();
        epoch.deposited();
        assert!(withdraw(&bank, "vm", "memory").unwrap() == before);
    });
}

/// Deposits what is written through a second mapping while it is, with or without a word before each write; whether it came out as it was.
fn by_a_second_mapping(said: bool) -> Option<bool> {
    let area = Arc::new(Area::shared(LEN).unwrap());
    let (_, bank) = memory_bank();
    area.memory().write(0, &machine(64, PAGES)).unwrap();
    let (file, offset) = area.memory().file().unwrap();
    let second = Memory::map_file(file.try_clone_to_owned().unwrap(), offset, LEN, true).unwrap();
    let epochs = watch("a second mapping", &area, LEN)?;
    let epoch: Epoch = epochs.begin().unwrap();
    let before = contents(&area);
    for page in (0..PAGES as u64).step_by(3) {
        if said {
            epochs.before_write(page * PAGE as u64 + 10, 1);
        }
        second.write(page * PAGE as u64 + 10, &[0xee]).unwrap();
    }
    deposit(&bank, &epoch, epoch.changes()).unwrap();
    epoch.deposited();
    let next = epochs.begin().unwrap();
    assert_eq!(next.count(), if said { PAGES.div_ceil(3) as u64 } else { 0 });
    Some(withdraw(&bank, "vm", "memory").unwrap() == before)
}

#[test]
fn who_writes_by_another_mapping_says_so_before() {
    assert_ne!(by_a_second_mapping(true), Some(false));
    // The twin: unsaid, its writes are in the epoch, and are missing in the next one.
    assert_ne!(by_a_second_mapping(false), Some(true));
}
