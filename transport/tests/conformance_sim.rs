//! The conformance suite on the simulated fabric: with many drawn links, with descriptors in real time, and with every rule broken.
//!
//! Seed 17 is a link with 9 operations in flight and a slow borrower; `Violation::MessageBeforeData` must fail
//! `a_message_implies_every_earlier_write`, or that case proves nothing.

#![expect(clippy::expect_used, reason = "a panic is how a test fails, in its helpers too")]

use std::time::Duration;

use farbus_transport::Nanos;
use farbus_transport::conformance::{self, Pair, Provider, Verdict};
use farbus_transport::sim::{self, Seed, SimOptions, Violation};

/// Links drawn from the seed, in virtual time.
struct Drawn;

impl Provider for Drawn {
    fn connect(&self, seed: u64) -> Result<Pair, String> {
        Ok(virtual_pair(seed, SimOptions::drawn(&mut Seed::new(seed))))
    }

    /// 12, or what `FARBUS_SEEDS` says, for a longer run.
    fn seeds(&self) -> u64 {
        let asked = std::env::var("FARBUS_SEEDS").ok();
        asked.map_or(12, |seeds| seeds.parse().expect("FARBUS_SEEDS is not a number"))
    }
}

fn virtual_pair(seed: u64, options: SimOptions) -> Pair {
    let (left, right, world) = sim::pair(seed, options);
    Pair { ends: [Box::new(left), Box::new(right)], clock: Box::new(move || world.step()) }
}

fn awake_pair(seed: u64, violate: Option<Violation>) -> Pair {
    let options = SimOptions { descriptors: true, violate, ..SimOptions::default() };
    let (left, right, _) = sim::pair(seed, options);
    Pair { ends: [Box::new(left), Box::new(right)], clock: Box::new(Nanos::now) }
}

/// Ends that sleep on descriptors, in real time.
struct Sleeping;

impl Provider for Sleeping {
    fn connect(&self, seed: u64) -> Result<Pair, String> {
        Ok(awake_pair(seed, None))
    }
}

/// Links drawn from the seed whose writes and reads are carried out when they are posted; with `true` the peer's memory can be mapped, too.
struct Immediate(bool);

impl Provider for Immediate {
    fn connect(&self, seed: u64) -> Result<Pair, String> {
        Ok(virtual_pair(seed, SimOptions { immediate: true, peer_mappable: self.0, ..SimOptions::drawn(&mut Seed::new(seed)) }))
    }

    fn seeds(&self) -> u64 {
        4
    }
}

/// A link that breaks one rule.
struct Broken(Violation, bool);

impl Provider for Broken {
    fn connect(&self, seed: u64) -> Result<Pair, String> {
        let options = SimOptions {
            violate: Some(self.0),
            // Few places, so that a crowd is seen soon.
            receive_depth: 32,
            immediate: self.0 == Violation::HideFailure,
            peer_mappable: self.0 == Violation::ForgetMappings,
            ..SimOptions::default()
        };
        Ok(if self.1 { awake_pair(seed, Some(self.0)) } else { virtual_pair(seed, options) })
    }

    fn seeds(&self) -> u64 {
        8
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(2)
    }
}

mod drawn {
    use super::Drawn;
    farbus_transport::conformance_suite!(Drawn);
}

mod immediate {
    use super::Immediate;
    farbus_transport::conformance_suite!(Immediate(false));
}

mod mapped {
    use super::Immediate;
    farbus_transport::conformance_suite!(Immediate(true));
}

mod sleeping {
    use super::Sleeping;
    farbus_transport::conformance_suite!(Sleeping);
}

/// The case that each broken rule must fail.
const fn twin(violation: Violation) -> &'static str {
    use Violation::*;
    match violation {
        MessageBeforeData => "a_message_implies_every_earlier_write",
        NotifyBeforeData => "a_notification_implies_its_write_and_all_earlier_ones",
        ReorderMessages | ShortenMessage | RepeatMessage => "messages_arrive_in_order_and_exact_at_every_length",
        LoseMessage => "a_full_queue_pushes_back_and_loses_nothing",
        CutLongMessage => "a_message_that_is_too_long_is_refused",
        DoneBeforeData => "a_write_that_is_done_has_landed",
        RepeatDone | LoseDone | ReorderDone => "signalled_operations_are_reported_once_and_in_order",
        ReadPassesWrite => "a_read_sees_every_earlier_write",
        FlipBit => "bulk_data_arrives_intact",
        WriteAfterRevoke => "deregistered_memory_is_never_touched_again",
        UseAfterRelease => "a_released_region_is_refused_even_when_its_place_is_taken",
        UseAfterDeregister => "a_deregistered_local_region_is_refused_even_when_its_place_is_taken",
        IgnoreAccess => "access_is_denied_where_it_was_not_given",
        TrustGrants | WidenExports => "a_widened_grant_reaches_nothing_more",
        IgnoreMismatch => "spans_of_two_lengths_are_refused",
        IgnoreMaxOpLen => "the_longest_operation_passes_and_a_longer_one_is_refused",
        HideFailure => "an_unsignalled_operation_that_fails_is_told_once",
        ForgetMappings => "a_mapping_in_use_makes_its_owner_wait",
        CloseTwice | CloseFirst | LoseClose => "a_close_is_seen_once_and_last",
        ArmWithEvents => "arm_refuses_while_events_are_there",
        LoseWake => "no_wake_up_is_lost",
        WakeForEver => "an_armed_side_is_woken_and_an_idle_one_is_not",
    }
}

const fn needs_descriptors(violation: Violation) -> bool {
    matches!(violation, Violation::LoseWake | Violation::WakeForEver)
}

#[test]
fn every_broken_rule_is_caught_by_its_case() {
    let missed: Vec<String> = std::thread::scope(|scope| {
        let running: Vec<_> = Violation::ALL
            .into_iter()
            .map(|violation| {
                scope.spawn(move || {
                    let case = conformance::case(twin(violation)).unwrap();
                    match case.run(&Broken(violation, needs_descriptors(violation))) {
                        Verdict::Failed(why) => {
                            println!("{violation:?}: caught by {}: {why}", case.name);
                            None
                        }
                        other => Some(format!("{violation:?}: {} ended as {other:?}", case.name)),
                    }
                })
            })
            .collect();
        running.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
    });
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

#[test]
fn a_whole_run_is_counted() {
    struct Nowhere;
    impl Provider for Nowhere {
        fn connect(&self, _: u64) -> Result<Pair, String> {
            Err("there is no adapter here".to_owned())
        }
    }
    let report = conformance::run_all(&Nowhere);
    assert_eq!((report.passed(), report.failed(), report.not_run()), (0, 0, conformance::CASES.len()));
    assert!(report.to_string().ends_with("33 not run"), "{report}");
}
