//! A bank whose server is restarted, or whose link is cut, in the middle of what somebody does with it: reading goes on, and a deposit goes on or says that it does not.
//!
//! A withdrawal of 6,000 pages goes over six links, each cut after some operations, and every byte is right; a machine that runs on memory over a link stands still while
//! its server is away, and goes on.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

#[path = "common/mod.rs"]
mod common;
#[path = "common/served.rs"]
mod served;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{deposit, machine, memory_bank, open, withdraw, work};
use farbus_machine_bank::deposit::DepositError;
use farbus_machine_bank::keep::{SweepOptions, remove, sweep, verify};
use farbus_machine_bank::lazy::{Backing, Cache, FaultServer, LazyOptions, Uffd};
use farbus_machine_bank::remote::{Link, Reconnect, RemoteStore, Rights};
use farbus_machine_bank::store::{Hold, Kind, MemoryStore, Store, StoreError};
use farbus_machine_bank::{Bank, Changes, DepositOptions, PAGE, SectionKind};
use farbus_transport::Nanos;
use farbus_transport::shm::{ShmFabric, ShmOptions};
use farbus_transport::wrap::{FaultRates, Faults};
use served::Serving;

/// A server that can be away, over links that can be cut.
struct Host {
    store: MemoryStore,
    serving: Mutex<Option<Serving>>,
    links: AtomicU64,
    /// Operations after which the next links drop.
    cuts: Mutex<Vec<u64>>,
}

impl Host {
    fn new(store: MemoryStore) -> Arc<Self> {
        let serving = Mutex::new(Some(Serving::new(open(store.clone()))));
        Arc::new(Self { store, serving, links: AtomicU64::new(0), cuts: Mutex::default() })
    }

    fn link(&self) -> Result<Link, StoreError> {
        let serving = self.serving.lock().unwrap();
        let serving = serving.as_ref().ok_or_else(|| StoreError::Gone("nobody serves".to_owned()))?;
        self.links.fetch_add(1, Ordering::Relaxed);
        let (lender, borrower) = ShmFabric::pair(ShmOptions::default()).unwrap();
        drop(serving.serve(lender, "ann", Rights::all(), Nanos::now));
        let drop_at = self.cuts.lock().unwrap().pop();
        Link::open(Faults::new(borrower, 1, FaultRates { drop_at, ..FaultRates::default() }), "shm:host", Nanos::now)
    }

    /// A bank over links that are made anew for `give_up`.
    fn connect(self: &Arc<Self>, give_up: Duration) -> Bank {
        let times = Reconnect { pause: Duration::from_millis(5), longest: Duration::from_millis(50), give_up };
        let (first, host) = (self.link().unwrap(), self.clone());
        Bank::open(Box::new(RemoteStore::reconnecting(first, times, move || host.link())), None).unwrap()
    }

    fn kill(&self) {
        self.serving.lock().unwrap().take();
    }

    fn restart(&self) {
        *self.serving.lock().unwrap() = Some(Serving::new(open(self.store.clone())));
    }

    fn links(&self) -> u64 {
        self.links.load(Ordering::Relaxed)
    }
}

const LONG: Duration = Duration::from_secs(60);

#[test]
fn a_withdrawal_over_links_that_are_cut_goes_on_and_every_byte_is_right() {
    let (store, bank) = memory_bank();
    let memory = machine(1, 6000);
    deposit(&bank, "vm7", &memory, Changes::HashAll);
    let host = Host::new(store);
    host.cuts.lock().unwrap().extend([13, 12, 11, 10, 9]);
    let here = host.connect(LONG);
    assert!(withdraw(&here, "vm7", "memory").unwrap() == memory);
    assert!(host.links() > 2, "{} links", host.links());
    // The twin: over a link that is not made anew the same is an error.
    host.cuts.lock().unwrap().push(12);
    let once = Bank::open(Box::new(RemoteStore::over(host.link().unwrap())), None).unwrap();
    let tried = once.find("vm7").map_err(|error| error.to_string()).and_then(|entry| {
        let withdrawal = once.withdraw(&entry).map_err(|error| error.to_string())?;
        withdrawal.section("memory", &tempfile::tempfile().unwrap(), &|_| {}).map_err(|error| error.to_string())
    });
    assert!(tried.is_err(), "a link that was cut is an error: {tried:?}");
}

