//! Many clients of one bank: what takes long for one keeps no other waiting, nobody has more than its share, and what is held by who forgot it ends.
//!
//! While the index is being merged for ann, on a store that does not answer for three seconds, bob withdraws a machine; ann is told that it works, and does not give up.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

#[path = "common/mod.rs"]
mod common;
#[path = "common/served.rs"]
mod served;

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use common::{deposit, machine, memory_bank, open, withdraw, work};
use farbus_machine_bank::deposit::DepositError;
use farbus_machine_bank::keep::verify;
use farbus_machine_bank::page::Root;
use farbus_machine_bank::remote::{RemoteStore, Rights, ServeOptions};
use farbus_machine_bank::store::{Draft, Guard, Hold, Kind, MemoryStore, Object, Pin, Store, StoreError};
use farbus_machine_bank::{Bank, Changes, DepositOptions, PAGE, SectionKind};
use farbus_transport::Nanos;
use farbus_transport::shm::{ShmFabric, ShmOptions};
use served::{Serving, rights};

/// A store whose index does not answer while the gate is shut.
#[derive(Clone, Debug)]
struct Gated {
    store: MemoryStore,
    gate: Arc<(Mutex<Gate>, Condvar)>,
}

#[derive(Debug, Default)]
struct Gate {
    shut: bool,
    waiting: usize,
}

impl Gated {
    fn pass(&self, kind: Kind) {
        if kind == Kind::Index {
            let mut gate = self.gate.0.lock().unwrap();
            gate.waiting += 1;
            self.gate.1.notify_all();
            while gate.shut {
                gate = self.gate.1.wait(gate).unwrap();
            }
            gate.waiting -= 1;
        }
    }

    fn shut(&self, shut: bool) {
        self.gate.0.lock().unwrap().shut = shut;
        self.gate.1.notify_all();
    }

    fn await_waiting(&self) {
        let gate = self.gate.0.lock().unwrap();
        let (gate, _) = self.gate.1.wait_timeout_while(gate, Duration::from_secs(30), |gate| gate.waiting == 0).unwrap();
        assert!(gate.waiting > 0, "nobody came to the index");
    }
}

impl Store for Gated {
    fn address(&self) -> String {
        self.store.address()
    }
    fn list(&self, kind: Kind) -> Result<Vec<Object>, StoreError> {
        self.pass(kind);
        self.store.list(kind)
    }
    fn read(&self, kind: Kind, name: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        self.store.read(kind, name, offset, buf)
    }
    fn len(&self, kind: Kind, name: &str) -> Result<u64, StoreError> {
        self.store.len(kind, name)
    }
    fn create(&self, kind: Kind) -> Result<Box<dyn Draft>, StoreError> {
        self.pass(kind);
        self.store.create(kind)
    }
    fn sync(&self, kind: Kind) -> Result<(), StoreError> {
        self.store.sync(kind)
    }
    fn remove(&self, kind: Kind, name: &str) -> Result<(), StoreError> {
        self.store.remove(kind, name)
    }
    fn hold(&self, hold: Hold, wait: Duration) -> Result<Box<dyn Guard>, StoreError> {
        self.store.hold(hold, wait)
    }
    fn pin(&self, root: Root) -> Result<Box<dyn Guard>, StoreError> {
        self.store.pin(root)
    }
    fn pins(&self) -> Result<Vec<Pin>, StoreError> {
        self.store.pins()
    }
    fn tidy(&self) -> Result<u64, StoreError> {
        self.store.tidy()
    }
}

/// A link whose client gives up after this long without a word.
fn impatient(serving: &Serving, name: &str, rights: Rights, limit: Duration) -> Bank {
    let (lender, borrower) = ShmFabric::pair(ShmOptions::default()).unwrap();
    drop(serving.serve(lender, name, rights, Nanos::now));
    serving.bank(RemoteStore::connect_within(borrower, "shm:test", Nanos::now, limit).unwrap())
}

