//! A store that goes away under running machines and comes back: whoever needs a page waits, everybody else goes on, and no page is ever given up for it.
//!
//! A guest reads 800 pages while the store is away for 1.5 s: every byte is right, none was poisoned, and "away" and "back" were told once. With a limit of
//! 200 ms instead of none the same guest dies by SIGBUS: that is the rule, broken.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "common/mod.rs"]
mod common;
#[path = "common/lazily.rs"]
mod lazily;
#[path = "common/served.rs"]
mod served;

use std::os::unix::process::ExitStatusExt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{deposit, machine, open};
use farbus_machine_bank::lazy::{Backing, Cache, Failure, FaultServer, LazyMachine, LazyOptions, Patience, StoreEvent};
use farbus_machine_bank::remote::{Link, Reconnect, RemoteStore, Rights};
use farbus_machine_bank::store::{Directory, Kind, MemoryStore, Store, StoreError};
use farbus_machine_bank::{Bank, Changes, PAGE};
use farbus_transport::Nanos;
use farbus_transport::shm::{ShmFabric, ShmOptions};
use lazily::{banked, page, permitted};
use served::Serving;

const SOON: Duration = Duration::from_secs(60);

fn server() -> FaultServer {
    FaultServer::start(Cache::new(64 << 20)).unwrap()
}

fn lazy(server: &FaultServer, bank: &Arc<Bank>, options: LazyOptions) -> LazyMachine {
    server.withdraw(bank, &bank.find("vm").unwrap(), Backing::Anonymous, options).unwrap()
}

fn is(machine: &LazyMachine, bytes: &[u8], at: usize) {
    assert!(page(machine, at) == bytes[at * PAGE..][..PAGE], "page {at}");
}

/// Heals a store when a test ends, however it does: readers that wait for ever would wait for its end.
struct Heal<'a>(&'a MemoryStore);

impl Drop for Heal<'_> {
    fn drop(&mut self) {
        self.0.heal();
    }
}

/// Options, and what is told of the store.
fn heard() -> (LazyOptions, Arc<Mutex<Vec<StoreEvent>>>) {
    let told = Arc::new(Mutex::new(Vec::new()));
    let hear = told.clone();
    let on_store = Arc::new(move |event: &StoreEvent| hear.lock().unwrap().push(event.clone()));
    (LazyOptions { on_store, ..LazyOptions::default() }, told)
}

/// Waits until the store is known to be away.
fn away(machine: &LazyMachine) {
    let end = Instant::now() + SOON;
    while machine.report().away_since_ms.is_none() {
        assert!(Instant::now() < end, "{:?}", machine.report());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_store_that_is_away_for_a_second_and_a_half_costs_a_running_machine_nothing_but_time() {
    if !permitted("store away") {
        return;
    }
    let bytes = machine(1, 800);
    let (store, bank) = banked(&bytes);
    let (server, (options, told)) = (server(), heard());
    let lazy = lazy(&server, &bank, options);
    is(&lazy, &bytes, 0);
    store.disappear();
    let gone = Instant::now();
    std::thread::scope(|scope| {
        let _heal = Heal(&store);
        // Two vCPUs, each of which stops at its first page.
        let readers: Vec<_> = (0..2)
            .map(|first| {
                scope.spawn({
                    let (lazy, bytes) = (&lazy, &bytes);
                    move || (100 + first * 350..450 + first * 350).for_each(|at| is(lazy, bytes, at))
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(1500));
        assert!(readers.iter().all(|reader| !reader.is_finished()), "a page came from a store that is away");
        let report = lazy.report();
        assert!(report.away_since_ms.is_some() && report.poisoned == 0, "{report:?}");
        // What was there already is there.
        is(&lazy, &bytes, 3);
        store.heal();
    });
    (0..800).for_each(|at| is(&lazy, &bytes, at));
    let report = lazy.report();
    assert_eq!((report.poisoned, report.stuck, report.away, report.away_since_ms), (0, 0, 1, None), "{report:?}");
    assert!((1300..60_000).contains(&report.away_ms) && u128::from(report.away_ms) <= gone.elapsed().as_millis(), "{report:?}");
    let told = told.lock().unwrap();
    assert!(matches!(&told[..], [StoreEvent::Away { why, .. }, StoreEvent::Back { .. }] if why.contains("gone")), "{told:?}");
}

const CHILD: &str = "FARBUS_TEST_GIVES_UP";

#[test]
fn with_a_limit_that_is_too_short_the_same_machine_loses_the_page_for_ever() {
    if !permitted("store given up") {
        return;
    }
    if std::env::var_os(CHILD).is_some() {
        let bytes = machine(1, 800);
        let (store, bank) = banked(&bytes);
        let patience = Patience { give_up: Some(Duration::from_millis(200)), ..Patience::default() };
        let healed = store.clone();
        let on_failure = Arc::new(move |failure: &Failure| {
            eprintln!("given up: {}", failure.reason);
            healed.heal();
        });
        let server = server();
        let lazy = lazy(&server, &bank, LazyOptions { patience, on_failure, ..LazyOptions::default() });
        is(&lazy, &bytes, 0);
        store.disappear();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(1500));
                store.heal();
            });
            is(&lazy, &bytes, 100);
        });
        eprintln!("the page was read after all");
        return;
    }
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "with_a_limit_that_is_too_short_the_same_machine_loses_the_page_for_ever", "--nocapture"]);
    let output = child.env(CHILD, "1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("given up: the store is away for too long") && !said.contains("after all"), "{said}");
    assert_eq!(output.status.signal(), Some(7), "{:?}: {said}", output.status);
}

