//! Whatever bytes a client sends, the server neither panics nor leaks a descriptor, and serves the next client.
//!
//! A client that sends 300 random bytes and five descriptors, or a valid map with one bit flipped, is followed by one that reads the device's
//! information as if nothing had happened.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod vfio_user_support;

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use farbus_pci_shim::vfio_user::Options;
use farbus_pci_shim::vfio_user::client::Client;
use farbus_pci_shim::vfio_user::wire::{Command, DmaMap, Header, IrqSet, RegionAccess};
use farbus_transport::Memory;
use proptest::prelude::*;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use vfio_user_support::{DEADLINE, Running, Step, serve};
use zerocopy::IntoBytes;

const VERSION: &[u8] = b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":16}}\0";

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn message(command: u16, body: &[u8]) -> Vec<u8> {
    let mut header = Header::command(7, Command::Version, body.len());
    header.command = command;
    [header.as_bytes(), body].concat()
}

/// One valid message of every command.
fn valid() -> Vec<Vec<u8>> {
    let map = DmaMap { argsz: 32, flags: 3, offset: 0, address: 0x10000, size: 0x1000 };
    let set = IrqSet { argsz: 20, flags: 0x24, index: 2, start: 0, count: 2 };
    let access = RegionAccess { offset: 0x1018, region: 0, count: 4 };
    let write = [access.as_bytes(), &[1, 2, 3, 4]].concat();
    let multi = [1_u64.as_bytes(), access.as_bytes(), &[1; 8]].concat();
    vec![
        message(1, VERSION),
        message(2, map.as_bytes()),
        message(3, [24_u64, 0x10000, 0x1000].as_bytes()),
        message(4, [16_u32, 0, 0, 0].as_bytes()),
        message(5, [32_u32, 0, 7, 0, 0, 0, 0, 0].as_bytes()),
        message(6, [16_u32, 0, 0, 0].as_bytes()),
        message(7, [16_u32, 0, 2, 0].as_bytes()),
        message(8, set.as_bytes()),
        message(9, access.as_bytes()),
        message(10, &write),
        message(11, [0x10000_u64, 4].as_bytes()),
        message(12, [0x10000_u64, 4, 0].as_bytes()),
        message(13, &[]),
        message(15, &multi),
        message(16, [64_u32, 1 | 1 << 16].as_bytes()),
        message(17, [64_u32, 8].as_bytes()),
        message(18, [64_u32, 0].as_bytes()),
    ]
}

fn send(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    // A server that closed meanwhile is one of its right answers.
    let _ = rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
}

/// What can be passed as a descriptor, right or wrong.
fn kinds() -> Vec<OwnedFd> {
    let memory = Memory::memfd("guest", 0x4000).unwrap();
    let mut fds = vec![memory.file().unwrap().0.try_clone_to_owned().unwrap()];
    fds.extend(vfio_user_support::eventfds(2));
    fds.push(std::fs::File::open("/dev/null").unwrap().into());
    fds.push(UnixStream::pair().unwrap().0.into());
    fds.push(std::fs::File::open("/proc/self/exe").unwrap().into());
    fds
}

fn misbehave(server: &Running, version_first: bool, pieces: &[(Vec<u8>, Vec<usize>)]) {
    let socket = UnixStream::connect(&server.path).unwrap();
    if version_first {
        send(&socket, &message(1, VERSION), &[]);
    }
    let kinds = kinds();
    for (bytes, fds) in pieces {
        let fds: Vec<_> = fds.iter().filter_map(|i| kinds.get(*i)).map(AsFd::as_fd).collect();
        if !bytes.is_empty() {
            send(&socket, bytes, &fds);
        }
    }
    server.device.play([
        Step::Raise(0),
        Step::Store { iova: 0x10000, bytes: vec![1; 8], polled: true },
        Step::Raise(1),
        Step::Fetch { iova: 0x10000, len: 8 },
    ]);
    // Read some of the answers, or none.
    let _ = socket.set_read_timeout(Some(Duration::from_millis(1)));
    let _ = std::io::Read::read(&mut &socket, &mut [0; 256]);
}

fn next_client_is_served(server: &Running) {
    let mut client = Client::open(&server.path, DEADLINE).unwrap();
    assert_eq!(client.device_info().unwrap().num_regions, 9);
    client.region_write(0, 0x1018, &[1, 2, 3, 4]).unwrap();
    let mut bytes = [0; 4];
    client.region_read(0, 0x1018, &mut bytes).unwrap();
    assert_eq!(bytes, [1, 2, 3, 4]);
    assert!(server.device.state().windows.is_empty());
}

fn mutated() -> impl Strategy<Value = Vec<u8>> {
    let messages = valid();
    let flips = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    (prop::sample::select(messages), flips, 0_usize..4, any::<bool>()).prop_map(|(mut bytes, flips, cut, keep_size)| {
        for (at, value) in flips {
            let at = at.index(bytes.len());
            // Most of the time the size stays right, so that what follows is understood as a message.
            if !(keep_size && (4..8).contains(&at)) {
                bytes[at] = value;
            }
        }
        if cut == 1 {
            let half = bytes.len() / 2;
            bytes.truncate(half);
        }
        bytes
    })
}

/// Descriptors once the last client's end was noticed: the same number for 200 ms.
fn settled_descriptors() -> usize {
    let (mut count, mut since) = (descriptors(), Instant::now());
    while since.elapsed() < Duration::from_millis(200) {
        std::thread::sleep(Duration::from_millis(1));
        let now = descriptors();
        if now != count {
            (count, since) = (now, Instant::now());
        }
    }
    count
}

#[test]
fn no_bytes_and_no_descriptors_keep_the_next_client_out() {
    let server = serve(Options { dma_deadline: Duration::from_millis(20), ..Options::default() });
    next_client_is_served(&server);
    let before = settled_descriptors();
    let fds = || proptest::collection::vec(0_usize..6, 0..5);
    let random = proptest::collection::vec(any::<u8>(), 1..400);
    let piece = prop_oneof![1 => (random, fds()), 6 => (mutated(), fds())];
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::default());
    runner
        .run(&(any::<bool>(), proptest::collection::vec(piece, 1..12)), |(version_first, pieces)| {
            misbehave(&server, version_first || pieces.len() > 4, &pieces);
            next_client_is_served(&server);
            Ok(())
        })
        .unwrap();
    // Specific ones: many descriptors, a descriptor with every byte, sizes at the edges, and a message that never ends.
    let map = valid().swap_remove(1);
    misbehave(&server, true, &[(map.clone(), vec![0; 30])]);
    let bytewise: Vec<_> = map.iter().map(|byte| (vec![*byte], vec![0, 1, 2])).collect();
    misbehave(&server, true, &bytewise);
    for size in [0_u32, 1, 15, 16, 17, 1 << 20, (1 << 20) + 33, u32::MAX] {
        let mut bytes = map.clone();
        bytes[4..8].copy_from_slice(size.as_bytes());
        misbehave(&server, true, &[(bytes, vec![0])]);
    }
    next_client_is_served(&server);
    // The last client's end is noticed in its own time.
    let start = Instant::now();
    while descriptors() != before {
        assert!(start.elapsed() < DEADLINE, "{} descriptors became {}", before, descriptors());
        std::thread::sleep(Duration::from_millis(1));
    }
}
