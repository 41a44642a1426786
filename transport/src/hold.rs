//! What makes a revoker wait for mapped memory: a count that the owner can see, one more for each mapping in use, wherever its thread is.
//!
//! A lender's worker holds 4 KiB of guest memory for the time of a `preadv`: the count of that grant is 1 in the link's shared memory, and the
//! borrower that takes the grant back waits until it is 0, or until the lender is gone. A lender that closes its end meanwhile is not gone: the
//! last mapping shuts the socket.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::memory::Memory;

/// A mapping of the peer's memory in use, until it is dropped.
#[derive(Debug)]
pub(crate) enum Hold {
    /// Counted where both processes see it.
    Shared {
        /// The shared memory.
        counts: Arc<Memory>,
        /// Where in it this grant's count is.
        at: u64,
        /// As long as this lives the peer must not take us for gone.
        _lifeline: Arc<Lifeline>,
    },
    /// Counted in this process.
    Local {
        /// Held only for its count.
        _token: Arc<()>,
    },
}

impl Hold {
    /// Adds one to the count at `at`; `None` where there is no such word.
    pub(crate) fn shared(counts: &Arc<Memory>, at: u64, lifeline: &Arc<Lifeline>) -> Option<Self> {
        counts.atomic_u32(at).ok()?.fetch_add(1, Ordering::SeqCst);
        Some(Self::Shared { counts: Arc::clone(counts), at, _lifeline: Arc::clone(lifeline) })
    }

    /// Adds one to the strong count of `token`.
    pub(crate) fn local(token: &Arc<()>) -> Self {
        Self::Local { _token: Arc::clone(token) }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Self::Shared { counts, at, .. } = self
            && let Ok(count) = counts.atomic_u32(*at)
        {
            // Release: whoever sees the lower count sees all that was done with the memory before.
            count.fetch_sub(1, Ordering::Release);
        }
    }
}

/// Shuts the sending side of a socket when the last of its holders is gone, which is how the peer hears that nothing of ours is left.
#[derive(Debug)]
pub(crate) struct Lifeline(Arc<UnixStream>);

impl Lifeline {
    pub(crate) fn new(stream: &Arc<UnixStream>) -> Arc<Self> {
        Arc::new(Self(Arc::clone(stream)))
    }
}

impl Drop for Lifeline {
    fn drop(&mut self) {
        // Not the receiving side: until the peer's end closes, it may still be in our memory, and the socket must go on telling.
        if let Err(error) = self.0.shutdown(Shutdown::Write) {
            tracing::debug!(%error, "the socket of a link was closed already");
        }
    }
}
