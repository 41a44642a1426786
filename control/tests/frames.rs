//! Frames after the welcome, over TLS and in the open: all of them, in order, and the news of a peer or a host that is gone.
//!
//! A host that dies sends nothing, not even a reset: here its socket drops every segment that comes, and the lender hears within seconds that
//! the peer is gone, though nobody sent anything.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_control::authority::Issued;
use farbus_control::certificate::Validity;
use farbus_control::{Greeted, Met, PROBE_AFTER, PROBE_EVERY, PROBES, UNACKNOWLEDGED};
use farbus_transport::link::control::{Control, ControlError, MAX_FRAME};
use farbus_transport::link::hello::{HelloStream, Role, exchange};
use farbus_transport::link::verdict::hear;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use support::{AMPLE, Lender, PLAIN, Site, frame, hello};

/// Both ends, over TLS and in the open.
fn pairs() -> [(Met, Met); 2] {
    let site = Site::new();
    [(site.lender(), site.vm7()), (Lender::plain(), PLAIN)].map(|(lender, security)| {
        let (lender, borrower) = lender.meet(&security);
        (lender.unwrap(), borrower.unwrap())
    })
}

/// Whether the descriptor becomes readable.
fn readable(fd: BorrowedFd<'_>, within: Duration) -> bool {
    let timeout = Timespec { tv_sec: within.as_secs() as i64, tv_nsec: i64::from(within.subsec_nanos()) };
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap() == 1
}

fn some_frame(number: u32) -> Vec<u8> {
    let len = number.wrapping_mul(2_654_435_761) as usize % (MAX_FRAME + 1);
    (0..len).map(|at| (at as u32 ^ number) as u8).collect()
}

#[test]
fn all_frames_arrive_in_order_both_ways_at_once() {
    const FRAMES: u32 = 3000;
    for (mut lender, mut borrower) in pairs() {
        let both = |met: &mut Met, first: u32, expected: u32| {
            let mut next = expected;
            let mut take = |met: &mut Met| {
                while next < expected + FRAMES {
                    let Some(got) = met.control.receive().unwrap() else { return false };
                    assert_eq!(got, some_frame(next), "frame {next}");
                    next += 1;
                }
                true
            };
            for number in first..first + FRAMES {
                met.control.send(&some_frame(number)).unwrap();
                take(met);
            }
            let deadline = Instant::now() + AMPLE;
            while !take(met) {
                assert!(Instant::now() < deadline, "frames are missing");
                readable(met.control.fd(), Duration::from_secs(1));
            }
        };
        let other = std::thread::spawn(move || both(&mut borrower, 0, FRAMES));
        both(&mut lender, FRAMES, 0);
        other.join().unwrap();
    }
}

/// One TLS record may hold many frames; when the first is handed out, the socket has nothing more.
#[test]
fn what_was_read_with_one_frame_is_handed_out_without_another_wake_up() {
    for (mut lender, mut borrower) in pairs() {
        for _ in 0..20 {
            lender.control.send(b"x").unwrap();
        }
        // All are here.
        std::thread::sleep(Duration::from_millis(100));
        assert!(readable(borrower.control.fd(), Duration::ZERO));
        assert!(borrower.control.receive().unwrap().is_some());
        assert!(!readable(borrower.control.fd(), Duration::ZERO), "nothing was read ahead: the case that is tested does not occur");
        let mut more = 0;
        while borrower.control.receive().unwrap().is_some() {
            more += 1;
        }
        assert_eq!(more, 19);
        assert!(!readable(borrower.control.fd(), Duration::from_millis(50)));
    }
}

#[test]
fn a_peer_that_ends_is_gone_after_its_last_frame() {
    for (mut lender, mut borrower) in pairs() {
        borrower.control.send(b"the last").unwrap();
        drop(borrower);
        assert_eq!(frame(&mut lender), b"the last");
        assert!(readable(lender.control.fd(), AMPLE));
        assert!(matches!(lender.control.receive(), Err(ControlError::Gone)));
        assert!(matches!(lender.control.receive(), Err(ControlError::Gone)));
    }
}

#[test]
fn a_peer_that_takes_nothing_is_given_up() {
    for (mut lender, _borrower) in pairs() {
        let started = Instant::now();
        let error = loop {
            if let Err(error) = lender.control.send(&[7; MAX_FRAME]) {
                break error;
            }
            assert!(started.elapsed() < AMPLE);
        };
        assert!(matches!(error, ControlError::Stuck | ControlError::Gone), "{error}");
        assert!(matches!(lender.control.send(b""), Err(ControlError::Gone)));
    }
}

#[test]
fn a_frame_over_the_limit_is_refused_over_tls_too() {
    let (mut lender, _borrower) = pairs().into_iter().next().unwrap();
    assert!(matches!(lender.control.send(&[0; MAX_FRAME + 1]), Err(ControlError::TooLong { .. })));
}

