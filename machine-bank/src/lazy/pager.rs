//! The thread that fetches what one machine needs from the store, and alone waits for it.
//!
//! Group 12 is wanted and the store is away: it goes to the end of what is wanted, and the next one is asked for when the pause is over. Until then the pager answers
//! what the cache has got in the meantime from other machines' pagers.

use super::away::{Away, Unread, Waiting};
use super::cache::Cache;
use super::image::{Image, pages_of};
use super::served::{Next, Served};
use super::server::LazyOptions;
use super::working_set::WorkingSet;
use crate::bank::Bank;
use crate::manifest::Entry;

/// Fetches what one machine needs, until it is over.
pub(super) fn page(bank: &Bank, entry: &Entry, served: &Served, cache: &Cache, options: &LazyOptions) {
    let waiting = Waiting::new(options.patience, options.on_store.clone());
    Pager { bank, entry, served, cache, options, image: None, lost: None, waiting }.run();
}

/// Whether the store was asked for anything.
struct Asked(bool);

/// Why groups were not fetched.
enum Unfetched {
    /// The store is away.
    Away(Away),
    /// All of the machine is lost.
    Lost(String),
}

struct Pager<'a> {
    bank: &'a Bank,
    entry: &'a Entry,
    served: &'a Served,
    cache: &'a Cache,
    options: &'a LazyOptions,
    /// `None`: it was not read yet.
    image: Option<Image<'a>>,
    /// Why it never will be.
    lost: Option<String>,
    waiting: Waiting,
}

impl Pager<'_> {
    fn run(mut self) {
        loop {
            // The machine's manifest and its working set are read before anybody asks.
            let unread = self.image.is_none() && self.lost.is_none() && !self.waiting.gave_up();
            let (groups, demanded) = if unread {
                (Vec::new(), false)
            } else {
                match self.served.next() {
                    Next::Over => return,
                    Next::Again(address) => {
                        self.served.answer_again(address);
                        continue;
                    }
                    Next::Demand(group) => (vec![group], true),
                    Next::Ahead(groups) => (groups, false),
                }
            };
            match self.fetch(&groups, demanded) {
                Ok(Asked(asked)) => {
                    if asked {
                        self.answered();
                    }
                }
                Err(Unfetched::Lost(why)) => self.fail(&groups, demanded, &why),
                Err(Unfetched::Away(away)) => {
                    let until = self.waiting.failed(&away);
                    self.served.away(self.waiting.since());
                    let Some(until) = until else {
                        self.gave_up(&groups, demanded, &away);
                        continue;
                    };
                    self.served.later(&groups, demanded);
                    if !self.served.hold_out(until) {
                        return;
                    }
                }
            }
        }
    }

    fn answered(&mut self) {
        if let Some(away) = self.waiting.answered() {
            self.served.back(away);
        }
    }

    fn gave_up(&self, groups: &[u64], demanded: bool, away: &Away) {
        if self.image.is_none() {
            self.served.fetch_ahead(&[], false);
        }
        self.fail(groups, demanded, &format!("the store is away for too long: {}", away.why));
    }

    /// What was only fetched ahead is asked for again when somebody needs it.
    fn fail(&self, groups: &[u64], demanded: bool, why: &str) {
        for group in groups.iter().filter(|_| demanded) {
            self.served.fail(pages_of(*group, self.served.pages), why);
        }
    }

    fn fetch(&mut self, groups: &[u64], demanded: bool) -> Result<Asked, Unfetched> {
        let (served, cache) = (self.served, self.cache);
        let missing: Vec<_> = groups.iter().copied().filter(|group| !served.put_cached(*group, demanded)).collect();
        if missing.is_empty() && !groups.is_empty() {
            return Ok(Asked(false));
        }
        self.open()?;
        let Some(image) = &mut self.image else { return Ok(Asked(true)) };
        let asked = image.fetch(&missing, &mut |fetched| {
            if fetched.bad.is_empty()
                && let Err(error) = cache.insert(&served.cached, fetched.group as usize, fetched.bytes)
            {
                tracing::warn!(%error, "a group is not kept in the cache");
            }
            served.put(&fetched, demanded);
            let first = pages_of(fetched.group, served.pages).start;
            for run in fetched.bad.chunk_by(|a, b| a + 1 == *b) {
                let from = first + run.first().map_or(0, |page| *page as u64);
                served.fail(from..from + run.len() as u64, &fetched.why);
            }
        });
        asked.map(Asked).map_err(Unfetched::Away)
    }

    /// Reads what the machine is made of, where that was not done, and what is to be fetched ahead.
    fn open(&mut self) -> Result<(), Unfetched> {
        if let Some(why) = &self.lost {
            return Err(Unfetched::Lost(why.clone()));
        }
        if self.image.is_some() {
            return Ok(());
        }
        let LazyOptions { section, patience, prefetch, rest, .. } = self.options;
        match Image::open(self.bank, self.entry, section, *patience, &self.served.retries) {
            Ok(image) => {
                self.answered();
                let set = if *prefetch { image.working_set(section) } else { WorkingSet::default() };
                self.served.fetch_ahead(&set.groups, *rest);
                self.image = Some(image);
                Ok(())
            }
            Err(Unread::Away(away)) => Err(Unfetched::Away(away)),
            Err(Unread::Lost(error)) => {
                self.answered();
                tracing::error!(%error, "a machine cannot be read");
                self.served.fetch_ahead(&[], false);
                let why = error.to_string();
                self.lost = Some(why.clone());
                Err(Unfetched::Lost(why))
            }
        }
    }
}
