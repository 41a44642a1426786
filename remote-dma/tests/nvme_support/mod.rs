//! A bus over plain memory whose DMA can be late, out of order or refused, and a small driver: what the tests of the models share.
//!
//! `TestBus::new(1 << 24).late(7)` leaves every DMA pending and ends them in an order drawn from seed 7; the bytes of a late write are taken from
//! their buffer only when it ends, so that a buffer given back too early shows as wrong data.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "shared by several test programs, each of which uses a part"
)]

pub mod bus;
pub mod driver;
