//! Banks that are sealed: what comes out is what went in, or an error, whatever somebody did to what is stored.
//!
//! One bit of a sealed pack of 60,000 bytes is turned, wherever that is: every read of that part of it is refused, and the rest is as it was.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

mod common;
#[path = "common/life.rs"]
mod life;

use std::cell::Cell;

use common::{deposit, machine, withdraw};
use farbus_machine_bank::bank::BankError;
use farbus_machine_bank::keep::{repair, verify};
use farbus_machine_bank::store::{
    CachedStore, Directory, Durability, Kind, MemoryStore, SealedStore, Store, StoreError, conformance,
};
use farbus_machine_bank::{Bank, Changes};
use life::a_whole_life;
use proptest::prelude::*;

const KEY: [u8; 32] = [5; 32];
const BLOCK: usize = (16 << 10) + 16;

fn sealed(store: &MemoryStore) -> SealedStore {
    SealedStore::new(Box::new(store.clone()), &KEY)
}

fn put(store: &dyn Store, kind: Kind, name: &str, bytes: &[u8]) {
    store.put(kind, name, bytes, Durability::Durable).unwrap();
}

fn raw(store: &MemoryStore, kind: Kind, name: &str) -> Vec<u8> {
    store.read_all(kind, name, u64::MAX).unwrap()
}

fn bytes(len: usize, seed: u32) -> Vec<u8> {
    (0..len as u32).map(|at| (at.wrapping_add(seed).wrapping_mul(0x9e37_79b9) >> 24) as u8).collect()
}

#[test]
fn a_sealed_store_is_a_store() {
    conformance::run(&|| Box::new(sealed(&MemoryStore::new())));
    let (folders, count) = (tempfile::tempdir().unwrap(), Cell::new(0));
    conformance::run(&|| {
        count.set(count.get() + 1);
        let directory = Directory::create(folders.path().join(count.get().to_string())).unwrap();
        Box::new(SealedStore::new(Box::new(directory), &KEY))
    });
}

#[test]
fn a_sealed_bank_lives_in_memory_and_in_a_directory() {
    let store = MemoryStore::new();
    a_whole_life(&|| Box::new(store.clone()), Some(&KEY));
    let folder = tempfile::tempdir().unwrap();
    Directory::create(folder.path()).unwrap();
    a_whole_life(&|| Box::new(Directory::open(folder.path()).unwrap()), Some(&KEY));
}

#[test]
fn a_sealed_bank_opens_with_its_key_and_never_as_an_open_one() {
    let store = MemoryStore::new();
    Bank::init_sealed(Box::new(store.clone()), &KEY).unwrap();
    let open = |store: &MemoryStore, key| Bank::open(Box::new(store.clone()), key);
    assert!(matches!(open(&store, None), Err(BankError::KeyNeeded)));
    assert!(matches!(open(&store, Some(&[6; 32])), Err(BankError::WrongKey)));
    let bank = open(&store, Some(&KEY)).unwrap();
    let memory = machine(1, 200);
    deposit(&bank, "vm", &memory, Changes::HashAll);
    assert!(withdraw(&open(&store, Some(&KEY)).unwrap(), "vm", "memory").unwrap() == memory);
    // A description that says the bank is open would have pages written down for everybody to read.
    let mut config = raw(&store, Kind::Config, "bank");
    config[8] = 1;
    put(&store, Kind::Config, "bank", &config);
    assert!(matches!(open(&store, Some(&KEY)), Err(BankError::WrongKey)));
}

#[test]
fn nothing_that_was_deposited_is_readable_in_the_store() {
    let store = MemoryStore::new();
    let bank = Bank::init_sealed(Box::new(store.clone()), &KEY).unwrap();
    // A page that cannot be compressed is in an open bank as it is.
    let secret: Vec<u8> = (0..128_u32).flat_map(|at| *blake3::hash(&at.to_le_bytes()).as_bytes()).collect();
    deposit(&bank, "vm", &secret, Changes::HashAll);
    let found = |store: &MemoryStore| {
        store.list(Kind::Pack).unwrap().iter().any(|object| {
            let stored = raw(store, Kind::Pack, &object.name);
            stored.windows(64).any(|window| window == &secret[1000..1064] || window == &secret[..64])
        })
    };
    assert!(!found(&store));
    // That it would be found where it is.
    let (open, bank) = common::memory_bank();
    deposit(&bank, "vm", &secret, Changes::HashAll);
    assert!(found(&open));
}

