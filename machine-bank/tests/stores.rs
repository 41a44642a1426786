//! The conformance suite of the Store seam over the directory and over memory, and what only a directory has: other processes that die.
//!
//! A temporary file whose process is gone is taken away by `tidy`; one whose process lives stays.

use farbus_machine_bank::store::{Directory, Durability, Kind, MemoryStore, Store, StoreError, conformance};

#[test]
fn memory_is_a_store() {
    conformance::run(&|| Box::new(MemoryStore::new()));
}

#[test]
fn a_directory_is_a_store() {
    let folders = tempfile::tempdir().unwrap();
    let count = std::cell::Cell::new(0);
    conformance::run(&|| {
        count.set(count.get() + 1);
        Box::new(Directory::create(folders.path().join(count.get().to_string())).unwrap())
    });
}

#[test]
fn a_draft_of_a_living_process_stays_and_one_of_a_dead_one_goes() {
    let folder = tempfile::tempdir().unwrap();
    let store = Directory::create(folder.path()).unwrap();
    std::fs::write(folder.path().join("tmp/1-1"), [0; 77]).unwrap();
    let mut draft = store.create(Kind::Pack).unwrap();
    draft.append(b"alive").unwrap();
    assert_eq!(store.tidy().unwrap(), 77);
    draft.commit("p", Durability::Durable).unwrap();
    assert_eq!(store.read_all(Kind::Pack, "p", 10).unwrap(), b"alive");
}

#[test]
fn a_pin_of_a_dead_process_counts_for_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = Directory::create(folder.path()).unwrap();
    let dead = folder.path().join("locks/pin-1-1");
    std::fs::write(&dead, format!("{} 1\n", "ab".repeat(32))).unwrap();
    assert!(store.pins().unwrap().is_empty());
    assert!(!dead.exists());
}

#[test]
fn what_is_no_bank_and_what_holds_other_things_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    assert!(matches!(Directory::open(folder.path()), Err(StoreError::Io { .. })));
    std::fs::write(folder.path().join("letter"), "dear").unwrap();
    let refused = Directory::create(folder.path()).unwrap_err().to_string();
    assert!(refused.contains("letter is there"), "{refused}");
}

#[test]
fn a_memory_store_fails_as_it_is_told() {
    let store = MemoryStore::new();
    store.fail_writes_after(3);
    store.put(Kind::Pack, "a", b"x", Durability::Durable).unwrap();
    assert!(matches!(store.put(Kind::Pack, "b", b"x", Durability::Durable), Err(StoreError::Full(_))));
    assert!(matches!(store.len(Kind::Pack, "b"), Err(StoreError::Missing { .. })));
    store.disappear();
    assert!(matches!(store.list(Kind::Pack), Err(StoreError::Io { .. })));
    store.heal();
    assert!(store.flip(Kind::Pack, "a", 0, 1) && !store.flip(Kind::Pack, "a", 1, 1) && !store.tear(Kind::Pack, "b", 0));
    assert_eq!(store.read_all(Kind::Pack, "a", 1).unwrap(), [b'x' ^ 2]);
}
