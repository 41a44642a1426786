//! A bank that is not alone: several deposits at once, tenants beside each other, and a store that is slow, gone and back.
//!
//! Two processes deposit `vm` at the same time: one becomes `vm@2`, the other `vm@3`, and both come out as they went in.

mod common;

use std::time::Duration;

use common::{deposit, machine, memory_bank, open, withdraw, work};
use farbus_machine_bank::deposit::DepositError;
use farbus_machine_bank::keep::verify;
use farbus_machine_bank::manifest::ManifestError;
use farbus_machine_bank::store::{Directory, Durability, Kind, MemoryStore, Store, StoreError};
use farbus_machine_bank::withdraw::WithdrawError;
use farbus_machine_bank::{Bank, Changes, DepositOptions, SectionKind};

#[test]
fn two_deposits_of_one_machine_at_once_are_two_deposits() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bank");
    let base = machine(1, 4000);
    deposit(&Bank::init(Box::new(Directory::create(&path).unwrap()), None).unwrap(), "vm", &base, Changes::HashAll);
    let memories: Vec<_> = (0..4_u64)
        .map(|n| {
            let mut memory = base.clone();
            work(&mut memory, n, 1000);
            memory
        })
        .collect();
    let names: Vec<String> = std::thread::scope(|scope| {
        let deposits: Vec<_> = memories
            .iter()
            .map(|memory| {
                let path = &path;
                // Each as a process of its own would: with a store and an index of its own.
                scope.spawn(move || deposit(&open(Directory::open(path).unwrap()), "vm", memory, Changes::HashAll).machine)
            })
            .collect();
        deposits.into_iter().map(|deposit| deposit.join().unwrap()).collect()
    });
    let mut sorted = names.clone();
    sorted.sort();
    assert_eq!(sorted, ["vm@2", "vm@3", "vm@4", "vm@5"]);
    let bank = open(Directory::open(&path).unwrap());
    for (name, memory) in names.iter().zip(&memories) {
        assert!(withdraw(&bank, name, "memory").unwrap() == *memory, "{name}");
    }
    assert_eq!(verify(&bank, &|_| {}).unwrap().faults, []);
}

#[test]
fn a_tenant_cannot_tell_what_another_has_nor_pass_anything_off_as_its_own() {
    let stores = [MemoryStore::new(), MemoryStore::new()];
    let keys = [[1; 32], [2; 32]];
    let [ours, theirs] = [0, 1].map(|n| Bank::init(Box::new(stores[n].clone()), Some(&keys[n])).unwrap());
    let memory = machine(1, 300);
    deposit(&theirs, "secret", &memory, Changes::HashAll);
    let packs = |store: &MemoryStore| store.list(Kind::Pack).unwrap().into_iter().map(|pack| pack.name).collect::<Vec<_>>();
    // All of theirs lies in our store.
    for kind in [Kind::Pack, Kind::Index, Kind::Manifest] {
        for object in stores[1].list(kind).unwrap() {
            let bytes = stores[1].read_all(kind, &object.name, object.len).unwrap();
            stores[0].put(kind, &object.name, &bytes, Durability::Durable).unwrap();
        }
    }
    let entry = ours.find("secret").unwrap();
    assert!(matches!(ours.withdraw(&entry), Err(WithdrawError::Manifest(ManifestError::Malformed { .. }))));
    // The same contents are other pages to us: whether they were there cannot be told from what is stored.
    let options = DepositOptions::default();
    let mut mine = ours.deposit("mine", &options).unwrap();
    mine.section(SectionKind::Memory, "memory", &&memory[..], Changes::HashAll, &|_| {}).unwrap();
    let report = mine.commit().unwrap();
    let alone = deposit(&Bank::init(Box::new(MemoryStore::new()), Some(&keys[0])).unwrap(), "mine", &memory, Changes::HashAll);
    assert_eq!((report.counts, report.pack_bytes), (alone.counts, alone.pack_bytes));
    assert!(packs(&stores[0]).len() > packs(&stores[1]).len());
    assert!(withdraw(&ours, "mine", "memory").unwrap() == memory);
}

#[test]
fn a_store_that_is_gone_fails_what_is_under_way_and_is_as_it_was_when_it_is_back() {
    let (store, bank) = memory_bank();
    let (first, second) = (machine(1, 2000), machine(2, 2000));
    deposit(&bank, "vm", &first, Changes::HashAll);
    let mut under_way = bank.deposit("vm", &DepositOptions::default()).unwrap();
    let gone = under_way.section(SectionKind::Memory, "memory", &&second[..], Changes::HashAll, &|progress| {
        if progress.done == progress.total {
            store.disappear();
        }
    });
    let failed = gone.and_then(|()| under_way.commit());
    assert!(matches!(failed, Err(DepositError::Store(StoreError::Io { .. }))), "{failed:?}");
    assert!(matches!(bank.find("vm"), Err(farbus_machine_bank::bank::FindError::Store(_))));
    store.heal();
    assert!(withdraw(&bank, "vm", "memory").unwrap() == first);
    deposit(&bank, "vm", &second, Changes::HashAll);
    assert!(withdraw(&bank, "vm", "memory").unwrap() == second && withdraw(&bank, "vm@1", "memory").unwrap() == first);
}

#[test]
fn a_slow_store_is_only_slow() {
    let (store, bank) = memory_bank();
    let memory = machine(1, 500);
    store.slow_down(Duration::from_millis(3));
    deposit(&bank, "vm", &memory, Changes::HashAll);
    assert!(withdraw(&bank, "vm", "memory").unwrap() == memory);
}
