//! What anybody can do who reaches the port: nothing, noise, half a handshake, the wrong protocol, many at once; and that the next one is served.
//!
//! A peer that says nothing is given up after 5 s and has then cost a socket and a thread; one that was started with `--plain` is told apart from
//! one that sends an HTTP request.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_control::{
    BorrowerSecurity, CONNECT_LIMIT, CertificateProblem, HANDSHAKE_LIMIT, HostPort, LenderSecurity, Listener, MAX_FROM_ONE,
    MAX_GREETINGS, MeetError, Unwelcome, connect,
};
use farbus_transport::link::hello::{Disagreement, ExchangeError, Hello, HelloError, Role, Versions};
use farbus_transport::link::verdict::Refusal;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use support::{AMPLE, Lender, PLAIN, Site, borrow, frame, hello, runtime, tls};

type IsIt = fn(&MeetError) -> bool;

/// What a lender makes of a peer that sends `bytes` and then nothing more; and what that peer hears.
fn say(lender: &Lender, bytes: &[u8]) -> (MeetError, Vec<u8>) {
    let mut stranger = TcpStream::connect(lender.address()).unwrap();
    stranger.write_all(bytes).unwrap();
    stranger.shutdown(Shutdown::Write).unwrap();
    let error = lender.greet().unwrap_err();
    let mut heard = Vec::new();
    stranger.set_read_timeout(Some(AMPLE)).unwrap();
    // It may end with a reset.
    let _end = stranger.read_to_end(&mut heard);
    (error, heard)
}

/// A TLS record.
fn record(kind: u8, body: &[u8]) -> Vec<u8> {
    [&[kind, 3, 1][..], &(body.len() as u16).to_be_bytes(), body].concat()
}

/// The first message of a client that speaks TLS 1.2 at most (RFC 5246, section 7.4.1.2).
fn tls12() -> Vec<u8> {
    let extensions = [0, 13, 0, 4, 0, 2, 4, 3, 0, 10, 0, 4, 0, 2, 0, 23];
    let mut hello = vec![3, 3];
    hello.extend_from_slice(&[7; 32]);
    hello.extend_from_slice(&[0, 0, 2, 0xc0, 0x2b, 1, 0, 0, extensions.len() as u8]);
    hello.extend_from_slice(&extensions);
    record(22, &[&[1, 0, 0, hello.len() as u8][..], &hello].concat())
}

#[test]
fn noise_is_turned_away_and_learns_nothing() {
    let site = Site::new();
    let lender = site.lender();
    let http = b"GET / HTTP/1.1\r\nHost: example.org\r\nAccept: */*\r\n\r\n";
    let (error, heard) = say(&lender, http);
    assert!(matches!(&error, MeetError::NotTls { found } if found == b"GET / HT"), "{error}");
    assert!(heard.len() < 20, "{heard:?}");
    let half = record(22, &[1, 0, 1, 0, 3, 3]);
    let cases: [(&str, Vec<u8>, IsIt); 8] = [
        ("nothing", vec![], |error| matches!(error, MeetError::Closed { received: 0 })),
        ("half a record", half[..5].to_vec(), |error| matches!(error, MeetError::Closed { received: 5 })),
        ("half a handshake", half, |error| matches!(error, MeetError::Closed { received: 11 })),
        ("zeros", vec![0; 5000], |error| matches!(error, MeetError::NotTls { .. })),
        ("ones", vec![0xff; 5000], |error| matches!(error, MeetError::NotTls { .. })),
        ("data before the handshake", record(23, &[7; 100]), |error| matches!(error, MeetError::Tls(_) | MeetError::NotTls { .. })),
        ("a wild length", [&[22, 3, 1, 0xff, 0xff][..], &[0; 3000]].concat(), |error| matches!(error, MeetError::Tls(_))),
        ("TLS 1.2", tls12(), |error| matches!(error, MeetError::Tls(rustls::Error::PeerIncompatible(_)))),
    ];
    for (what, bytes, is_it) in cases {
        let (error, heard) = say(&lender, &bytes);
        assert!(is_it(&error), "{what}: {error:?}");
        assert!(heard.len() < 20, "{what}: {heard:?}");
        lender.assert_serves(&site.vm7());
    }
}

#[test]
fn random_handshakes_are_turned_away() {
    let site = Site::new();
    let lender = site.lender();
    // Any bytes, the same in each run (xorshift).
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..60 {
        let mut body: Vec<u8> = (0..random() % 600).map(|_| random() as u8).collect();
        if random() % 2 == 0 {
            let len = body.len().saturating_sub(4) as u32;
            let head = [1, (len >> 16) as u8, (len >> 8) as u8, len as u8];
            body.iter_mut().zip(head).for_each(|(byte, head)| *byte = head);
        }
        let (error, heard) = say(&lender, &record(22, &body));
        assert!(matches!(error, MeetError::Tls(_) | MeetError::Closed { .. }), "{error:?}");
        assert!(heard.len() < 20, "{heard:?}");
    }
    lender.assert_serves(&site.vm7());
}

