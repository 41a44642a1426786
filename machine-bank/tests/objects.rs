//! Banks in object stores: the crate's own back-ends, and a service that speaks S3 and is not ours.
//!
//! A deposit over a connection that is cut at 3 MiB leaves no object; one whose process falls asleep for longer than its lease commits nothing afterwards.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

mod common;
#[path = "common/life.rs"]
mod life;
#[path = "common/s3.rs"]
mod s3;

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{deposit, machine, withdraw};
use farbus_machine_bank::store::object::{LeaseTimes, ObjectOptions};
use farbus_machine_bank::store::{Durability, Hold, Kind, ObjectStore, Store, StoreError, conformance};
use farbus_machine_bank::{Bank, Changes};
use life::a_whole_life;
use object_store::memory::InMemory;
use s3::{Mood, Service, quick};

fn memory() -> (Arc<InMemory>, ObjectStore) {
    let client = Arc::new(InMemory::new());
    (client.clone(), ObjectStore::over(client, "a/b", "memory".to_owned(), quick()).unwrap())
}

#[test]
fn an_object_store_in_memory_is_a_store() {
    conformance::run(&|| Box::new(memory().1));
}

#[test]
fn an_object_store_in_a_directory_is_a_store() {
    let (folders, count) = (tempfile::tempdir().unwrap(), Cell::new(0));
    conformance::run(&|| {
        count.set(count.get() + 1);
        Box::new(ObjectStore::local(&folders.path().join(count.get().to_string()), true, quick()).unwrap())
    });
}

#[test]
fn a_bucket_is_a_store() {
    let (service, count) = (Service::start(), Cell::new(0));
    conformance::run(&|| {
        count.set(count.get() + 1);
        Box::new(service.store(&format!("here/{}", count.get())))
    });
}

#[test]
fn a_bank_lives_in_a_bucket() {
    let service = Service::start();
    a_whole_life(&|| Box::new(service.store("life")), None);
}

#[test]
fn a_bank_lives_in_a_directory_of_objects_and_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    a_whole_life(&|| Box::new(ObjectStore::local(folder.path(), false, quick()).unwrap()), None);
    let client = Arc::new(InMemory::new());
    a_whole_life(&|| Box::new(ObjectStore::over(client.clone(), "", "memory".to_owned(), quick()).unwrap()), None);
}

