//! Repair: what was damaged is put aside, what was whole stays, and whoever deposits, imports or copies the machine again heals all that miss its pages.
//!
//! One group of a pack is flipped; after a repair and a deposit of the same memory, of which nothing changed, every machine comes out as it went in.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

mod common;

use common::{deposit, machine, memory_bank, withdraw, work};
use farbus_machine_bank::archive::{export, import};
use farbus_machine_bank::keep::{RepairReport, SweepOptions, copy, repair, sweep, verify};
use farbus_machine_bank::store::{Kind, MemoryStore, Store};
use farbus_machine_bank::{Bank, Changes, DepositOptions, SectionKind};

fn packs(store: &MemoryStore) -> Vec<String> {
    let mut packs: Vec<_> = store.list(Kind::Pack).unwrap().into_iter().map(|pack| pack.name).collect();
    packs.sort();
    packs
}

/// Two deposits of a machine and one of another; the larger pack is damaged by `damage`.
fn damaged(damage: &dyn Fn(&MemoryStore, &str, usize)) -> (MemoryStore, Bank, [Vec<u8>; 2]) {
    let (store, bank) = memory_bank();
    let first = machine(1, 900);
    deposit(&bank, "vm7", &first, Changes::HashAll);
    let mut second = first.clone();
    work(&mut second, 2, 30);
    deposit(&bank, "vm7", &second, Changes::HashAll);
    deposit(&bank, "other", &machine(3, 60), Changes::HashAll);
    let largest = store.list(Kind::Pack).unwrap().into_iter().max_by_key(|pack| pack.len).unwrap();
    damage(&store, &largest.name, largest.len as usize);
    (store, bank, [first, second])
}

fn repaired(bank: &Bank) -> RepairReport {
    repair(bank, &|_| {}).unwrap()
}

fn assert_whole(bank: &Bank, [first, second]: &[Vec<u8>; 2]) {
    assert_eq!(verify(bank, &|_| {}).unwrap().faults, []);
    assert!(withdraw(bank, "vm7@1", "memory").unwrap() == *first && withdraw(bank, "vm7@2", "memory").unwrap() == *second);
    assert!(withdraw(bank, "other", "memory").unwrap() == machine(3, 60));
}

fn flip(store: &MemoryStore, pack: &str, _: usize) {
    store.flip(Kind::Pack, pack, 5000, 3);
}

#[test]
fn the_next_deposit_of_a_machine_heals_it_though_nothing_changed() {
    for changes in [Changes::HashAll, Changes::Bitmap(&[0; 15])] {
        let (store, bank, memory) = damaged(&flip);
        // Without a repair a deposit believes the index.
        deposit(&bank, "vm7", &memory[1], changes);
        assert!(!verify(&bank, &|_| {}).unwrap().faults.is_empty());
        let report = repaired(&bank);
        assert_eq!((report.damaged.len(), report.put_aside.len()), (1, 1), "{report:?}");
        assert!(report.moved > 400 && (1..=16).contains(&report.lost), "{report:?}");
        // All three deposits have its pages.
        assert_eq!(report.machines.len(), 3, "{report:?}");
        assert!(withdraw(&bank, "vm7@1", "memory").is_err(), "a lost page came out");
        let healed = deposit(&bank, "vm7", &memory[1], changes);
        assert_eq!(healed.counts.new, report.lost, "{healed:?} after {report:?}");
        assert_whole(&bank, &memory);
        let again = repaired(&bank);
        assert_eq!((again.damaged.len(), again.lost, again.moved), (0, 0, 0), "{again:?}");
        assert!(store.list(Kind::Config).unwrap().iter().all(|object| object.name == "bank"), "a note of nothing stays");
    }
}

#[test]
fn a_pack_whose_directory_is_gone_is_lost_and_comes_back() {
    let tear = |store: &MemoryStore, pack: &str, len: usize| assert!(store.tear(Kind::Pack, pack, len - 10));
    let cut = |store: &MemoryStore, pack: &str, _: usize| assert!(store.tear(Kind::Pack, pack, 20));
    let empty = |store: &MemoryStore, pack: &str, _: usize| assert!(store.tear(Kind::Pack, pack, 0));
    let gone = |store: &MemoryStore, pack: &str, _: usize| store.remove(Kind::Pack, pack).unwrap();
    for (name, damage) in [("torn", &tear as &dyn Fn(&MemoryStore, &str, usize)), ("cut", &cut), ("empty", &empty), ("gone", &gone)]
    {
        let (_, bank, memory) = damaged(damage);
        let report = repaired(&bank);
        assert!(report.moved == 0 && report.lost > 400, "{name}: {report:?}");
        deposit(&bank, "again", &memory[0], Changes::HashAll);
        deposit(&bank, "again", &memory[1], Changes::HashAll);
        assert_whole(&bank, &memory);
    }
}

#[test]
fn an_import_and_a_copy_heal_too() {
    let (_, bank, memory) = damaged(&flip);
    let (_, other) = memory_bank();
    deposit(&other, "vm7", &memory[0], Changes::HashAll);
    deposit(&other, "vm7", &memory[1], Changes::HashAll);
    let mut archives = Vec::new();
    for wish in ["vm7@1", "vm7@2"] {
        let mut archive = Vec::new();
        export(&other, &other.find(wish).unwrap(), None, &mut archive, &|_| {}).unwrap();
        archives.push(archive);
    }
    repaired(&bank);
    archives.iter().for_each(|archive| _ = import(&bank, &mut archive.as_slice(), &|_| {}).unwrap());
    assert_whole(&bank, &memory);

    let (_, bank, memory) = damaged(&flip);
    repaired(&bank);
    for wish in ["vm7@1", "vm7@2"] {
        copy(&other, &bank, &other.find(wish).unwrap(), &|_| {}).unwrap();
    }
    assert_whole(&bank, &memory);
}

