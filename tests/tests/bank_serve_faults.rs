//! `farbus bank serve-faults` beside a VMM: the machine's bytes come as they are used, and the second time ahead of that.
//!
//! A client that maps 4 MB and passes its userfaultfd reads what was deposited; when it goes, the bank has `vm7@2` with its working set, and a client of
//! that finds its groups there before it asks.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use farbus_machine_bank::PAGE;
use farbus_machine_bank::lazy::firecracker::Mapping;
use farbus_machine_bank::lazy::{Area, Features, Uffd, Watch};
use farbus_tests::process::{Running, run, text};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tempfile::TempDir;

const SOON: Duration = Duration::from_secs(60);

const CLIENT: &str = "FARBUS_TEST_VMM";

fn memory() -> Vec<u8> {
    (0..1_048_576_u32).flat_map(|n| (n / 700).wrapping_mul(2_654_435_761).to_le_bytes()).collect()
}

/// What a VMM does: it says where its memory is, and uses each `step`th group of it, backwards.
fn vmm(socket: &Path, step: usize) {
    let expected = memory();
    let uffd = Uffd::new(Features(0)).unwrap();
    let area = Area::anonymous(expected.len() as u64).unwrap();
    area.watch(&uffd, Watch::MISSING).unwrap();
    let page = Some(PAGE as u64);
    let regions =
        [Mapping { base_host_virt_addr: area.address(), size: area.len(), offset: 0, page_size: page, page_size_kib: page }];
    let stream = UnixStream::connect(socket).unwrap();
    let fds = [uffd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let json = serde_json::to_vec(&regions).unwrap();
    assert_eq!(sendmsg(&stream, &[IoSlice::new(&json)], &mut control, SendFlags::empty()).unwrap(), json.len());
    for group in (0..64).rev().step_by(step) {
        let at = group * (64 << 10) + 5000;
        let mut bytes = vec![0; 3000];
        area.memory().read(at as u64, &mut bytes).unwrap();
        assert!(bytes == expected[at..at + 3000], "group {group}");
    }
}

/// The same in a process of its own.
fn run_vmm(socket: &Path, step: &str) {
    let mut vmm = std::process::Command::new(std::env::current_exe().unwrap());
    vmm.args(["--exact", "a_vmm_reads_the_machine_as_it_uses_it_and_the_second_one_finds_it_there", "--nocapture"]);
    assert!(vmm.env(CLIENT, socket).env("STEP", step).status().unwrap().success());
}

/// A folder with a bank in which `vm7` is, and where its faults are to be served.
fn banked() -> (TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let (bank, ram, socket) = (folder.path().join("bank"), folder.path().join("ram"), folder.path().join("faults.sock"));
    std::fs::write(&ram, memory()).unwrap();
    assert_eq!(run(&["bank", "init", text(&bank)]).code(), Some(0));
    assert_eq!(run(&["bank", "deposit", text(&bank), "vm7", "--memory", text(&ram)]).code(), Some(0));
    (folder, bank, socket)
}

#[test]
fn a_vmm_reads_the_machine_as_it_uses_it_and_the_second_one_finds_it_there() {
    if let Err(error) = Uffd::supported() {
        eprintln!("farbus bank serve-faults: not run: {error}");
        return;
    }
    if let Some(socket) = std::env::var_os(CLIENT) {
        vmm(Path::new(&socket), std::env::var("STEP").unwrap().parse().unwrap());
        return;
    }
    let (_folder, bank, socket) = banked();
    let serve = |machine: &str, more: &[&str]| {
        let words = ["bank", "serve-faults", text(&bank), "--socket", text(&socket), "--machine", machine, "--json"];
        Running::farbus(&[&words, more].concat())
    };

    let mut server = serve("vm7", &["--keep-working-set"]);
    assert_eq!(server.event("serving", SOON)["machine"], "vm7@1");
    run(&["bank", "serve-faults", text(&bank), "--socket", text(&socket), "--machine", "vm7"])
        .assert_refusal(1, &["cannot listen"]);
    let wrong = UnixStream::connect(&socket).unwrap();
    sendmsg(&wrong, &[IoSlice::new(b"[{]")], &mut SendAncillaryBuffer::default(), SendFlags::empty()).unwrap();
    // The other server that came in vain looked whether this one lives, so it was refused first.
    server.line("the refusal", SOON, |line| line.contains("no list of regions").then_some(()));
    run_vmm(&socket, "2");
    let ended = server.event("left", SOON);
    assert_eq!((ended["report"]["demanded"].as_u64(), ended["report"]["poisoned"].as_u64()), (Some(32), Some(0)), "{ended}");
    let kept = server.event("kept", SOON);
    assert_eq!((kept["machine"].as_str(), kept["groups"].as_u64()), (Some("vm7@2"), Some(32)), "{kept}");
    server.terminate();
    let last = server.event("ended", SOON);
    let served = ["clients", "demanded", "missed"].map(|name| last["served"][name].as_u64());
    assert_eq!((last["reason"].as_str(), served), (Some("SIGTERM"), [Some(1), Some(32), Some(0)]), "{last}");
    assert!(last["served"]["refused"].as_u64() >= Some(1), "{last}");
    assert_eq!(server.wait(SOON).code(), Some(0));
    assert!(!socket.exists());

    let mut server = serve("vm7", &[]);
    assert_eq!(server.event("serving", SOON)["machine"], "vm7@2");
    run_vmm(&socket, "1");
    let ended = server.event("left", SOON);
    assert_eq!(
        ended["report"]["demanded"].as_u64().zip(ended["report"]["ahead"].as_u64()).map(|(a, b)| a + b),
        Some(64),
        "{ended}"
    );
    let [demanded, ahead] = ["demanded", "ahead"].map(|name| ended["report"][name].as_u64().unwrap());
    // The client asks at once, so it may be faster for some.
    assert!(demanded + ahead == 64 && ahead > 0, "{ended}");
    server.terminate();
    assert_eq!(server.wait(SOON).code(), Some(0));
}

#[test]
fn a_vmm_waits_while_the_bank_is_away_and_the_server_says_so() {
    if let Err(error) = Uffd::supported() {
        eprintln!("farbus bank serve-faults: not run: {error}");
        return;
    }
    if let Some(socket) = std::env::var_os(CLIENT) {
        vmm(Path::new(&socket), 1);
        return;
    }
    let (folder, bank, socket) = banked();
    let words = ["bank", "serve-faults", text(&bank), "--socket", text(&socket), "--machine", "vm7", "--json"];
    let mut server = Running::farbus(&words);
    server.event("serving", SOON);
    // Before the VMM comes, so that it begins without a bank.
    std::fs::rename(&bank, folder.path().join("elsewhere")).unwrap();
    let mut client = std::process::Command::new(std::env::current_exe().unwrap());
    client.args(["--exact", "a_vmm_waits_while_the_bank_is_away_and_the_server_says_so", "--nocapture"]);
    let mut client = client.env(CLIENT, &socket).spawn().unwrap();
    let away = server.event("store_away", SOON);
    assert!(away["since_ms"].as_u64().unwrap() > 0 && away["why"].is_string(), "{away}");
    std::thread::sleep(Duration::from_millis(1500));
    assert!(client.try_wait().unwrap().is_none(), "the VMM did not wait");
    std::fs::rename(folder.path().join("elsewhere"), &bank).unwrap();
    let back = server.event("store_back", SOON);
    assert!(back["away_ms"].as_u64().unwrap() > 1300, "{back}");
    assert!(client.wait().unwrap().success());
    let left = server.event("left", SOON);
    assert_eq!((left["report"]["poisoned"].as_u64(), left["report"]["away"].as_u64()), (Some(0), Some(1)), "{left}");
    server.terminate();
    assert_eq!(server.wait(SOON).code(), Some(0));
}

#[test]
fn a_vmm_waits_while_who_serves_the_bank_is_killed_and_started_again() {
    if let Err(error) = Uffd::supported() {
        eprintln!("farbus bank serve-faults over a link: not run: {error}");
        return;
    }
    if let Some(socket) = std::env::var_os(CLIENT) {
        vmm(Path::new(&socket), 1);
        return;
    }
    let (folder, bank, socket) = banked();
    let link = format!("shm:{}", folder.path().join("link").display());
    let serve = || {
        let mut serving = Running::farbus(&["bank", "serve", text(&bank), "--listen", &link, "--json"]);
        serving.event("serving", SOON);
        serving
    };
    let serving = serve();
    let mut server = Running::farbus(&["bank", "serve-faults", &link, "--socket", text(&socket), "--machine", "vm7", "--json"]);
    server.event("serving", SOON);
    serving.kill();
    let mut client = std::process::Command::new(std::env::current_exe().unwrap());
    client.args(["--exact", "a_vmm_waits_while_who_serves_the_bank_is_killed_and_started_again", "--nocapture"]);
    let mut client = client.env(CLIENT, &socket).spawn().unwrap();
    server.event("store_away", SOON);
    assert!(client.try_wait().unwrap().is_none(), "the VMM did not wait");
    let serving = serve();
    server.event("store_back", SOON);
    assert!(client.wait().unwrap().success());
    let left = server.event("left", SOON);
    assert_eq!(left["report"]["poisoned"].as_u64(), Some(0), "{left}");
    for process in [server, serving] {
        process.terminate();
        assert_eq!(process.wait(SOON).code(), Some(0));
    }
}

#[test]
fn serve_faults_says_what_to_do_about_a_wrong_machine_section_and_place() {
    let folder = tempfile::tempdir().unwrap();
    let (bank, ram, socket) = (folder.path().join("bank"), folder.path().join("ram"), folder.path().join("faults.sock"));
    std::fs::write(&ram, [1; 5000]).unwrap();
    assert_eq!(run(&["bank", "init", text(&bank)]).code(), Some(0));
    assert_eq!(run(&["bank", "deposit", text(&bank), "vm7", "--memory", text(&ram)]).code(), Some(0));
    let refused = |socket: &Path, more: &[&str], said: &[&str]| {
        let words = ["bank", "serve-faults", text(&bank), "--socket", text(socket)];
        run(&[&words, more].concat()).assert_refusal(1, said);
    };
    refused(&socket, &["--machine", "vm8"], &["cannot find vm8", "farbus bank list"]);
    refused(&socket, &["--machine", "vm7", "--section", "disk0"], &["has no section disk0", "farbus bank show"]);
    refused(&folder.path().join("no/such"), &["--machine", "vm7"], &["cannot listen", "choose a path"]);
    refused(&ram, &["--machine", "vm7"], &["cannot listen", "choose a path"]);
    assert_eq!(std::fs::read(&ram).unwrap().len(), 5000, "a file was taken for a dead socket");
}
