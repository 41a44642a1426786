//! The two ends of a Cloud Hypervisor's migration, played here: one that hands its machine over, one that waits for one, and others that say something wrong.
//!
//! A machine of two slots in one memfd is saved, and restored on demand: each page that is asked for is what it was, and what the guest wrote stays when it is asked
//! for again.

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use common::migration::*;
use common::{machine, memory_bank, withdraw};
use farbus_machine_bank::PAGE;
use farbus_machine_bank::cloud_hypervisor::{Refused, RestoreError, RestoreOptions, SaveError, restore};
use farbus_machine_bank::index::{Index, Location};
use farbus_machine_bank::lazy::{Area, Event, Features, Uffd, Watch};
use farbus_machine_bank::store::{Kind, Store};
use rustix::fs::{SeekFrom, seek};

#[test]
fn a_machine_that_was_handed_over_is_handed_to_another_whole() {
    for (last, resume) in [(COMPLETE_PAUSED, false), (COMPLETE, true)] {
        let (_, bank) = memory_bank();
        let report = saved(&bank, |stream| assert_eq!(hand_over(stream, last), Some(1))).unwrap();
        assert_eq!(report.machine, "vm7@1");
        let memory = memory();
        let (low, high) = memory.split_at(LOW_PAGES * PAGE);
        assert!(withdraw(&bank, "vm7", "slot0").unwrap() == low && withdraw(&bank, "vm7", "slot3").unwrap() == high);
        assert_eq!(withdraw(&bank, "vm7", "disk0").unwrap(), b"a disk");
        let (report, received) = restored(&bank, RestoreOptions { resume, ..RestoreOptions::default() }, None);
        assert_eq!(report.unwrap().bytes, ((LOW_PAGES + HIGH_PAGES) * PAGE) as u64);
        assert_eq!((received.config, received.state), (config().into_bytes(), b"{\"vcpus\":[]}".to_vec()));
        assert_eq!(received.last, last);
        let [(0, first), (3, second)] = &received.slots[..] else { panic!("other slots") };
        let mut there = vec![0; low.len()];
        first.read_exact_at(&mut there, 0).unwrap();
        assert!(there == low);
        // It begins where it began in the memfd that it shared.
        let mut there = vec![0; high.len()];
        second.read_exact_at(&mut there, low.len() as u64).unwrap();
        assert!(there == high);
    }
}

#[test]
fn pages_come_when_they_are_asked_for_and_what_the_guest_wrote_stays() {
    let (_, bank) = memory_bank();
    saved(&bank, |stream| assert_eq!(hand_over(stream, COMPLETE_PAUSED), Some(1))).unwrap();
    let memory = memory();
    let expected = |page: usize| &memory[page * PAGE..(page + 1) * PAGE];
    let zero = (0..LOW_PAGES).find(|page| expected(*page).iter().all(|byte| *byte == 0)).unwrap();
    let mut faults = |stream: &mut UnixStream, received: &Received| {
        let (low, high) = (&received.slots[0].1, &received.slots[1].1);
        assert_eq!(
            seek(low, SeekFrom::Data(0)).err(),
            Some(rustix::io::Errno::NXIO),
            "something was there before it was asked for"
        );
        assert_eq!(fault(stream, 50 * PAGE as u64, PAGE as u64), Some(1));
        assert!(page_of(low, 50) == expected(50));
        // The group of 16 came with it, and no other.
        assert!(page_of(low, 48) == expected(48) && seek(low, SeekFrom::Data(0)).unwrap() == 48 * PAGE as u64);
        // What the guest writes it keeps, whoever asks again.
        low.write_all_at(&[7; PAGE], 50 * PAGE as u64).unwrap();
        low.write_all_at(&[8; PAGE], 51 * PAGE as u64).unwrap();
        for page in [50, 51, 49] {
            assert_eq!(fault(stream, page * PAGE as u64, PAGE as u64), Some(1));
        }
        assert!(page_of(low, 50) == [7; PAGE] && page_of(low, 51) == [8; PAGE]);
        // A page of zeros is there, and no hole.
        assert_eq!(fault(stream, (zero * PAGE) as u64, PAGE as u64), Some(1));
        assert_eq!(seek(low, SeekFrom::Data((zero * PAGE) as u64)).unwrap(), (zero * PAGE) as u64);
        // Several at once, over a group's end, in the other slot, and up to its end.
        assert_eq!(fault(stream, HIGH + 10 * PAGE as u64, 12 * PAGE as u64), Some(1));
        assert_eq!(fault(stream, HIGH + (HIGH_PAGES as u64 - 1) * PAGE as u64, PAGE as u64), Some(1));
        for page in (10..22).chain([HIGH_PAGES - 1]) {
            assert!(page_of(high, (LOW_PAGES + page) as u64) == expected(LOW_PAGES + page), "page {page} of the second slot");
        }
        for page in 0..LOW_PAGES {
            assert_eq!(fault(stream, (page * PAGE) as u64, PAGE as u64), Some(1));
            assert!([50, 51].contains(&page) || page_of(low, page as u64) == expected(page), "page {page}");
        }
    };
    let (report, received) =
        restored(&bank, RestoreOptions { on_demand: true, resume: true, ..RestoreOptions::default() }, Some(&mut faults));
    let report = report.unwrap();
    assert_eq!((received.last, report.faults), (COMPLETE, 7 + LOW_PAGES as u64), "{report:?}");
    assert!(report.placed <= (LOW_PAGES + HIGH_PAGES) as u64 && report.placed >= LOW_PAGES as u64, "{report:?}");
}

