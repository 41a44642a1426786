//! `farbus bank serve-faults`: VMMs get a machine's memory as they use it.
//!
//! `farbus bank serve-faults /srv/bank --socket /run/vm7.faults --machine vm7` says "serving vm7@3 at /run/vm7.faults", and for each Firecracker that loads
//! its snapshot with that socket a line when it begins and one with what it took when it leaves; a bank that is away is waited for, and "the bank is away" and
//! "the bank is back" say so. The last line says what all took, and why it ended.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::UNIX_EPOCH;

use anyhow::Context;
use farbus_machine_bank::lazy::firecracker::{FaultSocket, Told};
use farbus_machine_bank::lazy::{Cache, Failure, FaultServer, LazyMachine, LazyOptions, LazyReport, Patience, StoreEvent, Uffd};
use farbus_machine_bank::{Bank, Entry};
use farbus_transport::tally::Named;
use serde::Serialize;
use serde_json::json;

use super::args::ServeFaultsArgs;
use super::help::Helped;
use super::{find, open};
use crate::count::count as plural;
use crate::failure::{Advise, refusal};
use crate::output::Events;
use crate::service::{Service, notify};
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
    let server = FaultServer::start(Cache::new(args.memory_cache)).context("cannot serve faults")?;
    let events = Events::new(args.place.json);
    let service = Service::start("bank-serve-faults", &args.service, events)?;
    let board = &service.board;
    board.describe("machine", &entry.to_string());
    board.describe("socket", &args.socket.display().to_string());
    board.state("serving");
    let tally = board.tally(VMMS, "memory", Totals::NAMES);
    let end = Arc::new(AtomicBool::new(false));
    let signal = end_by_signal(&end)?;
    let options = LazyOptions {
        section: args.section.clone(),
        rest: args.rest,
        on_failure: Arc::new(move |Failure { offset, len, reason }: &Failure| {
            let text = format!("{len} bytes from {offset} cannot be had: {reason}");
            events.say("failure", json!({ "offset_bytes": offset, "bytes": len, "reason": reason }), &text);
        }),
        patience: Patience { give_up: args.give_up, ..Patience::default() },
        on_store: Arc::new(move |event: &StoreEvent| say_store(events, event)),
        ..LazyOptions::default()
    };
    server.prepare(&bank, &entry, &args.section).with_context(|| format!("cannot serve {entry}"))?;
    let path = args.socket.display();
    let about = json!({ "machine": entry.to_string(), "root": entry.root.to_string(), "socket": args.socket });
    events.say("serving", about, &format!("serving {entry} at {path}"));
    notify::ready(&format!("serving {entry} at {path}"));
    let has_set = manifest.section(&farbus_machine_bank::lazy::section_name(&args.section)).is_some();
    let keep = AtomicBool::new(args.keep_working_set && !has_set);
    let totals = Mutex::new(Totals::default());
    let count = |add: &dyn Fn(&mut Totals)| add(&mut totals.lock().unwrap_or_else(PoisonError::into_inner));
    let told = |told: Told<'_>| match told {
        Told::Begun(client) => {
            board.begin(VMMS);
            events.say("begun", json!({ "client": client }), &format!("client {client}: served"));
        }
        Told::Refused(client, why) => {
            let why = why.to_string();
            board.count("refused");
            count(&|totals| totals.refused += 1);
            events.say("refused", json!({ "client": client, "reason": why }), &format!("client {client}: refused: {why}"));
        }
        Told::Ended(client, machine) => {
            left(events, client, machine);
            board.end(VMMS);
            let mut its = Totals::default();
            its.add(&machine.report());
            its.values().iter().enumerate().for_each(|(index, value)| tally.add(index, *value));
            count(&|totals| totals.add(&machine.report()));
            if keep.swap(false, Ordering::Relaxed) {
                keep_working_set(events, &bank, &entry, &args.section, machine);
            }
        }
    };
    let served = socket.serve(&server, &bank, &entry, &options, &end, &told).with_context(|| format!("cannot serve at {path}"));
    let reason = match &served {
        Ok(()) => signal.get().copied().unwrap_or("a signal").to_owned(),
        Err(error) => format!("{error:#}"),
    };
    count(&|totals| ended(events, &reason, totals));
    served
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

