//! `farbus lend`: one device, one borrower after the other.
//!
//! tokio waits for connections and signals; a thread of its own carries each connection ([`visit`]): hello, claim, session. The first whose
//! hello is complete gets the device, a second who comes meanwhile is told that it is lent, and whoever says nothing keeps nobody waiting.
//! Told to end (SIGTERM), it lets nobody in any more, lets the device end what it has begun (`--drain`), and says goodbye.
//! A device that does not end what it was doing for a borrower who has left (a disk that hangs) is lent to nobody until it does: what it still writes is of
//! then.

mod quota;
mod visit;

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use farbus_remote_dma::lender::Drained;
use farbus_remote_dma::wait::Waker;
use farbus_remote_dma::{Backend, Claim, Holders};
use farbus_transport::CloseReason;
use farbus_transport::link::hello::{Hello, Role, SPOKEN};
use farbus_transport::link::verdict::Refusal;
use farbus_transport::shm::ShmOptions;
use serde_json::json;
use tokio::sync::mpsc;

use self::quota::Quota;
use self::visit::{Claimed, Device, News, Terms, Visit, Visitor};
use crate::cli::LendArgs;
use crate::cores::check_core;
use crate::device_spec::DeviceSpec;
use crate::failure::misuse;
use crate::link::{Arrival, Door, Purpose};
use crate::link_address::LinkAddress;
use crate::output::Events;
use crate::service::{Board, Service, notify};
use crate::signals::EndSignals;

/// Connections whose hello is awaited at a time, each with a thread and 5 s. One more ends the oldest: whoever means it needs milliseconds.
const MAX_GREETINGS: usize = 32;

/// How long a device may take to end what it was doing, before that is said and, at the end of the command, given up.
const QUIESCE_LIMIT: Duration = Duration::from_secs(10);
/// How long a session's thread may take for all else at the end of the command.
const GRACE: Duration = Duration::from_secs(2);

