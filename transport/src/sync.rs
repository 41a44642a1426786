//! The atomics of the rings: the standard library's, or the model checker's when built with `--cfg loom`.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p farbus-transport --test loom_ring --release` explores every interleaving of two pushes and a sleep.

#[cfg(loom)]
pub(crate) use loom::sync::{
    Arc,
    atomic::{AtomicU32, AtomicU64, Ordering, fence},
};
#[cfg(not(loom))]
pub(crate) use std::sync::Arc;
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
