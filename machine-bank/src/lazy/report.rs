//! What is told of a machine whose memory comes when it is used: counts, and what cannot be had.
//!
//! `{"faults":120,"hits":3,"demanded":120,"copied":1400,"zero":520,…}` after a machine touched 120 groups, of which the cache had three.

use std::sync::Arc;

use serde::Serialize;

/// What became of a machine so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LazyReport {
    /// Faults that were told.
    pub faults: u64,
    /// Of these, for groups that the cache had.
    pub hits: u64,
    /// Faults outside of the machine's regions, which are not answered.
    pub stray: u64,
    /// Groups that were placed because of a fault.
    pub demanded: u64,
    /// Groups that were placed ahead.
    pub ahead: u64,
    /// Pages that were copied.
    pub copied: u64,
    /// Pages that were mapped from the cache.
    pub mapped: u64,
    /// Pages of zeros.
    pub zero: u64,
    /// How often the store was asked again.
    pub retries: u64,
    /// How often the store was away and came back.
    pub away: u64,
    /// How long it was in all of these times, in milliseconds.
    pub away_ms: u64,
    /// Since when it is away, in milliseconds of Unix time; `None`: it is there, as far as is known.
    pub away_since_ms: Option<u64>,
    /// Pages that could not be had: their use is a SIGBUS.
    pub poisoned: u64,
    /// Pages that could not be had, on a kernel that cannot make their use a SIGBUS: whoever uses them waits.
    pub stuck: u64,
}

/// A stretch of a machine that cannot be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Where in the section.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Why.
    pub reason: String,
}

/// Is told of each [`Failure`], by the machine's pager.
pub type OnFailure = Arc<dyn Fn(&Failure) + Send + Sync>;
