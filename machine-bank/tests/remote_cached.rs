//! A cache in front of a bank over a link: pages that are in it do not come over the wire again, and what is damaged in it is not handed out.
//!
//! Of a series of three deposits the second is withdrawn where the first was: of 24,000 pages the 2,400 that changed come over the link, and every byte is right.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

#[path = "common/mod.rs"]
mod common;
#[path = "common/served.rs"]
mod served;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use common::{deposit, machine, memory_bank, open, withdraw, work};
use farbus_machine_bank::lazy::{Backing, Cache, FaultServer, LazyOptions, Uffd};
use farbus_machine_bank::remote::{RemoteStore, Rights, WireCounts};
use farbus_machine_bank::store::{CacheFigures, MemoryStore, PagedStore};
use farbus_machine_bank::{Bank, Changes, PAGE};
use farbus_transport::Nanos;
use farbus_transport::shm::{ShmFabric, ShmOptions};
use served::{Serving, rights};

const KEY: [u8; 32] = [9; 32];

/// The bank over a link, behind a cache.
fn behind(serving: &Serving, rights: Rights, folder: &Path, size: u64) -> (Bank, Arc<farbus_machine_bank::store::CacheCounters>) {
    let (lender, borrower) = ShmFabric::pair(ShmOptions::default()).unwrap();
    drop(serving.serve(lender, "ann", rights, Nanos::now));
    let store = PagedStore::new(Box::new(RemoteStore::connect(borrower, "shm:test", Nanos::now).unwrap()), folder, size);
    let counters = store.counters();
    (Bank::open(Box::new(store), serving.key.as_ref()).unwrap(), counters)
}

fn of_tenant(bank: Bank, key: [u8; 32]) -> Serving {
    let mut serving = Serving::new(bank);
    serving.key = Some(key);
    serving
}

/// A machine, what the cache did for it and what came over the wire.
fn through(serving: &Serving, folder: &Path, size: u64, wish: &str) -> (Vec<u8>, CacheFigures, WireCounts) {
    let (bank, counters) = behind(serving, Rights::all(), folder, size);
    let memory = withdraw(&bank, wish, "memory").unwrap();
    (memory, counters.figures(), bank.store().service().unwrap().wire())
}

/// `vm7@1`, `vm7@2` with 2,400 pages changed, `vm7@3` with few.
fn series(bank: &Bank) -> [Vec<u8>; 3] {
    let first = machine(1, 24_000);
    deposit(bank, "vm7", &first, Changes::HashAll);
    let mut second = first.clone();
    let dirty = work(&mut second, 2, 2400);
    deposit(bank, "vm7", &second, Changes::Bitmap(&dirty));
    let mut third = second.clone();
    let dirty = work(&mut third, 3, 20);
    deposit(bank, "vm7", &third, Changes::Bitmap(&dirty));
    [first, second, third]
}

#[test]
fn what_an_earlier_withdrawal_fetched_does_not_come_over_the_wire_again() {
    let (_, bank) = memory_bank();
    let [first, second, third] = series(&bank);
    let (serving, folder) = (Serving::new(bank), tempfile::tempdir().unwrap());
    let (memory, figures, all) = through(&serving, folder.path(), 256 << 20, "vm7@1");
    assert!(memory == first && figures.hits == 0 && figures.evictions == 0, "{figures:?}");
    let (memory, figures, some) = through(&serving, folder.path(), 256 << 20, "vm7@2");
    assert!(memory == second);
    let ratio = some.read_bytes as f64 / second.len() as f64;
    eprintln!(
        "vm7@2 where vm7@1 is in the cache: {} of {} bytes over the wire ({:.3} of the image; without a cache {:.3}), {figures:?}",
        some.read_bytes,
        second.len(),
        ratio,
        all.read_bytes as f64 / second.len() as f64
    );
    assert!(ratio <= 0.15 && figures.misses <= 2400 && figures.hits > 10_000, "{ratio}");
    let (memory, figures, few) = through(&serving, folder.path(), 256 << 20, "vm7@3");
    assert!(memory == third && figures.misses <= 20 && few.read_bytes * 5 < some.read_bytes, "{figures:?} {few:?}");
    // Names come from the cache too, so that the same machine once more is a head and nothing else.
    let (memory, figures, none) = through(&serving, folder.path(), 256 << 20, "vm7@3");
    assert!(memory == third && figures.misses == 0 && none.read_bytes < 20_000, "{figures:?} {none:?}");
}

#[test]
fn a_small_cache_makes_room_and_stays_small() {
    let (_, bank) = memory_bank();
    let [first, second, _] = series(&bank);
    let (serving, folder) = (Serving::new(bank), tempfile::tempdir().unwrap());
    let size = 8 << 20;
    for (wish, expected) in [("vm7@1", &first), ("vm7@2", &second), ("vm7@1", &first)] {
        let (memory, figures, _) = through(&serving, folder.path(), size, wish);
        assert!(memory == *expected && figures.evictions > 1000, "{figures:?}");
        assert!(std::fs::metadata(folder.path().join("pages")).unwrap().len() <= size);
    }
}

