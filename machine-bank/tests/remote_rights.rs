//! Who may have what of a bank that is served: a client lists, fetches and deposits what its patterns say, and learns nothing of anything else.
//!
//! Ann's `web` and Bob's `db` share some pages; Ann's questions about the others of Bob's are answered as if they were not there.

#[path = "common/mod.rs"]
mod common;
#[path = "common/served.rs"]
mod served;

use common::{deposit, machine, memory_bank, open, withdraw, work};
use farbus_machine_bank::bank::FindError;
use farbus_machine_bank::deposit::{DepositError, Parent};
use farbus_machine_bank::keep::{copy, stats, verify};
use farbus_machine_bank::manifest::ManifestError;
use farbus_machine_bank::pack::{GROUP, GroupDecoder};
use farbus_machine_bank::page::KEY;
use farbus_machine_bank::remote::{Fetched, Rights};
use farbus_machine_bank::store::{Hold, Kind, Store, StoreError};
use farbus_machine_bank::{Bank, BankError, Changes, DepositOptions, PAGE, SectionKind};
use served::{Serving, rights};

/// Ann's and Bob's machines, of which the first half is the same.
fn two_owners() -> (farbus_machine_bank::store::MemoryStore, Serving, Vec<u8>, Vec<u8>) {
    let (store, bank) = memory_bank();
    let (web, mut db) = (machine(1, 2000), machine(2, 2000));
    db[..1000 * PAGE].copy_from_slice(&web[..1000 * PAGE]);
    deposit(&bank, "web", &web, Changes::HashAll);
    deposit(&bank, "db", &db, Changes::HashAll);
    (store, Serving::new(bank), web, db)
}

#[test]
fn a_client_sees_its_own_machines_and_has_never_heard_of_others() {
    let (store, serving, web, _) = two_owners();
    let ann = serving.connect("ann", rights(&["web*"], &["web*"]));
    let names: Vec<_> = ann.listing().unwrap().0.iter().map(ToString::to_string).collect();
    assert_eq!(names, ["web@1"]);
    assert!(withdraw(&ann, "web", "memory").unwrap() == web);
    assert!(matches!(ann.find("db"), Err(FindError::None(_))));
    // Even with the root, which is no secret, there is no such machine.
    let db = open(store).find("db").unwrap();
    let service = ann.store().service().unwrap();
    let gone = |result: Result<(), StoreError>| assert!(matches!(result, Err(StoreError::Missing { .. })), "{result:?}");
    gone(service.head(&db.root).map(drop));
    gone(service.leaf(&db.root, 0, 0).map(drop));
    gone(service.fetch(&db.root, 0, 0, &[1500], &mut Vec::new(), &mut |_| panic!("a page of others")));
    gone(ann.store().pin(db.root).map(drop));
    assert!(matches!(ann.manifest(&db), Err(ManifestError::Store(StoreError::Missing { .. }))));
    // How much there is in all is told to who may read all.
    assert!(matches!(stats(&ann), Err(StoreError::Refused(_))));
    assert!(stats(&serving.connect("root", Rights::all())).is_ok());
    // What only the bank's host does.
    assert!(matches!(ann.store().hold(Hold::Sweep, std::time::Duration::ZERO), Err(StoreError::Refused(_))));
    assert!(matches!(ann.store().remove(Kind::Manifest, "web@1"), Err(StoreError::Refused(_))));
    assert!(matches!(ann.store().read(Kind::Pack, "x", 0, &mut [0]), Err(StoreError::Refused(_))));
}

#[test]
fn a_page_that_two_machines_share_is_sent_without_its_neighbours() {
    let (_, bank) = memory_bank();
    let db = machine(5, 64);
    deposit(&bank, "db", &db, Changes::HashAll);
    // One page of each four is the same, so that each lies in a group of `db`.
    let mut web = machine(6, 64);
    (0..64).step_by(4).for_each(|page| web[page * PAGE..][..PAGE].copy_from_slice(&db[page * PAGE..][..PAGE]));
    deposit(&bank, "web", &web, Changes::HashAll);
    let serving = Serving::new(bank);
    let sent = |client: &Bank| {
        let entry = client.find("web").unwrap();
        let ids = client.manifest(&entry).unwrap().leaf(client.store(), client.identity(), 0, 0).unwrap();
        let wanted: Vec<u16> = (0..64).filter(|page| !ids[usize::from(*page)].is_zero()).collect();
        let (mut decoder, mut out, mut pages) = (GroupDecoder::new().unwrap(), Box::new([0; GROUP]), Vec::new());
        let service = client.store().service().unwrap();
        let take = &mut |fetched: Fetched<'_>| match fetched {
            Fetched::Missing(page) => panic!("page {page} is missing"),
            Fetched::Group(group, _) => {
                let len = decoder.decode(group, &mut out).unwrap();
                pages.extend(out[..len].as_chunks::<PAGE>().0.iter().copied());
            }
        };
        service.fetch(&entry.root, 0, 0, &wanted, &mut Vec::new(), take).unwrap();
        pages
    };
    let known = |page: &[u8; PAGE]| web.as_chunks::<PAGE>().0.contains(page);
    let ann = serving.connect("ann", rights(&["web"], &[]));
    assert!(sent(&ann).iter().all(known), "a page of nobody's but db was sent");
    assert!(withdraw(&ann, "web", "memory").unwrap() == web);
    // The twin: who may read everything gets groups as they are stored, with others' pages in them.
    assert!(!sent(&serving.connect("root", Rights::all())).iter().all(known), "no group has pages of both");
}

