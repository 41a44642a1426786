//! What farbus is judged by: a user-space NVMe driver, the cases it runs, and the reports that put native beside remote.
//!
//! `farbus demo` packs an [`image`], starts one [`driver`] on the device here and one on the device across a link, runs the six cases of
//! [`workload`] on both in alternating rounds ([`measure`]), and prints what [`report`] makes of them. [`suite`] holds the rows of
//! `farbus bench`, each beside a reference that was measured in the same run.

pub mod driver;
pub mod function;
pub mod image;
pub mod measure;
pub mod report;
pub mod scripted_guest;
pub mod suite;
pub mod workload;
