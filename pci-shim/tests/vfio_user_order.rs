//! What a reply promises of guest memory that is reached by messages: a read's answer, a reset and an unmap come after the stores before them.
//!
//! The device asks for 100 stores, then the client reads a register and makes, while it waits, the accesses that it is asked for: when the
//! answer is there, so are all 100. A client that makes none while it waits, as QEMU, is answered in bounded time and told no lie.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a panic is how a test fails")]

mod vfio_user_support;

use std::time::{Duration, Instant};

use farbus_pci_shim::vfio_user::client::{Client, ClientError, ClientMemory};
use farbus_pci_shim::vfio_user::wire::{CONFIG_REGION, Command, DmaUnmap, Header, RegionAccess};
use farbus_pci_shim::vfio_user::{ClientInterrupts, Options, Server};
use farbus_pci_shim::{Function, FunctionOptions, InterruptOwner};
use rustix::io::Errno;
use vfio_user_support::{Answer, DEADLINE, Guest, Handle, Lent, Running, Step, description, serve};
use zerocopy::IntoBytes;

const BASE: u64 = 0x10000;
const QUIET: Duration = Duration::from_millis(50);
/// Far longer than anything that is not meant to wait.
const LONG: Duration = Duration::from_secs(4);

fn errno<T: std::fmt::Debug>(result: Result<T, ClientError>) -> Errno {
    result.unwrap_err().errno().expect("a refusal")
}

fn guest() -> Guest {
    Guest::new(BASE, 0x20000)
}

fn connect(server: &Running) -> Client {
    let mut client = server.client();
    client.dma_map(BASE, 0x10000, 3, None).unwrap();
    client.dma_map(BASE + 0x10000, 0x10000, 3, None).unwrap();
    client
}

/// Has the device ask for `count` stores of four bytes from `at` on; they are on their way when this returns.
fn ask_for_stores(device: &Handle, at: u64, count: u64) {
    device.play((0..count).map(|i| Step::Store { iova: at + 4 * i, bytes: vec![7; 4], polled: false }));
    device.wait("the device asks", |state| state.steps.is_empty());
    std::thread::sleep(QUIET / 5);
}

fn read() -> (Command, Vec<u8>) {
    (Command::RegionRead, RegionAccess { offset: 0, region: 0, count: 4 }.as_bytes().to_vec())
}

fn unmap(address: u64) -> (Command, Vec<u8>) {
    (Command::DmaUnmap, DmaUnmap { argsz: 24, flags: 0, address, size: 0x10000 }.as_bytes().to_vec())
}

/// A client that makes accesses while it waits.
fn ask(client: &mut Client, guest: &mut dyn ClientMemory, (command, body): (Command, Vec<u8>)) -> Result<(), ClientError> {
    client.request_serving(command, &body, guest).map(|_| ())
}

#[test]
fn a_register_reads_answer_follows_the_stores_before_it() {
    let server = serve(Options::default());
    let (mut client, mut guest) = (connect(&server), guest());
    for round in 1..=3 {
        // More than go out at once.
        ask_for_stores(&server.device, BASE, 100);
        ask(&mut client, &mut guest, read()).unwrap();
        assert_eq!(guest.writes.len(), 100 * round, "the answer passed stores");
    }
    // Nothing is outstanding: at once.
    let start = Instant::now();
    client.region_read(0, 0, &mut [0; 4]).unwrap();
    assert!(start.elapsed() < LONG);
}

#[test]
fn twin_without_the_wait_the_answer_passes_stores() {
    let server = serve(Options { flush_limit: Duration::ZERO, ..Options::default() });
    let (mut client, mut guest) = (connect(&server), guest());
    ask_for_stores(&server.device, BASE, 100);
    ask(&mut client, &mut guest, read()).unwrap();
    assert!(guest.writes.len() < 100);
}

/// Memory whose accesses take their time.
struct Slow(Guest, Duration);

impl ClientMemory for Slow {
    fn read(&mut self, iova: u64, into: &mut [u8]) -> Result<(), Errno> {
        self.0.read(iova, into)
    }
    fn write(&mut self, iova: u64, bytes: &[u8]) -> Result<(), Errno> {
        std::thread::sleep(self.1);
        self.0.write(iova, bytes)
    }
}