/// The way of a borrower by foreign means, so that its socket can be reached: TLS by the library's own stream.
fn foreign(site: &Site, issued: &Issued, to: std::net::SocketAddr) -> StreamOwned<ClientConnection, TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(site.0.pem().as_bytes()).unwrap()).unwrap();
    let own = vec![CertificateDer::from_pem_slice(issued.certificate.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(own, key)
        .unwrap();
    let client = ClientConnection::new(Arc::new(config), ServerName::from(to.ip())).unwrap();
    StreamOwned::new(client, TcpStream::connect(to).unwrap())
}

struct Foreign(StreamOwned<ClientConnection, TcpStream>);

impl Read for Foreign {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(into)
    }
}

impl Write for Foreign {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

impl HelloStream for Foreign {
    fn set_timeout(&mut self, timeout: Option<Duration>) -> std::io::Result<()> {
        self.0.sock.set_read_timeout(timeout)?;
        self.0.sock.set_write_timeout(timeout)
    }
}

/// A lender's end, and a borrower's that can do what ours never does.
fn with_foreigner() -> (Met, Foreign) {
    let site = Site::new();
    let issued = site.issue("farbus:borrower/vm7", &[], Validity::days_from_now(1));
    let lender = site.lender();
    let to = lender.address();
    let foreigner = std::thread::spawn(move || {
        let mut stream = Foreign(foreign(&site, &issued, to));
        exchange(&mut stream, &hello(Role::Borrower), AMPLE).unwrap();
        hear(&mut stream, AMPLE).unwrap().unwrap();
        stream
    });
    let met = lender.greet().and_then(Greeted::welcome).unwrap();
    (met, foreigner.join().unwrap())
}

/// What comes of it when the descriptor says that there is something.
fn outcome(control: &mut dyn Control) -> Result<Option<Vec<u8>>, ControlError> {
    let deadline = Instant::now() + AMPLE;
    farbus_transport::link::control::receive_by(control, deadline)
}

#[test]
fn another_implementation_of_tls_understands_ours() {
    let (mut met, mut foreigner) = with_foreigner();
    foreigner.write_all(b"\x05\0\0\0hello").unwrap();
    assert_eq!(frame(&mut met), b"hello");
    met.control.send(b"yes").unwrap();
    let mut answer = [0; 7];
    foreigner.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"\x03\0\0\0yes");
    // New keys are no frame, and what follows them is one.
    foreigner.0.conn.refresh_traffic_keys().unwrap();
    foreigner.write_all(b"\x05\0\0\0again").unwrap();
    assert_eq!(frame(&mut met), b"again");
}

#[test]
fn bytes_that_are_not_the_peers_end_the_connection() {
    for noise in
        [&b"\x05\0\0\0hello"[..], &[0x17, 3, 3, 0, 20, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]]
    {
        let (mut met, mut foreigner) = with_foreigner();
        foreigner.0.sock.write_all(noise).unwrap();
        let error = outcome(met.control.as_mut()).unwrap_err();
        assert!(matches!(error, ControlError::Foreign(_)), "{error:?}");
    }
}

#[test]
fn a_wild_length_inside_tls_ends_the_connection() {
    let (mut met, mut foreigner) = with_foreigner();
    foreigner.write_all(&u32::MAX.to_le_bytes()).unwrap();
    let error = outcome(met.control.as_mut()).unwrap_err();
    assert!(matches!(error, ControlError::TooLong { .. }), "{error:?}");
}

/// From now on the host of this socket is dead: whatever comes for it is dropped before TCP sees it (socket(7), SO_ATTACH_FILTER).
fn die(socket: &TcpStream) {
    let nothing = [socket2::SockFilter::new(0x06, 0, 0, 0)];
    socket2::SockRef::from(socket).attach_filter(&nothing).unwrap();
}

#[test]
fn a_host_that_died_is_noticed_though_nobody_sends() {
    let (mut met, foreigner) = with_foreigner();
    let allowed = PROBE_AFTER + PROBES * PROBE_EVERY + Duration::from_secs(3);
    // As long as the host is there, silence is no death.
    assert!(!readable(met.control.fd(), allowed));
    assert!(met.control.receive().unwrap().is_none());
    die(&foreigner.0.sock);
    let started = Instant::now();
    assert!(readable(met.control.fd(), allowed), "nothing within {allowed:?}");
    assert!(matches!(met.control.receive(), Err(ControlError::Gone)));
    assert!(started.elapsed() > Duration::from_secs(1), "it was the filter that ended the connection");
}

#[test]
fn a_host_that_died_while_a_frame_is_on_its_way_is_noticed() {
    let (mut met, foreigner) = with_foreigner();
    die(&foreigner.0.sock);
    met.control.send(b"into the void").unwrap();
    let allowed = UNACKNOWLEDGED + Duration::from_secs(5);
    assert!(readable(met.control.fd(), allowed), "nothing within {allowed:?}");
    assert!(matches!(met.control.receive(), Err(ControlError::Gone)));
}
