//! One connection to a lender, from its hello to its end, on a thread of its own.
//!
//! Three come at once: one says nothing and is given up after 5 s, one has said its hello and gets the device, the third is told that it is
//! lent. A visitor claims the device only when its hello is complete, so who only knocks keeps nobody waiting.

use std::sync::Arc;
use std::time::Duration;

use farbus_bench::measure::pin_to;
use farbus_remote_dma::lender::{Counters, Drained, LenderSession, PollOptions};
use farbus_remote_dma::wait::{Waker, sleep_until_readable};
use farbus_remote_dma::{Backend, Claim, Continued, Kept};
use farbus_transport::link::hello::Hello;
use farbus_transport::link::verdict::Refusal;
use farbus_transport::shm::ShmOptions;
use farbus_transport::{CloseReason, Fabric};
use tokio::sync::{mpsc, oneshot};

use crate::link::{Arrival, Greeted, Linked};
use crate::service::Board;

/// Between two looks for a device that is gone.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Tells connections apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visitor(pub u64);

/// A device that nobody has.
pub enum Device {
    /// As after power-on.
    Reset(Box<dyn Backend>),
    /// At rest, as a function left it, for who has its token.
    Kept(Kept),
}

/// A device on its way to who claimed it.
pub enum Claimed {
    /// As after power-on.
    Fresh(Box<dyn Backend>),
    /// Where a function left it.
    Continued(Continued),
}

/// What a visitor's thread tells the command.
pub enum News {
    /// It is not a borrower. Nothing follows.
    TurnedAway {
        /// Where it came from, if that can be told.
        from: Option<String>,
        /// Why.
        why: String,
    },
    /// Its hello is complete, and says what it comes for: the answer is the device, or why it cannot have it.
    Claims(Claim, oneshot::Sender<Result<Claimed, Refusal>>),
    /// It has the device; its name, if it showed one. [`News::Returned`] follows.
    Lent(Option<String>),
    /// The command ends, and the device was to end what it had begun. [`News::Returned`] follows.
    Drained(Drained),
    /// The borrower has left, and the device has not ended so many accesses. [`News::Returned`] follows when it has.
    Wedged(usize),
    /// The device itself is gone, and why. [`News::Returned`] follows when it has come back.
    Gone {
        /// In a few words.
        why: String,
        /// A borrower had it.
        lent: bool,
    },
    /// The device is back, fenced and reset, or kept: how the borrower left, or why it never was one.
    Returned(Device, Result<CloseReason, String>),
}

/// What all visitors of a lender have in common.
pub struct Terms {
    /// What the lender says of itself and its device.
    pub hello: Hello,
    /// Ends every session.
    pub stop: Waker,
    /// Cuts off what a device has begun, when the command ends.
    pub hurry: Waker,
    /// How long a device may take to end what it has begun, when the command ends.
    pub drain: Duration,
    /// Where borrowers are noted.
    pub board: Arc<Board>,
    /// How long a session polls before it sleeps.
    pub spin: Duration,
    /// The fabric's options.
    pub options: ShmOptions,
    /// Where the thread of a session runs.
    pub core: Option<usize>,
    /// How long a device may take to end what it was doing, before that is said.
    pub quiesce: Duration,
    /// How long a device is kept for a function that left it.
    pub keep_at_most: Duration,
    /// Bytes in a second that a borrower's device may move.
    pub max_bandwidth: Option<u64>,
}

/// How long a kept device waits for a borrower whose link did not come about.
const AGAIN: Duration = Duration::from_secs(30);

/// A connection that was accepted.
pub struct Visit {
    /// Which one.
    pub visitor: Visitor,
    /// What it is told and given.
    pub terms: Arc<Terms>,
    /// Where the command hears of it.
    pub news: mpsc::UnboundedSender<(Visitor, News)>,
}

impl Visit {
    /// Carries it to its end.
    pub fn run(self, arrival: Arrival) {
        let from = arrival.from();
        let greeted = match arrival.greet(&self.terms.hello) {
            Ok(greeted) => greeted,
            Err(error) => return self.tell(News::TurnedAway { from, why: error.to_string() }),
        };
        let (claim, answer) = oneshot::channel();
        self.tell(News::Claims(greeted.claim(), claim));
        match answer.blocking_recv() {
            Ok(Ok(device)) => self.serve(greeted, device),
            Ok(Err(refusal)) => {
                if let Err(error) = greeted.refuse(refusal) {
                    tracing::info!(%error, "a second borrower left before it was refused");
                }
            }
            Err(_) => tracing::debug!("a borrower came too late, or while the command ended"),
        }
    }

