//! The fabrics that session tests run on: shared memory in every run, queue pairs where there is an RDMA device.
//!
//! `on_every_fabric! { a_reset_clears_the_device }` makes `shm::a_reset_clears_the_device` and, to be run in the soft-RoCE lab,
//! `verbs::a_reset_clears_the_device` of a function that is given the way to connect.

use farbus_transport::Fabric;
use farbus_transport::shm::{ShmFabric, ShmOptions};
use farbus_transport::verbs::{DeviceChoice, VerbsFabric};

pub type Link = Box<dyn Fabric>;

/// Makes two connected ends: the lender's and the borrower's.
pub type Connect = fn() -> (Link, Link);

pub fn over_shm() -> (Link, Link) {
    let (lender, borrower) = ShmFabric::pair(ShmOptions::default()).unwrap();
    (Box::new(lender), Box::new(borrower))
}

/// Over the device that `FARBUS_RDMA_DEV` promises; one that is not there fails the test.
pub fn over_verbs() -> (Link, Link) {
    let choice = DeviceChoice { device: std::env::var("FARBUS_RDMA_DEV").ok(), ..DeviceChoice::default() };
    let (lender, borrower) = VerbsFabric::pair(&choice).unwrap_or_else(|error| panic!("no link over {choice:?}: {error}"));
    (Box::new(lender), Box::new(borrower))
}

/// Tests of each function that takes a [`Connect`]: over shared memory and over queue pairs.
macro_rules! on_every_fabric {
    ($($name:ident)*) => {
        mod shm {
            $(#[test]
            fn $name() {
                super::$name(super::common::links::over_shm);
            })*
        }

        mod verbs {
            $(#[test]
            #[ignore = "needs an RDMA device; ci/softroce runs it"]
            fn $name() {
                super::$name(super::common::links::over_verbs);
            })*
        }
    };
}
pub(crate) use on_every_fabric;
