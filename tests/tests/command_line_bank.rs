//! `farbus bank` as its users run it: what it prints, what they can get wrong, and what it then tells them to do.
//!
//! `farbus bank withdraw bank vm8 --to out` where there is only `vm7` exits with status 1 and says that `farbus bank list bank` shows what is there.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use farbus_tests::bank_lab::BankLab;
use farbus_tests::process::{AMPLE, Running};
use serde_json::Value;

/// A bank with two deposits of `vm7`.
fn lab() -> BankLab {
    let lab = BankLab::new();
    let mut memory: Vec<u8> = (0..1_000_000_u32).flat_map(|n| (n / 700).to_le_bytes()).collect();
    lab.write("vm7.dev", "registers");
    for change in [None, Some(7)] {
        change.into_iter().for_each(|change| memory[8192..12_288].fill(change));
        lab.write("vm7.ram", &memory);
        deposit(&lab, &[]);
    }
    lab
}

#[track_caller]
fn deposit(lab: &BankLab, more: &[&str]) -> Value {
    let (bank, memory, devices) = (lab.bank(), lab.path("vm7.ram"), lab.path("vm7.dev"));
    lab.ok(&[&["deposit", &bank, "vm7", "--memory", &memory, "--device-state", &devices], more].concat())
}

#[test]
fn every_bank_command_explains_itself() {
    for command in [
        "init",
        "deposit",
        "withdraw",
        "serve",
        "serve-faults",
        "list",
        "show",
        "diff",
        "verify",
        "remove",
        "gc",
        "stats",
        "copy",
        "export",
        "import",
    ] {
        let help = BankLab::run(&[command, "--help"]);
        assert_eq!(help.code(), Some(0));
        assert!(help.stdout.contains("Usage: farbus bank") && help.stdout.contains("--json"), "{}", help.stdout);
    }
}

#[test]
fn a_machine_goes_in_twice_is_looked_at_and_comes_out() {
    let lab = lab();
    let bank = lab.path("bank");
    let listed = lab.ok(&["list", &bank]);
    let names: Vec<_> = listed["machines"].as_array().unwrap().iter().map(|machine| machine["machine"].clone()).collect();
    assert_eq!(names, ["vm7@1", "vm7@2"]);
    let shown = lab.ok(&["show", &bank, "vm7"]);
    assert_eq!((&shown["sections"][0]["name"], &shown["sections"][1]["kind"]), (&"memory".into(), &"device-state".into()));
    assert_eq!(shown["sections"][0]["new"], 1, "{shown}");
    let root = shown["root"].as_str().unwrap();
    assert_eq!(lab.ok(&["show", &bank, &root[..8]])["root"], shown["root"]);
    let differs = lab.ok(&["diff", &bank, "vm7@1", "vm7@2"]);
    assert_eq!(
        (&differs["sections"][0]["changed"], &differs["sections"][0]["ranges"][0]["offset_bytes"]),
        (&1.into(), &8192.into())
    );
    let stats = lab.ok(&["stats", &bank]);
    assert_eq!((&stats["deposits"], &stats["machines"]), (&2.into(), &1.into()));
    assert_eq!(lab.ok(&["verify", &bank])["faults"], Value::Array(vec![]));
    lab.ok(&["withdraw", &bank, "vm7", "--to", &lab.path("out")]);
    for (section, file) in [("memory", "vm7.ram"), ("devices", "vm7.dev")] {
        assert!(std::fs::read(lab.path(&format!("out/{section}"))).unwrap() == std::fs::read(lab.path(file)).unwrap(), "{section}");
    }
    let other = lab.path("other");
    lab.refused(&["copy", &bank, "vm7", &other], &[&format!("`farbus bank init {other}`")]);
    lab.ok(&["init", &lab.path("other")]);
    assert_eq!(lab.ok(&["copy", &bank, "vm7", &lab.path("other")])["root"], shown["root"]);
    for words in
        [&["list", &bank][..], &["show", &bank, "vm7"], &["diff", &bank, "vm7@1", "vm7@2"], &["stats", &bank], &["verify", &bank]]
    {
        let end = BankLab::run(words);
        assert!(
            end.code() == Some(0) && !end.stdout.trim().is_empty() && !end.stdout.starts_with('{'),
            "{words:?}: {}",
            end.stdout
        );
    }
}