#[test]
fn while_an_index_is_merged_or_read_for_one_the_others_go_on_and_that_one_is_told() {
    let (store, bank) = memory_bank();
    let memory = machine(1, 3000);
    deposit(&bank, "vm7", &memory, Changes::HashAll);
    let gated = Gated { store: store.clone(), gate: Arc::default() };
    let word = Duration::from_millis(100);
    let serving = Serving::with(open(gated.clone()), ServeOptions { word, ..ServeOptions::default() });
    let bob = serving.connect("bob", Rights::all());
    let second = machine(2, 3000);
    let goes_on = || {
        let asked = Instant::now();
        assert!(withdraw(&bob, "vm7", "memory").unwrap() == memory);
        assert!(asked.elapsed() < Duration::from_secs(20));
    };
    // At the end of a deposit, whose pages become a run.
    let ann = impatient(&serving, "ann", Rights::all(), Duration::from_millis(800));
    let mut going = ann.deposit("vm8", &DepositOptions::default()).unwrap();
    going.section(SectionKind::Memory, "memory", &&second[..], Changes::HashAll, &|_| {}).unwrap();
    gated.shut(true);
    std::thread::scope(|scope| {
        let committed = scope.spawn(|| going.commit());
        gated.await_waiting();
        goes_on();
        std::thread::sleep(Duration::from_secs(2));
        assert!(!committed.is_finished(), "nothing was waited for");
        gated.shut(false);
        assert_eq!(committed.join().unwrap().unwrap().machine, "vm8@1");
    });
    // At the beginning of one, for which the index is read; and what somebody else brings meanwhile is not forgotten.
    let mut third = bob.deposit("vm9", &DepositOptions::default()).unwrap();
    gated.shut(true);
    std::thread::scope(|scope| {
        let begun = scope.spawn(|| ann.deposit("vm8", &DepositOptions::default()).map(drop));
        gated.await_waiting();
        goes_on();
        third.section(SectionKind::Memory, "memory", &&machine(3, 9000)[..], Changes::HashAll, &|_| {}).unwrap();
        std::thread::sleep(Duration::from_secs(2));
        assert!(!begun.is_finished(), "nothing was waited for");
        gated.shut(false);
        begun.join().unwrap().unwrap();
    });
    third.commit().unwrap();
    assert!(withdraw(&bob, "vm9", "memory").unwrap() == machine(3, 9000));
    // The twin: a client that is told nothing gives up.
    let serving = Serving::with(open(gated.clone()), ServeOptions { word: Duration::from_secs(60), ..ServeOptions::default() });
    let ann = impatient(&serving, "ann", Rights::all(), Duration::from_millis(800));
    gated.shut(true);
    let begun = ann.deposit("vm8", &DepositOptions::default()).map(drop);
    assert!(matches!(&begun, Err(DepositError::Store(StoreError::Gone(why))) if why.contains("has not answered")), "{begun:?}");
    gated.shut(false);
    assert_eq!(verify(&open(store), &|_| {}).unwrap().faults, []);
}

#[test]
fn what_somebody_else_deposited_is_found_at_once() {
    let (store, bank) = memory_bank();
    deposit(&bank, "vm7", &machine(4, 100), Changes::HashAll);
    let serving = Serving::new(bank);
    let here = serving.connect("ann", Rights::all());
    for seed in 5..9 {
        // By another process, within the second after the server has looked.
        let memory = machine(seed, 300);
        deposit(&open(store.clone()), "vm7", &memory, Changes::HashAll);
        assert!(withdraw(&here, "vm7", "memory").unwrap() == memory);
    }
}

#[test]
fn what_is_remembered_of_a_limited_client_is_bounded_and_what_is_beyond_it_is_sent_again() {
    let mut report = Vec::new();
    for known in [1 << 20, 50] {
        let (store, bank) = memory_bank();
        let (mut web, db) = (machine(10, 1500), machine(11, 1500));
        deposit(&bank, "web", &web, Changes::HashAll);
        deposit(&bank, "db", &db, Changes::HashAll);
        let serving = Serving::with(bank, ServeOptions { known, ..ServeOptions::default() });
        let limited = || rights(&["web*"], &["web*"]);
        let ann = serving.connect("ann", limited());
        // What it may read under another name: known, as far as is remembered.
        let copied = deposit(&ann, "web-2", &web, Changes::HashAll);
        assert!(withdraw(&ann, "web-2", "memory").unwrap() == web);
        report.push(copied.counts.new);
        // By position, in a new session: it names what it was never asked about, and may.
        let again = serving.connect("ann", limited());
        let dirty = work(&mut web, 12, 20);
        deposit(&again, "web", &web, Changes::Bitmap(&dirty));
        assert!(withdraw(&again, "web", "memory").unwrap() == web);
        // What only others have is sent, and then it is its own.
        let brought = deposit(&again, "web-db", &db, Changes::HashAll);
        assert!(brought.counts.new > 300, "{brought:?}");
        assert!(withdraw(&again, "web-db", "memory").unwrap() == db);
        // And still it may not name what it neither read nor brought.
        let stranger = serving.connect("eve", rights(&["eve"], &["eve*"]));
        let entry = open(store.clone()).find("db").unwrap();
        let bytes = store.read_all(Kind::Manifest, &entry.object(), 1 << 20).unwrap();
        let hold = stranger.store().hold(Hold::Deposit, Duration::ZERO).unwrap();
        let mut draft = stranger.store().create(Kind::Manifest).unwrap();
        draft.append(&bytes).unwrap();
        let named = draft.commit_deposit(farbus_machine_bank::Entry { machine: "eve".to_owned(), number: 0, ..entry });
        assert!(matches!(named, Err(StoreError::Refused(_))), "{named:?}");
        drop(hold);
        assert_eq!(verify(&open(store), &|_| {}).unwrap().faults, []);
    }
    assert!(report[0] == 0 && report[1] > 500, "new pages with much and with little that is remembered: {report:?}");
}

