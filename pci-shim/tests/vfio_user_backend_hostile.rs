//! The backend over a vfio-user server that lies, breaks the protocol, floods or falls silent: it is refused or gone, with a reason, and nothing else comes of it.
//!
//! A server that answers a read of 4 bytes with 17 bytes is gone: the read is all ones, and so is every other, and the session can end.
mod vfio_user_backend_support;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_pci_shim::vfio_user::BackendOptions;
use farbus_pci_shim::vfio_user::wire::{Command, Header, RegionInfo};
use farbus_remote_dma::{Backend, InterruptMode, Iova, ReadTicket, ResetKind, Width};
use farbus_transport::{Access, Memory};
use vfio_user_backend_support::*;
use zerocopy::IntoBytes;

#[test]
fn dma_outside_of_memory_and_of_all_measure_is_refused() {
    let (mut backend, mut server, mut bus) = lent();
    for (command, address, count, data) in [
        (Command::DmaRead, 0, 8, 0),
        (Command::DmaRead, BASE + BYTES - 4, 8, 0),
        (Command::DmaRead, BASE, 0, 0),
        (Command::DmaRead, BASE, 1 << 20, 0),
        (Command::DmaRead, BASE, u64::MAX, 0),
        (Command::DmaRead, BASE, 4, 4),
        (Command::DmaRead, u64::MAX, 2, 0),
        (Command::DmaWrite, 0, 8, 8),
        (Command::DmaWrite, BASE, 8, 7),
        (Command::DmaWrite, BASE, 300_000, 0),
        (Command::DmaWrite, BASE + BYTES - 64, 128, 128),
        (Command::RegionRead, BASE, 4, 0),
        (Command::Version, BASE, 4, 0),
    ] {
        let id = server.request(command, address, count, &vec![5; data]);
        backend.poll(&mut bus);
        let got = server.next(DEADLINE).unwrap();
        assert!(refused(&got) && got.header.message_id == id && got.header.error > 0, "{command:?} {address:#x} {count:#x}");
    }
    assert_eq!(backend.gone(), None);
    // Of the one that leaves the memory what lies in it may be done.
    assert!(bus.read(BASE, BYTES as usize - 64).iter().all(|byte| *byte == 0));
}

#[test]
fn a_storm_of_signals_is_one_interrupt_a_look_and_none_of_a_vector_that_is_off() {
    let (mut backend, mut server, mut bus) = lent();
    let vectors = msix(&mut backend, &mut server, &mut bus);
    for _ in 0..10_000 {
        vectors.iter().for_each(signal);
    }
    backend.poll(&mut bus);
    assert_eq!(bus.seen.iter().filter(|seen| matches!(seen, Seen::Interrupt(_))).count(), 20);
    bus.seen.clear();
    backend.set_interrupt_mode(InterruptMode::Msi(2), &mut bus);
    server.answer_all(&mut backend, &mut bus);
    signal(&vectors[5]);
    signal(&vectors[1]);
    backend.poll(&mut bus);
    assert_eq!(bus.seen, [Seen::Interrupt(1)]);
}

/// What a server does where it should answer a register read.
type Play = Box<dyn Fn(&mut Server)>;

#[test]
fn a_server_that_does_not_answer_or_breaks_the_protocol_is_gone_and_reads_are_all_ones() {
    let question = |server: &mut Server| server.expect(Command::RegionRead).header;
    let play: Vec<(&str, Play)> = vec![
        ("it does not answer", Box::new(|_| {})),
        ("it hangs up", Box::new(|server| drop(server.stream.shutdown(std::net::Shutdown::Both)))),
        (
            "another number",
            Box::new(move |server| {
                let header = question(server);
                server.reply(&Header { message_id: header.message_id ^ 1, ..header }, &[]);
            }),
        ),
        (
            "another command",
            Box::new(move |server| {
                let header = question(server);
                server.reply(&Header { command: 10, ..header }, &[]);
            }),
        ),
        (
            "a short answer",
            Box::new(move |server| {
                let header = question(server);
                server.reply(&header, &[0; 17]);
            }),
        ),
        (
            "a long answer",
            Box::new(move |server| {
                let header = question(server);
                server.reply(&header, &[0; 64]);
            }),
        ),
        (
            "another place",
            Box::new(move |server| {
                let header = question(server);
                server.reply(&header, &[9; 20]);
            }),
        ),
        (
            "half an answer",
            Box::new(move |server| {
                let header = question(server);
                let reply = [header.reply(20).as_bytes(), &[0; 10]].concat();
                server.send(&reply, &[]);
            }),
        ),
        (
            "a message shorter than its header",
            Box::new(|server| {
                server.send(Header { message_id: 1, command: 11, message_size: 3, flags: 0, error: 0 }.as_bytes(), &[]);
            }),
        ),
        (
            "a message of 4 GiB",
            Box::new(|server| {
                server.send(Header { message_id: 1, command: 12, message_size: u32::MAX, flags: 0, error: 0 }.as_bytes(), &[]);
            }),
        ),
        (
            "neither command nor reply",
            Box::new(|server| {
                server.send(Header { message_id: 1, command: 11, message_size: 16, flags: 7, error: 0 }.as_bytes(), &[]);
            }),
        ),
    ];
    for (what, play) in play {
        let (mut backend, mut server, mut bus) = lent();
        assert_eq!(backend.bar_read_later(ReadTicket(3), at(8), Width::B8, &mut bus), None);
        play(&mut server);
        let started = Instant::now();
        assert_eq!(value(&mut backend, &mut bus), (ReadTicket(3), u64::MAX), "{what}");
        assert!(started.elapsed() < Duration::from_secs(2), "{what}");
        assert!(backend.gone().is_some(), "{what}");
        assert_eq!(backend.bar_read(at(8), Width::B8, &mut bus), u64::MAX, "{what}");
        backend.bar_write(at(8), Width::B8, 1, &mut bus);
        // Nothing keeps its session from ending.
        backend.fence();
        assert_eq!((backend.in_flight(), backend.is_unmapping()), (0, false), "{what}");
        backend.reset(ResetKind::Conventional, &mut bus);
        backend.detach();
    }
}