#[test]
fn what_changed_can_be_told_and_only_that_is_read() {
    let lab = lab();
    std::fs::write(lab.path("none.bitmap"), [0; 128]).unwrap();
    let dirty = format!("memory={}", lab.path("none.bitmap"));
    let report = deposit(&lab, &["--dirty", &dirty, "--parent", "vm7"]);
    assert_eq!((&report["counts"]["new"], &report["pack_bytes"]), (&0.into(), &0.into()), "{report}");
    let (bank, memory) = (lab.path("bank"), lab.path("vm7.ram"));
    std::fs::write(lab.path("odd.bitmap"), [0; 7]).unwrap();
    let odd = format!("memory={}", lab.path("odd.bitmap"));
    lab.misused(&["deposit", &bank, "vm7", "--memory", &memory, "--parent", "vm7", "--dirty", &odd], &["no bitmap", "7 bytes"]);
    lab.refused(
        &["deposit", &bank, "new", "--memory", &memory, "--parent", "none", "--dirty", &dirty],
        &["there is none", "first deposit"],
    );
    lab.misused(&["deposit", &bank, "vm7", "--memory", &memory, "--dirty", &dirty], &["none is named", "--parent"]);
    lab.misused(&["deposit", &bank, "vm7", "--memory", &memory, "--dirty", "ram=x"], &["no section", "memory"]);
}

#[test]
fn what_has_expired_goes_and_its_pages_with_the_next_gc() {
    let lab = lab();
    let bank = lab.path("bank");
    let would = lab.ok(&["remove", &bank, "--keep-last", "1", "--dry-run"]);
    assert_eq!(would["would_remove"], serde_json::json!(["vm7@1"]));
    assert_eq!(lab.ok(&["remove", &bank, "--keep-last", "1"])["removed"], serde_json::json!(["vm7@1"]));
    lab.ok(&["gc", &bank, "--dry-run"]);
    assert_eq!(lab.ok(&["gc", &bank])["missing"], 0);
    assert_eq!(lab.ok(&["remove", &bank, "--keep-within", "1d"])["removed"], serde_json::json!([]));
    lab.ok(&["withdraw", &bank, "vm7@2", "--to", &lab.path("out")]);
    assert_eq!(lab.ok(&["verify", &bank])["faults"], Value::Array(vec![]));
}

#[test]
fn what_users_get_wrong_is_said_with_what_to_do() {
    let lab = lab();
    let (bank, memory, out) = (lab.path("bank"), lab.path("vm7.ram"), lab.path("out"));
    lab.refused(&["list", &lab.path("nowhere")], &["nowhere", "farbus bank init"]);
    lab.refused(&["init", &bank], &["there is a bank"]);
    lab.refused(&["init", &lab.path("")], &["is there", "empty"]);
    lab.refused(&["withdraw", &bank, "vm8", "--to", &out], &["vm8", "farbus bank list"]);
    lab.refused(&["withdraw", &bank, "vm7", "--section", "ram=x"], &["no section ram", "farbus bank show"]);
    lab.refused(&["withdraw", &bank, "vm7", "--section", &format!("memory={memory}")], &["is there", "--replace"]);
    lab.misused(&["deposit", &bank, "vm7"], &["nothing to deposit", "--memory FILE"]);
    lab.refused(&["deposit", &bank, "vm7", "--memory", &lab.path("none.ram")], &["none.ram", "can read"]);
    lab.misused(&["deposit", &bank, "../vm", "--memory", &memory], &["1 to 64 letters"]);
    lab.refused(&["deposit", &bank, "vm7", "--memory", &memory, "--parent", "vm9"], &["vm9", "none"]);
    lab.misused(&["show", &bank, "vm7", "--tenant-key", &memory], &["tenant key", "32"]);
    BankLab::run(&["withdraw", &bank, "vm7"]).assert_refusal(2, &["--to"]);
    BankLab::run(&["remove", &bank]).assert_refusal(2, &["MACHINE"]);
    BankLab::run(&["deposit", &bank, "vm7", "--memory", "a="]).assert_refusal(2, &["a file is missing"]);
}