#[test]
fn a_client_that_makes_accesses_while_it_waits_may_be_slow() {
    let flush_limit = Duration::from_millis(200);
    let server = serve(Options { flush_limit, ..Options::default() });
    let (mut client, mut slow) = (connect(&server), Slow(guest(), flush_limit / 4));
    ask_for_stores(&server.device, BASE, 10);
    ask(&mut client, &mut slow, read()).unwrap();
    assert_eq!(slow.0.writes.len(), 10);
}

#[test]
fn a_client_that_makes_no_access_while_it_waits_is_answered_and_waits_once() {
    let flush_limit = Duration::from_millis(100);
    let server = serve(Options { flush_limit, ..Options::default() });
    let (mut client, mut guest) = (connect(&server), guest());
    ask_for_stores(&server.device, BASE, 1);
    let mut times = [(); 3].map(|()| {
        let start = Instant::now();
        client.region_read(0, 0, &mut [0; 4]).unwrap();
        start.elapsed()
    });
    assert!(server.device.state().answers.is_empty());
    assert!(times[0] >= flush_limit, "{times:?}");
    times[1..].sort_unstable();
    assert!(times[1] < flush_limit, "{times:?}");
    client.answer_dma(&mut guest, QUIET).unwrap();
    assert_eq!(server.device.state().answers, [(1, Answer::Stored)]);
    // One that turns out to make accesses while it waits after all, at an unmap, is waited for again.
    ask_for_stores(&server.device, BASE, 1);
    ask(&mut client, &mut guest, unmap(BASE)).unwrap();
    ask_for_stores(&server.device, BASE + 0x10000, 100);
    ask(&mut client, &mut guest, read()).unwrap();
    assert_eq!(guest.writes.len(), 102);
}

#[test]
fn commands_behind_a_held_answer_wait_in_order() {
    let server = serve(Options::default());
    let (mut client, mut guest) = (connect(&server), guest());
    ask_for_stores(&server.device, BASE, 1);
    let access = RegionAccess { offset: 8, region: 0, count: 4 };
    let write = [access.as_bytes(), &17_u32.to_le_bytes()].concat();
    let headers =
        [(0x100, Command::RegionRead), (0x101, Command::RegionWrite), (0x102, Command::RegionRead)].map(|(id, command)| {
            let body = if command == Command::RegionWrite { &write[..] } else { access.as_bytes() };
            let header = Header::command(id, command, body.len());
            client.send(&header, body, &[]).unwrap();
            header
        });
    std::thread::sleep(QUIET);
    assert_eq!(server.device.state().bar0[8], 0, "a command passed one whose reply is held");
    let (header, body) = client.next_request(DEADLINE).unwrap().expect("the store");
    client.answer(&header, &body, &mut guest).unwrap();
    for (header, expected) in headers.iter().zip([Some(0_u32), None, Some(17)]) {
        client.reply_to(header).unwrap();
        if let Some(value) = expected {
            assert_eq!(client.last_reply()[16..], value.to_le_bytes());
        }
    }
}

#[test]
fn after_a_reset_was_acknowledged_no_store_of_before_lands() {
    let server = serve(Options::default());
    let (mut client, mut guest) = (connect(&server), guest());
    ask_for_stores(&server.device, BASE, 100);
    ask(&mut client, &mut guest, (Command::DeviceReset, vec![])).unwrap();
    let landed = guest.writes.len();
    assert!(landed < 100, "what was not sent is given up");
    assert!(client.next_request(QUIET).unwrap().is_none(), "a store of before the reset came after it");
    let mut answers = server.device.state().answers.clone();
    assert_eq!((answers.len(), server.device.state().resets), (100, 1));
    answers.retain(|(_, answer)| *answer == Answer::Fault);
    assert!(answers.len() >= 100 - landed, "the device hears of each");
}

