//! Who is let in: one client at a time; a second is refused at once and disturbs nobody, and one that says nothing keeps nobody out.
//!
//! While a client reads registers a second one's `VERSION` is answered with `EBUSY` within milliseconds; when the first has closed its socket
//! the next is served without a pause in between, by a device that was reset.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod vfio_user_support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use farbus_pci_shim::vfio_user::Options;
use farbus_pci_shim::vfio_user::client::{Client, ClientError};
use rustix::io::Errno;
use vfio_user_support::{DEADLINE, Running, serve};

/// Far below any limit for silence, and ample for an answer.
const AT_ONCE: Duration = Duration::from_secs(2);

fn assert_works(client: &mut Client, value: u32) {
    client.region_write(0, 0x1018, &value.to_le_bytes()).unwrap();
    let mut bytes = [0; 4];
    client.region_read(0, 0x1018, &mut bytes).unwrap();
    assert_eq!(u32::from_le_bytes(bytes), value);
}

#[track_caller]
fn assert_refused(server: &Running) {
    let started = Instant::now();
    let refused = Client::open(&server.path, DEADLINE).err();
    let errno = refused.as_ref().and_then(ClientError::errno);
    assert_eq!(errno, Some(Errno::BUSY), "{refused:?}");
    assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
}

#[test]
fn a_second_client_is_refused_at_once_and_the_first_goes_on() {
    let server = serve(Options::default());
    let mut first = server.client();
    for value in 0..100 {
        assert_refused(&server);
        assert_works(&mut first, value);
    }
    let resets = server.device.state().resets;
    assert_eq!(resets, 0, "one that was refused touched the device");
    drop(first);
    assert_works(&mut server.client(), 7);
}

#[test]
fn many_at_once_are_refused_while_the_first_is_at_work() {
    let server = serve(Options::default());
    let mut first = server.client();
    std::thread::scope(|scope| {
        let others: Vec<_> = (0..20).map(|_| scope.spawn(|| assert_refused(&server))).collect();
        let mut value = 0;
        while others.iter().any(|other| !other.is_finished()) {
            assert_works(&mut first, value);
            value += 1;
        }
        others.into_iter().for_each(|other| other.join().unwrap());
    });
    assert_works(&mut first, 1);
}

#[test]
fn one_that_comes_when_the_last_has_left_waits_for_the_reset_and_is_not_refused() {
    let server = serve(Options::default());
    for round in 0..300 {
        let mut client = server.client();
        let mut bytes = [9; 4];
        client.region_read(0, 0x1018, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 4], "round {round}: the device was not reset");
        assert_works(&mut client, 17);
    }
}

#[test]
fn one_that_waited_and_left_keeps_nobody_out() {
    let server = serve(Options::default());
    let first = server.client();
    // While this is held the device cannot be reset, so that the first one's place is not free yet.
    let held = server.device.state();
    drop(first);
    for _ in 0..3 {
        let mut waited = UnixStream::connect(&server.path).unwrap();
        waited.write_all(&[1, 0, 1, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]).unwrap();
        // For the thread at the door to hear it; where it has not by then, the test proves less and fails no more.
        std::thread::sleep(Duration::from_millis(50));
    }
    std::thread::scope(|scope| {
        let next = scope.spawn(|| Client::open(&server.path, DEADLINE));
        std::thread::sleep(Duration::from_millis(50));
        drop(held);
        assert_works(&mut next.join().unwrap().unwrap(), 3);
    });
}

#[test]
fn whoever_says_nothing_keeps_nobody_out_and_is_sent_away() {
    let server = serve(Options { version_deadline: Duration::from_millis(500), ..Options::default() });
    // More than may be silent at a time.
    let silent: Vec<_> = (0..40).map(|_| UnixStream::connect(&server.path).unwrap()).collect();
    let started = Instant::now();
    let mut client = server.client();
    assert_works(&mut client, 3);
    assert!(started.elapsed() < AT_ONCE);
    for mut stranger in silent {
        stranger.set_read_timeout(Some(DEADLINE)).unwrap();
        assert_eq!(stranger.read(&mut [0]).unwrap(), 0, "it was sent away");
    }
    assert_works(&mut client, 4);
}

#[test]
fn a_second_client_that_sends_noise_is_sent_away() {
    let server = serve(Options::default());
    let mut first = server.client();
    for noise in [&b"G"[..], b"GET / HTTP/1.1\r\n\r\n", &[0xff; 40], &[0; 16], &[0; 100_000]] {
        let mut stranger = UnixStream::connect(&server.path).unwrap();
        stranger.set_read_timeout(Some(DEADLINE)).unwrap();
        // It may be sent away before all is sent.
        let _sent = stranger.write_all(noise);
        let mut answer = Vec::new();
        // The stream may end with a reset, because bytes of it were never read.
        let _reset = stranger.read_to_end(&mut answer);
        assert!(answer.is_empty() || answer.len() == 16, "{answer:?}");
        assert_works(&mut first, 5);
    }
}
