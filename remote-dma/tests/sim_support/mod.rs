//! A borrower and a lender in one thread over a simulated link, a guest that watches its memory, and programs drawn from a seed.
//!
//! `run(Plan::drawn(7))` plays seed 7: some hundred register accesses, DMAs, maps and resets under delays, and says in one line what a
//! guest would have seen go wrong, "polled word before its data", say.

pub mod guest;
pub mod program;

pub use program::{Ending, Plan, run};