#[test]
fn a_server_that_is_restarted_in_the_middle_of_a_withdrawal_is_waited_for() {
    let (store, bank) = memory_bank();
    let memory = machine(2, 30_000);
    deposit(&bank, "vm7", &memory, Changes::HashAll);
    let host = Host::new(store);
    let here = host.connect(LONG);
    let entry = here.find("vm7").unwrap();
    let (file, withdrawal, killed) = (tempfile::tempfile().unwrap(), here.withdraw(&entry).unwrap(), Mutex::new(None));
    std::thread::scope(|scope| {
        let progress = |_| {
            let mut killed = killed.lock().unwrap();
            if killed.is_none() {
                host.kill();
                let host = &host;
                *killed = Some(Instant::now());
                scope.spawn(|| {
                    std::thread::sleep(Duration::from_millis(400));
                    host.restart();
                });
            }
        };
        withdrawal.section("memory", &file, &progress).unwrap();
    });
    assert!(killed.into_inner().unwrap().unwrap().elapsed() >= Duration::from_millis(400), "it ended before its server was away");
    assert!(common::contents(&file) == memory && host.links() >= 2);
    // The machine is pinned at the new server, of which it knew nothing.
    let there = open(host.store.clone()).patience(Duration::ZERO);
    assert_eq!(remove(&there, std::slice::from_ref(&entry)).unwrap().removed, Vec::<String>::new());
    drop(withdrawal);
    let until = Instant::now() + Duration::from_secs(10);
    while remove(&there, std::slice::from_ref(&entry)).unwrap().removed.is_empty() {
        assert!(Instant::now() < until, "a pin that was let go of stays");
    }
}

#[test]
fn a_machine_that_runs_on_memory_over_a_link_waits_for_its_server() {
    if let Err(error) = Uffd::supported() {
        eprintln!("memory over a link that is made anew: not run: {error}");
        return;
    }
    let (store, bank) = memory_bank();
    let memory = machine(3, 5000);
    deposit(&bank, "vm7", &memory, Changes::HashAll);
    let host = Host::new(store);
    let here = Arc::new(host.connect(LONG));
    let server = FaultServer::start(Cache::new(64 << 20)).unwrap();
    let lazy = server.withdraw(&here, &here.find("vm7").unwrap(), Backing::Anonymous, LazyOptions::default()).unwrap();
    let read = |page: usize| {
        let mut bytes = vec![0; PAGE];
        lazy.memory().unwrap().read((page * PAGE) as u64, &mut bytes).unwrap();
        bytes
    };
    let is_right = |page: usize| read(page) == memory[page * PAGE..(page + 1) * PAGE];
    assert!(is_right(4999));
    host.kill();
    let back = {
        let host = host.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(700));
            host.restart();
        })
    };
    let asked = Instant::now();
    assert!(is_right(17) && is_right(2500));
    assert!(asked.elapsed() > Duration::from_millis(500), "nobody served and a page came: {:?}", asked.elapsed());
    back.join().unwrap();
    assert!((0..5000).all(is_right));
    assert_eq!(lazy.report().poisoned, 0);
}

#[test]
fn who_waits_in_vain_for_a_server_hears_it_and_the_next_one_begins_anew() {
    let (store, bank) = memory_bank();
    deposit(&bank, "vm7", &machine(4, 300), Changes::HashAll);
    let host = Host::new(store);
    let here = host.connect(Duration::from_millis(200));
    host.kill();
    let asked = Instant::now();
    let error = here.listing().unwrap_err();
    assert!(matches!(&error, StoreError::Gone(why) if why.contains("nobody serves") && why.contains("200ms")), "{error}");
    assert!(asked.elapsed() < Duration::from_secs(10));
    host.restart();
    assert_eq!(here.listing().unwrap().0.len(), 1);
    // Another bank at the same place is not taken for it.
    host.kill();
    let other = MemoryStore::new();
    Bank::init(Box::new(other.clone()), Some(&[7; 32])).unwrap();
    *host.serving.lock().unwrap() = Some(Serving::new(Bank::open(Box::new(other), Some(&[7; 32])).unwrap()));
    let error = here.listing().unwrap_err();
    assert!(matches!(&error, StoreError::Refused(why) if why.contains("another bank")), "{error}");
}