#[test]
fn descriptors_that_nobody_asked_for_are_closed() {
    let before = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let (mut backend, server, mut bus) = lent();
    let null = std::fs::File::open("/dev/null").unwrap();
    let open = before();
    for _ in 0..50 {
        let header = Header::command(1, Command::DmaRead, 16);
        server.send(&[header.as_bytes(), [BASE, 4].as_bytes()].concat(), &[null.as_fd(); 16]);
        backend.poll(&mut bus);
    }
    assert_eq!(before(), open);
    assert_eq!(backend.gone(), None);
}

#[test]
fn a_server_whose_device_makes_no_sense_is_refused_and_says_why() {
    let refuse = |what: &str, change: &dyn Fn(&mut Facts)| {
        let mut facts = Facts::default();
        change(&mut facts);
        let options = BackendOptions { answer_within: Duration::from_millis(200), ..BackendOptions::default() };
        let (backend, _server) = open(facts, options);
        let error = backend.err().unwrap_or_else(|| panic!("{what} was not refused")).to_string();
        assert!(error.contains(what), "{what}: {error}");
    };
    refuse("no JSON object", &|facts| facts.version = b"\0\0\x01\0{".to_vec());
    refuse("does not fit", &|facts| facts.version = b"\0".to_vec());
    refuse("later version", &|facts| facts.version = b"\0\0\x09\0".to_vec());
    refuse("takes no descriptors", &|facts| facts.version = b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":0}}\0".to_vec());
    refuse("no PCI device", &|facts| facts.device.flags = 1);
    refuse("cannot be reset", &|facts| facts.device.flags = 2);
    refuse("no configuration space", &|facts| facts.device.num_regions = 3);
    refuse("cannot be read and written", &|facts| facts.regions[7].0 = region(7, 64, 3));
    refuse("another region", &|facts| facts.regions[0].0 = region(5, 4096, 3));
    refuse("too long", &|facts| facts.regions[0].0[..4].copy_from_slice(&u32::MAX.to_le_bytes()));
    refuse("too short", &|facts| facts.regions[0].0.truncate(20));
    refuse("outside of the answer", &|facts| {
        let info = RegionInfo { argsz: 32, flags: 0xf, index: 0, cap_offset: 999, size: 1 << 14, offset: 0 };
        facts.regions[0].0 = info.as_bytes().to_vec();
    });
    refuse("no vendor", &|facts| facts.config[..2].fill(0xff));
    refuse("is a bridge", &|facts| facts.config[0x0e] = 1);
    refuse("upper half", &|facts| facts.regions[1].0 = region(1, 4096, 3));
    refuse("too large", &|facts| facts.regions[0].0 = region(0, u64::MAX, 3));
    refuse("goes round in a circle", &|facts| facts.config[0x51] = 0x40);
    refuse("msi-x table outside its bar", &|facts| facts.regions[0].0 = region(0, 4096, 3));
    refuse("does not fit", &|facts| facts.spoil = Some(|header, _| header.message_id ^= 1));
    refuse("does not fit", &|facts| facts.spoil = Some(|header, _| header.command ^= 1));
    refuse("refused command 4", &|facts| {
        facts.spoil = Some(|header, _| {
            if header.command == 4 {
                header.flags |= 1 << 5;
            }
        })
    });
    refuse("did not answer", &|facts| {
        facts.spoil = Some(|header, _| {
            if header.command == 13 {
                header.message_size += 1;
            }
        })
    });
    refuse("does not fit", &|facts| {
        facts.spoil = Some(|header, body| {
            if header.command == 9 {
                body.pop();
                header.message_size -= 1;
            }
        })
    });
    // More descriptors than were asked for harm nobody.
    let (backend, _server) = open(Facts { extra_fds: 3, ..Facts::default() }, BackendOptions::default());
    assert_eq!(backend.unwrap().description().msix.unwrap().vectors, 20);
}

#[test]
fn a_silent_server_that_maps_memory_keeps_it_until_it_has_closed_its_end() {
    let (mut backend, mut server, mut bus) = lent();
    let guest = Memory::memfd("guest", 64 << 10).unwrap();
    let (window, log) = shared_window(&guest);
    backend.window_mapped(Iova(0x8000), 0x2000, Access::READ_WRITE, Some(window), &mut bus);
    let got = server.expect(Command::DmaMap);
    server.reply(&got.header, &[]);
    backend.window_unmapped(Iova(0x8000), 0x2000, &mut bus);
    let started = Instant::now();
    while backend.gone().is_none() {
        backend.poll(&mut bus);
        assert!(started.elapsed() < DEADLINE);
    }
    for _ in 0..3 {
        backend.poll(&mut bus);
        assert!(backend.is_unmapping() && backend.in_flight() == 1, "it may still write");
    }
    assert_eq!(Arc::strong_count(&guest), 2);
    drop(server);
    backend.poll(&mut bus);
    assert!(!backend.is_unmapping() && backend.in_flight() == 0 && Arc::strong_count(&guest) == 1);
    assert_eq!(pages(&log), [3, 4]);
}
