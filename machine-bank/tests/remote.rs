//! A bank at the other end of a link is the same bank: what goes in here comes out there, over shared memory and a simulated wire, byte for byte.
//!
//! A machine of 6,000 pages is deposited through the link, once more with 200 pages changed, and both are taken out on both sides.

#[path = "common/mod.rs"]
mod common;
#[path = "common/served.rs"]
mod served;

use common::{deposit, machine, memory_bank, open, withdraw, work};
use farbus_machine_bank::Changes;
use farbus_machine_bank::archive::{export, import};
use farbus_machine_bank::keep::{copy, diff, repair, stats, verify};
use farbus_machine_bank::remote::Rights;
use farbus_machine_bank::store::{Kind, Store};
use served::Serving;

#[test]
fn what_was_deposited_there_is_withdrawn_here_byte_for_byte() {
    let (_, bank) = memory_bank();
    let memory = machine(1, 6000);
    deposit(&bank, "vm7", &memory, Changes::HashAll);
    let serving = Serving::new(bank);
    let here = serving.connect("ann", Rights::all());
    assert!(withdraw(&here, "vm7", "memory").unwrap() == memory);
    let simulated = serving.simulated(7);
    assert!(withdraw(&simulated, "vm7", "memory").unwrap() == memory);
    let wire = here.store().service().unwrap().wire();
    assert!(wire.read_bytes > 1 << 20 && wire.message_bytes < 64 << 10, "pages are no messages: {wire:?}");
}

#[test]
fn what_is_deposited_here_is_there_and_what_the_bank_has_is_not_sent_again() {
    let (store, bank) = memory_bank();
    let serving = Serving::new(bank);
    let mut memory = machine(2, 6000);
    for here in [serving.connect("ann", Rights::all()), serving.simulated(9)] {
        let report = deposit(&here, "vm7", &memory, Changes::HashAll);
        assert!(withdraw(&open(store.clone()), &report.machine, "memory").unwrap() == memory);
        let before = here.store().service().unwrap().wire().offered_bytes;
        let dirty = work(&mut memory, before, 200);
        let second = deposit(&here, "vm7", &memory, Changes::Bitmap(&dirty));
        let sent = here.store().service().unwrap().wire().offered_bytes - before;
        assert!(second.counts.new > 0 && second.counts.new <= 200, "{:?}", second.counts);
        assert!(sent < second.pack_bytes + second.manifest_bytes + (64 << 10), "{sent} bytes for {second:?}");
        assert!(withdraw(&here, &second.machine, "memory").unwrap() == memory);
        assert!(withdraw(&open(store.clone()), &second.machine, "memory").unwrap() == memory);
    }
    let here = open(store);
    let machines: Vec<_> = here.listing().unwrap().0.iter().map(ToString::to_string).collect();
    assert_eq!(machines, ["vm7@1", "vm7@2", "vm7@3", "vm7@4"]);
    assert_eq!(verify(&here, &|_| {}).unwrap().faults, []);
}

#[test]
fn machines_are_looked_at_compared_and_copied_over_a_link() {
    let (_, bank) = memory_bank();
    let mut memory = machine(4, 5000);
    deposit(&bank, "vm7", &memory, Changes::HashAll);
    let dirty = work(&mut memory, 5, 50);
    deposit(&bank, "vm7", &memory, Changes::Bitmap(&dirty));
    let find = |bank: &farbus_machine_bank::Bank, wish: &str| bank.find(wish).unwrap();
    let expected = (diff(&bank, &find(&bank, "vm7@1"), &find(&bank, "vm7@2"), 100).unwrap(), stats(&bank).unwrap());
    let serving = Serving::new(bank);
    let here = serving.connect("ann", Rights::all());
    let found = (diff(&here, &find(&here, "vm7@1"), &find(&here, "vm7@2"), 100).unwrap(), stats(&here).unwrap());
    assert_eq!(found, expected);
    // From there to a bank of this process, and from that to another that is served.
    let (_, local) = memory_bank();
    for (machine, wish) in [("vm7@1", "vm7@1"), ("vm7@2", "vm7@2")] {
        copy(&here, &local, &find(&here, machine), &|_| {}).unwrap();
        assert_eq!(find(&local, wish).root, find(&here, machine).root);
    }
    let (other, bank) = memory_bank();
    let other_side = Serving::new(bank);
    let there = other_side.connect("ann", Rights::all());
    let report = copy(&local, &there, &find(&local, "vm7@2"), &|_| {}).unwrap();
    assert_eq!((report.machine.as_str(), report.was_there), ("vm7@1", false));
    assert!(copy(&local, &there, &find(&local, "vm7@2"), &|_| {}).unwrap().was_there);
    assert!(withdraw(&open(other), "vm7", "memory").unwrap() == memory);
}

#[test]
fn a_machine_is_exported_and_imported_over_a_link() {
    let (_, bank) = memory_bank();
    let mut memory = machine(6, 5000);
    deposit(&bank, "vm7", &memory, Changes::HashAll);
    let dirty = work(&mut memory, 7, 100);
    deposit(&bank, "vm7", &memory, Changes::Bitmap(&dirty));
    let serving = Serving::new(bank);
    let here = serving.connect("ann", Rights::all());
    let (first, second) = (here.find("vm7@1").unwrap(), here.find("vm7@2").unwrap());
    let (mut whole, mut since) = (Vec::new(), Vec::new());
    export(&here, &first, None, &mut whole, &|_| {}).unwrap();
    export(&here, &second, Some(&first), &mut since, &|_| {}).unwrap();
    let (store, bank) = memory_bank();
    let other = Serving::new(bank);
    let there = other.connect("ann", Rights::all());
    for (archive, name) in [(&whole, "vm7@1"), (&since, "vm7@2")] {
        assert_eq!(import(&there, &mut &archive[..], &|_| {}).unwrap().machine, name);
    }
    assert!(withdraw(&open(store), "vm7", "memory").unwrap() == memory);
}

#[test]
fn what_a_repair_lost_is_brought_again_over_a_link() {
    for limited in [false, true] {
        let (store, bank) = memory_bank();
        let memory = machine(8, 3000);
        deposit(&bank, "vm7", &memory, Changes::HashAll);
        let pack = store.list(Kind::Pack).unwrap().remove(0).name;
        store.flip(Kind::Pack, &pack, 3000, 1);
        assert!(repair(&bank, &|_| {}).unwrap().lost > 0);
        let serving = Serving::new(bank);
        let here = serving.connect("ann", if limited { served::rights(&["vm*"], &["vm*"]) } else { Rights::all() });
        assert!(withdraw(&here, "vm7", "memory").is_err());
        // Nothing has changed, and still what is lost is read and sent.
        let unchanged = vec![0; 3000_usize.div_ceil(64)];
        let report = deposit(&here, "vm7", &memory, Changes::Bitmap(&unchanged));
        assert!((1..100).contains(&report.counts.new), "{report:?}");
        for machine in ["vm7@1", "vm7@2"] {
            assert!(withdraw(&here, machine, "memory").unwrap() == memory);
        }
        assert_eq!(verify(&open(store), &|_| {}).unwrap().faults, []);
    }
}
