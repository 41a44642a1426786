//! What is kept and what goes: removal, retention, sweeps, verification, statistics, differences and copies.
//!
//! A machine is deposited five times, the third is removed, a sweep takes what only it had, and the other four come out as they went in.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

mod common;

use std::time::Duration;

use common::{deposit, machine, memory_bank, open, withdraw, work};
use farbus_machine_bank::keep::{
    CopyError, Keep, Look, RemoveError, SweepError, SweepOptions, copy, diff, expired, remove, stats, sweep, unreadable, verify,
};
use farbus_machine_bank::manifest::split;
use farbus_machine_bank::store::{Durability, Hold, Kind, MemoryStore, Store, StoreError};
use farbus_machine_bank::{Bank, BankError, Changes, DepositOptions, PAGE, SectionKind};

/// Five deposits of one machine, and what they were.
fn series() -> (MemoryStore, Bank, Vec<Vec<u8>>) {
    series_of(3000)
}

fn series_of(pages: usize) -> (MemoryStore, Bank, Vec<Vec<u8>>) {
    let (store, bank) = memory_bank();
    let mut memory = machine(1, pages);
    let mut kept = Vec::new();
    for n in 0..5 {
        deposit(&bank, "vm", &memory, Changes::HashAll);
        kept.push(memory.clone());
        work(&mut memory, n, pages / 2);
    }
    (store, bank, kept)
}

fn bytes(store: &MemoryStore, kind: Kind) -> u64 {
    store.list(kind).unwrap().iter().map(|object| object.len).sum()
}

#[track_caller]
fn is_clean(bank: &Bank) {
    let report = verify(bank, &|_| {}).unwrap();
    assert!(report.faults.is_empty(), "{:?}", report.faults);
}

#[test]
fn what_is_removed_goes_with_the_next_sweep_and_everything_else_stays() {
    let (store, bank, kept) = series();
    let full = bytes(&store, Kind::Pack);
    assert_eq!(sweep(&bank, &SweepOptions::default()).unwrap().removed, 0, "everything is needed");
    let entries: Vec<_> = [1, 3].iter().map(|n| bank.find(&format!("vm@{n}")).unwrap()).collect();
    let removed = remove(&bank, &entries).unwrap();
    assert_eq!((removed.removed, removed.rewritten), (vec!["vm@1".to_owned(), "vm@3".to_owned()], 2));
    let options = SweepOptions { repack_below: 90, ..SweepOptions::default() };
    let dry = sweep(&bank, &SweepOptions { dry_run: true, ..options }).unwrap();
    assert_eq!(bytes(&store, Kind::Pack), full, "a dry run removed something");
    let report = sweep(&bank, &options).unwrap();
    assert_eq!((report.removed, report.removed_bytes, report.moved), (dry.removed, dry.removed_bytes, dry.moved));
    assert!(report.removed > 0 && report.missing == 0, "{report:?}");
    assert_eq!(bytes(&store, Kind::Pack), full - report.removed_bytes + report.written_bytes);
    assert!(bytes(&store, Kind::Pack) < full);
    for bank in [&bank, &open(store.crashed())] {
        for n in [2, 4, 5] {
            assert!(withdraw(bank, &format!("vm@{n}"), "memory").unwrap() == kept[n - 1], "vm@{n}");
        }
        is_clean(bank);
    }
    assert!(bank.find("vm@1").is_err());
    assert_eq!(deposit(&bank, "vm", &kept[4], Changes::HashAll).machine, "vm@6");
}

#[test]
fn a_root_is_the_same_whatever_its_manifest_rests_on() {
    let (_, bank, _) = series();
    let before: Vec<_> = bank.listing().unwrap().0.iter().map(|entry| entry.root).collect();
    remove(&bank, &[bank.find("vm@1").unwrap()]).unwrap();
    let after: Vec<_> = bank.listing().unwrap().0.iter().map(|entry| entry.root).collect();
    assert_eq!(before[1..], after);
    let depths: Vec<_> = bank.listing().unwrap().0.iter().map(|entry| bank.manifest(entry).unwrap().table.depth).collect();
    assert_eq!(depths, [0, 2, 3, 4], "only the one that rested on what is gone was written anew");
}

