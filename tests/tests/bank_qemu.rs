//! Machines of a stock QEMU in a bank: saved, deposited, the files removed, withdrawn to others, resumed, and asked by the guest itself whether its memory is
//! what it was; and the same again after more work.
//!
//! `FARBUS_QEMU`, `FARBUS_QEMU_OLD` (QEMU 7.2) and `FARBUS_KERNEL` name the programs (`ci/guest/fetch`, `ci/bank/qemu`); `ci/run qemu` runs it with both.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use farbus_tests::guest::turn;
use farbus_tests::process::{run, text};
use farbus_tests::qemu::{Files, Guest, Lab, Method};
use serde_json::Value;

fn hash(path: &Path) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    std::io::copy(&mut File::open(path).unwrap(), &mut hasher).unwrap();
    hasher.finalize()
}

fn farbus(words: &[&str]) -> Value {
    let end = run(&[&["bank"], words, &["--json"]].concat());
    assert_eq!(end.code(), Some(0), "{words:?}: {}", end.stderr);
    serde_json::from_str(&end.stdout).unwrap()
}

struct Bank {
    path: PathBuf,
    method: Method,
}

impl Bank {
    fn new(path: PathBuf, method: Method) -> Self {
        farbus(&["init", text(&path)]);
        Self { path, method }
    }

    fn deposit(&self, files: &Files) {
        let begun = Instant::now();
        let words = ["deposit", text(&self.path), "vm7"];
        let report = match self.method {
            Method::MappedRam => farbus(&[&words[..], &["--qemu", text(&files.state)]].concat()),
            Method::SharedMemory => {
                farbus(&[&words[..], &["--memory", text(&files.memory), "--device-state", text(&files.state)]].concat())
            }
        };
        eprintln!("{}: {:.2?}, {} bytes added, {}", report["machine"], begun.elapsed(), report["pack_bytes"], report["counts"]);
    }

    fn withdraw(&self, machine: &str, files: &Files) {
        let begun = Instant::now();
        let words = ["withdraw", text(&self.path), machine];
        let section = |name: &str, file: &Path| format!("{name}={}", file.display());
        let (memory, devices) = (section("memory", &files.memory), section("devices", &files.state));
        match self.method {
            Method::MappedRam => farbus(&[&words[..], &["--qemu", text(&files.state)]].concat()),
            Method::SharedMemory => farbus(&[&words[..], &["--section", &memory, "--section", &devices]].concat()),
        };
        eprintln!("{machine} withdrawn in {:.2?}", begun.elapsed());
    }
}

fn number(text: &str) -> f64 {
    text.parse().unwrap()
}

fn saved_twice_and_resumed_from_the_bank(qemu: &str, method: Method) {
    let folder = tempfile::tempdir().unwrap();
    let Some(lab) = Lab::new(qemu, folder.path()) else { return };
    let _turn = turn();
    let files = |name: &str| Files::new(folder.path().join(name));
    let bank = Bank::new(folder.path().join("bank"), method);

    let first = files("first");
    let mut guest = Guest::boot(&lab, method, &first);
    let filled = guest.say("fill 32");
    eprintln!("saved in {:.2?}", guest.save());
    let hashes = |files: &Files| (hash(&files.state), first.memory.exists().then(|| hash(&files.memory)));
    let before = hashes(&first);
    bank.deposit(&first);
    let second = files("second");
    first.remove();
    bank.withdraw("vm7", &second);
    let after = (hash(&second.state), second.memory.exists().then(|| hash(&second.memory)));
    assert_eq!(before, after, "the files are not what they were");

    let (mut guest, took) = Guest::resume(&lab, method, &second);
    let checked = guest.say("check");
    eprintln!("resumed in {took:.2?}");
    assert_eq!((&checked["sum"], &checked["files"]), (&filled["sum"], &filled["files"]), "the guest's memory is not what it was");
    // It went on where it was, and did not boot.
    let went_on = |earlier: &std::collections::BTreeMap<String, String>, later: &std::collections::BTreeMap<String, String>| {
        number(&later["ticks"]) >= number(&earlier["ticks"]) && number(&later["up"]) >= number(&earlier["up"])
    };
    assert!(went_on(&filled, &checked), "{filled:?} and then {checked:?}");
    let worked = guest.say("work");
    assert_ne!(worked["sum"], filled["sum"]);
    guest.save();
    bank.deposit(&second);
    second.remove();

    let third = files("third");
    bank.withdraw("vm7@2", &third);
    let (mut guest, _) = Guest::resume(&lab, method, &third);
    let checked = guest.say("check");
    assert_eq!(checked["sum"], worked["sum"], "the guest's memory is not what it was after more work");
    assert!(went_on(&worked, &checked), "{worked:?} and then {checked:?}");
    drop(guest);

    // The first is there as it was, whatever came after it.
    let fourth = files("fourth");
    bank.withdraw("vm7@1", &fourth);
    let (mut guest, _) = Guest::resume(&lab, method, &fourth);
    assert_eq!(guest.say("check")["sum"], filled["sum"], "the first machine is not what it was");
    let verified = farbus(&["verify", text(&bank.path)]);
    assert_eq!(verified["faults"], serde_json::json!([]));
}

#[test]
#[ignore = "it needs QEMU and a kernel: the qemu step of ci/run has them"]
fn a_mapped_ram_file_from_the_bank_is_resumed_by_qemu_and_the_guest_finds_its_memory() {
    saved_twice_and_resumed_from_the_bank("FARBUS_QEMU", Method::MappedRam);
}

#[test]
#[ignore = "it needs QEMU and a kernel: the qemu step of ci/run has them"]
fn shared_memory_from_the_bank_is_resumed_by_qemu_and_the_guest_finds_its_memory() {
    saved_twice_and_resumed_from_the_bank("FARBUS_QEMU", Method::SharedMemory);
}

#[test]
#[ignore = "it needs QEMU 7.2 and a kernel: the qemu step of ci/run has them"]
fn shared_memory_from_the_bank_is_resumed_by_qemu_7_2_and_the_guest_finds_its_memory() {
    saved_twice_and_resumed_from_the_bank("FARBUS_QEMU_OLD", Method::SharedMemory);
}
