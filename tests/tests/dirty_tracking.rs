//! Who sees a write to a machine's memory: the kernel sees what its CPUs write through the tracked mapping, and nobody but our own dirty log what a
//! device writes through another one.
//!
//! A lender's DMA to page 300 through a second mapping of the memfd: PAGEMAP_SCAN marks nothing, so a deposit by it alone would lose the page; with the
//! marks of the DMA dirty log it is saved.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use farbus_machine_bank::lazy::Area;
use farbus_machine_bank::store::MemoryStore;
use farbus_machine_bank::track::{DirtyPages, TrackError, WriteTracker};
use farbus_machine_bank::{Bank, Changes, DepositOptions, PAGE, SectionKind};
use farbus_remote_dma::dirty_log::DirtyLog;
use farbus_transport::Memory;

const LEN: u64 = 512 * PAGE as u64;

fn deposit(bank: &Bank, area: &Area, changes: Changes<'_>) -> Vec<u8> {
    let mut deposit = bank.deposit("vm", &DepositOptions::default()).unwrap();
    deposit.section(SectionKind::Memory, "memory", area, changes, &|_| {}).unwrap();
    deposit.commit().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    bank.withdraw(&bank.find("vm").unwrap()).unwrap().section("memory", file.as_file(), &|_| {}).unwrap();
    std::fs::read(file.path()).unwrap()
}

fn now(area: &Area) -> Vec<u8> {
    let mut bytes = vec![0; LEN as usize];
    area.memory().read(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_write_through_a_second_mapping_is_seen_by_the_dma_dirty_log_alone() {
    let area = Area::shared(LEN).unwrap();
    (0..LEN / 8).for_each(|at| area.memory().write(at * 8, &(at / 100).to_le_bytes()).unwrap());
    let tracker = match WriteTracker::begin(&area) {
        Ok(tracker) => tracker,
        Err(TrackError::Uffd(error)) => {
            eprintln!("a write through a second mapping: not run: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let bank = Bank::init(Box::new(MemoryStore::new()), None).unwrap();
    deposit(&bank, &area, Changes::HashAll);

    // The device's view of the memory, as a lender has it: the same memfd, mapped once more, and a log that it marks.
    let (file, offset) = area.memory().file().unwrap();
    let device = Memory::map_file(file.try_clone_to_owned().unwrap(), offset, LEN, true).unwrap();
    let log = DirtyLog::new(LEN).unwrap();
    let dma = |at: u64, bytes: &[u8]| {
        device.write(at, bytes).unwrap();
        log.mark(at, bytes.len() as u64);
    };
    area.memory().write(7 * PAGE as u64, b"by the guest").unwrap();
    dma(300 * PAGE as u64 + 4000, &[0xd3; 200]);

    let mut pages = DirtyPages::none(LEN);
    tracker.take(&mut pages).unwrap();
    let marked = |pages: &DirtyPages| (0..512).filter(|page| pages.is_marked(*page)).collect::<Vec<_>>();
    assert_eq!(marked(&pages), [7], "the kernel saw a write that it cannot see, or missed one that it can");
    let by_scan_alone = deposit(&bank, &area, pages.changes());
    assert!(by_scan_alone != now(&area), "the DMA was saved although nobody marked it");

    log.take(|page| pages.mark(page));
    assert_eq!(marked(&pages), [7, 300, 301]);
    assert!(deposit(&bank, &area, pages.changes()) == now(&area));
}
