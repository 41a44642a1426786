//! A cache in front of stores: what is in it is not fetched again, and what is damaged in it is not handed out.
//!
//! Every byte of the cache's file is turned over, one block after the other: the machine comes out right, and the blocks are fetched once more.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

mod common;
#[path = "common/life.rs"]
mod life;
#[path = "common/s3.rs"]
mod s3;

use std::cell::Cell;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use common::{deposit, machine, withdraw, work};
use farbus_machine_bank::store::{
    CacheFigures, CachedStore, Directory, Durability, Kind, MemoryStore, ObjectStore, Store, StoreError, conformance,
};
use farbus_machine_bank::{Bank, Changes};
use life::a_whole_life;
use object_store::memory::InMemory;
use s3::{Service, quick};

const SIZE: u64 = 64 << 20;
/// Bytes of the smallest cache: a set of 16 blocks of 32 KiB, their entries, and the header.
const LEAST: u64 = 16 * (32768 + 64) + 4096;

fn cached(store: &MemoryStore, folder: &Path) -> CachedStore {
    CachedStore::new(Box::new(store.clone()), folder, SIZE)
}

/// Withdraws a machine through a cache, and says what the cache did.
fn through(store: impl Store + 'static, folder: &Path, size: u64, wish: &str) -> (Vec<u8>, CacheFigures) {
    let store = CachedStore::new(Box::new(store), folder, size);
    let counters = store.counters();
    let bank = Bank::open(Box::new(store), None).unwrap();
    (withdraw(&bank, wish, "memory").unwrap(), counters.figures())
}

#[test]
fn a_cached_store_is_a_store() {
    let (folders, count) = (tempfile::tempdir().unwrap(), Cell::new(0));
    let folder = |name: &str| {
        count.set(count.get() + 1);
        folders.path().join(format!("{name}{}", count.get()))
    };
    conformance::run(&|| Box::new(cached(&MemoryStore::new(), &folder("cache"))));
    conformance::run(&|| {
        let directory = Directory::create(folder("bank")).unwrap();
        Box::new(CachedStore::new(Box::new(directory), &folder("cache"), SIZE))
    });
    conformance::run(&|| {
        let objects = ObjectStore::over(Arc::new(InMemory::new()), "", "memory".to_owned(), quick()).unwrap();
        Box::new(CachedStore::new(Box::new(objects), &folder("cache"), LEAST))
    });
    // And without room for one.
    conformance::run(&|| Box::new(CachedStore::new(Box::new(MemoryStore::new()), Path::new("/proc/none"), SIZE)));
}

