//! One end of a link that says what a test tells it to, right or wrong.
//!
//! `Raw::new(fabric, LANES * BODY).hello()` is a client that a server welcomes; what it says next may be anything.
#![allow(dead_code, reason = "each test program uses some of it")]
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_machine_bank::remote::wire::{Carried, Request, ToClient, ToServer, VERSION};
use farbus_transport::shm::ShmFabric;
use farbus_transport::{Access, Event, Events, Fabric, Grant, Memory, Nanos, Op as FabricOp, PostError, Regions, Signal};

/// One end that says what it is told to.
pub struct Raw {
    pub fabric: ShmFabric,
    events: Events,
    pub own: Arc<Memory>,
}

impl Raw {
    pub fn new(fabric: ShmFabric, len: usize) -> Self {
        Self { fabric, events: Events::new(), own: Memory::memfd("hostile", len as u64).unwrap() }
    }

    pub fn grant(&mut self) -> (u64, u64) {
        let region = self.fabric.register(self.own.clone(), Access::READ_WRITE).unwrap();
        let Grant { key, len, .. } = self.fabric.export(&region, Access::READ).unwrap();
        (key, len)
    }

    pub fn say(&mut self, message: &[u8]) -> bool {
        let posted = self.fabric.post(Signal::No, FabricOp::Send { message });
        self.fabric.flush();
        posted != Err(PostError::Full)
    }

    pub fn hello(&mut self) {
        let grant = self.grant();
        self.say(&ToServer::Hello { version: VERSION, grant }.encode());
        assert!(matches!(ToClient::parse(&self.hear().unwrap()), Ok(ToClient::Welcome { version: VERSION, .. })));
    }

    /// The next message; `None` at the end of the link.
    pub fn hear(&mut self) -> Option<Vec<u8>> {
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

    pub fn request(op: u8, lane: u8, body: Carried) -> Vec<u8> {
        ToServer::Request(Request { op, lane, lent: 1 << lane, body }).encode()
    }
}
