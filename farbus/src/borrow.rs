//! `farbus borrow`: a lender's device, offered to an unmodified VMM at a vfio-user socket.
//!
//! One thread owns the link, the function and the socket; tokio waits for signals beside it. The command says why it ended: a signal, a lender
//! that said goodbye, or (exit status 3) one that is gone without a word.

use std::io::ErrorKind;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use farbus_pci_shim::vfio_user::{BindError, ClientInterrupts, Ended, OnUnshared, Options, Server};
use farbus_pci_shim::{Counters, Function, FunctionOptions, InterruptOwner, NotFound, Reconnector, Search, SearchStop};
use farbus_remote_dma::borrower::{self, BorrowerOptions};
use farbus_remote_dma::{Attachment, Claim, HolderToken, Holding};
use farbus_transport::link::verdict::Refusal;
use farbus_transport::{CloseReason, Tally};
use serde_json::json;
use tokio::sync::oneshot;

use crate::advice::refusal_of;
use crate::attach::attach;
use crate::borrow_args::{BorrowArgs, Unshared};
use crate::failure::Advise;
use crate::output::Events;
use crate::service::{Board, Service, notify};
use crate::signals::EndSignals;
use crate::socket_access;

/// The exit status where the lender is gone without a goodbye or broke the protocol.
const LENDER_LOST: u8 = 3;
/// How long a device that is held for somebody else is waited for, and how often it is asked for.
const LONGEST_HOLD: Duration = Duration::from_secs(30);
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

/// Borrows until the lender is gone or a signal comes; the exit status says which.
pub fn run(args: &BorrowArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the control plane")?;
    let mut signals = {
        let _inside = runtime.enter();
        EndSignals::new().context("cannot wait for signals")?
    };
    let events = Events::new(args.json);
    // Bound before the lender is asked, so that a device is not taken for a socket that cannot be served.
    let mut server = Server::bind_for(&args.vfio_user, socket_access::of(args)?).or_else(|error| {
        let hint = match &error {
            BindError::InUse(_) => "choose another path for --vfio-user, or end what uses this one",
            BindError::NotASocket(_) => "choose another path for --vfio-user, or remove what is there",
            BindError::Host { source, .. } if source.kind() == ErrorKind::PermissionDenied && args.socket_group.is_some() => {
                "use a --socket-group that this user is in, and a folder that it may write to"
            }
            BindError::Host { .. } => "choose a path for --vfio-user in a folder that is there and may be written to",
        };
        Err(error).advise("cannot serve a VMM there", hint)
    })?;
    let options = BorrowerOptions { read_deadline: args.read_deadline, ..BorrowerOptions::default() };
    let service = Service::start("borrow", &args.service, events)?;
    let (board, from) = (&service.board, args.from.to_string());
    let holder = HolderToken::random().context("no random bytes")?;
    let tally = board.tally(&from, "session", borrower::Counters::NAMES);
    let session = attach_first(args, options, holder, &tally)?;
    board.begin(&from);
    let name = session.description().name.clone();
    let interrupts = ClientInterrupts::new(session.description());
    let mut function = Function::new(session, interrupts, FunctionOptions { interrupts: InterruptOwner::Client })?;
    let mut search_stop = None;
    if !args.reconnect.is_zero() {
        let search = search(args, options, holder, events, board);
        search_stop = Some(search.stop_handle());
        function.reattach_by(Box::new(search));
    }
    function.tell(board.tally(&from, "function", Counters::NAMES));
    let socket = args.vfio_user.display().to_string();
    board.describe("device", &name);
    board.describe("socket", &socket);
    board.state("serving");
    events.say(
        "serving",
        json!({ "device": name, "from": args.from.to_string(), "socket": socket }),
        &format!("serving {name} from {} at {socket}", args.from),
    );

    notify::ready(&format!("serving {name} from {from} at {socket}"));
    let lost = Arc::clone(board);
    server.on_loss(move |why| {
        lost.state("gone");
        let what = format!("{}: the VM reads all ones until it leaves, then this ends", culprit(why));
        events.say("lender-gone", json!({ "reason": why.to_string() }), &what);
    });
    let stop = server.stop_handle();
    let on_unshared = match args.unshared {
        Unshared::Messages => OnUnshared::Messages,
        Unshared::Refuse => OnUnshared::Refuse,
    };
    let options = Options { spin: args.spin, on_unshared, ..Options::default() };
    // The thread cannot be awaited; what it holds until its end can.
    let (held, released) = oneshot::channel::<()>();
    let serving = std::thread::Builder::new().name("farbus-borrower".into()).spawn(move || {
        let _held = held;
        let ended = server.serve(&mut function, &options);
        (ended, function.gone(), function.counters())
    })?;
    let signal = runtime.block_on(async {
        tokio::select! {
            signal = signals.next() => Some(signal),
            _ = released => None,
            () = notify::watchdog() => None,
        }
    });
    board.state("draining");
    notify::stopping(signal.unwrap_or("the lender is gone"));
    stop.stop();
    // A read of the VM's may wait for the lender.
    search_stop.iter().for_each(SearchStop::stop);
    let Ok((ended, gone, counters)) = serving.join() else { bail!("the serving thread failed") };
    tracing::info!(?counters, "the function's counts");
    let (reason, code) = match (ended?, gone) {
        (Ended::Stopped, None) => (signal.unwrap_or("stopped").to_owned(), 0),
        // A VMM was still there and saw a dead device.
        (Ended::Stopped, Some(why)) => (format!("{}, after the lender: {why}", signal.unwrap_or("stopped")), 0),
        (Ended::DeviceGone(why), _) => (culprit(why), if is_goodbye(why) { 0 } else { LENDER_LOST }),
    };
    events.say("ended", json!({ "reason": reason, "status": code }), &format!("ended: {reason}"));
    Ok(ExitCode::from(code))
}

