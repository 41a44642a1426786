//! The twins of the ordering rules: links whose ends break one rule on purpose, each of which a case of the conformance suite must find out.
//!
//! Writes that wait behind the message that announces them must fail `a_message_implies_every_earlier_write`, over shared memory here and over
//! queue pairs where there is a device; the same cases on the same links unbroken are conformance_shm.rs and conformance_verbs.rs.

mod verbs_support;

use std::time::Duration;

use farbus_transport::conformance::{self, Pair, Provider, Verdict};
use farbus_transport::shm::{ShmFabric, ShmOptions};
use farbus_transport::wrap::{Breach, Broken};
use farbus_transport::{Fabric, Nanos};

type Ends = (Box<dyn Fabric>, Box<dyn Fabric>);

/// Pairs of which both ends break a rule.
struct BrokenEnds {
    breach: Breach,
    late: Duration,
    connect: fn() -> Ends,
}

impl Provider for BrokenEnds {
    fn connect(&self, _seed: u64) -> Result<Pair, String> {
        let (left, right) = (self.connect)();
        let broken = |end| Box::new(Broken::new(end, self.breach, self.late));
        Ok(Pair { ends: [broken(left), broken(right)], clock: Box::new(Nanos::now) })
    }
}

/// The case that each breach must fail.
const fn twin(breach: Breach) -> &'static str {
    match breach {
        Breach::MessageBeforeData => "a_message_implies_every_earlier_write",
        Breach::DoneBeforeData => "a_write_that_is_done_has_landed",
        Breach::ReadPassesWrite => "a_read_sees_every_earlier_write",
        Breach::MessagesSwapped => "messages_arrive_in_order_and_exact_at_every_length",
        Breach::RevocationForgotten => "deregistered_memory_is_never_touched_again",
        Breach::ReleaseForgotten => "a_released_region_is_refused_even_when_its_place_is_taken",
    }
}

fn is_found_out(case: &str, breach: Breach, late: Duration, connect: fn() -> Ends) {
    let case = conformance::case(case).unwrap_or_else(|| panic!("no case is called {case}"));
    match case.run(&BrokenEnds { breach, late, connect }) {
        Verdict::Failed(why) => println!("{breach:?}: caught by {}: {why}", case.name),
        other => panic!("{breach:?}: {} ended as {other:?}", case.name),
    }
}

fn all_are_found_out(late: Duration, connect: fn() -> Ends) {
    for breach in Breach::ALL {
        is_found_out(twin(breach), breach, late, connect);
    }
    // A notification is a message too, with its own data in it.
    is_found_out("a_notification_implies_its_write_and_all_earlier_ones", Breach::MessageBeforeData, late, connect);
}

#[test]
fn every_broken_rule_is_found_out_over_shared_memory() {
    all_are_found_out(Duration::from_millis(20), || {
        let (left, right) = ShmFabric::pair(ShmOptions::default()).unwrap();
        (Box::new(left), Box::new(right))
    });
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn every_broken_rule_is_found_out_over_queue_pairs() {
    // Longer than an emulated machine keeps a thread waiting.
    all_are_found_out(Duration::from_millis(300), || {
        let (left, right) = verbs_support::pair();
        (Box::new(left), Box::new(right))
    });
}
