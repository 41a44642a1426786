//! How `farbus lend` and `farbus borrow` end, by a signal, with their peer, or killed, and what each says of it.
//!
//! A killed lender ends its borrower, which says that the lender is gone and leaves no socket behind; a VMM that is still connected reads all
//! ones until it leaves.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use farbus_remote_dma::Backend;
use farbus_remote_dma::model::edu::Edu;
use farbus_tests::Running;
use farbus_tests::place::{Place, assert_end_in_order, assert_nvme, reason, version};
use farbus_tests::process::{AMPLE, run};
use farbus_transport::link::hello::{Hello, Role, SPOKEN};
use farbus_transport::shm::{Greeted, Listener, ShmOptions};
use farbus_transport::{Fabric, Op, Signal};
use serde_json::Value;

#[test]
fn a_killed_borrower_gives_the_device_back() {
    let place = Place::new();
    let mut lender = place.lend();
    for with_vmm in [false, true] {
        let borrower = place.borrow("vmm");
        lender.event("lent", AMPLE);
        let vmm = with_vmm.then(|| place.vmm("vmm"));
        borrower.kill();
        assert_eq!(borrower.wait(AMPLE).signal(), Some(9));
        let said = reason(&lender.event("returned", AMPLE));
        assert!(said.contains("gone") || said.contains("closed"), "{said}");
        drop(vmm);
        place.assert_served(&mut lender);
    }
}

/// The exit status of a borrower whose lender is gone without a goodbye or broke the protocol.
const LENDER_LOST: Option<i32> = Some(3);

#[test]
fn a_killed_lender_ends_the_borrower_which_says_so_and_fails() {
    let place = Place::new();
    let mut lender = place.lend();
    let mut borrower = place.borrow("vmm");
    lender.event("lent", AMPLE);
    lender.kill();
    let ended = borrower.event("ended", AMPLE);
    let said = reason(&ended);
    assert!(said.contains("lender") && said.contains("gone"), "{said}");
    assert_eq!(ended["status"], 3);
    let end = borrower.wait(AMPLE);
    assert_eq!(end.code(), LENDER_LOST, "{end:?}");
    end.assert_no_panic();
    assert!(!place.path("vmm").exists());
}

#[test]
fn a_lender_that_ends_in_order_ends_the_borrower_in_order() {
    let place = Place::new();
    let mut lender = place.lend();
    let mut borrower = place.borrow("vmm");
    lender.event("lent", AMPLE);
    assert_end_in_order(lender);
    let ended = borrower.event("ended", AMPLE);
    let said = reason(&ended);
    assert!(said.contains("lender") && said.contains("closed"), "{said}");
    assert_eq!(ended["status"], 0);
    let end = borrower.wait(AMPLE);
    assert_eq!(end.code(), Some(0), "{end:?}");
    end.assert_no_panic();
}

#[test]
fn a_lender_that_breaks_the_protocol_ends_the_borrower_which_fails() {
    let place = Place::new();
    let listener = Listener::bind(place.path("link")).unwrap();
    let borrower = std::thread::scope(|scope| {
        let borrower = scope.spawn(|| place.borrow("vmm"));
        let description = Edu::new().unwrap().description().encode().unwrap();
        let hello = Hello { versions: SPOKEN, role: Role::Lender, features: 0, epoch: 0, description };
        let greeted = Greeted::greet(listener.accept().unwrap(), &hello, place.path("link")).unwrap();
        let mut link = greeted.link(ShmOptions::default()).unwrap().fabric;
        link.post(Signal::No, Op::Send { message: b"\xff\xff" }).unwrap();
        link.flush();
        let mut borrower = borrower.join().unwrap();
        let said = reason(&borrower.event("ended", AMPLE));
        assert!(said.contains("lender") && said.contains("broke the protocol"), "{said}");
        borrower
    });
    let end = borrower.wait(AMPLE);
    assert_eq!(end.code(), LENDER_LOST, "{end:?}");
    end.assert_no_panic();
}

#[test]
fn a_killed_lender_is_a_dead_slot_to_the_vmm_until_that_leaves() {
    let place = Place::new();
    let mut lender = place.lend();
    let mut borrower = place.borrow("vmm");
    lender.event("lent", AMPLE);
    let mut vmm = place.vmm("vmm");
    assert_nvme(&mut vmm);
    lender.kill();
    drop(lender);
    let started = Instant::now();
    while version(&mut vmm) != u32::MAX {
        assert!(started.elapsed() < AMPLE, "a register of a dead device still has a value");
    }
    vmm.region_write(0, 0x14, &[0; 4]).unwrap();
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    // Said at once, to machines too: the VM may stay for days.
    let said = reason(&borrower.event("lender-gone", AMPLE));
    assert!(said.contains("the peer is gone"), "{said}");
    drop(vmm);
    let said = reason(&borrower.event("ended", AMPLE));
    assert!(said.contains("lender"), "{said}");
    let end = borrower.wait(AMPLE);
    assert_eq!(end.code(), LENDER_LOST, "{end:?}");
    end.assert_no_panic();
}