#[test]
fn a_sweep_believes_no_index_that_lost_its_records() {
    let (store, bank) = memory_bank();
    let memory = machine(41, 900);
    deposit(&bank, "vm", &memory, Changes::HashAll);
    let runs = store.list(Kind::Index).unwrap();
    assert!(!runs.is_empty(), "no index to damage");
    for run in &runs {
        // Some 40 bytes a page from byte 8, of which a power cut may leave anything; what the run begins and ends with is whole.
        (8..run.len as usize / 3).for_each(|at| assert!(store.flip(Kind::Index, &run.name, at, 6)));
    }
    let bank = open(store.clone());
    let report = sweep(&bank, &SweepOptions { grace: Duration::ZERO, repack_below: 100, dry_run: false }).unwrap();
    assert_eq!(report.missing, 0, "{report:?}");
    assert!(withdraw(&bank, "vm", "memory").unwrap() == memory);
}

#[test]
fn a_sweep_at_any_write_that_fails_leaves_every_machine() {
    let (store, bank, kept) = series_of(200);
    let entries: Vec<_> = [1, 2].iter().map(|n| bank.find(&format!("vm@{n}")).unwrap()).collect();
    let options = SweepOptions { repack_below: 100, ..SweepOptions::default() };
    for writes in 0..200 {
        let copy = store.crashed();
        let bank = open(copy.clone());
        copy.fail_writes_after(writes);
        let failed = match remove(&bank, &entries) {
            Err(RemoveError::Store(StoreError::Full(_))) => true,
            Err(RemoveError::Store(error)) => panic!("{error}"),
            Ok(_) => sweep(&bank, &options).is_err_and(|error| match error {
                SweepError::Store(StoreError::Full(_)) => true,
                error => panic!("{error}"),
            }),
        };
        copy.heal();
        let bank = open(copy.crashed());
        for n in [3, 4, 5] {
            assert!(withdraw(&bank, &format!("vm@{n}"), "memory").unwrap() == kept[n - 1], "vm@{n} after {writes} writes");
        }
        is_clean(&bank);
        if !failed {
            assert!(writes > 10, "a removal and a sweep are {writes} writes");
            return;
        }
        sweep(&bank, &options).unwrap();
        is_clean(&bank);
    }
    panic!("200 writes are not enough");
}

#[test]
fn a_deposit_and_a_sweep_do_not_go_together_and_a_machine_that_is_withdrawn_stays() {
    let (store, bank, kept) = series();
    let bank = bank.patience(Duration::ZERO);
    let under_way = bank.deposit("other", &DepositOptions::default()).unwrap();
    assert!(matches!(sweep(&bank, &SweepOptions::default()), Err(SweepError::Store(StoreError::Busy { .. }))));
    assert!(matches!(remove(&bank, &[]), Err(RemoveError::Store(StoreError::Busy { .. }))));
    drop(under_way);
    let first = bank.find("vm@1").unwrap();
    let withdrawal = bank.withdraw(&first).unwrap();
    let report = remove(&bank, &[first, bank.find("vm@2").unwrap()]).unwrap();
    assert_eq!((report.removed, report.in_use), (vec!["vm@2".to_owned()], vec![("vm@1".to_owned(), std::process::id())]));
    // Neither does what a machine rests on that is withdrawn: its manifest would be written anew under the reader.
    let third = bank.withdraw(&bank.find("vm").unwrap()).unwrap();
    let bases: Vec<_> = third.manifest().bases().map(|base| base.root).collect();
    let listing = bank.listing().unwrap();
    let based: Vec<_> = bases.iter().filter_map(|root| listing.by_root(root).cloned()).collect();
    assert!(!based.is_empty());
    assert_eq!(remove(&bank, &based).unwrap().in_use.len(), based.len());
    drop(third);
    // Its pages move under it, and it goes on.
    sweep(&bank, &SweepOptions { repack_below: 100, ..SweepOptions::default() }).unwrap();
    let file = tempfile::tempfile().unwrap();
    withdrawal.section("memory", &file, &|_| {}).unwrap();
    assert!(common::contents(&file) == kept[0]);
    let sweeping = store.hold(Hold::Sweep, Duration::ZERO).unwrap();
    assert!(bank.deposit("other", &DepositOptions::default()).is_err());
    drop(sweeping);
}

