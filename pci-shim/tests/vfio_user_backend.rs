//! The backend over any vfio-user server, against one that the test plays: accesses, interrupts behind the stores they announce, resets, and nonsense.
//!
//! The server asks for a store of 16 bytes, signals vector 3 and answers a register read, all before the backend looks: the guest sees the store, then
//! the vector, then the value.
mod vfio_user_backend_support;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use farbus_pci_shim::vfio_user::BackendOptions;
use farbus_pci_shim::vfio_user::wire::{Command, DmaMap, IrqSet, RegionAccess, SET_ACTION_UNMASK, SET_DATA_NONE};
use farbus_remote_dma::{Backend, BarAddress, Iova, ReadTicket, ResetKind, Width};
use farbus_transport::{Access, Memory};
use vfio_user_backend_support::*;
use zerocopy::{FromBytes, IntoBytes};

#[test]
fn writes_are_not_waited_for_and_reads_are_answered_later() {
    let (mut backend, mut server, mut bus) = lent();
    for i in 0..100_u64 {
        backend.bar_write(at(i * 4), Width::B4, i, &mut bus);
    }
    assert_eq!(backend.bar_read_later(ReadTicket(7), at(0x1c), Width::B4, &mut bus), None);
    backend.poll(&mut bus);
    assert_eq!(backend.next_read(), None);
    let mut questions: Vec<_> = (0..101).map(|_| server.next(DEADLINE).unwrap()).collect();
    for (i, got) in questions.iter().take(100).enumerate() {
        let access = RegionAccess { offset: i as u64 * 4, region: 0, count: 4 };
        assert!(got.is(Command::RegionWrite) && got.body == [access.as_bytes(), &(i as u32).to_le_bytes()].concat());
    }
    // Replies come in any order.
    questions.reverse();
    questions.iter().for_each(|got| server.acknowledge(got));
    assert_eq!(value(&mut backend, &mut bus), (ReadTicket(7), 0x1c));
    server.answer_all(&mut backend, &mut bus);
    assert_eq!(backend.gone(), None);
    // Behind the region's end, and in a bar that is not there, nobody is asked.
    assert_eq!(backend.bar_read_later(ReadTicket(8), at(16 << 10), Width::B4, &mut bus), Some(0xffff_ffff));
    assert_eq!(backend.bar_read_later(ReadTicket(8), BarAddress { bar: 3, offset: 0 }, Width::B8, &mut bus), Some(u64::MAX));
    assert!(server.next(Duration::from_millis(5)).is_none());
}

#[test]
fn a_read_that_is_waited_for_serves_dma_meanwhile() {
    let (mut backend, mut server, mut bus) = lent();
    bus.guest.write(0x500, b"command").unwrap();
    let player = std::thread::spawn(move || {
        let read = server.expect(Command::RegionRead);
        let id = server.request(Command::DmaRead, BASE + 0x500, 7, &[]);
        let got = server.expect(Command::DmaRead);
        assert!(got.header.is_reply() && got.header.message_id == id && got.body.ends_with(b"command"));
        server.acknowledge(&read);
        server
    });
    assert_eq!(backend.bar_read(at(0x14), Width::B4, &mut bus), 0x14);
    drop(player.join().unwrap());
}

#[test]
fn the_guest_sees_store_then_vector_then_value() {
    let (mut backend, mut server, mut bus) = lent();
    let vectors = msix(&mut backend, &mut server, &mut bus);
    assert_eq!(vectors.len(), 20);
    backend.bar_read_later(ReadTicket(1), at(0x1c), Width::B4, &mut bus);
    let read = server.expect(Command::RegionRead);
    bus.seen.clear();
    let data = vec![7; 4096];
    server.request(Command::DmaWrite, BASE + 0x2000, 4096, &data);
    server.request(Command::DmaWrite, BASE + 0x1000, 16, &[9; 16]);
    signal(&vectors[3]);
    server.acknowledge(&read);
    // Found in whatever order it looks.
    assert_eq!(value(&mut backend, &mut bus), (ReadTicket(1), 0x1c));
    let expected = [
        Seen::Write(BASE + 0x2000, 4064),
        Seen::Polled(BASE + 0x2000 + 4064, 32),
        Seen::Polled(BASE + 0x1000, 16),
        Seen::Interrupt(3),
    ];
    assert_eq!(bus.seen, expected);
    assert_eq!(bus.read(BASE + 0x2000, 4096), data);
    for _ in 0..2 {
        assert!(!refused(&server.expect(Command::DmaWrite)));
    }
}

