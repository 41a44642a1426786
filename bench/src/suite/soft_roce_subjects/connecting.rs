//! The row of connecting: from nothing to the first answer of a lent device's register, and the part of it that is TCP and TLS.
//!
//! A lender listens at a loopback port with a certificate of an authority made for the purpose; `handshake` meets it and leaves, `connect` goes on to
//! queue pairs, a session, a function, and the value of its register.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use farbus_control::authority::{Authority, Request};
use farbus_control::certificate::Validity;
use farbus_control::identity::Identity;
use farbus_control::{AllowList, BorrowerSecurity, Credentials, HostPort, LenderSecurity, Listener, Met, connect};
use farbus_pci_shim::{Function, FunctionOptions, InterruptOwner, RecorderSink};
use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::lender::{LenderSession, PollOptions};
use farbus_remote_dma::wait::Waker;
use farbus_remote_dma::{Backend, BarAddress, DeviceDescription, Width};
use farbus_transport::link::hello::{Hello, Role, SPOKEN};
use farbus_transport::verbs::{DeviceChoice, VerbsFabric};
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

use crate::measure::{Latencies, pin_to};
use crate::suite::engine::{Engine, register};

/// Configuration space: command register, and its bit for memory space (PCI 3.0, section 6.2.2).
const COMMAND: u16 = 0x04;
const MEMORY_SPACE: u16 = 0b10;
/// Samples before those that count.
const WARM_UP: u64 = 1;
/// A borrower that has not come by then has failed to.
const LOST: Duration = Duration::from_secs(20);

/// How far a visit goes.
#[derive(Debug)]
enum Visit {
    /// Until both have met.
    Meet,
    /// Until this is set.
    Lend(Waker),
}

