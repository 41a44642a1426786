//! The conformance suite on wrapped ends: faults and traces must be fabrics like any other, asleep and awake.
//!
//! With seed 3 every fifth post is refused as `Full` for no reason and every third event comes up to four polls late; no case may notice.

use farbus_transport::conformance::{Pair, Provider};
use farbus_transport::sim::{self, Seed, SimOptions};
use farbus_transport::wrap::{FaultRates, Faults, Trace};
use farbus_transport::{Fabric, Nanos};

type Wrap = fn(Box<dyn Fabric>, u64) -> Box<dyn Fabric>;

/// Wrapped ends on links that are drawn, that carry out accesses at once, whose memory can be mapped, or that sleep on descriptors in real time.
struct Wrapped(Wrap, Kind);

#[derive(PartialEq, Eq)]
enum Kind {
    Drawn,
    Immediate,
    Mapped,
    Sleeping,
}

impl Provider for Wrapped {
    fn connect(&self, seed: u64) -> Result<Pair, String> {
        let Self(wrap, kind) = self;
        let sleeping = *kind == Kind::Sleeping;
        let options = if sleeping {
            SimOptions { descriptors: true, ..SimOptions::default() }
        } else {
            let (immediate, peer_mappable) = (*kind == Kind::Immediate, *kind == Kind::Mapped);
            SimOptions { immediate, peer_mappable, ..SimOptions::drawn(&mut Seed::new(seed)) }
        };
        let (left, right, world) = sim::pair(seed, options);
        Ok(Pair {
            ends: [wrap(Box::new(left), seed), wrap(Box::new(right), !seed)],
            clock: if sleeping { Box::new(Nanos::now) } else { Box::new(move || world.step()) },
        })
    }

    fn seeds(&self) -> u64 {
        4
    }
}

fn faults(inner: Box<dyn Fabric>, seed: u64) -> Box<dyn Fabric> {
    Box::new(Faults::new(inner, seed, FaultRates::drawn(&mut Seed::new(seed))))
}

fn trace(inner: Box<dyn Fabric>, _seed: u64) -> Box<dyn Fabric> {
    Box::new(Trace::new(inner, 32))
}

mod faulty {
    use super::{Kind, Wrapped, faults};
    farbus_transport::conformance_suite!(Wrapped(faults, Kind::Drawn));
}

mod faulty_and_mapped {
    use super::{Kind, Wrapped, faults};
    farbus_transport::conformance_suite!(Wrapped(faults, Kind::Mapped));
}

mod faulty_and_immediate {
    use super::{Kind, Wrapped, faults};
    farbus_transport::conformance_suite!(Wrapped(faults, Kind::Immediate));
}

mod faulty_and_sleeping {
    use super::{Kind, Wrapped, faults};
    farbus_transport::conformance_suite!(Wrapped(faults, Kind::Sleeping));
}

mod traced {
    use super::{Kind, Wrapped, trace};
    farbus_transport::conformance_suite!(Wrapped(trace, Kind::Drawn));
}

mod traced_and_mapped {
    use super::{Kind, Wrapped, trace};
    farbus_transport::conformance_suite!(Wrapped(trace, Kind::Mapped));
}

mod traced_and_immediate {
    use super::{Kind, Wrapped, trace};
    farbus_transport::conformance_suite!(Wrapped(trace, Kind::Immediate));
}

mod traced_and_sleeping {
    use super::{Kind, Wrapped, trace};
    farbus_transport::conformance_suite!(Wrapped(trace, Kind::Sleeping));
}
