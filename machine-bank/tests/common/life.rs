//! The life of a bank, as it is over whatever store: in, out, removed, swept, verified, and in again.
//!
//! `a_whole_life(&|| store(), None)` opens the same store several times, as several processes would.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use farbus_machine_bank::keep::{self, SweepOptions};
use farbus_machine_bank::page::KEY;
use farbus_machine_bank::store::Store;
use farbus_machine_bank::{Bank, Changes};

use crate::common::{deposit, machine, withdraw, work};

/// Deposits, withdraws, removes, sweeps and verifies; with a key the bank is sealed.
pub fn a_whole_life(open: &dyn Fn() -> Box<dyn Store>, key: Option<&[u8; KEY]>) {
    let bank = match key {
        Some(key) => Bank::init_sealed(open(), key).unwrap(),
        None => Bank::init(open(), None).unwrap(),
    };
    let again = || Bank::open(open(), key).unwrap();
    let first = machine(1, 1500);
    let mut second = first.clone();
    let dirty = work(&mut second, 2, 200);
    deposit(&bank, "vm", &first, Changes::HashAll);
    assert!(withdraw(&bank, "vm", "memory").unwrap() == first);
    let report = deposit(&again(), "vm", &second, Changes::Bitmap(&dirty));
    assert_eq!(report.machine, "vm@2");
    deposit(&again(), "other", &machine(3, 300), Changes::HashAll);
    let bank = again();
    assert!(withdraw(&bank, "vm@1", "memory").unwrap() == first && withdraw(&bank, "vm", "memory").unwrap() == second);
    // vm@2 rests on vm@1, so its manifest is written anew under its name.
    let gone = [bank.find("vm@1").unwrap(), bank.find("other").unwrap()];
    let removed = keep::remove(&bank, &gone).unwrap();
    assert_eq!((removed.removed.len(), removed.rewritten), (2, 1));
    assert!(withdraw(&bank, "vm", "memory").unwrap() == second);
    let swept = keep::sweep(&bank, &SweepOptions::default()).unwrap();
    assert!(swept.removed > 0, "{swept:?}");
    assert!(withdraw(&bank, "vm", "memory").unwrap() == second);
    let bank = again();
    let verified = keep::verify(&bank, &|_| {}).unwrap();
    assert!(verified.faults.is_empty() && verified.machines == 1, "{verified:?}");
    assert!(withdraw(&bank, "vm", "memory").unwrap() == second);
    assert_eq!(deposit(&bank, "vm", &first, Changes::HashAll).machine, "vm@3");
}
