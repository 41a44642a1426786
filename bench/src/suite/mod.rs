//! The suites of `farbus bench`: each row a figure beside a reference that was measured in the same run, in turns with it.
//!
//! `shm::run(&mut subjects, &Effort::default(), …)` measures a cache-line round trip and a remote register read five times each, in turns, and
//! makes the row "mmio read p50, 250 ns, cache-line round trip 125 ns, 2.0, <= 2.0, yes".

pub mod bank;
mod bank_large;
mod bank_lazy;
mod bank_peers;
mod bank_series;
mod bank_start;
mod bank_vm;
mod bank_wire;
mod engine;
pub mod faults;
mod faults_borrower;
mod faults_idle;
mod faults_lender;
mod faults_many;
mod link;
mod machine;
pub mod migrate;
pub mod perftest;
pub mod shm;
mod shm_subjects;
pub mod soft_roce;
mod soft_roce_subjects;

pub use bank_series::Series as BankSeries;
pub use bank_wire::row as bank_wire_row;
pub use machine::{Harm, Places as MachinePlaces, run_part};
pub use shm_subjects::ShmSession;
pub use soft_roce_subjects::{LentNvme, LentRegister, SoftRoce, Traffic, pinned_by_a_link};

use crate::report::Row;

/// What the caller of a suite hears while it runs.
#[derive(Clone, Copy, Debug)]
pub enum Heard<'a> {
    /// A group of rows begins.
    Begins(Step),
    /// These rows are measured.
    Measured(&'a [Row]),
}

/// A group of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// What is measured next.
    pub what: &'static str,
    /// Groups done.
    pub done: usize,
    /// Groups in all.
    pub total: usize,
}
