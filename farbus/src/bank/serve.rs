//! `farbus bank serve`: a bank that other processes and hosts use.
//!
//! tokio waits for connections and signals; each client has a thread from its hello to its end, and no client waits for another. "serving /srv/bank at
//! shm:/run/bank", then for each client "uid:1000: begun" and "uid:1000: gone (the other side closed the link): 5.2 MiB read …".

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use farbus_machine_bank::remote::{BankServer, Client, GREETING, Rights, ServeOptions, Served, Stop, WireCounts};
use farbus_transport::link::hello::{Hello, Role, SPOKEN};
use farbus_transport::link::verdict::Refusal;
use farbus_transport::shm::ShmOptions;
use farbus_transport::{Nanos, Tally};
use serde_json::json;
use tokio::sync::mpsc;

use super::address::BankAddress;
use super::help::Helped;
use super::serve_args::{Rule, ServeArgs};
use super::{open, size};
use crate::count::count;
use crate::failure::misuse;
use crate::link::{Arrival, Door, Greeted, Linked, Purpose};
use crate::output::Events;
use crate::service::{Board, Service, notify};
use crate::signals::EndSignals;

/// Connections whose hello is awaited at a time. One more ends the oldest.
const MAX_GREETINGS: usize = 32;
/// How long clients' threads may take at the end.
const GRACE: Duration = Duration::from_secs(5);

/// What a client's thread tells the command.
enum News {
    /// No client, and why.
    TurnedAway(String),
    /// A client, which waits for a place.
    Greeted(Box<Greeted>),
    /// It has left.
    Left(String, Served),
    /// It was welcome and there is no link.
    Failed(String, String),
}

/// Serves until a signal.
pub fn run(args: &ServeArgs) -> anyhow::Result<()> {
    if let BankAddress::Link(_) = &args.place.bank {
        return Err(misuse("a bank over a link is served already", "name the bank's directory, on the host that has it"));
    }
    if args.place.link.peer.peer.is_some() {
        return Err(misuse("--peer names a server, and this is one", "name clients with --allow, --read and --write"));
    }
    if args.place.link.reconnect.is_some() {
        return Err(misuse("--reconnect is a client's, and this is a server", "leave it out: clients come by themselves"));
    }
    let uses_tls = !args.place.link.security.plain && matches!(args.listen, crate::link_address::LinkAddress::Rdma(_));
    let rules = || args.read.iter().chain(&args.write).filter_map(|rule| rule.client.as_deref());
    if let Some(client) = rules().find(|client| client.starts_with("uid:") == uses_tls) {
        let hint = if uses_tls { "name clients as in their certificates" } else { "name users of this host: uid:1000" };
        return Err(misuse(format!("no client is called {client} at {}", args.listen), hint));
    }
    let place = &args.place;
    let bank = open(place)?;
    let shares = &args.shares;
    let options = ServeOptions {
        wait: place.wait,
        staged: shares.client_staged,
        holds: shares.client_deposits,
        pins: shares.client_withdrawals,
        known: shares.client_known as usize,
        hold: shares.hold_age,
        ..ServeOptions::default()
    };
    let server = BankServer::new(bank, options).helped(format!("cannot serve the bank {}", place.bank), place)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot wait for clients")?;
    let service = Service::start("bank-serve", &args.service, Events::new(place.json))?;
    runtime.block_on(serve(args, &server, &service.board))
}

