//! Clients that say anything: they are refused or ended, nobody else notices, and the bank stays whole.
//!
//! A client that sends a page under another's name is told so, one that floods is ended, and the machines of others come out as they went in.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "common/mod.rs"]
mod common;
#[path = "common/raw.rs"]
mod raw;
#[path = "common/served.rs"]
mod served;

use std::time::{Duration, Instant};

use common::{deposit, machine, memory_bank, open, withdraw};
use farbus_machine_bank::keep::verify;
use farbus_machine_bank::pack::{GroupEncoder, PackBuilder};
use farbus_machine_bank::page::Identity;
use farbus_machine_bank::reader::ReadError;
use farbus_machine_bank::remote::wire::{BODY, Carried, LANES, ToServer, VERSION};
use farbus_machine_bank::remote::{Rights, ServeOptions};
use farbus_machine_bank::store::{Durability, Hold, Kind, Store, StoreError};
use farbus_machine_bank::withdraw::WithdrawError;
use farbus_machine_bank::{Bank, Changes, Entry, PAGE, PageId};
use raw::Raw;
use served::{Serving, reason};

fn served(options: ServeOptions) -> (farbus_machine_bank::store::MemoryStore, Serving, Vec<u8>) {
    let (store, bank) = memory_bank();
    let memory = machine(1, 3000);
    deposit(&bank, "vm7", &memory, Changes::HashAll);
    (store, Serving::with(bank, options), memory)
}

#[test]
fn a_client_that_breaks_the_protocol_is_ended_and_nobody_else_notices() {
    let (_, serving, memory) = served(ServeOptions::default());
    let other = serving.connect("ann", Rights::all());
    let after_hello: [&[&[u8]]; 7] = [
        &[b"anything"],
        &[&[]],
        &[&ToServer::Hello { version: VERSION, grant: (0, 0) }.encode()],
        // A body that is longer than a lane.
        &[&{
            let mut long = Raw::request(6, 0, Carried::Lane(BODY as u32));
            long[8..12].copy_from_slice(&(BODY as u32 + 1).to_le_bytes());
            long
        }],
        // A lane that there is not.
        &[&[2, 2, LANES as u8, 1, 0, 0, 0, 0, 0, 0, 0, 0]],
        // Two requests in one lane: the first one's body is on its way.
        &[&Raw::request(6, 3, Carried::Lane(BODY as u32)), &Raw::request(6, 3, Carried::Lane(BODY as u32))],
        &[&[0xff; 56]],
    ];
    for messages in after_hello {
        let (fabric, ended) = serving.raw("eve", Rights::all());
        let mut eve = Raw::new(fabric, LANES * BODY);
        eve.hello();
        messages.iter().for_each(|message| assert!(eve.say(message)));
        // The two requests are allowed where the first is answered in between.
        if messages.len() == 1 {
            let why = reason(&ended);
            assert!(why.contains("breaks the protocol"), "{why}");
            while eve.hear().is_some() {}
        }
        assert!(withdraw(&other, "vm7", "memory").unwrap() == memory);
    }
    // Without hello, of another version, and with an area that is too small.
    for (len, version, hello) in [(LANES * BODY, VERSION, false), (LANES * BODY, VERSION + 1, true), (PAGE, VERSION, true)] {
        let (fabric, ended) = serving.raw("eve", Rights::all());
        let mut eve = Raw::new(fabric, len);
        let grant = eve.grant();
        eve.say(&if hello { ToServer::Hello { version, grant }.encode() } else { Raw::request(2, 0, Carried::Inline(Vec::new())) });
        let why = reason(&ended);
        assert!(why.contains("breaks the protocol"), "{why}");
    }
    assert!(withdraw(&other, "vm7", "memory").unwrap() == memory);
}

