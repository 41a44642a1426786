//! The life of a link as one table: what each event does in each state, and who is told what.
//!
//! A link in [`State::Hello`] that hears [`Event::VersionMismatch`] goes to [`State::Closed`] and its owner is told
//! "the peer broke the protocol: no version in common". What a peer can cause is never refused, only what a mistake of ours would.
//! [`hello`] holds the first messages of every link and the blocking driver that exchanges them over a socket, [`verdict`] what the lender
//! says after them.

pub mod control;
mod exchange;
pub mod hello;
pub mod verdict;

use thiserror::Error;

use crate::fabric::CloseReason;

/// Where a link is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// The hellos are being exchanged; nothing else may be sent.
    Hello,
    /// Operations flow both ways.
    Ready,
    /// This side said goodbye: it posts nothing new, what is outstanding finishes.
    Draining,
    /// The peer said goodbye: it sends nothing new, what is outstanding finishes.
    PeerDraining,
    /// Over. Nothing leaves this state.
    Closed,
}

/// What can happen to a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The peer's hello was parsed and a version agreed on.
    HelloAccepted,
    /// The peer's hello was parsed; no version is spoken by both sides.
    VersionMismatch,
    /// The peer's hello was parsed; the peer cannot be the other end of this link (both are lenders, say).
    HelloUnfit,
    /// The peer's hello could not be parsed.
    HelloMalformed,
    /// This side wants to end the link in order.
    LocalDrain,
    /// The peer wants to end the link in order.
    PeerDrain,
    /// Everything that was outstanding on this side is done.
    Drained,
    /// The peer closed the connection.
    PeerCloses,
    /// The connection broke, or the peer's heartbeat stopped.
    PeerGone,
    /// The time allowed for the present state is over.
    Deadline,
    /// The peer sent what it may not.
    ProtocolFault,
    /// This side ends the link at once.
    Abort,
}

impl State {
    /// All states, in the order of a link's life.
    pub const ALL: [Self; 5] = [Self::Hello, Self::Ready, Self::Draining, Self::PeerDraining, Self::Closed];

    /// Whether this side may post operations.
    pub const fn may_post(self) -> bool {
        matches!(self, Self::Ready)
    }

    /// Whether operations and messages of the peer are expected.
    pub const fn may_receive(self) -> bool {
        matches!(self, Self::Ready | Self::Draining | Self::PeerDraining)
    }
}

impl Event {
    /// All events.
    pub const ALL: [Self; 12] = [
        Self::HelloAccepted,
        Self::VersionMismatch,
        Self::HelloUnfit,
        Self::HelloMalformed,
        Self::LocalDrain,
        Self::PeerDrain,
        Self::Drained,
        Self::PeerCloses,
        Self::PeerGone,
        Self::Deadline,
        Self::ProtocolFault,
        Self::Abort,
    ];

    /// Whether the peer can make it happen, by what it sends or fails to send. Such an event is never [`Refused`].
    pub const fn is_peers(self) -> bool {
        !matches!(self, Self::LocalDrain | Self::Drained | Self::Abort)
    }
}

/// What the owner of the link must do on the way into the new state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    Nothing,
    /// Open the data path: posts are allowed from now on.
    Open,
    /// Refuse new posts, tell the peer goodbye, and report [`Event::Drained`] when nothing is outstanding.
    SayGoodbye,
    /// Refuse new posts, and report [`Event::Drained`] when nothing is outstanding.
    FinishOutstanding,
    /// Fail what is outstanding, release everything, and report this reason, once.
    Report(CloseReason),
}

/// An event's effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transition {
    /// The state from now on.
    pub to: State,
    /// What to do on the way.
    pub action: Action,
}

/// The event cannot happen in this state: a fault of this side's own code, never of the peer.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{event:?} cannot happen to a link in state {state:?}")]
pub struct Refused {
    /// The state, which stays.
    pub state: State,
    /// The event.
    pub event: Event,
}

