//! Which exit status means what, for every command: 2 where the arguments make no sense whatever is on this host, 1 where they do and it failed, 0 where it is done.
//!
//! `farbus bank deposit bank ../vm --memory x` ends with 2, because no machine can be called that; `farbus bank show bank vm8` with 1, because there is none.

use farbus_tests::bank_lab::BankLab;
use farbus_tests::process::run;
use farbus_tests::program::repository;
use serde_json::Value;

#[test]
fn arguments_that_make_no_sense_end_with_2_and_say_so_like_all_others() {
    let lab = BankLab::new();
    let bank = lab.bank();
    let memory = lab.write("ram", vec![7; 8192]);
    let (key31, key_text) = (lab.write("key31", [1; 31]), lab.write("key-text", "zz".repeat(32)));
    let odd = format!("memory={}", lab.write("odd", [0; 7]));
    let two = format!("memory={}", lab.path("out"));
    lab.ok(&["deposit", &bank, "vm7", "--memory", &memory]);
    for (words, said) in [
        (&["deposit", &bank, "../vm", "--memory", &memory][..], "1 to 64 letters"),
        (&["deposit", &bank, "vm 7", "--memory", &memory], "1 to 64 letters"),
        (&["deposit", &bank, "", "--memory", &memory], "1 to 64 letters"),
        (&["deposit", &bank, "vm7@1", "--memory", &memory], "1 to 64 letters"),
        (&["deposit", &bank, "vm7"], "nothing to deposit"),
        (&["deposit", &bank, "vm7", "--memory", &memory, "--disk", &format!("memory={memory}")], "two sections memory"),
        (&["deposit", &bank, "vm7", "--memory", &memory, "--dirty", &odd, "--parent", "vm7"], "no bitmap"),
        (&["deposit", &bank, "vm7", "--memory", &memory, "--dirty", &odd], "none is named"),
        (&["deposit", &bank, "vm7", "--memory", &memory, "--parent", "vm7@x"], "MACHINE@NUMBER"),
        (&["deposit", &bank, "vm7", "--memory", "a="], "a file is missing"),
        (&["withdraw", &bank, "vm7@-1", "--to", "out"], "MACHINE@NUMBER"),
        (&["withdraw", &bank, "vm7"], "--to"),
        (&["withdraw", &bank, "vm7", "--section", &two, "--section", &two], "named twice"),
        (&["show", &bank, "a/b"], "1 to 64 letters"),
        (&["list", &bank, "a/b"], "1 to 64 letters"),
        (&["diff", &bank, "vm7", "a b"], "1 to 64 letters"),
        (&["export", &bank, "a/b", "file"], "1 to 64 letters"),
        (&["copy", &bank, "a/b", "there"], "1 to 64 letters"),
        (&["serve-faults", &bank, "--socket", "s", "--machine", "a/b"], "1 to 64 letters"),
        (&["serve-faults", &bank, "--socket", "s", "--machine", "vm7", "--memory-cache", "64"], "has no unit"),
        (&["list", &bank, "--tenant-key", &key31], "no tenant key"),
        (&["list", &bank, "--tenant-key", &key_text], "no tenant key"),
        (&["list", &lab.path("nowhere"), "--tenant-key", &key31], "no tenant key"),
        (&["init", "shm:/run/bank"], "over a link"),
        (&["verify", "shm:/run/bank"], "is a link"),
        (&["gc", "shm:/run/bank"], "is a link"),
        (&["remove", "shm:/run/bank", "vm7"], "is a link"),
        (&["list", "shm:"], "needs a path"),
        (&["list", "s3://"], "names no bucket"),
        (&["list", "ftp://host"], "is no kind of bank"),
        (&["list", &bank, "--wait", "5"], "has no unit"),
        (&["list", &bank, "--wait", "2h"], "longer than an hour"),
        (&["list", &bank, "--cache-size", "7"], "has no unit"),
        (&["list", &bank, "--cache-size", "4GB"], "no unit of size"),
        (&["list", &bank, "--plain"], "takes no options of TLS"),
        (&["gc", &bank, "--grace", "soon"], "no time"),
        (&["gc", &bank, "--repack-below", "101"], "101"),
        (&["remove", &bank], "MACHINE"),
        (&["remove", &bank, "--keep-within", "30"], "has no unit"),
        (&["remove", &bank, "--keep-last", "0"], "0"),
        (&["remove", &bank, "vm7", "--damaged"], "cannot be used with"),
    ] {
        lab.misused(words, &["error: ", said, "For more information, try '--help'."]);
    }
    for (words, said) in [
        (&["lend", "--device", "edu", "--listen", "nowhere"][..], "no link address"),
        (&["lend", "--device", "fax", "--listen", "shm:/tmp/x"], "fax"),
        (&["lend", "--device", "edu", "--listen", "shm:/tmp/x", "--core", "99999"], "no core"),
        (&["lend", "--device", "edu", "--listen", "shm:/tmp/x", "--spin", "50"], "has no unit"),
        (&["borrow", "--from", "shm:/tmp/x", "--vfio-user", "s", "--socket-mode", "9"], "no mode"),
        (&["bench", "bank", "--large-gib", "0"], "--large-gib"),
        (&["demo", "--seconds", "0"], "0.01"),
        (&["nothing"], "nothing"),
    ] {
        run(words).assert_refusal(2, &["error: ", said, "For more information, try '--help'."]);
    }
}

