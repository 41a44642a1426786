//! What the whole-system tests share: the `farbus` program as users run it, processes with limits, and the guest lab.
//!
//! `Running::farbus(&["lend", "--device", "nvme:disk.img", "--listen", "shm:/tmp/x"])` starts a lender whose `event("listening", …)` says
//! when it is up; whatever happens to the test, the process is gone when the value is dropped.

pub mod bank_home;
pub mod bank_lab;
pub mod edu;
pub mod fuzz_bodies;
pub mod guest;
pub mod place;
pub mod process;
pub mod program;
pub mod qemu;
pub mod scrape;

pub use farbus_bench::scripted_guest;
pub use process::{End, Running};
pub use program::farbus;
