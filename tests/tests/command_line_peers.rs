//! Every bad input that a peer or a guest's VMM can give the `farbus` program, through the program itself.
//!
//! A peer that sends an HTTP request to the link socket is turned away, and the borrower after it is served; a second borrower is told that
//! the device is lent, while the first one goes on.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use farbus_pci_shim::vfio_user::client::{Client, ClientError};
use farbus_tests::place::{Place, assert_end_in_order, assert_nvme, reason};
use farbus_tests::process::{AMPLE, run};
use farbus_transport::link::hello::{HEADER_LEN, Hello, Role, SPOKEN, Versions};
use farbus_transport::link::verdict::Refusal;
use farbus_transport::shm::{ListenError, ShmOptions, connect};
use farbus_transport::{Fabric, Op, Signal};
use rustix::io::Errno;

#[test]
fn a_second_borrower_is_told_that_the_device_is_lent() {
    let place = Place::new();
    let mut lender = place.lend();
    let first = place.borrow("first");
    lender.event("lent", AMPLE);
    let mut vmm = place.vmm("first");
    for _ in 0..3 {
        run(&["borrow", "--from", &place.link(), "--vfio-user", &place.name("second")])
            .assert_refusal(1, &["lent to another borrower", "try again"]);
        assert!(!place.path("second").exists());
        assert_nvme(&mut vmm);
    }
    assert_end_in_order(first);
    lender.event("returned", AMPLE);
    place.assert_served(&mut lender);
}

/// What a stranger does on the link socket before it closes its half, and the event and the words that follow: the device is only taken for
/// one whose hello is complete.
fn strangers() -> Vec<(&'static str, Vec<u8>, &'static str, &'static str)> {
    let hello = |versions| Hello { versions, role: Role::Borrower, features: 0, epoch: 0, description: b"abc".to_vec() };
    let good = hello(SPOKEN).encode().unwrap();
    let newer = hello(Versions::new(7, 9).unwrap()).encode().unwrap();
    let lender = Hello { role: Role::Lender, ..hello(SPOKEN) }.encode().unwrap();
    let mut long = good.clone();
    long[32..36].copy_from_slice(&u32::MAX.to_le_bytes());
    vec![
        ("another version", newer, "refused", "versions 7 to 9"),
        ("another lender", lender, "refused", "both sides are the lender"),
        ("http", b"GET / HTTP/1.1\r\nHost: example.org\r\nAccept: */*\r\n\r\n".to_vec(), "refused", "not a farbus peer"),
        ("a wild length", long, "refused", "over the limit"),
        ("no byte", Vec::new(), "refused", "closed the connection"),
        ("half a header", good[..20].to_vec(), "refused", "closed the connection after 20"),
        ("half a description", good[..good.len() - 1].to_vec(), "refused", "closed the connection"),
        ("a hello and no more", good.clone(), "returned", "no link after its hello"),
        ("a hello and noise", [good.as_slice(), &[0xa5; 500]].concat(), "returned", "cannot share rings"),
    ]
}

#[test]
fn strangers_on_the_link_socket_are_turned_away_and_the_next_borrower_is_served() {
    let place = Place::new();
    let mut lender = place.lend();
    for (who, bytes, event, why) in strangers() {
        let mut stranger = UnixStream::connect(place.path("link")).unwrap();
        // The lender may be faster and be gone.
        let _sent = stranger.write_all(&bytes);
        let _shut = stranger.shutdown(std::net::Shutdown::Write);
        let mut seen = Vec::new();
        let _reset = stranger.read_to_end(&mut seen);
        drop(stranger);
        let said = reason(&lender.event(event, AMPLE));
        assert!(said.contains(why), "{who}: {said}");
        place.assert_served(&mut lender);
    }
    assert_end_in_order(lender);
}

#[test]
fn strangers_that_say_nothing_keep_no_borrower_waiting_and_are_given_up() {
    let place = Place::new();
    let mut lender = place.lend();
    // More than are heard at a time.
    let silent: Vec<_> = (0..100).map(|_| UnixStream::connect(place.path("link")).unwrap()).collect();
    let started = Instant::now();
    place.assert_served(&mut lender);
    let served = started.elapsed();
    // Those that were given up for others before are not seen here any more.
    let said = reason(&lender.event("refused", AMPLE));
    assert!(said.contains("no complete hello"), "{said}; served after {served:?}");
    assert!(started.elapsed() < Duration::from_secs(10));
    for mut stranger in silent {
        // All are closed by now or soon.
        stranger.set_read_timeout(Some(AMPLE)).unwrap();
        let mut seen = Vec::new();
        stranger.read_to_end(&mut seen).unwrap();
        assert!(seen.len() <= HEADER_LEN, "a stranger is told no more than which versions are spoken");
    }
    place.assert_served(&mut lender);
}

#[test]
fn strangers_that_knock_without_end_do_not_fill_the_output() {
    let place = Place::new();
    let mut lender = place.lend();
    for _ in 0..300 {
        drop(UnixStream::connect(place.path("link")).unwrap());
    }
    place.assert_served(&mut lender);
    let took = lender.age().as_secs();
    lender.terminate();
    let end = lender.wait(AMPLE);
    assert_eq!(end.code(), Some(0));
    let said = end.stdout.matches("\"refused\"").count() as u64;
    assert!((1..=8 + took + 1).contains(&said), "{said} in {took} s: {}", end.stdout);
}

