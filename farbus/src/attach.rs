//! Connecting to a lender, and what a user can do where that fails.
//!
//! At `shm:/run/nvme0` nobody listens: "is `farbus lend` running there?". Somebody listens who speaks versions 3 to 4: "use the same version
//! of farbus on both sides", because asking for what is plainly there would lead nowhere.

use std::io::ErrorKind;

use anyhow::Context;
use farbus_remote_dma::DeviceDescription;
use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_transport::link::hello::{Disagreement, ExchangeError, Hello, HelloError, Role, SPOKEN};
use farbus_transport::link::verdict::Refusal;
use farbus_transport::shm::{Connection, ListenError, ShmFabric, ShmOptions, connect};

use crate::failure::Advise;
use crate::link_address::LinkAddress;

/// Connects to the lender at `from`.
pub fn attach(from: &LinkAddress, options: BorrowerOptions) -> anyhow::Result<BorrowerSession<ShmFabric>> {
    let LinkAddress::Shm(path) = from;
    let hello = Hello { versions: SPOKEN, role: Role::Borrower, features: 0, epoch: 0, description: Vec::new() };
    let Connection { fabric, agreed } = connect(path, &hello, ShmOptions::default()).or_else(|error| {
        let (what, advice) = (format!("cannot borrow from {from}"), advice(&error));
        match advice {
            Some(hint) => Err(error).advise(what, hint),
            None => Err(error).context(what),
        }
    })?;
    let description = DeviceDescription::decode(&agreed.peer.description)
        .with_context(|| format!("the lender at {from} is wrong about its device"))?;
    BorrowerSession::new(fabric, description, options).context("cannot share memory with the lender")
}

/// What to do; `None` where the error says all there is.
fn advice(error: &ListenError) -> Option<String> {
    let advice = match error {
        ListenError::NobodyThere { .. } => "is `farbus lend` running there?",
        ListenError::Stranger { peer, ours } => {
            return Some(format!("run both sides as one user: `farbus lend` as user {ours}, or this as user {peer}"));
        }
        ListenError::Refused { refusal: Refusal::Lent, .. } => "try again when that one has left",
        ListenError::Refused { refusal: Refusal::Unknown(_), .. } => "the lender is newer: what it says itself tells more",
        ListenError::Dropped { .. } => "the lender was ending, or could not serve this process: what it says itself tells more",
        ListenError::Hello(error) => return of_hello(error),
        ListenError::Host { source, .. } if source.kind() == ErrorKind::PermissionDenied => {
            "run this as the user who runs `farbus lend`"
        }
        ListenError::Host { .. } | ListenError::InUse { .. } | ListenError::NotASocket { .. } => return None,
    };
    Some(advice.to_owned())
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
            "whoever listens there turned this process away: a `farbus lend` says why, and lends to its own user only"
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

    use super::*;

    #[test]
    fn only_where_nobody_is_found_the_user_is_asked_to_look_for_a_lender() {
        let path = || PathBuf::from("link");
        let asks = |error: ListenError| advice(&error).is_some_and(|advice| advice.contains("running there?"));
        assert!(asks(ListenError::NobodyThere { path: path() }));
        let others = [
            ListenError::Stranger { peer: 0, ours: 1000 },
            ListenError::Refused { path: path(), refusal: Refusal::Lent },
            ListenError::Refused { path: path(), refusal: Refusal::Unknown(9) },
            ListenError::Dropped { path: path() },
            ListenError::Hello(ExchangeError::PeerClosed { received: 0, needed: 40 }),
            ListenError::Hello(ExchangeError::Deadline { allowed: Duration::from_secs(5) }),
            ListenError::Hello(ExchangeError::Malformed(HelloError::Magic { found: [0; 8] })),
            ListenError::Hello(ExchangeError::Disagreement(Disagreement::Version { peer: SPOKEN, ours: SPOKEN })),
            ListenError::Host { what: "connect to", path: path(), source: ErrorKind::PermissionDenied.into() },
        ];
        for error in others {
            let said = error.to_string();
            assert!(advice(&error).is_some(), "no advice: {said}");
            assert!(!asks(error), "{said}");
        }
        let odd = ListenError::Host { what: "connect to", path: path(), source: io::Error::other("odd") };
        assert_eq!(advice(&odd), None);
        let stranger = advice(&ListenError::Stranger { peer: 7, ours: 1000 }).unwrap();
        assert!(stranger.contains("user 7") && stranger.contains("user 1000"), "{stranger}");
    }
}
