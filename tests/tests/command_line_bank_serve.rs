//! `farbus bank serve` as its users run it: a link address is a bank, who may what is kept to, and whoever is killed, the bank is whole.
//!
//! `farbus bank deposit shm:link vm7 …` against a server that is killed in the middle says so, and against the next one sends what is missing.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use farbus_tests::bank_lab::BankLab;
use farbus_tests::farbus;
use farbus_tests::process::{AMPLE, Running, run};

/// A bank with `web` and `db`.
fn lab() -> BankLab {
    let lab = BankLab::new();
    for (name, factor) in [("web", 700), ("db", 900)] {
        let file = lab.write(name, memory(factor));
        lab.ok(&["deposit", &lab.bank(), name, "--memory", &file]);
    }
    lab
}

/// 4 MB, of which each page is another one for each factor.
fn memory(factor: u32) -> Vec<u8> {
    (0..1_000_000_u32).flat_map(|n| (n / factor).wrapping_mul(2_654_435_761).to_le_bytes()).collect()
}

#[track_caller]
fn end_in_order(mut server: Running) {
    server.terminate();
    assert_eq!(server.event("ended", AMPLE)["reason"], "SIGTERM");
    let end = server.wait(AMPLE);
    assert_eq!(end.code(), Some(0), "{end:?}");
    end.assert_no_panic();
}

#[test]
fn a_link_address_is_a_bank() {
    let lab = lab();
    let (link, server) = (lab.link(), lab.serve(&[]));
    assert_eq!(lab.names(&link), ["db@1", "web@1"]);
    let said = lab.assert_out(&link, "web", &memory(700));
    let wire = &said["wire"];
    assert!(wire["read_bytes"].as_u64() > Some(30_000) && wire["message_bytes"].as_u64() < Some(10_000), "{said}");
    let mut changed = memory(700);
    changed[..4096].fill(9);
    std::fs::write(lab.path("web"), &changed).unwrap();
    let said = lab.ok(&["deposit", &link, "web", "--memory", &lab.path("web")]);
    assert_eq!((&said["machine"], &said["parent"], &said["counts"]["new"]), (&"web@2".into(), &"web@1".into(), &1.into()));
    lab.assert_out(&lab.path("bank"), "web", &changed);
    assert_eq!(lab.ok(&["diff", &link, "web@1", "web@2"])["sections"][0]["changed"], 1);
    assert_eq!(lab.ok(&["stats", &link])["deposits"], 3);
    assert_eq!(lab.ok(&["show", &link, "web"])["machine"], "web@2");
    // Two at once, and to a bank of this host.
    lab.ok(&["init", &lab.path("second")]);
    let (path, second) = (lab.path("two"), lab.path("second"));
    let mut other = Running::farbus(&["bank", "withdraw", &link, "db", "--to", &path, "--json"]);
    assert_eq!(lab.ok(&["copy", &link, "web", &second])["machine"], "web@1");
    other.line("the end of a withdrawal", AMPLE, |line| line.contains("sections").then_some(()));
    assert_eq!(other.wait(AMPLE).code(), Some(0));
    assert!(std::fs::read(lab.path("two/memory")).unwrap() == memory(900));
    lab.assert_out(&second, "web", &changed);
    assert_eq!(lab.ok(&["copy", &second, "web", &link])["was_there"], true);
    // What is done where the bank is.
    for (words, said) in [
        (&["verify", &link][..], "`farbus bank verify DIRECTORY` on the host"),
        (&["gc", &link], "`farbus bank gc DIRECTORY` on the host"),
        (&["remove", &link, "web@1"], "`farbus bank remove DIRECTORY` on the host"),
        (&["init", &link], "run farbus bank init where it is to be"),
    ] {
        lab.misused(words, &[said]);
    }
    end_in_order(server);
    BankLab::run(&["list", &link]).assert_refusal(1, &["nobody listens", "is `farbus bank serve` running there?"]);
    lab.assert_whole();
}

#[test]
fn behind_a_cache_pages_come_over_a_link_once() {
    let lab = lab();
    let (link, out, cache) = (lab.link(), lab.path("out"), lab.path("cache"));
    let server = lab.serve(&[]);
    let withdraw = || lab.ok(&["withdraw", &link, "web", "--to", &out, "--replace", "--cache", &cache, "--cache-size", "64MiB"]);
    let pages = memory(700).len() as u64 / 4096 + 1;
    let said = withdraw();
    assert_eq!((&said["cache"]["hits"], &said["cache"]["misses"]), (&0.into(), &pages.into()), "{said}");
    let mut changed = memory(700);
    changed[..8192].fill(9);
    std::fs::write(lab.path("web"), &changed).unwrap();
    lab.ok(&["deposit", &lab.path("bank"), "web", "--memory", &lab.path("web")]);
    let said = withdraw();
    assert!(std::fs::read(lab.path("out/memory")).unwrap() == changed);
    // Two pages that are equal are one, and the names of all of them.
    assert_eq!((&said["cache"]["hits"], &said["cache"]["misses"]), (&(pages - 2).into(), &2.into()), "{said}");
    assert!(said["wire"]["read_bytes"].as_u64() < Some(pages * 32 + 4000), "{said}");
    end_in_order(server);
}