#[test]
fn an_object_of_another_name_kind_key_or_length_is_refused() {
    let store = MemoryStore::new();
    let seals = sealed(&store);
    put(&seals, Kind::Pack, "a", &bytes(50_000, 1));
    put(&seals, Kind::Pack, "b", &bytes(50_000, 2));
    let (a, b) = (raw(&store, Kind::Pack, "a"), raw(&store, Kind::Pack, "b"));
    let refused = |kind, name: &str, stored: &[u8]| {
        put(&store, kind, name, stored);
        let error = sealed(&store).read(kind, name, 0, &mut [0; 1]).unwrap_err();
        assert!(matches!(error, StoreError::Unsealed { .. }), "{error}");
        // Also by who has read the object that was there.
        assert!(seals.read(kind, name, 49_000, &mut [0; 900]).is_err());
    };
    seals.read(Kind::Pack, "b", 0, &mut [0; 1]).unwrap();
    refused(Kind::Pack, "b", &a);
    refused(Kind::Index, "a", &a);
    refused(Kind::Pack, "c", &a);
    refused(Kind::Pack, "a", &[]);
    refused(Kind::Pack, "a", &a[..63]);
    refused(Kind::Pack, "a", &[&a[..], &b[..]].concat());
    // Whole blocks left out, with the trailer as it is, and with one that says so.
    let trailer = a.len() - 64;
    let shorter = [&a[..BLOCK], &a[trailer..]].concat();
    refused(Kind::Pack, "a", &shorter);
    let mut says = shorter.clone();
    says[BLOCK + 32..BLOCK + 40].copy_from_slice(&(16_u64 << 10).to_le_bytes());
    refused(Kind::Pack, "a", &says);
    put(&store, Kind::Pack, "a", &a);
    let mut back = vec![0; 50_000];
    seals.read(Kind::Pack, "a", 0, &mut back).unwrap();
    assert!(back == bytes(50_000, 1));
    let other = SealedStore::new(Box::new(store.clone()), &[6; 32]);
    assert!(matches!(other.read(Kind::Pack, "a", 0, &mut [0; 1]), Err(StoreError::Unsealed { .. })));
}

#[test]
fn blocks_that_changed_places_or_objects_are_refused() {
    let store = MemoryStore::new();
    let seals = sealed(&store);
    put(&seals, Kind::Pack, "a", &bytes(50_000, 1));
    put(&seals, Kind::Pack, "b", &bytes(50_000, 1));
    let (a, b) = (raw(&store, Kind::Pack, "a"), raw(&store, Kind::Pack, "b"));
    assert!(a != b, "the same bytes are sealed the same way twice");
    for (at, with) in [(0, &a[BLOCK..2 * BLOCK]), (BLOCK, &a[..BLOCK]), (0, &b[..BLOCK]), (BLOCK, &b[BLOCK..2 * BLOCK])] {
        let mut changed = a.clone();
        changed[at..at + BLOCK].copy_from_slice(with);
        put(&store, Kind::Pack, "a", &changed);
        for store in [&sealed(&store), &seals] {
            let error = store.read(Kind::Pack, "a", at as u64, &mut [0; 5]).unwrap_err();
            assert!(matches!(error, StoreError::Unsealed { .. }), "{error}");
            store.read(Kind::Pack, "a", 40_000, &mut [0; 5]).unwrap();
        }
    }
}

