//! `farbus bank` killed at any instant of a deposit, a withdrawal and a sweep: the bank verifies clean, earlier machines are intact, the work resumes.
//!
//! FARBUS_KILLS instants (40), drawn from one seed, which FARBUS_SEED replaces: after `kill -9` at 13.2 ms of a deposit of `vm`, `farbus bank verify` finds
//! nothing, `vm@4` comes out byte by byte, and the same deposit succeeds.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use farbus_tests::farbus;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

const PAGE: usize = 4096;
/// 24 MiB: a deposit of some 40 ms in more than one pack, and more than one leaf.
const PAGES: usize = 6144;
/// Deposits that a bank keeps, so that it does not grow.
const KEPT: usize = 4;

struct Lab {
    folder: tempfile::TempDir,
    random: SmallRng,
    memory: Vec<u8>,
    /// What was deposited, by number, as long as it is kept.
    kept: Vec<(u64, Vec<u8>)>,
    /// Kills that came before the process had ended.
    in_time: [usize; 3],
}

impl Lab {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(farbus());
        command.arg("bank").args(words).current_dir(self.folder.path()).stdin(Stdio::null());
        command
    }

    #[track_caller]
    fn done(&self, words: &[&str]) -> Value {
        let output = self.command(words).arg("--json").output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Starts a command and kills it after `after`; says whether it was still running.
    fn kill(&self, words: &[&str], after: Duration) -> bool {
        let mut child = self.command(words).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(after);
        child.kill().unwrap();
        let end = child.wait_with_output().unwrap();
        let killed = std::os::unix::process::ExitStatusExt::signal(&end.status) == Some(9);
        assert!(killed || end.status.success(), "{words:?}: {}", String::from_utf8_lossy(&end.stderr));
        killed
    }

    /// Writes to a third of the machine's pages, as a guest that works does, and leaves the image in `vm.ram`.
    fn work(&mut self) {
        for _ in 0..PAGES / 3 {
            let page = self.random.random_range(0..PAGES);
            let bytes = &mut self.memory[page * PAGE..(page + 1) * PAGE];
            match self.random.random_range(0..4) {
                0 => bytes.fill(0),
                1 => bytes.fill(self.random.random()),
                _ => self.random.fill(bytes),
            }
        }
        std::fs::write(self.path("vm.ram"), &self.memory).unwrap();
    }

    #[track_caller]
    fn deposit(&mut self) {
        let report = self.done(&["deposit", "bank", "vm", "--memory", "vm.ram"]);
        let number = number(&report["machine"]);
        self.kept.push((number, self.memory.clone()));
    }

    /// Everything that was deposited is there, and the bank is clean.
    #[track_caller]
    fn is_intact(&mut self) {
        assert_eq!(self.done(&["verify", "bank"])["faults"], Value::Array(vec![]));
        let there: Vec<u64> = self.done(&["list", "bank"])["machines"]
            .as_array()
            .unwrap()
            .iter()
            .map(|machine| number(&machine["machine"]))
            .collect();
        assert!(self.kept.iter().all(|(number, _)| there.contains(number)), "there are {there:?}");
        let at = self.random.random_range(0..self.kept.len());
        self.withdraw(at, "earlier");
    }

    #[track_caller]
    fn withdraw(&self, at: usize, file: &str) {
        let (number, memory) = &self.kept[at];
        self.done(&["withdraw", "bank", &format!("vm@{number}"), "--section", &format!("memory={file}"), "--replace"]);
        assert!(std::fs::read(self.path(file)).unwrap() == *memory, "vm@{number} is not what was deposited");
    }
}

fn number(machine: &Value) -> u64 {
    machine.as_str().and_then(|name| name.split_once('@')).unwrap().1.parse().unwrap()
}

fn setting(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().filter(|text| !text.is_empty()).map_or(otherwise, |text| text.parse().unwrap())
}

/// What a command takes when nobody kills it.
fn time(run: impl FnOnce()) -> Duration {
    let start = Instant::now();
    run();
    start.elapsed()
}

#[test]
fn a_bank_survives_being_killed_at_any_instant() {
    let seed = setting("FARBUS_SEED", 20_261_127);
    let kills = setting("FARBUS_KILLS", 40);
    eprintln!("FARBUS_SEED={seed} FARBUS_KILLS={kills}");
    let folder = tempfile::tempdir().unwrap();
    let mut lab =
        Lab { folder, random: SmallRng::seed_from_u64(seed), memory: vec![0; PAGES * PAGE], kept: Vec::new(), in_time: [0; 3] };
    lab.done(&["init", "bank"]);
    lab.work();
    lab.deposit();
    lab.work();
    let [deposit, withdraw, sweep] = [
        time(|| lab.deposit()),
        time(|| lab.withdraw(0, "earlier")),
        time(|| _ = lab.done(&["gc", "bank"])).max(Duration::from_millis(8)),
    ];
    for kill in 0..kills {
        let what = (kill % 3) as usize;
        let part = lab.random.random_range(0.05..1.0);
        lab.in_time[what] += usize::from(match what {
            0 => {
                lab.work();
                let killed = lab.kill(&["deposit", "bank", "vm", "--memory", "vm.ram"], deposit.mul_f64(part));
                lab.is_intact();
                lab.deposit();
                killed
            }
            1 => {
                let at = lab.random.random_range(0..lab.kept.len());
                let (number, _) = lab.kept[at];
                let words = ["withdraw", "bank", &format!("vm@{number}"), "--section", "memory=out", "--replace"];
                let killed = lab.kill(&words, withdraw.mul_f64(part));
                lab.is_intact();
                lab.withdraw(at, "out");
                killed
            }
            _ => {
                while lab.kept.len() > KEPT {
                    let at = lab.random.random_range(0..lab.kept.len());
                    let (number, _) = lab.kept.remove(at);
                    lab.done(&["remove", "bank", &format!("vm@{number}")]);
                }
                let killed = lab.kill(&["gc", "bank", "--repack-below", "95"], sweep.mul_f64(part * 2.0));
                lab.is_intact();
                let swept = lab.done(&["gc", "bank", "--repack-below", "95"]);
                assert_eq!(swept["missing"], 0);
                lab.is_intact();
                killed
            }
        });
    }
    assert_eq!(left_behind(&lab.path("bank/tmp")), 0, "half-written files stay");
    for at in 0..lab.kept.len() {
        lab.withdraw(at, "last");
    }
    eprintln!("killed in time: {:?} of {kills}", lab.in_time);
    let enough = kills as usize / 12;
    assert!(lab.in_time.iter().all(|in_time| *in_time >= enough), "too few were killed in time to say anything: {:?}", lab.in_time);
}

/// After a last sweep there is nothing of those that were killed.
fn left_behind(folder: &Path) -> usize {
    let bank = folder.parent().unwrap();
    let swept = Command::new(farbus()).args(["bank", "gc"]).arg(bank).output().unwrap();
    assert!(swept.status.success(), "{}", String::from_utf8_lossy(&swept.stderr));
    std::fs::read_dir(folder).unwrap().count()
}
