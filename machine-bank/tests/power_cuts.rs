//! A power cut between any two things that a bank does to its store: whatever of the unsynced is lost, the machines that are seen are whole.
//!
//! A deposit, a removal and a sweep are recorded as "pack 9f… committed", "packs synced", "manifest vm@2 committed" and so on. For each prefix the store is made as
//! a power cut could leave it, and verified. The twins swap two steps, and verification must find that.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

mod common;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{deposit, machine, open, work};
use farbus_machine_bank::keep::{SweepOptions, remove, sweep, verify};
use farbus_machine_bank::store::{Draft, Durability, Guard, Hold, Kind, MemoryStore, Object, Pin, Store, StoreError};
use farbus_machine_bank::{Bank, Changes, Root};

/// Something that was done to a store.
#[derive(Clone, Debug)]
enum Step {
    Commit(Kind, String, Arc<Vec<u8>>, Durability),
    Remove(Kind, String),
    Sync(Kind),
}

/// A store in memory that writes down what is done to it.
#[derive(Clone, Debug, Default)]
struct Recorder {
    store: MemoryStore,
    steps: Arc<Mutex<Vec<Step>>>,
}

impl Recorder {
    fn record(&self, step: Step) {
        self.steps.lock().unwrap().push(step);
    }

    fn steps(&self) -> Vec<Step> {
        self.steps.lock().unwrap().clone()
    }
}

