//! A guest under a stock QEMU that is saved, and resumed by another QEMU: what a bank keeps of a machine is right if the guest finds its memory as it was.
//!
//! `guest.say("fill 32")["sum"]` is what the guest's files hash to; after `save`, a withdrawal and `Guest::resume` the answer to "check" has the same sum.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::process::{AMPLE, Running, text};
use crate::program::repository;

/// What the guest may take for anything, on a busy machine without hardware virtualisation.
const PATIENCE: Duration = Duration::from_secs(120);
/// MiB of the guest's memory.
pub const MEMORY_MIB: u64 = 192;

/// Programs of the guest lab that tests are told by their environment.
#[derive(Clone, Debug)]
pub struct Lab {
    qemu: PathBuf,
    kernel: PathBuf,
    initramfs: PathBuf,
}

impl Lab {
    /// With the QEMU that `variable` names, and an initramfs in `folder`; `None`, and said, where the environment does not name one.
    ///
    /// # Panics
    /// Where the initramfs cannot be made.
    pub fn new(variable: &str, folder: &Path) -> Option<Self> {
        let named = |name: &str| std::env::var_os(name).filter(|path: &OsString| !path.is_empty()).map(PathBuf::from);
        let Some((qemu, kernel)) = named(variable).zip(named("FARBUS_KERNEL")) else {
            eprintln!(
                "not run: {variable} and FARBUS_KERNEL name no QEMU and no kernel; ci/guest/fetch and ci/bank/qemu have them"
            );
            return None;
        };
        let initramfs = folder.join("initramfs");
        let made = Command::new(repository().join("ci/bank/memory-initramfs")).arg(&initramfs).status();
        assert!(made.as_ref().is_ok_and(std::process::ExitStatus::success), "memory-initramfs: {made:?}");
        Some(Self { qemu, kernel, initramfs })
    }
}

/// How a machine is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Into one file, with the capability `mapped-ram`.
    MappedRam,
    /// Its memory is a shared file, and all else is saved beside it.
    SharedMemory,
}

/// The files of a machine.
#[derive(Clone, Debug)]
pub struct Files {
    /// Its memory, where that is a shared file.
    pub memory: PathBuf,
    /// What QEMU saves.
    pub state: PathBuf,
}

impl Files {
    /// In a folder, which is made.
    ///
    /// # Panics
    /// Where it cannot be.
    pub fn new(folder: PathBuf) -> Self {
        std::fs::create_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        Self { memory: folder.join("memory"), state: folder.join("state") }
    }

    /// Removes what is there of them.
    ///
    /// # Panics
    /// Where that is not allowed.
    pub fn remove(&self) {
        for file in [&self.memory, &self.state] {
            match std::fs::remove_file(file) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => panic!("{}: {error}", file.display()),
                _ => {}
            }
        }
    }
}

/// A guest that is up.
pub struct Guest {
    method: Method,
    files: Files,
    process: Running,
    console: BufReader<UnixStream>,
    monitor: BufReader<UnixStream>,
}

impl Guest {
    /// Boots one, whose memory is to lie in `files` if it is shared.
    ///
    /// # Panics
    /// Where it does not come up.
    pub fn boot(lab: &Lab, method: Method, files: &Files) -> Self {
        let mut guest = Self::start(lab, method, files, &[]);
        guest.hear("ready");
        guest
    }

    /// Resumes one that was saved to `files`, and says how long that took up to the guest's first instruction.
    ///
    /// # Panics
    /// Where it does not come up.
    pub fn resume(lab: &Lab, method: Method, files: &Files) -> (Self, Duration) {
        let begun = Instant::now();
        let mut guest = match method {
            Method::MappedRam => {
                let from = format!("file:{}", text(&files.state));
                Self::start(lab, method, files, &["-global", "migration.mapped-ram=on", "-incoming", &from])
            }
            // An old QEMU knows the capability in its monitor only.
            Method::SharedMemory => {
                let mut guest = Self::start(lab, method, files, &["-incoming", "defer"]);
                guest.set_capability();
                guest.ask("migrate-incoming", &json!({ "uri": format!("exec:cat {}", text(&files.state)) }));
                guest
            }
        };
        guest.until_migrated();
        guest.ask("cont", &json!({}));
        (guest, begun.elapsed())
    }