#[test]
fn a_large_object_goes_in_parts_and_is_seen_when_the_last_is_there() {
    let service = Service::start();
    let store = service.patient("large");
    let bytes: Vec<u8> = (0..40_u32 << 18).flat_map(|word| word.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    let mut draft = store.create(Kind::Index).unwrap();
    bytes.chunks(3 << 20).for_each(|chunk| draft.append(chunk).unwrap());
    assert!(store.list(Kind::Index).unwrap().is_empty());
    draft.commit("run", Durability::Durable).unwrap();
    assert_eq!(store.len(Kind::Index, "run").unwrap(), bytes.len() as u64);
    assert!(store.read_all(Kind::Index, "run", 1 << 30).unwrap() == bytes);
}

#[test]
fn an_upload_that_is_cut_leaves_no_object_and_the_store_works_afterwards() {
    let service = Service::start();
    let store = service.patient("cut");
    // One request, and one of several parts.
    for (len, most) in [(8 << 20, 3 << 20), (40 << 20, 30 << 20)] {
        let bytes = vec![7; len];
        service.wire.be(Mood::Cut(most));
        let error = store.put(Kind::Pack, "p", &bytes, Durability::Durable).unwrap_err();
        assert!(matches!(error, StoreError::Unreachable { .. }), "{error}");
        service.wire.be(Mood::Fine);
        assert!(store.list(Kind::Pack).unwrap().is_empty(), "seen though it was cut");
        assert!(matches!(store.len(Kind::Pack, "p"), Err(StoreError::Missing { .. })));
        store.put(Kind::Pack, "p", &bytes, Durability::Durable).unwrap();
        store.remove(Kind::Pack, "p").unwrap();
    }
}

#[test]
fn a_service_that_is_gone_or_silent_is_told_in_time_and_works_when_it_is_back() {
    let service = Service::start();
    let bank = Bank::init(Box::new(service.store("gone")), None).unwrap();
    let memory = machine(1, 300);
    deposit(&bank, "vm", &memory, Changes::HashAll);
    for mood in [Mood::Gone, Mood::Silent, Mood::Says(503, "Service Unavailable")] {
        service.wire.be(mood);
        let asked = Instant::now();
        let error = bank.listing().unwrap_err();
        assert!(matches!(error, StoreError::Unreachable { .. }), "{mood:?}: {error}");
        assert!(asked.elapsed() < Duration::from_secs(6), "{mood:?}: {:?}", asked.elapsed());
        let error = bank.store().put(Kind::Pack, "p", b"x", Durability::Durable).unwrap_err();
        assert!(matches!(error, StoreError::Unreachable { .. }), "{mood:?}: {error}");
        service.wire.be(Mood::Fine);
        assert!(withdraw(&bank, "vm", "memory").unwrap() == memory, "after {mood:?}");
    }
}

#[test]
fn a_request_that_was_repeated_because_its_answer_got_lost_does_not_take_itself_for_another() {
    let service = Service::start();
    let store = service.store("repeated");
    let forgets = || {
        service.wire.be(Mood::Gone);
        service.wire.be(Mood::Forgets);
    };
    for hold in [Hold::Deposit, Hold::Commit] {
        forgets();
        drop(store.hold(hold, Duration::ZERO).unwrap_or_else(|error| panic!("{hold:?}: {error}")));
    }
    forgets();
    let pin = store.pin(farbus_machine_bank::page::Root([1; 32])).unwrap();
    assert_eq!(store.pins().unwrap().len(), 1);
    drop(pin);
    forgets();
    assert!(store.reserve("vm7@00000001").unwrap(), "its own number is somebody else's");
    // The twin: one that is there already is not its own, also where the answer to that gets lost.
    assert!(!store.reserve("vm7@00000001").unwrap());
    forgets();
    assert!(!service.store("repeated").reserve("vm7@00000001").unwrap());
}

#[test]
fn a_service_that_is_full_or_lets_nobody_write_says_so() {
    let service = Service::start();
    let store = service.store("full");
    service.wire.be(Mood::Says(507, "Insufficient Storage"));
    let error = store.put(Kind::Pack, "p", b"x", Durability::Durable).unwrap_err();
    assert!(matches!(error, StoreError::Full(_)), "{error}");
    service.wire.be(Mood::Says(403, "Forbidden"));
    let error = store.put(Kind::Pack, "p", b"x", Durability::Durable).unwrap_err();
    assert!(matches!(error, StoreError::ReadOnly(_)), "{error}");
    assert!(matches!(store.pin(farbus_machine_bank::page::Root([1; 32])), Err(StoreError::ReadOnly(_))));
    let error = store.list(Kind::Pack).unwrap_err();
    assert!(matches!(&error, StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied), "{error}");
    service.wire.be(Mood::Fine);
    store.put(Kind::Pack, "p", b"x", Durability::Durable).unwrap();
    let stranger = service
        .environment()
        .into_iter()
        .map(|(name, value)| if name == "AWS_SECRET_ACCESS_KEY" { (name, "guessed".to_owned()) } else { (name, value) });
    let stranger = ObjectStore::s3("bank", "full", stranger, quick()).unwrap();
    assert!(stranger.len(Kind::Pack, "p").is_err() && stranger.put(Kind::Pack, "q", b"x", Durability::Durable).is_err());
    assert_eq!(store.list(Kind::Pack).unwrap().len(), 1);
}

#[test]
fn http_that_nobody_allowed_is_refused() {
    let environment = [("AWS_ENDPOINT_URL".to_owned(), "http://127.0.0.1:1".to_owned())];
    let error = ObjectStore::s3("bank", "", environment, quick()).unwrap_err().to_string();
    assert!(error.contains("AWS_ALLOW_HTTP"), "{error}");
}

/// Many threads, each with a store of its own as if it were a process, take a hold and count how many are inside.
fn exclusion(open: &(dyn Fn() -> ObjectStore + Sync), rounds: usize) {
    let (deposits, sweeps, most) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (deposits, sweeps, most) = (&deposits, &sweeps, &most);
            scope.spawn(move || {
                let store = open();
                for round in 0..rounds {
                    let sweep = (thread + round) % 2 == 0;
                    let hold = if sweep { Hold::Sweep } else { Hold::Deposit };
                    let guard = match store.hold(hold, Duration::from_secs(20)) {
                        Ok(guard) => guard,
                        Err(StoreError::Busy { .. }) => continue,
                        Err(error) => panic!("{error}"),
                    };
                    let count = if sweep { sweeps } else { deposits };
                    most.fetch_max(count.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    for _ in 0..20 {
                        let (deposits, sweeps) = (deposits.load(Ordering::SeqCst), sweeps.load(Ordering::SeqCst));
                        assert!(sweeps <= 1 && (sweeps == 0 || deposits == 0), "{sweeps} sweeps and {deposits} deposits at once");
                        std::thread::sleep(Duration::from_micros(500));
                    }
                    count.fetch_sub(1, Ordering::SeqCst);
                    drop(guard);
                }
            });
        }
    });
    assert!(most.load(Ordering::SeqCst) > 0, "nobody was ever inside");
}