#[test]
fn a_hold_that_its_client_neither_uses_nor_renews_ends_and_a_living_one_renews_it() {
    let (store, bank) = memory_bank();
    let memory = machine(13, 200);
    deposit(&bank, "vm7", &memory, Changes::HashAll);
    let serving = Serving::with(bank, ServeOptions { hold: Duration::from_secs(2), ..ServeOptions::default() });
    // One that renews each 300 ms, and one that would each 20 s.
    let living = impatient(&serving, "ann", Rights::all(), Duration::from_millis(900));
    let asleep = impatient(&serving, "bob", Rights::all(), Duration::from_secs(300));
    let sweep = || store.hold(Hold::Sweep, Duration::ZERO);
    let mut kept = living.deposit("vm8", &DepositOptions::default()).unwrap();
    std::thread::sleep(Duration::from_secs(5));
    assert!(matches!(sweep(), Err(StoreError::Busy { .. })), "a hold that was renewed ended");
    kept.section(SectionKind::Memory, "memory", &&memory[..], Changes::HashAll, &|_| {}).unwrap();
    kept.commit().unwrap();
    let mut lapsing = asleep.deposit("vm9", &DepositOptions::default()).unwrap();
    let pin = asleep.pin(&asleep.find("vm7").unwrap()).unwrap();
    assert!(sweep().is_err() && store.pins().unwrap().len() == 1);
    let until = Instant::now() + Duration::from_secs(20);
    while sweep().is_err() || !store.pins().unwrap().is_empty() {
        assert!(Instant::now() < until, "a hold that nobody renews stays");
        std::thread::sleep(Duration::from_millis(50));
    }
    let changed = machine(14, 200);
    let section = lapsing.section(SectionKind::Memory, "memory", &&changed[..], Changes::HashAll, &|_| {});
    let refused = |error: &DepositError| matches!(error, DepositError::Store(StoreError::Refused(why)) if why.contains("for 2s: deposit again"));
    assert!(section.as_ref().is_err_and(refused), "{section:?}");
    drop((lapsing, pin));
    deposit(&asleep, "vm9", &changed, Changes::HashAll);
}

#[test]
fn a_client_has_its_share_over_all_its_links_and_others_have_theirs() {
    let (_, bank) = memory_bank();
    deposit(&bank, "vm7", &machine(15, 100), Changes::HashAll);
    let serving = Serving::with(bank, ServeOptions { holds: 2, pins: 3, staged: 4 << 20, ..ServeOptions::default() });
    let links: Vec<_> = (0..3).map(|_| serving.connect("ann", Rights::all())).collect();
    let other = serving.connect("bob", Rights::all());
    let full = |error: &StoreError, text: &str| matches!(error, StoreError::Full(why) if why.to_string().contains(text));
    let hold = |bank: &Bank| bank.store().hold(Hold::Deposit, Duration::ZERO);
    let mut holds = vec![hold(&links[0]).unwrap(), hold(&links[1]).unwrap()];
    assert!(hold(&links[2]).is_err_and(|error| full(&error, "2 deposits")));
    let theirs = hold(&other).unwrap();
    holds.pop();
    holds.push(hold(&links[2]).unwrap());
    let entry = other.find("vm7").unwrap();
    let mut pins: Vec<_> = links.iter().map(|bank| bank.pin(&entry).unwrap()).collect();
    assert!(links[0].pin(&entry).is_err_and(|error| full(&error, "3 withdrawals")));
    assert!(other.pin(&entry).is_ok());
    pins.pop();
    assert!(links[0].pin(&entry).is_ok());
    // Bytes that are yet to be checked, of two links together.
    let stage = |bank: &Bank| {
        let mut draft = bank.store().create(Kind::Pack).unwrap();
        let sent = draft.append(&vec![1; 3 << 20]).and_then(|()| bank.store().service().unwrap().have(&[]).map(drop));
        // Half a pack is not yet known to have arrived: a question behind it is answered behind it.
        (draft, sent.and_then(|()| bank.listing().map(drop)))
    };
    let (first, sent) = stage(&links[0]);
    sent.unwrap();
    let mut second = links[2].store().create(Kind::Pack).unwrap();
    let sent = (0..12).try_for_each(|_| second.append(&vec![2; 1 << 20]));
    assert!(sent.as_ref().is_err_and(|error| full(error, "4194304 bytes")), "{sent:?}");
    let (_, sent) = stage(&other);
    sent.unwrap();
    drop((first, second, theirs, holds, pins));
    let memory = machine(16, PAGE / 4);
    deposit(&links[2], "vm8", &memory, Changes::HashAll);
    assert!(withdraw(&other, "vm8", "memory").unwrap() == memory);
}