#[test]
fn a_killed_lender_that_is_started_again_is_found_and_the_vmm_reads_late_and_not_wrong() {
    let place = Place::new();
    let mut lender = place.lend();
    let mut borrower = place.borrow_for("vmm", "30s");
    lender.event("lent", AMPLE);
    let mut vmm = place.vmm("vmm");
    assert_nvme(&mut vmm);
    for _ in 0..3 {
        lender.kill();
        borrower.event("lender-lost", AMPLE);
        let path = place.path("link");
        lender = std::thread::scope(|scope| {
            let again = scope.spawn(|| {
                // Long enough for the read to have to wait.
                std::thread::sleep(Duration::from_millis(100));
                place.lend()
            });
            // CSTS: it is not constant, so it is the device's to say.
            let mut status = [0; 4];
            vmm.region_read(0, 0x1c, &mut status).unwrap();
            assert_eq!(u32::from_le_bytes(status), 0, "a controller that is not enabled was read as something else");
            again.join().unwrap()
        });
        assert!(path.exists());
        let away = borrower.event("lender-back", AMPLE)["away_us"].as_u64().unwrap();
        assert!(away >= 50_000, "{away}");
        assert_nvme(&mut vmm);
    }
    drop(vmm);
    assert_end_in_order(borrower);
    assert_end_in_order(lender);
}

#[test]
fn a_signal_ends_a_borrower_whose_vmm_waits_for_a_lender_that_does_not_come_back() {
    let place = Place::new();
    let mut lender = place.lend();
    let mut borrower = place.borrow_for("vmm", "1h");
    lender.event("lent", AMPLE);
    let mut vmm = place.vmm("vmm");
    assert_nvme(&mut vmm);
    lender.kill();
    borrower.event("lender-lost", AMPLE);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut status = [0; 4];
            // It ends one way or the other.
            let _read = vmm.region_read(0, 0x1c, &mut status);
        });
        std::thread::sleep(Duration::from_millis(100));
        borrower.terminate();
        let end = borrower.wait(AMPLE);
        assert_eq!(end.code(), Some(0), "{end:?}");
    });
}

#[test]
fn who_comes_back_when_another_had_the_device_is_refused_for_good_also_by_a_lender_that_was_started_again() {
    let place = Place::new();
    let lender = place.lend();
    let mut first = place.borrow_for("vmm", "60s");
    let mut vmm = place.vmm("vmm");
    assert_nvme(&mut vmm);
    // Parted from its lender, and asleep for as long as another has the device.
    first.signal(rustix::process::Signal::STOP);
    lender.kill();
    drop(lender);
    let mut lender = place.lend_with(&["--hold", "0s"]);
    place.assert_served(&mut lender);
    lender.kill();
    drop(lender);
    let _lender = place.lend_with(&["--hold", "0s"]);
    first.signal(rustix::process::Signal::CONT);
    let why = reason(&first.event("lender-given-up", AMPLE));
    assert!(why.contains("another borrower has had the device"), "{why}");
    first.event("lender-gone", AMPLE);
    assert_eq!(version(&mut vmm), u32::MAX);
}

#[test]
fn a_device_whose_lender_was_killed_is_held_for_its_borrower_and_a_stranger_waits() {
    let place = Place::new();
    let lender = place.lend();
    let mut first = place.borrow_for("vmm", "60s");
    first.signal(rustix::process::Signal::STOP);
    lender.kill();
    drop(lender);
    let mut lender = place.lend_with(&["--hold", "700ms"]);
    let began = Instant::now();
    let other = place.borrow("other");
    assert!(began.elapsed() >= Duration::from_millis(500), "{:?}", began.elapsed());
    assert!(reason(&lender.event("refused", AMPLE)).contains("held"));
    assert_end_in_order(other);
    first.signal(rustix::process::Signal::CONT);
    let why = reason(&first.event("lender-given-up", AMPLE));
    assert!(why.contains("another borrower has had the device"), "{why}");
}

#[test]
fn a_signal_ends_a_borrower_in_order_also_over_a_dead_device_which_it_names() {
    let place = Place::new();
    let mut lender = place.lend();
    let mut borrower = place.borrow("vmm");
    lender.event("lent", AMPLE);
    let _vmm = place.vmm("vmm");
    lender.kill();
    borrower.event("lender-gone", AMPLE);
    borrower.terminate();
    let said = reason(&borrower.event("ended", AMPLE));
    assert!(said.contains("SIGTERM") && said.contains("after the lender: the peer is gone"), "{said}");
    let end = borrower.wait(AMPLE);
    assert_eq!(end.code(), Some(0), "{end:?}");
    end.assert_no_panic();
}

