//! A link to a bank that behaves as badly as it may: full queues, late events, cuts in the middle; and memory that comes over one as it is used.
//!
//! Over a fabric that refuses every fourth post a machine goes in and comes out equal; a link that drops at its hundredth operation is an error, and the
//! next one goes on where it was.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "common/mod.rs"]
mod common;
#[path = "common/served.rs"]
mod served;

use std::sync::Arc;
use std::time::Duration;

use common::{deposit, machine, memory_bank, open, withdraw, work};
use farbus_machine_bank::deposit::DepositError;
use farbus_machine_bank::keep::{SweepOptions, sweep, verify};
use farbus_machine_bank::lazy::{Backing, Cache, FaultServer, LazyOptions, Uffd};
use farbus_machine_bank::remote::{RemoteStore, Rights};
use farbus_machine_bank::store::StoreError;
use farbus_machine_bank::{Bank, Changes, DepositOptions, PAGE, SectionKind};
use farbus_transport::Nanos;
use farbus_transport::shm::{ShmFabric, ShmOptions};
use farbus_transport::sim::Seed;
use farbus_transport::wrap::{FaultRates, Faults};
use served::{Serving, reason, rights};

/// A link of which both ends misbehave.
fn faulty(serving: &Serving, seed: u64, drop_at: Option<u64>) -> Result<Bank, String> {
    let (lender, borrower) = ShmFabric::pair(ShmOptions::default()).unwrap();
    // A flush that is put off waits for a poll, and who sleeps does not poll.
    let rates = FaultRates { late_flush_permille: 0, ..FaultRates::drawn(&mut Seed::new(seed)) };
    drop(serving.serve(Faults::new(lender, seed, rates), "ann", Rights::all(), Nanos::now));
    let store = RemoteStore::connect(Faults::new(borrower, seed + 1, FaultRates { drop_at, ..rates }), "shm:faulty", Nanos::now);
    Bank::open(Box::new(store.map_err(|error| error.to_string())?), None).map_err(|error| error.to_string())
}

#[test]
fn over_a_link_that_is_full_and_late_everything_arrives() {
    let (store, bank) = memory_bank();
    let serving = Serving::new(bank);
    let mut memory = machine(1, 4500);
    for seed in 0..4 {
        let here = faulty(&serving, seed, None).unwrap();
        let dirty = work(&mut memory, seed, 300);
        let changes = if seed == 0 { Changes::HashAll } else { Changes::Bitmap(&dirty) };
        let report = deposit(&here, "vm7", &memory, changes);
        assert!(withdraw(&here, "vm7", "memory").unwrap() == memory, "seed {seed}");
        assert!(withdraw(&open(store.clone()), &report.machine, "memory").unwrap() == memory, "seed {seed}");
    }
    assert_eq!(verify(&open(store), &|_| {}).unwrap().faults, []);
}

/// A deposit and a withdrawal over a link that may drop.
fn round(bank: &Bank, memory: &[u8]) -> Result<(), String> {
    let text = |error: DepositError| error.to_string();
    let mut deposit = bank.deposit("vm7", &DepositOptions::default()).map_err(text)?;
    deposit.section(SectionKind::Memory, "memory", &memory, Changes::HashAll, &|_| {}).map_err(text)?;
    let report = deposit.commit().map_err(text)?;
    let entry = bank.find(&report.machine).map_err(|error| error.to_string())?;
    let file = tempfile::tempfile().unwrap();
    let withdrawal = bank.withdraw(&entry).map_err(|error| error.to_string())?;
    withdrawal.section("memory", &file, &|_| {}).map_err(|error| error.to_string())?;
    assert!(common::contents(&file) == memory, "a withdrawal that succeeds is right");
    Ok(())
}