/// A lender that is visited, in a thread; it ends when this is dropped.
pub(super) struct Visited {
    choice: DeviceChoice,
    at: HostPort,
    security: BorrowerSecurity,
    runtime: Runtime,
    visits: Option<Sender<Visit>>,
    ended: Receiver<Result<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Visited {
    /// Lends over `choice`, on core `there`.
    pub(super) fn new(choice: &DeviceChoice, there: usize) -> Result<Self> {
        let authority = Authority::create(&"bench".parse()?, Validity::days_from_now(2))?;
        let issue = |identity: &str, addresses: &[&str]| -> Result<Credentials> {
            let identity = Identity::from_uri(identity).context("no identity")?;
            let addresses = addresses.iter().map(|&address| address.to_owned()).collect();
            let issued = authority.issue(&Request { identity, addresses, validity: Validity::days_from_now(1) })?;
            Ok(Credentials::from_pem(issued.certificate.as_bytes(), issued.key.as_bytes(), issued.authority.as_bytes())?)
        };
        let (lender, borrower) = (issue("farbus:lender/bench", &["127.0.0.1"])?, issue("farbus:borrower/bench", &[])?);
        let mut allow = AllowList::default();
        allow.add("bench")?;
        let lenders_runtime = Builder::new_current_thread().enable_all().build()?;
        let security = LenderSecurity::Tls { credentials: lender, allow };
        let listener = lenders_runtime.block_on(Listener::bind(&"127.0.0.1:0".parse()?, security))?;
        let at = listener.address().to_string().parse()?;
        let (visits, taken) = channel();
        let (report, ended) = channel();
        let lenders_choice = choice.clone();
        let thread = std::thread::Builder::new().name("bench-visited".into()).spawn(move || {
            let pinned = pin_to(there);
            while let Ok(visit) = taken.recv() {
                let outcome = match &pinned {
                    Ok(_) => receive(&lenders_runtime, &listener, &lenders_choice, visit),
                    Err(error) => Err(anyhow!("{error}")),
                };
                if report.send(outcome).is_err() {
                    break;
                }
            }
        })?;
        Ok(Self {
            choice: choice.clone(),
            at,
            security: BorrowerSecurity::Tls { credentials: borrower, peer: None },
            runtime: Builder::new_current_thread().enable_all().build()?,
            visits: Some(visits),
            ended,
            thread: Some(thread),
        })
    }

    /// TCP, TLS and hellos.
    pub(super) fn handshake(&self, samples: u64) -> Result<Latencies> {
        let mut latencies = Latencies::new();
        for round in 0..WARM_UP + samples {
            self.announce(Visit::Meet)?;
            let start = Instant::now();
            let met = self.meet()?;
            let took = start.elapsed();
            drop(met);
            self.ended.recv().context("the lender has ended")??;
            if round >= WARM_UP {
                latencies.record_ns(u64::try_from(took.as_nanos())?);
            }
        }
        Ok(latencies)
    }

    /// From nothing to the first answer of a register.
    pub(super) fn connect(&self, samples: u64) -> Result<Latencies> {
        let mut latencies = Latencies::new();
        for round in 0..WARM_UP + samples {
            let over = Over(Waker::new()?);
            self.announce(Visit::Lend(over.0.clone()))?;
            let start = Instant::now();
            let function = self.first_answer()?;
            let took = start.elapsed();
            drop((function, over));
            self.ended.recv().context("the lender has ended")??;
            if round >= WARM_UP {
                latencies.record_ns(u64::try_from(took.as_nanos())?);
            }
        }
        Ok(latencies)
    }

    fn announce(&self, visit: Visit) -> Result<()> {
        self.visits.as_ref().and_then(|visits| visits.send(visit).ok()).context("the lender has ended")
    }

    fn meet(&self) -> Result<Met> {
        Ok(self.runtime.block_on(connect(&self.at, &self.security))?.greet(&hello(Role::Borrower, Vec::new()))?)
    }

    fn first_answer(&self) -> Result<Function<RecorderSink>> {
        let met = self.meet()?;
        let fabric = VerbsFabric::establish(&self.choice, met.control)?;
        let device = DeviceDescription::decode(&met.agreed.peer.description)?;
        let options = BorrowerOptions { spin: Duration::from_secs(1), ..BorrowerOptions::default() };
        let session = BorrowerSession::new(fabric, device, options)?;
        let options = FunctionOptions { interrupts: InterruptOwner::Function };
        let mut function = Function::new(Box::new(session), RecorderSink::default(), options)?;
        function.config_write(COMMAND, &MEMORY_SPACE.to_le_bytes())?;
        let value = function.bar_read(BarAddress { bar: 0, offset: register::VALUE }, Width::B4)?;
        ensure!(value == 0, "the register of a device that was just lent is {value:#x}");
        Ok(function)
    }
}

impl Drop for Visited {
    fn drop(&mut self) {
        self.visits = None;
        if let Some(thread) = self.thread.take() {
            // What became of its visits was told by `ended`, or nobody asked.
            drop(thread.join());
        }
    }
}

/// Ends a visit, also where the visitor fails.
struct Over(Waker);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.set();
    }
}

fn hello(role: Role, description: Vec<u8>) -> Hello {
    Hello { versions: SPOKEN, role, features: 0, epoch: 0, description }
}

/// The lender's side of a visit.
fn receive(runtime: &Runtime, listener: &Listener, choice: &DeviceChoice, visit: Visit) -> Result<()> {
    let (engine, _) = Engine::new(4096)?;
    let arrival = runtime.block_on(async { timeout(LOST, listener.accept()).await }).context("no borrower came")??;
    let met = arrival.greet(&hello(Role::Lender, engine.description().encode()?))?.welcome()?;
    if let Visit::Lend(over) = visit {
        let fabric = VerbsFabric::establish(choice, met.control)?;
        let mut session = LenderSession::new(fabric, Box::new(engine)).map_err(|(error, _)| error)?;
        session.run(PollOptions { spin: Duration::MAX }, &over);
        session.end().map_err(|wedged| anyhow!("the device does not end its work: {wedged:?}"))?;
    }
    Ok(())
}
