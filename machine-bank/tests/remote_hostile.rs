//! Clients and servers that say anything: they are refused or ended, nobody else notices, and no wrong byte comes out of a bank.
//!
//! A client that sends a page under another's name is told so, one that floods is ended; a server that sends another page is found out by its hash.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "common/mod.rs"]
mod common;
#[path = "common/served.rs"]
mod served;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{deposit, machine, memory_bank, open, withdraw};
use farbus_machine_bank::keep::verify;
use farbus_machine_bank::manifest::leaf::{Encoded, encode};
use farbus_machine_bank::pack::{GroupEncoder, PackBuilder};
use farbus_machine_bank::page::Identity;
use farbus_machine_bank::reader::ReadError;
use farbus_machine_bank::remote::wire::{
    Answer, BODY, Carried, LANES, Op, PART, Request, Status, ToClient, ToServer, VERSION, put_objects,
};
use farbus_machine_bank::remote::{RemoteStore, Rights, ServeOptions};
use farbus_machine_bank::store::{Durability, Hold, Kind, Store, StoreError};
use farbus_machine_bank::withdraw::WithdrawError;
use farbus_machine_bank::{Bank, Changes, Entry, PAGE, PageId};
use farbus_transport::shm::{ShmFabric, ShmOptions};
use farbus_transport::{Access, Event, Events, Fabric, Grant, Memory, Nanos, Op as FabricOp, PostError, Regions, Signal};
use served::{Serving, reason};

/// One end that says what it is told to.
struct Raw {
    fabric: ShmFabric,
    events: Events,
    own: Arc<Memory>,
}

impl Raw {
    fn new(fabric: ShmFabric, len: usize) -> Self {
        Self { fabric, events: Events::new(), own: Memory::memfd("hostile", len as u64).unwrap() }
    }

    fn grant(&mut self) -> (u64, u64) {
        let region = self.fabric.register(self.own.clone(), Access::READ_WRITE).unwrap();
        let Grant { key, len, .. } = self.fabric.export(&region, Access::READ).unwrap();
        (key, len)
    }

    fn say(&mut self, message: &[u8]) -> bool {
        let posted = self.fabric.post(Signal::No, FabricOp::Send { message });
        self.fabric.flush();
        posted != Err(PostError::Full)
    }

    fn hello(&mut self) {
        let grant = self.grant();
        self.say(&ToServer::Hello { version: VERSION, grant }.encode());
        assert!(matches!(ToClient::parse(&self.hear().unwrap()), Ok(ToClient::Welcome { version: VERSION, .. })));
    }

    /// The next message; `None` at the end of the link.
    fn hear(&mut self) -> Option<Vec<u8>> {
        let until = Instant::now() + Duration::from_secs(30);
        while Instant::now() < until {
            self.events.clear();
            self.fabric.poll(Nanos::now(), &mut self.events);
            match self.events.as_slice() {
                [] => std::thread::sleep(Duration::from_micros(200)),
                [Event::Message(message), ..] => return Some(message.bytes().to_vec()),
                [Event::Closed(_), ..] => return None,
                [other, ..] => panic!("{other:?}"),
            }
        }
        panic!("nothing comes");
    }

    fn request(op: u8, lane: u8, body: Carried) -> Vec<u8> {
        ToServer::Request(Request { op, lane, lent: 1 << lane, body }).encode()
    }
}

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
    refused(draft.append(&long).and_then(|()| draft.commit_deposit(entry(&client, "vm8"))).map(drop));
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

/// How a server lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    None,
    SmallSlab,
    OtherVersion,
    Garbage,
    Silence,
    Goodbye,
    UnaskedLane,
    LaneNotLent,
    LongPart,
    OtherHead,
    HeadWithoutEnd,
    OtherLeaf,
    ShortLeaf,
    OtherPage,
    UnaskedPage,
    PageTwice,
    NoPages,
    BadTable,
    Bomb,
    MissingPage,
    UnsortedList,
    EndlessList,
    LongText,
}

const LIES: [Lie; 22] = [
    Lie::SmallSlab,
    Lie::OtherVersion,
    Lie::Garbage,
    Lie::Silence,
    Lie::Goodbye,
    Lie::UnaskedLane,
    Lie::LaneNotLent,
    Lie::LongPart,
    Lie::OtherHead,
    Lie::HeadWithoutEnd,
    Lie::OtherLeaf,
    Lie::ShortLeaf,
    Lie::OtherPage,
    Lie::UnaskedPage,
    Lie::PageTwice,
    Lie::NoPages,
    Lie::BadTable,
    Lie::Bomb,
    Lie::MissingPage,
    Lie::UnsortedList,
    Lie::EndlessList,
    Lie::LongText,
];