    fn serve(&self, greeted: Greeted, device: Claimed) {
        // Held until the session ends.
        let _pinned = self.terms.core.and_then(|core| {
            let pinned = pin_to(core);
            pinned.inspect_err(|error| tracing::warn!(%error, core, "the session's thread could not be pinned")).ok()
        });
        let (peer, identity) = (greeted.peer(), greeted.identity().unwrap_or_else(|| "unknown".to_owned()));
        match greeted.link(self.terms.options) {
            Ok(Linked::Shm(fabric)) => self.lend(*fabric, device, peer, &identity),
            Ok(Linked::Rdma(fabric)) => self.lend(*fabric, device, peer, &identity),
            Err(error) => {
                let back = match device {
                    Claimed::Fresh(device) => Device::Reset(device),
                    // Its borrower may try once more.
                    Claimed::Continued(device) => Device::Kept(device.keep_again(AGAIN)),
                };
                self.tell(News::Returned(back, Err(format!("no borrower: {error}"))));
            }
        }
    }

    fn lend<F: Fabric>(&self, fabric: F, device: Claimed, peer: Option<String>, identity: &str) {
        let session = match device {
            Claimed::Fresh(device) => LenderSession::new(fabric, device).map_err(|(error, device)| (error, Device::Reset(device))),
            Claimed::Continued(device) => {
                LenderSession::continued(fabric, device).map_err(|(error, kept)| (error, Device::Kept(kept)))
            }
        };
        let mut session = match session {
            Ok(session) => {
                let tally = self.terms.board.tally(identity, "session", Counters::NAMES);
                let session = session.keeping_at_most(self.terms.keep_at_most).telling(tally);
                match self.terms.max_bandwidth {
                    Some(rate) => session.limited_to(rate),
                    None => session,
                }
            }
            Err((error, device)) => return self.give_back(device, Err(error.to_string())),
        };
        self.terms.board.begin(identity);
        self.tell(News::Lent(peer));
        let reason = session.run(PollOptions { spin: self.terms.spin }, &self.terms.stop);
        if reason == CloseReason::Local {
            self.tell(News::Drained(session.drain(self.terms.drain, &self.terms.hurry)));
        }
        self.terms.board.end(identity);
        let counters = session.counters();
        tracing::info!(?counters, "the session's counts");
        let session = match session.into_kept() {
            Ok(kept) => return self.tell(News::Returned(Device::Kept(kept), Ok(reason))),
            Err(session) => session,
        };
        let mut ended = session.end_within(self.terms.quiesce);
        if let Err(wedged) = &ended {
            self.tell(News::Wedged(wedged.in_flight()));
        }
        let device = loop {
            match ended {
                Ok(device) => break device,
                Err(wedged) => ended = wedged.wait(self.terms.quiesce),
            }
        };
        self.give_back(Device::Reset(device), Ok(reason));
    }

    /// A device that is gone is given back when it has come back, for which it is asked less and less often.
    fn give_back(&self, device: Device, ended: Result<CloseReason, String>) {
        let mut device = match device {
            Device::Reset(device) if device.gone().is_some() => device,
            back => return self.tell(News::Returned(back, ended)),
        };
        let why = device.gone().unwrap_or_default();
        self.tell(News::Gone { why: why.to_owned(), lent: ended.is_ok() });
        let mut pause = FIRST_PAUSE;
        while !self.terms.stop.is_set() {
            match device.revive() {
                Ok(()) => break,
                Err(error) => tracing::info!(%error, ?pause, "the device is not back"),
            }
            sleep_until_readable(&[Some(self.terms.stop.fd())], Some(pause));
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        self.tell(News::Returned(Device::Reset(device), ended));
    }

    fn tell(&self, news: News) {
        // The command listens until every device is back; what comes later changes nothing.
        if self.news.send((self.visitor, news)).is_err() {
            tracing::debug!("a connection outlived the command");
        }
    }
}