#[test]
fn a_tenants_bank_opens_with_its_key_only() {
    let lab = lab();
    let (bank, key, other) = (lab.path("tenant"), lab.path("key"), lab.path("other-key"));
    std::fs::write(&key, [3; 32]).unwrap();
    std::fs::write(&other, format!("{}\n", "ab".repeat(32))).unwrap();
    lab.ok(&["init", &bank, "--tenant-key", &key]);
    lab.refused(&["list", &bank], &["tenant key", "--tenant-key FILE"]);
    lab.refused(&["list", &bank, "--tenant-key", &other], &["not made with this tenant key"]);
    lab.ok(&["deposit", &bank, "vm", "--memory", &lab.path("vm7.ram"), "--tenant-key", &key]);
    lab.refused(&["copy", &bank, "vm", &lab.path("bank"), "--tenant-key", &key], &["cannot open the bank"]);
}

#[test]
fn damage_is_found_named_and_not_withdrawn() {
    let lab = lab();
    let bank = lab.path("bank");
    let packs: Vec<_> = std::fs::read_dir(lab.path("bank/packs")).unwrap().map(|entry| entry.unwrap().path()).collect();
    let largest = packs.iter().max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let mut bytes = std::fs::read(largest).unwrap();
    bytes[1000] ^= 4;
    std::fs::write(largest, bytes).unwrap();
    let end = BankLab::run(&["verify", &bank]);
    assert_eq!(end.code(), Some(1));
    assert!(end.stdout.contains("pages are damaged") && end.stdout.contains("vm7@1: "), "{}", end.stdout);
    lab.refused(&["withdraw", &bank, "vm7", "--to", &lab.path("out")], &["damaged", "farbus bank verify"]);
    assert!(!std::fs::exists(lab.path("out/memory")).unwrap(), "a machine that is not whole has its name");
    // What was damaged is put aside, and the same deposit as before heals what it can.
    let end = BankLab::run(&["verify", &bank, "--repair"]);
    assert_eq!(end.code(), Some(1));
    assert!(end.stdout.contains("of 2 packs, 1 put aside") && end.stdout.contains("an import stores again"), "{}", end.stdout);
    deposit(&lab, &[]);
    let end = BankLab::run(&["verify", &bank]);
    assert_eq!(end.code(), Some(0), "{}", end.stdout);
    lab.ok(&["withdraw", &bank, "vm7@2", "--to", &lab.path("out")]);
    assert!(lab.ok(&["gc", &bank])["put_aside_bytes"].as_u64() > Some(0));
    assert_eq!(lab.ok(&["verify", &bank, "--repair"])["lost"], 0);
}

#[test]
fn a_withdrawal_that_was_interrupted_goes_on_and_touches_nothing_else() {
    let lab = lab();
    let (bank, out) = (lab.bank(), lab.path("out"));
    let again = ["withdraw", &bank, "vm7", "--to", &out];
    lab.ok(&again);
    lab.refused(&again, &["out/memory is there", "--replace"]);
    // As after a power cut between two names: one file has its own, of the other all but the end is there.
    let interrupt = || {
        let devices = lab.read("out/devices");
        std::fs::write(lab.path("out/devices.farbus-part"), &devices[..4]).unwrap();
        std::fs::remove_file(lab.path("out/devices")).unwrap();
    };
    interrupt();
    let report = lab.ok(&again);
    assert!(report["sections"][0]["there"].as_u64() > Some(900) && report["sections"][0]["fetched"] == 0, "{report}");
    assert!(lab.read("out/memory") == lab.read("vm7.ram") && lab.read("out/devices") == lab.read("vm7.dev"));
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 2, "a part is left");
    // A file of that name that is another one is the user's.
    interrupt();
    let mut mine = lab.read("vm7.ram");
    mine[5000] ^= 1;
    lab.write("out/memory", &mine);
    lab.refused(&again, &["out/memory is there", "--replace"]);
    assert!(lab.read("out/memory") == mine && !std::fs::exists(lab.path("out/devices")).unwrap());
    lab.write("out/memory", "short");
    lab.refused(&again, &["out/memory is there"]);
    assert_eq!(lab.read("out/memory"), b"short");
    lab.ok(&[&again[..], &["--replace"]].concat());
    assert!(lab.read("out/memory") == lab.read("vm7.ram"));
}

