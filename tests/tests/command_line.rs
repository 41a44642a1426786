//! Every bad input that a user can give the `farbus` program, through the program itself.
//!
//! `farbus lend --device nvme:odd.img` over 1,000 bytes exits with status 1 and says that this is not a multiple of 512, and nothing listens.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use farbus_tests::place::{Place, assert_end_in_order, assert_nvme};
use farbus_tests::process::{AMPLE, run};
use farbus_tests::{Running, farbus};
use serde_json::Value;

#[test]
fn help_lists_every_command_and_every_command_explains_itself() {
    let end = run(&["--help"]);
    assert_eq!(end.code(), Some(0));
    for command in ["lend", "borrow", "demo", "cert init", "cert issue", "cert show", "devices", "bench"] {
        let words: Vec<&str> = command.split(' ').collect();
        assert!(end.stdout.contains(words[0]), "{}", end.stdout);
        let help = run(&[&words[..], &["--help"]].concat());
        assert_eq!(help.code(), Some(0));
        assert!(help.stdout.contains("Usage: farbus") && help.stdout.contains("--json"), "{}", help.stdout);
    }
    run(&[]).assert_refusal(2, &["Usage"]);
    run(&["burrow"]).assert_refusal(2, &["burrow"]);
}

#[test]
fn devices_says_what_works_and_why_the_rest_does_not() {
    let end = run(&["devices", "--json"]);
    assert_eq!(end.code(), Some(0));
    let listed: Value = serde_json::from_str(&end.stdout).unwrap();
    let find = |list: &str, name: &str| {
        let found = listed[list].as_array().unwrap().iter().find(|entry| entry["name"] == name).cloned();
        found.unwrap_or_else(|| panic!("{list} has no {name}: {listed}"))
    };
    assert_eq!(find("devices", "nvme:FILE")["works"], true);
    assert_eq!(find("fabrics", "shm")["works"], true);
    for list in ["devices", "fabrics"] {
        for entry in listed[list].as_array().unwrap() {
            assert!(!entry["what"].as_str().unwrap().is_empty(), "{entry}");
        }
    }
    // Either there is one, or it says what is missing.
    let usable = listed["rdma"].as_array().unwrap().iter().any(|device| device["usable"] == true);
    assert_eq!(find("fabrics", "rdma")["works"], usable);
    assert!(run(&["devices"]).stdout.contains("shm"));
}

#[test]
fn output_that_is_lost_is_a_failure_unless_nobody_wanted_it() {
    let devices = |output: Stdio| Command::new(farbus()).arg("devices").stdout(output).stderr(Stdio::piped()).output().unwrap();
    let full = devices(std::fs::File::options().write(true).open("/dev/full").unwrap().into());
    assert_eq!(full.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&full.stderr).contains("standard output"), "{full:?}");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let unread = devices(writer.into());
    assert!(unread.status.success() && unread.stderr.is_empty(), "{unread:?}");
}

#[test]
fn a_device_that_does_not_exist_is_refused_with_those_that_do() {
    for wrong in ["", "floppy:a.img", "nvme", "nvme:", "nvme:a.img,fast", "nvme:a.img,latency=80", "edu:x"] {
        run(&["lend", "--device", wrong, "--listen", "shm:unused"]).assert_refusal(2, &["nvme"]);
    }
    run(&["lend", "--device", "nvme:a,b.img", "--listen", "shm:unused"]).assert_refusal(2, &["b.img", "no comma"]);
    for wrong in ["", "link", "tcp:localhost:1", "shm:"] {
        run(&["lend", "--device", "nvme:a.img", "--listen", wrong]).assert_refusal(2, &["shm:"]);
        run(&["borrow", "--from", wrong, "--vfio-user", "unused"]).assert_refusal(2, &["shm:"]);
    }
}

#[test]
fn an_image_that_cannot_be_a_disk_is_refused_and_nothing_listens() {
    let place = Place::new();
    place.image("odd.img", 1000);
    place.image("empty.img", 0);
    std::fs::create_dir(place.path("folder")).unwrap();
    let cases: [(&str, &[&str]); 5] = [
        ("missing.img", &["no image at", "missing.img"]),
        ("odd.img", &["1000 bytes", "multiple of 512"]),
        ("empty.img", &["empty"]),
        ("folder", &["directory"]),
        ("disk.img/more", &["disk.img/more"]),
    ];
    for (image, words) in cases {
        run(&["lend", "--device", &place.device(image), "--listen", &place.link()]).assert_refusal(1, words);
        assert!(!place.path("link").exists(), "{image}");
    }
}