/// Connects for the first time. A device that is held for somebody who may come back is waited for.
fn attach_first(
    args: &BorrowArgs,
    options: BorrowerOptions,
    holder: HolderToken,
    tally: &Arc<Tally>,
) -> anyhow::Result<Box<dyn Attachment>> {
    let claim = Claim { rest: None, holding: Some(Holding::First(holder)) };
    let began = Instant::now();
    loop {
        match attach(&args.from, &args.security, &args.peer, options, &claim, Some(Arc::clone(tally))) {
            Err(error) if refusal_of(&error) == Some(Refusal::Held) && began.elapsed() < LONGEST_HOLD => {
                tracing::info!("the device is held for a borrower that may come back: waiting");
                std::thread::sleep(BETWEEN_LOOKS);
            }
            attached => return attached,
        }
    }
}

/// How the lender is looked for when it is gone, and what is said of it.
fn search(args: &BorrowArgs, options: BorrowerOptions, holder: HolderToken, events: Events, board: &Arc<Board>) -> Reconnector {
    let (from, security, peer) = (args.from.clone(), args.security.clone(), args.peer.clone());
    let (board, lender) = (Arc::clone(board), args.from.to_string());
    let tally = board.tally(&lender, "session", borrower::Counters::NAMES);
    let claim = Claim { rest: None, holding: Some(Holding::Again(holder)) };
    let again = move || {
        attach(&from, &security, &peer, options, &claim, Some(Arc::clone(&tally))).map_err(|error| match refusal_of(&error) {
            Some(Refusal::Others) => NotFound::Ever(format!("{error:#}")),
            _ => NotFound::Yet(format!("{error:#}")),
        })
    };
    let limit = args.reconnect;
    Reconnector::new(limit, again).telling(move |search| match search {
        Search::Lost(why) => {
            board.state("lost");
            board.count("losses");
            board.end(&lender);
            notify::status("looking for the lender");
            let what = format!("{}: looking for it for {limit:?}, the VM waits", culprit(why));
            events.say("lender-lost", json!({ "reason": why.to_string(), "limit_ms": limit.as_millis() }), &what);
        }
        Search::Back(away) => {
            board.state("serving");
            board.count("recoveries");
            board.away(away);
            board.begin(&lender);
            notify::status("serving");
            let what = format!("the lender is back after {away:.0?}, and has what the VM had no answer to");
            events.say("lender-back", json!({ "away_us": away.as_micros() }), &what);
        }
        Search::GaveUp(why) => {
            board.state("gone");
            board.count("given_up");
            notify::status("the lender is given up");
            events.say("lender-given-up", json!({ "reason": why }), &format!("the lender is given up: {why}"));
        }
    })
}

/// Why there is no lender any more, with whose doing it was.
fn culprit(reason: CloseReason) -> String {
    match reason {
        CloseReason::Device(_) => format!("here: {reason}"),
        _ => format!("the lender: {reason}"),
    }
}

/// Whether a lender that is gone has left in order.
fn is_goodbye(reason: CloseReason) -> bool {
    match reason {
        CloseReason::PeerClosed | CloseReason::Local => true,
        CloseReason::PeerGone | CloseReason::Device(_) | CloseReason::DeviceLost(_) | CloseReason::Protocol(_) => false,
    }
}