#[test]
fn a_bank_lives_behind_a_cache() {
    let (store, folder) = (MemoryStore::new(), tempfile::tempdir().unwrap());
    a_whole_life(&|| Box::new(cached(&store, folder.path())), None);
    let (store, folder) = (MemoryStore::new(), tempfile::tempdir().unwrap());
    a_whole_life(&|| Box::new(cached(&store, folder.path())), Some(&[3; 32]));
    let (bank, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    Directory::create(bank.path()).unwrap();
    a_whole_life(&|| Box::new(CachedStore::new(Box::new(Directory::open(bank.path()).unwrap()), folder.path(), LEAST)), None);
    let (service, folder) = (Service::start(), tempfile::tempdir().unwrap());
    a_whole_life(&|| Box::new(CachedStore::new(Box::new(service.store("bank")), folder.path(), SIZE)), None);
}

#[test]
fn what_is_in_the_cache_is_not_fetched_again_and_what_is_new_is() {
    let (service, folder) = (Service::start(), tempfile::tempdir().unwrap());
    let bank = Bank::init(Box::new(service.store("bank")), None).unwrap();
    let first = machine(1, 4000);
    let mut second = first.clone();
    work(&mut second, 2, 100);
    deposit(&bank, "vm", &first, Changes::HashAll);
    let (out, cold) = through(service.store("bank"), folder.path(), SIZE, "vm");
    assert!(out == first && cold.hits < cold.misses && cold.wire_bytes > 4 << 20, "{cold:?}");
    let back = || service.wire.received.load(std::sync::atomic::Ordering::Relaxed);
    let before = back();
    let (out, warm) = through(service.store("bank"), folder.path(), SIZE, "vm");
    // The index and the manifest are not fetched again either: what comes over the wire is the description, listings and headers.
    assert!(out == first && warm.misses == 0 && warm.wire_bytes == 43, "{warm:?}");
    assert!(back() - before < 20_000, "{} bytes came back", back() - before);
    deposit(&bank, "vm", &second, Changes::HashAll);
    let (out, new) = through(service.store("bank"), folder.path(), SIZE, "vm");
    assert!(out == second && new.wire_bytes < cold.wire_bytes / 4 && new.evictions == 0, "{new:?} after {cold:?}");
}

#[test]
fn what_is_damaged_in_the_cache_is_fetched_again_and_never_handed_out() {
    let (store, bank) = common::memory_bank();
    let memory = machine(1, 1000);
    deposit(&bank, "vm", &memory, Changes::HashAll);
    let folder = tempfile::tempdir().unwrap();
    // A cache that is small enough to be full of blocks.
    let size = 4096 + 6 * 16 * (32768 + 64);
    let (_, cold) = through(store.clone(), folder.path(), size, "vm");
    let (_, warm) = through(store.clone(), folder.path(), size, "vm");
    assert!(warm.hits > 0 && warm.hits > cold.hits, "{cold:?} {warm:?}");
    let file = std::fs::File::options().read(true).write(true).open(folder.path().join("blocks")).unwrap();
    let len = file.metadata().unwrap().len();
    assert!(len <= size);
    // Each block a bit, then whole stretches, then the entries.
    for (from, to, step, turn) in
        [(4096 + 6 * 1024, len, 32768, 1), (4096 + 6 * 1024, len, 1 << 20, 255), (4096, 4096 + 6 * 1024, 16, 1)]
    {
        let count = if turn == 255 { 40_000 } else { 1 };
        for at in (from..to).step_by(step) {
            let mut bytes = vec![0; count.min((to - at) as usize)];
            file.read_exact_at(&mut bytes, at).unwrap();
            bytes.iter_mut().for_each(|byte| *byte ^= turn);
            file.write_all_at(&bytes, at).unwrap();
        }
        let (out, figures) = through(store.clone(), folder.path(), size, "vm");
        assert!(out == memory && figures.misses > warm.misses, "{figures:?}");
    }
    let (out, again) = through(store.clone(), folder.path(), size, "vm");
    assert!(out == memory && again.hits > 0, "{again:?}");
    // A file that is no cache any more is made anew.
    file.write_all_at(b"nonsense", 0).unwrap();
    assert!(through(store.clone(), folder.path(), size, "vm").1.misses > 0);
    assert_eq!(through(store, folder.path(), size, "vm").1.misses, warm.misses);
}

#[test]
fn what_a_bad_store_left_in_the_cache_does_not_stay_there() {
    let (store, bank) = common::memory_bank();
    let memory = machine(1, 300);
    deposit(&bank, "vm", &memory, Changes::HashAll);
    for kind in [Kind::Pack, Kind::Index, Kind::Manifest] {
        let object = &store.list(kind).unwrap()[0];
        for at in [10, object.len as usize / 2, object.len as usize - 60, object.len as usize - 1] {
            let folder = tempfile::tempdir().unwrap();
            assert!(store.flip(kind, &object.name, at, 0));
            let bad = Bank::open(Box::new(cached(&store, folder.path())), None).unwrap();
            match withdraw(&bad, "vm", "memory") {
                Ok(out) => assert!(out == memory, "{kind} {at}: wrong bytes"),
                Err(error) => assert!(kind != Kind::Index, "{kind} {at}: {error}"),
            }
            // The store is well again, and the cache has what it was.
            assert!(store.flip(kind, &object.name, at, 0));
            let (out, _) = through(store.clone(), folder.path(), SIZE, "vm");
            assert!(out == memory, "{kind} {at}");
        }
    }
}

#[test]
fn a_cache_keeps_to_its_size_and_gives_up_what_was_not_used_for_longest() {
    let (store, bank) = common::memory_bank();
    let memory = machine(1, 4000);
    deposit(&bank, "vm", &memory, Changes::HashAll);
    let folder = tempfile::tempdir().unwrap();
    let (out, figures) = through(store, folder.path(), LEAST, "vm");
    assert!(out == memory && figures.evictions > 100, "{figures:?}");
    let len = std::fs::metadata(folder.path().join("blocks")).unwrap().len();
    assert!(len <= LEAST, "{len}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_cache_of_another_size_is_made_anew_unless_it_is_in_use() {
    let (store, bank) = common::memory_bank();
    deposit(&bank, "vm", &machine(1, 100), Changes::HashAll);
    let folder = tempfile::tempdir().unwrap();
    let len = || std::fs::metadata(folder.path().join("blocks")).unwrap().len();
    let used = CachedStore::new(Box::new(store.clone()), folder.path(), 2 * LEAST);
    let large = len();
    assert!(CachedStore::new(Box::new(store.clone()), folder.path(), LEAST).keeps());
    assert_eq!(len(), large, "it was made anew under a process that uses it");
    drop(used);
    assert!(CachedStore::new(Box::new(store), folder.path(), LEAST).keeps());
    assert!(len() < large);
}

#[test]
fn several_that_share_a_cache_get_what_is_right() {
    let (store, bank) = common::memory_bank();
    let machines: Vec<_> = (0..3).map(|seed| machine(seed, 1500)).collect();
    for (at, memory) in machines.iter().enumerate() {
        deposit(&bank, &format!("vm{at}"), memory, Changes::HashAll);
    }
    let folder = tempfile::tempdir().unwrap();
    // So small that they always overwrite each other's blocks. Each has the file open for itself, as a process would.
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (store, machines, folder) = (&store, &machines, folder.path());
            scope.spawn(move || {
                for round in 0..6 {
                    let at = (thread + round) % 3;
                    let (out, _) = through(store.clone(), folder, 2 * LEAST, &format!("vm{at}"));
                    assert!(out == machines[at]);
                }
            });
        }
    });
}

