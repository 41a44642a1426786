//! Lazy withdrawal: what is read is what was deposited, however it comes; what cannot be had is never read as something else.
//!
//! A machine of 3,000 pages is read page by page from memory of which nothing is there, from copies and from a view of the cache; its second
//! withdrawal finds its working set there, and a page that is damaged in the store ends whoever reads it by SIGBUS.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;
#[path = "common/lazily.rs"]
mod lazily;

use std::os::unix::process::ExitStatusExt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{deposit, machine, withdraw, work};
use farbus_machine_bank::lazy::{Backing, Cache, Failure, FaultServer, LazyMachine, LazyOptions, Patience, WorkingSet};
use farbus_machine_bank::store::{Kind, Store};
use farbus_machine_bank::{Bank, Changes, PAGE};
use lazily::{banked, page, permitted};

const GROUP: u64 = 64 << 10;
const SOON: Duration = Duration::from_secs(60);

fn lazy(server: &FaultServer, bank: &Arc<Bank>, backing: Backing, options: LazyOptions) -> LazyMachine {
    server.withdraw(bank, &bank.find("vm").unwrap(), backing, options).unwrap()
}

fn server(bytes: u64) -> FaultServer {
    FaultServer::start(Cache::new(bytes)).unwrap()
}

fn all(machine: &LazyMachine) -> Vec<u8> {
    let mut bytes = vec![0; machine.memory().unwrap().len() as usize];
    machine.memory().unwrap().read(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn every_byte_is_what_was_deposited_in_any_kind_of_memory() {
    if !permitted("every byte") {
        return;
    }
    let bytes = machine(1, 3000);
    let (_, bank) = banked(&bytes);
    for backing in [Backing::Anonymous, Backing::Shared, Backing::View] {
        let server = server(64 << 20);
        let lazy = lazy(&server, &bank, backing, LazyOptions::default());
        assert_eq!(lazy.report().copied + lazy.report().mapped + lazy.report().zero, 0, "something is there already");
        // Backwards, so that no read-ahead of anybody's helps.
        for at in (0..3000).rev() {
            assert!(page(&lazy, at) == bytes[at * PAGE..][..PAGE], "{backing:?}, page {at}");
        }
        let report = lazy.report();
        assert_eq!(report.copied + report.mapped + report.zero, 3000, "{report:?}");
        assert_eq!(report.mapped > 0, backing == Backing::View, "{report:?}");
        assert_eq!((report.poisoned, report.stray, report.retries), (0, 0, 0), "{report:?}");
        // What is written stays, whatever comes later.
        lazy.memory().unwrap().write(7 * PAGE as u64, b"written by the guest").unwrap();
        assert!(page(&lazy, 7).starts_with(b"written by the guest"));
        assert!(withdraw(&bank, "vm", "memory").unwrap() == bytes, "the bank has changed");
    }
}

#[test]
fn a_page_written_before_its_group_came_keeps_what_was_written() {
    if !permitted("written first") {
        return;
    }
    let bytes = machine(2, 400);
    let (_, bank) = banked(&bytes);
    for backing in [Backing::Anonymous, Backing::View] {
        let server = server(64 << 20);
        let lazy = lazy(&server, &bank, backing, LazyOptions { rest: true, ..LazyOptions::default() });
        for at in (0..400).step_by(7) {
            lazy.memory().unwrap().write((at * PAGE) as u64, &[0xee; 10]).unwrap();
        }
        assert!(lazy.wait_whole(SOON), "{:?}", lazy.report());
        let mut expected = bytes.clone();
        (0..400).step_by(7).for_each(|at| expected[at * PAGE..][..10].fill(0xee));
        assert!(all(&lazy) == expected, "{backing:?}");
    }
}

#[test]
fn the_rest_comes_unasked_and_then_nothing_faults() {
    if !permitted("the rest") {
        return;
    }
    let bytes = machine(3, 2000);
    let (_, bank) = banked(&bytes);
    let server = server(1 << 20);
    let lazy = lazy(&server, &bank, Backing::Anonymous, LazyOptions { rest: true, ..LazyOptions::default() });
    assert!(lazy.wait_whole(SOON), "{:?}", lazy.report());
    let before = lazy.report();
    assert!(all(&lazy) == bytes);
    assert_eq!((lazy.report().faults, before.copied + before.zero), (before.faults, 2000));
    assert!(server.cache().groups() <= 16, "a cache of 1 MiB has {} groups", server.cache().groups());
}

#[test]
fn the_recorded_working_set_removes_the_faults_of_the_second_withdrawal() {
    if !permitted("working set") {
        return;
    }
    let mut bytes = machine(4, 16 * 400);
    let (_, bank) = banked(&bytes);
    // Some 120 of 400 groups, in an order of their own.
    let touched: Vec<u64> = (0..120).map(|n| n * 7919 % 400).collect();
    let run = |lazy: &LazyMachine| {
        for group in &touched {
            page(lazy, (*group * 16 + group % 16) as usize);
        }
        lazy.report().faults
    };
    let first = lazy(&server(64 << 20), &bank, Backing::Anonymous, LazyOptions::default());
    let without = run(&first);
    assert!(without >= 120, "{without}");
    let set = first.working_set();
    assert_eq!(set.groups.len(), 120);
    assert_eq!(set.groups, touched, "the order of the first touches");
    let entry = bank.find("vm").unwrap();
    let kept = set.keep(&bank, &entry, "memory").unwrap();
    assert!(kept.machine == "vm@2" && kept.manifest_bytes < 1000 && kept.counts.new == 1, "{kept:?}");
    let withdrawal = bank.withdraw(&bank.find("vm").unwrap()).unwrap();
    assert_eq!(WorkingSet::of(&bank, &withdrawal, "memory").unwrap(), Some(set.clone()));
    assert!(withdraw(&bank, "vm@2", "memory").unwrap() == bytes);

    let second = lazy(&server(64 << 20), &bank, Backing::Anonymous, LazyOptions::default());
    assert!(second.wait_ahead(SOON));
    let with = run(&second);
    eprintln!("working set: {without} faults without it, {with} with it");
    assert!(with * 20 <= without, "{without} faults without, {with} with the working set");
    // The twin that must not pass: without the prefetch all faults are back.
    let third = lazy(&server(64 << 20), &bank, Backing::Anonymous, LazyOptions { prefetch: false, ..LazyOptions::default() });
    assert!(run(&third) >= 120);

    // A machine that was deposited since is not put back to what it was.
    work(&mut bytes, 9, 3);
    deposit(&bank, "vm", &bytes, Changes::HashAll);
    let refused = set.keep(&bank, &entry, "memory").unwrap_err().to_string();
    assert!(refused.contains("is not the last deposit"), "{refused}");
    assert!(withdraw(&bank, "vm", "memory").unwrap() == bytes);
}

/// Physical page numbers behind an address, where this user may see them.
fn frame(address: u64) -> Option<u64> {
    use std::os::unix::fs::FileExt;
    let mut entry = [0; 8];
    std::fs::File::open("/proc/self/pagemap").ok()?.read_exact_at(&mut entry, address / PAGE as u64 * 8).ok()?;
    let frame = u64::from_le_bytes(entry) & ((1 << 55) - 1);
    (frame != 0).then_some(frame)
}

#[test]
fn machines_of_one_image_share_pages_and_do_not_see_each_others_writes() {
    if !permitted("sharing") {
        return;
    }
    let bytes = machine(5, 1600);
    let (_, bank) = banked(&bytes);
    let server = server(64 << 20);
    let [a, b] = [0, 1].map(|_| lazy(&server, &bank, Backing::View, LazyOptions::default()));
    assert!(all(&a) == bytes && all(&b) == bytes);
    for machine in [&a, &b] {
        let report = machine.report();
        assert_eq!((report.copied, report.mapped + report.zero), (0, 1600), "{report:?}");
    }
    assert_eq!(b.report().hits, b.report().faults, "what the first had fetched was fetched again: {:?}", b.report());
    let at = (0..1600).find(|at| bytes[at * PAGE] != 0).unwrap();
    let frames = |offset: usize| [&a, &b].map(|machine| frame(machine.area().unwrap().address() + (offset * PAGE) as u64));
    match frames(at) {
        [Some(one), Some(other)] => assert_eq!(one, other, "two frames for one page"),
        _ => eprintln!("sharing: frames not seen: pagemap does not show them to this user; counts are held instead"),
    }
    a.memory().unwrap().write((at * PAGE) as u64, b"only in a").unwrap();
    assert!(page(&a, at).starts_with(b"only in a"));
    assert!(page(&b, at) == bytes[at * PAGE..][..PAGE], "b sees what a wrote");
    if let [Some(one), Some(other)] = frames(at) {
        assert_ne!(one, other);
    }
    let c = lazy(&server, &bank, Backing::View, LazyOptions::default());
    assert!(all(&c) == bytes, "what a wrote went into the cache");
}

#[test]
fn a_cache_that_is_too_small_takes_pages_away_and_gives_the_same_again() {
    if !permitted("small cache") {
        return;
    }
    let bytes = machine(6, 800);
    let (_, bank) = banked(&bytes);
    let server = server(5 * GROUP);
    let [a, b] = [0, 1].map(|_| lazy(&server, &bank, Backing::View, LazyOptions::default()));
    a.memory().unwrap().write(3 * PAGE as u64, b"mine").unwrap();
    for _ in 0..2 {
        let mut seen = all(&a);
        assert!(seen[3 * PAGE..].starts_with(b"mine"), "a written page went with the cache's");
        seen[3 * PAGE..][..4].copy_from_slice(&bytes[3 * PAGE..][..4]);
        assert!(seen == bytes && all(&b) == bytes);
    }
    assert!(server.cache().groups() <= 5 && server.cache().evicted() > 20, "{}", server.cache().evicted());
}

/// The pages that cannot be had.
fn pages_of(failure: &Failure) -> std::ops::Range<usize> {
    failure.offset as usize / PAGE..(failure.offset + failure.len) as usize / PAGE
}

const CHILD: &str = "FARBUS_TEST_READS_A_DAMAGED_PAGE";

/// Reads all pages but those that are damaged, and then, to die of it, one that is.
fn damaged_reader() {
    let bytes = machine(8, 160);
    let (store, bank) = banked(&bytes);
    // Random pages are stored as they are in raw groups or within zstd's literals: a flip damages one group of the pack.
    let pack = &store.list(Kind::Pack).unwrap()[0];
    assert!(store.flip(Kind::Pack, &pack.name, pack.len as usize / 2, 3));
    let failures = Arc::new(Mutex::new(Vec::new()));
    let told = failures.clone();
    let options = LazyOptions {
        patience: Patience { tries: 2, pause: Duration::from_millis(1), ..Patience::default() },
        rest: true,
        on_failure: Arc::new(move |failure| told.lock().unwrap().push(failure.clone())),
        ..LazyOptions::default()
    };
    let server = server(64 << 20);
    let lazy = lazy(&server, &bank, Backing::Anonymous, options);
    assert!(lazy.wait_whole(SOON));
    let bad: Vec<usize> = failures.lock().unwrap().iter().flat_map(pages_of).collect();
    assert!(!bad.is_empty() && bad.len() <= 16, "{bad:?}");
    for at in (0..160).filter(|at| !bad.contains(at)) {
        assert!(page(&lazy, at) == bytes[at * PAGE..][..PAGE], "page {at}");
    }
    assert_eq!(lazy.report().poisoned, bad.len() as u64);
    eprintln!("{} damaged pages of 160, the others are right", bad.len());
    page(&lazy, bad[0]);
    eprintln!("a damaged page was read");
}

#[test]
fn reading_a_page_that_is_damaged_in_the_store_is_a_sigbus_and_the_others_are_right() {
    if !permitted("damaged page") {
        return;
    }
    if std::env::var_os(CHILD).is_some() {
        damaged_reader();
        return;
    }
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "reading_a_page_that_is_damaged_in_the_store_is_a_sigbus_and_the_others_are_right", "--nocapture"]);
    let output = child.env(CHILD, "1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("the others are right") && !said.contains("a damaged page was read"), "{said}");
    assert_eq!(output.status.signal(), Some(7), "{:?}: {said}", output.status);
}

#[test]
fn a_machine_whose_store_hangs_holds_up_nobody_else() {
    if !permitted("hanging store") {
        return;
    }
    let bytes = machine(9, 800);
    let (store, bank) = banked(&bytes);
    let (_, other) = banked(&machine(10, 800));
    let server = server(64 << 20);
    let stuck = lazy(&server, &bank, Backing::Anonymous, LazyOptions::default());
    let free = lazy(&server, &other, Backing::Anonymous, LazyOptions::default());
    page(&stuck, 0);
    store.slow_down(Duration::from_secs(3));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| page(&stuck, 500));
        std::thread::sleep(Duration::from_millis(20));
        let start = Instant::now();
        assert!(all(&free) == machine(10, 800));
        assert!(!reader.is_finished(), "the other machine was not stuck at all");
        eprintln!("hanging store: the other machine was read in {:?}", start.elapsed());
        store.heal();
        assert!(reader.join().unwrap() == bytes[500 * PAGE..][..PAGE]);
    });
}
