//! A small VMM that embeds a borrowed device, and what a VMM needs to keep its machine in a bank: for VMM authors to read, and for tests to run.
//!
//! `Depositor::freeze` stops the device for a moment and copies what changed; `Frozen::put` deposits it while the guest runs on; `Withdrawn::from_bank` is the
//! machine on another host, which borrows its device again; and `home::Home` is the host with the device, which restarts the machine when its borrower died.

pub mod bank;
pub mod deposit;
pub mod home;
pub mod kvm;
pub mod link;
pub mod moving;
pub mod report;

pub use bank::BankArgs;
pub use deposit::{Depositor, Frozen, Pause, Withdrawn};
pub use home::{Device, Home};
pub use report::{meanwhile, say};