impl Store for Recorder {
    fn address(&self) -> String {
        self.store.address()
    }
    fn list(&self, kind: Kind) -> Result<Vec<Object>, StoreError> {
        self.store.list(kind)
    }
    fn read(&self, kind: Kind, name: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        self.store.read(kind, name, offset, buf)
    }
    fn len(&self, kind: Kind, name: &str) -> Result<u64, StoreError> {
        self.store.len(kind, name)
    }
    fn create(&self, kind: Kind) -> Result<Box<dyn Draft>, StoreError> {
        Ok(Box::new(Recorded { recorder: self.clone(), kind, bytes: Vec::new() }))
    }
    fn sync(&self, kind: Kind) -> Result<(), StoreError> {
        self.record(Step::Sync(kind));
        self.store.sync(kind)
    }
    fn remove(&self, kind: Kind, name: &str) -> Result<(), StoreError> {
        self.record(Step::Remove(kind, name.to_owned()));
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

#[derive(Debug)]
struct Recorded {
    recorder: Recorder,
    kind: Kind,
    bytes: Vec<u8>,
}

impl Draft for Recorded {
    fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }
    fn commit(self: Box<Self>, name: &str, durability: Durability) -> Result<(), StoreError> {
        self.recorder.record(Step::Commit(self.kind, name.to_owned(), Arc::new(self.bytes.clone()), durability));
        self.recorder.store.put(self.kind, name, &self.bytes, durability)
    }
}

/// What becomes of what was not synced.
#[derive(Clone, Copy, Debug)]
enum Unsynced {
    /// All of it is there.
    Stays,
    /// None of it was done.
    Lost,
    /// Removals were done, commits were not.
    OnlyRemovals,
    /// The last was done if it is a removal, and nothing else: a file system promises no order.
    OnlyLast,
}

/// The store after `steps` and a power cut. What need not be durable is torn.
fn after(steps: &[Step], unsynced: Unsynced) -> MemoryStore {
    let store = MemoryStore::new();
    for (at, step) in steps.iter().enumerate() {
        let synced = |kind: &Kind| steps[at..].iter().any(|later| matches!(later, Step::Sync(synced) if synced == kind));
        match step {
            Step::Commit(kind, name, bytes, Durability::Rebuildable) => {
                store.put(*kind, name, &bytes[..bytes.len() / 2], Durability::Rebuildable).unwrap();
            }
            Step::Commit(kind, name, bytes, Durability::Durable) if synced(kind) || matches!(unsynced, Unsynced::Stays) => {
                store.put(*kind, name, bytes, Durability::Durable).unwrap();
            }
            Step::Remove(kind, name) => {
                let done = match unsynced {
                    Unsynced::Lost => false,
                    Unsynced::Stays | Unsynced::OnlyRemovals => true,
                    Unsynced::OnlyLast => at + 1 == steps.len(),
                };
                if done || synced(kind) {
                    store.remove(*kind, name).unwrap();
                }
            }
            Step::Commit(..) | Step::Sync(_) => {}
        }
    }
    store
}

/// How many ways of being cut leave a machine that is not whole, and how many there are.
fn broken(steps: &[Step], from: usize) -> (usize, usize) {
    let (mut broken, mut cuts) = (0, 0);
    for end in from..=steps.len() {
        for unsynced in [Unsynced::Stays, Unsynced::Lost, Unsynced::OnlyRemovals, Unsynced::OnlyLast] {
            let report = verify(&open(after(&steps[..end], unsynced)), &|_| {}).unwrap();
            broken += usize::from(!report.faults.is_empty());
            cuts += 1;
        }
    }
    (broken, cuts)
}

/// A bank that was made, and everything that is done to it afterwards.
fn bank() -> (Recorder, Bank, usize) {
    let recorder = Recorder::default();
    let bank = Bank::init(Box::new(recorder.clone()), None).unwrap();
    let made = recorder.steps().len();
    (recorder, bank, made)
}

fn deposits(bank: &Bank, count: u64) {
    let mut memory = machine(5, 400);
    for n in 0..count {
        deposit(bank, "vm", &memory, Changes::HashAll);
        work(&mut memory, n, 200);
    }
}

fn find(steps: &[Step], from: usize, wanted: impl Fn(&Step) -> bool) -> usize {
    from + steps[from..].iter().position(wanted).unwrap()
}

#[test]
fn a_power_cut_at_any_instant_of_deposits_leaves_whole_machines() {
    let (recorder, bank, made) = bank();
    deposits(&bank, 3);
    let steps = recorder.steps();
    let (wrong, cuts) = broken(&steps, made);
    assert!(wrong == 0 && cuts > 30, "{wrong} of {cuts}");
}

#[test]
fn a_manifest_before_its_packs_is_found() {
    let (recorder, bank, made) = bank();
    deposits(&bank, 2);
    let mut steps = recorder.steps();
    let pack = find(&steps, made, |step| matches!(step, Step::Commit(Kind::Pack, ..)));
    let manifest = find(&steps, made, |step| matches!(step, Step::Commit(Kind::Manifest, ..)));
    let step = steps.remove(manifest);
    steps.insert(pack, step);
    assert!(broken(&steps, made).0 > 0);
}

#[test]
fn a_manifest_whose_packs_are_not_synced_is_found() {
    let (recorder, bank, made) = bank();
    deposits(&bank, 2);
    let mut steps = recorder.steps();
    steps.retain(|step| !matches!(step, Step::Sync(Kind::Pack)));
    assert!(broken(&steps, made).0 > 0);
}

fn swept() -> (Vec<Step>, usize) {
    let (recorder, bank, _) = bank();
    deposits(&bank, 3);
    let from = recorder.steps().len();
    remove(&bank, &[bank.find("vm@1").unwrap(), bank.find("vm@2").unwrap()]).unwrap();
    let report = sweep(&bank, &SweepOptions { repack_below: 100, ..SweepOptions::default() }).unwrap();
    assert!(report.removed > 0 && report.moved > 0, "{report:?}");
    (recorder.steps(), from)
}

#[test]
fn a_power_cut_at_any_instant_of_a_removal_and_a_sweep_leaves_whole_machines() {
    let (steps, from) = swept();
    let (wrong, cuts) = broken(&steps, from);
    assert!(wrong == 0 && cuts > 30, "{wrong} of {cuts}");
}

#[test]
fn a_pack_that_is_removed_before_its_pages_are_elsewhere_is_found() {
    let (mut steps, from) = swept();
    let put = find(&steps, from, |step| matches!(step, Step::Commit(Kind::Pack, ..)));
    let removed = find(&steps, from, |step| matches!(step, Step::Remove(Kind::Pack, _)));
    assert!(put < removed);
    let step = steps.remove(removed);
    steps.insert(put, step);
    assert!(broken(&steps, from).0 > 0);
}

#[test]
fn a_base_that_is_removed_before_what_rests_on_it_is_written_anew_is_found() {
    let (mut steps, from) = swept();
    let rewritten = find(&steps, from, |step| matches!(step, Step::Commit(Kind::Manifest, ..)));
    let removed = find(&steps, from, |step| matches!(step, Step::Remove(Kind::Manifest, _)));
    assert!(rewritten < removed);
    let step = steps.remove(removed);
    steps.insert(rewritten, step);
    assert!(broken(&steps, from).0 > 0);
}

#[test]
fn a_machine_that_rests_on_another_goes_before_it() {
    let (steps, from) = swept();
    let order: Vec<_> = steps[from..]
        .iter()
        .filter_map(|step| match step {
            Step::Remove(Kind::Manifest, name) => Some(name.split('@').nth(1).unwrap().to_owned()),
            _ => None,
        })
        .collect();
    assert_eq!(order, ["00000002", "00000001"]);
}
