//! The driver and the cases on a controller behind a vfio-user server, lent across shared memory: every byte, interrupts, a lender that ends.
//!
//! The driver's doorbell is a message to the lender and another to the server; the server's `DMA_WRITE` of a completion is stored in the driver's
//! queue, and the eventfd behind it becomes vector 1.

mod rig;

use std::time::Duration;

use farbus_bench::driver::{DriverError, DriverOptions, Io};
use farbus_bench::measure::CountingAllocator;
use rig::{Place, QUEUE, rig};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const BYTES: u64 = 8 << 20;

#[test]
fn every_byte_is_right_behind_a_vfio_user_server_that_asks_for_each() {
    rig::every_byte_is_right(Place::VfioUser, &rig::original(BYTES), BYTES, 300);
}

#[test]
fn every_byte_is_right_behind_a_vfio_user_server_that_maps_the_guests_memory() {
    rig::every_byte_is_right(Place::VfioUserMapped, &rig::original(BYTES), BYTES, 300);
}

#[test]
fn completions_come_by_interrupt_from_a_vfio_user_server() {
    let original = rig::original(BYTES);
    for place in [Place::VfioUser, Place::VfioUserMapped] {
        rig::a_completion_comes_by_interrupt(place, &original, BYTES);
    }
}

#[test]
fn a_lender_of_a_vfio_user_device_that_ends_is_named_and_not_waited_for() {
    let options = DriverOptions { command_timeout: Duration::from_millis(200), ..DriverOptions::default() };
    let mut rig = rig(Place::VfioUser, &rig::original(BYTES), BYTES, options);
    drop(rig.lender.take());
    let into = &rig.driver.allocate(4096).unwrap();
    let error = rig.driver.execute(QUEUE, &Io::Read { block: 0, into }).unwrap_err();
    assert!(matches!(error, DriverError::Gone), "{error}");
}
