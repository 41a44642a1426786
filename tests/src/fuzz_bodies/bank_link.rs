//! What banks say to each other over a link: messages, bodies and parts parse to what encodes to the same bytes or are refused, and a server that is
//! told anything keeps its bank.
//!
//! A first byte of 5 and a request in lane 2 to stage 9 bytes, one to make a pack of them: refused, and the bank verifies clean.

use std::sync::Arc;

use farbus_machine_bank::keep::verify;
use farbus_machine_bank::manifest::LEAF;
use farbus_machine_bank::remote::wire::{
    BODY, Carried, INLINE, LANES, Op, Request, ToClient, ToServer, VERSION, parse_objects, parse_part, put_objects, put_table,
};
use farbus_machine_bank::remote::{BankServer, Client, Rights, ServeOptions, Stop};
use farbus_machine_bank::store::MemoryStore;
use farbus_machine_bank::{Bank, Changes, DepositOptions, PAGE, SectionKind};
use farbus_transport::shm::{ShmFabric, ShmOptions};
use farbus_transport::{Access, Event, Events, Fabric, Memory, Nanos, Op as FabricOp, Regions, Signal};

use super::input::Input;

/// One of the parsers, or a session, by the first byte.
pub fn bank_link(bytes: &[u8]) {
    let mut input = Input(bytes);
    let Some(which) = input.u8() else { return };
    match which % 6 {
        0 => {
            if let Ok(message) = ToServer::parse(input.0) {
                assert_eq!(message.encode(), input.0);
            }
        }
        1 => {
            if let Ok(message) = ToClient::parse(input.0) {
                assert_eq!(message.encode(), input.0);
            }
        }
        2 => {
            let Some(code) = input.u8() else { return };
            if let Ok(op) = Op::parse(code, input.0) {
                assert_eq!((op.code(), op.body()), (code, input.0.to_vec()));
            }
        }
        3 => part(input.0),
        4 => {
            if let Ok((objects, more)) = parse_objects(input.0) {
                let mut again = Vec::new();
                put_objects(&mut again, &objects, more);
                assert_eq!(again, input.0);
            }
        }
        _ => session(&mut input),
    }
}

fn part(bytes: &[u8]) {
    let Ok((missing, groups)) = parse_part(bytes) else { return };
    let mut again = Vec::new();
    let table: Vec<_> = groups.iter().map(|group| (group.bytes.len() as u32, group.pages.clone())).collect();
    put_table(&mut again, &missing, &table);
    for group in &groups {
        assert!(group.pages.iter().all(|(page, _)| usize::from(*page) < LEAF));
        again.extend_from_slice(&bytes[group.bytes.clone()]);
    }
    assert_eq!(again, bytes);
}

/// A client that says hello and then what the bytes say, to a real server of a bank with one machine.
fn session(input: &mut Input<'_>) {
    let store = MemoryStore::new();
    let bank = Bank::init(Box::new(store.clone()), None).expect("an empty store takes a bank");
    let memory: Vec<u8> = (0..20 * PAGE).map(|at| (at / PAGE) as u8).collect();
    let mut deposit = bank.deposit("vm7", &DepositOptions::default()).expect("a name");
    deposit.section(SectionKind::Memory, "memory", &&memory[..], Changes::HashAll, &|_| {}).expect("it is in memory");
    deposit.commit().expect("it is in memory");
    let server = BankServer::new(bank, ServeOptions::default()).expect("its index is whole");
    let (lender, borrower) = ShmFabric::pair(ShmOptions::default()).expect("the host has descriptors");
    let stop = Stop::new().expect("the host has descriptors");
    let (served, stopped) = (Arc::clone(&server), stop.clone());
    let client = Client { name: "eve".to_owned(), rights: Rights::all() };
    let thread = std::thread::spawn(move || served.serve(lender, &client, &stopped, Nanos::now));
    say_all(borrower, input);
    stop.set();
    thread.join().expect("a server does not panic, whatever it is told");
    let bank = server.bank();
    assert_eq!(verify(bank, &|_| {}).expect("it is in memory").faults, []);
    let entry = bank.find("vm7@1").expect("nothing removes a machine");
    let file = tempfile::tempfile().expect("the host has files");
    bank.withdraw(&entry).expect("it is whole").section("memory", &file, &|_| {}).expect("it is whole");
}

fn say_all(mut fabric: ShmFabric, input: &mut Input<'_>) {
    let area = Memory::memfd("fuzz", (LANES * BODY) as u64).expect("the host has memory");
    let region = fabric.register(area.clone(), Access::READ_WRITE).expect("there is room");
    let grant = fabric.export(&region, Access::READ).expect("there is room");
    let mut say = |message: &[u8]| {
        // Where the ring is full, or the link has ended, it is not said.
        let _posted = fabric.post(Signal::No, FabricOp::Send { message });
        fabric.flush();
        let mut events = Events::new();
        for _ in 0..20 {
            fabric.poll(Nanos::now(), &mut events);
            std::thread::yield_now();
        }
        !events.as_slice().iter().any(|event| matches!(event, Event::Closed(_)))
    };
    say(&ToServer::Hello { version: VERSION, grant: (grant.key, grant.len) }.encode());
    while let (Some(op), Some(lane), Some(lent), Some(body)) = (input.u8(), input.u8(), input.u8(), input.piece()) {
        let lane = lane % LANES as u8;
        let carried = if body.len() <= INLINE {
            Carried::Inline(body.to_vec())
        } else {
            area.write(u64::from(lane) * BODY as u64, body).expect("a piece is shorter than a lane");
            Carried::Lane(body.len() as u32)
        };
        // Each op is asked for as often as it is known.
        let message = if op == 0 {
            body.get(..56).unwrap_or(body).to_vec()
        } else {
            ToServer::Request(Request { op, lane, lent, body: carried }).encode()
        };
        if !say(&message) {
            return;
        }
    }
}