/// Lends until a signal comes (or, with `--once`, until the first borrower has left).
pub fn run(args: LendArgs) -> anyhow::Result<()> {
    if let Some(core) = args.core {
        check_core(core)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the control plane")?;
    if args.max_bandwidth.is_some() && !matches!(args.device, DeviceSpec::Nvme { .. }) {
        return Err(misuse(
            "--max-bandwidth bounds a device that can be held, and this is none",
            "leave it out, or lend an nvme: device",
        ));
    }
    let device = args.device.open()?;
    if device.takes_windows() && !matches!(args.listen, LinkAddress::Shm(_)) {
        return Err(misuse(
            format!("{} reaches memory by itself, so its borrower's memory must be on this host", device.description().name),
            "lend it at an address of shared memory, as in --listen shm:/tmp/farbus.link",
        ));
    }
    let service = Service::start("lend", &args.service, Events::new(args.json))?;
    runtime.block_on(lend(args, device, QUIESCE_LIMIT, &service))
}

async fn lend(args: LendArgs, device: Box<dyn Backend>, quiesce: Duration, service: &Service) -> anyhow::Result<()> {
    let events = Events::new(args.json);
    let board = &service.board;
    let mut signals = EndSignals::new().context("cannot wait for signals")?;
    let door = Door::open(&args.listen, Purpose::Device, &args.security, &args.allow, &[]).await?;
    let name = device.description().name.clone();
    let address = door.address();
    board.describe("device", &name);
    board.describe("address", &address);
    board.state("idle");
    events.say("listening", json!({ "address": address, "device": name }), &format!("lending {name} at {address}"));
    notify::ready(&format!("lending {name} at {address}"));

    let terms = Arc::new(Terms {
        hello: Hello { versions: SPOKEN, role: Role::Lender, features: 0, epoch: 0, description: device.description().encode()? },
        stop: Waker::new().context("cannot make a wake-up")?,
        hurry: Waker::new().context("cannot make a wake-up")?,
        drain: args.drain,
        board: Arc::clone(board),
        spin: args.spin,
        options: ShmOptions { accept_unsealed: args.accept_unsealed },
        core: args.core,
        quiesce,
        keep_at_most: args.keep_at_most,
        max_bandwidth: args.max_bandwidth,
    });
    let (news, mut heard) = mpsc::unbounded_channel();
    let mut desk = Desk {
        holders: Holders::new(&*device, args.hold, Instant::now()),
        may_return: !matches!(args.listen, LinkAddress::Shm(_)),
        idle: Some(Device::Reset(device)),
        wedged: None,
        gone: false,
        greetings: VecDeque::new(),
        strangers: Quota::new(Instant::now()),
        events,
        board: Arc::clone(board),
    };
    let mut watchdog = Box::pin(notify::watchdog());
    let mut visitors = 0;
    let ended_by = loop {
        tokio::select! {
            signal = signals.next() => break signal,
            () = &mut watchdog => {}
            accepted = door.accept() => {
                let arrival = accepted?;
                visitors += 1;
                let visit = Visit { visitor: Visitor(visitors), terms: Arc::clone(&terms), news: news.clone() };
                if let Err(error) = desk.receive(arrival, visit) {
                    tracing::warn!(%error, "a borrower was dropped: this process has no room for it");
                }
            }
            Some((visitor, news)) = heard.recv() => {
                if desk.hear(visitor, news) == Some(Left::Borrower) && args.once {
                    break "the first borrower left";
                }
            }
        }
    };
    if desk.strangers.unsaid() > 0 {
        tracing::warn!(count = desk.strangers.unsaid(), "nothing was said of the last strangers that were turned away");
    }
    // Nobody comes in any more, and who looks for this lender looks on.
    drop(door);
    board.state("draining");
    notify::stopping(&format!("ending: {ended_by}"));
    terms.stop.set();
    // So that a thread that died with the device ends the wait for it.
    drop(news);
    if desk.idle.is_none() {
        let limit = args.drain + quiesce;
        let back = device_is_back(&mut heard, desk.wedged, limit, events);
        tokio::pin!(back);
        loop {
            tokio::select! {
                done = &mut back => break done?,
                () = &mut watchdog => {}
                signal = signals.next() => {
                    tracing::warn!(signal, "what the device has begun is not waited for");
                    terms.hurry.set();
                }
            }
        }
    }
    events.say("ended", json!({ "reason": ended_by }), &format!("ended: {ended_by}"));
    Ok(())
}

/// Waits for the device, as long as it may take at most.
async fn device_is_back(
    heard: &mut mpsc::UnboundedReceiver<(Visitor, News)>,
    mut wedged: Option<usize>,
    quiesce: Duration,
    events: Events,
) -> anyhow::Result<()> {
    // A device that is known to be wedged has had its time.
    let limit = wedged.map_or(quiesce + GRACE, |_| GRACE);
    let back = async {
        loop {
            match heard.recv().await {
                Some((_, News::Returned(..))) => return Ok(()),
                Some((_, News::Drained(drained))) => say_drained(events, drained),
                Some((_, News::Wedged(in_flight))) => {
                    wedged = Some(in_flight);
                    return Err(None);
                }
                Some(_) => {}
                None => return Err(Some(anyhow!("the session ended without giving the device back"))),
            }
        }
    };
    match tokio::time::timeout(limit, back).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(Some(error))) => Err(error),
        Ok(Err(None)) | Err(_) => Err(wedged.map_or_else(
            || anyhow!("the session does not end"),
            |in_flight| {
                anyhow!(
                    "the device does not end {in_flight} accesses of its last borrower: farbus ends without it; what they write may still \
                     reach the image, which stays locked until they have ended"
                )
            },
        )),
    }
}

/// What became of what the device had begun when the command was told to end.
fn say_drained(events: Events, drained: Drained) {
    let (what, in_flight) = match drained {
        Drained::Done => ("all that the device had begun has ended", 0),
        Drained::Late(in_flight) => ("the device did not end in time what it had begun: it is cut off", in_flight),
        // Nothing was waited for.
        Drained::Unable | Drained::Over => return,
    };
    events.say("drained", json!({ "done": drained == Drained::Done, "in_flight": in_flight }), what);
}

