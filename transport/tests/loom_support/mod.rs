//! The scenario that the model checker explores: one side pushes and wakes, the other takes, arms and sleeps.
//!
//! Beside each message of 12 bytes goes a cell that is written before the push and read after the take, as a one-sided write's bytes are: a
//! reader that could see the message and not the bytes is a data race, which loom reports with the schedule that leads there.
#![expect(clippy::unwrap_used, reason = "a panic is how the model checker hears of it")]

use loom::cell::UnsafeCell;
use loom::sync::{Arc, Notify};

use crate::ring::{Consumer, Fencing, HeapLines, Producer};

/// How each side orders "stamped" against "armed". `Sleeper` on one side and a barrier that does nothing is the protocol without its fence.
#[derive(Clone, Copy)]
pub struct Fences {
    pub producer: Fencing,
    pub consumer: Fencing,
}

#[derive(Clone, Copy)]
pub struct Scenario {
    pub messages: u64,
    pub capacity: u32,
    pub fences: Fences,
    /// Whether the consumer sleeps when there is nothing; it yields otherwise.
    pub sleeps: bool,
    /// How often loom takes the processor from a thread that could go on; `None` for as often as it likes.
    pub preemptions: Option<usize>,
}

/// Bytes beside the messages: one cell for each, written by the producer and read by the consumer.
struct Beside(Vec<UnsafeCell<u64>>);

fn contents(number: u64) -> [u8; 12] {
    let mut bytes = [number as u8 + 1; 12];
    bytes[..8].copy_from_slice(&(number * 0x0101_0101_0101_0101).to_le_bytes());
    bytes
}

/// Explores `scenario`; panics with the schedule where a message is lost, torn, out of order or ahead of its bytes, and where the consumer
/// sleeps with a message in the ring.
pub fn explore(scenario: Scenario) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = scenario.preemptions;
    model.check(move || run(scenario));
}

fn run(scenario: Scenario) {
    let lines = HeapLines::new(scenario.capacity);
    let beside = Arc::new(Beside((0..scenario.messages).map(|_| UnsafeCell::new(0)).collect()));
    // The eventfd: signalled by whoever must wake, waited for by whoever armed.
    let wake = Arc::new(Notify::new());
    let mut producer = Producer::new(lines.clone(), scenario.fences.producer);
    let mut consumer = Consumer::new(lines, scenario.fences.consumer);

    let pusher = {
        let (beside, wake) = (Arc::clone(&beside), Arc::clone(&wake));
        loom::thread::spawn(move || {
            for number in 0..scenario.messages {
                // SAFETY: the consumer reads a cell only after it took the message that is pushed below; loom checks that.
                beside.0[number as usize].with_mut(|cell| unsafe { *cell = number + 100 });
                while !producer.push(number as u8, &contents(number)).unwrap() {
                    loom::thread::yield_now();
                }
                if producer.must_wake() {
                    wake.notify();
                }
            }
        })
    };

    let mut expected = 0;
    while expected < scenario.messages {
        if let Some(taken) = consumer.take().unwrap() {
            assert_eq!(u64::from(taken.kind), expected, "a message is lost or out of order");
            assert_eq!(taken.len, 12);
            assert_eq!(taken.bytes[..12], contents(expected), "a message is torn");
            // SAFETY: written before the push of the message that was just taken; loom checks that.
            let seen = beside.0[expected as usize].with(|cell| unsafe { *cell });
            assert_eq!(seen, expected + 100, "a message is ahead of the bytes it announces");
            expected += 1;
        } else if !scenario.sleeps {
            loom::thread::yield_now();
        } else if consumer.arm(|| ()) {
            // Loom calls a wait that nobody ends a deadlock: the lost wake-up.
            wake.wait();
            consumer.disarm();
        }
    }
    pusher.join().unwrap();
    assert_eq!(consumer.take(), Ok(None), "a message came twice");
}