/// What became of all clients.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Totals {
    /// That were served.
    clients: u64,
    refused: u64,
    faults: u64,
    demanded: u64,
    ahead: u64,
    copied: u64,
    mapped: u64,
    zero: u64,
    /// Pages that could not be had.
    missed: u64,
}

/// What all VMMs together are called: each is a client for the time of its connection.
const VMMS: &str = "vmms";

impl Totals {
    /// Of [`Totals::values`].
    const NAMES: &'static [Named] = &[
        ("faults", "Page faults of VMMs that have left."),
        ("demanded", "Groups of pages fetched for them on demand."),
        ("ahead", "Groups fetched ahead."),
        ("copied", "Pages copied."),
        ("mapped", "Pages mapped from the cache."),
        ("zero", "Pages of zeros."),
        ("missed", "Pages that could not be had."),
    ];

    fn values(&self) -> [u64; 7] {
        let Self { clients: _, refused: _, faults, demanded, ahead, copied, mapped, zero, missed } = *self;
        [faults, demanded, ahead, copied, mapped, zero, missed]
    }

    fn add(&mut self, report: &LazyReport) {
        self.clients += 1;
        self.faults += report.faults;
        self.demanded += report.demanded;
        self.ahead += report.ahead;
        self.copied += report.copied;
        self.mapped += report.mapped;
        self.zero += report.zero;
        self.missed += report.poisoned + report.stuck;
    }
}

/// The last that is said.
fn ended(events: Events, reason: &str, totals: &Totals) {
    let (clients, faults, copied) =
        (plural(totals.clients, "client"), plural(totals.faults, "fault"), plural(totals.copied, "page"));
    let text = format!("ended: {reason}: {clients} served, {} refused; {faults}, {copied} copied", totals.refused);
    events.say("ended", json!({ "reason": reason, "served": totals }), &text);
}

fn left(events: Events, client: u64, machine: &LazyMachine) {
    let report = machine.report();
    let away = match report.away_ms {
        0 => String::new(),
        ms => format!("; the bank was away {} times, for {:.1} s in all", report.away, ms as f64 / 1000.0),
    };
    let text = format!(
        "client {client}: gone after {}: {} on demand and {} ahead, {} copied, {} zero, {} that could not be had{away}",
        plural(report.faults, "fault"),
        plural(report.demanded, "group"),
        report.ahead,
        plural(report.copied, "page"),
        report.zero,
        report.poisoned
    );
    events.say("left", json!({ "client": client, "report": report }), &text);
}

fn keep_working_set(events: Events, bank: &Bank, entry: &Entry, section: &str, machine: &LazyMachine) {
    let set = machine.working_set();
    match set.keep(bank, entry, section) {
        Ok(kept) => {
            let groups = set.groups.len();
            let text = format!("{}: {entry} with a working set of {} of 64 KiB", kept.machine, plural(groups as u64, "group"));
            events.say("kept", json!({ "machine": kept.machine, "groups": groups }), &text);
        }
        // Nothing is lost by it but time.
        Err(error) => tracing::warn!(%error, "the working set is not kept"),
    }
}

/// Which signal it was is there when `end` is set.
fn end_by_signal(end: &Arc<AtomicBool>) -> anyhow::Result<Arc<OnceLock<&'static str>>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot wait for signals")?;
    let mut signals = {
        let _inside = runtime.enter();
        EndSignals::new().context("cannot wait for signals")?
    };
    let (end, signal) = (end.clone(), Arc::new(OnceLock::new()));
    let heard = signal.clone();
    let wait = move || {
        heard.get_or_init(|| {
            runtime.block_on(async {
                tokio::select! {
                    signal = signals.next() => signal,
                    () = notify::watchdog() => "the watchdog",
                }
            })
        });
        notify::stopping("ending");
        end.store(true, Ordering::Relaxed);
    };
    std::thread::Builder::new().name("farbus-signals".to_owned()).spawn(wait).context("cannot wait for signals")?;
    Ok(signal)
}
