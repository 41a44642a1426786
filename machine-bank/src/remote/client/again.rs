//! A link that is made anew when it has ended: who asks waits for the next one, and asks that.
//!
//! The server of `rdma:nas:7001` is restarted while a withdrawal has three leaves under way: one of its threads connects after 50, 100 and 200 ms, takes the pin of
//! the machine anew, and all three ask for the pages that had not come. A piece of a pack that was on its way is nowhere, and its deposit hears that.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::super::service::WireCounts;
use super::super::wire::Op;
use super::guards::{Kept, number};
use super::{Client, Link};
use crate::bank::CONFIG;
use crate::store::StoreError;

/// How often a question is asked whose link ends each time.
const MOST_TRIES: u32 = 8;

/// How patient a client is with a server that went away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reconnect {
    /// Before the second attempt; before each further one twice as long.
    pub pause: Duration,
    /// The longest pause.
    pub longest: Duration,
    /// How long whoever asks waits for a link in all. The next one who asks begins anew.
    pub give_up: Duration,
}

impl Default for Reconnect {
    fn default() -> Self {
        Self { pause: Duration::from_millis(50), longest: Duration::from_secs(2), give_up: Duration::from_secs(60) }
    }
}

type Make = Box<dyn Fn() -> Result<Link, StoreError> + Send + Sync>;

/// What the store, its guards and its drafts share.
pub(in crate::remote) struct Remote {
    again: Option<(Reconnect, Make)>,
    now: Mutex<Now>,
    /// Held by whoever makes a link; when that last failed, and how.
    making: Mutex<Option<(Instant, String)>>,
    pub(super) kept: Mutex<BTreeMap<u64, Kept>>,
    /// What the bank says of itself, so that another one is not taken for it.
    pub(super) described: Mutex<Option<Vec<u8>>>,
}

struct Now {
    client: Arc<Client>,
    /// How many links there were before.
    number: u64,
    /// What went over them.
    before: WireCounts,
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let now = self.now();
        f.debug_struct("Remote").field("client", &now.client).field("number", &now.number).finish_non_exhaustive()
    }
}

impl Remote {
    pub(super) fn new(client: Arc<Client>, again: Option<(Reconnect, Make)>) -> Self {
        let now = Now { client, number: 0, before: WireCounts::default() };
        Self { again, now: Mutex::new(now), making: Mutex::default(), kept: Mutex::default(), described: Mutex::default() }
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn address(&self) -> String {
        self.now().client.address.clone()
    }

    /// The link that there is, and its number; it may have ended.
    pub(super) fn current(&self) -> (Arc<Client>, u64) {
        let now = self.now();
        (now.client.clone(), now.number)
    }

    /// What went over all links.
    pub(super) fn wire(&self) -> WireCounts {
        let now = self.now();
        now.before.and(&now.client.state.counts())
    }

    pub fn wrong(&self, what: impl fmt::Display) -> StoreError {
        self.now().client.wrong(what)
    }

    /// Asks what can be asked twice: over the next link where this one ends.
    pub fn ask<T>(&self, mut ask: impl FnMut(&Arc<Client>) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let mut tries = 0;
        loop {
            let client = self.link()?;
            let done = ask(&client);
            let Some((times, _)) = self.again.as_ref().filter(|_| client.is_over() && tries < MOST_TRIES) else { return done };
            if !matches!(done, Err(StoreError::Gone(_))) {
                return done;
            }
            if tries > 0 {
                std::thread::sleep((times.pause * (1 << tries)).min(times.longest));
            }
            tries += 1;
        }
    }

    /// The same of what has a short answer.
    pub fn call(&self, op: &Op) -> Result<Vec<u8>, StoreError> {
        self.ask(|client| client.call(op))
    }

    /// A link that has not ended as far as this side knows, or the one there is where no other can be made.
    pub fn link(&self) -> Result<Arc<Client>, StoreError> {
        let (client, _) = self.current();
        let Some((times, make)) = self.again.as_ref().filter(|_| client.is_over()) else { return Ok(client) };
        let (asked, mut pause) = (Instant::now(), times.pause);
        let mut failed = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            // Somebody else may have made it, or waited in vain meanwhile.
            let (client, _) = self.current();
            if !client.is_over() {
                return Ok(client);
            }
            if let Some((_, why)) = failed.as_ref().filter(|(at, _)| *at > asked) {
                return Err(StoreError::Gone(why.clone()));
            }
            let error = match self.make(&client, make) {
                Ok(()) => continue,
                Err(error @ StoreError::Refused(_)) => return Err(error),
                Err(error) => error,
            };
            tracing::debug!(%error, "a link to a bank is not there again");
            if asked.elapsed() + pause > times.give_up {
                let why = format!("{error}, and was not there again for {:?}", times.give_up);
                *failed = Some((Instant::now(), why.clone()));
                return Err(StoreError::Gone(why));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(times.longest);
        }
    }

    /// Makes the next link and takes anew on it what is held.
    fn make(&self, ended: &Client, make: &Make) -> Result<(), StoreError> {
        let Link(client) = make()?;
        let described = self.described.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(before) = described
            && client.call(&Op::Config(CONFIG.to_owned()))? != before
        {
            return Err(StoreError::Refused(format!("{}: another bank is served there now", client.address)));
        }
        // Until the link is the one that there is nobody takes or lets go of anything.
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        for guard in kept.values_mut().filter(|guard| guard.lost.is_none()) {
            match client.call(&guard.op).and_then(|answer| number(&client, &answer)) {
                Ok(handle) => (guard.handle, guard.anew) = (handle, true),
                Err(error) if client.is_over() => return Err(error),
                Err(error) => {
                    tracing::warn!(%error, "what was held over a link to a bank could not be taken anew");
                    guard.lost = Some(error.to_string());
                }
            }
        }
        client.keep(kept.len());
        let mut now = self.now();
        tracing::info!(address = client.address, "a link to a bank was made anew");
        now.before = now.before.and(&ended.state.counts());
        now.client = client;
        now.number += 1;
        Ok(())
    }

    /// Whether links are made anew.
    pub fn comes_back(&self) -> bool {
        self.again.is_some()
    }
}
