//! The conformance suite on queue pairs: two ends in one process over one RDMA device, soft-RoCE in the lab or an RNIC.
//!
//! `FARBUS_RDMA_DEV=rxe0 cargo test --test conformance_verbs -- --ignored --test-threads 1`; `ci/run softroce` runs it in the lab where there is no device. A device that was
//! promised and is not there fails every case.

use farbus_transport::Nanos;
use farbus_transport::conformance::{Pair, Provider};
use farbus_transport::verbs::{DeviceChoice, VerbsFabric};

struct Verbs;

impl Provider for Verbs {
    fn connect(&self, _seed: u64) -> Result<Pair, String> {
        let choice = DeviceChoice { device: std::env::var("FARBUS_RDMA_DEV").ok(), ..DeviceChoice::default() };
        // Asked for by name, so its absence is a failure.
        let (left, right) = VerbsFabric::pair(&choice).unwrap_or_else(|error| panic!("no link over {choice:?}: {error}"));
        Ok(Pair { ends: [Box::new(left), Box::new(right)], clock: Box::new(Nanos::now) })
    }

    fn patience(&self) -> std::time::Duration {
        // Software emulation of a whole machine, now and then on a busy host.
        std::time::Duration::from_secs(30)
    }
}

farbus_transport::conformance_suite!(Verbs, ignore = "needs an RDMA device; ci/run softroce runs it in the lab");