#[test]
fn a_level_is_asked_for_again_after_each_access() {
    let mut bus = TestBus::new();
    let (backend, mut server) = open(Facts::default(), BackendOptions::default());
    let mut backend = backend.unwrap();
    backend.attach(&mut bus).unwrap();
    let pins: Vec<OwnedFd> = server.answer_all(&mut backend, &mut bus).into_iter().flat_map(|got| got.fds).collect();
    let [pin] = &pins[..] else { panic!("one eventfd for INTx, not {}", pins.len()) };
    signal(pin);
    backend.poll(&mut bus);
    backend.poll(&mut bus);
    assert_eq!(bus.seen, [Seen::Pin(true)]);
    backend.bar_write(at(0x64), Width::B4, 1, &mut bus);
    assert_eq!(bus.seen, [Seen::Pin(true), Seen::Pin(false)]);
    server.expect(Command::RegionWrite);
    let (set, _) = IrqSet::read_from_prefix(&server.expect(Command::SetIrqs).body).unwrap();
    assert_eq!((set.flags, set.index, set.count), (SET_DATA_NONE | SET_ACTION_UNMASK, 0, 1));
    // It stands still.
    signal(pin);
    backend.poll(&mut bus);
    assert_eq!(bus.seen.last(), Some(&Seen::Pin(true)));
}

#[test]
fn a_read_of_the_server_does_not_pass_its_writes_and_late_ones_are_answered_by_number() {
    let (mut backend, mut server, mut bus) = lent();
    bus.late = true;
    let first = server.request(Command::DmaWrite, BASE, 64, &[1; 64]);
    let second = server.request(Command::DmaRead, BASE, 64, &[]);
    let third = server.request(Command::DmaWrite, BASE + 64, 3, &[2; 3]);
    backend.poll(&mut bus);
    assert!(server.next(Duration::from_millis(5)).is_none());
    assert_eq!(bus.seen, [Seen::Polled(BASE, 32), Seen::Polled(BASE + 32, 32), Seen::Write(BASE + 64, 3)]);
    assert_eq!(backend.in_flight(), 2);
    bus.finish(&mut backend);
    let mut replies: Vec<_> = (0..3).map(|_| server.next(DEADLINE).unwrap()).collect();
    assert_eq!(replies.pop().map(|got| (got.header.message_id, got.body[16..].to_vec())), Some((second, vec![1; 64])));
    replies.sort_by_key(|got| got.header.message_id);
    assert_eq!(replies.iter().map(|got| got.header.message_id).collect::<Vec<_>>(), [first, third]);
    assert_eq!(backend.in_flight(), 0);
}

#[test]
fn more_requests_than_there_is_room_for_wait_and_none_is_lost() {
    let (mut backend, mut server, mut bus) = lent();
    bus.late = true;
    let ids: Vec<u16> = (0..100).map(|i| server.request(Command::DmaRead, BASE + i * 8, 8, &[])).collect();
    let mut answered = Vec::new();
    while answered.len() < ids.len() {
        backend.poll(&mut bus);
        assert!(backend.in_flight() <= 16);
        bus.finish(&mut backend);
        while let Some(got) = server.next(Duration::from_millis(1)) {
            assert!(!refused(&got));
            answered.push(got.header.message_id);
        }
    }
    answered.sort_unstable();
    assert_eq!(answered, ids);
}

