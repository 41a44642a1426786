//! Threads on cores: two sides that are compared must not take turns on one core.
//!
//! `let pinned = pin_to(cores()?[1])?` keeps the calling thread on the second core it may use until `pinned` is dropped.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use thiserror::Error;

/// Why a thread could not be pinned.
#[derive(Debug, Error)]
pub enum PinError {
    /// The kernel refused.
    #[error("cannot pin a thread to core {core}: {source}")]
    Refused {
        /// The core.
        core: usize,
        /// What the kernel answered.
        source: std::io::Error,
    },
    /// The affinity could not be read.
    #[error("cannot read which cores this thread may use: {0}")]
    Unknown(#[source] std::io::Error),
    /// A measurement between two cores on a machine with one.
    #[error("two cores are needed; this thread may use only {0}")]
    TooFew(usize),
}

/// The cores that this thread may use, ascending.
///
/// # Errors
/// [`PinError::Unknown`].
pub fn cores() -> Result<Vec<usize>, PinError> {
    let set = sched_getaffinity(None).map_err(|errno| PinError::Unknown(errno.into()))?;
    Ok((0..CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).collect())
}

/// Two different cores for the two sides of a measurement.
///
/// # Errors
/// [`PinError::TooFew`] where this thread may use only one, [`PinError::Unknown`].
pub fn two_cores() -> Result<[usize; 2], PinError> {
    match cores()?.as_slice() {
        [first, second, ..] => Ok([*first, *second]),
        fewer => Err(PinError::TooFew(fewer.len())),
    }
}

/// Keeps the calling thread on one core; dropping it gives the thread its former cores back.
#[derive(Debug)]
pub struct Pinned {
    former: CpuSet,
    /// Affinity belongs to a thread, so this must be dropped where it was made.
    _not_send: std::marker::PhantomData<*const ()>,
}

/// Pins the calling thread to `core`.
///
/// # Errors
/// [`PinError`].
pub fn pin_to(core: usize) -> Result<Pinned, PinError> {
    let former = sched_getaffinity(None).map_err(|errno| PinError::Unknown(errno.into()))?;
    if core >= CpuSet::MAX_CPU {
        let source = std::io::ErrorKind::InvalidInput.into();
        return Err(PinError::Refused { core, source });
    }
    let mut only = CpuSet::new();
    only.set(core);
    sched_setaffinity(None, &only).map_err(|errno| PinError::Refused { core, source: errno.into() })?;
    Ok(Pinned { former, _not_send: std::marker::PhantomData })
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // A thread that stays pinned is slower at worst; there is nobody left to tell.
        let restored = sched_setaffinity(None, &self.former);
        debug_assert!(restored.is_ok(), "the former affinity was refused: {restored:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_thread_runs_on_its_core_and_is_free_again_afterwards() {
        let all = cores().unwrap();
        let last = *all.last().unwrap();
        {
            let _pinned = pin_to(last).unwrap();
            assert_eq!(cores().unwrap(), [last]);
            assert_eq!(rustix::thread::sched_getcpu(), last);
        }
        assert_eq!(cores().unwrap(), all);
        assert!(pin_to(CpuSet::MAX_CPU).is_err());
    }
}
