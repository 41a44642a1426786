//! A store that is away: how long it is waited for, how often it is asked meanwhile, and who is told.
//!
//! An NFS server that restarts for 40 s under a running guest: its pager asks after 10, 20, 40 ms and so on, at last every 2 s; "the store is away" is told once,
//! and "it is back" after 40 s. The vCPUs that needed pages of it have waited, and nothing else happened to them.
//!
//! Only what is proven to be damaged or lost is ever taken for it. That takes a store that answers, and that is still the bank: the folder of a file system that
//! is not mounted has no packs either.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::bank::{Bank, CONFIG};
use crate::index::IndexError;
use crate::manifest::ManifestError;
use crate::reader::ReadError;
use crate::store::{Kind, StoreError};
use crate::withdraw::WithdrawError;

/// A store that is away for less is not worth telling of.
const TELL: Duration = Duration::from_millis(100);

/// How a store is asked for what it does not give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Before the second time; before each further one twice as long.
    pub pause: Duration,
    /// The longest pause.
    pub most: Duration,
    /// How long a store may be away until what is needed of it counts as not to be had, for ever; `None`: whoever needs it waits for as long as it takes.
    pub give_up: Option<Duration>,
    /// How often in all, at least once, a store is asked for what it says is damaged or missing: others may just be moving it.
    pub tries: u32,
}

impl Default for Patience {
    fn default() -> Self {
        Self { pause: Duration::from_millis(10), most: Duration::from_secs(2), give_up: None, tries: 4 }
    }
}

impl Patience {
    /// The pause behind one.
    pub(super) fn after(&self, pause: Duration) -> Duration {
        pause.saturating_mul(2).min(self.most).max(self.pause)
    }
}

/// What is told of the store of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreEvent {
    /// It does not answer, or not with what helps; whoever needs something of it waits.
    Away {
        /// Since when.
        since: SystemTime,
        /// What it said, or what was seen of it.
        why: String,
    },
    /// It answers again.
    Back {
        /// How long it was away.
        away: Duration,
    },
}

/// Is told of each [`StoreEvent`], by who fetches from the store.
pub type OnStore = Arc<dyn Fn(&StoreEvent) + Send + Sync>;

/// One question that a store did not answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Away {
    /// When it was asked.
    pub asked: Instant,
    /// What was seen of it.
    pub why: String,
}

/// Why something was not read.
#[derive(Debug)]
pub(crate) enum Unread {
    /// The store is away: nothing is known about what is in it.
    Away(Away),
    /// It is damaged or lost.
    Lost(WithdrawError),
}

impl Unread {
    /// What an error means that `bank` gave for what it was asked at `asked`.
    pub fn sorted(bank: &Bank, asked: Instant, error: WithdrawError) -> Self {
        if is_of_object(&error) && is_there(bank) { Self::Lost(error) } else { Self::Away(Away { asked, why: error.to_string() }) }
    }
}

/// Whether the bank is still there. Over a link it is whoever serves it who says what is missing.
fn is_there(bank: &Bank) -> bool {
    let described = |store: &dyn crate::store::Store| store.list(Kind::Config);
    bank.store().service().is_some() || described(bank.store()).is_ok_and(|all| all.iter().any(|object| object.name == CONFIG))
}

/// Whether it is about what was asked for, and not about the store or this host.
fn is_of_object(error: &WithdrawError) -> bool {
    let of_store = |error: &StoreError| !error.is_of_store();
    let of_read = |error: &ReadError| match error {
        ReadError::Store(error) | ReadError::Index(IndexError::Store(error)) => of_store(error),
        ReadError::Index(IndexError::Pack { .. }) | ReadError::Missing(_) | ReadError::Damaged { .. } | ReadError::Sent(_) => true,
        ReadError::Memory(_) => false,
    };
    match error {
        WithdrawError::Store(error) | WithdrawError::Manifest(ManifestError::Store(error)) => of_store(error),
        WithdrawError::Read(error) | WithdrawError::Page { error, .. } => of_read(error),
        WithdrawError::Section(_) | WithdrawError::Manifest(_) => true,
        WithdrawError::Target(_) => false,
    }
}

/// Who waits for a store, from the first question that it did not answer to the first that it did.
pub(crate) struct Waiting {
    patience: Patience,
    on_store: OnStore,
    /// Since when it is away, by both clocks.
    since: Option<(Instant, SystemTime)>,
    pause: Duration,
    told: bool,
}

impl Waiting {
    pub fn new(patience: Patience, on_store: OnStore) -> Self {
        Self { patience, on_store, since: None, pause: patience.pause, told: false }
    }

    /// Since when it is away.
    pub fn since(&self) -> Option<SystemTime> {
        self.since.map(|(_, since)| since)
    }

    /// Whether it is away for longer than it may be.
    pub fn gave_up(&self) -> bool {
        self.since.zip(self.patience.give_up).is_some_and(|((since, _), limit)| since.elapsed() >= limit)
    }