#[test]
fn a_reset_is_in_flight_until_the_server_has_answered_and_nothing_of_before_is_told() {
    let (mut backend, mut server, mut bus) = lent();
    let vectors = msix(&mut backend, &mut server, &mut bus);
    backend.bar_read_later(ReadTicket(5), at(0), Width::B4, &mut bus);
    backend.fence();
    assert_eq!(backend.in_flight(), 1);
    assert_eq!(value(&mut backend, &mut bus), (ReadTicket(5), 0xffff_ffff));
    let read = server.expect(Command::RegionRead);
    let reset = server.expect(Command::DeviceReset);
    bus.seen.clear();
    let late = server.request(Command::DmaWrite, BASE, 4, &[1; 4]);
    signal(&vectors[2]);
    server.acknowledge(&read);
    backend.poll(&mut bus);
    let got = server.expect(Command::DmaWrite);
    assert!(refused(&got) && got.header.message_id == late);
    assert_eq!((backend.in_flight(), &bus.seen), (1, &vec![]));
    server.reply(&reset.header, &[]);
    backend.poll(&mut bus);
    assert_eq!(backend.in_flight(), 0);
    backend.reset(ResetKind::Function, &mut bus);
    assert!(server.answer_all(&mut backend, &mut bus).iter().any(|got| got.is(Command::SetIrqs)));
    // It is there again.
    server.request(Command::DmaWrite, BASE, 4, &[1; 4]);
    backend.poll(&mut bus);
    assert!(!refused(&server.expect(Command::DmaWrite)));
}

#[test]
fn the_server_is_told_of_memory_and_an_unmap_is_over_when_it_says_so() {
    let (mut backend, mut server, mut bus) = lent();
    for (iova, access) in [(0x1000, Access::READ), (0x4000, Access::READ_WRITE), (0x9000, Access::READ_WRITE)] {
        backend.window_mapped(Iova(iova), 0x1000, access, None, &mut bus);
        let got = server.expect(Command::DmaMap);
        server.acknowledge(&got);
        let (map, _) = DmaMap::read_from_prefix(&got.body).unwrap();
        let flags = if access.write { 3 } else { 1 };
        assert_eq!(map, DmaMap { argsz: 32, flags, offset: 0, address: iova, size: 0x1000 });
    }
    backend.window_unmapped(Iova(0x1000), 0x4000, &mut bus);
    assert!(backend.is_unmapping());
    let unmaps: Vec<Got> = (0..2).map(|_| server.expect(Command::DmaUnmap)).collect();
    server.acknowledge(&unmaps[0]);
    backend.poll(&mut bus);
    assert!(backend.is_unmapping());
    server.acknowledge(&unmaps[1]);
    backend.poll(&mut bus);
    assert!(!backend.is_unmapping());
    let player = std::thread::spawn(move || {
        let mut left = Vec::new();
        while let Some(got) = server.next(Duration::from_millis(100)) {
            server.acknowledge(&got);
            left.push(got);
        }
        (server, left)
    });
    // What is left at the end is taken back, and the device answers to nobody.
    backend.detach();
    let (mut server, left) = player.join().unwrap();
    let unmapped: Vec<&Got> = left.iter().filter(|got| got.is(Command::DmaUnmap)).collect();
    assert!(unmapped.len() == 1 && unmapped[0].body[8..16] == 0x9000_u64.to_le_bytes());
    server.request(Command::DmaRead, BASE, 4, &[]);
    backend.attach(&mut bus).unwrap();
    assert!(refused(&server.expect(Command::DmaRead)));
}

#[test]
fn memory_that_the_server_maps_is_held_and_counted_as_written_until_it_has_let_go() {
    let (mut backend, mut server, mut bus) = lent();
    let guest = Memory::memfd("guest", 64 << 10).unwrap();
    let (window, log) = shared_window(&guest);
    backend.window_mapped(Iova(0x8000), 0x2000, Access::READ_WRITE, Some(window), &mut bus);
    let got = server.expect(Command::DmaMap);
    let (map, _) = DmaMap::read_from_prefix(&got.body).unwrap();
    assert_eq!((map.offset, map.address, map.size, got.fds.len()), (0x3000, 0x8000, 0x2000, 1));
    let theirs = Memory::map_file(got.fds.into_iter().next().unwrap(), map.offset, map.size, true).unwrap();
    server.reply(&got.header, &[]);
    // It writes without a word, and its interrupt says that it did.
    theirs.write(0x10, b"dma").unwrap();
    let vectors = msix(&mut backend, &mut server, &mut bus);
    let _before = pages(&log);
    std::thread::sleep(Duration::from_millis(15));
    signal(&vectors[0]);
    backend.poll(&mut bus);
    assert_eq!((bus.seen.last(), pages(&log)), (Some(&Seen::Interrupt(0)), vec![3, 4]));
    // The last it wrote before it let go is counted too, and until then it holds the memory.
    backend.window_unmapped(Iova(0x8000), 0x2000, &mut bus);
    assert!(backend.is_unmapping() && Arc::strong_count(&guest) == 2);
    let unmap = server.expect(Command::DmaUnmap);
    assert!(pages(&log).is_empty());
    server.acknowledge(&unmap);
    backend.poll(&mut bus);
    assert!(!backend.is_unmapping() && Arc::strong_count(&guest) == 1);
    assert_eq!(pages(&log), [3, 4]);
}