#[test]
fn a_peer_that_says_nothing_or_dribbles_is_given_up_after_5_seconds() {
    let site = Site::new();
    let lender = site.lender();
    let silent = TcpStream::connect(lender.address()).unwrap();
    let started = Instant::now();
    let error = lender.greet().unwrap_err();
    assert!(matches!(error, MeetError::Deadline { .. }), "{error}");
    assert!((HANDSHAKE_LIMIT..HANDSHAKE_LIMIT + Duration::from_secs(3)).contains(&started.elapsed()), "{:?}", started.elapsed());
    drop(silent);

    let mut dribbling = TcpStream::connect(lender.address()).unwrap();
    let dribble = std::thread::spawn(move || {
        for byte in record(22, &[1; 400]) {
            if dribbling.write_all(&[byte]).is_err() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        false
    });
    let started = Instant::now();
    let error = lender.greet().unwrap_err();
    assert!(matches!(error, MeetError::Deadline { .. } | MeetError::Tls(_)), "{error}");
    assert!(started.elapsed() < HANDSHAKE_LIMIT + Duration::from_secs(3), "{:?}", started.elapsed());
    assert!(dribble.join().unwrap(), "all of it was taken");
    lender.assert_serves(&site.vm7());
}

#[test]
fn plain_against_tls_is_told_to_both_either_way() {
    let site = Site::new();
    let lender = site.lender();
    let (at_lender, at_borrower) = lender.part(&PLAIN);
    assert!(matches!(at_lender, MeetError::PlainPeer), "{at_lender}");
    assert!(matches!(at_borrower, MeetError::TlsPeer), "{at_borrower}");
    lender.assert_serves(&site.vm7());

    let lender = Lender::plain();
    let (at_lender, at_borrower) = lender.part(&site.vm7());
    assert!(matches!(at_lender, MeetError::TlsPeer), "{at_lender}");
    assert!(matches!(at_borrower, MeetError::PlainPeer), "{at_borrower}");
    lender.assert_serves(&PLAIN);
}

/// A client of this site that shows no certificate, up to the end of its own half of the handshake.
fn without_certificate(site: &Site, to: SocketAddr) -> (ClientConnection, TcpStream) {
    let mut roots = RootCertStore::empty();
    let pem = site.0.pem().as_bytes();
    roots.add(<CertificateDer<'_> as rustls::pki_types::pem::PemObject>::from_pem_slice(pem).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut client = ClientConnection::new(Arc::new(config), ServerName::from(to.ip())).unwrap();
    let mut socket = TcpStream::connect(to).unwrap();
    socket.set_read_timeout(Some(AMPLE)).unwrap();
    while client.is_handshaking() {
        client.complete_io(&mut socket).unwrap();
    }
    (client, socket)
}

#[test]
fn a_peer_without_a_certificate_gets_an_alert_and_not_one_byte_of_the_hello() {
    let site = Site::new();
    let lender = site.lender();
    let address = lender.address();
    let pem = site.0.pem().to_owned();
    let client = std::thread::spawn(move || {
        let site = Site(farbus_control::authority::Authority::from_pem(&pem, &site.0.key_pem()).unwrap());
        let (mut client, mut socket) = without_certificate(&site, address);
        let mut heard = Vec::new();
        let error = rustls::Stream::new(&mut client, &mut socket).read_to_end(&mut heard).unwrap_err();
        (heard, error, site)
    });
    let error = lender.greet().unwrap_err();
    assert!(matches!(error, MeetError::Certificate(CertificateProblem::Missing)), "{error}");
    let (heard, error, site) = client.join().unwrap();
    assert!(heard.is_empty() && error.to_string().contains("CertificateRequired"), "{heard:?} {error}");
    lender.assert_serves(&site.vm7());
}

#[test]
fn versions_and_roles_are_compared_inside_tls() {
    let site = Site::new();
    let lender = site.lender();
    let meet = |hello: Hello| {
        let (address, security) = (lender.address(), site.vm7());
        let borrower = std::thread::spawn(move || borrow(address, &security, &hello).unwrap_err());
        (lender.greet().unwrap_err(), borrower.join().unwrap())
    };
    let (at_lender, at_borrower) = meet(Hello { versions: Versions::new(3, 4).unwrap(), ..hello(Role::Borrower) });
    let version = |error: &MeetError| matches!(error, MeetError::Hello(ExchangeError::Disagreement(Disagreement::Version { .. })));
    assert!(version(&at_lender) && version(&at_borrower), "{at_lender}; {at_borrower}");
    assert_eq!(at_lender.to_string(), "peer speaks versions 3 to 4, this side 1 to 1");
    let (at_lender, _) = meet(hello(Role::Lender));
    assert_eq!(at_lender.to_string(), "both sides are the lender");
    lender.assert_serves(&site.vm7());
}

#[test]
fn noise_instead_of_a_plain_hello_is_turned_away() {
    let lender = Lender::plain();
    let (error, _) = say(&lender, b"GET / HTTP/1.1\r\nHost: example.org\r\nAccept: */*\r\n\r\n");
    assert!(matches!(error, MeetError::Hello(ExchangeError::Malformed(HelloError::Magic { .. }))), "{error}");
    let (error, _) = say(&lender, b"farbus");
    assert!(matches!(error, MeetError::Hello(ExchangeError::PeerClosed { received: 6, .. })), "{error}");
    lender.assert_serves(&PLAIN);
}

#[test]
fn a_second_borrower_hears_the_verdict_and_one_that_is_dropped_hears_that() {
    let site = Site::new();
    for (lender, security) in [(site.lender(), site.vm7()), (Lender::plain(), PLAIN)] {
        let come = || {
            let (address, security) = (lender.address(), security.clone());
            std::thread::spawn(move || borrow(address, &security, &hello(Role::Borrower)))
        };
        let second = come();
        lender.greet().unwrap().refuse(Refusal::Lent).unwrap();
        let error = second.join().unwrap().unwrap_err();
        assert!(matches!(error, MeetError::Refused(Refusal::Lent)), "{error}");
        let third = come();
        drop(lender.greet().unwrap());
        let error = third.join().unwrap().unwrap_err();
        assert!(matches!(error, MeetError::Dropped), "{error}");
        lender.assert_serves(&security);
    }
}

#[test]
fn who_is_not_there_is_named() {
    let (runtime, vm7) = (runtime(), Site::new().vm7());
    let dial = |to: &str, security: &BorrowerSecurity| runtime.block_on(connect(&to.parse().unwrap(), security)).unwrap_err();
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = dial(&free.to_string(), &vm7);
    assert!(matches!(error, MeetError::NobodyThere { address } if address == free), "{error}");
    // RFC 6761, section 6.4: there is no such name.
    let error = dial("no-such-host.invalid:7000", &vm7);
    assert!(
        matches!(&error, MeetError::Resolve { host, .. } | MeetError::ResolveLimit { host } if host == "no-such-host.invalid"),
        "{error}"
    );
    // RFC 5737: an address of nobody's, which is not even tried.
    let error = dial("192.0.2.1:7000", &PLAIN);
    assert!(matches!(error, MeetError::PlainBeyondLoopback { .. }), "{error}");
}

#[test]
fn an_address_that_does_not_answer_is_given_up() {
    // A queue that is full: the kernel answers no further request to connect (tcp(7), listen(2)).
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
    socket.listen(0).unwrap();
    let full = socket.local_addr().unwrap().as_socket().unwrap();
    let first = TcpStream::connect(full).unwrap();
    let started = Instant::now();
    let error = runtime().block_on(connect(&full.to_string().parse().unwrap(), &Site::new().vm7())).unwrap_err();
    assert!(matches!(error, MeetError::NoAnswer { address, .. } if address == full), "{error}");
    assert!((CONNECT_LIMIT..CONNECT_LIMIT + Duration::from_secs(3)).contains(&started.elapsed()), "{:?}", started.elapsed());
    drop(first);
}

#[test]
fn a_port_that_cannot_be_listened_at_is_named() {
    let site = Site::new();
    let lender = site.lender();
    let runtime = runtime();
    let bind = |at: &HostPort, security| runtime.block_on(Listener::bind(at, security)).err().unwrap();
    let plain = || LenderSecurity::Plain { beyond_loopback: false };
    let error = bind(&lender.address().to_string().parse().unwrap(), plain());
    assert!(matches!(error, MeetError::InUse { .. }), "{error}");
    for everywhere in ["0.0.0.0:0", "[::]:0"] {
        let error = bind(&everywhere.parse().unwrap(), plain());
        assert!(matches!(error, MeetError::PlainBeyondLoopback { .. }), "{error}");
    }
    let error = bind(&"192.0.2.1:0".parse().unwrap(), LenderSecurity::Plain { beyond_loopback: true });
    assert!(matches!(error, MeetError::Host { what: "listen at", .. }), "{error}");
    runtime.block_on(Listener::bind(&"0.0.0.0:0".parse().unwrap(), LenderSecurity::Plain { beyond_loopback: true })).unwrap();
}

/// Connects from an address of this host's loopback network.
fn connect_from(from: [u8; 4], to: SocketAddr) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((from, 0)).into()).unwrap();
    socket.connect(&to.into()).unwrap();
    socket.into()
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The lender of this test greets each visitor on a thread of its own, as `farbus lend` does.
#[test]
fn strangers_that_say_nothing_keep_nobody_out_and_cost_nothing_after_5_seconds() {
    let site = Site::new();
    let Lender { runtime, listener } = site.lender();
    let to = listener.address();
    let vm7 = site.vm7();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        loop {
            let arrival = runtime.block_on(listener.accept()).unwrap();
            let tell = tell.clone();
            std::thread::spawn(move || match arrival.greet(&hello(Role::Lender)) {
                Ok(greeted) => {
                    let mut met = greeted.welcome().unwrap();
                    met.control.send(b"welcome").unwrap();
                    frame(&mut met);
                }
                Err(error) => tell.send(error).unwrap(),
            });
        }
    });
    let serve = || {
        let started = Instant::now();
        let mut met = borrow(to, &vm7, &hello(Role::Borrower)).unwrap();
        assert_eq!(frame(&mut met), b"welcome");
        met.control.send(b"bye").unwrap();
        assert!(started.elapsed() < HANDSHAKE_LIMIT / 2, "{:?}", started.elapsed());
    };
    serve();
    let before = descriptors();
    let mut strangers = Vec::new();
    // From one address, then from as many as it takes.
    for host in 9..9 + 2 * (MAX_GREETINGS / MAX_FROM_ONE) as u8 {
        strangers.extend((0..2 * MAX_FROM_ONE).map(|_| connect_from([127, 0, 0, host], to)));
        serve();
    }
    for stranger in &mut strangers {
        stranger.set_read_timeout(Some(HANDSHAKE_LIMIT + Duration::from_secs(3))).unwrap();
        let heard = stranger.read(&mut [0; 100]);
        assert!(matches!(heard, Ok(0)) || heard.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset));
    }
    // Who was in the way was ended at once, the last ones when their time was over.
    let fates: Vec<_> = strangers.iter().map(|_| told.recv_timeout(AMPLE).unwrap()).collect();
    let ended = fates.iter().filter(|error| matches!(error, MeetError::Crowded)).count();
    let given_up = fates.iter().filter(|error| matches!(error, MeetError::Deadline { .. })).count();
    assert!(ended + given_up == strangers.len() && (1..=MAX_GREETINGS).contains(&given_up), "{ended} {given_up}");
    drop(strangers);
    let deadline = Instant::now() + AMPLE;
    while descriptors() > before {
        assert!(Instant::now() < deadline, "{} descriptors, {before} before the strangers came", descriptors());
        std::thread::sleep(Duration::from_millis(20));
    }
    serve();
}

