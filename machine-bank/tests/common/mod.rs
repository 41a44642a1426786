//! What the tests of the bank share: machines made from a seed, deposited and taken out again.
//!
//! `machine(7, 300)` is 300 pages, a third zero, a third text and a third random, the same each time; `Place::memory()` is an empty bank for it.
#![allow(dead_code, reason = "each test program uses some of it")]
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

pub mod migration;

use std::fs::File;
use std::io::Read;

use farbus_machine_bank::deposit::DepositReport;
use farbus_machine_bank::store::{MemoryStore, Store};
use farbus_machine_bank::{Bank, Changes, DepositOptions, PAGE, SectionKind};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// `pages` pages of different kinds, from a seed.
pub fn machine(seed: u64, pages: usize) -> Vec<u8> {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut bytes = vec![0; pages * PAGE];
    for page in bytes.chunks_exact_mut(PAGE) {
        match random.random_range(0..3) {
            0 => {}
            1 => {
                let line = format!("{:08x} a line of a log of some guest\n", random.random::<u32>());
                page.iter_mut().zip(line.as_bytes().iter().cycle()).for_each(|(to, from)| *to = *from);
            }
            _ => random.fill(page),
        }
    }
    bytes
}

/// Changes `count` pages at random, and says which as a bitmap.
pub fn work(bytes: &mut [u8], seed: u64, count: usize) -> Vec<u64> {
    let mut random = SmallRng::seed_from_u64(seed);
    let pages = bytes.len() / PAGE;
    let mut dirty = vec![0; pages.div_ceil(64)];
    for _ in 0..count {
        let page = random.random_range(0..pages);
        dirty[page / 64] |= 1_u64 << (page % 64);
        let to = &mut bytes[page * PAGE..(page + 1) * PAGE];
        if random.random_range(0..5) == 0 { to.fill(0) } else { random.fill(&mut to[..64]) }
    }
    dirty
}

/// A bank in memory, and the store under it.
pub fn memory_bank() -> (MemoryStore, Bank) {
    let store = MemoryStore::new();
    let bank = Bank::init(Box::new(store.clone()), None).unwrap();
    (store, bank)
}

/// A bank over a store that holds one.
pub fn open(store: impl Store + 'static) -> Bank {
    Bank::open(Box::new(store), None).unwrap()
}

/// Deposits memory and nothing else.
pub fn deposit(bank: &Bank, name: &str, memory: &[u8], changes: Changes<'_>) -> DepositReport {
    let mut deposit = bank.deposit(name, &DepositOptions::default()).unwrap();
    deposit.section(SectionKind::Memory, "memory", &memory, changes, &|_| {}).unwrap();
    deposit.commit().unwrap()
}

/// Takes a section out.
pub fn withdraw(bank: &Bank, wish: &str, section: &str) -> Result<Vec<u8>, farbus_machine_bank::withdraw::WithdrawError> {
    let entry = bank.find(wish).unwrap();
    let file = tempfile::tempfile().unwrap();
    bank.withdraw(&entry)?.section(section, &file, &|_| {})?;
    Ok(contents(&file))
}

/// All of a file.
pub fn contents(mut file: &File) -> Vec<u8> {
    use std::io::Seek;
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}
