//! A folder with banks in it, and `farbus bank` as users run it there: what it prints for people and for machines, and what it refuses.
//!
//! `lab.ok(&["init", &lab.path("bank")])` is the object that `--json` prints; `lab.refused(&["list", &lab.path("nowhere")], &["farbus bank init"])` fails unless the
//! command ends with status 1 and says that.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use serde_json::Value;
use tempfile::TempDir;

use crate::process::{AMPLE, End, Running, run};

/// A folder, removed with the value.
pub struct BankLab(TempDir);

impl BankLab {
    /// One with an empty bank, `bank`.
    #[expect(clippy::new_without_default, reason = "it makes a folder and a bank")]
    pub fn new() -> Self {
        let lab = Self(tempfile::tempdir().unwrap());
        lab.ok(&["init", &lab.bank()]);
        lab
    }

    /// A path in it, as an argument.
    pub fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    /// The bank.
    pub fn bank(&self) -> String {
        self.path("bank")
    }

    /// Where the bank is served.
    pub fn link(&self) -> String {
        format!("shm:{}", self.path("link"))
    }

    /// A file in it.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// What a file in it has.
    #[track_caller]
    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    /// Runs `farbus bank` with `words`.
    pub fn run(words: &[&str]) -> End {
        run(&[&["bank"], words].concat())
    }

    /// What it prints for machines.
    #[track_caller]
    pub fn ok(&self, words: &[&str]) -> Value {
        let end = Self::run(&[words, &["--json"]].concat());
        assert_eq!(end.code(), Some(0), "{words:?}: {}", end.stderr);
        serde_json::from_str(&end.stdout).unwrap()
    }

    /// Fails unless it fails, and says so to people and to machines.
    #[track_caller]
    pub fn refused(&self, words: &[&str], said: &[&str]) {
        self.ends(1, words, said);
    }

    /// Fails unless it takes the arguments for nonsense, and says so to people and to machines.
    #[track_caller]
    pub fn misused(&self, words: &[&str], said: &[&str]) {
        self.ends(2, words, said);
    }

    #[track_caller]
    fn ends(&self, code: i32, words: &[&str], said: &[&str]) {
        Self::run(words).assert_refusal(code, said);
        let end = Self::run(&[words, &["--json"]].concat());
        assert_eq!(end.code(), Some(code), "{end:?}");
        let object: Value = serde_json::from_str(&end.stdout).unwrap();
        assert!(object["error"].is_string() && object["hint"].is_string(), "{object}");
    }

    /// Serves the bank at its link; returns when somebody can connect.
    pub fn serve(&self, options: &[&str]) -> Running {
        let (bank, link) = (self.bank(), self.link());
        let mut server = Running::farbus(&[&["bank", "serve", &bank, "--listen", &link, "--json"][..], options].concat());
        assert_eq!(server.event("serving", AMPLE)["address"], link);
        server
    }

    /// What is in a bank.
    #[track_caller]
    pub fn names(&self, bank: &str) -> Vec<String> {
        let listed = self.ok(&["list", bank]);
        listed["machines"].as_array().unwrap().iter().map(|machine| machine["machine"].as_str().unwrap().to_owned()).collect()
    }

    /// Fails unless everything in the bank is as it should be.
    #[track_caller]
    pub fn assert_whole(&self) {
        let verified = self.ok(&["verify", &self.bank()]);
        assert_eq!(verified["faults"], Value::Array(Vec::new()));
    }

    /// Withdraws a machine, and fails unless its memory is `expected`.
    #[track_caller]
    pub fn assert_out(&self, bank: &str, machine: &str, expected: &[u8]) -> Value {
        let said = self.ok(&["withdraw", bank, machine, "--to", &self.path("out"), "--replace"]);
        assert!(self.read("out/memory") == expected, "{machine} from {bank}");
        said
    }
}