#[test]
fn a_client_that_stalls_or_floods_is_ended_and_others_are_served_meanwhile() {
    let options = ServeOptions { silence: Duration::from_millis(500), ..ServeOptions::default() };
    let (_, serving, memory) = served(options);
    // One says hello and nothing more, with a request of which the body never matters; one asks and takes no answer.
    let (fabric, silent_ended) = serving.raw("silent", Rights::all());
    let mut silent = Raw::new(fabric, LANES * BODY);
    silent.hello();
    let (fabric, deaf_ended) = serving.raw("deaf", Rights::all());
    let mut deaf = Raw::new(fabric, LANES * BODY);
    deaf.hello();
    let flood = std::thread::spawn(move || {
        let until = Instant::now() + Duration::from_secs(5);
        // In lanes one after the other, so that the protocol is kept; no answer is taken.
        for lane in (0..LANES as u8).cycle().take_while(|_| Instant::now() < until) {
            if !deaf.say(&Raw::request(2, lane, Carried::Inline(Vec::new()))) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
    let started = Instant::now();
    let other = serving.connect("ann", Rights::all());
    assert!(withdraw(&other, "vm7", "memory").unwrap() == memory);
    assert!(started.elapsed() < Duration::from_secs(20), "others wait for nobody");
    let why = reason(&silent_ended);
    assert!(why.contains("said nothing"), "{why}");
    let why = reason(&deaf_ended);
    assert!(why.contains("takes nothing") || why.contains("two requests"), "{why}");
    flood.join().unwrap();
    // Its hold goes with a client that is gone: what it does not say it does not need.
    assert!(open_again(&serving).listing().unwrap().last("vm7").is_some());
}

fn open_again(serving: &Serving) -> Bank {
    serving.connect("ann", Rights::all())
}

/// A pack of one group of these pages, under these names.
fn pack(pages: &[u8], ids: &[PageId]) -> farbus_machine_bank::pack::Sealed {
    let mut builder = PackBuilder::default();
    builder.push(GroupEncoder::new().unwrap().encode(pages), ids);
    builder.seal()
}

#[test]
fn packs_and_manifests_that_are_not_what_they_say_are_refused() {
    let (store, serving, memory) = served(ServeOptions { staged: 32 << 20, ..ServeOptions::default() });
    let client = serving.connect("eve", Rights::all());
    let put = |name: &str, bytes: &[u8]| client.store().put(Kind::Pack, name, bytes, Durability::Durable);
    let (good, identity) = (vec![7; 2 * PAGE], Identity::plain());
    let ids = [identity.page(&good[..PAGE]), identity.page(&[8; PAGE])];
    let refused = |result: Result<(), StoreError>| assert!(matches!(&result, Err(StoreError::Refused(_))), "{result:?}");
    let one = pack(&good[..PAGE], &ids[..1]);
    refused(put(&one.id.name(), &one.bytes));
    // From here on a deposit is under way, so that it is not that.
    let hold = client.store().hold(Hold::Deposit, Duration::ZERO).unwrap();
    let wrong_name = pack(&good, &ids);
    refused(put(&wrong_name.id.name(), &wrong_name.bytes));
    let zero = pack(&[0; PAGE], &[PageId::ZERO]);
    refused(put(&zero.id.name(), &zero.bytes));
    let fewer = pack(&good[..PAGE], &ids);
    refused(put(&fewer.id.name(), &fewer.bytes));
    refused(put(&wrong_name.id.name(), &one.bytes));
    refused(put(&one.id.name(), &one.bytes[..one.bytes.len() - 1]));
    refused(put(&one.id.name(), &vec![0; 20 << 20]));
    let mut damaged = one.bytes.clone();
    damaged[12] ^= 1;
    refused(put(&one.id.name(), &damaged));
    // More than it may have sent before it is checked.
    let mut draft = client.store().create(Kind::Manifest).unwrap();
    let long = vec![1; 40 << 20];
    let sent = draft.append(&long).and_then(|()| draft.commit_deposit(entry(&client, "vm8")));
    assert!(matches!(&sent, Err(StoreError::Full(why)) if why.to_string().contains("33554432 bytes")), "{sent:?}");
    // Manifests: garbage, of another root, of another machine, and one that names pages that are nowhere.
    let (_, elsewhere) = memory_bank();
    deposit(&elsewhere, "vm8", &machine(99, 500), Changes::HashAll);
    let there = elsewhere.find("vm8").unwrap();
    let bytes = elsewhere.store().read_all(Kind::Manifest, &there.object(), 1 << 20).unwrap();
    let commit = |bytes: &[u8], entry: Entry| {
        let mut draft = client.store().create(Kind::Manifest).unwrap();
        draft.append(bytes).unwrap();
        draft.commit_deposit(entry).map(drop)
    };
    refused(commit(&bytes, there.clone()));
    refused(commit(&[5; 4000], there.clone()));
    refused(commit(&bytes[..bytes.len() - 1], there.clone()));
    refused(commit(&bytes, Entry { machine: "vm9".to_owned(), ..there.clone() }));
    refused(commit(&bytes, Entry { root: client.find("vm7").unwrap().root, ..there }));
    // Questions that make no sense.
    let service = client.store().service().unwrap();
    let root = client.find("vm7").unwrap().root;
    refused(service.leaf(&root, 0, 1).map(drop));
    refused(service.leaf(&root, 9, 0).map(drop));
    let is_zero = memory.chunks_exact(PAGE).position(|page| page.iter().all(|byte| *byte == 0)).unwrap();
    for page in [is_zero as u16, 3500] {
        refused(service.fetch(&root, 0, 0, &[page], &mut Vec::new(), &mut |_| panic!("no page")));
    }
    // And then the right thing.
    put(&one.id.name(), &one.bytes).unwrap();
    drop(hold);
    assert!(withdraw(&client, "vm7", "memory").unwrap() == memory);
    let here = open(store);
    assert_eq!((verify(&here, &|_| {}).unwrap().faults, here.listing().unwrap().0.len()), (vec![], 1));
}

fn entry(bank: &Bank, machine: &str) -> Entry {
    Entry { machine: machine.to_owned(), number: 0, ..bank.find("vm7").unwrap() }
}

#[test]
fn a_page_that_is_damaged_there_is_refused_here_and_the_rest_comes() {
    let (store, serving, _) = served(ServeOptions::default());
    let pack = store.list(Kind::Pack).unwrap().remove(0);
    let client = serving.connect("ann", Rights::all());
    store.flip(Kind::Pack, &pack.name, 3000, 1);
    let error = withdraw(&client, "vm7", "memory").unwrap_err();
    assert!(matches!(error, WithdrawError::Page { error: ReadError::Sent(_), .. }), "{error}");
    store.flip(Kind::Pack, &pack.name, 3000, 1);
    assert!(withdraw(&client, "vm7", "memory").is_ok());
}

#[test]
fn a_server_that_ends_is_told_of_and_another_goes_on_where_it_was() {
    let (store, serving, memory) = served(ServeOptions::default());
    let client = serving.connect("ann", Rights::all());
    assert!(client.find("vm7").is_ok());
    serving.stop.set();
    let error = loop {
        if let Err(error) = withdraw_or(&client) {
            break error;
        }
    };
    assert!(error.contains("the link is closed") || error.contains("closed the link"), "{error}");
    // What it had, another server of the same bank has.
    let again = Serving::new(open(store));
    assert!(withdraw(&again.connect("ann", Rights::all()), "vm7", "memory").unwrap() == memory);
}

fn withdraw_or(bank: &Bank) -> Result<(), String> {
    bank.listing().map(drop).map_err(|error| error.to_string())
}