#[test]
fn an_image_that_is_lent_is_not_lent_twice() {
    let place = Place::new();
    let mut lender = place.lend();
    let second = format!("shm:{}", place.name("second"));
    run(&["lend", "--device", &place.device("disk.img"), "--listen", &second]).assert_refusal(1, &["in use by another lender"]);
    place.assert_served(&mut lender);
    assert_end_in_order(lender);
    let mut again = place.lend();
    place.assert_served(&mut again);
}

#[test]
fn a_listening_path_that_cannot_be_used_is_refused_and_left_as_it_is() {
    let place = Place::new();
    let mut lender = place.lend();
    place.image("other.img", 1 << 20);
    let lend = |path: &str| run(&["lend", "--device", &place.device("other.img"), "--listen", &format!("shm:{path}")]);
    lend(&place.name("link")).assert_refusal(1, &["in use by another process", "another path"]);
    std::fs::write(place.path("precious"), "data").unwrap();
    lend(&place.name("precious")).assert_refusal(1, &["exists and is no socket"]);
    assert_eq!(std::fs::read_to_string(place.path("precious")).unwrap(), "data");
    lend(&place.name("no/folder")).assert_refusal(1, &["cannot listen at", "No such file"]);
    // Not even root may write there.
    lend("/proc/farbus").assert_refusal(1, &["cannot listen at"]);
    lend(&format!("/tmp/{}", "x".repeat(200))).assert_refusal(2, &["at most 107"]);
    place.assert_served(&mut lender);
}

#[test]
fn a_socket_that_a_killed_lender_left_is_replaced() {
    let place = Place::new();
    let lender = place.lend();
    lender.kill();
    assert_eq!(lender.wait(AMPLE).signal(), Some(9));
    assert!(place.path("link").exists());
    let mut lender = place.lend();
    place.assert_served(&mut lender);
}

#[test]
fn a_borrower_without_a_lender_or_a_socket_says_what_is_missing() {
    let place = Place::new();
    let borrow = |from: &str, socket: &str| run(&["borrow", "--from", &format!("shm:{from}"), "--vfio-user", socket]);
    borrow(&place.name("link"), &place.name("vmm")).assert_refusal(1, &["nobody listens", "farbus lend"]);
    assert!(!place.path("vmm").exists(), "a socket that nobody serves");
    drop(UnixListener::bind(place.path("stale")).unwrap());
    borrow(&place.name("stale"), &place.name("vmm")).assert_refusal(1, &["nobody listens"]);
    borrow(&place.name("disk.img"), &place.name("vmm")).assert_refusal(1, &["is no socket", "address that a `farbus lend` has"]);
    borrow(&place.name("link"), &"x".repeat(200)).assert_refusal(2, &["200 bytes long", "at most 107"]);
    run(&["borrow", "--from", &place.link(), "--vfio-user", &place.name("vmm"), "--read-deadline", "0s"])
        .assert_refusal(2, &["--read-deadline", "longer than zero"]);

    let mut lender = place.lend();
    let first = place.borrow("vmm");
    lender.event("lent", AMPLE);
    borrow(&place.name("link"), &place.name("vmm")).assert_refusal(1, &["in use"]);
    std::fs::write(place.path("precious"), "data").unwrap();
    borrow(&place.name("link"), &place.name("precious")).assert_refusal(1, &["not a socket"]);
    assert_eq!(std::fs::read_to_string(place.path("precious")).unwrap(), "data");
    borrow(&place.name("link"), &place.name("no/folder")).assert_refusal(1, &["No such file"]);
    assert_nvme(&mut place.vmm("vmm"));
    assert_end_in_order(first);
    lender.event("returned", AMPLE);
    place.assert_served(&mut lender);
}

#[test]
fn a_core_that_does_not_exist_is_refused_with_those_that_do() {
    let place = Place::new();
    for core in ["99999", "1023"] {
        run(&["lend", "--device", &place.device("disk.img"), "--listen", &place.link(), "--core", core])
            .assert_refusal(2, &[&format!("no core {core}"), "tip: it may run on cores "]);
        assert!(!place.path("link").exists());
    }
}

#[test]
fn a_suite_shows_each_row_as_it_comes_so_that_what_was_measured_outlives_it() {
    let bench = Running::farbus(&["bench", "shm", "--json", "--seconds", "0.01"]);
    bench.complaint("mmio-read-4 p50  ", AMPLE);
    bench.kill();
    assert_eq!(bench.wait(AMPLE).signal(), Some(9));
}