#[test]
fn a_machine_in_a_sealed_bank_that_was_damaged_is_refused_and_the_bank_says_where() {
    let store = MemoryStore::new();
    let bank = Bank::init_sealed(Box::new(store.clone()), &KEY).unwrap();
    let memory = machine(1, 300);
    deposit(&bank, "vm", &memory, Changes::HashAll);
    for kind in [Kind::Pack, Kind::Manifest, Kind::Index] {
        let name = store.list(kind).unwrap()[0].name.clone();
        let len = raw(&store, kind, &name).len();
        for at in [0, len / 2, len - 40, len - 1] {
            assert!(store.flip(kind, &name, at, 3));
            let bank = Bank::open(Box::new(store.clone()), Some(&KEY)).unwrap();
            match withdraw(&bank, "vm", "memory") {
                Ok(out) => assert!(kind == Kind::Index && out == memory, "{kind} {at}"),
                Err(error) => assert!(kind != Kind::Index, "{kind} {at}: {error}"),
            }
            let verified = farbus_machine_bank::keep::verify(&bank, &|_| {}).unwrap();
            assert!(kind == Kind::Index || !verified.faults.is_empty(), "{kind} {at}");
            assert!(store.flip(kind, &name, at, 3));
        }
    }
    assert!(withdraw(&Bank::open(Box::new(store), Some(&KEY)).unwrap(), "vm", "memory").unwrap() == memory);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn every_range_comes_back(len in 0_usize..70_000, pieces in 1_usize..9, from in 0.0..1.0_f64, to in 0.0..1.0_f64) {
        let (store, plain) = (MemoryStore::new(), bytes(len, 3));
        let mut draft = sealed(&store).create(Kind::Pack).unwrap();
        plain.chunks(len / pieces + 1).for_each(|piece| draft.append(piece).unwrap());
        draft.commit("p", Durability::Durable).unwrap();
        let store = sealed(&store);
        prop_assert_eq!(store.len(Kind::Pack, "p").unwrap(), len as u64);
        prop_assert_eq!(store.list(Kind::Pack).unwrap()[0].len, len as u64);
        let (from, to) = ((from * len as f64) as usize, (to * len as f64) as usize);
        let (from, to) = (from.min(to), from.max(to));
        let mut back = vec![0; to - from];
        store.read(Kind::Pack, "p", from as u64, &mut back).unwrap();
        prop_assert!(back == plain[from..to]);
    }

    #[test]
    fn what_was_changed_is_an_error_and_never_another_byte(
        len in 1_usize..70_000, at in 0.0..1.0_f64, bit in 0_u8..8, cut in any::<bool>(), known in any::<bool>(),
    ) {
        let (store, plain) = (MemoryStore::new(), bytes(len, 4));
        let seals = sealed(&store);
        put(&seals, Kind::Pack, "p", &plain);
        if known {
            seals.read(Kind::Pack, "p", 0, &mut [0]).unwrap();
        }
        let total = raw(&store, Kind::Pack, "p").len();
        let at = (at * total as f64) as usize;
        if cut { assert!(store.tear(Kind::Pack, "p", at)) } else { assert!(store.flip(Kind::Pack, "p", at, bit)) }
        let mut wrong = 0;
        for (from, plain) in (0_u64..).step_by(5000).zip(plain.chunks(5000)) {
            let mut back = vec![0; plain.len()];
            match seals.read(Kind::Pack, "p", from, &mut back) {
                Ok(()) => prop_assert!(back == plain),
                Err(StoreError::Unsealed { .. }) => wrong += 1,
                Err(error) => prop_assert!(false, "{}", error),
            }
        }
        // A store that has read the trailer does not look at it again.
        prop_assert!(wrong > 0 || (known && !cut && at >= total - 64), "nothing was noticed");
    }
}

#[test]
fn a_changed_bit_in_a_sealed_pack_costs_what_its_block_held_and_a_deposit_heals_it() {
    let store = MemoryStore::new();
    let bank = Bank::init_sealed(Box::new(store.clone()), &KEY).unwrap();
    let memory = machine(71, 1500);
    deposit(&bank, "vm", &memory, Changes::HashAll);
    let pack = store.list(Kind::Pack).unwrap().into_iter().max_by_key(|pack| pack.len).unwrap();
    assert!(store.flip(Kind::Pack, &pack.name, pack.len as usize / 3, 2));
    let bank = Bank::open(Box::new(store.clone()), Some(&KEY)).unwrap();
    let report = repair(&bank, &|_| {}).unwrap();
    assert_eq!((report.damaged.len(), report.put_aside.len()), (1, 1), "{report:?}");
    // A block of 16 KiB lies in two or three groups of sixteen pages.
    assert!(report.moved > 500 && (1..=48).contains(&report.lost), "{report:?}");
    assert!(withdraw(&bank, "vm", "memory").is_err(), "a lost page came out");
    deposit(&bank, "vm", &memory, Changes::HashAll);
    assert!(withdraw(&bank, "vm@1", "memory").unwrap() == memory);
    assert_eq!(verify(&bank, &|_| {}).unwrap().faults, []);
}

#[test]
fn a_sealed_pack_that_was_written_anew_is_not_mixed_with_what_a_cache_has_of_it() {
    let (store, folder) = (MemoryStore::new(), tempfile::tempdir().unwrap());
    let cached = |store: &MemoryStore| CachedStore::new(Box::new(store.clone()), folder.path(), 64 << 20);
    let here = Bank::init_sealed(Box::new(store.clone()), &KEY).unwrap();
    let memory = machine(72, 600);
    deposit(&here, "vm", &memory, Changes::HashAll);
    // Half of it is in the cache.
    let through = Bank::open(Box::new(cached(&store)), Some(&KEY)).unwrap();
    assert!(withdraw(&through, "vm", "memory").unwrap() == memory);
    drop(through);
    for pack in store.list(Kind::Pack).unwrap() {
        let bytes = here.store().read_all(Kind::Pack, &pack.name, 1 << 26).unwrap();
        here.store().put(Kind::Pack, &pack.name, &bytes, Durability::Durable).unwrap();
    }
    let through = Bank::open(Box::new(cached(&store)), Some(&KEY)).unwrap();
    let mut first = vec![0; 64];
    let pack = &store.list(Kind::Pack).unwrap()[0].name;
    through.store().read(Kind::Pack, pack, 0, &mut first).unwrap();
    assert!(withdraw(&through, "vm", "memory").unwrap() == memory);
}