#[test]
fn a_reset_is_not_acknowledged_while_a_store_may_still_land() {
    let flush_limit = Duration::from_millis(100);
    let server = serve(Options { flush_limit, ..Options::default() });
    let (mut client, mut guest) = (connect(&server), guest());
    ask_for_stores(&server.device, BASE, 2);
    for _ in 0..2 {
        assert_eq!(errno(client.reset()), Errno::TIMEDOUT);
    }
    client.answer_dma(&mut guest, QUIET).unwrap();
    assert_eq!(guest.writes.len(), 2, "they did land");
    client.reset().unwrap();
    assert_eq!(server.device.state().resets, 3, "the device was reset each time");
}

#[test]
fn after_an_unmap_was_acknowledged_no_store_of_before_lands_in_its_range() {
    // A client that is too slow for its own deadline, too: the device was told of a fault, and the store may land for all that.
    for dma_deadline in [Duration::from_secs(5), QUIET / 2] {
        let server = serve(Options { dma_deadline, flush_limit: LONG, ..Options::default() });
        let (mut client, mut guest) = (connect(&server), guest());
        ask_for_stores(&server.device, BASE + 0xfffc, 1);
        std::thread::sleep(2 * dma_deadline.min(QUIET));
        // In the other range nothing is on its way.
        let start = Instant::now();
        client.dma_unmap(BASE + 0x10000, 0x10000, 0).unwrap();
        assert!(start.elapsed() < LONG, "it waited for what is no concern of it");
        ask(&mut client, &mut guest, unmap(BASE)).unwrap();
        assert_eq!(guest.writes, [(BASE + 0xfffc, 4)], "acknowledged while it could still land");
        assert!(client.next_request(QUIET).unwrap().is_none());
    }
}

#[test]
fn an_unmap_is_not_acknowledged_while_a_store_may_still_land() {
    let flush_limit = Duration::from_millis(100);
    let server = serve(Options { flush_limit, ..Options::default() });
    let (mut client, mut guest) = (connect(&server), guest());
    ask_for_stores(&server.device, BASE, 1);
    assert_eq!(errno(client.dma_unmap(BASE, 0x10000, 0)), Errno::TIMEDOUT);
    assert_eq!(server.device.state().windows.len(), 1, "the window is gone for all that");
    client.answer_dma(&mut guest, QUIET).unwrap();
    client.dma_map(BASE, 0x10000, 3, None).unwrap();
    client.dma_unmap(BASE, 0x10000, 0).unwrap();
}

/// As `serve`, with a whole function over the scripted device.
fn with_function(test: impl FnOnce(&mut Client, &Handle)) {
    let directory = tempfile::tempdir().unwrap();
    let mut server = Server::bind(directory.path().join("device.sock")).unwrap();
    let (path, stop) = (server.path().to_owned(), server.stop_handle());
    let (device, handle) = Lent::new();
    let options = FunctionOptions { interrupts: InterruptOwner::Client };
    let mut function = Function::new(Box::new(device), ClientInterrupts::new(&description()), options).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || server.serve(&mut function, &Options::default()).unwrap());
        let mut client = Client::open(path, DEADLINE).unwrap();
        client.dma_map(BASE, 0x20000, 3, None).unwrap();
        test(&mut client, &handle);
        stop.stop();
    });
}

#[test]
fn a_function_level_reset_gives_up_what_was_asked_of_the_client() {
    with_function(|client, device| {
        let mut config = |offset: u64, len: usize| {
            let mut bytes = vec![0; len];
            client.region_read(CONFIG_REGION, offset, &mut bytes).unwrap();
            bytes
        };
        let mut at = u64::from(config(0x34, 1)[0]);
        while config(at, 1)[0] != 0x10 {
            at = u64::from(config(at + 1, 1)[0]);
            assert_ne!(at, 0, "no PCI Express capability");
        }
        let mut guest = guest();
        ask_for_stores(device, BASE, 100);
        // Device control, bit 15: initiate function level reset (PCIe 5.0, section 7.5.3.4).
        let access = RegionAccess { offset: at + 8, region: CONFIG_REGION, count: 2 };
        let write = [access.as_bytes(), &0x8000_u16.to_le_bytes()].concat();
        ask(client, &mut guest, (Command::RegionWrite, write)).unwrap();
        assert_eq!(device.state().resets, 1);
        assert!(guest.writes.len() < 100, "what was not sent is given up");
        assert!(client.next_request(QUIET).unwrap().is_none(), "a store of before the reset came after it");
    });
}
