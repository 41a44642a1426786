//! What the tests on an RDMA device share: the device that was promised, connected ends, and events with a deadline.
//!
//! `FARBUS_RDMA_DEV=rxe0` promises rxe0: `pair()` then gives two connected ends over it, and a device that is not there fails the test.

#![allow(dead_code, reason = "each test program uses a part of it")]

use farbus_transport::verbs::{DeviceChoice, VerbsFabric};

/// The device that the environment names; without a name, the only one with an active port.
pub fn choice() -> DeviceChoice {
    DeviceChoice { device: std::env::var("FARBUS_RDMA_DEV").ok(), ..DeviceChoice::default() }
}

/// Two connected ends in this process.
pub fn pair() -> (VerbsFabric, VerbsFabric) {
    pair_over(&choice())
}

/// As [`pair`], with a choice of one's own.
pub fn pair_over(choice: &DeviceChoice) -> (VerbsFabric, VerbsFabric) {
    // Asked for by name, so its absence is a failure.
    VerbsFabric::pair(choice).unwrap_or_else(|error| panic!("no link over {choice:?}: {error}"))
}
