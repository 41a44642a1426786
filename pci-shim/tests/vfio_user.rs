//! The server as a client sees it: every command, the rules of maps, interrupts after the stores they announce, memory that is not shared.
//!
//! A client registers vector 3, the device asks for a store and raises 3: the eventfd stays silent until the client has answered the
//! `DMA_WRITE`, and is signalled right after.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a panic is how a test fails")]

mod vfio_user_support;

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use farbus_pci_shim::vfio_user::client::{Client, ClientError};
use farbus_pci_shim::vfio_user::wire::{
    CONFIG_REGION, Command, FEATURE_GET, FEATURE_PROBE, FEATURE_SET, INTX, IRQ_AUTOMASKED, IRQ_EVENTFD, IRQ_MASKABLE, MSI, MSIX,
    SET_ACTION_MASK, SET_ACTION_TRIGGER, SET_ACTION_UNMASK, SET_DATA_BOOL, SET_DATA_EVENTFD, SET_DATA_NONE, UNMAP_ALL,
};
use farbus_pci_shim::vfio_user::{BindError, Ended, OnGone, OnUnshared, Options, Server, serve_all};
use farbus_remote_dma::{InterruptMode, WindowMemory};
use farbus_transport::{CloseReason, Memory};
use rustix::io::Errno;
use vfio_user_support::{Answer, DEADLINE, Guest, Scripted, SharedGuest, Step, eventfds, serve, signals, wait_signal};
use zerocopy::IntoBytes;

const EVENTFD: u32 = SET_DATA_EVENTFD | SET_ACTION_TRIGGER;
const QUIET: Duration = Duration::from_millis(50);

fn errno<T: std::fmt::Debug>(result: Result<T, ClientError>) -> Errno {
    result.unwrap_err().errno().expect("a refusal")
}

#[test]
fn a_client_learns_what_the_device_is() {
    let server = serve(Options::default());
    let mut client = server.client();
    let info = client.device_info().unwrap();
    assert_eq!((info.flags, info.num_regions, info.num_irqs), (3, 9, 5));
    let sizes: Vec<_> = (0..9).map(|index| client.region_info(index).unwrap()).map(|info| (info.size, info.flags)).collect();
    let none = (0, 0);
    assert_eq!(sizes, [(16384, 3), none, (4096, 3), none, none, none, none, (4096, 3), none]);
    assert_eq!(errno(client.region_info(9)), Errno::INVAL);
    let irqs: Vec<_> = (0..5).map(|index| client.irq_info(index).unwrap()).map(|info| (info.count, info.flags)).collect();
    let message = IRQ_EVENTFD | IRQ_MASKABLE;
    assert_eq!(irqs, [(1, message | IRQ_AUTOMASKED), (4, message), (65, message), (1, IRQ_EVENTFD), (1, IRQ_EVENTFD)]);
    assert_eq!(errno(client.irq_info(5)), Errno::INVAL);
    let io_fds = client.request(Command::RegionIoFds, [16_u32, 0, 0, 0].as_bytes(), &[]).unwrap();
    assert_eq!(io_fds, [16_u32, 0, 0, 0].as_bytes());
}