    /// It did not answer: until when not to ask again. `None`: it is away for too long.
    pub fn failed(&mut self, away: &Away) -> Option<Instant> {
        let now = Instant::now();
        let at = || SystemTime::now().checked_sub(now - away.asked).unwrap_or(SystemTime::UNIX_EPOCH);
        let (since, at) = *self.since.get_or_insert_with(|| (away.asked, at()));
        if !self.told && now - since >= TELL {
            self.told = true;
            tracing::warn!(why = %away.why, "the store of a machine is away");
            (self.on_store)(&StoreEvent::Away { since: at, why: away.why.clone() });
        }
        let until = now + self.pause;
        self.pause = self.patience.after(self.pause);
        match self.patience.give_up {
            Some(limit) if since.elapsed() >= limit => None,
            Some(limit) => Some(until.min(since + limit)),
            None => Some(until),
        }
    }

    /// It answered: how long it had been away, if it had.
    pub fn answered(&mut self) -> Option<Duration> {
        let (since, _) = self.since.take()?;
        let away = since.elapsed();
        self.pause = self.patience.pause;
        if std::mem::take(&mut self.told) {
            tracing::warn!(?away, "the store of a machine is back");
            (self.on_store)(&StoreEvent::Back { away });
        }
        Some(away)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::page::PageId;

    fn waiting(patience: Patience) -> (Waiting, Arc<Mutex<Vec<StoreEvent>>>) {
        let told = Arc::new(Mutex::new(Vec::new()));
        let heard = told.clone();
        (Waiting::new(patience, Arc::new(move |event: &StoreEvent| heard.lock().unwrap().push(event.clone()))), told)
    }

    #[test]
    fn pauses_grow_to_the_longest_and_begin_anew_when_the_store_was_back() {
        let (mut waiting, told) = waiting(Patience::default());
        let away = || Away { asked: Instant::now(), why: "gone".to_owned() };
        let pauses = |waiting: &mut Waiting| -> Vec<u128> {
            (0..10).map(|_| (waiting.failed(&away()).unwrap() - Instant::now()).as_millis() + 1).collect()
        };
        let first = pauses(&mut waiting);
        assert!(
            first
                .iter()
                .zip([10, 20, 40, 80, 160, 320, 640, 1280, 2000, 2000])
                .all(|(is, should)| *is <= should && *is + 5 > should),
            "{first:?}"
        );
        assert!(waiting.answered().is_some() && waiting.answered().is_none());
        assert!(pauses(&mut waiting)[0] <= 10);
        assert!(told.lock().unwrap().is_empty(), "a moment is not told");
    }

    #[test]
    fn a_store_that_was_away_for_long_is_told_once_and_given_up_at_the_limit() {
        let limit = Duration::from_secs(3);
        let (mut waiting, told) = waiting(Patience { give_up: Some(limit), ..Patience::default() });
        let asked = Instant::now().checked_sub(Duration::from_secs(2)).unwrap();
        for _ in 0..20 {
            assert!(waiting.failed(&Away { asked, why: "timed out".to_owned() }).unwrap() <= asked + limit);
        }
        assert!(!waiting.gave_up());
        waiting.since = waiting.since.map(|(since, at)| (since.checked_sub(limit).unwrap(), at));
        assert!(waiting.failed(&Away { asked, why: "timed out".to_owned() }).is_none() && waiting.gave_up());
        waiting.answered();
        let told = told.lock().unwrap();
        assert!(matches!(&told[..], [StoreEvent::Away { why, .. }, StoreEvent::Back { .. }] if why == "timed out"), "{told:?}");
    }

    #[test]
    fn only_what_is_about_an_object_says_that_it_is_lost() {
        let io = || StoreError::io("read", std::io::ErrorKind::TimedOut.into());
        let missing = || StoreError::Missing { kind: Kind::Pack, name: "9f".to_owned() };
        let page = PageId([1; 32]);
        for lost in [
            WithdrawError::Store(missing()),
            WithdrawError::Read(ReadError::Missing(page)),
            WithdrawError::Manifest(ManifestError::Store(missing())),
            WithdrawError::Read(ReadError::Sent(page)),
        ] {
            assert!(is_of_object(&lost), "{lost}");
        }
        for away in [
            WithdrawError::Store(io()),
            WithdrawError::Store(StoreError::Gone("no link".to_owned())),
            WithdrawError::Store(StoreError::Refused("not for you".to_owned())),
            WithdrawError::Manifest(ManifestError::Store(io())),
            WithdrawError::Read(ReadError::Store(io())),
            WithdrawError::Read(ReadError::Index(IndexError::Store(io()))),
            WithdrawError::Read(ReadError::Memory(std::io::ErrorKind::OutOfMemory.into())),
        ] {
            assert!(!is_of_object(&away), "{away}");
        }
    }
}