#[test]
fn have_and_want_say_nothing_of_pages_that_only_others_have() {
    let (_, serving, web, db) = two_owners();
    let ann = serving.connect("ann", rights(&["web*"], &["web*"]));
    let id = |bytes: &[u8], page: usize| ann.identity().page(&bytes[page * PAGE..(page + 1) * PAGE]);
    let stored = |bytes: &[u8], range: std::ops::Range<usize>| {
        range.map(|page| id(bytes, page)).filter(|id| !id.is_zero()).collect::<Vec<_>>()
    };
    let service = ann.store().service().unwrap();
    assert!(matches!(service.have(&stored(&web, 0..1)), Err(StoreError::Refused(_))), "only while it deposits");
    let _hold = ann.store().hold(Hold::Deposit, std::time::Duration::ZERO).unwrap();
    assert!(service.have(&stored(&web, 0..2000)).unwrap().into_iter().all(|have| have), "its own");
    assert!(!service.have(&stored(&db, 1000..2000)).unwrap().into_iter().any(|have| have), "others'");
    // Who may read all of it is told.
    let root = serving.connect("root", Rights::all());
    let _hold = root.store().hold(Hold::Deposit, std::time::Duration::ZERO).unwrap();
    assert!(root.store().service().unwrap().have(&stored(&db, 1000..2000)).unwrap().into_iter().all(|have| have));
}

#[test]
fn a_manifest_that_names_pages_or_machines_of_others_is_refused() {
    let (store, serving, web, db) = two_owners();
    let here = open(store.clone());
    let ann = serving.connect("ann", rights(&["web*"], &["web*"]));
    // A copy of Bob's machine's manifest under a name of Ann's would be a way to its pages: all pages "are there already".
    let (_, forged) = memory_bank();
    deposit(&forged, "web", &db, Changes::HashAll);
    let entry = forged.find("web").unwrap();
    let bytes = open_store(&forged).read_all(Kind::Manifest, &entry.object(), 1 << 20).unwrap();
    let refused = |bytes: &[u8], entry: farbus_machine_bank::Entry| {
        let _hold = ann.store().hold(Hold::Deposit, std::time::Duration::ZERO).unwrap();
        let mut draft = ann.store().create(Kind::Manifest).unwrap();
        draft.append(bytes).unwrap();
        draft.commit_deposit(farbus_machine_bank::Entry { number: 0, ..entry })
    };
    let result = refused(&bytes, entry.clone());
    assert!(matches!(&result, Err(StoreError::Refused(why)) if why.contains("not brought")), "{result:?}");
    // One that rests on Bob's, in which every leaf is as there.
    let (other_store, other) = memory_bank();
    copy(&here, &other, &here.find("db").unwrap(), &|_| {}).unwrap();
    let options = DepositOptions { parent: Parent::Named("db".to_owned()) };
    let mut based = other.deposit("web", &options).unwrap();
    based.section(SectionKind::Memory, "memory", &&db[..], Changes::HashAll, &|_| {}).unwrap();
    based.commit().unwrap();
    let entry = other.find("web").unwrap();
    let bytes = farbus_machine_bank::store::Store::read_all(&other_store, Kind::Manifest, &entry.object(), 1 << 20).unwrap();
    let result = refused(&bytes, entry);
    assert!(matches!(&result, Err(StoreError::Refused(why)) if why.contains("which is missing")), "{result:?}");
    // And none under a name that is not hers.
    let mut draft = ann.deposit("db", &DepositOptions::default()).unwrap();
    draft.section(SectionKind::Memory, "memory", &&web[..], Changes::HashAll, &|_| {}).unwrap();
    assert!(matches!(draft.commit(), Err(DepositError::Store(StoreError::Refused(_)))));
    assert_eq!(here.listing().unwrap().0.len(), 2);
    assert_eq!(verify(&here, &|_| {}).unwrap().faults, []);
}

fn open_store(bank: &Bank) -> &dyn farbus_machine_bank::store::Store {
    bank.store()
}

#[test]
fn what_only_others_have_is_brought_again_and_then_known() {
    let (store, serving, _, db) = two_owners();
    let ann = serving.connect("ann", rights(&["web*"], &["web*"]));
    let report = deposit(&ann, "web-db", &db, Changes::HashAll);
    let zero = db.chunks_exact(PAGE).filter(|page| page.iter().all(|byte| *byte == 0)).count() as u64;
    assert!(report.counts.new > 500 && report.counts.content + report.counts.new + zero == 2000, "{report:?}");
    assert!(withdraw(&ann, "web-db", "memory").unwrap() == db);
    assert!(withdraw(&open(store.clone()), "web-db", "memory").unwrap() == db);
    // A second one in a new session brings nothing.
    let again = serving.connect("ann", rights(&["web*"], &["web*"]));
    let report = deposit(&again, "web-2", &db, Changes::HashAll);
    assert_eq!(report.counts.new, 0, "{report:?}");
    assert_eq!(verify(&open(store), &|_| {}).unwrap().faults, []);
}