/// A server that answers for a bank in memory, and lies once in a way.
fn lying_server(mut raw: Raw, bank: &Bank, memory: &[u8], lie: Lie) {
    let Some(hello) = raw.hear() else { return };
    let Ok(ToServer::Hello { grant: (key, len), .. }) = ToServer::parse(&hello) else { panic!("no hello") };
    let mut grant = raw.grant();
    if lie == Lie::SmallSlab {
        grant.1 = (LANES * PART) as u64;
    }
    raw.say(&ToClient::Welcome { version: VERSION + u16::from(lie == Lie::OtherVersion), grant }.encode());
    let area = raw.fabric.import(&Grant { key, len, access: Access::READ }).unwrap();
    let landing = Memory::memfd("landing", BODY as u64).unwrap();
    let region = raw.fabric.register(landing.clone(), Access::READ_WRITE).unwrap();
    let entry = bank.find("vm7").unwrap();
    let manifest = bank.manifest(&entry).unwrap();
    while let Some(message) = raw.hear() {
        let Ok(ToServer::Request(request)) = ToServer::parse(&message) else { continue };
        let body = match &request.body {
            Carried::Inline(bytes) => bytes.clone(),
            Carried::Lane(len) => {
                let from = area.span(u64::from(request.lane) * BODY as u64, *len, Access::READ).unwrap();
                raw.fabric.post(Signal::No, FabricOp::Read { from, into: region.span(0, *len, Access::WRITE).unwrap() }).unwrap();
                let mut body = vec![0; *len as usize];
                landing.read(0, &mut body).unwrap();
                body
            }
        };
        let op = Op::parse(request.op, &body).unwrap();
        let mut status = Status::Done;
        let mut answer = Vec::new();
        match &op {
            Op::Config => answer = bank.store().read_all(Kind::Config, "bank", 4096).unwrap(),
            Op::List(..) => {
                let objects = bank.store().list(Kind::Manifest).unwrap();
                match lie {
                    Lie::UnsortedList => put_objects(&mut answer, &[objects.clone(), objects].concat(), false),
                    Lie::EndlessList => put_objects(&mut answer, &[], true),
                    _ => put_objects(&mut answer, &objects, false),
                }
            }
            Op::Head(..) => {
                let mut head = manifest.head.encode();
                head[60] ^= u8::from(lie == Lie::OtherHead);
                answer = vec![0];
                answer.extend_from_slice(&(head.len() as u32 * if lie == Lie::HeadWithoutEnd { 1000 } else { 1 }).to_le_bytes());
                answer.extend_from_slice(&head);
            }
            Op::Leaf(..) => {
                let mut ids = manifest.leaf(bank.store(), bank.identity(), 0, 0).unwrap();
                if lie == Lie::OtherLeaf {
                    ids.iter_mut().filter(|id| !id.is_zero()).take(1).for_each(|id| id.0[3] ^= 1);
                }
                let Encoded::Full(bytes) = encode(&ids, None) else { panic!("no leaf") };
                answer = bytes;
                answer.truncate(if lie == Lie::ShortLeaf { answer.len() - 1 } else { answer.len() });
            }
            Op::Fetch(_, _, _, wanted) => {
                let pages: Vec<u16> = (0..4096).filter(|at| wanted[*at as usize / 8] >> (at % 8) & 1 == 1).collect();
                answer = part(memory, &pages, lie);
            }
            Op::Pin(_) => answer = vec![0; 4],
            _ => {}
        }
        let about_machine = matches!(op, Op::Head(..));
        let mut message = Answer { status, lane: request.lane, last: true, part: (Carried::Inline(Vec::new()), 0xff) };
        let mut bytes = None;
        match lie {
            Lie::Garbage if about_machine => bytes = Some(vec![0xee; 30]),
            Lie::Silence if about_machine => continue,
            Lie::Goodbye if about_machine => return,
            Lie::LongText if about_machine => {
                status = Status::Failed;
                answer = b"\x1b[2J all is well \x07".repeat(40);
            }
            Lie::UnaskedLane if about_machine => message.lane = (request.lane + 1) % LANES as u8,
            _ => {}
        }
        message.status = status;
        if answer.len() <= 44 {
            message.part.0 = Carried::Inline(answer);
        } else {
            let lane = if lie == Lie::LaneNotLent && about_machine {
                (0..8).find(|lane| request.lent >> lane & 1 == 0).unwrap()
            } else {
                request.lane
            };
            raw.own.write(u64::from(lane) * PART as u64, &answer).ok();
            message.part = (Carried::Lane(answer.len() as u32), lane);
        }
        let mut bytes = bytes.unwrap_or_else(|| ToClient::Answer(message).encode());
        if lie == Lie::LongPart && about_machine {
            bytes[8..12].copy_from_slice(&(PART as u32 + 1).to_le_bytes());
        }
        raw.say(&bytes);
    }
}

