//! Every bad input that a user, a peer or a guest's VMM can give the `farbus` program, through the program itself.
//!
//! `farbus lend --device nvme:odd.img` over 1,000 bytes exits with status 1 and says that this is not a multiple of 512; a peer that sends
//! an HTTP request to the link socket is turned away, and the borrower after it is served.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::io::{Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use farbus_pci_shim::vfio_user::client::Client;
use farbus_tests::Running;
use farbus_tests::process::{AMPLE, run, text};
use farbus_transport::link::hello::{Hello, Role, SPOKEN, Versions};
use farbus_transport::shm::{ShmOptions, connect};
use farbus_transport::{Fabric, Op, Signal};
use serde_json::Value;
use tempfile::TempDir;

/// A folder with one good image, `disk.img`, of 8 MiB.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        place.image("disk.img", 8 << 20);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn name(&self, name: &str) -> String {
        text(&self.path(name)).to_owned()
    }

    fn image(&self, name: &str, bytes: u64) {
        std::fs::File::create(self.path(name)).unwrap().set_len(bytes).unwrap();
    }

    fn device(&self, image: &str) -> String {
        format!("nvme:{}", self.name(image))
    }

    fn link(&self) -> String {
        format!("shm:{}", self.name("link"))
    }

    fn lend(&self) -> Running {
        let mut lender = Running::farbus(&["lend", "--json", "--device", &self.device("disk.img"), "--listen", &self.link()]);
        lender.event("listening", AMPLE);
        lender
    }

    fn borrow(&self, socket: &str) -> Running {
        let mut borrower = Running::farbus(&["borrow", "--json", "--from", &self.link(), "--vfio-user", &self.name(socket)]);
        borrower.event("serving", AMPLE);
        borrower
    }

    /// A whole round: borrow, look at the device as a VMM would, leave in order.
    fn assert_served(&self, lender: &mut Running) {
        let borrower = self.borrow("next");
        lender.event("lent", AMPLE);
        assert_nvme(&mut self.vmm("next"));
        borrower.terminate();
        let end = borrower.wait(AMPLE);
        assert_eq!(end.code(), Some(0), "{end:?}");
        end.assert_no_panic();
        lender.event("returned", AMPLE);
    }

    fn vmm(&self, socket: &str) -> Client {
        Client::open(self.path(socket), AMPLE).unwrap()
    }
}

const CONFIG_REGION: u32 = 7;

fn class_code(vmm: &mut Client) -> [u8; 3] {
    let mut class = [0; 3];
    for (byte, offset) in class.iter_mut().zip(9..) {
        vmm.region_read(CONFIG_REGION, offset, std::slice::from_mut(byte)).unwrap();
    }
    class
}

/// NVMe's version register (NVMe 1.4, section 3.1.2), through the lender.
fn version(vmm: &mut Client) -> u32 {
    let mut bytes = [0; 4];
    vmm.region_read(0, 8, &mut bytes).unwrap();
    u32::from_le_bytes(bytes)
}

fn assert_nvme(vmm: &mut Client) {
    assert_eq!(class_code(vmm), [0x02, 0x08, 0x01]);
    assert_eq!(version(vmm), 0x0001_0400);
}

fn reason(event: &Value) -> String {
    event["reason"].as_str().unwrap().to_owned()
}

fn assert_end_in_order(running: Running) {
    running.terminate();
    let end = running.wait(AMPLE);
    assert_eq!(end.code(), Some(0), "{end:?}");
    end.assert_no_panic();
}