#[test]
fn a_client_has_what_the_rules_say_and_no_more() {
    let lab = lab();
    let link = lab.link();
    let server = lab.serve(&["--read", "web*", "--write", "web-*"]);
    assert_eq!(lab.names(&link), ["web@1"]);
    BankLab::run(&["withdraw", &link, "db", "--to", &lab.path("out")]).assert_refusal(1, &["no machine", "farbus bank list"]);
    BankLab::run(&["deposit", &link, "db", "--memory", &lab.path("db")])
        .assert_refusal(1, &["may not deposit db", "farbus bank serve"]);
    BankLab::run(&["stats", &link]).assert_refusal(1, &["every machine"]);
    lab.ok(&["deposit", &link, "web-2", "--memory", &lab.path("db")]);
    lab.assert_out(&link, "web-2", &memory(900));
    end_in_order(server);
    // What is for another is for nobody else.
    let server = lab.serve(&["--read", "*=uid:4711", "--write", "*=uid:4711"]);
    assert_eq!(lab.names(&link), Vec::<String>::new());
    BankLab::run(&["deposit", &link, "web", "--memory", &lab.path("web")]).assert_refusal(1, &["deposit nothing here"]);
    if rustix::process::geteuid().is_root() {
        // Another user, who is let in because a rule names it.
        std::os::unix::fs::chown(lab.path(""), Some(4711), None).unwrap();
        let mut other = Command::new(farbus());
        let end = other.args(["bank", "list", &link]).uid(4711).gid(4711).current_dir("/").output().unwrap();
        let said = String::from_utf8_lossy(&end.stdout).into_owned();
        if end.status.success() {
            assert!(said.contains("db@1") && said.contains("web@1"), "{said}");
        } else {
            let why = String::from_utf8_lossy(&end.stderr).into_owned();
            assert!(why.is_empty() || why.contains("Permission denied"), "{why}");
            eprintln!("farbus bank serve for another user: not run: it may not run the program: {why}");
        }
    }
    end_in_order(server);
    lab.assert_whole();
}

#[test]
fn a_stranger_of_another_user_is_turned_away_and_a_borrower_is_told_that_this_is_a_bank() {
    let lab = lab();
    let mut server = lab.serve(&[]);
    let vmm = lab.path("vmm");
    let end = run(&["borrow", "--from", &lab.link(), "--vfio-user", &vmm]);
    assert_eq!(end.code(), Some(1), "{end:?}");
    assert!(server.event("refused", AMPLE)["reason"].as_str().unwrap().contains("this is a bank"));
    // Nobody who says nothing keeps others waiting.
    let silent: Vec<_> = (0..40).map(|_| std::os::unix::net::UnixStream::connect(lab.path("link")).unwrap()).collect();
    assert_eq!(lab.names(&lab.link()), ["db@1", "web@1"]);
    drop(silent);
    end_in_order(server);
}

#[test]
fn more_clients_than_may_be_are_told_so() {
    let lab = lab();
    let mut server = lab.serve(&["--clients", "1"]);
    // One that withdraws into a pipe that nobody reads would do; a lazy one stays as long as it is wanted.
    let (socket, link) = (lab.path("faults"), lab.link());
    let mut first = Running::farbus(&["bank", "serve-faults", &link, "--socket", &socket, "--machine", "web", "--json"]);
    first.event("serving", AMPLE);
    server.event("begun", AMPLE);
    BankLab::run(&["list", &link]).assert_refusal(1, &["as many are served", "try again"]);
    first.terminate();
    first.wait(AMPLE);
    server.event("left", AMPLE);
    assert_eq!(lab.names(&link), ["db@1", "web@1"]);
    end_in_order(server);
}