    fn start(lab: &Lab, method: Method, files: &Files, more: &[&str]) -> Self {
        let folder = files.state.parent().unwrap_or(Path::new("."));
        let (console, monitor) = (folder.join("console"), folder.join("monitor"));
        let socket = |path: &Path| format!("{},server=on,wait=off", text(path));
        let mut command = Command::new(&lab.qemu);
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-accel", "tcg", "-cpu", "qemu64"]);
        command.args(["-m", &MEMORY_MIB.to_string(), "-chardev", &format!("socket,id=console,path={}", socket(&console))]);
        command.args(["-serial", "chardev:console", "-qmp", &format!("unix:{}", socket(&monitor))]);
        match method {
            Method::MappedRam => command.args(["-machine", "q35"]),
            Method::SharedMemory => {
                let memory = format!("memory-backend-file,id=mem,size={MEMORY_MIB}M,mem-path={},share=on", text(&files.memory));
                command.args(["-machine", "q35,memory-backend=mem", "-object", &memory])
            }
        };
        command.arg("-kernel").arg(&lab.kernel).arg("-initrd").arg(&lab.initramfs);
        command.args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off"]).args(more);
        // The guest waits for its first word, so whoever connects now misses nothing but the firmware.
        let mut process = Running::start("qemu", &mut command);
        let console = connect(&console, &mut process);
        let monitor = connect(&monitor, &mut process);
        let mut guest = Self { method, files: files.clone(), process, console, monitor };
        guest.answer();
        guest.ask("qmp_capabilities", &json!({}));
        guest
    }

    /// Tells the guest something, and gives what it answers by name.
    ///
    /// # Panics
    /// Where it does not answer.
    pub fn say(&mut self, words: &str) -> BTreeMap<String, String> {
        let written = self.console.get_mut().write_all(format!("{words}\n").as_bytes());
        assert!(written.is_ok(), "the console is gone: {written:?}");
        let answer = self.hear("");
        answer.split(' ').filter_map(|word| word.split_once('=')).map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    /// Waits for a line that begins with `@` and `word`.
    fn hear(&mut self, word: &str) -> String {
        loop {
            let mut line = Vec::new();
            let read = self.console.read_until(b'\n', &mut line);
            assert!(read.as_ref().is_ok_and(|read| *read > 0), "the guest says nothing more: {read:?}, {}", self.process_story());
            let line = String::from_utf8_lossy(&line);
            if let Some(said) = line.trim().strip_prefix('@') {
                assert!(said.starts_with(word) && !said.starts_with("failed"), "the guest says {said}");
                return said.to_owned();
            }
        }
    }

    fn process_story(&mut self) -> String {
        format!("QEMU {}", if self.process.has_ended() { "has ended" } else { "runs" })
    }

    fn ask(&mut self, command: &str, arguments: &Value) -> Value {
        let request = json!({ "execute": command, "arguments": arguments });
        let written = self.monitor.get_mut().write_all(format!("{request}\n").as_bytes());
        assert!(written.is_ok(), "the monitor is gone: {written:?}");
        loop {
            let mut answer = self.answer();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if answer.get("return").is_some() {
                return answer["return"].take();
            }
        }
    }

    fn answer(&mut self) -> Value {
        let mut line = String::new();
        let read = self.monitor.read_line(&mut line);
        assert!(read.as_ref().is_ok_and(|read| *read > 0), "the monitor is gone: {read:?}");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
    }

    fn set_capability(&mut self) {
        let name = match self.method {
            Method::MappedRam => "mapped-ram",
            Method::SharedMemory => "x-ignore-shared",
        };
        let capability = json!([{ "capability": name, "state": true }]);
        self.ask("migrate-set-capabilities", &json!({ "capabilities": capability }));
    }

    fn until_migrated(&mut self) {
        let begun = Instant::now();
        loop {
            let answer = self.ask("query-migrate", &json!({}));
            match answer["status"].as_str() {
                Some("completed") => return,
                Some("failed") => panic!("{answer}"),
                _ => assert!(begun.elapsed() < PATIENCE, "{answer}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Stops the guest, saves it to its files, and ends.
    ///
    /// # Panics
    /// Where it cannot be saved.
    pub fn save(mut self) -> Duration {
        self.ask("stop", &json!({}));
        let begun = Instant::now();
        self.set_capability();
        let to = match self.method {
            Method::MappedRam => format!("file:{}", text(&self.files.state)),
            Method::SharedMemory => format!("exec:cat >{}", text(&self.files.state)),
        };
        self.ask("migrate", &json!({ "uri": to }));
        self.until_migrated();
        let took = begun.elapsed();
        self.ask("quit", &json!({}));
        let end = self.process.wait(AMPLE);
        assert!(end.status.success(), "{end:?}");
        took
    }
}

fn connect(path: &Path, process: &mut Running) -> BufReader<UnixStream> {
    let begun = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => {
                let set = stream.set_read_timeout(Some(PATIENCE));
                assert!(set.is_ok(), "{set:?}");
                return BufReader::new(stream);
            }
            Err(error) => {
                assert!(!process.has_ended() && begun.elapsed() < PATIENCE, "no QEMU at {}: {error}", path.display());
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}
