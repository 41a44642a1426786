//! Archives: a machine that went through one file is the machine that it was, and a file that is not whole makes none.
//!
//! `vm7@2` is exported since `vm7@1`: a bank that has the first gets the second by what changed, one that has not refuses it.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

mod common;

use common::{deposit, machine, memory_bank, withdraw, work};
use farbus_machine_bank::archive::{ExportReport, ImportError, ImportReport, export, import};
use farbus_machine_bank::codec::Malformed;
use farbus_machine_bank::keep::{SweepOptions, sweep, verify};
use farbus_machine_bank::store::{Kind, MemoryStore, Store, StoreError};
use farbus_machine_bank::{Bank, Changes, DepositOptions, SectionKind};

/// Two deposits of a machine with memory and a disk, and another machine that has some of its pages.
fn bank() -> (MemoryStore, Bank) {
    let (store, bank) = memory_bank();
    let (mut memory, disk) = (machine(1, 5000), machine(2, 300));
    deposit(&bank, "other", &machine(1, 40), Changes::HashAll);
    for seed in 3..5 {
        let mut deposit = bank.deposit("vm7", &DepositOptions::default()).unwrap();
        deposit.section(SectionKind::Memory, "memory", &memory.as_slice(), Changes::HashAll, &|_| {}).unwrap();
        deposit.section(SectionKind::Disk, "disk0", &&disk[..disk.len() - 100], Changes::HashAll, &|_| {}).unwrap();
        deposit.commit().unwrap();
        work(&mut memory, seed, 40);
    }
    (store, bank)
}

fn exported(bank: &Bank, machine: &str, since: Option<&str>) -> (ExportReport, Vec<u8>) {
    let (entry, since) = (bank.find(machine).unwrap(), since.map(|since| bank.find(since).unwrap()));
    let mut archive = Vec::new();
    let report = export(bank, &entry, since.as_ref(), &mut archive, &|_| {}).unwrap();
    assert_eq!(report.bytes, archive.len() as u64);
    (report, archive)
}

fn imported(bank: &Bank, mut archive: &[u8]) -> Result<ImportReport, ImportError> {
    import(bank, &mut archive, &|_| {})
}

fn assert_same(bank: &Bank, other: &Bank, machine: &str) {
    for section in ["memory", "disk0"] {
        assert!(withdraw(bank, machine, section).unwrap() == withdraw(other, machine, section).unwrap(), "{section} of {machine}");
    }
    assert_eq!(verify(other, &|_| {}).unwrap().faults, []);
}

#[test]
fn a_machine_that_went_through_an_archive_is_what_it_was() {
    let (_, bank) = bank();
    let (report, archive) = exported(&bank, "vm7@1", None);
    let (_, other) = memory_bank();
    let made = imported(&other, &archive).unwrap();
    assert_eq!((&made.root, made.machine.as_str(), made.was_there), (&report.root, "vm7@1", false));
    assert_eq!((made.pages, made.new), (report.pages, report.pages));
    assert_same(&bank, &other, "vm7@1");
    assert_eq!(
        other.manifest(&other.find("vm7").unwrap()).unwrap().head,
        bank.manifest(&bank.find("vm7@1").unwrap()).unwrap().head
    );
    // Again, and from there: the same archive.
    assert!(imported(&other, &archive).unwrap().was_there);
    assert!(exported(&other, "vm7", None).1 == archive);
    assert_eq!(other.listing().unwrap().0.len(), 1);
}

#[test]
fn what_changed_since_another_is_imported_only_where_that_is() {
    let (_, bank) = bank();
    let (whole, first) = exported(&bank, "vm7@1", None);
    let (report, second) = exported(&bank, "vm7@2", Some("vm7@1"));
    assert!(report.pages <= 40 && second.len() * 20 < first.len(), "{report:?} beside {whole:?}");
    let (store, other) = memory_bank();
    assert!(matches!(imported(&other, &second), Err(ImportError::NoBase(root)) if root.to_string() == whole.root));
    assert!(other.listing().unwrap().0.is_empty() && store.list(Kind::Pack).unwrap().is_empty());
    imported(&other, &first).unwrap();
    let made = imported(&other, &second).unwrap();
    assert_eq!((made.machine.as_str(), made.root, made.since.as_deref()), ("vm7@2", report.root, Some("vm7@1")));
    assert_same(&bank, &other, "vm7@2");
    // In any order where each is whole: the number is the bank's, the root the machine's.
    let (_, third) = memory_bank();
    imported(&third, &exported(&bank, "vm7@2", None).1).unwrap();
    assert_eq!(imported(&third, &exported(&bank, "vm7@1", Some("vm7@2")).1).unwrap().machine, "vm7@2");
    assert!(withdraw(&third, "vm7@2", "memory").unwrap() == withdraw(&bank, "vm7@1", "memory").unwrap());
}

