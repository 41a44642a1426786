//! Waiting for the signal that ends a command in order.
//!
//! `farbus lend` at a terminal ends at Ctrl-C, as a service at SIGTERM, and when its terminal goes away (SIGHUP) unless nohup(1) started it: each
//! fences the device before the process is gone.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals that end a command.
pub struct EndSignals {
    interrupt: Signal,
    terminate: Signal,
    /// `None` where it is ignored already.
    hangup: Option<Signal>,
}

impl EndSignals {
    /// From now on these signals no longer kill the process. Needs a tokio runtime.
    pub fn new() -> io::Result<Self> {
        let hangup = if hangup_is_ignored()? { None } else { Some(signal(SignalKind::hangup())?) };
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())?, hangup })
    }

    /// The name of the next one.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
            () = heard(&mut self.hangup) => "SIGHUP",
        }
    }
}

async fn heard(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}

/// Whether whoever started this wants it to outlive its terminal: nohup(1) says so by ignoring the signal.
fn hangup_is_ignored() -> io::Result<bool> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    // Bit n is signal n + 1 (proc(5)), and SIGHUP is 1.
    Ok(ignored.is_some_and(|mask| mask & 1 != 0))
}