#[test]
fn help_lists_every_command_and_every_command_explains_itself() {
    let end = run(&["--help"]);
    assert_eq!(end.code(), Some(0));
    for command in ["lend", "borrow", "demo", "devices", "bench"] {
        assert!(end.stdout.contains(command), "{}", end.stdout);
        let help = run(&[command, "--help"]);
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
    assert!(run(&["devices"]).stdout.contains("shm"));
}

#[test]
fn a_device_that_does_not_exist_is_refused_with_those_that_do() {
    for wrong in ["", "floppy:a.img", "nvme", "nvme:", "nvme:a.img,fast", "nvme:a.img,latency=80", "edu:x"] {
        run(&["lend", "--device", wrong, "--listen", "shm:unused"]).assert_refusal(2, &["nvme"]);
    }
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
fn a_second_borrower_is_told_that_the_device_is_lent() {
    let place = Place::new();
    let mut lender = place.lend();
    let first = place.borrow("first");
    lender.event("lent", AMPLE);
    let mut vmm = place.vmm("first");
    for _ in 0..3 {
        run(&["borrow", "--from", &place.link(), "--vfio-user", &place.name("second")])
            .assert_refusal(1, &["lent to another borrower", "try again"]);
        assert!(!place.path("second").exists());
        assert_nvme(&mut vmm);
    }
    assert_end_in_order(first);
    lender.event("returned", AMPLE);
    place.assert_served(&mut lender);
}

/// What a stranger does on the link socket; the connection is closed after it.
fn strangers() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let hello = |versions| Hello { versions, role: Role::Borrower, features: 0, epoch: 0, description: b"abc".to_vec() };
    let good = hello(SPOKEN).encode().unwrap();
    let newer = hello(Versions::new(7, 9).unwrap()).encode().unwrap();
    let lender = Hello { role: Role::Lender, ..hello(SPOKEN) }.encode().unwrap();
    let mut long = good.clone();
    long[32..36].copy_from_slice(&u32::MAX.to_le_bytes());
    vec![
        ("another version", newer, "versions 7 to 9"),
        ("another lender", lender, "both sides are the lender"),
        ("http", b"GET / HTTP/1.1\r\nHost: example.org\r\nAccept: */*\r\n\r\n".to_vec(), "not a farbus peer"),
        ("a wild length", long, "over the limit"),
        ("no byte", Vec::new(), "closed the connection"),
        ("half a header", good[..20].to_vec(), "closed the connection after 20"),
        ("half a description", good[..good.len() - 1].to_vec(), "closed the connection"),
        ("a hello and no more", good.clone(), ""),
        ("a hello and noise", [good.as_slice(), &[0xa5; 500]].concat(), ""),
    ]
}

#[test]
fn strangers_on_the_link_socket_are_turned_away_and_the_next_borrower_is_served() {
    let place = Place::new();
    let mut lender = place.lend();
    for (who, bytes, why) in strangers() {
        let mut stranger = UnixStream::connect(place.path("link")).unwrap();
        // The lender may be faster and be gone.
        let _sent = stranger.write_all(&bytes);
        let _shut = stranger.shutdown(std::net::Shutdown::Write);
        let mut seen = Vec::new();
        let _reset = stranger.read_to_end(&mut seen);
        drop(stranger);
        let said = reason(&lender.event("returned", AMPLE));
        assert!(said.contains(why), "{who}: {said}");
        place.assert_served(&mut lender);
    }
    assert_end_in_order(lender);
}

#[test]
fn a_stranger_that_says_nothing_is_given_up() {
    let place = Place::new();
    let mut lender = place.lend();
    let silent = UnixStream::connect(place.path("link")).unwrap();
    let started = Instant::now();
    let said = reason(&lender.event("returned", AMPLE));
    assert!(said.contains("no complete hello"), "{said}");
    assert!(started.elapsed() < Duration::from_secs(10));
    place.assert_served(&mut lender);
    drop(silent);
}

#[test]
fn a_borrower_that_breaks_the_protocol_after_its_hello_is_dropped() {
    let place = Place::new();
    let mut lender = place.lend();
    let hello = Hello { versions: SPOKEN, role: Role::Borrower, features: 0, epoch: 0, description: Vec::new() };
    for message in [&b""[..], b"\xff\xff", &[1, 9, 4, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]] {
        let mut link = connect(place.path("link"), &hello, ShmOptions::default()).unwrap().fabric;
        lender.event("lent", AMPLE);
        link.post(Signal::No, Op::Send { message }).unwrap();
        link.flush();
        let said = reason(&lender.event("returned", AMPLE));
        assert!(said.contains("broke the protocol"), "{said}");
        place.assert_served(&mut lender);
    }
}

#[test]
fn a_killed_borrower_gives_the_device_back() {
    let place = Place::new();
    let mut lender = place.lend();
    for with_vmm in [false, true] {
        let borrower = place.borrow("vmm");
        lender.event("lent", AMPLE);
        let vmm = with_vmm.then(|| place.vmm("vmm"));
        borrower.kill();
        assert_eq!(borrower.wait(AMPLE).signal(), Some(9));
        let said = reason(&lender.event("returned", AMPLE));
        assert!(said.contains("gone") || said.contains("closed"), "{said}");
        drop(vmm);
        place.assert_served(&mut lender);
    }
}

#[test]
fn a_killed_lender_ends_the_borrower_which_says_so() {
    let place = Place::new();
    let mut lender = place.lend();
    let mut borrower = place.borrow("vmm");
    lender.event("lent", AMPLE);
    lender.kill();
    let said = reason(&borrower.event("ended", AMPLE));
    assert!(said.contains("lender") && said.contains("gone"), "{said}");
    borrower.wait(AMPLE).assert_no_panic();
    assert!(!place.path("vmm").exists());
}

#[test]
fn a_killed_lender_is_a_dead_slot_to_the_vmm_until_that_leaves() {
    let place = Place::new();
    let mut lender = place.lend();
    let mut borrower = place.borrow("vmm");
    lender.event("lent", AMPLE);
    let mut vmm = place.vmm("vmm");
    assert_nvme(&mut vmm);
    lender.kill();
    drop(lender);
    let started = Instant::now();
    while version(&mut vmm) != u32::MAX {
        assert!(started.elapsed() < AMPLE, "a register of a dead device still has a value");
    }
    vmm.region_write(0, 0x14, &[0; 4]).unwrap();
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    drop(vmm);
    let said = reason(&borrower.event("ended", AMPLE));
    assert!(said.contains("lender"), "{said}");
    borrower.wait(AMPLE).assert_no_panic();
}

#[test]
fn a_vmm_that_sends_noise_is_sent_away_and_the_next_is_served() {
    let place = Place::new();
    let mut lender = place.lend();
    let borrower = place.borrow("vmm");
    lender.event("lent", AMPLE);
    for noise in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 300], &[0; 16]] {
        let mut stranger = UnixStream::connect(place.path("vmm")).unwrap();
        // The server may be faster and be gone.
        let _sent = stranger.write_all(noise);
        let _shut = stranger.shutdown(std::net::Shutdown::Write);
        let mut seen = Vec::new();
        let _reset = stranger.read_to_end(&mut seen);
        drop(stranger);
        assert_nvme(&mut place.vmm("vmm"));
    }
    assert_end_in_order(borrower);
    lender.event("returned", AMPLE);
}