async fn serve(args: &ServeArgs, server: &Arc<BankServer>, board: &Arc<Board>) -> anyhow::Result<()> {
    let events = Events::new(args.place.json);
    let mut signals = EndSignals::new().context("cannot wait for signals")?;
    let users: Vec<u32> = args.read.iter().chain(&args.write).filter_map(user).collect();
    let security = &args.place.link.security;
    let door = Door::open(&args.listen, Purpose::Bank, security, &args.allow, &users).await?;
    let address = door.address();
    let about = json!({ "address": address, "bank": args.place.bank.to_string() });
    let serving = format!("serving {} at {address}", args.place.bank);
    board.describe("bank", &args.place.bank.to_string());
    board.describe("address", &address);
    board.state("serving");
    events.say("serving", about, &serving);
    notify::ready(&serving);
    let mut watchdog = Box::pin(notify::watchdog());
    let hello = Hello { versions: SPOKEN, role: Role::Lender, features: 0, epoch: 0, description: GREETING.to_vec() };
    let stop = Stop::new().context("cannot make a wake-up")?;
    let (news, mut heard) = mpsc::unbounded_channel();
    let mut greetings: VecDeque<(u64, Option<UnixStream>)> = VecDeque::new();
    let (mut visitors, mut served) = (0_u64, 0_usize);
    let ended_by = loop {
        tokio::select! {
            signal = signals.next() => break signal,
            () = &mut watchdog => {}
            accepted = door.accept() => {
                visitors += 1;
                let arrival = accepted?;
                match arrival.hold() {
                    Ok(hold) => make_room(&mut greetings, visitors, hold),
                    Err(error) => {
                        tracing::warn!(%error, "a client was dropped: this process has no room for it");
                        continue;
                    }
                }
                greet(arrival, visitors, hello.clone(), news.clone());
            }
            Some((visitor, told)) = heard.recv() => {
                greetings.retain(|(other, _)| *other != visitor);
                match told {
                    News::TurnedAway(why) => {
                        board.count("refused");
                        events.say("refused", json!({ "reason": why }), &format!("no client: {why}"));
                    }
                    News::Greeted(greeted) => {
                        let name = greeted.identity().unwrap_or_default();
                        if served >= usize::from(args.clients) {
                            board.count("refused");
                            events.say("refused", json!({ "client": name, "reason": "crowded" }), &format!("{}: refused: as many clients as may be are served", shown(&name)));
                            let refuse = move || drop(greeted.refuse(Refusal::Crowded).inspect_err(|error| tracing::debug!(%error, "it did not wait for that")));
                            drop(std::thread::Builder::new().name("farbus-bank-refusal".to_owned()).spawn(refuse)?);
                            continue;
                        }
                        served += 1;
                        let client = Client { rights: rights(args, &name), name };
                        events.say("begun", json!({ "client": client.name }), &format!("{}: begun", shown(&client.name)));
                        board.begin(&client.name);
                        let tally = board.tally(&client.name, "link", WireCounts::NAMES);
                        let (server, stop, news) = (server.clone(), stop.clone(), news.clone());
                        let thread = std::thread::Builder::new().name("farbus-bank-client".to_owned());
                        thread.spawn(move || client_thread(*greeted, &client, &server, &stop, tally, |told| drop(news.send((visitor, told)))))?;
                    }
                    News::Left(name, ended) => {
                        served -= 1;
                        board.end(&name);
                        left(events, &name, &ended);
                    }
                    News::Failed(name, why) => {
                        served -= 1;
                        board.end(&name);
                        board.count("refused");
                        events.say("refused", json!({ "client": name, "reason": why }), &format!("{}: no link: {why}", shown(&name)));
                    }
                }
            }
        }
    };
    // Nobody comes in any more.
    drop(door);
    board.state("draining");
    notify::stopping(&format!("ending: {ended_by}"));
    stop.set();
    let all_left = async {
        while served > 0 {
            match heard.recv().await {
                Some((_, News::Left(name, ended))) => {
                    served -= 1;
                    left(events, &name, &ended);
                }
                Some((_, News::Failed(..))) => served -= 1,
                Some(_) => {}
                None => break,
            }
        }
    };
    if tokio::time::timeout(GRACE, all_left).await.is_err() {
        tracing::warn!("a client's thread does not end: the bank's store does not answer");
    }
    events.say("ended", json!({ "reason": ended_by }), &format!("ended: {ended_by}"));
    Ok(())
}

/// Whoever is awaited longest goes where too many are.
fn make_room(greetings: &mut VecDeque<(u64, Option<UnixStream>)>, visitor: u64, hold: Option<UnixStream>) {
    if hold.is_some()
        && greetings.len() >= MAX_GREETINGS
        && let Some((_, Some(oldest))) = greetings.pop_front()
    {
        // Its thread hears the end of the stream; one that is at its end already is no loss.
        let _over = oldest.shutdown(std::net::Shutdown::Both);
    }
    greetings.push_back((visitor, hold));
}

fn greet(arrival: Arrival, visitor: u64, hello: Hello, news: mpsc::UnboundedSender<(u64, News)>) {
    let greet = move || {
        let told = match arrival.greet(&hello) {
            Ok(greeted) if greeted.description() == GREETING => News::Greeted(Box::new(greeted)),
            Ok(_) => News::TurnedAway("somebody wants to borrow a device, and this is a bank".to_owned()),
            Err(error) => News::TurnedAway(error.to_string()),
        };
        // Where the command has ended nobody is greeted any more.
        drop(news.send((visitor, told)));
    };
    if let Err(error) = std::thread::Builder::new().name("farbus-bank-hello".to_owned()).spawn(greet) {
        tracing::warn!(%error, "a client was dropped: this process has no room for it");
    }
}

fn client_thread(greeted: Greeted, client: &Client, server: &BankServer, stop: &Stop, tally: Arc<Tally>, tell: impl FnOnce(News)) {
    let name = client.name.clone();
    tell(match greeted.link(ShmOptions::default()) {
        Ok(Linked::Shm(fabric)) => News::Left(name, server.serve_telling(*fabric, client, stop, Nanos::now, Some(tally))),
        Ok(Linked::Rdma(fabric)) => News::Left(name, server.serve_telling(*fabric, client, stop, Nanos::now, Some(tally))),
        Err(error) => News::Failed(name, error.to_string()),
    });
}

/// The user that a rule is for.
fn user(rule: &Rule) -> Option<u32> {
    rule.client.as_deref()?.strip_prefix("uid:")?.parse().ok()
}

/// What a client may do: everything where no rule was given.
fn rights(args: &ServeArgs, name: &str) -> Rights {
    if args.read.is_empty() && args.write.is_empty() {
        return Rights::all();
    }
    let of = |rules: &[Rule]| {
        let mine = rules.iter().filter(|rule| rule.client.as_deref().is_none_or(|client| client == name));
        mine.map(|rule| rule.machines.clone()).collect()
    };
    Rights { read: of(&args.read), write: of(&args.write) }
}

fn shown(name: &str) -> &str {
    if name.is_empty() { "a client" } else { name }
}

fn left(events: Events, name: &str, Served { reason, wire }: &Served) {
    let text = format!(
        "{}: gone ({reason}): {} offered, {} read in {}, {}",
        shown(name),
        size(wire.offered_bytes),
        size(wire.read_bytes),
        count(wire.reads, "read"),
        count(wire.messages_sent + wire.messages_received, "message")
    );
    events.say("left", json!({ "client": name, "reason": reason, "wire": wire }), &text);
}