#[test]
fn registers_are_read_and_written() {
    let server = serve(Options::default());
    let mut client = server.client();
    client.region_write(0, 0x1018, &17_u32.to_le_bytes()).unwrap();
    client.region_write_posted(0, 0x1020, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
    for (offset, expected) in
        [(0x1018, vec![17]), (0x1018, vec![17, 0]), (0x1020, vec![1, 2, 3, 4]), (0x1020, vec![1, 2, 3, 4, 5, 6, 7, 8])]
    {
        let mut bytes = vec![0; expected.len()];
        client.region_read(0, offset, &mut bytes).unwrap();
        assert_eq!(bytes, expected);
    }
    // A BAR takes single accesses only; configuration space any bytes.
    for (region, offset, len) in
        [(0, 0, 3), (0, 2, 4), (0, 16384, 1), (0, u64::MAX, 8), (1, 0, 4), (6, 0, 4), (8, 0, 1), (9, 0, 4), (7, 4093, 4)]
    {
        assert_eq!(errno(client.region_read(region, offset, &mut vec![0; len])), Errno::INVAL, "{region} {offset:#x} {len}");
        assert_eq!(errno(client.region_write(region, offset, &vec![0; len])), Errno::INVAL, "{region} {offset:#x} {len}");
    }
    let mut config = vec![0; 4096];
    client.region_read(CONFIG_REGION, 0, &mut config).unwrap();
    assert!(config.iter().enumerate().all(|(i, byte)| *byte == (i % 251) as u8));
    client.region_write(CONFIG_REGION, 0x41, &[9, 8, 7]).unwrap();
    assert_eq!(server.device.state().config[0x40..0x45], [0x40, 9, 8, 7, 0x44]);
}

#[test]
fn short_writes_are_done_in_order_up_to_the_first_that_cannot() {
    let server = serve(Options::default());
    let mut client = server.client();
    let write = |offset: u64, region: u32, count: u32, value: u64| {
        [offset.as_bytes(), region.as_bytes(), count.as_bytes(), value.as_bytes()].concat()
    };
    let good = [2_u64.as_bytes(), &write(8, 0, 4, 5), &write(8, 0, 2, 6)].concat();
    assert_eq!(client.request(Command::RegionWriteMulti, &good, &[]).unwrap(), 2_u64.as_bytes());
    let half = [3_u64.as_bytes(), &write(16, 0, 8, 7), &write(17, 0, 4, 8), &write(24, 0, 4, 9)].concat();
    assert_eq!(client.request(Command::RegionWriteMulti, &half, &[]).unwrap(), 1_u64.as_bytes());
    assert_eq!(
        errno(client.request(Command::RegionWriteMulti, &[1_u64.as_bytes(), &write(8, 0, 9, 1)].concat(), &[])),
        Errno::INVAL
    );
    assert_eq!(errno(client.request(Command::RegionWriteMulti, u64::MAX.as_bytes(), &[])), Errno::INVAL);
    let state = server.device.state();
    assert_eq!((state.bar0[8], state.bar0[16], state.bar0[24]), (6, 7, 0));
}

#[test]
fn features_that_are_absent_are_refused_as_the_kernel_refuses_them() {
    let server = serve(Options::default());
    let mut client = server.client();
    let mut feature = |flags: u32| errno(client.request(Command::DeviceFeature, [64_u32, flags].as_bytes(), &[]));
    for index in [1, 2, 6, 7, 8, 99] {
        assert_eq!(feature(index | FEATURE_GET), Errno::NOTTY);
        assert_eq!(feature(index | FEATURE_PROBE | FEATURE_GET | FEATURE_SET), Errno::NOTTY);
        assert_eq!(feature(index | FEATURE_GET | FEATURE_SET), Errno::INVAL);
        assert_eq!(feature(index), Errno::INVAL);
    }
    assert_eq!(errno(client.request(Command::MigrationRead, [64_u32, 8].as_bytes(), &[])), Errno::NOTTY);
    assert_eq!(errno(client.request(Command::MigrationWrite, [64_u32, 1, 0].as_bytes(), &[])), Errno::INVAL);
}

#[test]
fn the_next_client_finds_a_reset_device_and_no_maps() {
    let server = serve(Options::default());
    let mut client = server.client();
    client.dma_map(0x10000, 0x1000, 3, None).unwrap();
    client.region_write(0, 8, &[1; 4]).unwrap();
    client.reset().unwrap();
    assert_eq!(server.device.state().resets, 1);
    client.region_write(0, 8, &[1; 4]).unwrap();
    drop(client);
    let mut client = server.client();
    let mut byte = [9];
    client.region_read(0, 8, &mut byte).unwrap();
    assert_eq!(byte, [0]);
    assert_eq!(server.device.state().resets, 2);
    assert!(server.device.state().windows.is_empty());
}

#[test]
fn maps_follow_the_rules() {
    let server = serve(Options::default());
    let mut client = server.client();
    let memory = Memory::memfd("guest", 0x10000).unwrap();
    let fd = memory.file().unwrap().0;
    client.dma_map(0x10000, 0x4000, 3, Some((fd, 0))).unwrap();
    for (address, size) in [(0x10000, 0x4000), (0x13000, 0x1000), (0xf000, 0x2000), (0, 0x100000), (0x12000, 0x8000)] {
        assert_eq!(errno(client.dma_map(address, size, 3, None)), Errno::EXIST, "{address:#x}");
    }
    for (address, size, flags, offset) in [
        (0x20000, 0, 3, 0),
        (0x20000, 0x800, 3, 0),
        (0x20800, 0x1000, 3, 0),
        (u64::MAX - 0xfff, 0x1000, 3, 0),
        (u64::MAX - 0xfff, 0x2000, 3, 0),
        (0x20000, 0x1000, 0, 0),
        (0x20000, 0x1000, 4, 0),
        (0x20000, 0x1000, 3, 0x800),
        (0x20000, 0x1000, 3, 0x10000),
        (0x20000, 0x1000, 3, u64::MAX - 0xfff),
    ] {
        assert_eq!(errno(client.dma_map(address, size, flags, Some((fd, offset)))), Errno::INVAL, "{address:#x} {size:#x}");
    }
    assert_eq!(server.device.state().windows.len(), 1);
    // A part of a window cannot be taken; what was never mapped can.
    assert_eq!(errno(client.dma_unmap(0x10000, 0x1000, 0)), Errno::INVAL);
    assert_eq!(errno(client.dma_unmap(0x13000, 0x10000, 0)), Errno::INVAL);
    assert_eq!(errno(client.dma_unmap(0x11000, 0x1000, 0)), Errno::INVAL);
    client.dma_unmap(0x40000, 0x1000, 0).unwrap();
    assert_eq!(errno(client.dma_unmap(0x10000, 0x4000, 1)), Errno::OPNOTSUPP);
    assert_eq!(errno(client.dma_unmap(0x10000, 0x4000, UNMAP_ALL)), Errno::INVAL);
    // Several whole windows at once.
    client.dma_map(0x14000, 0x1000, 1, None).unwrap();
    client.dma_unmap(0x10000, 0x8000, 0).unwrap();
    assert!(server.device.state().windows.is_empty());
    client.dma_map(0x14000, 0x1000, 1, None).unwrap();
    client.dma_map(0x18000, 0x1000, 1, None).unwrap();
    client.dma_unmap(0, 0, UNMAP_ALL).unwrap();
    assert!(server.device.state().windows.is_empty());
}

#[test]
fn a_thousand_windows_into_one_file_are_one_mapping() {
    let server = serve(Options::default());
    let mut client = server.client();
    let memory = Memory::memfd("guest", 1000 * 4096).unwrap();
    for i in 0..1000 {
        client.dma_map(i * 0x2000, 0x1000, 3, Some((memory.file().unwrap().0, i * 4096))).unwrap();
    }
    let state = server.device.state();
    assert_eq!((state.windows.len(), state.most_mappings), (1000, 1));
    let WindowMemory::Mapped { offset, proven, .. } = &state.windows[999].memory else { panic!("mediated") };
    assert_eq!((*offset, *proven), (999 * 4096, false));
}

#[test]
fn a_file_that_the_devices_side_refuses_is_reached_by_messages_and_not_offered_again() {
    let server = serve(Options::default());
    server.device.state().refuses_files = true;
    let mut client = server.client();
    let memory = Memory::memfd("guest", 0x4000).unwrap();
    for page in 0..4 {
        client.dma_map(page * 0x2000, 0x1000, 3, Some((memory.file().unwrap().0, page * 0x1000))).unwrap();
    }
    let state = server.device.state();
    assert_eq!((state.windows.len(), state.refused), (4, 1));
    assert!(state.windows.iter().all(|window| matches!(window.memory, WindowMemory::Mediated)));
    drop(state);
    // With its last window what was known of it is forgotten.
    client.dma_unmap(0, 0, UNMAP_ALL).unwrap();
    server.device.state().refuses_files = false;
    client.dma_map(0, 0x1000, 3, Some((memory.file().unwrap().0, 0))).unwrap();
    assert!(matches!(server.device.state().windows[0].memory, WindowMemory::Mapped { .. }));
}

#[test]
fn a_file_that_grew_is_mapped_anew() {
    let server = serve(Options::default());
    let mut client = server.client();
    let file = tempfile::tempfile().unwrap();
    file.set_len(0x1000).unwrap();
    client.dma_map(0, 0x1000, 3, Some((file.as_fd(), 0))).unwrap();
    assert_eq!(errno(client.dma_map(0x1000, 0x1000, 3, Some((file.as_fd(), 0x1000)))), Errno::INVAL);
    file.set_len(0x2000).unwrap();
    client.dma_map(0x1000, 0x1000, 3, Some((file.as_fd(), 0x1000))).unwrap();
    assert_eq!(server.device.state().most_mappings, 2);
}

#[test]
fn memory_without_a_descriptor_is_reached_by_messages() {
    let server = serve(Options::default());
    let mut client = server.client();
    client.dma_map(0x10000, 0x2000, 3, None).unwrap();
    let mut guest = Guest::new(0x10000, 0x2000);
    guest.bytes[0x40..0x80].fill(7);
    server.device.play([
        Step::Fetch { iova: 0x10040, len: 64 },
        Step::Store { iova: 0x11000, bytes: vec![1; 4096], polled: false },
        Step::Store { iova: 0x10000, bytes: (0..16).collect(), polled: true },
        Step::Fetch { iova: 0x90000, len: 4 },
    ]);
    let start = std::time::Instant::now();
    while server.device.state().answers.len() < 4 {
        client.answer_dma(&mut guest, QUIET).unwrap();
        assert!(start.elapsed() < DEADLINE);
    }
    let mut answers = server.device.state().answers.clone();
    answers.sort_by_key(|(ticket, _)| *ticket);
    let expected = [Answer::Fetched(vec![7; 64]), Answer::Stored, Answer::Stored, Answer::Fault];
    assert_eq!(answers.into_iter().map(|(_, answer)| answer).collect::<Vec<_>>(), expected);
    assert_eq!(guest.bytes[0x1000..0x2000], [1; 4096]);
    assert_eq!(guest.bytes[..16], (0..16).collect::<Vec<u8>>());
    // The word that a guest polls is the last to be written.
    assert_eq!(guest.writes, [(0x11000, 4096), (0x10000, 12), (0x1000c, 4)]);
}

#[test]
fn a_completion_entry_never_overtakes_the_data_it_announces() {
    let server = serve(Options::default());
    let mut client = server.client();
    client.dma_map(0x10000, 0x2000, 3, None).unwrap();
    server.device.play([
        Step::Store { iova: 0x10000, bytes: vec![1; 512], polled: false },
        Step::Store { iova: 0x10200, bytes: vec![2; 512], polled: false },
        Step::Store { iova: 0x11000, bytes: vec![3; 16], polled: true },
    ]);
    // Both data stores are out at once; the entry is not.
    let first = client.next_request(DEADLINE).unwrap().unwrap();
    let second = client.next_request(DEADLINE).unwrap().unwrap();
    assert!(client.next_request(QUIET).unwrap().is_none());
    let mut guest = Guest::new(0x10000, 0x2000);
    // A client may answer in any order.
    client.answer(&second.0, &second.1, &mut guest).unwrap();
    assert!(client.next_request(QUIET).unwrap().is_none());
    client.answer(&first.0, &first.1, &mut guest).unwrap();
    client.answer_dma(&mut guest, QUIET).unwrap();
    assert_eq!(guest.writes, [(0x10200, 512), (0x10000, 512), (0x11000, 12), (0x1100c, 4)]);
}

#[test]
fn an_interrupt_is_not_signalled_before_the_stores_it_announces() {
    let server = serve(Options::default());
    let mut client = server.client();
    client.dma_map(0x10000, 0x1000, 3, None).unwrap();
    let fds = eventfds(2);
    client.set_irqs(MSIX, EVENTFD, 0, 1, &[], &[]).unwrap();
    client.set_irqs(MSIX, EVENTFD, 0, 2, &[], &[fds[0].as_fd(), fds[1].as_fd()]).unwrap();
    assert_eq!(server.device.state().modes, [InterruptMode::Msix]);
    server.device.play([Step::Raise(0)]);
    wait_signal(&fds[0]);
    server.device.play([Step::Store { iova: 0x10000, bytes: vec![1; 4], polled: false }, Step::Raise(1)]);
    let (header, body) = client.next_request(DEADLINE).unwrap().unwrap();
    std::thread::sleep(QUIET);
    assert_eq!(signals(&fds[1]), 0, "before its data");
    client.answer(&header, &body, &mut Guest::new(0x10000, 0x1000)).unwrap();
    wait_signal(&fds[1]);
}

#[test]
fn twin_without_holding_interrupts_back_one_overtakes_its_data() {
    let server = serve(Options::default());
    server.device.state().claims_order = true;
    let mut client = server.client();
    client.dma_map(0x10000, 0x1000, 3, None).unwrap();
    let fds = eventfds(1);
    client.set_irqs(MSIX, EVENTFD, 0, 1, &[], &[fds[0].as_fd()]).unwrap();
    server.device.play([Step::Store { iova: 0x10000, bytes: vec![1; 4], polled: false }, Step::Raise(0)]);
    // Nothing has been answered, and the guest is told already.
    wait_signal(&fds[0]);
    assert!(server.device.state().answers.is_empty());
}

#[test]
fn twin_an_entry_not_marked_as_polled_is_out_before_its_data_is_answered() {
    let server = serve(Options::default());
    let mut client = server.client();
    client.dma_map(0x10000, 0x2000, 3, None).unwrap();
    server.device.play([
        Step::Store { iova: 0x10000, bytes: vec![1; 512], polled: false },
        Step::Store { iova: 0x11000, bytes: vec![3; 16], polled: false },
    ]);
    client.next_request(DEADLINE).unwrap().unwrap();
    assert!(client.next_request(DEADLINE).unwrap().is_some());
}

#[test]
fn accesses_to_the_same_bytes_keep_their_order() {
    let server = serve(Options::default());
    let mut client = server.client();
    client.dma_map(0x10000, 0x2000, 3, None).unwrap();
    server.device.play([
        Step::Store { iova: 0x10000, bytes: vec![1; 64], polled: false },
        Step::Store { iova: 0x1003c, bytes: vec![2; 8], polled: false },
        Step::Fetch { iova: 0x10000, len: 128 },
    ]);
    let mut guest = Guest::new(0x10000, 0x1000);
    for _ in 0..3 {
        let (header, body) = client.next_request(DEADLINE).unwrap().unwrap();
        assert!(client.next_request(QUIET).unwrap().is_none(), "one at a time");
        client.answer(&header, &body, &mut guest).unwrap();
    }
    server.device.wait("the fetch", |state| state.answers.len() == 3);
    let expected = [[1; 60].as_slice(), &[2; 8], &[0; 60]].concat();
    assert_eq!(server.device.state().answers[2].1, Answer::Fetched(expected));
}

#[test]
fn a_client_that_never_reads_is_not_read_from_for_ever_and_can_be_stopped() {
    let mut server = serve(Options::default());
    let client = server.client();
    let socket = client.socket().try_clone_to_owned().unwrap();
    let access = [0_u64, 4096 << 32 | 7].as_bytes().to_vec();
    let header = farbus_pci_shim::vfio_user::wire::Header::command(1, Command::RegionRead, 16);
    let message = [header.as_bytes(), &access].concat().repeat(64);
    // Replies are 128 times as long as the questions: the server must stop asking the kernel for more.
    let mut sent = 0;
    let start = std::time::Instant::now();
    while start.elapsed() < Duration::from_millis(300) {
        if let Ok(bytes) = rustix::net::send(&socket, &message, rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL)
        {
            sent += bytes;
        } else {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    assert!(sent < 4 << 20, "{sent} bytes of questions were taken");
    server.stop.stop();
    assert_eq!(server.end(), Ended::Stopped);
}

#[test]
fn a_client_that_does_not_answer_makes_faults_not_hangs() {
    let server = serve(Options { dma_deadline: Duration::from_millis(100), ..Options::default() });
    let mut client = server.client();
    client.dma_map(0x10000, 0x1000, 3, None).unwrap();
    let fds = eventfds(1);
    client.set_irqs(MSIX, EVENTFD, 0, 1, &[], &[fds[0].as_fd()]).unwrap();
    server.device.play([Step::Store { iova: 0x10000, bytes: vec![1; 4], polled: false }, Step::Raise(0)]);
    wait_signal(&fds[0]);
    assert_eq!(server.device.state().answers, [(1, Answer::Fault)]);
    // The answer comes after all: it is nobody's.
    client.answer_dma(&mut Guest::new(0x10000, 0x1000), QUIET).unwrap();
    client.region_read(0, 0, &mut [0; 4]).unwrap();
    // A reset and an unmap fault what is outstanding, at once.
    server.device.play([Step::Fetch { iova: 0x10000, len: 4 }]);
    client.next_request(DEADLINE).unwrap().unwrap();
    client.reset().unwrap();
    server.device.play([Step::Fetch { iova: 0x10000, len: 4 }]);
    client.next_request(DEADLINE).unwrap().unwrap();
    client.dma_unmap(0x10000, 0x1000, 0).unwrap();
    let faults = server.device.state().answers.iter().filter(|(_, answer)| *answer == Answer::Fault).count();
    assert_eq!(faults, 3);
}

#[test]
fn masks_and_levels_work_over_the_socket() {
    let server = serve(Options::default());
    let mut client = server.client();
    let fds = eventfds(5);
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    client.set_irqs(INTX, EVENTFD, 0, 1, &[], &borrowed[4..]).unwrap();
    server.device.play([Step::Pin(true)]);
    wait_signal(&fds[4]);
    client.set_irqs(INTX, SET_DATA_NONE | SET_ACTION_UNMASK, 0, 1, &[], &[]).unwrap();
    assert_eq!(signals(&fds[4]), 1, "still asserted");
    client.set_irqs(INTX, SET_DATA_NONE | SET_ACTION_TRIGGER, 0, 0, &[], &[]).unwrap();
    client.set_irqs(MSI, EVENTFD, 0, 4, &[], &borrowed[..4]).unwrap();
    client.set_irqs(MSI, SET_DATA_BOOL | SET_ACTION_MASK, 0, 2, &[0, 1], &[]).unwrap();
    server.device.play([Step::Raise(1), Step::Raise(2)]);
    wait_signal(&fds[2]);
    assert_eq!(signals(&fds[1]), 0);
    client.set_irqs(MSI, SET_DATA_NONE | SET_ACTION_UNMASK, 0, 4, &[], &[]).unwrap();
    assert_eq!(signals(&fds[1]), 1);
    // A client can raise an interrupt itself.
    client.set_irqs(MSI, SET_DATA_BOOL | SET_ACTION_TRIGGER, 0, 4, &[1, 0, 0, 1], &[]).unwrap();
    assert_eq!(fds.iter().map(signals).collect::<Vec<_>>(), [1, 0, 0, 1, 0]);
    assert_eq!(server.device.state().modes, [InterruptMode::Msi(4)]);
    assert_eq!(errno(client.set_irqs(MSI, EVENTFD, 3, 2, &[], &borrowed[..2])), Errno::INVAL);
    assert_eq!(errno(client.set_irqs(MSI, EVENTFD, 0, 3, &[], &borrowed[..2])), Errno::INVAL);
    assert_eq!(errno(client.set_irqs(3, SET_DATA_NONE | SET_ACTION_MASK, 0, 1, &[], &[])), Errno::NOTTY);
}

/// Plays stores until the server has made up its mind, with a guest that has what `guest` has.
fn settle(
    server: &vfio_user_support::Running,
    client: &mut Client,
    guest: &mut dyn farbus_pci_shim::vfio_user::client::ClientMemory,
) {
    for round in 1..=3_u8 {
        server
            .device
            .play([Step::Fetch { iova: 0x10000, len: 64 }, Step::Store { iova: 0x10100, bytes: vec![round; 64], polled: false }]);
        if client.answer_dma(guest, QUIET).is_err() {
            return;
        }
    }
}

#[test]
fn shared_memory_is_proven_by_a_store_that_shows_up() {
    let server = serve(Options::default());
    let mut client = server.client();
    let memory = Memory::memfd("guest", 0x2000).unwrap();
    client.dma_map(0x10000, 0x2000, 3, Some((memory.file().unwrap().0, 0))).unwrap();
    let mut guest = SharedGuest { base: 0x10000, memory: memory.clone() };
    memory.write(0, b"a queue entry").unwrap();
    // Equal bytes alone prove nothing.
    server.device.play([Step::Fetch { iova: 0x10000, len: 64 }]);
    client.answer_dma(&mut guest, QUIET).unwrap();
    assert_eq!(server.device.state().proven, 0);
    settle(&server, &mut client, &mut guest);
    assert_eq!(server.device.state().proven, 1);
    // A later window of the same file is proven from the start.
    client.dma_map(0x20000, 0x1000, 3, Some((memory.file().unwrap().0, 0x1000))).unwrap();
    let state = server.device.state();
    assert!(matches!(state.windows.last().map(|window| &window.memory), Some(WindowMemory::Mapped { proven: true, .. })));
}

#[test]
fn memory_that_is_not_shared_is_never_proven() {
    // share=off: the descriptor's file is a template that the guest's private memory began as.
    let template = Memory::memfd("template", 0x2000).unwrap();
    template.write(0, &[5; 0x2000]).unwrap();
    let mut private = Guest::new(0x10000, 0x2000);
    private.bytes.fill(5);
    let server = serve(Options::default());
    let mut client = server.client();
    client.dma_map(0x10000, 0x2000, 3, Some((template.file().unwrap().0, 0))).unwrap();
    settle(&server, &mut client, &mut private);
    assert_eq!(server.device.state().proven, 0);
    assert!(server.device.state().answers.iter().all(|(_, answer)| *answer != Answer::Fault));
    // Known not to be shared: the next window of it is reached by messages from the start, and the file was never written by us.
    client.dma_map(0x20000, 0x1000, 3, Some((template.file().unwrap().0, 0))).unwrap();
    assert!(matches!(server.device.state().windows.last().unwrap().memory, WindowMemory::Mediated));
    let mut bytes = [0; 0x2000];
    template.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [5; 0x2000]);
}

#[test]
fn memory_that_is_not_shared_can_be_refused() {
    let server = serve(Options { on_unshared: OnUnshared::Refuse, ..Options::default() });
    let mut client = server.client();
    let template = Memory::memfd("template", 0x2000).unwrap();
    client.dma_map(0x10000, 0x2000, 3, Some((template.file().unwrap().0, 0))).unwrap();
    let mut private = Guest::new(0x10000, 0x2000);
    private.bytes.fill(5);
    settle(&server, &mut client, &mut private);
    assert!(matches!(client.device_info(), Err(ClientError::Closed | ClientError::Io(_))));
    drop(client);
    server.client().device_info().unwrap();
    assert_eq!(server.device.state().proven, 0);
}

#[test]
fn a_guest_that_writes_meanwhile_does_not_look_unshared() {
    let server = serve(Options { on_unshared: OnUnshared::Refuse, ..Options::default() });
    let mut client = server.client();
    let memory = Memory::memfd("guest", 0x2000).unwrap();
    client.dma_map(0x10000, 0x2000, 3, Some((memory.file().unwrap().0, 0))).unwrap();
    let mut guest = SharedGuest { base: 0x10000, memory: memory.clone() };
    for round in 0..40_u8 {
        server.device.play([Step::Fetch { iova: 0x10000, len: 64 }]);
        while let Some((header, body)) = client.next_request(Duration::from_millis(5)).unwrap() {
            // Before and after the client looks, the guest writes.
            memory.write(0, &[round; 64]).unwrap();
            client.answer(&header, &body, &mut guest).unwrap();
            memory.write(0, &[round + 1; 64]).unwrap();
        }
    }
    client.device_info().unwrap();
}

#[test]
fn two_devices_live_in_one_process() {
    let directory = tempfile::tempdir().unwrap();
    let paths = [directory.path().join("a"), directory.path().join("b")];
    let servers: Vec<_> = paths.iter().map(|path| Server::bind(path).unwrap()).collect();
    let stops: Vec<_> = servers.iter().map(Server::stop_handle).collect();
    let devices = [Scripted::new(), Scripted::new()];
    let handles: Vec<_> = devices.iter().map(|(_, handle)| handle.clone()).collect();
    let pairs: Vec<_> = servers.into_iter().zip(devices.into_iter().map(|(device, _)| device)).collect();
    let all = std::thread::spawn(move || serve_all(pairs, &Options::default()));
    let mut clients: Vec<_> = paths.iter().map(|path| Client::open(path, DEADLINE).unwrap()).collect();
    for (i, client) in clients.iter_mut().enumerate() {
        client.region_write(0, 0, &[i as u8 + 1]).unwrap();
    }
    assert_eq!((handles[0].state().bar0[0], handles[1].state().bar0[0]), (1, 2));
    stops[0].stop();
    handles[1].go(CloseReason::PeerGone);
    let mut bytes = [0; 4];
    clients[1].region_read(0, 0, &mut bytes).unwrap();
    assert_eq!(bytes, [0xff; 4], "an empty slot");
    drop(clients);
    let ended: Vec<_> = all.join().unwrap().into_iter().map(Result::unwrap).collect();
    assert_eq!(ended, [Ended::Stopped, Ended::DeviceGone(CloseReason::PeerGone)]);
    assert!(paths.iter().all(|path| !path.exists()));
}

#[test]
fn a_server_can_end_with_its_device() {
    let mut server = serve(Options { on_gone: OnGone::End, ..Options::default() });
    let _client = server.client();
    server.device.go(CloseReason::PeerClosed);
    assert_eq!(server.end(), Ended::DeviceGone(CloseReason::PeerClosed));
}

#[test]
fn a_path_is_taken_over_only_from_the_dead() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("device.sock");
    drop(UnixListener::bind(&path).unwrap());
    let server = Server::bind(&path).unwrap();
    assert!(matches!(Server::bind(&path), Err(BindError::InUse(_))));
    drop(server);
    assert!(!path.exists());
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(Server::bind(&path), Err(BindError::NotASocket(_))));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    assert!(matches!(Server::bind(directory.path().join("absent/x")), Err(BindError::Host { .. })));
    let long = directory.path().join("x".repeat(200));
    assert!(matches!(Server::bind(long), Err(BindError::Host { .. })));
}