#[test]
fn a_cache_that_cannot_be_written_is_read_and_the_store_goes_on() {
    let (store, bank) = common::memory_bank();
    let memory = machine(1, 500);
    deposit(&bank, "vm", &memory, Changes::HashAll);
    let folder = tempfile::tempdir().unwrap();
    // Where nothing can be made.
    let (out, figures) = through(store.clone(), Path::new("/proc/self/none"), SIZE, "vm");
    assert!(out == memory && figures.hits == 0 && figures.wire_bytes > 0, "{figures:?}");
    through(store.clone(), folder.path(), SIZE, "vm");
    let path = folder.path().join("blocks");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o400)).unwrap();
    let (out, warm) = through(store.clone(), folder.path(), SIZE, "vm");
    assert!(out == memory && warm.misses == 0, "{warm:?}");
    drop(bank);
    let other = Bank::open(Box::new(store.clone()), None).unwrap();
    deposit(&other, "new", &machine(2, 500), Changes::HashAll);
    let (out, _) = through(store.clone(), folder.path(), SIZE, "new");
    assert!(out == machine(2, 500));
    // A disk that is full: nothing can be written to this device, and everything read from it is zero.
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/dev/full", &path).unwrap();
    let (out, _) = through(store, folder.path(), SIZE, "new");
    assert!(out == machine(2, 500));
}

#[test]
fn a_manifest_that_another_process_wrote_anew_is_read_anew() {
    let (store, folder) = (MemoryStore::new(), tempfile::tempdir().unwrap());
    let put = |bytes: &[u8]| store.put(Kind::Manifest, "m", bytes, Durability::Durable).unwrap();
    put(&[1; 100]);
    let cache = cached(&store, folder.path());
    let read = |offset, len| {
        let mut back = vec![0; len];
        cache.read(Kind::Manifest, "m", offset, &mut back).map(|()| back)
    };
    assert_eq!(read(0, 100).unwrap(), [1; 100]);
    put(&[2; 100]);
    // Until somebody lists, it is what it was; then it is what it is.
    cache.list(Kind::Manifest).unwrap();
    assert_eq!(read(0, 100).unwrap(), [2; 100]);
    put(&[3; 200]);
    assert_eq!(read(150, 10).unwrap(), [3; 10], "a longer one is asked for where the known one ends");
    store.remove(Kind::Manifest, "m").unwrap();
    cache.list(Kind::Manifest).unwrap();
    assert!(matches!(read(0, 1), Err(StoreError::Missing { .. })));
}