#[test]
fn what_makes_sense_and_fails_ends_with_1_and_a_hint() {
    let lab = BankLab::new();
    let (bank, memory) = (lab.bank(), lab.write("ram", vec![7; 8192]));
    lab.ok(&["deposit", &bank, "vm7", "--memory", &memory]);
    for (words, said) in [
        (&["list", &lab.path("nowhere")][..], "farbus bank init"),
        (&["init", &bank], "there is a bank"),
        (&["show", &bank, "vm8"], "farbus bank list"),
        (&["withdraw", &bank, "vm7", "--section", &format!("ram={}", lab.path("x"))], "farbus bank show"),
        (&["withdraw", &bank, "vm7", "--section", &format!("memory={memory}")], "--replace"),
        (&["deposit", &bank, "vm7", "--memory", &lab.path("none")], "can read"),
        (&["list", &format!("shm:{}", lab.path("link"))], "is `farbus bank serve` running there?"),
    ] {
        lab.refused(words, &["farbus: ", "hint: ", said]);
    }
}

#[test]
fn what_serves_says_its_errors_as_events_and_all_others_as_one_object() {
    let lab = BankLab::new();
    let (bank, socket) = (lab.bank(), lab.path("socket"));
    for (words, code, is_event, help) in [
        (&["serve-faults", &bank, "--machine", "vm8", "--socket", &socket][..], 1, true, "farbus bank list"),
        (&["serve", &bank, "--listen", "nowhere"], 2, true, "`farbus bank serve --help`"),
        (&["show", &bank, "vm8"], 1, false, "farbus bank list"),
        (&["show", &bank, "a/b"], 2, false, "`farbus bank show --help`"),
    ] {
        let end = BankLab::run(&[words, &["--json"]].concat());
        assert_eq!(end.code(), Some(code), "{end:?}");
        let object: Value = serde_json::from_str(&end.stdout).unwrap();
        assert_eq!(object["event"] == "error", is_event, "{object}");
        assert!(object["hint"].as_str().unwrap().contains(help), "{object}");
    }
}

#[test]
fn the_same_table_is_in_the_help_and_in_the_readme() {
    let readme = std::fs::read_to_string(repository().join("README.md")).unwrap();
    let rows: Vec<_> = readme.lines().filter(|line| line.starts_with("| ") && line.ends_with(" |")).collect();
    let help = run(&["--help"]).stdout;
    for status in ["0", "1", "2", "3", "128 + N"] {
        assert!(rows.iter().any(|row| row.starts_with(&format!("| {status} |"))), "README has no row for status {status}");
        assert!(help.lines().any(|line| line.trim_start().starts_with(&format!("{status}  "))), "{help}");
    }
    let bank = run(&["bank", "--help"]).stdout;
    assert!(bank.contains("Exit status"), "{bank}");
}