#[test]
fn a_bank_that_is_away_holds_up_no_machine_of_another_bank_and_not_what_the_cache_has() {
    if !permitted("other machines") {
        return;
    }
    let (bytes, others) = (machine(2, 800), machine(3, 800));
    let (store, bank) = banked(&bytes);
    let (_, other) = banked(&others);
    // The same machine in a bank that stays, whose pages come into the same cache.
    let twin = Arc::new(open(store.crashed()));
    let server = server();
    let (stuck, free, same) = (
        lazy(&server, &bank, LazyOptions::default()),
        lazy(&server, &other, LazyOptions::default()),
        lazy(&server, &twin, LazyOptions::default()),
    );
    is(&stuck, &bytes, 0);
    store.disappear();
    std::thread::scope(|scope| {
        let _heal = Heal(&store);
        let reader = scope.spawn(|| is(&stuck, &bytes, 500));
        away(&stuck);
        let start = Instant::now();
        (0..800).for_each(|at| is(&free, &others, at));
        (0..400).for_each(|at| is(&same, &bytes, at));
        assert!(!reader.is_finished() && start.elapsed() < Duration::from_secs(20));
        // The machine whose bank is away has what its twin fetched.
        (0..400).for_each(|at| is(&stuck, &bytes, at));
        assert!(!reader.is_finished());
        // And the page that it waits for comes the same way.
        is(&same, &bytes, 500);
        reader.join().unwrap();
        assert!(stuck.report().away_since_ms.is_some(), "the store was back: {:?}", stuck.report());
        store.heal();
    });
    (0..800).for_each(|at| is(&stuck, &bytes, at));
    assert_eq!((stuck.report().poisoned, free.report().away, same.report().away), (0, 0, 0));
}

#[test]
fn a_machine_begins_and_ends_at_once_while_its_store_is_away() {
    if !permitted("begin and end") {
        return;
    }
    let bytes = machine(4, 300);
    let (store, bank) = banked(&bytes);
    let server = server();
    let entry = bank.find("vm").unwrap();
    server.prepare(&bank, &entry, "memory").unwrap();
    store.disappear();
    let lazy = server.withdraw(&bank, &entry, Backing::Anonymous, LazyOptions { rest: true, ..LazyOptions::default() }).unwrap();
    away(&lazy);
    assert!(!lazy.wait_ahead(Duration::from_millis(300)));
    store.heal();
    assert!(lazy.wait_whole(SOON), "what was to be fetched ahead is forgotten: {:?}", lazy.report());
    (0..300).for_each(|at| is(&lazy, &bytes, at));
    // It ends at once while its pager waits between two questions, and while it waits for an answer.
    for hang in [false, true] {
        let server = self::server();
        let lazy = self::lazy(&server, &bank, LazyOptions { prefetch: false, rest: true, ..LazyOptions::default() });
        if hang {
            store.slow_down(Duration::from_secs(5));
        } else {
            store.disappear();
            std::thread::sleep(Duration::from_millis(700));
        }
        std::thread::sleep(Duration::from_millis(50));
        let end = Instant::now();
        drop(lazy);
        assert!(end.elapsed() < Duration::from_secs(1), "hanging {hang}: {:?}", end.elapsed());
        store.heal();
    }
}

/// A machine runs on memory from a bank in a folder that is somewhere else for a while, as `reach` has the bank.
fn unmounted<T>(reach: impl Fn(Bank) -> (Bank, T)) {
    let folder = tempfile::tempdir().unwrap();
    let (here, there) = (folder.path().join("bank"), folder.path().join("elsewhere"));
    let bytes = machine(5, 600);
    deposit(&Bank::init(Box::new(Directory::create(&here).unwrap()), None).unwrap(), "vm", &bytes, Changes::HashAll);
    for empty in [false, true] {
        let (bank, _served) = reach(Bank::open(Box::new(Directory::open(&here).unwrap()), None).unwrap());
        let (server, bank) = (server(), Arc::new(bank));
        let lazy = lazy(&server, &bank, LazyOptions { prefetch: false, ..LazyOptions::default() });
        // A pack that is read is open; what the store says of its absence is what is asked here.
        std::thread::sleep(Duration::from_millis(100));
        std::fs::rename(&here, &there).unwrap();
        if empty {
            // As where a mount point has the folders and nothing in them.
            drop(Directory::create(&here).unwrap());
        }
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| (0..600).for_each(|at| is(&lazy, &bytes, at)));
            away(&lazy);
            std::thread::sleep(Duration::from_millis(500));
            assert!(!reader.is_finished());
            if empty {
                std::fs::remove_dir_all(&here).unwrap();
            }
            std::fs::rename(&there, &here).unwrap();
        });
        assert_eq!(lazy.report().poisoned, 0, "{:?}", lazy.report());
    }
}