#[test]
fn a_borrower_that_is_refused_costs_the_one_that_is_served_nothing() {
    let place = Place::new();
    let mut lender = place.lend();
    let first = place.borrow("first");
    lender.event("lent", AMPLE);
    let hello = Hello { versions: SPOKEN, role: Role::Borrower, features: 0, epoch: 0, description: Vec::new() };
    for _ in 0..50 {
        let error = connect(place.path("link"), &hello, ShmOptions::default()).unwrap_err();
        assert!(matches!(error, ListenError::Refused { refusal: Refusal::Lent, .. }), "{error}");
        let said = reason(&lender.event("refused", AMPLE));
        assert!(said.contains("lent to another"), "{said}");
    }
    assert_nvme(&mut place.vmm("first"));
    assert_end_in_order(first);
    lender.event("returned", AMPLE);
    place.assert_served(&mut lender);
}

#[test]
fn a_borrower_that_breaks_the_protocol_after_its_hello_is_dropped() {
    let place = Place::new();
    let mut lender = place.lend();
    let hello = Hello { versions: SPOKEN, role: Role::Borrower, features: 0, epoch: 0, description: Vec::new() };
    for message in [&b""[..], b"\xff\xff", &[1, 9, 4, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]] {
        let mut link = connect(place.path("link"), &hello, ShmOptions::default()).unwrap().fabric;
        lender.event("lent", AMPLE);
        link.post(Signal::No, Op::Send { message }).unwrap();
        link.flush();
        let said = reason(&lender.event("returned", AMPLE));
        assert!(said.contains("broke the protocol"), "{said}");
        place.assert_served(&mut lender);
    }
}

#[test]
fn a_vmm_that_sends_noise_is_sent_away_and_the_next_is_served() {
    let place = Place::new();
    let mut lender = place.lend();
    let borrower = place.borrow("vmm");
    lender.event("lent", AMPLE);
    for noise in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 300], &[0; 16]] {
        let mut stranger = UnixStream::connect(place.path("vmm")).unwrap();
        // The server may be faster and be gone.
        let _sent = stranger.write_all(noise);
        let _shut = stranger.shutdown(std::net::Shutdown::Write);
        let mut seen = Vec::new();
        let _reset = stranger.read_to_end(&mut seen);
        drop(stranger);
        assert_nvme(&mut place.vmm("vmm"));
    }
    assert_end_in_order(borrower);
    lender.event("returned", AMPLE);
}

/// Everybody who may listen where a lender was looked for: what they send, and what the borrower says of it and advises.
#[test]
fn a_borrower_that_finds_somebody_else_says_who_and_does_not_ask_for_a_lender() {
    let hello = |versions, role| Hello { versions, role, features: 0, epoch: 0, description: Vec::new() };
    let newer = hello(Versions::new(7, 9).unwrap(), Role::Lender).encode().unwrap();
    let borrower = hello(SPOKEN, Role::Borrower).encode().unwrap();
    let lender = hello(SPOKEN, Role::Lender).encode().unwrap();
    let unknown = [lender.as_slice(), b"verdict\xc8"].concat();
    let cases: [(&[u8], &[&str]); 6] = [
        (&newer, &["peer speaks versions 7 to 9", "same version of farbus on both sides"]),
        (&borrower, &["both sides are the borrower", "address that a `farbus lend` has"]),
        (b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n........", &["not a farbus peer", "another program listens there"]),
        (b"", &["closed the connection after 0", "turned this process away"]),
        (&lender, &["no link after its hello", "what it says itself"]),
        (&unknown, &["refuses for reason 200", "the lender is newer"]),
    ];
    let place = Place::new();
    let listener = UnixListener::bind(place.path("link")).unwrap();
    for (sent, words) in cases {
        let end = std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut other, _) = listener.accept().unwrap();
                // The borrower may have left by then.
                let _sent = other.write_all(sent);
                let _shut = other.shutdown(std::net::Shutdown::Write);
                let _gone = other.read_to_end(&mut Vec::new());
            });
            run(&["borrow", "--from", &place.link(), "--vfio-user", &place.name("vmm")])
        });
        end.assert_refusal(1, words);
        assert!(!end.stderr.contains("running there"), "{end:?}");
    }
}

#[test]
fn a_second_vmm_is_told_that_the_device_is_in_use_and_the_first_goes_on() {
    let place = Place::new();
    let mut lender = place.lend();
    let borrower = place.borrow("vmm");
    lender.event("lent", AMPLE);
    let mut first = place.vmm("vmm");
    for _ in 0..3 {
        let refused = Client::open(place.path("vmm"), AMPLE).err();
        assert_eq!(refused.as_ref().and_then(ClientError::errno), Some(Errno::BUSY), "{refused:?}");
        assert_nvme(&mut first);
    }
    borrower.complaint("a second client was told that the device is in use", AMPLE);
    drop(first);
    assert_nvme(&mut place.vmm("vmm"));
    assert_end_in_order(borrower);
}

#[test]
fn the_first_vmm_brings_the_warning_that_it_must_not_be_migrated_and_no_other_does() {
    let place = Place::new();
    let mut lender = place.lend();
    let borrower = place.borrow("vmm");
    lender.event("lent", AMPLE);
    for _ in 0..3 {
        assert_nvme(&mut place.vmm("vmm"));
        borrower.complaint("do not migrate the virtual machine", AMPLE);
    }
    borrower.terminate();
    let end = borrower.wait(AMPLE);
    assert_eq!(end.stderr.matches("do not migrate").count(), 1, "{end:?}");
    assert!(run(&["borrow", "--help"]).stdout.contains("Do not migrate"));
}