#[test]
fn where_the_configuration_has_the_mode_it_is_told() {
    let (_, bank) = memory_bank();
    let other = config().replacen('{', r#"{"memory_mode":"Precopy","#, 1);
    let vmm = |stream: &mut UnixStream| {
        let memory = memfd(&memory());
        ask(stream, START, &[]);
        pass(stream, 0, &[&memory]);
        pass(stream, 3, &[&memory]);
        ask(stream, CONFIG, other.as_bytes());
        ask(stream, STATE, b"{}");
        assert_eq!(ask(stream, COMPLETE_PAUSED, &[]), Some(1));
    };
    saved(&bank, vmm).unwrap();
    let (report, received) = restored(&bank, RestoreOptions { on_demand: true, ..RestoreOptions::default() }, Some(&mut |_, _| {}));
    report.unwrap();
    assert!(String::from_utf8(received.config).unwrap().contains(r#""memory_mode":"Postcopy""#));
    let (report, received) = restored(&bank, RestoreOptions::default(), None);
    report.unwrap();
    assert_eq!(received.config, other.as_bytes());
}

#[test]
fn a_page_that_cannot_be_had_and_an_address_without_memory_are_answered_by_an_error() {
    let (store, bank) = memory_bank();
    saved(&bank, |stream| assert_eq!(hand_over(stream, COMPLETE_PAUSED), Some(1))).unwrap();
    let options = RestoreOptions { on_demand: true, resume: true, ..RestoreOptions::default() };
    let low_end = (LOW_PAGES * PAGE) as u64;
    for (gpa, len) in [
        (low_end, PAGE as u64),
        (low_end - PAGE as u64, 2 * PAGE as u64),
        (HIGH - PAGE as u64, PAGE as u64),
        (8, PAGE as u64),
        (0, 8),
        (0, 0),
        (u64::MAX - 4095, PAGE as u64),
        (0, u64::MAX - 4095),
    ] {
        let mut stray = |stream: &mut UnixStream, _: &Received| assert_eq!(fault(stream, gpa, len), Some(2), "{gpa:#x}");
        let (report, _) = restored(&bank, options.clone(), Some(&mut stray));
        assert!(matches!(report, Err(RestoreError::Stray(..))), "{gpa:#x}: {report:?}");
    }
    // The group of one page, and no other: the configuration is in the pack too.
    let page = memory().chunks(PAGE).position(|page| page.iter().any(|byte| *byte != 0)).unwrap() as u64;
    let id = bank.identity().page(&memory()[page as usize * PAGE..][..PAGE]);
    let index = Index::open(&store).unwrap();
    let Location { place, .. } = index.find(&store, &id).unwrap().unwrap();
    let [pack] = &store.list(Kind::Pack).unwrap()[..] else { panic!("more than a pack") };
    for at in (place.offset + 1..place.offset + place.len).step_by(50) {
        store.flip(Kind::Pack, &pack.name, at as usize, 3);
    }
    let mut damaged = |stream: &mut UnixStream, received: &Received| {
        assert_eq!(fault(stream, page * PAGE as u64, PAGE as u64), Some(2));
        assert!(page_of(&received.slots[0].1, page) == [0; PAGE], "a page that cannot be had is something else");
    };
    let (report, _) = restored(&bank, options.clone(), Some(&mut damaged));
    assert!(report.is_err(), "{report:?}");
}

#[test]
fn who_says_something_wrong_is_refused_and_nothing_is_in_the_bank() {
    let (_, bank) = memory_bank();
    let full = memfd(&memory());
    let short = memfd(&[1; PAGE]);
    type Vmm<'a> = (&'a str, Box<dyn FnOnce(&mut UnixStream) + Send + 'a>);
    let begun = |stream: &mut UnixStream| {
        assert_eq!(ask(stream, START, &[]), Some(1));
    };
    let config = config();
    let until_config = |stream: &mut UnixStream, files: [&File; 2]| {
        begun(stream);
        assert_eq!((pass(stream, 0, &[files[0]]), pass(stream, 3, &[files[1]])), (Some(1), Some(1)));
        assert_eq!(ask(stream, CONFIG, config.as_bytes()), Some(1));
    };
    let refused = |stream: &mut UnixStream, command: u16, payload: &[u8]| {
        let status = ask(stream, command, payload);
        assert!(status.is_none() || status == Some(2), "command {command} was taken");
    };
    let vmms: Vec<Vmm<'_>> = vec![
        ("nothing", Box::new(|_| {})),
        ("half a header", Box::new(|stream| stream.write_all(&[1, 0, 0]).unwrap())),
        ("no start", Box::new(|stream| refused(stream, CONFIG, b"{}"))),
        (
            "another version",
            Box::new(|stream| {
                let mut start = header(START, 0);
                start[2] = 1;
                stream.write_all(&start).unwrap();
                assert_ne!(answer(stream), Some(1));
            }),
        ),
        (
            "twice started",
            Box::new(|stream| {
                begun(stream);
                refused(stream, START, &[]);
            }),
        ),
        (
            "no command",
            Box::new(|stream| {
                begun(stream);
                refused(stream, 77, &[]);
            }),
        ),
        (
            "pages in the stream",
            Box::new(|stream| {
                begun(stream);
                refused(stream, 4, &[0; 16]);
            }),
        ),
        (
            "no descriptor",
            Box::new(|stream| {
                begun(stream);
                assert_ne!(pass(stream, 0, &[]), Some(1));
            }),
        ),
        (
            "two descriptors",
            Box::new(|stream| {
                begun(stream);
                assert_ne!(pass(stream, 0, &[&full, &full]), Some(1));
            }),
        ),
        (
            "a slot twice",
            Box::new(|stream| {
                begun(stream);
                assert_eq!(pass(stream, 0, &[&full]), Some(1));
                assert_ne!(pass(stream, 0, &[&full]), Some(1));
            }),
        ),
        (
            "a configuration of 1 TiB",
            Box::new(|stream| {
                begun(stream);
                stream.write_all(&header(CONFIG, 1 << 40)).unwrap();
                assert_ne!(answer(stream), Some(1));
            }),
        ),
        (
            "a state first",
            Box::new(|stream| {
                begun(stream);
                refused(stream, STATE, b"{}");
            }),
        ),
        (
            "an end without a state",
            Box::new(|stream| {
                until_config(stream, [&full, &full]);
                refused(stream, COMPLETE_PAUSED, &[]);
            }),
        ),
        (
            "a configuration that is none",
            Box::new(|stream| {
                begun(stream);
                assert_eq!(ask(stream, CONFIG, b"{]"), Some(1));
                assert_eq!(ask(stream, STATE, b"{}"), Some(1));
                assert_eq!(ask(stream, COMPLETE_PAUSED, &[]), Some(2));
            }),
        ),
        (
            "a slot without memory",
            Box::new(|stream| {
                begun(stream);
                assert_eq!(pass(stream, 0, &[&full]), Some(1));
                assert_eq!(ask(stream, CONFIG, config.as_bytes()), Some(1));
                assert_eq!(ask(stream, STATE, b"{}"), Some(1));
                assert_eq!(ask(stream, COMPLETE_PAUSED, &[]), Some(2));
            }),
        ),
        (
            "memory that is too short",
            Box::new(|stream| {
                until_config(stream, [&full, &short]);
                assert_eq!(ask(stream, STATE, b"{}"), Some(1));
                assert_eq!(ask(stream, COMPLETE_PAUSED, &[]), Some(2));
            }),
        ),
        (
            "memory of no slot",
            Box::new(|stream| {
                begun(stream);
                for slot in [0, 3, 4] {
                    assert_eq!(pass(stream, slot, &[&full]), Some(1));
                }
                assert_eq!(ask(stream, CONFIG, config.as_bytes()), Some(1));
                assert_eq!(ask(stream, STATE, b"{}"), Some(1));
                assert_eq!(ask(stream, COMPLETE_PAUSED, &[]), Some(2));
            }),
        ),
        (
            "given up",
            Box::new(|stream| {
                until_config(stream, [&full, &full]);
                refused(stream, ABANDON, &[]);
            }),
        ),
        ("gone", Box::new(|stream| until_config(stream, [&full, &full]))),
    ];
    for (name, vmm) in vmms {
        let ended = saved(&bank, vmm);
        assert!(matches!(ended, Err(SaveError::Refused(_))), "{name}: {ended:?}");
        assert!(bank.listing().unwrap().0.is_empty(), "{name}");
    }
}

#[test]
fn who_refuses_a_machine_or_is_not_there_is_told_of() {
    let (_, bank) = memory_bank();
    saved(&bank, |stream| assert_eq!(hand_over(stream, COMPLETE_PAUSED), Some(1))).unwrap();
    common::deposit(&bank, "other", &machine(1, 5), farbus_machine_bank::Changes::HashAll);
    let folder = tempfile::tempdir().unwrap();
    let (path, listener) = place(folder.path());
    let (entry, other) = (bank.find("vm7").unwrap(), bank.find("other").unwrap());
    let restore = |entry| {
        restore(&bank, entry, &path, &RestoreOptions { on_demand: true, resume: true, ..RestoreOptions::default() }, &|_| {})
    };
    assert!(matches!(restore(&other), Err(RestoreError::Other(_))));
    // It refuses the state, when the connection for faults is up already.
    std::thread::scope(|scope| {
        let vmm = scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            for _ in 0..4 {
                let (command, length) = request(&mut stream);
                if command == MEMORY_FD {
                    receive_fd(&stream);
                } else {
                    stream.read_exact(&mut vec![0; length as usize]).unwrap();
                }
                stream.write_all(&header(1, 0)).unwrap();
            }
            let faults = listener.accept().unwrap();
            let (_, length) = request(&mut stream);
            stream.read_exact(&mut vec![0; length as usize]).unwrap();
            stream.write_all(&header(2, 0)).unwrap();
            faults
        });
        let ended = restore(&entry);
        assert!(matches!(ended, Err(RestoreError::Refused(Refused::Answer(2, _)))), "{ended:?}");
        drop(vmm.join().unwrap());
    });
    drop(listener);
    assert!(matches!(restore(&entry), Err(RestoreError::Refused(Refused::Connection(_)))));
}