/// The one object that a command which failed printed, after what it says of itself as every other object does.
#[track_caller]
fn failed(args: &[&str]) -> Value {
    let end = run(args);
    end.assert_refusal(1, &["farbus: "]);
    let value: Value = serde_json::from_str(&end.stdout).unwrap_or_else(|error| panic!("{error}: {end:?}"));
    let said = value["error"].as_str().unwrap();
    assert!(end.stderr.contains(said), "people are told the same: {end:?}");
    assert!(value["causes"].as_array().unwrap().iter().all(Value::is_string), "{value}");
    if let Some(hint) = value["hint"].as_str() {
        assert!(end.stderr.contains(&format!("hint: {hint}")), "{end:?}");
    }
    value
}

#[test]
fn with_json_a_failure_is_one_object_with_its_causes_and_advice() {
    let place = Place::new();
    let (missing, nowhere) = (place.device("missing.img"), place.name("no/folder"));
    let events = failed(&["lend", "--json", "--device", &missing, "--listen", &place.link()]);
    assert_eq!(events["event"], "error");
    assert!(events["error"].as_str().unwrap().contains("missing.img") && events["hint"].is_null(), "{events}");
    let events = failed(&["lend", "--json", "--device", &place.device("disk.img"), "--listen", &format!("shm:{nowhere}")]);
    assert!(events["hint"].as_str().unwrap().contains("--listen"), "{events}");
    assert!(events["causes"][0].as_str().unwrap().contains("No such file"), "{events}");
    let events = failed(&["borrow", "--json", "--from", &place.link(), "--vfio-user", &place.name("vmm")]);
    assert!(events["event"] == "error" && events["hint"].as_str().unwrap().contains("farbus lend"), "{events}");

    let object = failed(&["demo", "--json", "--image", &place.name("missing.img"), "--svg", &place.name("demo.svg")]);
    assert!(object.get("event").is_none() && object["error"].as_str().unwrap().contains("missing.img"), "{object}");
    let object = failed(&["demo", "--json", "--svg", &nowhere]);
    assert!(object["hint"].as_str().unwrap().contains("--svg"), "{object}");

    // Without it nothing is on standard output.
    assert_eq!(run(&["demo", "--image", &place.name("missing.img")]).stdout, "");
}

#[test]
fn with_json_arguments_that_make_no_sense_are_one_object_too() {
    let misused = |args: &[&str], words: &str| {
        let end = run(args);
        end.assert_refusal(2, &[]);
        let value: Value = serde_json::from_str(&end.stdout).unwrap_or_else(|error| panic!("{error}: {end:?}"));
        assert!(value["error"].as_str().unwrap().contains(words), "{value}");
        assert!(value["causes"].is_array() && value["hint"].is_string(), "{value}");
        value
    };
    let place = Place::new();
    let object = misused(&["bench", "shm", "--json", "--seconds", "soon"], "0.01 to 3600");
    assert!(object.get("event").is_none() && object["hint"].as_str().unwrap().contains("farbus bench --help"), "{object}");
    assert_eq!(misused(&["lend", "--json", "--listen", &place.link()], "--device <SPEC>")["event"], "error");
    // Noticed when all of them are there.
    let device = place.device("disk.img");
    let event = misused(&["lend", "--json", "--device", &device, "--listen", &place.link(), "--core", "99999"], "no core 99999");
    assert_eq!(event["event"], "error");
    misused(&["burrow", "--json"], "burrow");
    // Without it nothing is on standard output.
    assert_eq!(run(&["bench", "shm", "--seconds", "soon"]).stdout, "");
}

#[test]
fn values_that_mean_nothing_are_refused_with_what_would() {
    for seconds in ["0", "nan", "inf", "-1", "1e300"] {
        let seconds = format!("--seconds={seconds}");
        run(&["bench", "shm", &seconds]).assert_refusal(2, &["0.01 to 3600"]);
        run(&["bench", "soft-roce", &seconds]).assert_refusal(2, &["0.01 to 3600"]);
        run(&["demo", &seconds]).assert_refusal(2, &["0.01 to 3600"]);
    }
    run(&["bench", "soft-roce", "--pairs", "1"]).assert_refusal(2, &["5 to 1000"]);
    run(&["bench", "shm", "--pairs", "7"]).assert_refusal(2, &["soft-roce"]);
    let lend = |device: &str, spin: &str| run(&["lend", "--device", device, "--listen", "shm:unused", "--spin", spin]);
    lend("edu", "50").assert_refusal(2, &["has no unit", "ns, us, ms, s, m, h or d"]);
    lend("edu", "3601s").assert_refusal(2, &["longer than an hour"]);
    lend("nvme:a,latency=abc", "1us").assert_refusal(2, &["latency", "\"abc\" is no time", "ns, us, ms, s, m, h or d"]);
    lend("nvme:a,serial=", "1us").assert_refusal(2, &["serial", "1 to 20 printable"]);
}
