//! Deposits that cannot be read: how they are told, and the way out.
//!
//! "vm7@2 is damaged: …; vm7@3 rests on vm7@2, which is damaged", and then: "`farbus bank remove /srv/bank --damaged` takes out vm7@2 and vm7@3; bring them back
//! with `farbus bank copy OTHER vm7@2 /srv/bank`".

use std::process::ExitCode;

use farbus_machine_bank::keep::{Look, Unreadable, unreadable};

use super::address::BankAddress;
use super::args::Place;
use super::open_itself;

/// Says of deposits that cannot be read what to do, on standard error, and which status that is.
pub fn status(place: &Place, found: &[Unreadable]) -> ExitCode {
    if found.is_empty() {
        return ExitCode::SUCCESS;
    }
    eprintln!("farbus: {}", told(found));
    eprintln!("hint: {}", way_out(place, found));
    ExitCode::FAILURE
}

/// Each of them with what is wrong.
fn told(found: &[Unreadable]) -> String {
    found.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// What to do about them, with the commands as they are typed.
pub fn way_out(place: &Place, found: &[Unreadable]) -> String {
    let bank = &place.bank;
    if let BankAddress::Link(_) = bank {
        return "on the host that serves it `farbus bank list DIRECTORY` says what to do".to_owned();
    }
    let damaged: Vec<_> = found.iter().filter(|one| one.damaged).collect();
    if damaged.is_empty() {
        return "use the version of farbus that wrote them, or a later one".to_owned();
    }
    let key = place.tenant_key.as_ref().map_or(String::new(), |key| format!(" --tenant-key {}", key.display()));
    let names = |wanted: bool| {
        let names = damaged.iter().filter(|one| one.is_cause() == wanted).map(|one| one.machine.clone());
        words(&names.collect::<Vec<_>>())
    };
    let resting = names(false);
    let resting = if resting.is_empty() { String::new() } else { format!(", and {resting}, which can be read by it only") };
    let again = &damaged[0].machine;
    format!(
        "`farbus bank remove {bank} --damaged{key}` takes out {}{resting} (verify --repair mends packs, and no manifest); the others stay as they are. \
         Then bring what was taken out back from where it is whole, the earliest first: `farbus bank copy OTHER {again} {bank}{key}` from another bank, \
         `farbus bank import {bank} ARCHIVE{key}` from an archive; or deposit the machine again",
        names(true)
    )
}

/// The same for an operation that came across one of them.
pub fn way_out_of(place: &Place) -> String {
    let found = open_itself(place).ok().and_then(|bank| unreadable(&bank, Look::Leaves).ok()).unwrap_or_default();
    if found.is_empty() {
        return format!("`farbus bank verify {}` tells what cannot be read", place.bank);
    }
    // The error itself says what is wrong.
    let others: Vec<_> = found.iter().filter(|one| !one.is_cause()).map(ToString::to_string).collect();
    let others = if others.is_empty() { String::new() } else { format!("{}; ", others.join("; ")) };
    others + &way_out(place, &found)
}

/// `a`, `a and b`, `a, b and c`.
fn words(names: &[String]) -> String {
    match names {
        [front @ .., last] if !front.is_empty() => format!("{} and {last}", front.join(", ")),
        _ => names.concat(),
    }
}