/// What the other end relies on, asked of this kernel: whoever waits for a page of a memfd finds it when it was written there and the waiter was woken.
#[test]
fn who_waits_for_a_page_of_a_memfd_finds_it_when_it_was_written_and_not_before() {
    if let Err(error) = Uffd::supported() {
        eprintln!("not run: {error}");
        return;
    }
    let area = Area::shared(64 * PAGE as u64).unwrap();
    let uffd = Uffd::new(Features(0)).unwrap();
    area.watch(&uffd, Watch::MISSING).unwrap();
    let (file, offset) = area.memory().file().unwrap();
    let file = File::from(file.try_clone_to_owned().unwrap());
    let bytes = machine(40, 64);
    std::thread::scope(|scope| {
        // Two that use each page at the same time.
        let users: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    for (at, expected) in bytes.chunks(PAGE).enumerate() {
                        let mut there = vec![1; PAGE];
                        area.memory().read((at * PAGE) as u64, &mut there).unwrap();
                        assert!(there == expected, "page {at}");
                    }
                })
            })
            .collect();
        while !users.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            match uffd.event().unwrap() {
                Some(Event::Fault { address, .. }) => {
                    let at = (address - area.address()) / PAGE as u64;
                    // As it is written here and not through a mapping, no user sees half of it.
                    file.write_all_at(&bytes[at as usize * PAGE..][..PAGE], offset + at * PAGE as u64).unwrap();
                    uffd.wake(area.address() + at * PAGE as u64, PAGE as u64).unwrap();
                }
                Some(other) => panic!("{other:?}"),
                None => std::thread::yield_now(),
            }
        }
    });
}