#[test]
fn the_same_machine_brought_back_heals_what_it_lost_here() {
    for by_archive in [false, true] {
        let (store, bank) = memory_bank();
        let (_, other) = memory_bank();
        let memory = machine(9, 900);
        deposit(&bank, "vm7", &memory, Changes::HashAll);
        let entry = bank.find("vm7").unwrap();
        copy(&bank, &other, &entry, &|_| {}).unwrap();
        let mut archive = Vec::new();
        export(&bank, &entry, None, &mut archive, &|_| {}).unwrap();
        let largest = store.list(Kind::Pack).unwrap().into_iter().max_by_key(|pack| pack.len).unwrap();
        flip(&store, &largest.name, 0);
        let lost = repaired(&bank).lost;
        assert!(lost > 0 && withdraw(&bank, "vm7", "memory").is_err());
        // It is named here already, and that is not all that there is to it.
        let (was_there, stored) = if by_archive {
            let report = import(&bank, &mut archive.as_slice(), &|_| {}).unwrap();
            (report.was_there, report.new)
        } else {
            let report = copy(&other, &bank, &entry, &|_| {}).unwrap();
            (report.was_there, report.pages)
        };
        assert_eq!((was_there, stored), (true, lost));
        assert!(withdraw(&bank, "vm7", "memory").unwrap() == memory);
        assert_eq!(verify(&bank, &|_| {}).unwrap().faults, []);
    }
}

#[test]
fn what_was_put_aside_is_as_it_was_until_it_is_swept() {
    let (store, bank, _) = damaged(&flip);
    let before = packs(&store);
    let bytes = |name: &str| store.read_all(Kind::Pack, name, u64::MAX).unwrap();
    let all: Vec<_> = before.iter().map(|name| (name.clone(), bytes(name))).collect();
    let report = repaired(&bank);
    let [aside] = &report.put_aside[..] else { panic!("{report:?}") };
    let (_, was) = all.iter().find(|(name, _)| format!("damaged-{name}") == *aside).unwrap();
    assert!(bytes(aside) == *was && !packs(&store).contains(&aside.replace("damaged-", "")));
    assert!(sweep(&bank, &SweepOptions { dry_run: true, ..SweepOptions::default() }).unwrap().put_aside_bytes > 0);
    assert!(packs(&store).contains(aside));
    sweep(&bank, &SweepOptions::default()).unwrap();
    assert!(!packs(&store).contains(aside));
}

#[test]
fn a_repair_that_is_cut_off_loses_nothing_that_was_whole() {
    let (store, bank, memory) = damaged(&flip);
    let whole = {
        let copy = common::open(store.crashed());
        repaired(&copy).lost
    };
    for writes in 0..30 {
        let crashed = store.crashed();
        crashed.fail_writes_after(writes);
        let ended = repair(&common::open(crashed.clone()), &|_| {}).is_ok();
        crashed.heal();
        let bank = common::open(crashed);
        let report = repaired(&bank);
        assert_eq!(report.lost, whole, "after {writes} writes");
        deposit(&bank, "vm7", &memory[0], Changes::HashAll);
        deposit(&bank, "vm7", &memory[1], Changes::HashAll);
        assert_whole(&bank, &memory);
        if ended {
            assert!(writes > 5, "{writes} writes were enough");
            return;
        }
    }
    drop(bank);
    panic!("a repair takes more than 30 writes");
}

#[test]
fn a_repair_of_a_whole_bank_changes_nothing_and_waits_for_deposits() {
    let (store, bank) = memory_bank();
    deposit(&bank, "vm", &machine(4, 100), Changes::HashAll);
    let before = packs(&store);
    let report = repaired(&bank);
    assert_eq!((report.packs, report.lost, report.put_aside.len(), report.damaged.len()), (1, 0, 0, 0));
    assert_eq!(packs(&store), before);
    let bank = bank.patience(std::time::Duration::from_millis(20));
    let running = bank.deposit("vm", &DepositOptions::default()).unwrap();
    assert!(repair(&bank, &|_| {}).is_err());
    drop(running);
    repaired(&bank);
}

#[test]
fn a_machine_whose_source_cannot_be_read_takes_everything_from_its_parent() {
    let (_, bank, memory) = damaged(&flip);
    repaired(&bank);
    let mut deposit = bank.deposit("vm7", &DepositOptions::default()).unwrap();
    let unread: &[u8] = &[0; 900 * 4096];
    deposit.section(SectionKind::Memory, "memory", &unread, Changes::None, &|_| {}).unwrap();
    let report = deposit.commit().unwrap();
    assert_eq!(report.counts.position + report.counts.zero, 900, "{report:?}");
    common::deposit(&bank, "vm7", &memory[1], Changes::HashAll);
    common::deposit(&bank, "vm7", &memory[0], Changes::HashAll);
    assert!(withdraw(&bank, "vm7@3", "memory").unwrap() == memory[1]);
}