#[test]
fn what_is_damaged_in_the_cache_is_fetched_instead() {
    for sealed in [false, true] {
        let store = MemoryStore::new();
        let bank = if sealed { Bank::init_sealed(Box::new(store), &KEY) } else { Bank::init(Box::new(store), Some(&KEY)) }.unwrap();
        let memory = machine(4, 3000);
        deposit(&bank, "vm7", &memory, Changes::HashAll);
        let (serving, folder) = (of_tenant(bank, KEY), tempfile::tempdir().unwrap());
        assert!(through(&serving, folder.path(), 20 << 20, "vm7").0 == memory);
        let file = std::fs::File::options().read(true).write(true).open(folder.path().join("pages")).unwrap();
        // One byte of every fourth place, and of every third entry.
        let (len, mut byte) = (file.metadata().unwrap().len(), [0]);
        let entries = len / (PAGE as u64 + 64) * 64;
        let flips = (4096 + 40..entries).step_by(64 * 3).chain((entries + 8192..len).step_by(PAGE * 4));
        for at in flips {
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        }
        let (again, figures, _) = through(&serving, folder.path(), 20 << 20, "vm7");
        assert!(again == memory && figures.misses > 100, "sealed {sealed}: {figures:?}");
        // It was brought again.
        let (again, figures, _) = through(&serving, folder.path(), 20 << 20, "vm7");
        assert!(again == memory && figures.misses == 0, "sealed {sealed}: {figures:?}");
    }
}

/// Whether a line of the machines that these tests make is in the cache's file, in plain.
fn is_readable(folder: &Path) -> bool {
    let file = std::fs::read(folder.join("pages")).unwrap();
    file.windows(28).any(|window| window == b"a line of a log of some gues")
}

#[test]
fn of_a_sealed_bank_nothing_is_in_the_cache_that_can_be_read_without_its_key() {
    let memory = machine(5, 3000);
    let folders = [false, true].map(|sealed| {
        let store = MemoryStore::new();
        let bank = if sealed { Bank::init_sealed(Box::new(store), &KEY) } else { Bank::init(Box::new(store), Some(&KEY)) }.unwrap();
        deposit(&bank, "vm7", &memory, Changes::HashAll);
        let (serving, folder) = (of_tenant(bank, KEY), tempfile::tempdir().unwrap());
        for is_kept in [false, true] {
            let (again, figures, _) = through(&serving, folder.path(), 20 << 20, "vm7");
            assert!(again == memory && (figures.misses == 0) == is_kept, "{figures:?}");
        }
        folder
    });
    // The twin: one that is not sealed can be read, by its user, as the bank can.
    assert!(is_readable(folders[0].path()) && !is_readable(folders[1].path()));
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(std::fs::metadata(folders[0].path().join("pages")).unwrap().permissions().mode() & 0o777, 0o600);
    // Another tenant with the same pages finds nothing of them.
    let bank = Bank::init(Box::new(MemoryStore::new()), Some(&[8; 32])).unwrap();
    deposit(&bank, "vm7", &memory, Changes::HashAll);
    let serving = of_tenant(bank, [8; 32]);
    for folder in &folders {
        let (again, figures, _) = through(&serving, folder.path(), 20 << 20, "vm7");
        assert!(again == memory && figures.hits == 0, "{figures:?}");
    }
}

#[test]
fn who_may_read_little_and_who_runs_on_memory_over_a_link_use_it_too() {
    let (store, bank) = memory_bank();
    let memory = machine(6, 3000);
    deposit(&bank, "vm7", &memory, Changes::HashAll);
    let (serving, folder) = (Serving::new(bank), tempfile::tempdir().unwrap());
    for fetched in [true, false] {
        let (here, counters) = behind(&serving, rights(&["vm*"], &[]), folder.path(), 64 << 20);
        assert!(withdraw(&here, "vm7", "memory").unwrap() == memory);
        assert_eq!(counters.figures().misses > 0, fetched);
    }
    if let Err(error) = Uffd::supported() {
        eprintln!("memory over a link behind a cache: not run: {error}");
        return;
    }
    let (here, counters) = behind(&serving, Rights::all(), folder.path(), 64 << 20);
    let (here, server) = (Arc::new(here), FaultServer::start(Cache::new(64 << 20)).unwrap());
    let lazy = server.withdraw(&here, &here.find("vm7").unwrap(), Backing::Anonymous, LazyOptions::default()).unwrap();
    let mut bytes = vec![0; memory.len()];
    lazy.memory().unwrap().read(0, &mut bytes).unwrap();
    assert!(bytes == memory && counters.figures().misses == 0 && counters.figures().hits > 0, "{:?}", counters.figures());
    drop(open(store));
}
