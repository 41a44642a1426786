//! Both sessions against a peer that sends anything: messages parse to what encodes to the same bytes, and a session ends its link or goes on.
//!
//! Bytes that begin with an even number attack the lender, which lends an NVMe controller to a borrower that offered 64 KiB and mapped it; then
//! `10 03 00 00 …` is the 16-byte message 3, an offer. An odd number has the lender attack a borrower.

use std::sync::Arc;
use std::time::Duration;

use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::dirty_log::DirtyLog;
use farbus_remote_dma::lender::LenderSession;
use farbus_remote_dma::message::{ToBorrower, ToLender};
use farbus_remote_dma::model::{Nvme, NvmeOptions};
use farbus_remote_dma::{
    Attachment, Backend, BarAddress, Host, InterruptMode, Iova, Mediation, MediationAnswer, Ticket, Width, Window, WindowMemory,
};
use farbus_transport::fabric::MAX_MESSAGE;
use farbus_transport::sim::{self, SimFabric, SimOptions};
use farbus_transport::{Access, Events, Fabric, Memory, Nanos, Op, Regions, Signal};

use super::input::Input;

const GUEST_BYTES: u64 = 64 << 10;

/// A peer's messages.
pub fn session_messages(bytes: &[u8]) {
    let mut input = Input(bytes);
    match input.u8() {
        None => {}
        Some(first) if first & 1 == 0 => attack_lender(first & 2 != 0, input),
        Some(_) => attack_borrower(input),
    }
}

/// Two ends whose ways take no time, so that real time may pass.
fn ends() -> (SimFabric, SimFabric) {
    let (lender, borrower, _) = sim::pair(1, SimOptions { descriptors: true, ..SimOptions::default() });
    (lender, borrower)
}

fn nvme() -> Box<dyn Backend> {
    let image = Memory::memfd("fuzz-image", 64 << 10).expect("memory");
    Box::new(Nvme::in_memory(image, NvmeOptions::default()).expect("a controller"))
}

fn send(fabric: &mut SimFabric, message: &[u8]) {
    // A full or closed link drops it: the peer that sent it is the attacker.
    if fabric.post(Signal::No, Op::Send { message }).is_ok() {
        fabric.flush();
    }
}

/// A piece as a message, at most as long as one can be.
fn message<'a>(input: &mut Input<'a>) -> Option<&'a [u8]> {
    let piece = input.piece()?;
    Some(piece.get(..MAX_MESSAGE).unwrap_or(piece))
}

fn attack_lender(prepared: bool, mut input: Input<'_>) {
    let (lender, mut attacker) = ends();
    let Ok(mut session) = LenderSession::new(lender, nvme()) else { panic!("the device attaches") };
    let mut events = Events::new();
    let guest = Memory::memfd("fuzz-guest", GUEST_BYTES).expect("memory");
    if prepared {
        for first in prepare(&mut attacker, &guest) {
            send(&mut attacker, first.encode().as_slice());
        }
        session.pump(Nanos::now());
        assert_eq!(session.closed(), None, "a borrower in good order was sent away");
    }
    while let Some(bytes) = message(&mut input) {
        if let Ok((parsed, rest)) = ToLender::parse(bytes) {
            assert_eq!([parsed.encode().as_slice(), rest].concat(), bytes, "{parsed:?} is sent in two ways");
        }
        send(&mut attacker, bytes);
        session.pump(Nanos::now());
        events.clear();
        attacker.poll(Nanos::now(), &mut events);
        if session.closed().is_some() {
            break;
        }
    }
    drop(attacker);
    drop(session.end().expect("the device ends what it began"));
}