#[test]
fn an_archive_has_no_page_of_another_machine() {
    let (_, bank) = memory_bank();
    let (ours, theirs) = (machine(1, 8), machine(2, 8));
    deposit(&bank, "both", &[&ours[..], &theirs].concat(), Changes::HashAll);
    let one = deposit(&bank, "ours", &ours, Changes::HashAll);
    assert_eq!(one.counts.new, 0, "they share groups");
    let (_, archive) = exported(&bank, "ours", None);
    let (store, other) = memory_bank();
    imported(&other, &archive).unwrap();
    let stored: usize = store.list(Kind::Pack).unwrap().iter().map(|pack| pack.len as usize).sum();
    assert!(stored < 8 * 4096 + 1000, "{stored} bytes");
    assert_eq!(
        verify(&other, &|_| {}).unwrap().pages,
        ours.chunks(4096).filter(|page| page.iter().any(|byte| *byte != 0)).count() as u64
    );
}

#[test]
fn an_archive_that_was_cut_off_or_changed_makes_no_machine() {
    let (_, bank) = memory_bank();
    deposit(&bank, "vm", &machine(5, 40), Changes::HashAll);
    let (_, archive) = exported(&bank, "vm", None);
    let (store, other) = memory_bank();
    let nothing = |what: &str, refused: &Result<ImportReport, ImportError>| {
        assert!(
            matches!(refused, Err(ImportError::Malformed(_) | ImportError::Keys(_) | ImportError::NoBase(_))),
            "{what}: {refused:?}"
        );
        assert!(other.listing().unwrap().0.is_empty(), "{what}");
    };
    let steps = (0..300).chain((300..archive.len()).step_by(509)).chain(archive.len() - 40..archive.len());
    for len in steps.clone() {
        nothing(&format!("{len} bytes"), &imported(&other, &archive[..len]));
    }
    for at in steps {
        let mut wrong = archive.clone();
        wrong[at] ^= 1 << (at % 8);
        nothing(&format!("byte {at}"), &imported(&other, &wrong));
    }
    nothing("a byte more", &imported(&other, &[&archive[..], &[0]].concat()));
    assert!(matches!(imported(&other, b"FBARCH2\n"), Err(ImportError::Malformed(Malformed::Magic(_)))));
    // What came of them is nobody's.
    sweep(&other, &SweepOptions::default()).unwrap();
    assert!(store.list(Kind::Pack).unwrap().is_empty());
    imported(&other, &archive).unwrap();
    assert_eq!(verify(&other, &|_| {}).unwrap().faults, []);
}

#[test]
fn tenants_do_not_import_from_each_other() {
    let bank = |key: Option<u8>| {
        let key = key.map(|key| [key; 32]);
        Bank::init(Box::new(MemoryStore::new()), key.as_ref()).unwrap()
    };
    let (plain, ours, theirs, again) = (bank(None), bank(Some(1)), bank(Some(2)), bank(Some(1)));
    for bank in [&plain, &ours] {
        deposit(bank, "vm", &machine(6, 30), Changes::HashAll);
    }
    let (of_plain, of_ours) = (exported(&plain, "vm", None).1, exported(&ours, "vm", None).1);
    for (to, archive) in [(&plain, &of_ours), (&ours, &of_plain), (&theirs, &of_ours), (&theirs, &of_plain)] {
        assert!(matches!(imported(to, archive), Err(ImportError::Keys(_))));
    }
    // Nor where the flag or the check is changed to fit.
    let mut forged = of_ours.clone();
    forged[8..41].copy_from_slice(&of_plain[8..41]);
    let (_, empty) = memory_bank();
    assert!(matches!(imported(&empty, &forged), Err(ImportError::Malformed(_))));
    imported(&again, &of_ours).unwrap();
    assert!(withdraw(&again, "vm", "memory").unwrap() == machine(6, 30));
}

#[test]
fn a_full_store_makes_no_machine_and_the_import_can_be_run_again() {
    let (_, bank) = bank();
    let (_, archive) = exported(&bank, "vm7", None);
    for writes in 0..12 {
        let (store, other) = memory_bank();
        store.fail_writes_after(writes);
        match imported(&other, &archive) {
            Err(ImportError::Store(StoreError::Full(_))) => {}
            Err(error) => panic!("{writes} writes: {error}"),
            Ok(_) => assert!(writes > 4, "{writes} writes were enough"),
        }
        store.heal();
        let there = other.listing().unwrap().0.len();
        assert_eq!(imported(&other, &archive).unwrap().was_there, there == 1, "{writes} writes");
        assert_same(&bank, &other, "vm7");
    }
}

#[test]
fn a_damaged_machine_is_not_exported() {
    let (store, bank) = bank();
    for pack in store.list(Kind::Pack).unwrap() {
        store.flip(Kind::Pack, &pack.name, 1000, 2);
    }
    let entry = bank.find("vm7").unwrap();
    assert!(export(&bank, &entry, None, &mut Vec::new(), &|_| {}).is_err());
}