#[test]
fn retention_keeps_the_last_and_the_young() {
    let (_, bank, _) = series();
    deposit(&bank, "other", &machine(9, 10), Changes::HashAll);
    let names = |keep: Keep, machine: Option<&str>| {
        expired(&bank, machine, &keep).unwrap().iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let last = |n| Keep { last: Some(n), ..Keep::default() };
    assert_eq!(names(last(2), None), ["vm@1", "vm@2", "vm@3"]);
    assert_eq!(names(last(0), Some("other")), ["other@1"]);
    assert!(names(Keep::default(), None).is_empty());
    assert!(names(Keep { last: Some(1), within: Some(Duration::from_secs(3600)) }, None).is_empty());
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(names(Keep { last: Some(4), within: Some(Duration::from_millis(1)) }, None), ["vm@1"]);
}

#[test]
fn verification_names_the_damage_and_whom_it_concerns() {
    let (store, bank, _) = series();
    is_clean(&bank);
    let object = store.list(Kind::Pack).unwrap().remove(0);
    for (at, expected) in [(5000, "pages are damaged"), (object.len as usize - 20, "hash"), (object.len as usize - 1, "no pack")] {
        let damaged = store.crashed();
        damaged.flip(Kind::Pack, &object.name, at, 2);
        let faults = verify(&open(damaged), &|_| {}).unwrap().faults;
        assert!(
            faults.iter().any(|fault| fault.what == format!("pack {}", object.name) && fault.fault.contains(expected)),
            "{faults:?}"
        );
        assert!(faults.iter().any(|fault| fault.what.starts_with("vm@")), "{faults:?}");
    }
    let lost = store.crashed();
    lost.remove(Kind::Pack, &object.name).unwrap();
    assert!(
        verify(&open(lost.clone()), &|_| {})
            .unwrap()
            .faults
            .iter()
            .any(|fault| fault.fault.contains("of memory are damaged or missing"))
    );
    assert!(sweep(&open(lost), &SweepOptions::default()).unwrap().missing > 0);
    let manifest = bank.find("vm@2").unwrap().object();
    let torn = store.crashed();
    torn.tear(Kind::Manifest, &manifest, 100);
    assert!(verify(&open(torn.clone()), &|_| {}).unwrap().faults.iter().any(|fault| fault.what == "vm@2"));
    assert!(
        matches!(sweep(&open(torn), &SweepOptions::default()), Err(SweepError::Manifest(_))),
        "it swept without knowing what is needed"
    );
}

#[test]
fn a_damaged_pack_is_never_swept() {
    let (store, bank, _) = series();
    let object = store.list(Kind::Pack).unwrap().remove(0);
    store.flip(Kind::Pack, &object.name, object.len as usize - 20, 2);
    remove(&bank, &bank.listing().unwrap().0).unwrap();
    let report = sweep(&bank, &SweepOptions::default()).unwrap();
    assert_eq!(report.damaged, [object.name.as_str()]);
    assert_eq!(store.list(Kind::Pack).unwrap().len(), 1);
}

#[test]
fn packs_of_an_interrupted_deposit_are_kept_for_their_grace_and_used_again() {
    let (store, bank, _) = series();
    let memory = machine(77, 6000);
    let before = store.list(Kind::Pack).unwrap().len();
    let mut under_way = bank.deposit("late", &DepositOptions::default()).unwrap();
    under_way.section(SectionKind::Memory, "memory", &&memory[..], Changes::HashAll, &|_| {}).unwrap();
    // It dies: no pack was full, so the whole of one is put by hand, as a full one would have been.
    under_way.commit().unwrap();
    store.remove(Kind::Manifest, &bank.find("late").unwrap().object()).unwrap();
    assert!(store.list(Kind::Pack).unwrap().len() > before);
    let grace = SweepOptions { grace: Duration::from_secs(60), ..SweepOptions::default() };
    assert_eq!(sweep(&bank, &grace).unwrap().removed, 0);
    assert_eq!(deposit(&bank, "late", &memory, Changes::HashAll).counts.new, 0, "its pages are there");
    store.remove(Kind::Manifest, &bank.find("late").unwrap().object()).unwrap();
    assert!(sweep(&bank, &SweepOptions::default()).unwrap().removed > 0);
    is_clean(&bank);
}

#[test]
fn statistics_add_up() {
    let (store, bank, kept) = series();
    let stats = stats(&bank).unwrap();
    assert_eq!((stats.machines, stats.deposits, stats.logical), (1, 5, kept.iter().map(|memory| memory.len() as u64).sum()));
    let saved = stats.saved_zero + stats.saved_position + stats.saved_content + stats.saved_compression;
    let groups = stats.logical - saved;
    assert!(groups <= stats.pack_bytes && stats.pack_bytes - groups < stats.pack_bytes / 20, "{stats:?}");
    assert_eq!(stats.stored, bytes(&store, Kind::Pack) + bytes(&store, Kind::Manifest) + bytes(&store, Kind::Index));
}

#[test]
fn what_a_later_version_wrote_cannot_be_read_and_is_not_damaged() {
    let (store, bank, _) = series();
    assert_eq!(unreadable(&bank, Look::Leaves).unwrap(), []);
    let entry = bank.find("vm@5").unwrap();
    let mut object = store.read_all(Kind::Manifest, &entry.object(), 1 << 20).unwrap();
    let (head, table, _) = split(object.last_chunk().unwrap(), object.len() as u64).unwrap();
    object[head as usize] += 1;
    let root = bank.identity().root(&object[head as usize..table as usize]);
    store.put(Kind::Manifest, &format!("later@00000001@{root}"), &object, Durability::Durable).unwrap();
    store.flip(Kind::Manifest, &bank.find("vm@2").unwrap().object(), 100, 1);
    let found = unreadable(&bank, Look::Leaves).unwrap();
    let of = |machine: &str| found.iter().find(|one| one.machine == machine).unwrap();
    assert!(!of("later@1").damaged && of("later@1").is_cause(), "{found:?}");
    assert!(of("vm@2").damaged, "{found:?}");
    assert_eq!(stats(&bank).unwrap().unreadable.iter().filter(|one| !one.damaged).count(), 1);
}

#[test]
fn a_difference_is_what_was_written() {
    let (_, bank) = memory_bank();
    let old = machine(1, 9000);
    let mut new = old.clone();
    for page in [5, 6, 7, 8999] {
        new[page * PAGE] ^= 0x55;
    }
    new[4100 * PAGE..4101 * PAGE].fill(0);
    let changed_to_zero = u64::from(old[4100 * PAGE..4101 * PAGE].iter().any(|byte| *byte != 0));
    deposit(&bank, "vm", &old, Changes::HashAll);
    deposit(&bank, "vm", &new, Changes::HashAll);
    let (first, second) = (bank.find("vm@1").unwrap(), bank.find("vm@2").unwrap());
    let found = diff(&bank, &first, &second, 2).unwrap().sections.remove(0);
    assert_eq!((found.pages, found.changed, found.became_zero), (9000, 4 + changed_to_zero, changed_to_zero));
    assert_eq!(found.ranges[0], (5 * 4096, 3 * 4096));
    assert!(diff(&bank, &first, &first, 2).unwrap().sections[0].ranges.is_empty());
}

#[test]
fn a_machine_is_copied_with_what_the_other_bank_lacks_and_keeps_its_root() {
    let (_, bank, kept) = series();
    let (_, other) = memory_bank();
    let mut moved = Vec::new();
    for n in [1, 2, 5] {
        let entry = bank.find(&format!("vm@{n}")).unwrap();
        let report = copy(&bank, &other, &entry, &|_| {}).unwrap();
        assert_eq!(report.root, entry.root.to_string());
        moved.push(report.pages);
    }
    assert!(moved[1] < moved[0], "{moved:?}");
    let again = copy(&bank, &other, &bank.find("vm@5").unwrap(), &|_| {}).unwrap();
    assert!(again.was_there && again.pages == 0);
    for (n, memory) in [(1, 0), (2, 1), (3, 4)] {
        assert!(withdraw(&other, &format!("vm@{n}"), "memory").unwrap() == kept[memory]);
    }
    is_clean(&other);
    let tenant = Bank::init(Box::new(MemoryStore::new()), Some(&[7; 32])).unwrap();
    assert!(matches!(copy(&bank, &tenant, &bank.find("vm").unwrap(), &|_| {}), Err(CopyError::Keys)));
}

#[test]
fn a_machine_that_is_there_and_cannot_be_read_is_not_called_copied() {
    let (_, bank, _) = series();
    let (store, other) = memory_bank();
    let entry = bank.find("vm@1").unwrap();
    copy(&bank, &other, &entry, &|_| {}).unwrap();
    // In its leaves: its head says nothing of it.
    store.flip(Kind::Manifest, &other.find("vm@1").unwrap().object(), 5000, 2);
    let error = copy(&bank, &other, &entry, &|_| {}).unwrap_err();
    assert!(matches!(error, CopyError::Manifest(_)), "{error}");
}

#[test]
fn a_bank_whose_description_is_lost_is_not_made_anew_over_its_machines() {
    let (store, bank, _) = series();
    drop(bank);
    store.remove(Kind::Config, "bank").unwrap();
    let error = Bank::init(Box::new(store.clone()), Some(&[7; 32])).unwrap_err();
    assert!(matches!(error, BankError::Nameless), "{error}");
    store.list(Kind::Manifest).unwrap().iter().for_each(|object| store.remove(Kind::Manifest, &object.name).unwrap());
    assert!(matches!(Bank::init(Box::new(store), None), Err(BankError::Nameless)), "its packs are somebody's, too");
}
