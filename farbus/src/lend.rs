//! `farbus lend`: one device, one borrower after the other.
//!
//! tokio waits for connections and signals; a thread of its own carries each session, gives the device back when the borrower has left,
//! fenced and reset, and a second borrower who comes meanwhile is told that the device is lent. A device that does not end what it was doing
//! for a borrower who has left (a disk that hangs) is lent to nobody until it does: what it still writes is of then.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use farbus_bench::measure::pin_to;
use farbus_remote_dma::Backend;
use farbus_remote_dma::lender::{LenderSession, PollOptions};
use farbus_remote_dma::wait::Waker;
use farbus_transport::CloseReason;
use farbus_transport::link::hello::{Hello, Role, SPOKEN};
use farbus_transport::shm::{Listener, ShmOptions};
use serde_json::json;
use tokio::net::UnixListener;
use tokio::sync::mpsc;

use crate::cli::LendArgs;
use crate::link_address::LinkAddress;
use crate::output::Events;
use crate::signals::EndSignals;

/// Set in the hello of a lender whose device is lent to somebody else.
pub const FEATURE_BUSY: u64 = 1;

/// Set in the hello of a lender whose device does not end what it was doing for its last borrower.
pub const FEATURE_WEDGED: u64 = 2;

/// How long a device may take to end what it was doing, before that is said and, at the end of the command, given up.
const QUIESCE_LIMIT: Duration = Duration::from_secs(10);
/// How long a session's thread may take for all else at the end of the command.
const GRACE: Duration = Duration::from_secs(2);

/// What a session's thread says.
enum Told {
    /// The borrower has left, and the device has not ended so many accesses.
    Wedged(usize),
    Returned(Returned),
}

/// What a session's thread hands back.
struct Returned {
    backend: Box<dyn Backend>,
    ended: Result<CloseReason, String>,
}

/// Lends until a signal comes (or, with `--once`, until the first borrower has left).
pub fn run(args: LendArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the control plane")?;
    let backend = args.device.open()?;
    runtime.block_on(lend(args, backend, QUIESCE_LIMIT))
}

async fn lend(args: LendArgs, backend: Box<dyn Backend>, quiesce: Duration) -> anyhow::Result<()> {
    let events = Events::new(args.json);
    let mut signals = EndSignals::new().context("cannot wait for signals")?;
    let LinkAddress::Shm(path) = &args.listen;
    let listener = Listener::bind(path).context("cannot lend there: choose another path or end the process that uses it")?;
    let accepting = listener.nonblocking_socket().and_then(UnixListener::from_std).context("cannot wait for borrowers")?;
    let listener = Arc::new(listener);
    let name = backend.description().name.clone();
    let address = args.listen.to_string();
    events.say("listening", json!({ "address": address, "device": name }), &format!("lending {name} at {address}"));

    let description = backend.description().encode()?;
    let (tell, mut told) = mpsc::unbounded_channel::<Told>();
    let mut idle = Some(backend);
    let mut wedged = None;
    let stop = Waker::new().context("cannot make a wake-up")?;
    let ended_by = loop {
        tokio::select! {
            signal = signals.next() => break signal,
            accepted = accept(&accepting) => {
                let stream = accepted.context("cannot accept a borrower")?;
                match idle.take() {
                    Some(backend) => {
                        let hello = Hello { versions: SPOKEN, role: Role::Lender, features: 0, epoch: 0, description: description.clone() };
                        let session = Session { listener: Arc::clone(&listener), hello, stop: stop.clone(), spin: args.spin,
                            accept_unsealed: args.accept_unsealed, core: args.core, quiesce, events };
                        let tell = tell.clone();
                        std::thread::Builder::new().name("farbus-lender".into()).spawn(move || {
                            // The receiver lives as long as the command.
                            if tell.send(Told::Returned(session.serve(stream, backend, &tell))).is_err() {
                                tracing::debug!("a session ended after the command");
                            }
                        }).context("cannot start a session's thread")?;
                    }
                    None => refuse(Arc::clone(&listener), stream, if wedged.is_some() { FEATURE_WEDGED } else { FEATURE_BUSY }),
                }
            }
            Some(heard) = told.recv() => match heard {
                Told::Wedged(in_flight) => {
                    wedged = Some(in_flight);
                    events.say("wedged", json!({ "in_flight": in_flight }), &format!(
                        "the device does not end {in_flight} accesses of its last borrower: it is lent to nobody until they end"));
                }
                Told::Returned(back) => {
                    wedged = None;
                    let reason = match &back.ended {
                        Ok(reason) => reason.to_string(),
                        Err(why) => why.clone(),
                    };
                    let served = back.ended.is_ok();
                    events.say("returned", json!({ "reason": reason }), &format!("the device is back: {reason}"));
                    idle = Some(back.backend);
                    if args.once && served {
                        break "the first borrower left";
                    }
                }
            }
        }
    };
    stop.set();
    if idle.is_none() {
        device_is_back(&mut told, wedged, quiesce).await?;
    }
    events.say("ended", json!({ "reason": ended_by }), &format!("ended: {ended_by}"));
    Ok(())
}