#[test]
fn a_deposit_goes_on_between_two_objects_and_what_was_in_the_middle_of_one_says_so() {
    let (store, bank) = memory_bank();
    let mut memory = machine(5, 4500);
    deposit(&bank, "vm7", &memory, Changes::HashAll);
    let host = Host::new(store.clone());
    let here = host.connect(LONG);
    // Before a piece of anything was sent: nothing is lost.
    let dirty = work(&mut memory, 6, 300);
    let mut going = here.bank_deposit();
    host.kill();
    host.restart();
    here.listing().unwrap();
    going.section(SectionKind::Memory, "memory", &&memory[..], Changes::Bitmap(&dirty), &|_| {}).unwrap();
    let machine = going.commit().unwrap().machine;
    assert!(withdraw(&open(store.clone()), &machine, "memory").unwrap() == memory);
    // Links that are cut after any operation: each deposit is done, or is Gone and the next one is done.
    let (mut gone, mut done) = (0, 0);
    for cut in (4..60).step_by(4) {
        work(&mut memory, cut, 2000);
        host.cuts.lock().unwrap().push(cut);
        let here = host.connect(LONG);
        let tried = (|| {
            let mut going = here.deposit("vm7", &DepositOptions::default())?;
            going.section(SectionKind::Memory, "memory", &&memory[..], Changes::HashAll, &|_| {})?;
            going.commit()
        })();
        let report = match tried {
            Ok(report) => {
                done += 1;
                report
            }
            Err(DepositError::Store(StoreError::Gone(why))) => {
                assert!(why.contains("eposit again") || why.contains("begin again"), "{why}");
                gone += 1;
                deposit(&here, "vm7", &memory, Changes::HashAll)
            }
            Err(error) => panic!("cut at {cut}: {error}"),
        };
        assert!(withdraw(&here, &report.machine, "memory").unwrap() == memory, "cut at {cut}");
    }
    assert!(gone > 0 && done > 0, "{gone} were gone and {done} done");
    assert_eq!(verify(&open(store), &|_| {}).unwrap().faults, []);
}

#[test]
fn a_hold_that_cannot_be_taken_anew_ends_the_deposit_that_rests_on_it() {
    let (store, bank) = memory_bank();
    let memory = machine(7, 1500);
    deposit(&bank, "vm7", &memory, Changes::HashAll);
    let host = Host::new(store.clone());
    let here = host.connect(LONG).patience(Duration::from_millis(50));
    let mut going = here.bank_deposit();
    let guard = here.store().hold(Hold::Deposit, Duration::ZERO).unwrap();
    host.kill();
    // The old server lets go, and a sweep is quicker than the new one.
    let sweep = store.hold(Hold::Sweep, LONG).unwrap();
    host.restart();
    assert_eq!(here.listing().unwrap().0.len(), 1, "reading goes on");
    let ended = |error: &StoreError| matches!(error, StoreError::Gone(why) if why.contains("could not be taken anew"));
    assert!(guard.check().is_err_and(|error| ended(&error)));
    drop(sweep);
    let changed = machine(8, 1500);
    let section = going.section(SectionKind::Memory, "memory", &&changed[..], Changes::HashAll, &|_| {});
    assert!(matches!(&section, Err(DepositError::Store(error)) if ended(error)), "{section:?}");
    drop((going, guard));
    assert!(withdraw(&here, &deposit(&here, "vm7", &changed, Changes::HashAll).machine, "memory").unwrap() == changed);
    assert_eq!(store.list(Kind::Manifest).unwrap().len(), 2);
}

#[test]
fn pages_that_were_collected_while_nothing_was_held_are_missed_by_the_commit_and_brought_by_the_next_deposit() {
    let (store, bank) = memory_bank();
    let memory = machine(9, 1500);
    deposit(&bank, "vm7", &memory, Changes::HashAll);
    let host = Host::new(store.clone());
    let here = host.connect(LONG);
    let begin = || {
        let mut going = here.deposit("vm8", &DepositOptions::default()).unwrap();
        going.section(SectionKind::Memory, "memory", &&memory[..], Changes::HashAll, &|_| {}).unwrap();
        going
    };
    // Everything is in the bank already, and so it was told.
    let going = begin();
    host.kill();
    let there = open(store.clone()).patience(Duration::from_secs(20));
    remove(&there, &[there.find("vm7").unwrap()]).unwrap();
    assert!(sweep(&there, &SweepOptions::default()).unwrap().removed > 0);
    host.restart();
    // Who notices the end of a link in the middle of an object hears that instead.
    here.listing().unwrap();
    let refused = going.commit();
    let said = |why: &str| why.contains("Deposit again") && why.contains("not brought");
    assert!(matches!(&refused, Err(DepositError::Store(StoreError::Gone(why))) if said(why)), "{refused:?}");
    assert_eq!(there.listing().unwrap().0, []);
    begin().commit().unwrap();
    assert!(withdraw(&there, "vm8", "memory").unwrap() == memory);
    assert_eq!(verify(&there, &|_| {}).unwrap().faults, []);
}

trait Begin {
    fn bank_deposit(&self) -> farbus_machine_bank::Deposit<'_>;
}

impl Begin for Bank {
    fn bank_deposit(&self) -> farbus_machine_bank::Deposit<'_> {
        self.deposit("vm7", &DepositOptions::default()).unwrap()
    }
}