#[test]
fn silence_before_version_does_not_keep_others_out() {
    let server = serve(Options { version_deadline: Duration::from_millis(100), ..Options::default() });
    let _silent = Client::connect(&server.path, DEADLINE).unwrap();
    server.client().device_info().unwrap();
}

#[test]
fn a_client_that_takes_100_bytes_a_message_is_served_in_pieces() {
    let server = serve(Options::default());
    let mut client = Client::connect(&server.path, DEADLINE).unwrap();
    let (minor, text) = client.version(0, 0, b"{\"capabilities\":{\"max_data_xfer_size\":100}}\0").unwrap();
    assert_eq!(minor, 0);
    assert_eq!(text, b"{\"capabilities\":{\"max_data_xfer_size\":1048576}}\0");
    client.dma_map(0x10000, 0x1000, 3, None).unwrap();
    let mut guest = Guest::new(0x10000, 0x1000);
    guest.bytes.iter_mut().enumerate().for_each(|(i, byte)| *byte = i as u8);
    server
        .device
        .play([Step::Fetch { iova: 0x10000, len: 4096 }, Step::Store { iova: 0x10000, bytes: vec![9; 250], polled: true }]);
    let start = std::time::Instant::now();
    while server.device.state().answers.len() < 2 {
        client.answer_dma(&mut guest, Duration::from_millis(5)).unwrap();
        assert!(start.elapsed() < DEADLINE);
    }
    let whole: Vec<u8> = (0..4096).map(|i| i as u8).collect();
    assert_eq!(server.device.state().answers[0].1, Answer::Fetched(whole));
    assert_eq!(guest.writes, [(0x10000, 100), (0x10064, 100), (0x100c8, 46), (0x100f6, 4)]);
}