#[test]
fn a_server_that_is_to_have_no_memory_gets_none() {
    let (backend, mut server) = open(Facts::default(), BackendOptions { share_memory: false, ..BackendOptions::default() });
    let (mut backend, mut bus) = (backend.unwrap(), TestBus::new());
    backend.attach(&mut bus).unwrap();
    server.answer_all(&mut backend, &mut bus);
    let guest = Memory::memfd("guest", 64 << 10).unwrap();
    let (window, _log) = shared_window(&guest);
    backend.window_mapped(Iova(0x8000), 0x2000, Access::READ_WRITE, Some(window), &mut bus);
    let got = server.expect(Command::DmaMap);
    assert_eq!((got.fds.len(), Arc::strong_count(&guest)), (0, 1));
}

#[test]
fn shared_registers_are_loaded_and_stored_and_pass_no_message() {
    let shared = Memory::memfd("bar", 16 << 10).unwrap();
    let mut info = region(0, 16 << 10, 0xf);
    info[..4].copy_from_slice(&64_u32.to_le_bytes());
    info[12..16].copy_from_slice(&32_u32.to_le_bytes());
    info.extend([1_u16, 1].as_bytes());
    info.extend([0_u32, 1, 0].as_bytes());
    info.extend([0x1000_u64, 0x1000].as_bytes());
    let mut facts = Facts::default();
    facts.regions[0] = (info, Some(Arc::clone(&shared)));
    let mut bus = TestBus::new();
    let (mut backend, mut server) = lent_with(facts, &mut bus);
    backend.bar_write(at(0x1008), Width::B4, 17, &mut bus);
    assert_eq!(shared.atomic_u32(0x1008).unwrap().load(std::sync::atomic::Ordering::Relaxed), 17);
    assert_eq!(backend.bar_read(at(0x1008), Width::B4, &mut bus), 17);
    assert!(server.next(Duration::from_millis(5)).is_none());
    // Behind a message that is not answered even a shared register goes by message.
    backend.bar_write(at(0), Width::B4, 1, &mut bus);
    backend.bar_write(at(0x1008), Width::B4, 18, &mut bus);
    assert_eq!(backend.bar_read_later(ReadTicket(1), at(0x1008), Width::B4, &mut bus), None);
    let mut commands = Vec::new();
    for _ in 0..3 {
        let got = server.next(DEADLINE).unwrap();
        server.acknowledge(&got);
        commands.push(got.header.command);
    }
    assert_eq!(commands, [10, 10, 9]);
    assert_eq!(shared.atomic_u32(0x1008).unwrap().load(std::sync::atomic::Ordering::Relaxed), 17);
    assert_eq!(value(&mut backend, &mut bus).1, 0x1008);
}

#[test]
fn a_server_that_comes_back_with_the_same_device_is_used_again_and_with_another_is_not() {
    let place = Place::new();
    let (backend, server) =
        place.meet(Facts::default(), || farbus_pci_shim::vfio_user::VfioUserBackend::open(&place.path, BackendOptions::default()));
    let (mut backend, mut bus) = (backend.unwrap(), TestBus::new());
    drop(server);
    let mut other = Facts::default();
    other.config[2] = 0x11;
    let (attached, _server) = place.meet(other, || backend.attach(&mut bus).map_err(|error| error.to_string()));
    assert!(attached.unwrap_err().contains("another device"));
    assert_eq!(backend.gone(), Some("its server closed the connection"));
    let (attached, mut server) = place.meet(Facts::default(), || backend.attach(&mut bus));
    attached.unwrap();
    server.answer_all(&mut backend, &mut bus);
    assert_eq!(backend.gone(), None);
    backend.bar_read_later(ReadTicket(1), at(4), Width::B4, &mut bus);
    let read = server.expect(Command::RegionRead);
    server.acknowledge(&read);
    assert_eq!(value(&mut backend, &mut bus).1, 4);
}