/// Waits for the device, as long as it may take at most.
async fn device_is_back(told: &mut mpsc::UnboundedReceiver<Told>, wedged: Option<usize>, quiesce: Duration) -> anyhow::Result<()> {
    let given_up = |in_flight| {
        anyhow!(
            "the device does not end {in_flight} accesses of its last borrower: farbus ends without it; what they write may still reach the \
             image, which stays locked until they have ended"
        )
    };
    // A device that is known to be wedged has had its time.
    let limit = wedged.map_or(quiesce + GRACE, |_| GRACE);
    match tokio::time::timeout(limit, told.recv()).await {
        Ok(Some(Told::Returned(_))) => Ok(()),
        Ok(Some(Told::Wedged(in_flight))) => Err(given_up(in_flight)),
        Ok(None) => Err(anyhow!("the session ended without giving the device back")),
        Err(_) => Err(wedged.map_or_else(|| anyhow!("the session does not end"), given_up)),
    }
}

async fn accept(listener: &UnixListener) -> std::io::Result<UnixStream> {
    loop {
        match listener.accept().await {
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => {}
            // The borrower that is served may have offered as much memory as there are descriptors: that must not end its session.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)) => {
                tracing::warn!(%error, "a borrower cannot be accepted yet");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
            accepted => return accepted?.0.into_std(),
        }
    }
}

/// Tells a borrower why it cannot have the device, without letting it wait or learn more.
fn refuse(listener: Arc<Listener>, stream: UnixStream, features: u64) {
    let refusal = std::thread::Builder::new().name("farbus-refusal".into()).spawn(move || {
        let hello = Hello { versions: SPOKEN, role: Role::Lender, features, epoch: 0, description: Vec::new() };
        if let Err(error) = listener.refuse(stream, &hello) {
            tracing::info!(%error, "a second borrower left before it was refused");
        }
    });
    if let Err(error) = refusal {
        tracing::warn!(%error, "a second borrower was dropped");
    }
}

struct Session {
    listener: Arc<Listener>,
    hello: Hello,
    stop: Waker,
    spin: std::time::Duration,
    accept_unsealed: bool,
    core: Option<usize>,
    quiesce: Duration,
    events: Events,
}

impl Session {
    fn serve(self, stream: UnixStream, backend: Box<dyn Backend>, tell: &mpsc::UnboundedSender<Told>) -> Returned {
        // Held until the thread ends.
        let _pinned = self.core.and_then(|core| {
            let pinned = pin_to(core);
            pinned.inspect_err(|error| tracing::warn!(%error, core, "the session's thread could not be pinned")).ok()
        });
        let options = ShmOptions { accept_unsealed: self.accept_unsealed };
        let connection = match self.listener.establish(stream, &self.hello, options) {
            Ok(connection) => connection,
            Err(error) => return Returned { backend, ended: Err(format!("no borrower: {error}")) },
        };
        let mut session = match LenderSession::new(connection.fabric, backend) {
            Ok(session) => session,
            Err((error, backend)) => return Returned { backend, ended: Err(error.to_string()) },
        };
        self.events.say("lent", json!({}), "a borrower has the device");
        let reason = session.run(PollOptions { spin: self.spin }, &self.stop);
        let counters = session.counters();
        tracing::info!(?counters, "the session's counts");
        let mut ended = session.end_within(self.quiesce);
        if let Err(wedged) = &ended
            && tell.send(Told::Wedged(wedged.in_flight())).is_err()
        {
            tracing::debug!("a device is wedged after the end of the command");
        }
        let backend = loop {
            match ended {
                Ok(backend) => break backend,
                Err(wedged) => ended = wedged.wait(self.quiesce),
            }
        };
        Returned { backend, ended: Ok(reason) }
    }
}

#[cfg(test)]
mod tests;
