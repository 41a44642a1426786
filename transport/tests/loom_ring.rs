//! The ring under a model checker: loom runs its code in every interleaving, with every value that a relaxed load may return.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p farbus-transport --test loom_ring --release` has the consumer arm while the second of two messages is
//! pushed; with a fence on both sides nobody sleeps through it, and with one fence less loom finds the schedule in which somebody does.
//!
//! Not modelled: `Fencing::Sleeper`'s membarrier(2), whose fence on another thread loom cannot express.
#![cfg(loom)]

#[path = "../src/ring.rs"]
#[allow(dead_code, missing_docs, reason = "the model uses a part")]
mod ring;
mod sync {
    pub(crate) use loom::sync::Arc;
    pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
}
mod fabric {
    pub(crate) use farbus_transport::fabric::MAX_MESSAGE;
}
mod loom_support;

use loom_support::{Fences, Scenario, explore};
use ring::Fencing;

const FENCED: Fences = Fences { producer: Fencing::Both, consumer: Fencing::Both };
const SLEEP: Scenario = Scenario { messages: 2, capacity: 4, fences: FENCED, sleeps: true, preemptions: None };

#[test]
fn nobody_sleeps_through_a_message() {
    explore(SLEEP);
}

#[test]
fn nobody_sleeps_through_the_third_message_either() {
    explore(Scenario { messages: 3, preemptions: Some(3), ..SLEEP });
}

#[test]
fn a_full_ring_overwrites_nothing_that_was_not_taken() {
    explore(Scenario { messages: 3, capacity: 1, sleeps: false, preemptions: Some(3), ..SLEEP });
}

#[test]
fn a_full_ring_whose_consumer_sleeps_goes_on() {
    explore(Scenario { messages: 3, capacity: 2, preemptions: Some(2), ..SLEEP });
}

#[test]
#[should_panic(expected = "deadlock")]
fn twin_without_fences_sleeps_through_a_message() {
    let fences = Fences { producer: Fencing::Sleeper, consumer: Fencing::Sleeper };
    explore(Scenario { fences, ..SLEEP });
}

#[test]
#[should_panic(expected = "deadlock")]
fn twin_without_the_producers_fence_sleeps_through_a_message() {
    explore(Scenario { fences: Fences { producer: Fencing::Sleeper, ..FENCED }, ..SLEEP });
}

#[test]
#[should_panic(expected = "deadlock")]
fn twin_without_the_consumers_fence_sleeps_through_a_message() {
    explore(Scenario { fences: Fences { consumer: Fencing::Sleeper, ..FENCED }, ..SLEEP });
}
