//! The conformance suite on queue pairs: two ends in one process over one RDMA device, soft-RoCE in the lab or an RNIC.
//!
//! `FARBUS_RDMA_DEV=rxe0 cargo test --test conformance_verbs -- --ignored --test-threads 1`; `ci/run softroce` runs it in the lab where there is no device. A device that was
//! promised and is not there fails every case.

mod verbs_support;

use farbus_transport::Nanos;
use farbus_transport::conformance::{Pair, Provider};
use farbus_transport::verbs::{DeviceChoice, GrantMethod};

struct Verbs(GrantMethod);

impl Provider for Verbs {
    fn connect(&self, _seed: u64) -> Result<Pair, String> {
        let choice = DeviceChoice { grants: self.0, ..verbs_support::choice() };
        let (left, right) = verbs_support::pair_over(&choice);
        Ok(Pair { ends: [Box::new(left), Box::new(right)], clock: Box::new(Nanos::now) })
    }

    fn patience(&self) -> std::time::Duration {
        // Software emulation of a whole machine, now and then on a busy host.
        std::time::Duration::from_secs(30)
    }
}

mod regions {
    use super::{GrantMethod, Verbs};
    farbus_transport::conformance_suite!(
        Verbs(GrantMethod::Regions),
        ignore = "needs an RDMA device; ci/run softroce runs it in the lab"
    );
}

/// Whether or not the device holds anybody to a window's bounds: no case depends on it, because no grant is believed that its owner did not make.
mod windows {
    use super::{GrantMethod, Verbs};
    farbus_transport::conformance_suite!(
        Verbs(GrantMethod::Windows),
        ignore = "needs an RDMA device; ci/run softroce runs it in the lab"
    );
}
