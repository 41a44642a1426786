//! How much of a served bank one client may have at a time, whatever number of links it has it over.
//!
//! `vm7` has sent 250 MiB of packs that are yet to be checked, over two links; with a limit of 256 MiB a piece of 1 MiB is taken and one of 8 MiB is refused, until a pack
//! is in the bank or one of the links ends.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What there is a limit for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum What {
    /// Bytes of objects that were sent and not yet checked.
    Staged,
    Holds,
    Pins,
}

/// What all clients have.
#[derive(Clone, Debug, Default)]
pub(super) struct Quotas(Arc<Mutex<HashMap<(String, What), u64>>>);

/// What a client has of something, until it is dropped.
#[derive(Debug)]
pub(super) struct Share {
    all: Quotas,
    key: (String, What),
    amount: u64,
}

impl Quotas {
    fn all(&self) -> MutexGuard<'_, HashMap<(String, What), u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing yet.
    pub fn share(&self, client: &str, what: What) -> Share {
        Share { all: self.clone(), key: (client.to_owned(), what), amount: 0 }
    }
}

impl Share {
    /// Takes so much more, if the client has then at most `most`; otherwise false.
    pub fn grow(&mut self, by: u64, most: u64) -> bool {
        let mut all = self.all.all();
        let there = all.entry(self.key.clone()).or_default();
        let fits = there.checked_add(by).is_some_and(|sum| sum <= most);
        if fits {
            *there += by;
            self.amount += by;
        }
        fits
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut all = self.all.all();
        if let Some(there) = all.get_mut(&self.key) {
            *there = there.saturating_sub(self.amount);
            if *there == 0 {
                all.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_has_at_most_its_share_and_gives_it_back() {
        let quotas = Quotas::default();
        let mut one = quotas.share("vm7", What::Staged);
        let mut other = quotas.share("vm7", What::Staged);
        assert!(one.grow(6, 10) && other.grow(4, 10) && !other.grow(1, 10));
        assert!(quotas.share("vm8", What::Staged).grow(10, 10) && quotas.share("vm7", What::Pins).grow(10, 10));
        drop(one);
        assert!(other.grow(6, 10) && !other.grow(1, 10) && !other.grow(u64::MAX, 10));
        drop(other);
        assert!(quotas.all().is_empty());
    }
}