#[test]
fn maps_and_unmaps_follow_a_model_of_pages() {
    use proptest::prelude::*;
    let server = serve(Options::default());
    let memory = Memory::memfd("guest", 16 << 12).unwrap();
    let steps = proptest::collection::vec((any::<bool>(), 0_u64..12, 1_u64..5, any::<bool>()), 1..40);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(200));
    runner
        .run(&steps, |steps| {
            let mut client = server.client();
            let mut model: Vec<(u64, u64)> = vec![];
            for (map, first, pages, shared) in steps {
                let (start, end) = (first << 12, (first + pages) << 12);
                let touches = |(a, b): &(u64, u64)| *a < end && start < *b;
                let within = |(a, b): &(u64, u64)| start <= *a && *b <= end;
                let expected = if map {
                    (!model.iter().any(touches)).then_some(()).ok_or(Errno::EXIST)
                } else {
                    model.iter().filter(|w| touches(w)).all(within).then_some(()).ok_or(Errno::INVAL)
                };
                let backing = shared.then(|| (memory.file().unwrap().0, start));
                let answered =
                    if map { client.dma_map(start, end - start, 3, backing) } else { client.dma_unmap(start, end - start, 0) };
                prop_assert_eq!(answered.map_err(|error| error.errno().unwrap()), expected);
                if expected.is_ok() {
                    model.retain(|window| !within(window));
                    model.extend(map.then_some((start, end)));
                }
                let mut windows: Vec<_> = server.device.state().windows.iter().map(|w| (w.iova.0, w.iova.0 + w.len)).collect();
                windows.sort_unstable();
                model.sort_unstable();
                prop_assert_eq!(&windows, &model);
            }
            Ok(())
        })
        .unwrap();
}
