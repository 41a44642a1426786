//! What every fabric must do, as one suite of named cases that runs on any two connected ends.
//!
//! `conformance_suite!(MyProvider)` makes a `#[test]` of each case; `run_all(&provider)` runs them in a program and says how many
//! passed, failed and were not run, and why. The case `a_message_implies_every_earlier_write` writes, sends, and looks at the memory the
//! moment the message is there; the simulated fabric with [`crate::sim::Violation::MessageBeforeData`] fails it.

mod close;
mod flow;
mod grants;
mod mapped;
mod model;
mod order;
mod rig;
mod sleep;

use std::sync::Arc;
use std::time::Duration;

use crate::fabric::Fabric;
use crate::memory::{Memory, MemoryError};
use crate::time::Nanos;
pub use rig::Stop;

/// Two connected ends, and the time to poll them with.
pub struct Pair {
    /// The two ends; they may be moved to two threads.
    pub ends: [Box<dyn Fabric>; 2],
    /// Called before each poll for the time to pass to it: `Nanos::now` for real fabrics.
    pub clock: Box<dyn FnMut() -> Nanos>,
}

/// Makes the pairs that the suite runs on.
pub trait Provider: Sync {
    /// Two newly connected ends in one process. `seed` decides whatever the provider leaves to chance.
    ///
    /// # Errors
    /// The reason why there is no such fabric here; the case counts as not run.
    fn connect(&self, seed: u64) -> Result<Pair, String>;

    /// Zeroed memory of `len` bytes that this fabric can register and export.
    ///
    /// # Errors
    /// Whatever the host says; the case counts as failed.
    fn memory(&self, len: u64) -> Result<Arc<Memory>, MemoryError> {
        Memory::memfd("conformance", len)
    }

    /// How many seeds each case runs with; the long ones run with one.
    fn seeds(&self) -> u64 {
        1
    }

    /// How long nothing at all may happen before a case that waits gives up.
    fn patience(&self) -> Duration {
        Duration::from_secs(10)
    }
}

/// One named case.
#[derive(Clone, Copy)]
pub struct Case {
    /// The case's name, as the test is called.
    pub name: &'static str,
    long: bool,
    run: fn(&dyn Provider, u64) -> Result<(), Stop>,
}

/// How a case ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// With every seed.
    Passed,
    /// What went wrong, with the seed.
    Failed(String),
    /// Why it could not be run.
    NotRun(String),
}

macro_rules! cases {
    ($($module:ident :: $name:ident $($long:ident)?,)*) => {
        /// Every case of the suite.
        pub const CASES: &[Case] = &[$(Case {
            name: stringify!($name),
            long: cases!(@long $($long)?),
            run: $module::$name,
        }),*];
    };
    (@long) => { false };
    (@long long) => { true };
}

// The list in `conformance_suite!` below repeats the names, and a generated test compares the two.
cases! {
    order::limits_are_sane,
    order::messages_arrive_in_order_and_exact_at_every_length,
    order::a_message_that_is_too_long_is_refused,
    order::a_message_implies_every_earlier_write,
    order::a_notification_implies_its_write_and_all_earlier_ones,
    order::a_read_sees_every_earlier_write,
    order::a_write_that_is_done_has_landed,
    order::overlapping_writes_end_as_posted,
    flow::spans_of_two_lengths_are_refused,
    flow::an_unsignalled_operation_that_fails_is_told_once,
    flow::the_longest_operation_passes_and_a_longer_one_is_refused,
    flow::a_full_queue_pushes_back_and_loses_nothing long,
    flow::floods_in_both_directions_arrive_complete long,
    flow::signalled_operations_are_reported_once_and_in_order,
    grants::deregistered_memory_is_never_touched_again,
    grants::a_released_region_is_refused_even_when_its_place_is_taken,
    grants::a_deregistered_local_region_is_refused_even_when_its_place_is_taken,
    grants::access_is_denied_where_it_was_not_given,
    grants::a_nonsense_grant_reaches_nothing,
    grants::a_widened_grant_reaches_nothing_more,
    mapped::a_mapping_in_use_makes_its_owner_wait,
    mapped::a_mapping_outlives_its_end_and_its_owner_waits_for_it,
    mapped::a_mapping_that_is_kept_is_told_of_and_ends_the_link long,
    mapped::polled_bytes_are_stored_behind_what_was_written_and_not_after_revocation,
    close::a_close_is_seen_once_and_last,
    close::both_sides_may_close_at_once,
    close::a_vanished_peer_is_noticed_once,
    close::outstanding_operations_are_answered_before_the_end,
    sleep::arm_refuses_while_events_are_there,
    sleep::an_armed_side_is_woken_and_an_idle_one_is_not,
    sleep::no_wake_up_is_lost long,
    model::random_operations_match_a_model,
    model::bulk_data_arrives_intact long,
}

/// Counts of a whole run, with the reasons.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Each case and how it ended, in the suite's order.
    pub verdicts: Vec<(&'static str, Verdict)>,
}

impl Report {
    fn count(&self, wanted: impl Fn(&Verdict) -> bool) -> usize {
        self.verdicts.iter().filter(|(_, verdict)| wanted(verdict)).count()
    }

    /// Cases that passed.
    pub fn passed(&self) -> usize {
        self.count(|verdict| *verdict == Verdict::Passed)
    }

