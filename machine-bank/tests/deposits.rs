//! Deposits and withdrawals: what goes in comes out, what is there already does not go in again, and what is damaged does not come out.
//!
//! A machine of 9,000 pages is deposited, changed in 700 of them and deposited again by a bitmap: 560 or so are new, and both come out equal.

mod common;

use common::{contents, deposit, machine, memory_bank, open, withdraw, work};
use farbus_machine_bank::deposit::DepositError;
use farbus_machine_bank::manifest::leaf::LEAF;
use farbus_machine_bank::store::{Directory, Kind, Store, StoreError};
use farbus_machine_bank::{Bank, Changes, DepositOptions, PAGE, Parent, SectionKind};

#[test]
fn a_machine_comes_out_as_it_went_in_and_again_after_it_worked() {
    let (_, bank) = memory_bank();
    let first = machine(1, 2 * LEAF + 777);
    let report = deposit(&bank, "vm", &first, Changes::HashAll);
    assert_eq!(report.counts.pages as usize, first.len() / PAGE);
    assert_eq!(report.counts.pages, report.counts.zero + report.counts.content + report.counts.new, "{report:?}");
    let mut second = first.clone();
    let dirty = work(&mut second, 2, 700);
    let tracked = deposit(&bank, "vm", &second, Changes::Bitmap(&dirty));
    assert!(tracked.counts.new > 300 && tracked.counts.new <= 700, "{tracked:?}");
    assert_eq!(tracked.parent.as_deref(), Some("vm@1"));
    // Hashing all of it finds the same, and nothing is new any more.
    let hashed = deposit(&bank, "vm", &second, Changes::HashAll);
    assert_eq!((hashed.counts.new, hashed.pack_bytes), (0, 0), "{hashed:?}");
    for (wish, bytes) in [("vm@1", &first), ("vm@2", &second), ("vm@3", &second), ("vm", &second)] {
        assert!(withdraw(&bank, wish, "memory").unwrap() == *bytes, "{wish} differs");
    }
}

#[test]
fn a_bitmap_is_believed_which_is_why_it_must_be_true() {
    let (_, bank) = memory_bank();
    let first = machine(1, 100);
    deposit(&bank, "vm", &first, Changes::HashAll);
    let mut second = first.clone();
    second[5 * PAGE] ^= 1;
    deposit(&bank, "vm", &second, Changes::Bitmap(&[0, 0]));
    assert!(withdraw(&bank, "vm", "memory").unwrap() == first, "a page that is said to be unchanged was read");
}

#[test]
fn pages_are_shared_between_sections_and_machines() {
    let (_, bank) = memory_bank();
    let disk = machine(1, 500);
    let mut memory = vec![0; 600 * PAGE];
    memory[50 * PAGE..550 * PAGE].copy_from_slice(&disk);
    let mut both = bank.deposit("a", &DepositOptions::default()).unwrap();
    both.section(SectionKind::Disk, "disk0", &&disk[..], Changes::HashAll, &|_| {}).unwrap();
    both.section(SectionKind::Memory, "memory", &&memory[..], Changes::HashAll, &|_| {}).unwrap();
    both.section(SectionKind::DeviceState, "devices", &&b"registers"[..], Changes::HashAll, &|_| {}).unwrap();
    let twice = both.section(SectionKind::Disk, "disk0", &&disk[..], Changes::HashAll, &|_| {});
    assert!(matches!(twice, Err(DepositError::Twice(_))));
    let report = both.commit().unwrap();
    assert!(report.counts.new <= 501, "{report:?}");
    let other = deposit(&bank, "b", &memory, Changes::HashAll);
    assert_eq!((other.counts.new, other.parent), (0, None));
    assert!(withdraw(&bank, "a", "memory").unwrap() == memory && withdraw(&bank, "a", "disk0").unwrap() == disk);
    assert_eq!(withdraw(&bank, "a", "devices").unwrap(), b"registers", "the last page is filled up and cut again");
    assert!(withdraw(&bank, "b", "disk0").is_err());
}

#[test]
fn forty_deposits_in_a_row_rest_on_each_other_and_begin_anew_when_they_are_deep() {
    let (_, bank) = memory_bank();
    let mut memory = machine(1, 300);
    let mut kept = Vec::new();
    for n in 0..40 {
        work(&mut memory, n, 5);
        deposit(&bank, "vm", &memory, Changes::HashAll);
        kept.push(memory.clone());
    }
    let depth = |n: usize| {
        let entry = bank.find(&format!("vm@{n}")).unwrap();
        bank.manifest(&entry).unwrap().table.depth
    };
    assert_eq!((depth(1), depth(2), depth(33), depth(34), depth(40)), (0, 1, 32, 0, 6));
    for (n, bytes) in kept.iter().enumerate() {
        assert!(withdraw(&bank, &format!("vm@{}", n + 1), "memory").unwrap() == *bytes, "deposit {}", n + 1);
    }
}