#[test]
fn sigterm_ends_both_in_order_and_removes_their_sockets() {
    let place = Place::new();
    for lender_first in [false, true] {
        let mut lender = place.lend();
        let mut borrower = place.borrow("vmm");
        lender.event("lent", AMPLE);
        let mut vmm = place.vmm("vmm");
        assert_nvme(&mut vmm);
        assert!(is_socket(&place.path("link")) && is_socket(&place.path("vmm")));
        if lender_first {
            assert_end_in_order(lender);
            borrower.event("lender-gone", AMPLE);
            assert_eq!(version(&mut vmm), u32::MAX);
            assert_end_in_order(borrower);
        } else {
            assert_end_in_order(borrower);
            lender.event("returned", AMPLE);
            assert_end_in_order(lender);
        }
        drop(vmm);
        assert!(!place.path("link").exists() && !place.path("vmm").exists());
    }
}

#[test]
fn a_terminal_that_goes_away_ends_both_as_sigterm_does_unless_nohup_started_them() {
    let place = Place::new();
    let mut lender = place.lend();
    let mut borrower = place.borrow("vmm");
    lender.event("lent", AMPLE);
    borrower.signal(rustix::process::Signal::HUP);
    assert_eq!(reason(&borrower.event("ended", AMPLE)), "SIGHUP");
    assert_eq!(borrower.wait(AMPLE).code(), Some(0));
    lender.event("returned", AMPLE);
    lender.signal(rustix::process::Signal::HUP);
    assert_eq!(lender.wait(AMPLE).code(), Some(0));
    assert!(!place.path("link").exists() && !place.path("vmm").exists());

    let (device, link) = (place.device("disk.img"), place.link());
    let mut nohup = std::process::Command::new("nohup");
    nohup.arg(farbus_tests::farbus()).args(["lend", "--json", "--device", &device, "--listen", &link]);
    let mut lender = Running::start("nohup farbus lend", &mut nohup);
    lender.event("listening", AMPLE);
    lender.signal(rustix::process::Signal::HUP);
    place.assert_served(&mut lender);
    assert_end_in_order(lender);
}

#[test]
fn a_socket_is_its_users_whatever_the_umask_unless_it_is_said_otherwise() {
    let place = Place::new();
    let mut lender = place.lend();
    let farbus = farbus_tests::farbus().display();
    let group = rustix::process::getegid().as_raw();
    let in_group = format!("--socket-group {group}");
    let both = format!("{in_group} --socket-mode 620");
    for (options, mode) in [("", 0o600), ("--socket-mode 666", 0o666), (&in_group, 0o660), (&both, 0o620)] {
        for umask in ["000", "077"] {
            let (link, socket) = (place.link(), place.name("vmm"));
            let line = format!("umask {umask}; exec {farbus} borrow --json --from {link} --vfio-user {socket} {options}");
            let mut borrower = Running::start(&line, std::process::Command::new("sh").args(["-c", &line]));
            borrower.event("serving", AMPLE);
            lender.event("lent", AMPLE);
            let found = std::fs::metadata(place.path("vmm")).unwrap();
            assert_eq!(found.mode() & 0o7777, mode, "{line}");
            assert!(!options.contains("group") || found.gid() == group, "{line}: {}", found.gid());
            assert_nvme(&mut place.vmm("vmm"));
            assert_end_in_order(borrower);
            lender.event("returned", AMPLE);
        }
    }
    let borrow =
        |option: &str, value: &str| run(&["borrow", "--from", &place.link(), "--vfio-user", &place.name("vmm"), option, value]);
    borrow("--socket-mode", "rw").assert_refusal(2, &["three octal digits"]);
    borrow("--socket-group", "no-such-group").assert_refusal(2, &["no group \"no-such-group\"", "getent group"]);
}

fn is_socket(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket())
}

#[test]
fn once_ends_the_lender_after_its_first_borrower() {
    let place = Place::new();
    let args = ["lend", "--json", "--once", "--device", &place.device("disk.img"), "--listen", &place.link()];
    let mut lender = Running::farbus(&args);
    lender.event("listening", AMPLE);
    // Somebody who only knocks is no borrower.
    drop(UnixStream::connect(place.path("link")).unwrap());
    lender.event("refused", AMPLE);
    place.assert_served(&mut lender);
    let end = lender.wait(AMPLE);
    assert_eq!(end.code(), Some(0), "{end:?}");
    assert!(!place.path("link").exists());
}

#[test]
fn every_line_of_json_output_is_an_object_with_its_event() {
    let place = Place::new();
    let mut lender = place.lend();
    let borrower = place.borrow("vmm");
    lender.event("lent", AMPLE);
    borrower.terminate();
    let borrower = borrower.wait(AMPLE);
    lender.event("returned", AMPLE);
    lender.terminate();
    let lender = lender.wait(AMPLE);
    let events = |text: &str| -> Vec<String> {
        text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["event"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(events(&lender.stdout), ["listening", "lent", "returned", "ended"]);
    assert_eq!(events(&borrower.stdout), ["serving", "ended"]);
}
