//! A store that changes what it keeps: nothing that comes out of a bank is other than what went in, nothing panics, whatever it does to whom.
//!
//! Two machines of 40 pages are deposited; bytes `02 00 10 00 ff` change byte 16 of the first manifest, and its name is made to fit its new root, as a hostile
//! store could: then it is another machine, and the two that were are read right or refused.

use farbus_machine_bank::deposit::DepositOptions;
use farbus_machine_bank::keep::{SweepOptions, sweep, verify};
use farbus_machine_bank::manifest::split;
use farbus_machine_bank::page::Identity;
use farbus_machine_bank::store::{Durability, Kind, MemoryStore, Store};
use farbus_machine_bank::{Bank, Changes, PAGE, SectionKind};

use super::input::Input;

/// What is changed is named by the bytes: kind, which object, byte, value.
pub fn bank_store(bytes: &[u8]) {
    let (first, second) = (machine(1), machine(2));
    let store = MemoryStore::new();
    let bank = Bank::init(Box::new(store.clone()), None).expect("memory can be written");
    let roots = [deposit(&bank, &first).expect("it goes in"), deposit(&bank, &second).expect("it goes in")];
    let mut input = Input(bytes);
    while let (Some(kind), Some(which), Some(at), Some(value)) = (input.u8(), input.u8(), input.u16(), input.u8()) {
        let kind = [Kind::Pack, Kind::Index, Kind::Manifest, Kind::Config][usize::from(kind % 4)];
        change(&store, kind, which, at, value);
    }
    let Ok(bank) = Bank::open(Box::new(store.clone()), None) else { return };
    look(&bank, &roots, [&first, &second]);
    if let Err(refused) = sweep(&bank, &SweepOptions { repack_below: 100, ..SweepOptions::default() }) {
        assert!(!refused.to_string().is_empty());
    }
    look(&bank, &roots, [&first, &second]);
    // A deposit on top of it is whole, or refused: what the index says is in the bank is believed, so it is verified.
    if deposit(&bank, &second).is_ok()
        && let Ok(report) = verify(&bank, &|_| {})
    {
        assert!(report.machines > 0);
    }
}

/// Whatever has the root of a machine is that machine, or is refused.
fn look(bank: &Bank, roots: &[String; 2], machines: [&Vec<u8>; 2]) {
    let Ok(listing) = bank.listing() else { return };
    for entry in &listing.0 {
        let Ok(withdrawal) = bank.withdraw(entry) else { continue };
        let file = tempfile::tempfile().expect("there is a folder for temporary files");
        let Some(section) = withdrawal.manifest().head.sections.first() else { continue };
        // One of 4 TiB that a hostile store made up is no more than what its leaves say, but takes long to say it.
        if section.len > 1 << 20 || withdrawal.section(&section.name, &file, &|_| {}).is_err() {
            continue;
        }
        for (root, machine) in roots.iter().zip(machines) {
            if entry.root.to_string() == *root {
                let mut out = vec![0; machine.len()];
                std::os::unix::fs::FileExt::read_exact_at(&file, &mut out, 0).expect("it is as long as the machine");
                assert!(out == *machine, "{entry} came out as something else");
            }
        }
    }
    verify(bank, &|_| {}).expect("damage is a fault in the report, and memory has no other");
}

fn machine(seed: usize) -> Vec<u8> {
    let mut bytes = vec![0; 40 * PAGE];
    for (at, page) in bytes.chunks_exact_mut(PAGE).enumerate().filter(|(at, _)| at % 3 != 0) {
        // Half of the pages are the same in both.
        page.fill((at * (1 + at % 2 * seed)) as u8 | 1);
    }
    bytes
}

fn deposit(bank: &Bank, memory: &[u8]) -> Result<String, farbus_machine_bank::deposit::DepositError> {
    let mut deposit = bank.deposit("vm", &DepositOptions::default())?;
    deposit.section(SectionKind::Memory, "memory", &memory, Changes::HashAll, &|_| {})?;
    deposit.commit().map(|report| report.root)
}

fn change(store: &MemoryStore, kind: Kind, which: u8, at: u16, value: u8) {
    let objects = store.list(kind).expect("memory can be listed");
    let Some(object) = objects.get(usize::from(which) % objects.len().max(1)) else { return };
    let mut bytes = store.read_all(kind, &object.name, object.len).expect("it is there");
    if value == 0xee {
        bytes.truncate(at.into());
    } else if let Some(byte) = bytes.len().checked_sub(1).and_then(|last| bytes.get_mut(usize::from(at) % (last + 1))) {
        *byte ^= value;
    }
    let name = if kind == Kind::Manifest { fitting_name(&object.name, &bytes) } else { object.name.clone() };
    store.remove(kind, &object.name).expect("memory can be written");
    store.put(kind, &name, &bytes, Durability::Durable).expect("memory can be written");
}

/// What a manifest of these bytes is called, if it is one.
fn fitting_name(name: &str, bytes: &[u8]) -> String {
    let place = bytes.last_chunk().and_then(|trailer| split(trailer, bytes.len() as u64).ok());
    let head = place.and_then(|(head, table, _)| bytes.get(usize::try_from(head).ok()?..usize::try_from(table).ok()?));
    match (head, name.rsplit_once('@')) {
        (Some(head), Some((machine, _))) => format!("{machine}@{}", Identity::plain().root(head)),
        _ => name.to_owned(),
    }
}
