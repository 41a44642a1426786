//! Deposits that cannot be read, and those that only seem so: damage is said, and acted on, where nobody is just writing; and it keeps nothing else from being removed.
//!
//! `vm@1` is removed by somebody else at any of 60 instants in which `vm@2` to `vm@5`, which rest on it, are read: none of them is called damaged.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use common::{deposit, machine, memory_bank, open, withdraw, work};
use farbus_machine_bank::keep::{Keep, Look, RemoveError, expired, remove, remove_damaged, stats, unreadable, verify};
use farbus_machine_bank::manifest::split;
use farbus_machine_bank::page::Root;
use farbus_machine_bank::store::{Directory, Draft, Durability, Guard, Hold, Kind, MemoryStore, Object, Pin, Store, StoreError};
use farbus_machine_bank::{Bank, Changes};

/// Five deposits of one machine, each of which rests on the one before.
fn series(bank: &Bank) {
    let mut memory = machine(1, 40);
    for n in 0..5 {
        deposit(bank, "vm", &memory, Changes::HashAll);
        work(&mut memory, n, 10);
    }
}

/// A store in which somebody else does something before one of the reads of manifests.
#[derive(Clone)]
struct Meanwhile {
    store: Arc<dyn Store>,
    reads: Arc<AtomicI64>,
    act: Arc<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Meanwhile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.store.fmt(f)
    }
}

impl Store for Meanwhile {
    fn address(&self) -> String {
        self.store.address()
    }

    fn list(&self, kind: Kind) -> Result<Vec<Object>, StoreError> {
        self.store.list(kind)
    }

    fn read(&self, kind: Kind, name: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        if kind == Kind::Manifest && self.reads.fetch_sub(1, Ordering::Relaxed) == 0 {
            (self.act)();
        }
        self.store.read(kind, name, offset, buf)
    }

    fn len(&self, kind: Kind, name: &str) -> Result<u64, StoreError> {
        self.store.len(kind, name)
    }

    fn create(&self, kind: Kind) -> Result<Box<dyn Draft>, StoreError> {
        self.store.create(kind)
    }

    fn sync(&self, kind: Kind) -> Result<(), StoreError> {
        self.store.sync(kind)
    }

    fn remove(&self, kind: Kind, name: &str) -> Result<(), StoreError> {
        self.store.remove(kind, name)
    }

    fn hold(&self, hold: Hold, wait: Duration) -> Result<Box<dyn Guard>, StoreError> {
        self.store.hold(hold, wait)
    }

    fn pin(&self, root: Root) -> Result<Box<dyn Guard>, StoreError> {
        self.store.pin(root)
    }

    fn pins(&self) -> Result<Vec<Pin>, StoreError> {
        self.store.pins()
    }

    fn tidy(&self) -> Result<u64, StoreError> {
        self.store.tidy()
    }

    fn doubt(&self, kind: Kind, name: &str) {
        self.store.doubt(kind, name);
    }
}

/// Copies a bank in a folder.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// Does `look` again and again, in banks of which somebody else removes `vm@1` before the first, the second, the third read of it, until there are not so many.
fn while_somebody_removes(look: impl Fn(&Bank)) {
    let (store, bank) = memory_bank();
    series(&bank);
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("bank");
    series(&Bank::init(Box::new(Directory::create(&model).unwrap()), None).unwrap());
    for directory in [false, true] {
        for at in 0.. {
            let (reads, here, there): (_, Arc<dyn Store>, Box<dyn Store>) = if directory {
                let path = folder.path().join(at.to_string());
                copy(&model, &path);
                (at, Arc::new(Directory::open(&path).unwrap()), Box::new(Directory::open(&path).unwrap()))
            } else {
                let store = store.crashed();
                (at, Arc::new(store.clone()), Box::new(store))
            };
            let other = Bank::open(there, None).unwrap().patience(Duration::ZERO);
            let first = other.find("vm@1").unwrap();
            let act = Arc::new(move || match remove(&other, std::slice::from_ref(&first)) {
                // Whoever looks keeps others from it.
                Ok(_) | Err(RemoveError::Store(StoreError::Busy { .. })) => {}
                Err(error) => panic!("{error}"),
            });
            let reads = Arc::new(AtomicI64::new(reads));
            look(&open(Meanwhile { store: here, reads: reads.clone(), act }));
            if reads.load(Ordering::Relaxed) >= 0 {
                assert!(at > 20, "{at} reads");
                break;
            }
        }
    }
}

#[test]
fn what_somebody_writes_anew_meanwhile_is_not_called_damaged() {
    while_somebody_removes(|bank| {
        assert_eq!(unreadable(bank, Look::Leaves).unwrap(), []);
    });
    while_somebody_removes(|bank| assert_eq!(stats(bank).unwrap().unreadable, []));
    while_somebody_removes(|bank| {
        let report = verify(bank, &|_| {}).unwrap();
        assert_eq!((report.faults, report.unreadable), (Vec::new(), Vec::new()));
    });
}

