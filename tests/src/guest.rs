//! The guest lab from Rust: an image of real files, a booted guest whose verdicts are parsed, and the judge of the image afterwards.
//!
//! `boot.wait()` of a guest that ran `full` gives `passed("checksums")["files"] == "1500"`; one that hung is a failure with all it printed.
//! Guests are slow and the machine is small, so one boots at a time, over all processes of a test run.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

use crate::process::{AMPLE, End, Running, text};
use crate::program::repository;

/// What the preparation of QEMU, the kernel and an image may take, with a network that is slow.
const PREPARATION: Duration = Duration::from_secs(900);
/// What a boot may take inside QEMU; everything it does takes a minute.
const BOOT_SECONDS: u64 = 240;

/// Held while a guest is up. The lock is the file's, so it goes with the process however that ends.
#[derive(Debug)]
pub struct Turn(#[expect(dead_code, reason = "held, not used")] File);

/// Waits until no other test of this user boots a guest.
///
/// # Panics
/// Where the lock file cannot be used.
pub fn turn() -> Turn {
    let path = std::env::temp_dir().join(format!("farbus-guest-{}.lock", rustix::process::geteuid().as_raw()));
    let file = File::create(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    flock(&file, FlockOperation::LockExclusive).unwrap_or_else(|errno| panic!("{}: {errno}", path.display()));
    Turn(file)
}

fn lab(program: &str) -> Command {
    Command::new(repository().join("ci/guest").join(program))
}

/// An image with at least 1,000 real files.
#[derive(Debug)]
pub struct Image {
    /// Where it is.
    pub path: PathBuf,
    /// The folder that its files came from.
    source: String,
}

impl Image {
    /// Packs one of 256 MiB at `path`.
    ///
    /// # Panics
    /// Where that fails.
    pub fn pack(path: PathBuf) -> Self {
        let end = Running::start("mkimage", lab("mkimage").args([text(&path), "-", "256M"])).wait(PREPARATION);
        assert!(end.status.success(), "{end:?}");
        Self { path, source: end.stdout.trim().to_owned() }
    }

    /// Fails unless the file system is clean and every byte is what it should be; `written`: the guest ran `full`.
    ///
    /// # Panics
    /// If not.
    #[track_caller]
    pub fn judge(&self, written: bool) {
        let mut judge = lab("check-image");
        if !written {
            judge.arg("--unwritten");
        }
        let end = Running::start("check-image", judge.arg(&self.path).arg(&self.source)).wait(PREPARATION);
        assert!(end.status.success(), "{end:?}");
    }

    /// The device as `farbus lend` takes it.
    pub fn device(&self) -> String {
        format!("nvme:{}", self.path.display())
    }
}

/// What a guest is booted with.
#[derive(Clone, Debug)]
pub struct Boot<'a> {
    /// The vfio-user socket.
    pub socket: &'a Path,
    /// `full`, `lender-dies` or `smoke`.
    pub scenario: &'a str,
    /// Whether the guest's memory is shared with the server.
    pub share: bool,
    /// A text on the console and the command it triggers.
    pub when: Option<(&'a str, String)>,
}

impl Boot<'_> {
    /// Starts QEMU.
    ///
    /// # Panics
    /// Where it does not start.
    pub fn start(&self) -> Guest {
        let mut boot = lab("boot");
        boot.args(["--vfio-user", text(self.socket), "--scenario", self.scenario]);
        boot.args(["--share", if self.share { "on" } else { "off" }, "--timeout", &BOOT_SECONDS.to_string()]);
        if let Some((line, command)) = &self.when {
            boot.args(["--when", line, command]);
        }
        Guest { qemu: Running::start(&format!("guest {}", self.scenario), &mut boot) }
    }

    /// Boots and waits for the end.
    ///
    /// # Panics
    /// As [`Guest::wait`].
    #[track_caller]
    pub fn run(&self) -> Verdict {
        self.start().wait()
    }
}

/// A guest that is up.
pub struct Guest {
    qemu: Running,
}

impl Guest {
    /// Waits for its power-off.
    ///
    /// # Panics
    /// Where QEMU outlives its own limit.
    #[track_caller]
    pub fn wait(self) -> Verdict {
        let limit = PREPARATION + Duration::from_secs(BOOT_SECONDS) + AMPLE;
        Verdict { end: self.qemu.wait(limit) }
    }
}

/// What a guest said and how QEMU ended.
#[derive(Debug)]
pub struct Verdict {
    /// The end of `boot`: 0 where the guest said "done ok" and powered off, 1 where it did not, 124 at the time limit.
    pub end: End,
}

impl Verdict {
    /// Fails unless the guest said "done ok" and powered off.
    ///
    /// # Panics
    /// If not.
    #[track_caller]
    pub fn assert_ok(&self) {
        assert!(self.end.status.success(), "{}\n{}", self.end.stdout, self.end.stderr);
    }

    /// The values of a check that held.
    ///
    /// # Panics
    /// Where it did not, or was not made.
    #[track_caller]
    pub fn passed(&self, check: &str) -> BTreeMap<String, String> {
        let start = format!("farbus-guest: pass {check} ");
        let line = self.end.stdout.lines().find_map(|line| line.split_once(&start).map(|(_, rest)| rest));
        let Some(line) = line else { panic!("the guest never passed {check}:\n{}", self.end.stdout) };
        line.split_whitespace().filter_map(|word| word.split_once('=')).map(|(key, value)| (key.into(), value.into())).collect()
    }

    /// One value of a check as a number.
    ///
    /// # Panics
    /// Where there is none.
    #[track_caller]
    pub fn number(&self, check: &str, key: &str) -> u64 {
        let values = self.passed(check);
        match values.get(key).map(|value| value.parse()) {
            Some(Ok(number)) => number,
            _ => panic!("{check} has no number {key}: {values:?}"),
        }
    }
}
