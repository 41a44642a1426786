//! What a user can do where there is no link, by the reason.
//!
//! At `shm:/run/nvme0` nobody listens: "is `farbus lend` running there?". Somebody listens who speaks versions 3 to 4: "use the same version
//! of farbus on both sides", because asking for what is plainly there would lead nowhere.

use std::io::ErrorKind;

use anyhow::Context;
use farbus_control::certificate::Untimely;
use farbus_control::{CertificateProblem, MeetError, Unwelcome};
use farbus_transport::link::hello::{Disagreement, ExchangeError, HelloError};
use farbus_transport::link::verdict::Refusal;
use farbus_transport::shm::ListenError;

use crate::failure::Advise;
use crate::link::{LinkError, Purpose};

/// Fails with `error`, with what it kept from being done and what may help.
pub fn give<T>(what: impl Into<String>, error: impl Into<LinkError>) -> anyhow::Result<T> {
    let error = error.into();
    match advice(&error) {
        Some(hint) => Err(error).advise(what, hint),
        None => Err(error).with_context(|| what.into()),
    }
}

/// The same for who connects to what is lent or served: what is said of a `farbus lend` is true of a `farbus bank serve`.
pub fn give_for<T>(purpose: Purpose, what: impl Into<String>, error: LinkError) -> anyhow::Result<T> {
    match advice(&error) {
        Some(hint) if purpose == Purpose::Bank => {
            Err(error).advise(what, hint.replace("`farbus lend`", "`farbus bank serve`").replace("the lender", "who serves it"))
        }
        _ => give(what, error),
    }
}

/// What to do; `None` where the error says all there is.
pub fn advice(error: &LinkError) -> Option<String> {
    match error {
        LinkError::Shm(error) => of_shm(error),
        LinkError::Meet(error) => of_meeting(error),
        // It says what to do itself where there is something.
        LinkError::Verbs(_) => None,
    }
}

fn of_shm(error: &ListenError) -> Option<String> {
    let advice = match error {
        ListenError::NobodyThere { .. } => NOBODY,
        ListenError::Stranger { peer, ours } => {
            return Some(format!("run both sides as one user: `farbus lend` as user {ours}, or this as user {peer}"));
        }
        ListenError::Refused { refusal, .. } => of_refusal(*refusal),
        ListenError::Dropped { .. } => DROPPED,
        ListenError::Hello(error) => return of_hello(error),
        ListenError::Host { source, .. } if source.kind() == ErrorKind::PermissionDenied => {
            "run this as the user who runs `farbus lend`"
        }
        ListenError::NotASocket { .. } => "give the address that a `farbus lend` has after --listen",
        ListenError::Host { .. } | ListenError::InUse { .. } => return None,
    };
    Some(advice.to_owned())
}

const NOBODY: &str = "is `farbus lend` running there?";
const DROPPED: &str = "the lender was ending, or could not serve this process: what it says itself tells more";

/// What a lender refused with, if that is what happened.
pub fn refusal_of(error: &anyhow::Error) -> Option<Refusal> {
    error.chain().find_map(|cause| match cause.downcast_ref()? {
        LinkError::Shm(ListenError::Refused { refusal, .. }) | LinkError::Meet(MeetError::Refused(refusal)) => Some(*refusal),
        _ => None,
    })
}

fn of_refusal(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::Lent => "try again when that one has left",
        Refusal::Wedged => "look at the disk of the lender, or try again later",
        Refusal::Held => "try again in some seconds, when the lender has given that one up (farbus lend --hold)",
        Refusal::Others => "stop the VM: its device has gone on without it. What it had no answer to was not carried out",
        Refusal::Gone => "try again when the device is back: the lender says when",
        Refusal::Crowded => "try again when one of them has left",
        Refusal::Kept => "try again when that machine has come for it, or its time is over",
        Refusal::NotKept => "borrow it without the token: the function's profile brings the device back, where it can",
        Refusal::Unknown(_) => "the lender is newer: what it says itself tells more",
    }
}

