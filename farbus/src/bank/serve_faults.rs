//! `farbus bank serve-faults`: VMMs get a machine's memory as they use it.
//!
//! `farbus bank serve-faults /srv/bank --socket /run/vm7.faults --machine vm7` says "serving vm7@3 at /run/vm7.faults", and for each Firecracker that loads
//! its snapshot with that socket a line when it begins and one with what it took when it ends; a bank that is away is waited for, and "the bank is away" and "the bank is back" say so.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Context;
use farbus_machine_bank::lazy::firecracker::{FaultSocket, Told};
use farbus_machine_bank::lazy::{Cache, Failure, FaultServer, LazyMachine, LazyOptions, Patience, StoreEvent, Uffd};
use farbus_machine_bank::{Bank, Entry};
use serde_json::json;

use super::args::ServeFaultsArgs;
use super::help::Helped;
use super::{find, open};
use crate::failure::{Advise, refusal};
use crate::output::Events;
use crate::signals::EndSignals;

/// Serves until a signal.
pub fn run(args: &ServeFaultsArgs) -> anyhow::Result<()> {
    let bank = Arc::new(open(&args.place)?);
    let entry = find(&bank, &args.place, &args.machine)?;
    let manifest = bank.manifest(&entry).helped(format!("cannot read {entry}"), &args.place)?;
    if manifest.section(&args.section).is_none() {
        return Err(refusal(
            format!("{entry} has no section {}", args.section),
            format!("farbus bank show {} {entry} lists them", args.place.bank),
        ));
    }
    // A VMM passes a descriptor of its own, so this process needs none: what the kernel lacks is only told.
    if let Err(error) = Uffd::supported() {
        tracing::debug!(%error, "this process could not have a userfaultfd");
    }
    let advice =
        "choose a path that is not there, in a folder that this user can write; a socket of another server has to go first";
    let socket = FaultSocket::bind(&args.socket).advise(format!("cannot listen at {}", args.socket.display()), advice)?;
    let server = FaultServer::start(Cache::new(args.memory_cache.saturating_mul(1 << 20))).context("cannot serve faults")?;
    let events = Events::new(args.place.json);
    let end = Arc::new(AtomicBool::new(false));
    end_by_signal(&end)?;
    let options = LazyOptions {
        section: args.section.clone(),
        rest: args.rest,
        on_failure: Arc::new(move |Failure { offset, len, reason }: &Failure| {
            let text = format!("{len} bytes from {offset} cannot be had: {reason}");
            events.say("failure", json!({ "offset": offset, "len": len, "reason": reason }), &text);
        }),
        patience: Patience { give_up: args.give_up.map(Duration::from_secs), ..Patience::default() },
        on_store: Arc::new(move |event: &StoreEvent| say_store(events, event)),
        ..LazyOptions::default()
    };
    server.prepare(&bank, &entry, &args.section).with_context(|| format!("cannot serve {entry}"))?;
    let path = args.socket.display();
    let about = json!({ "machine": entry.to_string(), "root": entry.root.to_string(), "socket": args.socket });
    events.say("serving", about, &format!("serving {entry} at {path}"));
    let has_set = manifest.section(&farbus_machine_bank::lazy::section_name(&args.section)).is_some();
    let keep = AtomicBool::new(args.keep_working_set && !has_set);
    let told = |told: Told<'_>| match told {
        Told::Begun(client) => events.say("begun", json!({ "client": client }), &format!("client {client}: served")),
        Told::Refused(client, why) => {
            let why = why.to_string();
            events.say("refused", json!({ "client": client, "why": why }), &format!("client {client}: refused: {why}"));
        }
        Told::Ended(client, machine) => {
            ended(events, client, machine);
            if keep.swap(false, Ordering::Relaxed) {
                keep_working_set(events, &bank, &entry, &args.section, machine);
            }
        }
    };
    socket.serve(&server, &bank, &entry, &options, &end, &told).with_context(|| format!("cannot serve at {path}"))
}

fn say_store(events: Events, event: &StoreEvent) {
    match event {
        StoreEvent::Away { since, why } => {
            let since = since.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
            let text = format!("the bank is away, and whoever needs more of it waits: {why}");
            events.say("store_away", json!({ "since_ms": since, "why": why }), &text);
        }
        StoreEvent::Back { away } => {
            let text = format!("the bank is back after {:.1} s", away.as_secs_f64());
            events.say("store_back", json!({ "away_ms": away.as_millis() as u64 }), &text);
        }
    }
}

fn ended(events: Events, client: u64, machine: &LazyMachine) {
    let report = machine.report();
    let away = match report.away_ms {
        0 => String::new(),
        ms => format!("; the bank was away {} times, for {:.1} s in all", report.away, ms as f64 / 1000.0),
    };
    let text = format!(
        "client {client}: gone after {} faults: {} groups on demand and {} ahead, {} pages copied, {} zero, {} that could not be had{}",
        report.faults, report.demanded, report.ahead, report.copied, report.zero, report.poisoned, away
    );
    events.say("ended", json!({ "client": client, "report": report }), &text);
}

fn keep_working_set(events: Events, bank: &Bank, entry: &Entry, section: &str, machine: &LazyMachine) {
    let set = machine.working_set();
    match set.keep(bank, entry, section) {
        Ok(kept) => {
            let groups = set.groups.len();
            let text = format!("{}: {entry} with a working set of {groups} groups of 64 KiB", kept.machine);
            events.say("kept", json!({ "machine": kept.machine, "groups": groups }), &text);
        }
        // Nothing is lost by it but time.
        Err(error) => tracing::warn!(%error, "the working set is not kept"),
    }
}

fn end_by_signal(end: &Arc<AtomicBool>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot wait for signals")?;
    let mut signals = {
        let _inside = runtime.enter();
        EndSignals::new().context("cannot wait for signals")?
    };
    let end = end.clone();
    let wait = move || {
        runtime.block_on(signals.next());
        end.store(true, Ordering::Relaxed);
    };
    std::thread::Builder::new().name("farbus-signals".to_owned()).spawn(wait).context("cannot wait for signals")?;
    Ok(())
}
