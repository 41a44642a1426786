//! How a session's thread passes the time in which there is nothing to do.
//!
//! `PollOptions { spin: Duration::from_micros(50) }` looks for 50 us, then sleeps until the link or the device has something.

use std::time::Duration;

/// How a session polls.
#[derive(Clone, Copy, Debug)]
pub struct PollOptions {
    /// How long to poll without work before sleeping; 2 us at most while more sessions of this process are awake than there are cores, unless this is
    /// [`Duration::MAX`].
    pub spin: Duration,
}

impl Default for PollOptions {
    fn default() -> Self {
        Self { spin: Duration::from_micros(50) }
    }
}
