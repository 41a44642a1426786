//! The two rings of a native device on a thread of its own, both full.
//!
//! 600 stores that each raise an interrupt, before the function takes any: neither thread may wait for the other for ever.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use std::sync::mpsc::channel;
use std::time::Duration;

use common::{COMMAND, CopyEngine, DIE, LEN, RAISE, Recorder, Seen, bar0};
use farbus_remote_dma::lender::PollOptions;
use farbus_remote_dma::native::{Native, ThreadedNative};
use farbus_remote_dma::{Attachment, ResetKind, Width};
use farbus_transport::Nanos;

/// Runs `steps` and fails, instead of hanging, where they do not end.
fn in_time(steps: impl FnOnce(ThreadedNative, Recorder) + Send + 'static) {
    let (done, ended) = channel();
    std::thread::spawn(move || {
        steps(Native::threaded(Box::new(CopyEngine::new()), PollOptions::default()).unwrap(), Recorder::default());
        done.send(()).unwrap();
    });
    assert_eq!(ended.recv_timeout(Duration::from_secs(20)), Ok(()), "the two threads wait for each other");
}

fn raise(native: &mut ThreadedNative, host: &mut Recorder, vector: u16) {
    native.bar_write(bar0(LEN), Width::B8, u64::from(vector), host);
    native.bar_write(bar0(COMMAND), Width::B8, RAISE, host);
}

#[test]
fn a_burst_of_stores_that_all_interrupt_ends_and_the_last_vector_is_told() {
    in_time(|mut native, mut host| {
        for vector in 0..600 {
            raise(&mut native, &mut host, vector);
        }
        while host.0.back() != Some(&Seen::Interrupt(599)) {
            native.poll(Nanos::now(), &mut host);
        }
        assert_eq!(host.0.len(), 600);
    });
}

#[test]
fn a_reset_is_answered_while_more_vectors_wait_than_the_ring_holds() {
    in_time(|mut native, mut host| {
        for vector in 0..300 {
            raise(&mut native, &mut host, vector);
        }
        native.reset(ResetKind::Function, &mut host).unwrap();
    });
}

#[test]
fn stores_to_a_device_whose_thread_died_do_not_hang_the_guest() {
    in_time(|mut native, mut host| {
        native.bar_write(bar0(COMMAND), Width::B8, DIE, &mut host);
        for value in 0..600 {
            native.bar_write(bar0(LEN), Width::B8, value, &mut host);
        }
        assert!(native.gone().is_some());
        assert!(native.reset(ResetKind::Function, &mut host).is_err());
        assert_eq!(native.bar_read(bar0(LEN), Width::B8, &mut host), u64::MAX);
    });
}
