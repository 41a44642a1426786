//! How a server behaves, and the ways in which a client or a server ends.
//!
//! `Options { spin: Duration::ZERO, ..Options::default() }` sleeps as soon as there is nothing to do; a client that closes its socket ends as
//! [`ClientEnd::Left`], and the server goes on to the next.

use std::io;
use std::time::Duration;

use rustix::io::Errno;
use thiserror::Error;

use super::share::OnUnshared;

/// What to do while a client is connected and the device goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnGone {
    /// Serve on until the client leaves: reads are all ones, as from an empty slot, so that a guest can end in good order.
    #[default]
    ServeAllOnes,
    /// Close the connection.
    End,
}

/// How a server behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How long to poll after the last event before sleeping. 0 sleeps at once.
    pub spin: Duration,
    /// How long a client may take to answer one `DMA_READ` or `DMA_WRITE`.
    pub dma_deadline: Duration,
    /// How long a reply waits for stores of the device before it, with a client that is not known to make accesses while it waits. A client
    /// that does gets `dma_deadline`.
    pub flush_limit: Duration,
    /// How long a client may take from connecting to `VERSION`.
    pub version_deadline: Duration,
    /// Where a map's file is not the guest's memory.
    pub on_unshared: OnUnshared,
    /// Where the device goes.
    pub on_gone: OnGone,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            spin: Duration::from_micros(50),
            dma_deadline: Duration::from_secs(5),
            flush_limit: Duration::from_millis(250),
            version_deadline: Duration::from_secs(10),
            on_unshared: OnUnshared::default(),
            on_gone: OnGone::default(),
        }
    }
}

/// Why a client is not served any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientEnd {
    /// It closed the connection.
    Left,
    /// The server was stopped.
    Stopped,
    /// The device is gone and [`OnGone::End`] was asked for.
    DeviceGone,
    /// It broke the protocol so that its stream cannot be followed.
    Misbehaved(&'static str),
    /// A map's file is not its guest's memory, and [`OnUnshared::Refuse`] was asked for.
    NotShared,
}

/// Why a server cannot go on.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The kernel does not let us wait or accept.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the kernel answered.
        source: io::Error,
    },
}

pub(super) fn host(what: &'static str) -> impl FnOnce(Errno) -> ServeError {
    move |errno| ServeError::Host { what, source: errno.into() }
}