/// What `event` does to a link in `state`.
///
/// # Errors
/// [`Refused`] where only a mistake of this side can have raised the event.
pub const fn next(state: State, event: Event) -> Result<Transition, Refused> {
    use Action::{FinishOutstanding, Nothing, Open, SayGoodbye};
    Ok(match (state, event) {
        // Once closed, whatever still arrives changes nothing and is reported to nobody; closing twice is no mistake.
        (State::Closed, Event::Drained) => return Err(Refused { state, event }),
        (State::Closed, _) => stay(State::Closed),

        (State::Hello, Event::HelloAccepted) => to(State::Ready, Open),
        (State::Hello, Event::VersionMismatch) => fault("no version in common"),
        (State::Hello, Event::HelloUnfit) => fault("not the other end of this link"),
        (State::Hello, Event::HelloMalformed) => fault("malformed hello"),
        (State::Hello, Event::PeerDrain) => fault("goodbye before hello"),
        // Nothing can be outstanding before the data path is open.
        (State::Hello, Event::Drained) => return Err(Refused { state, event }),
        (State::Hello, Event::LocalDrain) => closed(CloseReason::Local),

        (_, Event::HelloAccepted | Event::VersionMismatch | Event::HelloUnfit | Event::HelloMalformed) => fault("a second hello"),

        (State::Ready, Event::LocalDrain) => to(State::Draining, SayGoodbye),
        (State::Ready, Event::PeerDrain) => to(State::PeerDraining, FinishOutstanding),
        // Operations finish all the time while ready: only a drain makes the last of them an event.
        (State::Ready, Event::Drained) => return Err(Refused { state, event }),

        // Both said goodbye: whoever did it first here decides what is reported.
        (State::Draining, Event::LocalDrain | Event::PeerDrain) => stay(State::Draining),
        (State::Draining, Event::Drained | Event::PeerCloses | Event::Deadline) => closed(CloseReason::Local),
        (State::PeerDraining, Event::LocalDrain) => to(State::PeerDraining, Nothing),
        (State::PeerDraining, Event::PeerDrain) => fault("a second goodbye"),
        (State::PeerDraining, Event::Drained) => closed(CloseReason::PeerClosed),

        (_, Event::PeerCloses) => closed(CloseReason::PeerClosed),
        (_, Event::PeerGone | Event::Deadline) => closed(CloseReason::PeerGone),
        (_, Event::ProtocolFault) => fault("a message that is not allowed here"),
        (_, Event::Abort) => closed(CloseReason::Local),
    })
}

const fn to(to: State, action: Action) -> Transition {
    Transition { to, action }
}

const fn stay(state: State) -> Transition {
    to(state, Action::Nothing)
}

const fn closed(reason: CloseReason) -> Transition {
    to(State::Closed, Action::Report(reason))
}

const fn fault(what: &'static str) -> Transition {
    closed(CloseReason::Protocol(what))
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;

    fn matrix() -> String {
        let mut table = String::new();
        for state in State::ALL {
            for event in Event::ALL {
                let effect = match next(state, event) {
                    Ok(Transition { to, action }) => match action {
                        Action::Report(reason) => format!("{to:?}, reports: {reason}"),
                        Action::Nothing => format!("{to:?}"),
                        other => format!("{to:?}, {other:?}"),
                    },
                    Err(_) => "refused".to_owned(),
                };
                writeln!(table, "{:<13}{:<17}{effect}", format!("{state:?}"), format!("{event:?}")).unwrap();
            }
        }
        table
    }

    /// The table is looked at when it changes: to accept a change, run with `FARBUS_BLESS=1`.
    #[test]
    fn the_whole_matrix_is_as_it_was_reviewed() {
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/link_states.txt");
        if std::env::var_os("FARBUS_BLESS").is_some() {
            std::fs::write(golden, matrix()).unwrap();
        }
        let reviewed = std::fs::read_to_string(golden).unwrap();
        assert_eq!(matrix(), reviewed, "the link table changed; look at it, then bless it");
    }

    #[test]
    fn no_peer_can_raise_a_refusal() {
        for state in State::ALL {
            for event in Event::ALL.into_iter().filter(|event| event.is_peers()) {
                assert!(next(state, event).is_ok(), "{state:?} {event:?}");
            }
        }
    }

    #[test]
    fn the_end_is_reported_exactly_once_and_nothing_leaves_it() {
        for state in State::ALL {
            for event in Event::ALL {
                let Ok(transition) = next(state, event) else { continue };
                let reports = matches!(transition.action, Action::Report(_));
                let enters_closed = transition.to == State::Closed && state != State::Closed;
                assert_eq!(reports, enters_closed, "{state:?} {event:?}");
                assert!(state != State::Closed || transition.to == State::Closed);
            }
        }
    }

    #[test]
    fn every_state_but_closed_can_be_left_by_abort_and_by_a_deadline() {
        for state in State::ALL {
            for event in [Event::Abort, Event::Deadline, Event::PeerGone] {
                assert_eq!(next(state, event).map(|t| t.to), Ok(State::Closed), "{state:?} {event:?}");
            }
        }
    }
}
