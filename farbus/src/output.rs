//! What the commands say: lines for people, or one JSON object a line, on standard output; the log on standard error.
//!
//! `events.say("listening", json!({"address": "shm:/tmp/link"}), "listening at shm:/tmp/link")` prints either, and flushes, because
//! whoever started us may be waiting for exactly this line.

use std::io::{ErrorKind, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use tracing_subscriber::EnvFilter;

/// Prints what happens, in one of two ways.
#[derive(Clone, Copy, Debug)]
pub struct Events {
    json: bool,
}

impl Events {
    /// For machines if `json`.
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// Says that `event` happened: `fields` (an object) for machines, `text` for people.
    pub fn say(self, event: &str, fields: Value, text: &str) {
        let line = if self.json {
            let mut object = json!({ "event": event });
            if let (Some(object), Value::Object(fields)) = (object.as_object_mut(), fields) {
                object.extend(fields);
            }
            object.to_string()
        } else {
            text.to_owned()
        };
        print_line(&line);
    }
}

/// Whether a line could not be written to somebody who would have read it.
static LOST: AtomicBool = AtomicBool::new(false);

/// A line on standard output. Where nobody reads it (`farbus devices | head -0`) it is lost, and that is no failure; a full disk is one
/// ([`was_lost`]).
pub fn print_line(line: &str) {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{line}").and_then(|()| out.flush()) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::BrokenPipe => tracing::debug!(%error, "nobody reads standard output"),
        Err(error) => {
            LOST.store(true, Ordering::Relaxed);
            tracing::error!(%error, "a line could not be written to standard output");
        }
    }
}

/// Whether what was printed did not arrive, so that the command has failed whatever else it did.
pub fn was_lost() -> bool {
    LOST.load(Ordering::Relaxed)
}

/// Starts the log on standard error; the environment variable RUST_LOG overrides `verbose`.
pub fn start_log(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}
