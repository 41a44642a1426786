//! The driver and the cases on a controller across a queue pair: every byte, interrupts, a lender that ends, and what an operation asks of the host.
//!
//! 8 MiB of this machine's files are read in full with eight reads of 128 KiB in flight, written to by all six cases, verified, restored and
//! verified again through a remote controller, in the soft-RoCE lab or on an RNIC.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod rig;

use std::time::Duration;

use farbus_bench::driver::{DriverError, DriverOptions, Io};
use farbus_bench::measure::CountingAllocator;
use rig::{Place, QUEUE, rig};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const BYTES: u64 = 8 << 20;

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn every_byte_is_right_across_a_queue_pair() {
    rig::every_byte_is_right(Place::Verbs, &rig::original(BYTES), BYTES, 200);
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_completion_comes_by_interrupt_across_a_queue_pair() {
    rig::a_completion_comes_by_interrupt(Place::Verbs, &rig::original(BYTES), BYTES);
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_lender_that_ends_is_named_and_not_waited_for() {
    let options = DriverOptions { command_timeout: Duration::from_secs(2), ..DriverOptions::default() };
    let mut rig = rig(Place::Verbs, &rig::original(BYTES), BYTES, options);
    drop(rig.lender.take());
    let into = &rig.driver.allocate(4096).unwrap();
    let error = rig.driver.execute(QUEUE, &Io::Read { block: 0, into }).unwrap_err();
    assert!(matches!(error, DriverError::Gone), "{error}");
}
