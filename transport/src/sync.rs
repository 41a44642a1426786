//! The atomics of the rings, in one place so that the model checker can put its own here.
//!
//! transport/tests/loom_ring.rs compiles ring.rs a second time over loom's atomics and explores every interleaving of three pushes and a sleep:
//! `RUSTFLAGS="--cfg loom" cargo test -p farbus-transport --test loom_ring --release`.

pub(crate) use std::sync::Arc;
pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