#[test]
fn whoever_is_killed_the_bank_is_whole_and_the_deposit_is_resumed() {
    let lab = lab();
    let link = lab.link();
    let mut server = lab.serve(&[]);
    // 24 MB of pages that nothing has, in several packs.
    let big: Vec<u8> = (0..6_000_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).rotate_left(n % 31).to_le_bytes()).collect();
    std::fs::write(lab.path("big"), &big).unwrap();
    let deposit = ["bank", "deposit", &link, "big", "--memory", &lab.path("big"), "--json"];
    for after in [5, 20, 40, 60, 80, 120, 160] {
        let client = Running::farbus(&deposit);
        std::thread::sleep(Duration::from_millis(after));
        client.kill();
        client.wait(AMPLE);
        // What it held is let go of: a sweep need not wait.
        lab.ok(&["gc", &lab.path("bank"), "--grace", "1h", "--wait", "10s"]);
        lab.assert_whole();
    }
    for after in [10, 50, 90] {
        let client = Running::farbus(&deposit);
        std::thread::sleep(Duration::from_millis(after));
        server.kill();
        server.wait(AMPLE);
        server = lab.serve(&[]);
        // It has gone on with this one, or says that it has to be run again.
        let end = client.wait(AMPLE);
        if end.code() != Some(0) {
            end.assert_refusal(1, &["hint: "]);
        }
        lab.assert_whole();
    }
    let said = lab.ok(&["deposit", &link, "big", "--memory", &lab.path("big")]);
    let pages = big.len() as u64 / 4096 + 1;
    assert!(said["counts"]["new"].as_u64().unwrap() < pages, "nothing of the deposits before was found: {said}");
    lab.assert_out(&link, "big", &big);
    // A withdrawal that is killed goes on where it was.
    let (out, part) = (lab.path("resumed"), lab.path("resumed/memory.farbus-part"));
    let client = Running::farbus(&["bank", "withdraw", &link, "big", "--to", &out]);
    std::thread::sleep(Duration::from_millis(30));
    client.kill();
    client.wait(AMPLE);
    let was_there = std::path::Path::new(&part).exists();
    let said = lab.ok(&["withdraw", &link, "big", "--to", &out]);
    assert!(std::fs::read(lab.path("resumed/memory")).unwrap() == big, "{was_there}: {said}");
    end_in_order(server);
    lab.assert_whole();
}

#[test]
fn a_withdrawal_goes_on_when_its_server_is_killed_and_another_one_comes() {
    let lab = lab();
    let (link, out) = (lab.link(), lab.path("out"));
    let big: Vec<u8> = (0..6_000_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).rotate_left(n % 31).to_le_bytes()).collect();
    std::fs::write(lab.path("big"), &big).unwrap();
    lab.ok(&["deposit", &lab.path("bank"), "big", "--memory", &lab.path("big")]);
    let (mut server, mut caught) = (lab.serve(&[]), 0);
    for after in [0, 5, 20] {
        let mut client = Running::farbus(&["bank", "withdraw", &link, "big", "--to", &out, "--replace", "--json"]);
        // Its file is made when it has a link and its machine.
        while !std::path::Path::new(&lab.path("out/memory.farbus-part")).exists() && !client.has_ended() {
            std::thread::sleep(Duration::from_millis(1));
        }
        caught += usize::from(!client.has_ended());
        std::thread::sleep(Duration::from_millis(after));
        server.kill();
        server.wait(AMPLE);
        std::thread::sleep(Duration::from_millis(300));
        server = lab.serve(&[]);
        let end = client.wait(AMPLE);
        assert_eq!(end.code(), Some(0), "killed after {after} ms: {}", end.stderr);
        assert!(std::fs::read(lab.path("out/memory")).unwrap() == big);
    }
    assert!(caught > 0, "every withdrawal had ended before its server was killed");
    end_in_order(server);
    let words = ["list", &lab.path("bank"), "--reconnect", "5s"];
    BankLab::run(&words).assert_refusal(2, &["it is on this host"]);
    lab.assert_whole();
}

#[test]
fn what_makes_no_sense_is_refused_with_what_to_do() {
    let lab = lab();
    let (bank, link) = (lab.path("bank"), lab.link());
    for (words, said) in [
        (&["serve", &bank, "--listen", &link, "--read", "a/b"][..], "no pattern for machines"),
        (&["serve", &bank, "--listen", &link, "--write", "web=uid:x"], "use uid:1000"),
        (&["serve", &bank, "--listen", &link, "--read", "web=vm7"], "name users of this host"),
        (
            &["serve", &bank, "--listen", "rdma:127.0.0.1:0", "--tls", "x", "--allow", "*", "--read", "web=uid:0"],
            "as in their certificates",
        ),
        (&["serve", &bank, "--listen", &link, "--tls", "x"], "takes no options of TLS"),
        (&["serve", &bank, "--listen", &link, "--peer", "nas"], "--peer names a server"),
        (&["serve", &link, "--listen", &link], "served already"),
        (&["serve", &bank, "--listen", "bank.sock"], "is no link address"),
        (&["serve", &bank, "--listen", &link, "--reconnect", "5s"], "--reconnect is a client's"),
        (&["list", &bank, "--tls", "x"], "takes no options of TLS"),
        (&["list", "rdma:nas:0"], "port 0"),
        (&["list", "shm:"], "needs a path"),
    ] {
        BankLab::run(words).assert_refusal(2, &[said]);
    }
    BankLab::run(&["serve", &lab.path("nothing"), "--listen", &link])
        .assert_refusal(1, &["cannot open the bank", "farbus bank init"]);
    let taken = lab.serve(&[]);
    BankLab::run(&["serve", &bank, "--listen", &link]).assert_refusal(1, &["in use", "--listen"]);
    end_in_order(taken);
}
