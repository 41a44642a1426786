//! What a service does, written by its threads when something begins or ends, and read by who asks.
//!
//! The board of a lender says `lent`, its device, and of the borrower `uid:1000` since when it is there, how often it came, and its counters. Nothing that happens
//! for each access is written here: sessions add to the tallies that they got from [`Board::tally`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use farbus_transport::Tally;
use farbus_transport::tally::Named;
use serde_json::{Map, Value, json};

/// Peers that are told apart. Certificates are few; where they are not, the others are one.
const MAX_PEERS: usize = 64;
/// What the peers beyond that are called.
const OTHERS: &str = "others";
/// Upper bounds of the histogram of how long a lender was away.
pub(super) const AWAY: [Duration; 6] = [
    Duration::from_millis(10),
    Duration::from_millis(40),
    Duration::from_millis(100),
    Duration::from_millis(400),
    Duration::from_secs(1),
    Duration::from_secs(4),
];

/// All states, with whether a service in it does what it is for.
pub(super) const STATES: [(&str, bool); 9] = [
    ("starting", false),
    ("idle", true),
    ("lent", true),
    ("kept", true),
    ("serving", true),
    ("draining", true),
    ("wedged", false),
    ("lost", false),
    ("gone", false),
];

/// Somebody at the other end of a link.
#[derive(Default)]
pub(super) struct Peer {
    /// The counters of its sessions, by what they are of: `session`, `function`.
    pub tallies: Vec<(&'static str, Arc<Tally>)>,
    /// Links that it has now.
    pub here: u64,
    /// Since when it has the first of them.
    pub since: Option<SystemTime>,
    /// Links that it had.
    pub visits: u64,
}

#[derive(Default)]
pub(super) struct Inner {
    pub state: &'static str,
    pub about: BTreeMap<&'static str, String>,
    pub peers: BTreeMap<String, Peer>,
    pub events: BTreeMap<&'static str, u64>,
    /// How often a lender was away for up to each of [`AWAY`] and longer than the one before it, and for longer than all.
    pub away: [u64; AWAY.len() + 1],
    pub away_sum: Duration,
}

/// What one service does.
pub struct Board {
    pub(super) command: &'static str,
    pub(super) started: SystemTime,
    inner: Mutex<Inner>,
}

impl Board {
    /// An empty one.
    pub fn new(command: &'static str) -> Self {
        let inner = Inner { state: "starting", ..Inner::default() };
        Self { command, started: SystemTime::now(), inner: Mutex::new(inner) }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A fact: the device, the address.
    pub fn describe(&self, what: &'static str, is: &str) {
        self.lock().about.insert(what, is.to_owned());
    }

    /// What it is doing, one of [`STATES`].
    pub fn state(&self, state: &'static str) {
        self.lock().state = state;
    }

    /// Something happened that is counted: `refused`, `recoveries`.
    pub fn count(&self, event: &'static str) {
        *self.lock().events.entry(event).or_default() += 1;
    }

    /// The counters of a peer's sessions.
    pub fn tally(&self, peer: &str, of: &'static str, names: &'static [Named]) -> Arc<Tally> {
        let mut inner = self.lock();
        let peer = inner.peer(peer);
        if let Some((_, tally)) = peer.tallies.iter().find(|(known, _)| *known == of) {
            return Arc::clone(tally);
        }
        let tally = Tally::new(names);
        peer.tallies.push((of, Arc::clone(&tally)));
        tally
    }

    /// A link with a peer began.
    pub fn begin(&self, peer: &str) {
        let mut inner = self.lock();
        let peer = inner.peer(peer);
        peer.visits += 1;
        peer.here += 1;
        peer.since.get_or_insert_with(SystemTime::now);
    }

    /// A link with a peer ended.
    pub fn end(&self, peer: &str) {
        let mut inner = self.lock();
        let peer = inner.peer(peer);
        peer.here = peer.here.saturating_sub(1);
        if peer.here == 0 {
            peer.since = None;
        }
    }

    /// A lender was away for so long, and is back.
    pub fn away(&self, time: Duration) {
        let mut inner = self.lock();
        inner.away_sum += time;
        let bucket = AWAY.iter().position(|limit| time <= *limit).unwrap_or(AWAY.len());
        if let Some(count) = inner.away.get_mut(bucket) {
            *count += 1;
        }
    }

    /// Whether it does what it is for, and what it is doing.
    pub(super) fn health(&self) -> (bool, &'static str) {
        let state = self.lock().state;
        (STATES.iter().any(|(known, good)| *known == state && *good), state)
    }

    /// All of it, as `farbus status` gets it.
    pub fn json(&self) -> Value {
        let inner = self.lock();
        let peers: Vec<_> = inner
            .peers
            .iter()
            .map(|(name, peer)| {
                let counters: Map<_, _> = peer.tallies.iter().map(|(of, tally)| ((*of).to_owned(), counters(tally))).collect();
                let since = peer.since.map(unix);
                json!({ "name": name, "links": peer.here, "since_unix_s": since, "visits": peer.visits, "counters": counters })
            })
            .collect();
        let mut all = json!({
            "command": self.command,
            "pid": std::process::id(),
            "state": inner.state,
            "started_unix_s": unix(self.started),
            "peers": peers,
            "events": inner.events,
        });
        if let Some(all) = all.as_object_mut() {
            all.extend(inner.about.iter().map(|(what, is)| ((*what).to_owned(), is.clone().into())));
        }
        all
    }
}

impl Inner {
    fn peer(&mut self, name: &str) -> &mut Peer {
        let name = if self.peers.len() < MAX_PEERS || self.peers.contains_key(name) { name } else { OTHERS };
        self.peers.entry(name.to_owned()).or_default()
    }
}

fn counters(tally: &Tally) -> Value {
    let named = tally.names().iter().zip(tally.values());
    named.map(|((name, _), value)| ((*name).to_owned(), value.into())).collect::<Map<_, _>>().into()
}

/// Seconds since 1970.
pub(super) fn unix(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: &[Named] = &[("reads", "Reads.")];

    #[test]
    fn a_board_says_who_is_there_and_what_they_did() {
        let board = Board::new("lend");
        assert_eq!(board.health(), (false, "starting"));
        board.describe("device", "edu");
        board.begin("uid:7");
        board.tally("uid:7", "session", NAMES).add(0, 5);
        board.tally("uid:7", "session", NAMES).add(0, 1);
        board.state("lent");
        let said = board.json();
        assert_eq!((&said["state"], &said["device"], &said["command"]), (&json!("lent"), &json!("edu"), &json!("lend")));
        assert_eq!((&said["peers"][0]["links"], &said["peers"][0]["counters"]["session"]["reads"]), (&json!(1), &json!(6)));
        assert!(said["peers"][0]["since_unix_s"].is_u64());
        board.end("uid:7");
        assert_eq!((&board.json()["peers"][0]["since_unix_s"], &board.json()["peers"][0]["visits"]), (&Value::Null, &json!(1)));
    }

    #[test]
    fn peers_without_end_are_one_from_some_number_on() {
        let board = Board::new("lend");
        (0..1000).for_each(|number| board.begin(&format!("uid:{number}")));
        let peers = board.json()["peers"].as_array().unwrap().len();
        assert_eq!(peers, MAX_PEERS + 1);
    }
}
