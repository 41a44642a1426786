//! What the tests of lazily running machines share: whether they can run here, a machine in a bank, and a page of one that runs out of it.
//!
//! `if !permitted("away") { return }` says why nothing was tried; `page(&machine, 12)` reads page 12 as a guest would.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::sync::Arc;

use farbus_machine_bank::lazy::{LazyMachine, Uffd};
use farbus_machine_bank::store::MemoryStore;
use farbus_machine_bank::{Bank, Changes, PAGE};

use super::common::{deposit, memory_bank};

/// Whether these tests can run; where they cannot, they say so.
pub fn permitted(test: &str) -> bool {
    match Uffd::supported() {
        Ok(_) => true,
        Err(error) => {
            eprintln!("{test}: not run: {error}");
            false
        }
    }
}

/// A bank with the machine `vm`, whose memory is this.
pub fn banked(bytes: &[u8]) -> (MemoryStore, Arc<Bank>) {
    let (store, bank) = memory_bank();
    deposit(&bank, "vm", bytes, Changes::HashAll);
    (store, Arc::new(bank))
}

/// A page of its memory.
pub fn page(machine: &LazyMachine, page: usize) -> Vec<u8> {
    let mut bytes = vec![0; PAGE];
    machine.memory().unwrap().read((page * PAGE) as u64, &mut bytes).unwrap();
    bytes
}
