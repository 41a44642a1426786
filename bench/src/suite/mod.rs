//! The suites of `farbus bench`: each row a figure beside a reference that was measured in the same run, in turns with it.
//!
//! `shm::run(&mut subjects, &Effort::default(), …)` measures a cache-line round trip and a remote register read five times each, in turns, and
//! makes the row "mmio read p50, 250 ns, cache-line round trip 125 ns, 2.0, <= 2.0, yes".

pub mod shm;
mod shm_subjects;

pub use shm_subjects::ShmSession;