#[test]
fn a_deposit_of_a_limited_client_that_died_is_resumed_by_the_next() {
    let (_, serving, web, db) = two_owners();
    let limited = || rights(&["web*"], &["web*"]);
    {
        let ann = serving.connect("ann", limited());
        let mut deposit = ann.deposit("web-db", &DepositOptions::default()).unwrap();
        deposit.section(SectionKind::Memory, "memory", &&db[..], Changes::HashAll, &|_| {}).unwrap();
        // Its packs of less than 8 MiB are put by the commit, which does not come: so one is put as a full one would be.
        drop(deposit);
        let mut half = ann.deposit("web-half", &DepositOptions::default()).unwrap();
        half.section(SectionKind::Memory, "memory", &&db[..1500 * PAGE], Changes::HashAll, &|_| {}).unwrap();
        half.commit().unwrap();
    }
    let ann = serving.connect("ann", limited());
    let report = deposit(&ann, "web-db", &db, Changes::HashAll);
    assert!(report.counts.content > 200 && report.counts.new < 600, "{report:?}");
    assert!(withdraw(&ann, "web-db", "memory").unwrap() == db && withdraw(&ann, "web", "memory").unwrap() == web);
}

#[test]
fn a_client_without_a_right_to_deposit_deposits_nothing() {
    let (_, serving, web, _) = two_owners();
    let reader = serving.connect("eve", rights(&["*"], &[]));
    let refused = reader.deposit("web", &DepositOptions::default());
    assert!(matches!(refused, Err(DepositError::Store(StoreError::Refused(_)))));
    assert!(withdraw(&reader, "web", "memory").unwrap() == web);
}

#[test]
fn a_keyed_bank_is_used_by_who_has_its_key() {
    let store = farbus_machine_bank::store::MemoryStore::new();
    let bank = Bank::init(Box::new(store), Some(&[7; KEY])).unwrap();
    let mut serving = Serving::new(bank);
    serving.key = Some([7; KEY]);
    let (here, mut memory) = (serving.connect("ann", Rights::all()), machine(3, 1000));
    deposit(&here, "vm7", &memory, Changes::HashAll);
    let dirty = work(&mut memory, 4, 30);
    deposit(&here, "vm7", &memory, Changes::Bitmap(&dirty));
    assert!(withdraw(&here, "vm7", "memory").unwrap() == memory);
    let (fabric, ended) = serving.raw("ann", Rights::all());
    let stranger = farbus_machine_bank::remote::RemoteStore::connect(fabric, "shm:test", farbus_transport::Nanos::now).unwrap();
    assert!(matches!(Bank::open(Box::new(stranger), None), Err(BankError::KeyNeeded)));
    assert_eq!(served::reason(&ended), "the other side closed the link");
}

#[test]
fn a_sealed_bank_is_served_to_who_has_its_key() {
    let store = farbus_machine_bank::store::MemoryStore::new();
    let mut serving = Serving::new(Bank::init_sealed(Box::new(store.clone()), &[7; KEY]).unwrap());
    serving.key = Some([7; KEY]);
    let (all, some) = (serving.connect("root", Rights::all()), serving.connect("ann", rights(&["vm*"], &["vm*"])));
    let memory = machine(8, 500);
    deposit(&some, "vm7", &memory, Changes::HashAll);
    assert!(withdraw(&all, "vm7", "memory").unwrap() == memory && withdraw(&some, "vm7", "memory").unwrap() == memory);
    // What lies there is sealed.
    let page = memory.chunks(PAGE).find(|page| page.starts_with(b"0") || page[0] != 0).unwrap();
    for object in store.list(Kind::Pack).unwrap() {
        let bytes = store.read_all(Kind::Pack, &object.name, 1 << 26).unwrap();
        assert!(!bytes.windows(64).any(|window| window == &page[..64]));
    }
}

#[test]
fn a_strict_deposit_is_overtaken_and_a_free_one_is_the_next() {
    let (_, serving, mut web, _) = two_owners();
    let ann = serving.connect("ann", Rights::all());
    let mut first = ann.deposit("web", &DepositOptions::default()).unwrap();
    web[0] ^= 1;
    first.section(SectionKind::Memory, "memory", &&web[..], Changes::HashAll, &|_| {}).unwrap();
    assert_eq!(deposit(&ann, "web", &web, Changes::HashAll).machine, "web@2");
    assert!(matches!(first.commit_onto_parent(), Err(DepositError::Overtaken(_))));
    assert_eq!(deposit(&ann, "web", &web, Changes::HashAll).machine, "web@3");
}