    /// Cases that failed.
    pub fn failed(&self) -> usize {
        self.count(|verdict| matches!(verdict, Verdict::Failed(_)))
    }

    /// Cases that could not be run.
    pub fn not_run(&self) -> usize {
        self.count(|verdict| matches!(verdict, Verdict::NotRun(_)))
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (name, verdict) in &self.verdicts {
            match verdict {
                Verdict::Passed => writeln!(f, "passed   {name}")?,
                Verdict::Failed(why) => writeln!(f, "FAILED   {name}: {why}")?,
                Verdict::NotRun(why) => writeln!(f, "not run  {name}: {why}")?,
            }
        }
        let (passed, failed, not_run) = (self.passed(), self.failed(), self.not_run());
        write!(f, "{passed} passed, {failed} failed, {not_run} not run")
    }
}

impl Case {
    /// Runs the case with each of the provider's seeds until one does not pass.
    pub fn run(&self, provider: &dyn Provider) -> Verdict {
        let seeds = if self.long { 1 } else { provider.seeds().max(1) };
        for seed in 0..seeds {
            match (self.run)(provider, seed) {
                Ok(()) => {}
                Err(Stop::Failed(why)) => return Verdict::Failed(format!("seed {seed}: {why}")),
                Err(Stop::NotRun(why)) => return Verdict::NotRun(why),
            }
        }
        Verdict::Passed
    }
}

/// Runs the whole suite.
pub fn run_all(provider: &dyn Provider) -> Report {
    Report { verdicts: CASES.iter().map(|case| (case.name, case.run(provider))).collect() }
}

/// The case called `name`.
pub fn case(name: &str) -> Option<&'static Case> {
    CASES.iter().find(|case| case.name == name)
}

/// Runs one case as a test. A case that cannot be run here says so on standard error.
///
/// # Panics
/// Where the case fails, or there is none of that name.
pub fn check(provider: &dyn Provider, name: &str) {
    match case(name).map(|case| case.run(provider)) {
        Some(Verdict::Passed) => {}
        Some(Verdict::NotRun(why)) => eprintln!("not run: {name}: {why}"),
        Some(Verdict::Failed(why)) => panic!("{name}: {why}"),
        None => panic!("the suite has no case {name}"),
    }
}

/// One `#[test]` for each case of the suite, on the [`Provider`] that the expression gives.
#[macro_export]
macro_rules! conformance_suite {
    ($provider:expr) => {
        $crate::conformance_suite! { @all $provider; }
    };
    // For a fabric that needs a device: the tests run where they are asked for.
    ($provider:expr, ignore = $why:literal) => {
        $crate::conformance_suite! { @all $provider; #[ignore = $why] }
    };
    (@all $provider:expr; $(#[ignore = $why:literal])?) => {
        $crate::conformance_suite! { @each $provider; $(#[ignore = $why])?;
            limits_are_sane
            messages_arrive_in_order_and_exact_at_every_length
            a_message_that_is_too_long_is_refused
            a_message_implies_every_earlier_write
            a_notification_implies_its_write_and_all_earlier_ones
            a_read_sees_every_earlier_write
            a_write_that_is_done_has_landed
            overlapping_writes_end_as_posted
            spans_of_two_lengths_are_refused
            an_unsignalled_operation_that_fails_is_told_once
            the_longest_operation_passes_and_a_longer_one_is_refused
            a_full_queue_pushes_back_and_loses_nothing
            floods_in_both_directions_arrive_complete
            signalled_operations_are_reported_once_and_in_order
            deregistered_memory_is_never_touched_again
            a_released_region_is_refused_even_when_its_place_is_taken
            a_deregistered_local_region_is_refused_even_when_its_place_is_taken
            access_is_denied_where_it_was_not_given
            a_nonsense_grant_reaches_nothing
            a_widened_grant_reaches_nothing_more
            a_mapping_in_use_makes_its_owner_wait
            a_mapping_outlives_its_end_and_its_owner_waits_for_it
            a_mapping_that_is_kept_is_told_of_and_ends_the_link
            polled_bytes_are_stored_behind_what_was_written_and_not_after_revocation
            a_close_is_seen_once_and_last
            both_sides_may_close_at_once
            a_vanished_peer_is_noticed_once
            outstanding_operations_are_answered_before_the_end
            arm_refuses_while_events_are_there
            an_armed_side_is_woken_and_an_idle_one_is_not
            no_wake_up_is_lost
            random_operations_match_a_model
            bulk_data_arrives_intact
        }
    };
    (@each $provider:expr; ; $($case:ident)*) => {
        $crate::conformance_suite! { @tests $($case)* }
        $(
            #[test]
            fn $case() {
                $crate::conformance::check(&$provider, stringify!($case));
            }
        )*
    };
    (@each $provider:expr; #[ignore = $why:literal]; $($case:ident)*) => {
        $crate::conformance_suite! { @tests $($case)* }
        $(
            #[test]
            #[ignore = $why]
            fn $case() {
                $crate::conformance::check(&$provider, stringify!($case));
            }
        )*
    };
    (@tests $($case:ident)*) => {
        #[test]
        fn every_case_of_the_suite_is_a_test_here() {
            let tests = [$(stringify!($case)),*];
            let cases: Vec<_> = $crate::conformance::CASES.iter().map(|case| case.name).collect();
            assert_eq!(cases, tests);
        }
    };
}