#[test]
fn a_bank_in_a_directory_is_there_after_it_was_closed_and_its_index_can_be_lost() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bank");
    let memory = machine(1, 6000);
    let bank = Bank::init(Box::new(Directory::create(&path).unwrap()), None).unwrap();
    deposit(&bank, "vm", &memory, Changes::HashAll);
    drop(bank);
    assert!(withdraw(&open(Directory::open(&path).unwrap()), "vm", "memory").unwrap() == memory);
    for entry in std::fs::read_dir(path.join("index")).unwrap() {
        std::fs::remove_file(entry.unwrap().path()).unwrap();
    }
    let bank = open(Directory::open(&path).unwrap());
    assert_eq!(deposit(&bank, "other", &memory, Changes::HashAll).counts.new, 0);
    assert!(withdraw(&bank, "other", "memory").unwrap() == memory);
    assert_eq!(std::fs::read_dir(path.join("index")).unwrap().count(), 1, "the index was not made again");
}

#[test]
fn what_is_damaged_does_not_come_out() {
    let (store, bank) = memory_bank();
    let memory = machine(3, 200);
    deposit(&bank, "vm", &memory, Changes::HashAll);
    for kind in [Kind::Pack, Kind::Manifest] {
        for object in store.list(kind).unwrap() {
            for at in (0..object.len as usize).step_by(997).chain([object.len as usize - 1]) {
                let damaged = store.crashed();
                assert!(damaged.flip(kind, &object.name, at, (at % 8) as u8));
                let entry = bank.find("vm").unwrap();
                let file = tempfile::tempfile().unwrap();
                let bank = open(damaged);
                let out = bank.withdraw(&entry).and_then(|withdrawal| withdrawal.section("memory", &file, &|_| {}));
                // A bit in the directory of a pack that the index knows is not even looked at; what comes out is right or is nothing.
                assert!(out.is_err() || contents(&file) == memory, "{kind}, byte {at}");
            }
            let torn = store.crashed();
            torn.tear(kind, &object.name, object.len as usize / 2);
            assert!(withdraw(&open(torn), "vm", "memory").is_err(), "{kind}");
        }
    }
}

#[test]
fn a_full_store_refuses_the_deposit_and_keeps_what_it_has() {
    let (store, bank) = memory_bank();
    let first = machine(1, 3000);
    deposit(&bank, "vm", &first, Changes::HashAll);
    let second = machine(2, 3000);
    for writes in 0..100 {
        store.fail_writes_after(writes);
        let result = bank.deposit("vm", &DepositOptions::default()).and_then(|mut deposit| {
            deposit.section(SectionKind::Memory, "memory", &&second[..], Changes::HashAll, &|_| {})?;
            deposit.commit()
        });
        store.heal();
        match result {
            Err(DepositError::Store(StoreError::Full(_))) => {
                assert!(withdraw(&open(store.crashed()), "vm@1", "memory").unwrap() == first, "after {writes} writes");
            }
            Err(other) => panic!("after {writes} writes: {other}"),
            Ok(report) => {
                assert!(writes > 5, "{writes} writes are enough: {report:?}");
                assert!(withdraw(&bank, "vm", "memory").unwrap() == second);
                return;
            }
        }
    }
    panic!("a hundred writes are not enough");
}

#[test]
fn an_interrupted_withdrawal_fetches_what_is_missing_and_mends_what_is_wrong() {
    let (_, bank) = memory_bank();
    let memory = machine(1, 2000);
    deposit(&bank, "vm", &memory, Changes::HashAll);
    let file = tempfile::tempfile().unwrap();
    use std::os::unix::fs::FileExt;
    file.write_all_at(&memory[..1000 * PAGE], 0).unwrap();
    file.write_all_at(&[1; 100], 500 * PAGE as u64 + 7).unwrap();
    file.set_len(memory.len() as u64 + 12_345).unwrap();
    let entry = bank.find("vm").unwrap();
    let report = bank.withdraw(&entry).unwrap().section("memory", &file, &|_| {}).unwrap();
    assert!(contents(&file) == memory);
    assert!(report.there > 600 && report.fetched < report.pages - report.zero - 600, "{report:?}");
}

#[test]
fn a_parent_is_another_machine_where_one_is_named() {
    let (_, bank) = memory_bank();
    let base = machine(1, 300);
    deposit(&bank, "base", &base, Changes::HashAll);
    let options = DepositOptions { parent: Parent::Named("base@1".to_owned()) };
    let mut clone = bank.deposit("clone", &options).unwrap();
    clone.section(SectionKind::Memory, "memory", &&base[..], Changes::Bitmap(&[0; 5]), &|_| {}).unwrap();
    let report = clone.commit().unwrap();
    assert!(report.manifest_bytes < 500 && report.counts.new == 0, "{report:?}");
    assert!(withdraw(&bank, "clone", "memory").unwrap() == base);
    let options = DepositOptions { parent: Parent::Named("nobody".to_owned()) };
    assert!(matches!(bank.deposit("x", &options), Err(DepositError::Parent(_))));
    assert!(matches!(bank.deposit("../x", &DepositOptions::default()), Err(DepositError::Name(_))));
}