#[test]
fn a_folder_that_is_not_mounted_for_a_while_has_lost_nothing() {
    if permitted("unmounted folder") {
        unmounted(|bank| (bank, ()));
    }
}

#[test]
fn nor_has_one_under_a_server_that_goes_on_serving() {
    if permitted("unmounted folder of a server") {
        for rights in [Rights::all(), served::rights(&["vm"], &[])] {
            unmounted(|bank| {
                let serving = Serving::new(bank);
                (serving.connect("ann", rights.clone()), serving)
            });
        }
    }
}

#[test]
fn a_server_that_is_started_again_finds_the_machines_that_run_out_of_its_bank_waiting() {
    if !permitted("server started again") {
        return;
    }
    let bytes = machine(7, 800);
    let (store, _) = banked(&bytes);
    // The server that is there, if one is.
    let serving = Arc::new(Mutex::new(Some(Serving::new(open(store.clone())))));
    let dialled = serving.clone();
    let dial = move || {
        let serving = dialled.lock().unwrap();
        let Some(serving) = serving.as_ref() else { return Err(StoreError::Gone("nobody serves".to_owned())) };
        let (lender, borrower) = ShmFabric::pair(ShmOptions::default()).unwrap();
        drop(serving.serve(lender, "ann", Rights::all(), Nanos::now));
        Link::open(borrower, "shm:test", Nanos::now)
    };
    // Less than the server is away for: whoever waits longer is the machine.
    let times = Reconnect { give_up: Duration::from_millis(100), ..Reconnect::default() };
    let store_there = RemoteStore::reconnecting(dial().unwrap(), times, dial);
    let bank = Arc::new(Bank::open(Box::new(store_there), None).unwrap());
    let (server, (options, told)) = (server(), heard());
    let lazy = lazy(&server, &bank, options);
    is(&lazy, &bytes, 0);
    assert_eq!(store.pins().unwrap().len(), 1);
    drop(serving.lock().unwrap().take());
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| (0..800).for_each(|at| is(&lazy, &bytes, at)));
        away(&lazy);
        std::thread::sleep(Duration::from_millis(500));
        *serving.lock().unwrap() = Some(Serving::new(open(store.clone())));
        reader.join().unwrap();
    });
    assert_eq!(store.pins().unwrap().len(), 1, "the machine is pinned again, and once");
    assert_eq!((lazy.report().poisoned, lazy.report().away), (0, 1), "{:?}", lazy.report());
    assert!(matches!(&told.lock().unwrap()[..], [StoreEvent::Away { .. }, StoreEvent::Back { .. }]));
    drop(lazy);
    let end = Instant::now() + SOON;
    while !store.pins().unwrap().is_empty() {
        assert!(Instant::now() < end, "a machine that has ended is pinned");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_pack_that_is_missing_from_a_store_that_is_there_is_lost() {
    if !permitted("missing pack") {
        return;
    }
    let bytes = machine(6, 160);
    let (store, bank) = banked(&bytes);
    for pack in store.list(Kind::Pack).unwrap() {
        store.remove(Kind::Pack, &pack.name).unwrap();
    }
    let (failures, server) = (Arc::new(Mutex::new(0)), server());
    let told = failures.clone();
    let on_failure = Arc::new(move |failure: &Failure| *told.lock().unwrap() += failure.len / PAGE as u64);
    // Nobody asks, who would die of it: what is fetched ahead is refused to whoever comes later.
    let lazy = lazy(&server, &bank, LazyOptions { rest: true, on_failure, ..LazyOptions::default() });
    assert!(lazy.wait_whole(SOON), "{:?}", lazy.report());
    // The last ones are refused when they are known, a moment later.
    std::thread::sleep(Duration::from_millis(200));
    let report = lazy.report();
    let stored = bytes.chunks(PAGE).filter(|page| page.iter().any(|byte| *byte != 0)).count() as u64;
    assert_eq!((report.poisoned, report.away, report.away_since_ms), (stored, 0, None), "{report:?}");
    assert_eq!(*failures.lock().unwrap(), report.poisoned);
}
