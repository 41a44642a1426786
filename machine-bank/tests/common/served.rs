//! A bank that is served to threads of this process, over shared memory or a simulated wire.
//!
//! `Serving::new(bank).connect("ann", Rights::all())` is the same bank from the other end of a link.
#![allow(dead_code, reason = "each test program uses some of it")]
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use farbus_machine_bank::Bank;
use farbus_machine_bank::page::KEY;
use farbus_machine_bank::remote::{BankServer, Client, RemoteStore, Rights, ServeOptions, Served, Stop};
use farbus_transport::shm::{ShmFabric, ShmOptions};
use farbus_transport::sim::{SimFabric, SimOptions};
use farbus_transport::{Fabric, Nanos};

/// A bank being served.
pub struct Serving {
    pub server: Arc<BankServer>,
    pub stop: Stop,
    pub key: Option<[u8; KEY]>,
}

/// Whoever made this can wait for the end of a session.
pub type Ended = Receiver<Served>;

impl Serving {
    pub fn new(bank: Bank) -> Self {
        Self::with(bank, ServeOptions::default())
    }

    pub fn with(bank: Bank, options: ServeOptions) -> Self {
        Self { server: BankServer::new(bank, options).unwrap(), stop: Stop::new().unwrap(), key: None }
    }

    /// Serves one end, on a thread.
    pub fn serve<F: Fabric + 'static>(
        &self,
        fabric: F,
        name: &str,
        rights: Rights,
        clock: impl FnMut() -> Nanos + Send + 'static,
    ) -> Ended {
        let (server, stop, client) = (self.server.clone(), self.stop.clone(), Client { name: name.to_owned(), rights });
        let (tell, ended) = channel();
        std::thread::spawn(move || {
            let served = server.serve(fabric, &client, &stop, clock);
            // A test that is over does not listen.
            drop(tell.send(served));
        });
        ended
    }

    /// The bank over shared memory.
    pub fn connect(&self, name: &str, rights: Rights) -> Bank {
        self.connect_ended(name, rights).0
    }

    /// The same, with the end of its session.
    pub fn connect_ended(&self, name: &str, rights: Rights) -> (Bank, Ended) {
        let (lender, borrower) = ShmFabric::pair(ShmOptions::default()).unwrap();
        let ended = self.serve(lender, name, rights, Nanos::now);
        (self.bank(RemoteStore::connect(borrower, "shm:test", Nanos::now).unwrap()), ended)
    }

    pub fn bank(&self, store: RemoteStore) -> Bank {
        Bank::open(Box::new(store), self.key.as_ref()).unwrap()
    }

    /// The two ends of a raw link, one of them served.
    pub fn raw(&self, name: &str, rights: Rights) -> (ShmFabric, Ended) {
        let (lender, borrower) = ShmFabric::pair(ShmOptions::default()).unwrap();
        (borrower, self.serve(lender, name, rights, Nanos::now))
    }

    /// The bank over a simulated wire.
    pub fn simulated(&self, seed: u64) -> Bank {
        let (store, _) = self.simulated_ended(seed);
        self.bank(store)
    }

    /// The same, unopened.
    pub fn simulated_ended(&self, seed: u64) -> (RemoteStore, farbus_transport::sim::World) {
        let (left, right, world) = farbus_transport::sim::pair(seed, SimOptions::default());
        let (here, there) = (world.clone(), world.clone());
        drop(self.serve(left, "sim", Rights::all(), move || there.step()));
        let right: SimFabric = right;
        (RemoteStore::connect(right, "sim:test", move || here.step()).unwrap(), world)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.stop.set();
    }
}

/// Some patterns.
pub fn rights(read: &[&str], write: &[&str]) -> Rights {
    let parse = |all: &[&str]| all.iter().map(|pattern| pattern.parse().unwrap()).collect();
    Rights { read: parse(read), write: parse(write) }
}

/// How a session ended; a test that waits longer than this has failed.
pub fn reason(ended: &Ended) -> String {
    ended.recv_timeout(Duration::from_secs(60)).unwrap().reason
}
