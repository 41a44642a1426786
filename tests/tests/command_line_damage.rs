//! A manifest that is damaged, as users meet it: everything else goes on, each command names it, and what the commands say leads out.
//!
//! One byte of `vm7@2` of three deposits: `farbus bank list bank` shows `vm7@1`, `vm7@2` as damaged and `vm7@3` as resting on it, and ends with status 1 and the commands
//! to type next.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use farbus_tests::bank_lab::BankLab;
use farbus_tests::process::{End, run};
use serde_json::Value;

/// `vm7` three times, and `db`; in another bank the same.
fn lab() -> (BankLab, Vec<Vec<u8>>) {
    let lab = BankLab::new();
    let (bank, other) = (lab.bank(), lab.path("other"));
    let mut memory: Vec<u8> = (0..1_000_000_u32).flat_map(|n| (n / 700).wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let mut kept = Vec::new();
    lab.ok(&["init", &other]);
    for change in 0..3 {
        memory[8192..20_480].fill(change);
        let ram = lab.write("ram", &memory);
        lab.ok(&["deposit", &bank, "vm7", "--memory", &ram]);
        lab.ok(&["copy", &bank, "vm7", &other]);
        kept.push(memory.clone());
    }
    lab.ok(&["deposit", &bank, "db", "--memory", &lab.path("ram")]);
    (lab, kept)
}

/// Flips a bit of the manifest of a deposit.
fn damage(lab: &BankLab, deposit: &str, place: fn(usize) -> usize) {
    let folder = std::fs::read_dir(lab.path("bank/manifests")).unwrap().map(|entry| entry.unwrap().path());
    let path = folder.into_iter().find(|path| path.file_name().unwrap().to_str().unwrap().starts_with(deposit)).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let at = place(bytes.len());
    bytes[at] ^= 4;
    std::fs::write(path, bytes).unwrap();
}

fn middle(len: usize) -> usize {
    len / 2
}

/// The commands that a text gives between backquotes, with what stands for something filled in.
fn commands(text: &str, fill: &[(&str, &str)]) -> Vec<Vec<String>> {
    let quoted = text.split('`').skip(1).step_by(2).filter(|command| command.starts_with("farbus "));
    let filled = |word: &str| fill.iter().find(|(name, _)| *name == word).map_or(word.to_owned(), |(_, with)| (*with).to_owned());
    quoted.map(|command| command.split_whitespace().skip(1).map(filled).collect()).collect()
}

fn run_words(words: &[String]) -> End {
    run(&words.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn everything_else_goes_on_and_each_command_names_what_is_damaged() {
    let (lab, kept) = lab();
    let bank = lab.bank();
    damage(&lab, "vm7@00000002", middle);
    for words in [&["list", &bank][..], &["stats", &bank], &["verify", &bank], &["gc", &bank], &["show", &bank, "vm7@2"]] {
        let end = BankLab::run(words);
        end.assert_refusal(1, &["vm7@2", "vm7@3 rests on vm7@2, which is damaged", "--damaged` takes out vm7@2, and vm7@3"]);
    }
    let listed = BankLab::run(&["list", &bank]).stdout;
    let lines: Vec<_> = listed.lines().map(|line| line.split_whitespace().take(4).collect::<Vec<_>>().join(" ")).collect();
    assert!(lines[0].starts_with("db@1 ") && lines[1].starts_with("vm7@1 "), "{listed}");
    assert!(lines[2].starts_with("vm7@2 damaged ") && lines[3].starts_with("vm7@3 rests on vm7@2"), "{listed}");
    let end = BankLab::run(&["list", &bank, "--json"]);
    assert_eq!(end.code(), Some(1));
    let object: Value = serde_json::from_str(&end.stdout).unwrap();
    let machines = object["machines"].as_array().unwrap();
    assert_eq!(machines.iter().map(|one| one["damaged"] == true).collect::<Vec<_>>(), [false, false, true, true], "{object}");
    assert_eq!((&machines[2]["because_of"], &machines[3]["because_of"]), (&"vm7@2".into(), &"vm7@2".into()));
    assert!(object["hint"].as_str().unwrap().contains("remove"));
    let stats: Value = serde_json::from_str(&BankLab::run(&["stats", &bank, "--json"]).stdout).unwrap();
    assert_eq!((&stats["deposits"], &stats["unreadable"][1]["machine"]), (&4.into(), &"vm7@3".into()));
    // The others are shown, compared and withdrawn as ever.
    lab.ok(&["show", &bank, "vm7@1"]);
    lab.ok(&["diff", &bank, "vm7@1", "db"]);
    lab.assert_out(&bank, "vm7@1", &kept[0]);
    lab.assert_out(&bank, "db", &kept[2]);
    // A deposit says that it can do without what it would be compared with.
    lab.refused(&["deposit", &bank, "vm7", "--memory", &lab.path("ram")], &["--parent none", "--damaged"]);
    lab.ok(&["deposit", &bank, "vm7", "--memory", &lab.path("ram"), "--parent", "none"]);
    lab.assert_out(&bank, "vm7", &kept[2]);
}

#[test]
fn what_is_said_leads_to_a_bank_that_is_whole() {
    let (lab, kept) = lab();
    let (bank, other, archive) = (lab.bank(), lab.path("other"), lab.path("archive"));
    lab.ok(&["export", &other, "vm7@3", &archive]);
    damage(&lab, "vm7@00000002", middle);
    let end = BankLab::run(&["list", &bank]);
    let typed = commands(&end.stderr, &[("OTHER", &other), ("ARCHIVE", &archive)]);
    assert_eq!(typed.iter().map(|words| words[1].as_str()).collect::<Vec<_>>(), ["remove", "copy", "import"], "{}", end.stderr);
    for words in &typed {
        let end = run_words(words);
        assert_eq!(end.code(), Some(0), "{words:?}: {}", end.stderr);
    }
    assert_eq!(lab.names(&bank).len(), 4);
    lab.assert_whole();
    lab.ok(&["gc", &bank]);
    lab.assert_whole();
    let roots = |bank: &str| {
        let listed = lab.ok(&["list", bank]);
        let of_vm7 =
            listed["machines"].as_array().unwrap().iter().filter(|one| one["machine"].as_str().unwrap().starts_with("vm7@"));
        of_vm7.map(|one| one["root"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(roots(&bank), roots(&other));
    for (root, memory) in roots(&bank).iter().zip(&kept) {
        lab.assert_out(&bank, &root.as_str().unwrap()[..12], memory);
    }
}

#[test]
fn only_what_is_damaged_is_removed_and_a_leaf_counts_too() {
    let (lab, kept) = lab();
    let bank = lab.bank();
    assert_eq!(lab.ok(&["remove", &bank, "--damaged"])["removed"], Value::Array(Vec::new()));
    // The first byte of the last one's names of pages, which nothing but reading them finds.
    damage(&lab, "vm7@00000003", |_| 12);
    BankLab::run(&["list", &bank]);
    BankLab::run(&["verify", &bank]).assert_refusal(1, &["vm7@3 is damaged", "--damaged"]);
    lab.refused(&["withdraw", &bank, "vm7", "--to", &lab.path("lost")], &["vm7@3", "--damaged"]);
    let would = lab.ok(&["remove", &bank, "--damaged", "--dry-run"]);
    assert_eq!(would["would_remove"], serde_json::json!(["vm7@3"]));
    assert_eq!(lab.ok(&["remove", &bank, "--damaged"])["removed"], serde_json::json!(["vm7@3"]));
    lab.assert_whole();
    lab.assert_out(&bank, "vm7@2", &kept[1]);
    BankLab::run(&["remove", &bank, "--damaged", "vm7@1"]).assert_refusal(2, &["cannot be used with"]);
}

#[test]
fn over_a_link_the_others_are_listed_and_the_host_is_named() {
    let (lab, kept) = lab();
    damage(&lab, "vm7@00000002", middle);
    let _server = lab.serve(&[]);
    let link = lab.link();
    let end = BankLab::run(&["list", &link]);
    end.assert_refusal(1, &["vm7@2", "on the host that serves it `farbus bank list DIRECTORY`"]);
    assert!(end.stdout.contains("vm7@1 ") && end.stdout.contains("db@1 "), "{}", end.stdout);
    lab.assert_out(&link, "vm7@1", &kept[0]);
}