/// Where the device lies while it is not lent, and where visitors are received.
struct Desk {
    /// `None` while it is lent.
    idle: Option<Device>,
    /// Its last borrower has left, and it has not ended so many accesses.
    wedged: Option<usize>,
    /// The device is gone, and a thread waits for it.
    gone: bool,
    /// Connections whose hello is awaited, the oldest first.
    greetings: VecDeque<(Visitor, Option<UnixStream>)>,
    /// Who had it last.
    holders: Holders,
    /// A borrower whose link is lost may be alive: it is on another host.
    may_return: bool,
    /// How many strangers may be told of.
    strangers: Quota,
    events: Events,
    board: Arc<Board>,
}

/// Who brought the device back.
#[derive(PartialEq, Eq)]
enum Left {
    Borrower,
    /// One who had said hello and no more.
    Nobody,
}

impl Desk {
    /// Begins to wait for a connection's hello.
    fn receive(&mut self, arrival: Arrival, visit: Visit) -> std::io::Result<()> {
        let awaited = arrival.hold()?;
        if awaited.is_some()
            && self.greetings.len() >= MAX_GREETINGS
            && let Some((_, Some(oldest))) = self.greetings.pop_front()
        {
            self.stranger(None, &format!("it said nothing while {MAX_GREETINGS} others came"));
            // Its thread hears the end of the stream; one that is at its end already is no loss.
            let _over = oldest.shutdown(std::net::Shutdown::Both);
        }
        let visitor = visit.visitor;
        std::thread::Builder::new().name("farbus-lender".into()).spawn(move || visit.run(arrival))?;
        self.greetings.push_back((visitor, awaited));
        Ok(())
    }

    /// Does what a visitor's thread needs, and says it.
    fn hear(&mut self, visitor: Visitor, news: News) -> Option<Left> {
        match news {
            News::TurnedAway { from, why } => {
                if self.greeted(visitor) {
                    self.stranger(from.as_deref(), &why);
                }
            }
            // One that was given up already is not answered, which ends it.
            News::Claims(..) if !self.greeted(visitor) => {}
            News::Claims(claim, answer) => {
                let granted = self.claim(claim);
                if let Err(refusal) = &granted {
                    self.refused(None, &refusal.to_string(), 0);
                }
                // Its thread waits for this; a device that could not be handed over stays here.
                match answer.send(granted) {
                    Err(Ok(Claimed::Fresh(device))) => self.idle = Some(self.noted(Device::Reset(device), None)),
                    Err(Ok(Claimed::Continued(device))) => self.idle = Some(Device::Kept(device.keep_again(GRACE))),
                    Ok(()) | Err(Err(_)) => {}
                }
            }
            News::Lent(peer) => {
                self.is("lent", peer.as_deref().map_or("lent".to_owned(), |peer| format!("lent to {peer}")).as_str());
                match peer {
                    Some(peer) => self.events.say("lent", json!({ "peer": peer }), &format!("{peer} has the device")),
                    None => self.events.say("lent", json!({}), "a borrower has the device"),
                }
            }
            News::Drained(drained) => say_drained(self.events, drained),
            News::Wedged(in_flight) => {
                self.wedged = Some(in_flight);
                let what = format!(
                    "the device does not end {in_flight} accesses of its last borrower: it is lent to nobody until they end"
                );
                self.is("wedged", &what);
                self.events.say("wedged", json!({ "in_flight": in_flight }), &what);
            }
            News::Gone { why, lent } => {
                self.gone = true;
                let what = format!("the device is gone ({why}): it is lent again when it is back");
                self.is("gone", &what);
                self.events.say("gone", json!({ "reason": why }), &what);
                return lent.then_some(Left::Borrower);
            }
            News::Returned(Device::Kept(kept), ended) => {
                self.wedged = None;
                if ended.is_err() {
                    self.holders.never_lent(None);
                }
                let seconds = kept.left().unwrap_or_default().as_secs();
                let what = format!("the device is at rest, and kept for {seconds} s for the function that left it");
                self.is("kept", &what);
                self.events.say("kept", json!({ "seconds": seconds }), &what);
                self.idle = Some(Device::Kept(kept));
            }
            News::Returned(device, ended) => {
                self.wedged = None;
                self.gone = false;
                let reason = ended.as_ref().map_or_else(Clone::clone, ToString::to_string);
                self.is("idle", "the device is lent to nobody");
                let device = self.noted(device, ended.as_ref().ok().copied());
                self.events.say("returned", json!({ "reason": reason }), &format!("the device is back: {reason}"));
                self.idle = Some(device);
                return Some(if ended.is_ok() { Left::Borrower } else { Left::Nobody });
            }
        }
        None
    }

