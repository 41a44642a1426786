//! A child process with limits: its lines as they come, its end, and no way to outlive the test.
//!
//! `lender.event("lent", AMPLE)` waits for `{"event":"lent"}` on the child's standard output and fails with everything that the child said
//! when the line has not come within the limit. A dropped child gets SIGTERM, and SIGKILL five seconds later.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::program::farbus;

/// Enough for anything that a healthy program does at once, on a machine that is busy with other tests.
pub const AMPLE: Duration = Duration::from_secs(30);
/// What a child may take to end in order before it is killed.
const GRACE: Duration = Duration::from_secs(5);

/// How a child ended.
#[derive(Clone, Debug)]
pub struct End {
    /// Its status.
    pub status: ExitStatus,
    /// All of its standard output.
    pub stdout: String,
    /// All of its standard error.
    pub stderr: String,
}

impl End {
    /// The exit code; `None` after a signal.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// The signal that ended it.
    pub fn signal(&self) -> Option<i32> {
        self.status.signal()
    }

    /// Fails unless the program refused as programs should: exit status `code`, each of `words` on standard error, and no panic.
    ///
    /// # Panics
    /// If not.
    #[track_caller]
    pub fn assert_refusal(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code(), Some(code), "{self:?}");
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} is not said: {self:?}");
        }
        self.assert_no_panic();
    }

    /// Fails if the program panicked anywhere, also where it went on afterwards.
    ///
    /// # Panics
    /// If so.
    #[track_caller]
    pub fn assert_no_panic(&self) {
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
    }
}

/// Text that grows while somebody waits for it.
#[derive(Default)]
struct Said {
    stdout: Vec<String>,
    stderr: Vec<String>,
    /// Streams that ended, of two.
    ended: usize,
}

#[derive(Default)]
struct Transcript {
    said: Mutex<Said>,
    more: Condvar,
}

impl Transcript {
    fn lock(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn follow(self: &Arc<Self>, stream: impl Read + Send + 'static, pick: fn(&mut Said) -> &mut Vec<String>) -> JoinHandle<()> {
        let transcript = Arc::clone(self);
        std::thread::spawn(move || {
            for line in BufReader::new(stream).split(b'\n') {
                let Ok(line) = line else { break };
                pick(&mut transcript.lock()).push(String::from_utf8_lossy(&line).into_owned());
                transcript.more.notify_all();
            }
            transcript.lock().ended += 1;
            transcript.more.notify_all();
        })
    }
}

/// A child process that is running, or has ended unseen.
pub struct Running {
    name: String,
    child: Child,
    transcript: Arc<Transcript>,
    streams: Vec<JoinHandle<()>>,
    /// Lines of standard output that were waited for already.
    seen: usize,
    started: Instant,
}

impl Running {
    /// Starts `farbus` with `args`.
    ///
    /// # Panics
    /// Where it cannot be started.
    pub fn farbus(args: &[&str]) -> Self {
        let mut command = Command::new(farbus());
        command.args(args).env_remove("RUST_LOG");
        Self::start(&args.join(" "), &mut command)
    }

    /// Starts any program; `name` is how failures call it.
    ///
    /// # Panics
    /// Where it cannot be started.
    pub fn start(name: &str, command: &mut Command) -> Self {
        Self::start_reading(name, command, Stdio::null())
    }

    /// As [`Running::start`], with something on its standard input.
    ///
    /// # Panics
    /// Where it cannot be started.
    pub fn start_reading(name: &str, command: &mut Command, input: Stdio) -> Self {
        let spawned = command.stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.unwrap_or_else(|error| panic!("{name} does not start: {error}"));
        let transcript = Arc::new(Transcript::default());
        let mut streams = Vec::new();
        streams.extend(child.stdout.take().map(|stream| transcript.follow(stream, |said| &mut said.stdout)));
        streams.extend(child.stderr.take().map(|stream| transcript.follow(stream, |said| &mut said.stderr)));
        Self { name: name.to_owned(), child, transcript, streams, seen: 0, started: Instant::now() }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How long it has been running.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// Waits for a line of standard output for which `wanted` gives something, after the lines that were waited for before.
    ///
    /// # Panics
    /// At the limit, and where the output ends first.
    #[track_caller]
    pub fn line<T>(&mut self, what: &str, limit: Duration, mut wanted: impl FnMut(&str) -> Option<T>) -> T {
        let deadline = Instant::now() + limit;
        let transcript = Arc::clone(&self.transcript);
        let mut said = transcript.lock();
        loop {
            while let Some(line) = said.stdout.get(self.seen) {
                self.seen += 1;
                if let Some(found) = wanted(line) {
                    return found;
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero() && said.ended < 2, "{}: no {what} within {limit:?}; {}", self.name, story(&said));
            said = transcript.more.wait_timeout(said, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for the JSON line of `event`.
    ///
    /// # Panics
    /// As [`Running::line`].
    #[track_caller]
    pub fn event(&mut self, event: &str, limit: Duration) -> Value {
        self.line(event, limit, |line| {
            let value: Value = serde_json::from_str(line).ok()?;
            (value.get("event")?.as_str()? == event).then_some(value)
        })
    }

    /// Waits until standard error contains `text`.
    ///
    /// # Panics
    /// At the limit, and where it ends first.
    #[track_caller]
    pub fn complaint(&self, text: &str, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut said = self.transcript.lock();
        while !said.stderr.iter().any(|line| line.contains(text)) {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero() && said.ended < 2, "{}: no {text:?} within {limit:?}; {}", self.name, story(&said));
            said = self.transcript.more.wait_timeout(said, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Sends a signal.
    ///
    /// # Panics
    /// Where that fails.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            // Not waited for yet, so the id is still its own.
            kill_process(pid, signal).unwrap_or_else(|errno| panic!("{}: {errno}", self.name));
        }
    }

    /// Kills it as the kernel does when memory runs out.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
    }

    /// Asks it to end.
    pub fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// Whether it has ended.
    ///
    /// # Panics
    /// Where the kernel does not say.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap_or_else(|error| panic!("{}: {error}", self.name)).is_some()
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// At the limit.
    #[track_caller]
    pub fn wait(mut self, limit: Duration) -> End {
        let deadline = Instant::now() + limit;
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                Ok(None) => panic!("{} did not end within {limit:?}; {}", self.name, story(&self.transcript.lock())),
                Err(error) => panic!("{}: {error}", self.name),
            }
        };
        for stream in std::mem::take(&mut self.streams) {
            // A reader does nothing that could fail.
            drop(stream.join());
        }
        let said = self.transcript.lock();
        End { status, stdout: said.stdout.join("\n"), stderr: said.stderr.join("\n") }
    }
}

fn story(said: &Said) -> String {
    format!("stdout:\n{}\nstderr:\n{}", said.stdout.join("\n"), said.stderr.join("\n"))
}

impl Drop for Running {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        self.terminate();
        let deadline = Instant::now() + GRACE;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                self.kill();
                drop(self.child.wait());
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Runs `farbus` with `args` to its end.
///
/// # Panics
/// Where it does not end within [`AMPLE`].
#[track_caller]
pub fn run(args: &[&str]) -> End {
    Running::farbus(args).wait(AMPLE)
}

/// `path` as an argument.
///
/// # Panics
/// Where it is no UTF-8.
pub fn text(path: &Path) -> &str {
    match path.to_str() {
        Some(text) => text,
        None => panic!("{} is no text", path.display()),
    }
}