/// What a borrower says first: memory, a window on it, staging, and that the device may start DMA.
fn prepare(fabric: &mut SimFabric, guest: &Arc<Memory>) -> Vec<ToLender> {
    let mut grant = |memory: &Arc<Memory>| {
        let region = fabric.register(Arc::clone(memory), Access::READ_WRITE).expect("there is room");
        fabric.export(&region, Access::READ_WRITE).expect("no more than it allows")
    };
    let log = DirtyLog::new(GUEST_BYTES).expect("memory");
    let staging = Memory::memfd("fuzz-staging", 64 << 10).expect("memory");
    let (memory, dirty, staging) = (grant(guest), grant(log.marks()), grant(&staging));
    let key = Some(memory.key);
    let access = Access::READ_WRITE;
    vec![
        ToLender::Staging(staging),
        ToLender::Offer { sequence: 1, memory, dirty, proven: true },
        ToLender::Map { sequence: 2, iova: Iova(0), len: GUEST_BYTES, memory: key, offset: 0, access },
        ToLender::Map { sequence: 3, iova: Iova(0x10_0000), len: 0x1_0000, memory: None, offset: 0, access },
        ToLender::InterruptMode(InterruptMode::Msix),
        ToLender::BusMaster(true),
    ]
}

/// A guest's side that answers mediations from one page, later.
#[derive(Default)]
struct Guest {
    asked: Vec<(Ticket, Option<u32>)>,
}

impl Host for Guest {
    fn interrupt(&mut self, _vector: u16) {}

    fn pin(&mut self, _asserted: bool) {}

    fn mediate(&mut self, ticket: Ticket, mediation: Mediation<'_>) {
        self.asked.push(match mediation {
            Mediation::Fetch { len, iova } => {
                assert!(len <= 4096 && iova.0 % 4096 + u64::from(len) <= 4096, "a fetch of {len} at {iova} leaves its page");
                (ticket, Some(len))
            }
            Mediation::Store { bytes, iova, .. } => {
                assert!(iova.0 % 4096 + bytes.len() as u64 <= 4096, "a store of {} at {iova} leaves its page", bytes.len());
                (ticket, None)
            }
        });
    }
}

fn attack_borrower(mut input: Input<'_>) {
    let (mut attacker, borrower) = ends();
    let description = nvme().description().clone();
    let options = BorrowerOptions {
        read_deadline: Duration::from_micros(20),
        control_deadline: Duration::from_micros(20),
        spin: Duration::ZERO,
    };
    let mut session = BorrowerSession::new(borrower, description, options).expect("staging memory");
    let (mut guest, mut events) = (Guest::default(), Events::new());
    let memory = Memory::memfd("fuzz-guest", GUEST_BYTES).expect("memory");
    while let Some(operation) = input.u8() {
        let Some(bytes) = message(&mut input) else { break };
        if let Ok((parsed, rest)) = ToBorrower::parse(bytes) {
            assert_eq!([parsed.encode().as_slice(), rest].concat(), bytes, "{parsed:?} is sent in two ways");
        }
        send(&mut attacker, bytes);
        match operation % 8 {
            0 => {
                let value = session.bar_read(BarAddress { bar: 0, offset: 0x1c }, Width::B4, &mut guest);
                assert!(value <= u64::from(u32::MAX), "a read of 4 bytes has more bits");
            }
            1 => session.bar_write(BarAddress { bar: 0, offset: 0x1000 }, Width::B4, 1, &mut guest),
            2 => {
                let mapped = WindowMemory::Mapped { memory: Arc::clone(&memory), offset: 0, proven: true };
                let window = Window { iova: Iova(0), len: GUEST_BYTES, access: Access::READ_WRITE, memory: mapped };
                drop(session.map(window, &mut guest));
            }
            3 => {
                while let Some((ticket, fetch)) = guest.asked.pop() {
                    let page = [0xa5; 4096];
                    let answer = match fetch {
                        Some(len) => MediationAnswer::Fetched(page.get(..len as usize).expect("at most a page")),
                        None => MediationAnswer::Stored,
                    };
                    session.answer(ticket, answer, &mut guest);
                }
            }
            _ => drop(session.poll(Nanos::now(), &mut guest)),
        }
        events.clear();
        attacker.poll(Nanos::now(), &mut events);
        if session.gone().is_some() {
            break;
        }
    }
}
