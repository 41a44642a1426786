//! The conformance suite on shared memory: two ends in one process, with real rings, descriptors and wake-ups.
//!
//! `a_message_implies_every_earlier_write` writes through one mapping of a memfd and looks through another the moment the message is there.

use farbus_transport::Nanos;
use farbus_transport::conformance::{Pair, Provider};
use farbus_transport::shm::{ShmFabric, ShmOptions};

struct Shm;

impl Provider for Shm {
    fn connect(&self, _seed: u64) -> Result<Pair, String> {
        let (lender, borrower) = ShmFabric::pair(ShmOptions::default()).map_err(|error| error.to_string())?;
        Ok(Pair { ends: [Box::new(lender), Box::new(borrower)], clock: Box::new(Nanos::now) })
    }

    fn seeds(&self) -> u64 {
        4
    }
}

farbus_transport::conformance_suite!(Shm);