/// A part with these pages, each a group of its own.
fn part(memory: &[u8], pages: &[u16], lie: Lie) -> Vec<u8> {
    let mut encoder = GroupEncoder::new().unwrap();
    // So few that several answers are needed.
    let served = &pages[..pages.len().min(if lie == Lie::NoPages { 0 } else { 300 })];
    let (mut table, mut bytes, mut missing) = (Vec::new(), Vec::new(), Vec::new());
    for (at, page) in served.iter().enumerate() {
        let from = usize::from(*page) * PAGE;
        let mut contents = memory[from..from + PAGE].to_vec();
        if lie == Lie::OtherPage && at == 7 {
            contents[17] ^= 1;
        }
        let mut group = encoder.encode(&contents).to_vec();
        if lie == Lie::Bomb && at == 7 {
            // A mebibyte of zeros in a few bytes: a group is 64 KiB.
            group = vec![
                1, 0x28, 0xb5, 0x2f, 0xfd, 0xa4, 0, 0, 0x10, 0, 0x54, 0, 0, 0x10, 0, 0, 1, 0xfb, 0xff, 0x39, 0xc0, 2, 2, 0, 0x10, 0,
            ];
        }
        let mut named = *page;
        match lie {
            Lie::UnaskedPage if at == 7 => named = (0..4096).find(|other| !pages.contains(other)).unwrap(),
            Lie::PageTwice if at == 7 => named = served[6],
            Lie::MissingPage if at == 7 => {
                missing.push(*page);
                continue;
            }
            _ => {}
        }
        table.push((group.len() as u32, vec![(named, 0)]));
        bytes.extend_from_slice(&group);
    }
    let mut part = Vec::new();
    farbus_machine_bank::remote::wire::put_table(&mut part, &missing, &table);
    part.extend_from_slice(&bytes);
    if lie == Lie::BadTable {
        part.pop();
    }
    part
}

/// What a client makes of a server that lies so.
fn withdraw_from(lie: Lie) -> Result<Vec<u8>, String> {
    let (_, bank) = memory_bank();
    let memory = machine(5, 1000);
    deposit(&bank, "vm7", &memory, Changes::HashAll);
    let (lender, borrower) = ShmFabric::pair(ShmOptions::default()).unwrap();
    let raw = Raw::new(lender, if lie == Lie::SmallSlab { PAGE } else { LANES * PART });
    let server = std::thread::spawn(move || lying_server(raw, &bank, &memory, lie));
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let result = (|| {
        let limit = if lie == Lie::Silence { Duration::from_millis(300) } else { Duration::from_secs(20) };
        let store = RemoteStore::connect_within(borrower, "shm:liar", Nanos::now, limit).map_err(|error| text(&error))?;
        let bank = Bank::open(Box::new(store), None).map_err(|error| text(&error))?;
        let entry = bank.find("vm7").map_err(|error| text(&error))?;
        let file = tempfile::tempfile().unwrap();
        let withdrawal = bank.withdraw(&entry).map_err(|error| text(&error))?;
        withdrawal.section("memory", &file, &|_| {}).map_err(|error| text(&error))?;
        Ok(common::contents(&file))
    })();
    server.join().unwrap();
    result
}

#[test]
fn a_server_that_lies_is_found_out_and_an_honest_one_is_not() {
    assert!(withdraw_from(Lie::None).unwrap() == machine(5, 1000));
    for lie in LIES {
        let error = withdraw_from(lie).expect_err(&format!("{lie:?} was believed"));
        let expected = match lie {
            Lie::Silence => "has not answered",
            Lie::Goodbye => "closed the link",
            Lie::OtherVersion => "speaks version 2",
            Lie::SmallSlab => "grant",
            Lie::OtherPage | Lie::Bomb => "is another",
            Lie::MissingPage => "is in no pack",
            Lie::OtherHead | Lie::HeadWithoutEnd | Lie::OtherLeaf => "does not have its hash",
            Lie::ShortLeaf => "ends too early",
            Lie::LongText => "all is well",
            _ => "breaks the protocol",
        };
        assert!(error.contains(expected), "{lie:?}: {error}");
        assert!(error.len() < 600 && !error.contains(char::is_control), "{lie:?}: {error}");
    }
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
