//! The conformance suite on queue pairs: two ends in one process over one RDMA device, soft-RoCE in the lab or an RNIC.
//!
//! `FARBUS_RDMA_DEV=rxe0 cargo test --test conformance_verbs -- --ignored --test-threads 1`; `ci/softroce` runs it where there is no device. A device that was
//! promised and is not there fails every case.

use farbus_transport::Nanos;
use farbus_transport::conformance::{Pair, Provider};
use farbus_transport::verbs::{DeviceChoice, GrantMethod, VerbsFabric};

struct Verbs(GrantMethod);

impl Provider for Verbs {
    fn connect(&self, _seed: u64) -> Result<Pair, String> {
        let choice = DeviceChoice { device: std::env::var("FARBUS_RDMA_DEV").ok(), grants: self.0, ..DeviceChoice::default() };
        // Asked for by name, so its absence is a failure.
        let (left, right) = VerbsFabric::pair(&choice).unwrap_or_else(|error| panic!("no link over {choice:?}: {error}"));
        Ok(Pair { ends: [Box::new(left), Box::new(right)], clock: Box::new(Nanos::now) })
    }

    fn patience(&self) -> std::time::Duration {
        // Software emulation of a whole machine, now and then on a busy host.
        std::time::Duration::from_secs(30)
    }
}

mod regions {
    use super::{GrantMethod, Verbs};
    farbus_transport::conformance_suite!(Verbs(GrantMethod::Regions), ignore = "needs an RDMA device; ci/softroce runs it");
}

/// Whether or not the device holds anybody to a window's bounds: no case depends on it, because no grant is believed that its owner did not make.
mod windows {
    use super::{GrantMethod, Verbs};
    farbus_transport::conformance_suite!(Verbs(GrantMethod::Windows), ignore = "needs an RDMA device; ci/softroce runs it");
}