#[test]
fn what_is_damaged_is_found_again_where_nobody_writes_before_it_is_removed() {
    while_somebody_removes(|bank| {
        assert_eq!(remove_damaged(bank).unwrap().removed, [""; 0]);
        assert!(bank.find("vm@2").is_ok() && bank.find("vm@5").is_ok());
    });
    // And what is damaged goes.
    let (store, bank) = memory_bank();
    series(&bank);
    store.flip(Kind::Manifest, &bank.find("vm@4").unwrap().object(), 100, 1);
    assert_eq!(remove_damaged(&bank).unwrap().removed, ["vm@4", "vm@5"]);
    assert!(withdraw(&bank, "vm@3", "memory").is_ok());
}

/// The series and another machine.
fn two() -> (MemoryStore, Bank) {
    let (store, bank) = memory_bank();
    series(&bank);
    deposit(&bank, "other", &machine(7, 50), Changes::HashAll);
    (store, bank)
}

/// Flips a bit of the head of a deposit.
fn damage(store: &MemoryStore, bank: &Bank, machine: &str) {
    let object = bank.find(machine).unwrap().object();
    let bytes = store.read_all(Kind::Manifest, &object, 1 << 20).unwrap();
    let (head, ..) = split(bytes.last_chunk().unwrap(), bytes.len() as u64).unwrap();
    assert!(store.flip(Kind::Manifest, &object, head as usize + 20, 1));
}

#[test]
fn a_damaged_machine_that_is_withdrawn_stays_with_what_it_rests_on_and_keeps_nothing_else() {
    let (store, bank) = two();
    let withdrawal = bank.withdraw(&bank.find("vm@5").unwrap()).unwrap();
    damage(&store, &bank, "vm@5");
    let entries = ["vm@4", "vm@5", "other"].map(|wish| bank.find(wish).unwrap());
    let report = remove(&bank, &entries).unwrap();
    let here = std::process::id();
    assert_eq!((report.removed, report.in_use), (vec!["other@1".into()], vec![("vm@4".into(), here), ("vm@5".into(), here)]));
    // The same where all that is damaged goes.
    deposit(&bank, "third", &machine(8, 50), Changes::HashAll);
    damage(&store, &bank, "third");
    let report = remove_damaged(&bank).unwrap();
    assert_eq!((report.removed, report.in_use), (vec!["third@1".into()], vec![("vm@5".into(), here)]));
    drop(withdrawal);
    assert_eq!(remove_damaged(&bank).unwrap().removed, ["vm@5"]);
    assert_eq!(verify(&bank, &|_| {}).unwrap().faults, []);
}

#[test]
fn what_a_later_version_wrote_keeps_what_it_rests_on_and_nothing_else() {
    let (store, bank) = two();
    let object = bank.find("vm@3").unwrap().object();
    let mut bytes = store.read_all(Kind::Manifest, &object, 1 << 20).unwrap();
    let (head, table, _) = split(bytes.last_chunk().unwrap(), bytes.len() as u64).unwrap();
    bytes[head as usize] += 1;
    let root = bank.identity().root(&bytes[head as usize..table as usize]);
    store.put(Kind::Manifest, &format!("later@00000001@{root}"), &bytes, Durability::Durable).unwrap();
    let entries = ["vm@1", "vm@2", "vm@4", "other"].map(|wish| bank.find(wish).unwrap());
    let report = remove(&bank, &entries).unwrap();
    let later = |machine: &str| (machine.to_owned(), "later@1".to_owned());
    assert_eq!((report.removed, report.needed), (vec!["other@1".into(), "vm@4".into()], vec![later("vm@1"), later("vm@2")]));
    // What does not even say what it rests on may rest on anything.
    store.put(Kind::Manifest, &format!("later@00000002@{}", Root([9; 32])), &bytes[..100], Durability::Durable).unwrap();
    let report = remove(&bank, &[bank.find("vm@5").unwrap()]).unwrap();
    assert_eq!(report.removed, ["vm@5"], "what is damaged keeps nothing that it does not name");
    // It does not say when it was made.
    std::thread::sleep(Duration::from_millis(5));
    let keep = Keep { within: Some(Duration::from_millis(1)), ..Keep::default() };
    let names: Vec<_> = expired(&bank, None, &keep).unwrap().iter().map(ToString::to_string).collect();
    assert_eq!(names, ["vm@1", "vm@2", "vm@3"]);
}

#[test]
fn a_leaf_that_is_damaged_keeps_what_it_rests_on_and_no_other_removal() {
    let (store, bank) = two();
    store.flip(Kind::Manifest, &bank.find("vm@2").unwrap().object(), 40, 1);
    let report = remove(&bank, &["vm@1", "other"].map(|wish| bank.find(wish).unwrap())).unwrap();
    assert_eq!((report.removed, report.needed), (vec!["other@1".into()], vec![("vm@1".into(), "vm@2".into())]));
    assert!(withdraw(&bank, "vm@1", "memory").is_ok());
}
