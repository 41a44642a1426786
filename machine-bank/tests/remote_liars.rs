//! Servers that lie: each is found out by its client, which says so and writes no wrong byte.
//!
//! A server that sends another page for page 7 of a leaf is told from an honest one by the page's hash; one that answers in a lane that it was not lent breaks
//! the protocol.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "common/mod.rs"]
mod common;
#[path = "common/raw.rs"]
mod raw;

use std::time::Duration;

use common::{deposit, machine, memory_bank};
use farbus_machine_bank::manifest::leaf::{Encoded, encode};
use farbus_machine_bank::pack::GroupEncoder;
use farbus_machine_bank::remote::RemoteStore;
use farbus_machine_bank::remote::wire::{Answer, BODY, Carried, LANES, Op, PART, Status, ToClient, ToServer, VERSION, put_objects};
use farbus_machine_bank::store::Kind;
use farbus_machine_bank::{Bank, Changes, PAGE};
use farbus_transport::shm::{ShmFabric, ShmOptions};
use farbus_transport::{Access, Fabric, Grant, Memory, Nanos, Op as FabricOp, Regions, Signal};
use raw::Raw;

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
            Op::Config(_) => answer = bank.store().read_all(Kind::Config, "bank", 4096).unwrap(),
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
