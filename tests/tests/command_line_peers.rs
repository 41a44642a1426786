//! Every bad input that a peer or a guest's VMM can give the `farbus` program, through the program itself.
//!
//! A peer that sends an HTTP request to the link socket is turned away, and the borrower after it is served; a second borrower is told that
//! the device is lent, while the first one goes on.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use farbus_tests::place::{Place, assert_end_in_order, assert_nvme, reason};
use farbus_tests::process::{AMPLE, run};
use farbus_transport::link::hello::{Hello, Role, SPOKEN, Versions};
use farbus_transport::shm::{ShmOptions, connect};
use farbus_transport::{Fabric, Op, Signal};

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

/// What a stranger does on the link socket; the connection is closed after it.
fn strangers() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let hello = |versions| Hello { versions, role: Role::Borrower, features: 0, epoch: 0, description: b"abc".to_vec() };
    let good = hello(SPOKEN).encode().unwrap();
    let newer = hello(Versions::new(7, 9).unwrap()).encode().unwrap();
    let lender = Hello { role: Role::Lender, ..hello(SPOKEN) }.encode().unwrap();
    let mut long = good.clone();
    long[32..36].copy_from_slice(&u32::MAX.to_le_bytes());
    vec![
        ("another version", newer, "versions 7 to 9"),
        ("another lender", lender, "both sides are the lender"),
        ("http", b"GET / HTTP/1.1\r\nHost: example.org\r\nAccept: */*\r\n\r\n".to_vec(), "not a farbus peer"),
        ("a wild length", long, "over the limit"),
        ("no byte", Vec::new(), "closed the connection"),
        ("half a header", good[..20].to_vec(), "closed the connection after 20"),
        ("half a description", good[..good.len() - 1].to_vec(), "closed the connection"),
        ("a hello and no more", good.clone(), ""),
        ("a hello and noise", [good.as_slice(), &[0xa5; 500]].concat(), ""),
    ]
}

#[test]
fn strangers_on_the_link_socket_are_turned_away_and_the_next_borrower_is_served() {
    let place = Place::new();
    let mut lender = place.lend();
    for (who, bytes, why) in strangers() {
        let mut stranger = UnixStream::connect(place.path("link")).unwrap();
        // The lender may be faster and be gone.
        let _sent = stranger.write_all(&bytes);
        let _shut = stranger.shutdown(std::net::Shutdown::Write);
        let mut seen = Vec::new();
        let _reset = stranger.read_to_end(&mut seen);
        drop(stranger);
        let said = reason(&lender.event("returned", AMPLE));
        assert!(said.contains(why), "{who}: {said}");
        place.assert_served(&mut lender);
    }
    assert_end_in_order(lender);
}

#[test]
fn a_stranger_that_says_nothing_is_given_up() {
    let place = Place::new();
    let mut lender = place.lend();
    let silent = UnixStream::connect(place.path("link")).unwrap();
    let started = Instant::now();
    let said = reason(&lender.event("returned", AMPLE));
    assert!(said.contains("no complete hello"), "{said}");
    assert!(started.elapsed() < Duration::from_secs(10));
    place.assert_served(&mut lender);
    drop(silent);
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