fn of_meeting(error: &MeetError) -> Option<String> {
    let advice = match error {
        MeetError::Certificate(problem) => return of_certificate(problem),
        MeetError::Unwelcome(why) => of_welcome(*why),
        MeetError::PlainPeer => "use TLS on both sides, or --plain on both",
        MeetError::TlsPeer => "use --tls here: the other side does",
        MeetError::NotTls { .. } => "another program listens there: give the address of a `farbus lend`",
        MeetError::Tls(_) => "use the same version of farbus on both sides, and look for what may change bytes on the way",
        MeetError::Deadline { .. } => "whoever listens there says nothing: it may be stopped, or no `farbus lend`",
        MeetError::Closed { .. } => {
            "whoever listens there turned this process away, or was stopped: what it says itself tells more"
        }
        MeetError::Crowded => "try again",
        MeetError::Hello(error) => return of_hello(error),
        MeetError::Refused(refusal) => of_refusal(*refusal),
        MeetError::Dropped => DROPPED,
        MeetError::HostName { .. } => "name the lender by a DNS name or an IP address, or say which it is with --peer NAME",
        MeetError::PlainBeyondLoopback { .. } => {
            "use TLS (`farbus cert --help`); or, where the network is yours alone, add --plain-beyond-loopback"
        }
        MeetError::NobodyThere { .. } => NOBODY,
        MeetError::NoAnswer { .. } => "is that host up, and does its firewall let the port through?",
        MeetError::Resolve { .. } | MeetError::ResolveLimit { .. } => "look at the name, or use an IP address",
        MeetError::InUse { .. } => "choose another port for --listen, or end what uses this one",
        MeetError::Host { source, .. } => match source.kind() {
            ErrorKind::AddrNotAvailable => "use an address of this host, 0.0.0.0 or [::]",
            ErrorKind::PermissionDenied => "use a port from 1024 on",
            ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => "this host has no way there: look at its routes",
            _ => return None,
        },
        MeetError::Control(_) => return None,
    };
    Some(advice.to_owned())
}

/// The peer's certificate.
fn of_certificate(problem: &CertificateProblem) -> Option<String> {
    let advice = match problem {
        CertificateProblem::Missing => "the other side must be started with --tls",
        CertificateProblem::UnknownAuthority { .. } => {
            "both sides need certificates of one authority: `farbus cert show` says who signed one"
        }
        CertificateProblem::Untimely(Untimely::Expired { .. }) => {
            "the other side needs a new one: farbus cert issue … --replace; or this host's clock is wrong"
        }
        CertificateProblem::Untimely(Untimely::NotYetValid { .. }) => "look at the clocks of both hosts: date -u",
        CertificateProblem::Role { expected, .. } | CertificateProblem::Unnamed { expected, .. } => {
            return Some(format!("the other side needs one that was made with --role {expected}"));
        }
        CertificateProblem::NotAllowed { name } => return Some(format!("add {name} to --allow or to the file of --allow-file")),
        CertificateProblem::OtherPeer { found, .. } => return Some(format!("is it the lender you mean? then use --peer {found}")),
        CertificateProblem::OtherHost { host, .. } => {
            return Some(format!(
                "give the lender a certificate with --address {host}, connect to a name it has, or say which lender it is with --peer NAME"
            ));
        }
        CertificateProblem::NoList { .. } => "mend the file of --allow-file; it is read again for the next borrower",
        CertificateProblem::Other(_) => return None,
    };
    Some(advice.to_owned())
}

/// This side's certificate.
fn of_welcome(why: Unwelcome) -> &'static str {
    match why {
        Unwelcome::UnknownAuthority => "both sides need certificates of one authority: `farbus cert show` says who signed this one",
        Unwelcome::Untimely => "`farbus cert show` says until when it is valid; look at the clocks of both hosts",
        Unwelcome::NotAllowed => "the lender must name this borrower with --allow",
        Unwelcome::Role => "`farbus cert show` says for which role it is",
        Unwelcome::Missing => "use --tls",
        Unwelcome::Bad | Unwelcome::Alert(_) => "what the other side says itself tells more",
    }
}