    /// Says what the device is doing, to who asks and to systemd.
    fn is(&self, state: &'static str, status: &str) {
        self.board.state(state);
        notify::status(status);
    }

    /// Notes how the borrower of a device that is back has left.
    fn noted(&mut self, device: Device, reason: Option<CloseReason>) -> Device {
        match device {
            Device::Reset(mut device) => {
                match reason {
                    Some(reason) => self.holders.left(reason, self.may_return, Some(&mut *device), Instant::now()),
                    None => self.holders.never_lent(Some(&mut *device)),
                }
                Device::Reset(device)
            }
            kept @ Device::Kept(_) => {
                if reason.is_none() {
                    self.holders.never_lent(None);
                }
                kept
            }
        }
    }

    /// The device for a visitor who comes with this, or none.
    fn claim(&mut self, claim: Claim) -> Result<Claimed, Refusal> {
        let rest = claim.rest;
        let device = match self.idle.take() {
            None if self.gone => return Err(Refusal::Gone),
            None => return Err(self.wedged.map_or(Refusal::Lent, |_| Refusal::Wedged)),
            Some(Device::Kept(kept)) if kept.left().is_none() => Device::Reset(kept.give_up()),
            Some(device) => device,
        };
        let (back, refusal) = match (device, rest) {
            (Device::Reset(mut device), None) => {
                let may_have = self.holders.may_have(claim.holding, Instant::now());
                // Without a name of its own it would be taken for the last one.
                match may_have.and_then(|()| self.holders.lent(claim.holding, &mut *device).map_err(|_| Refusal::Gone)) {
                    Ok(()) => return Ok(Claimed::Fresh(device)),
                    Err(refusal) => (Device::Reset(device), refusal),
                }
            }
            // Who believes the device to be at rest must not get one that was reset.
            (device @ Device::Reset(_), Some(_)) => (device, Refusal::NotKept),
            (device @ Device::Kept(_), None) => (device, Refusal::Kept),
            (Device::Kept(kept), Some(rest)) => match kept.claim(&rest) {
                Ok(mut device) => match self.holders.lent(claim.holding, device.device_mut()) {
                    Ok(()) => return Ok(Claimed::Continued(device)),
                    Err(_) => (Device::Kept(device.keep_again(GRACE)), Refusal::Gone),
                },
                Err(kept) => (Device::Kept(kept), Refusal::Kept),
            },
        };
        self.idle = Some(back);
        Err(refusal)
    }

    /// Takes a visitor from those whose hello is awaited; false where it was given up.
    fn greeted(&mut self, visitor: Visitor) -> bool {
        let found = self.greetings.iter().position(|(awaited, _)| *awaited == visitor);
        found.is_some_and(|at| self.greetings.remove(at).is_some())
    }

    /// Says that somebody was turned away before a complete hello, as often as that may be said.
    fn stranger(&mut self, from: Option<&str>, why: &str) {
        if let Some(unsaid) = self.strangers.take(Instant::now()) {
            self.refused(from, why, unsaid);
        }
    }

    /// Says that somebody was turned away, and how many others were of whom nothing was said.
    fn refused(&self, from: Option<&str>, why: &str, unsaid: u64) {
        self.board.count("refused");
        let (mut fields, mut text) = match from {
            Some(from) => (json!({ "reason": why, "from": from }), format!("no link with {from}: {why}")),
            None => (json!({ "reason": why }), format!("no link: {why}")),
        };
        if unsaid > 0 {
            fields["unsaid"] = unsaid.into();
            text.push_str(&format!(" (and {unsaid} others before)"));
        }
        self.events.say("refused", fields, &text);
    }
}

#[cfg(test)]
mod tests;
