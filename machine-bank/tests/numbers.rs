//! A number never names two deposits of a machine, whatever was removed and swept between them, in every kind of store and over a link.
//!
//! `vm7@1` to `vm7@3` are removed, nothing of vm7 is left, garbage is collected: the next deposit is `vm7@4`.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

#[path = "common/mod.rs"]
mod common;
#[path = "common/s3.rs"]
mod s3;
#[path = "common/served.rs"]
mod served;

use std::sync::Arc;

use common::{deposit, machine, withdraw, work};
use farbus_machine_bank::deposit::DepositError;
use farbus_machine_bank::keep::{SweepOptions, remove, sweep};
use farbus_machine_bank::remote::Rights;
use farbus_machine_bank::store::{Directory, Kind, MemoryStore, ObjectStore, Store, StoreError};
use farbus_machine_bank::{Bank, Changes, DepositOptions, SectionKind};
use object_store::memory::InMemory;
use s3::quick;
use served::Serving;

const KEY: [u8; 32] = [3; 32];

/// Opens a store.
type Make<'a> = &'a dyn Fn() -> Box<dyn Store>;

fn take_out(bank: &Bank, wishes: &[&str]) {
    let entries: Vec<_> = wishes.iter().map(|wish| bank.find(wish).unwrap()).collect();
    assert_eq!(remove(bank, &entries).unwrap().removed.len(), wishes.len());
    sweep(bank, &SweepOptions::default()).unwrap();
}

/// Deposits through `open`, and takes out of the same bank as `here` has it.
fn never_twice(what: &str, open: &dyn Fn() -> Bank, here: &dyn Fn() -> Bank) {
    let mut memory = machine(1, 300);
    let mut next = |machine: &str| {
        work(&mut memory, 2, 10);
        deposit(&open(), machine, &memory, Changes::HashAll).machine
    };
    assert_eq!([next("vm7"), next("vm7"), next("vm7"), next("db")], ["vm7@1", "vm7@2", "vm7@3", "db@1"], "{what}");
    // The last one, and then all of them.
    take_out(&here(), &["vm7@3"]);
    assert_eq!(next("vm7"), "vm7@4", "{what}");
    take_out(&here(), &["vm7@1", "vm7@2", "vm7@4"]);
    sweep(&here(), &SweepOptions::default()).unwrap();
    assert_eq!([next("vm7"), next("db")], ["vm7@5", "db@2"], "{what}");
    take_out(&here(), &["vm7@5", "db@1", "db@2"]);
    assert_eq!([next("db"), next("web"), next("vm7")], ["db@3", "web@1", "vm7@6"], "{what}");
    // What was said to follow the last deposit follows it, over the gap too.
    take_out(&here(), &["vm7@6"]);
    assert_eq!(next("vm7"), "vm7@7", "{what}");
    work(&mut memory, 3, 10);
    next_after_gap(what, open, here, &memory);
}

fn next_after_gap(what: &str, open: &dyn Fn() -> Bank, here: &dyn Fn() -> Bank, memory: &[u8]) {
    deposit(&open(), "vm7", memory, Changes::HashAll);
    take_out(&here(), &["vm7@8"]);
    let bank = open();
    let begin = || {
        let mut going = bank.deposit("vm7", &DepositOptions::default()).unwrap();
        going.section(SectionKind::Memory, "memory", &memory, Changes::HashAll, &|_| {}).unwrap();
        going
    };
    let (first, second) = (begin(), begin());
    assert_eq!(first.commit_onto_parent().unwrap().machine, "vm7@9", "{what}");
    assert!(matches!(second.commit_onto_parent(), Err(DepositError::Overtaken(_))), "{what}");
    assert!(withdraw(&here(), "vm7@9", "memory").unwrap() == memory, "{what}");
}

#[test]
fn a_number_is_never_given_twice_in_any_store() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let memory = MemoryStore::new();
    let objects = Arc::new(InMemory::new());
    let open_objects = || ObjectStore::over(objects.clone(), "lab", "memory".to_owned(), quick()).unwrap();
    let stores: [(&str, Make<'_>); 4] = [
        ("memory", &|| Box::new(memory.clone())),
        ("directory", &|| Box::new(Directory::create(path("d")).unwrap())),
        ("objects in a directory", &|| Box::new(ObjectStore::local(&path("o"), true, quick()).unwrap())),
        ("objects", &|| Box::new(open_objects())),
    ];
    for (what, store) in stores {
        Bank::init(store(), None).unwrap();
        let open = || Bank::open(store(), None).unwrap();
        never_twice(what, &open, &open);
    }
}

#[test]
fn nor_in_a_sealed_bank_in_a_bucket() {
    let service = s3::Service::start();
    Bank::init_sealed(Box::new(service.patient("sealed")), &KEY).unwrap();
    let open = || Bank::open(Box::new(service.patient("sealed")), Some(&KEY)).unwrap();
    never_twice("bucket", &open, &open);
}

#[test]
fn nor_over_a_link() {
    let store = MemoryStore::new();
    let serving = Serving::new(Bank::init(Box::new(store.clone()), None).unwrap());
    never_twice("link", &|| serving.connect("ann", Rights::all()), &|| common::open(store.clone()));
}

#[test]
fn a_removal_that_is_interrupted_anywhere_gives_no_number_twice() {
    for writes in 0.. {
        let (store, bank) = common::memory_bank();
        let memory = machine(4, 60);
        for _ in 0..3 {
            deposit(&bank, "vm7", &memory, Changes::HashAll);
        }
        let entries: Vec<_> = ["vm7@2", "vm7@3"].iter().map(|wish| bank.find(wish).unwrap()).collect();
        store.fail_writes_after(writes);
        let done = remove(&bank, &entries).is_ok();
        store.heal();
        let left = bank.listing().unwrap().0.len();
        assert_eq!(deposit(&bank, "vm7", &memory, Changes::HashAll).machine, "vm7@4", "after {writes} writes, {left} left");
        if done {
            assert!(left == 1 && writes > 3);
            return;
        }
    }
}

#[test]
fn a_note_that_is_damaged_twice_gives_no_number_at_all() {
    let (store, bank) = common::memory_bank();
    let memory = machine(5, 60);
    deposit(&bank, "vm7", &memory, Changes::HashAll);
    take_out(&bank, &["vm7@1"]);
    let len = store.len(Kind::Config, "numbers").unwrap() as usize;
    store.flip(Kind::Config, "numbers", 3, 1);
    assert_eq!(deposit(&bank, "vm7", &memory, Changes::HashAll).machine, "vm7@2");
    store.flip(Kind::Config, "numbers", len - 3, 1);
    let mut going = bank.deposit("vm7", &DepositOptions::default()).unwrap();
    going.section(SectionKind::Memory, "memory", &&memory[..], Changes::HashAll, &|_| {}).unwrap();
    let refused = going.commit();
    assert!(
        matches!(&refused, Err(DepositError::Store(StoreError::Io { what, .. })) if what.contains("restore it from a copy")),
        "{refused:?}"
    );
    // What is there can be had.
    assert!(withdraw(&bank, "vm7", "memory").unwrap() == memory);
}