fn of_hello(error: &ExchangeError) -> Option<String> {
    let advice = match error {
        ExchangeError::Disagreement(Disagreement::Version { .. }) => {
            return Some(format!("use the same version of farbus on both sides; this is {}", env!("CARGO_PKG_VERSION")));
        }
        ExchangeError::Disagreement(Disagreement::SameRole(_)) => "give the address that a `farbus lend` has after --listen",
        ExchangeError::Malformed(HelloError::Magic { .. }) => "another program listens there: give the address of a `farbus lend`",
        ExchangeError::Malformed(_) | ExchangeError::Verdict { .. } => "use the same version of farbus on both sides",
        ExchangeError::PeerClosed { .. } => {
            "whoever listens there turned this process away: a `farbus lend` says why, and over shm: lends to its own user only"
        }
        ExchangeError::Deadline { .. } => "whoever listens there says nothing: it may be stopped, or no `farbus lend`",
        ExchangeError::Ours(_) | ExchangeError::Host(_) => return None,
    };
    Some(advice.to_owned())
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::PathBuf;
    use std::time::Duration;

    use farbus_transport::link::hello::SPOKEN;

    use super::*;

    #[test]
    fn only_where_nobody_is_found_the_user_is_asked_to_look_for_a_lender() {
        let path = || PathBuf::from("link");
        let asks = |error: ListenError| of_shm(&error).is_some_and(|advice| advice.contains("running there?"));
        assert!(asks(ListenError::NobodyThere { path: path() }));
        let others = [
            ListenError::Stranger { peer: 0, ours: 1000 },
            ListenError::Refused { path: path(), refusal: Refusal::Lent },
            ListenError::Refused { path: path(), refusal: Refusal::Unknown(9) },
            ListenError::Dropped { path: path() },
            ListenError::NotASocket { path: path() },
            ListenError::Hello(ExchangeError::PeerClosed { received: 0, needed: 40 }),
            ListenError::Hello(ExchangeError::Deadline { allowed: Duration::from_secs(5) }),
            ListenError::Hello(ExchangeError::Malformed(HelloError::Magic { found: [0; 8] })),
            ListenError::Hello(ExchangeError::Disagreement(Disagreement::Version { peer: SPOKEN, ours: SPOKEN })),
            ListenError::Host { what: "connect to", path: path(), source: ErrorKind::PermissionDenied.into() },
        ];
        for error in others {
            let said = error.to_string();
            assert!(of_shm(&error).is_some(), "no advice: {said}");
            assert!(!asks(error), "{said}");
        }
        let odd = ListenError::Host { what: "connect to", path: path(), source: io::Error::other("odd") };
        assert_eq!(of_shm(&odd), None);
        let stranger = of_shm(&ListenError::Stranger { peer: 7, ours: 1000 }).unwrap();
        assert!(stranger.contains("user 7") && stranger.contains("user 1000"), "{stranger}");
    }

    #[test]
    fn a_network_that_fails_is_not_a_lender_that_is_missing() {
        let address = "10.0.0.7:7000".parse().unwrap();
        let asks = |error: MeetError| of_meeting(&error).is_some_and(|advice| advice.contains("running there?"));
        assert!(asks(MeetError::NobodyThere { address }));
        let certificate = |problem| MeetError::Certificate(problem);
        let others = [
            certificate(CertificateProblem::Missing),
            certificate(CertificateProblem::UnknownAuthority { issuer: "CN=lab".to_owned() }),
            certificate(CertificateProblem::NotAllowed { name: "vm7".parse().unwrap() }),
            certificate(CertificateProblem::OtherHost { host: "nas".to_owned(), addresses: Vec::new() }),
            MeetError::Unwelcome(Unwelcome::NotAllowed),
            MeetError::Unwelcome(Unwelcome::Alert(40)),
            MeetError::PlainPeer,
            MeetError::TlsPeer,
            MeetError::NotTls { found: b"HTTP".to_vec() },
            MeetError::Deadline { allowed: Duration::from_secs(5) },
            MeetError::Closed { received: 0 },
            MeetError::Refused(Refusal::Lent),
            MeetError::Dropped,
            MeetError::PlainBeyondLoopback { address },
            MeetError::NoAnswer { address, allowed: Duration::from_secs(5) },
            MeetError::ResolveLimit { host: "nas".to_owned() },
        ];
        for error in others {
            let said = error.to_string();
            assert!(of_meeting(&error).is_some(), "no advice: {said}");
            assert!(!asks(error), "{said}");
        }
    }
}