#[test]
fn a_borrower_gives_up_a_lender_that_says_nothing() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let started = Instant::now();
    let error = borrow(silent.local_addr().unwrap(), &Site::new().vm7(), &hello(Role::Borrower)).unwrap_err();
    assert!(matches!(error, MeetError::Deadline { .. }), "{error}");
    assert!((HANDSHAKE_LIMIT..HANDSHAKE_LIMIT + Duration::from_secs(3)).contains(&started.elapsed()), "{:?}", started.elapsed());
}

#[test]
fn a_borrower_turns_away_a_lender_that_sends_noise_or_leaves() {
    let vm7 = Site::new().vm7();
    let cases: [(Vec<u8>, IsIt); 4] = [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), |error| matches!(error, MeetError::NotTls { .. })),
        (record(22, &[2, 0, 0, 4, 3, 3, 0, 0]), |error| matches!(error, MeetError::Tls(_))),
        (record(21, &[2, 40]), |error| matches!(error, MeetError::Unwelcome(Unwelcome::Alert(40)))),
        (vec![], |error| matches!(error, MeetError::Closed { received: 0 })),
    ];
    for (bytes, is_it) in cases {
        let lender = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = lender.local_addr().unwrap();
        let answer = std::thread::spawn(move || {
            let (mut stream, _) = lender.accept().unwrap();
            // What the borrower says first is taken, so that the end is no reset.
            let _count = stream.read(&mut [0; 4096]).unwrap();
            stream.write_all(&bytes).unwrap();
        });
        let error = borrow(address, &vm7, &hello(Role::Borrower)).unwrap_err();
        assert!(is_it(&error), "{error:?}");
        answer.join().unwrap();
    }
}

#[test]
fn a_host_name_that_no_certificate_can_be_for_is_refused() {
    let site = Site::new();
    let lender = site.lender();
    let to = HostPort { host: "127.1".to_owned(), port: lender.address().port() };
    let security = tls(site.vm("vm7"));
    let error = match runtime().block_on(connect(&to, &security)) {
        Ok(dialled) => dialled.greet(&hello(Role::Borrower)).unwrap_err(),
        Err(error) => error,
    };
    assert!(matches!(&error, MeetError::HostName { .. } | MeetError::Resolve { .. }), "{error}");
}