#[test]
fn a_link_that_drops_at_any_operation_is_an_error_and_the_next_one_goes_on() {
    let (store, bank) = memory_bank();
    let serving = Serving::new(bank);
    let mut failed = 0;
    for drop_at in (1..60).step_by(4) {
        let memory = machine(drop_at, 1200);
        let dropped = faulty(&serving, drop_at, Some(drop_at)).and_then(|bank| round(&bank, &memory));
        failed += usize::from(dropped.is_err());
        assert_eq!(verify(&open(store.clone()), &|_| {}).unwrap().faults, [], "dropped at {drop_at}");
    }
    assert!(failed > 5, "{failed} links dropped in the middle");
    round(&serving.connect("ann", Rights::all()), &machine(2, 1200)).unwrap();
    // What clients that are gone had held nobody waits for.
    sweep(&open(store.clone()), &SweepOptions::default()).unwrap();
    assert_eq!(verify(&open(store), &|_| {}).unwrap().faults, []);
}

#[test]
fn a_wire_that_is_cut_ends_both_sides() {
    let (_, bank) = memory_bank();
    let memory = machine(3, 2000);
    deposit(&bank, "vm7", &memory, Changes::HashAll);
    let serving = Serving::new(bank);
    let (store, world) = serving.simulated_ended(5);
    let here = serving.bank(store);
    assert!(withdraw(&here, "vm7", "memory").unwrap() == memory);
    world.cut();
    let error = here.listing().unwrap_err();
    assert!(matches!(&error, StoreError::Gone(why) if why.contains("gone")), "{error}");
    assert!(matches!(here.listing(), Err(StoreError::Gone(_))), "and stays so");
}

#[test]
fn two_clients_deposit_and_withdraw_at_once() {
    let (store, bank) = memory_bank();
    let serving = Serving::new(bank);
    let machines: Vec<_> = (0..2).map(|seed| machine(seed, 4000)).collect();
    std::thread::scope(|scope| {
        for (at, memory) in machines.iter().enumerate() {
            let serving = &serving;
            scope.spawn(move || {
                let name = format!("vm{at}");
                // One of them knows its own machines only.
                let (client, ended) =
                    serving.connect_ended(&name, if at == 0 { Rights::all() } else { rights(&["vm1"], &["vm1"]) });
                for _ in 0..3 {
                    deposit(&client, &name, memory, Changes::HashAll);
                    assert!(withdraw(&client, &name, "memory").unwrap() == *memory);
                }
                drop(client);
                assert!(reason(&ended).contains("closed the link"));
            });
        }
    });
    let here = open(store);
    assert_eq!((verify(&here, &|_| {}).unwrap().faults, here.listing().unwrap().0.len()), (vec![], 6));
}

#[test]
fn memory_comes_over_a_link_as_it_is_used() {
    if let Err(error) = Uffd::supported() {
        eprintln!("memory over a link: not run: {error}");
        return;
    }
    let (_, bank) = memory_bank();
    let memory = machine(6, 5000);
    deposit(&bank, "vm7", &memory, Changes::HashAll);
    let serving = Serving::new(bank);
    let here = Arc::new(serving.connect("ann", Rights::all()));
    let server = FaultServer::start(Cache::new(64 << 20)).unwrap();
    let entry = here.find("vm7").unwrap();
    let lazy = server.withdraw(&here, &entry, Backing::Anonymous, LazyOptions::default()).unwrap();
    let read = |page: usize| {
        let mut bytes = vec![0; PAGE];
        lazy.memory().unwrap().read((page * PAGE) as u64, &mut bytes).unwrap();
        bytes
    };
    for page in [4999, 0, 2500, 17, 4096, 4095] {
        assert!(read(page) == memory[page * PAGE..(page + 1) * PAGE], "page {page}");
    }
    let groups = lazy.report().demanded;
    assert!((4..=6).contains(&groups), "{groups} groups for six pages");
    assert!((0..5000).all(|page| read(page) == memory[page * PAGE..(page + 1) * PAGE]));
    // The working set that it had goes back with it.
    let kept = lazy.working_set().keep(&here, &entry, "memory").unwrap();
    assert_eq!(kept.machine, "vm7@2");
    assert!(withdraw(&here, "vm7", "memory").unwrap() == memory);
    drop((lazy, server));
    std::thread::sleep(Duration::from_millis(1));
}
