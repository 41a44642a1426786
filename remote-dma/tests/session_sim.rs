//! Sessions under every delay and order that the fabric contract allows, drawn from a seed, and judged by what a guest would see.
//!
//! FARBUS_SEEDS=5000 plays more of them, FARBUS_SEED=7 only that one. Each rule of the contract that a session leans on has a twin here: a
//! link that breaks it must be found out within a few seeds, or the judge is blind.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;
mod sim_support;

use farbus_transport::sim::Violation;
use sim_support::{Ending, Plan, run};

/// Seeds of a normal run.
const SEEDS: u64 = 200;
/// Seeds within which a broken rule must be found out.
const TWIN_SEEDS: u64 = 60;
/// Seeds in which a broken rule that sessions bear must do nothing.
const HARMLESS_SEEDS: u64 = 12;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

fn play(seed: u64) {
    if let Err(wrong) = run(&Plan::drawn(seed)) {
        panic!("seed {seed}: {wrong}\nagain: FARBUS_SEED={seed} cargo test -p farbus-remote-dma --test session_sim any_delay");
    }
}

#[test]
fn no_guest_sees_anything_wrong_under_any_delay_order_or_cut() {
    match number("FARBUS_SEED") {
        Some(seed) => play(seed),
        None => (0..number("FARBUS_SEEDS").unwrap_or(SEEDS)).for_each(play),
    }
}

/// Why a broken rule is or is not seen by a session.
enum Seen {
    /// It must be found out.
    Found,
    /// A session never does what the rule is about, or is made to bear it.
    Harmless(&'static str),
}

/// No default: a new rule must be thought about.
fn judgement(violation: Violation) -> Seen {
    use Seen::{Found, Harmless};
    match violation {
        Violation::MessageBeforeData
        | Violation::NotifyBeforeData
        | Violation::ReorderMessages
        | Violation::LoseMessage
        | Violation::ShortenMessage
        | Violation::RepeatMessage
        | Violation::LoseDone
        | Violation::ReadPassesWrite
        | Violation::FlipBit
        | Violation::HideFailure
        | Violation::WriteAfterRevoke
        | Violation::LoseClose => Found,
        Violation::RepeatDone => Harmless("a completion of an earlier generation completes nothing"),
        Violation::DoneBeforeData => Harmless("who hears that a write is done hears it by a message behind its bytes"),
        Violation::ReorderDone => Harmless("completions are told apart by their names, not by their order"),
        Violation::CloseFirst => Harmless("an end is an end, and what else came with it is of no use"),
        Violation::CloseTwice => Harmless("the first end is the end"),
        Violation::CutLongMessage => Harmless("every message fits"),
        Violation::UseAfterRelease | Violation::UseAfterDeregister => Harmless("spans are made anew for each DMA"),
        Violation::IgnoreAccess | Violation::WidenExports | Violation::TrustGrants => Harmless("sessions ask for what they have"),
        Violation::IgnoreMismatch | Violation::IgnoreMaxOpLen => Harmless("both spans are cut to the same length within the limit"),
        Violation::ForgetMappings => Harmless("the copy engine maps nothing"),
        Violation::ArmWithEvents | Violation::LoseWake | Violation::WakeForEver => Harmless("nobody sleeps in virtual time"),
    }
}

#[test]
fn a_link_that_breaks_a_rule_is_found_out() {
    let mut blind = Vec::new();
    for violation in Violation::ALL {
        let plan = |seed| {
            let mut plan = Plan::drawn(seed);
            plan.options.violate = Some(violation);
            match violation {
                // Where accesses are over at once, and in the middle of things one of them cannot be made.
                Violation::HideFailure => (plan.options.immediate, plan.ending) = (true, Ending::Cut(plan.steps / 2)),
                // Memory is taken back with writes under way.
                Violation::WriteAfterRevoke => {
                    (plan.options.immediate, plan.options.peer_mappable, plan.ending) = (false, false, Ending::Leave);
                }
                // What is over at once passes nothing.
                Violation::ReadPassesWrite => (plan.options.immediate, plan.options.peer_mappable) = (false, false),
                _ => {}
            }
            plan
        };
        let judgement = judgement(violation);
        let seeds = if matches!(judgement, Seen::Found) { TWIN_SEEDS } else { HARMLESS_SEEDS };
        let found = (0..seeds).find_map(|seed| run(&plan(seed)).err().map(|wrong| (seed, wrong)));
        match (judgement, found) {
            (Seen::Found, Some((seed, wrong))) => println!("{violation:?}: seed {seed}: {wrong}"),
            (Seen::Found, None) => blind.push(format!("{violation:?} was not found in {TWIN_SEEDS} seeds")),
            (Seen::Harmless(_), None) => {}
            (Seen::Harmless(why), Some((seed, wrong))) => {
                blind.push(format!("{violation:?} did harm ({why}): seed {seed}: {wrong}"))
            }
        }
    }
    assert!(blind.is_empty(), "{blind:#?}");
}
