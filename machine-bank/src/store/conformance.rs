//! What every store does, as one suite: `conformance::run(&|| store())` panics where one does not.
//!
//! A draft that is dropped leaves nothing, a second commit takes the place of the first, a sweep waits for deposits: each is a function here,
//! run for the directory and for memory by machine-bank/tests/stores.rs.
#![expect(clippy::expect_used, reason = "a panic is how a test fails")]

use std::time::{Duration, Instant};

use super::{Durability, Hold, Kind, Store, StoreError};
use crate::page::Root;

/// Makes an empty store.
pub type Make<'a> = &'a dyn Fn() -> Box<dyn Store>;

/// All of it.
pub fn run(make: Make<'_>) {
    what_is_committed_is_there_whole(&*make());
    what_is_not_committed_is_not_there(&*make());
    ranges_are_exact(&*make());
    a_later_commit_takes_the_place_of_an_earlier_one(&*make());
    what_is_removed_is_gone_and_kinds_do_not_mix(&*make());
    names_that_are_none_are_refused(&*make());
    deposits_go_together_and_a_sweep_goes_alone(&*make());
    a_pin_is_seen_until_it_is_dropped(&*make());
}

fn what_is_committed_is_there_whole(store: &dyn Store) {
    let mut draft = store.create(Kind::Pack).expect("it can be written");
    draft.append(b"one ").expect("it can be written");
    draft.append(b"two").expect("it can be written");
    draft.commit("a-pack", Durability::Durable).expect("it can be committed");
    store.sync(Kind::Pack).expect("it can be synced");
    assert_eq!(store.read_all(Kind::Pack, "a-pack", 7).expect("it is there"), b"one two");
    let listed = store.list(Kind::Pack).expect("it can be listed");
    assert_eq!(listed.iter().map(|object| (object.name.as_str(), object.len)).collect::<Vec<_>>(), [("a-pack", 7)]);
    assert!(listed[0].modified.elapsed().is_ok_and(|age| age < Duration::from_secs(600)), "{listed:?}");
    assert!(matches!(store.read_all(Kind::Pack, "a-pack", 6), Err(StoreError::TooLong { len: 7, .. })));
}

fn what_is_not_committed_is_not_there(store: &dyn Store) {
    let mut draft = store.create(Kind::Manifest).expect("it can be written");
    draft.append(&[1; 10_000]).expect("it can be written");
    assert!(store.list(Kind::Manifest).expect("it can be listed").is_empty(), "seen before it was committed");
    drop(draft);
    assert!(store.list(Kind::Manifest).expect("it can be listed").is_empty(), "seen after it was given up");
    assert_eq!(store.tidy().expect("it can be tidied"), 0, "a draft that was dropped left something");
}

fn ranges_are_exact(store: &dyn Store) {
    store.put(Kind::Pack, "p", &[0, 1, 2, 3, 4, 5], Durability::Durable).expect("it can be written");
    let mut buf = [9; 3];
    store.read(Kind::Pack, "p", 2, &mut buf).expect("it is there");
    assert_eq!(buf, [2, 3, 4]);
    store.read(Kind::Pack, "p", 6, &mut []).expect("nothing is there");
    for (offset, len) in [(4, 3), (6, 1), (7, 1), (u64::MAX, 2)] {
        let read = store.read(Kind::Pack, "p", offset, &mut vec![0; len]);
        assert!(read.is_err(), "{len} bytes from {offset} of 6 were read");
    }
    assert!(matches!(store.read(Kind::Pack, "q", 0, &mut buf), Err(StoreError::Missing { .. })));
    assert!(matches!(store.len(Kind::Pack, "q"), Err(StoreError::Missing { .. })));
    assert_eq!(store.len(Kind::Pack, "p").expect("it is there"), 6);
}

fn a_later_commit_takes_the_place_of_an_earlier_one(store: &dyn Store) {
    for bytes in [&b"first"[..], b"second one"] {
        store.put(Kind::Manifest, "m", bytes, Durability::Rebuildable).expect("it can be written");
    }
    assert_eq!(store.len(Kind::Manifest, "m").expect("it is there"), 10);
    assert_eq!(store.list(Kind::Manifest).expect("it can be listed").len(), 1);
}

fn what_is_removed_is_gone_and_kinds_do_not_mix(store: &dyn Store) {
    for kind in Kind::ALL {
        store.put(kind, "same", kind.to_string().as_bytes(), Durability::Durable).expect("it can be written");
    }
    store.remove(Kind::Pack, "same").expect("it can be removed");
    store.remove(Kind::Pack, "same").expect("it is removed already");
    for kind in Kind::ALL {
        let there = store.read_all(kind, "same", 100);
        if kind == Kind::Pack {
            assert!(matches!(there, Err(StoreError::Missing { .. })));
        } else {
            assert_eq!(there.expect("it is there"), kind.to_string().as_bytes());
        }
    }
}

fn names_that_are_none_are_refused(store: &dyn Store) {
    let long = "x".repeat(201);
    for name in ["", ".", "..", ".hidden", "a/b", "../packs/x", "a b", "ä", &long] {
        assert!(store.put(Kind::Pack, name, b"x", Durability::Durable).is_err(), "{name:?} was taken");
        assert!(store.read(Kind::Pack, name, 0, &mut [0]).is_err(), "{name:?} was read");
    }
    store.put(Kind::Pack, "A-z_0.9@1", b"x", Durability::Durable).expect("a name it is");
}

fn deposits_go_together_and_a_sweep_goes_alone(store: &dyn Store) {
    let now = Duration::ZERO;
    let first = store.hold(Hold::Deposit, now).expect("nobody else is there");
    let second = store.hold(Hold::Deposit, now).expect("deposits go together");
    let asked = Instant::now();
    assert!(matches!(store.hold(Hold::Sweep, Duration::from_millis(30)), Err(StoreError::Busy { .. })));
    assert!(asked.elapsed() >= Duration::from_millis(30), "it did not wait");
    let commit = store.hold(Hold::Commit, now).expect("nobody else commits");
    assert!(matches!(store.hold(Hold::Commit, now), Err(StoreError::Busy { .. })));
    drop((first, second, commit));
    let sweep = store.hold(Hold::Sweep, now).expect("nobody else is there");
    assert!(matches!(store.hold(Hold::Deposit, now), Err(StoreError::Busy { .. })));
    assert!(matches!(store.hold(Hold::Sweep, now), Err(StoreError::Busy { .. })));
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| store.hold(Hold::Deposit, Duration::from_secs(30)));
        std::thread::sleep(Duration::from_millis(20));
        drop(sweep);
        waits.join().expect("it does not panic").expect("the sweep has ended");
    });
}

fn a_pin_is_seen_until_it_is_dropped(store: &dyn Store) {
    let (one, two) = (Root([1; 32]), Root([2; 32]));
    let first = store.pin(one).expect("it can be pinned");
    let again = store.pin(one).expect("it can be pinned twice");
    let other = store.pin(two).expect("another can be pinned");
    let roots = || {
        let mut roots: Vec<_> = store.pins().expect("they can be listed").into_iter().map(|pin| pin.root).collect();
        roots.sort();
        roots
    };
    assert_eq!(roots(), [one, one, two]);
    drop((first, other));
    assert_eq!(roots(), [one]);
    drop(again);
    assert!(roots().is_empty());
}