#[test]
fn a_withdrawal_that_is_killed_at_any_instant_goes_on_without_replace() {
    let lab = BankLab::new();
    let bank = lab.bank();
    let image =
        |factor: u32| -> Vec<u8> { (0..2_000_000_u32).flat_map(|n| (n / 600).wrapping_mul(factor).to_le_bytes()).collect() };
    let names = ["memory", "disk0", "disk1"];
    let files = [3, 5, 7].map(|factor| lab.write(&format!("image{factor}"), image(factor)));
    lab.ok(&["deposit", &bank, "vm7", "--memory", &files[0], "--disk", &files[1], "--disk", &files[2]]);
    let is_there = |name: &str| std::fs::exists(lab.path(name)).unwrap();
    let (mut unfinished, mut whole) = (0, 0);
    for at in 0..16 {
        let out = format!("out{at}");
        let folder = lab.path(&out);
        let client = Running::farbus(&["bank", "withdraw", &bank, "vm7", "--to", &folder]);
        std::thread::sleep(Duration::from_millis(2 + at * at));
        client.kill();
        client.wait(AMPLE);
        let finished = names.iter().filter(|name| is_there(&format!("{out}/{name}"))).count();
        whole += usize::from(finished == names.len());
        if finished < names.len() {
            unfinished += usize::from(names.iter().any(|name| is_there(&format!("{out}/{name}.farbus-part"))));
            lab.ok(&["withdraw", &bank, "vm7", "--to", &folder]);
        }
        for (name, file) in names.iter().zip(&files) {
            assert!(lab.read(&format!("{out}/{name}")) == std::fs::read(file).unwrap(), "{name}, killed at instant {at}");
        }
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), names.len(), "a part is left");
    }
    println!("{unfinished} had begun to write, {whole} were done");
    assert!(unfinished > 0, "all were killed too early or too late: {whole} were done");
}

#[test]
fn no_file_of_a_withdrawal_has_its_name_before_all_are_whole() {
    let lab = lab();
    let (bank, out) = (lab.bank(), lab.path("out"));
    // The second section cannot be written.
    std::fs::create_dir_all(lab.path("out/devices.farbus-part")).unwrap();
    lab.refused(&["withdraw", &bank, "vm7", "--to", &out], &["devices.farbus-part", "choose a place"]);
    assert!(!std::fs::exists(lab.path("out/memory")).unwrap() && std::fs::exists(lab.path("out/memory.farbus-part")).unwrap());
    std::fs::remove_dir(lab.path("out/devices.farbus-part")).unwrap();
    let report = lab.ok(&["withdraw", &bank, "vm7", "--to", &out]);
    assert!(report["sections"][0]["there"].as_u64() > Some(900), "{report}");
}

#[test]
fn a_bank_that_cannot_be_written_is_read_all_the_same() {
    let lab = lab();
    let bank = lab.path("bank");
    let folders: Vec<_> = ["", "packs", "manifests", "index", "tmp", "locks", "config"]
        .iter()
        .map(|name| lab.path(&format!("bank/{name}")))
        .collect();
    let mode =
        |mode| folders.iter().for_each(|folder| std::fs::set_permissions(folder, std::fs::Permissions::from_mode(mode)).unwrap());
    mode(0o555);
    let writable = std::fs::write(lab.path("bank/tmp/x"), "").is_ok();
    let (withdrawn, deposited) = (
        BankLab::run(&["withdraw", &bank, "vm7", "--to", &lab.path("out")]),
        BankLab::run(&["deposit", &bank, "vm7", "--memory", &lab.path("vm7.ram")]),
    );
    mode(0o755);
    assert_eq!(withdrawn.code(), Some(0), "{}", withdrawn.stderr);
    if writable {
        eprintln!("not run: this user may write what is not writable");
    } else {
        deposited.assert_refusal(1, &["cannot be written", "not mounted read-only"]);
    }
}