#[test]
fn sigterm_ends_both_in_order_and_removes_their_sockets() {
    let place = Place::new();
    for lender_first in [false, true] {
        let mut lender = place.lend();
        let borrower = place.borrow("vmm");
        lender.event("lent", AMPLE);
        let mut vmm = place.vmm("vmm");
        assert_nvme(&mut vmm);
        assert!(is_socket(&place.path("link")) && is_socket(&place.path("vmm")));
        if lender_first {
            assert_end_in_order(lender);
            assert_eq!(version(&mut vmm), u32::MAX);
            assert_end_in_order(borrower);
        } else {
            assert_end_in_order(borrower);
            lender.event("returned", AMPLE);
            assert_end_in_order(lender);
        }
        drop(vmm);
        assert!(!place.path("link").exists() && !place.path("vmm").exists());
    }
}

fn is_socket(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket())
}

#[test]
fn once_ends_the_lender_after_its_first_borrower() {
    let place = Place::new();
    let args = ["lend", "--json", "--once", "--device", &place.device("disk.img"), "--listen", &place.link()];
    let mut lender = Running::farbus(&args);
    lender.event("listening", AMPLE);
    // Somebody who only knocks is no borrower.
    drop(UnixStream::connect(place.path("link")).unwrap());
    lender.event("returned", AMPLE);
    place.assert_served(&mut lender);
    let end = lender.wait(AMPLE);
    assert_eq!(end.code(), Some(0), "{end:?}");
    assert!(!place.path("link").exists());
}

#[test]
fn every_line_of_json_output_is_an_object_with_its_event() {
    let place = Place::new();
    let mut lender = place.lend();
    let borrower = place.borrow("vmm");
    lender.event("lent", AMPLE);
    borrower.terminate();
    let borrower = borrower.wait(AMPLE);
    lender.event("returned", AMPLE);
    lender.terminate();
    let lender = lender.wait(AMPLE);
    let events = |text: &str| -> Vec<String> {
        text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["event"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(events(&lender.stdout), ["listening", "lent", "returned", "ended"]);
    assert_eq!(events(&borrower.stdout), ["serving", "ended"]);
}
