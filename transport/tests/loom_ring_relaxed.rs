//! The twin of loom_ring.rs whose stamps and indexes are relaxed: the model checker must find the message that is ahead of its bytes.
//!
//! Here `Ordering::Release` and `Ordering::Acquire` mean `Relaxed` to ring.rs; a consumer may then see stamp 1 and words of zero.
#![cfg(loom)]

#[path = "../src/ring.rs"]
#[allow(dead_code, missing_docs, reason = "the model uses a part")]
mod ring;
mod sync {
    pub(crate) use loom::sync::Arc;
    pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, fence};

    #[expect(non_snake_case, non_upper_case_globals, reason = "stands in for the enum of that name")]
    pub(crate) mod Ordering {
        use loom::sync::atomic::Ordering as Real;

        pub(crate) const Relaxed: Real = Real::Relaxed;
        pub(crate) const Acquire: Real = Real::Relaxed;
        pub(crate) const Release: Real = Real::Relaxed;
        pub(crate) const AcqRel: Real = Real::Relaxed;
        pub(crate) const SeqCst: Real = Real::SeqCst;
    }
}
mod fabric {
    pub(crate) use farbus_transport::fabric::MAX_MESSAGE;
}
mod loom_support;

use loom_support::{Fences, Scenario, explore};
use ring::Fencing;

#[test]
#[should_panic(expected = "Concurrent read and write accesses")]
fn twin_with_relaxed_stamps_shows_a_message_before_its_bytes() {
    let fences = Fences { producer: Fencing::Sleeper, consumer: Fencing::Sleeper };
    explore(Scenario { messages: 1, capacity: 4, fences, sleeps: false, preemptions: None });
}