#[test]
fn a_sweep_is_never_beside_another_or_beside_a_deposit() {
    let client = Arc::new(InMemory::new());
    exclusion(&|| ObjectStore::over(client.clone(), "", "memory".to_owned(), quick()).unwrap(), 30);
    let service = Service::start();
    exclusion(&|| service.store("exclusion"), 6);
}

#[test]
fn a_number_is_given_to_one_of_many_who_ask_at_once() {
    let client = Arc::new(InMemory::new());
    for round in 0..20 {
        let won = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let store = ObjectStore::over(client.clone(), "", "memory".to_owned(), quick()).unwrap();
                    won.fetch_add(usize::from(store.reserve(&format!("vm@{round:08}")).unwrap()), Ordering::SeqCst);
                });
            }
        });
        assert_eq!(won.load(Ordering::SeqCst), 1);
    }
}

#[test]
fn a_number_whose_deposit_died_is_left_out_and_tidied() {
    let client = Arc::new(InMemory::new());
    let open = || ObjectStore::over(client.clone(), "", "memory".to_owned(), quick()).unwrap();
    let bank = Bank::init(Box::new(open()), None).unwrap();
    assert!(open().reserve("vm@00000001").unwrap() && !open().reserve("vm@00000001").unwrap());
    assert_eq!(deposit(&bank, "vm", &machine(1, 20), Changes::HashAll).machine, "vm@2");
    open().tidy().unwrap();
    // As nobody asks for them any more.
    assert!(open().reserve("vm@00000001").unwrap() && open().reserve("vm@00000002").unwrap());
}

#[test]
fn the_lease_of_a_dead_process_ends_by_itself_and_that_of_a_living_one_does_not() {
    let (client, _) = memory();
    let open = |times: LeaseTimes| {
        let options = ObjectOptions { lease: times, ..quick() };
        ObjectStore::over(client.clone(), "", "memory".to_owned(), options).unwrap()
    };
    let [life, lapse, renew] = [300, 200, 50].map(Duration::from_millis);
    let store = open(LeaseTimes { life, lapse, renew });
    let living = store.hold(Hold::Deposit, Duration::ZERO).unwrap();
    std::thread::sleep(Duration::from_secs(3));
    assert!(matches!(store.hold(Hold::Sweep, Duration::ZERO), Err(StoreError::Busy { .. })), "it was written anew meanwhile");
    drop(living);
    // What is never written anew is as if its process had died.
    let dead = open(LeaseTimes { life, lapse, renew: Duration::from_secs(3600) });
    let (hold, pin) =
        (dead.hold(Hold::Deposit, Duration::ZERO).unwrap(), dead.pin(farbus_machine_bank::page::Root([3; 32])).unwrap());
    assert!(matches!(store.hold(Hold::Sweep, Duration::ZERO), Err(StoreError::Busy { .. })));
    assert_eq!(store.pins().unwrap().len(), 1);
    store.hold(Hold::Sweep, Duration::from_secs(5)).unwrap();
    assert!(store.pins().unwrap().is_empty());
    // It knows that itself.
    let error = dead.put(Kind::Manifest, "m", b"x", Durability::Durable).unwrap_err();
    assert!(matches!(error, StoreError::Lapsed { .. }), "{error}");
    assert!(matches!(dead.remove(Kind::Pack, "p"), Err(StoreError::Lapsed { .. })));
    assert!(matches!(dead.reserve("vm@1"), Err(StoreError::Lapsed { .. })));
    assert!(store.list(Kind::Manifest).unwrap().is_empty());
    drop((hold, pin));
    dead.put(Kind::Manifest, "m", b"x", Durability::Durable).unwrap();
}

#[test]
fn two_that_make_a_bank_at_one_place_are_told_of_each_other() {
    let (_, store) = memory();
    store.put(Kind::Config, "bank", b"one", Durability::Durable).unwrap();
    let error = store.put(Kind::Config, "bank", b"two", Durability::Durable).unwrap_err();
    assert!(matches!(&error, StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::AlreadyExists), "{error}");
    assert_eq!(store.read_all(Kind::Config, "bank", 10).unwrap(), b"one");
}

#[test]
fn files_that_a_dead_process_left_half_written_are_tidied() {
    let folder = tempfile::tempdir().unwrap();
    let store = ObjectStore::local(folder.path(), false, quick()).unwrap();
    store.put(Kind::Pack, "p", b"whole", Durability::Durable).unwrap();
    std::fs::write(folder.path().join("packs/q#1"), [0; 77]).unwrap();
    assert_eq!(store.list(Kind::Pack).unwrap().len(), 1);
    assert_eq!(store.tidy().unwrap(), 77);
    assert_eq!(store.read_all(Kind::Pack, "p", 10).unwrap(), b"whole");
}
