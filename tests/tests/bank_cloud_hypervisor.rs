//! `farbus bank deposit` and `withdraw` with `--cloud-hypervisor`, beside another end that is played here; what it says wrong is said with what to do.
//!
//! A machine of one slot is handed over at a socket, and handed to another end that asks for its second page only.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use farbus_tests::process::{Running, run, text};
use rustix::fs::MemfdFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);
const PAGE: usize = 4096;
const PAGES: usize = 40;
const CONFIG: &[u8] =
    br#"{"memory_manager_data":{"guest_ram_mappings":[{"slot":0,"gpa":0,"size":163840,"zone_id":"m","file_offset":0}]}}"#;

fn memory() -> Vec<u8> {
    (0..PAGES * PAGE / 4).flat_map(|n| ((n / 100) as u32).wrapping_mul(2_654_435_761).to_le_bytes()).collect()
}

fn header(word: u16, length: usize) -> Vec<u8> {
    [&word.to_le_bytes()[..], &[0; 6], &(length as u64).to_le_bytes()].concat()
}

fn connect(path: &Path) -> UnixStream {
    let begun = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(SOON)).unwrap();
                return stream;
            }
            Err(error) => assert!(begun.elapsed() < SOON, "{}: {error}", path.display()),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn ask(stream: &mut UnixStream, command: u16, payload: &[u8]) -> u16 {
    stream.write_all(&[&header(command, payload.len())[..], payload].concat()).unwrap();
    answer(stream)
}

fn answer(stream: &mut UnixStream) -> u16 {
    let mut answer = [0; 16];
    stream.read_exact(&mut answer).unwrap();
    u16::from_le_bytes([answer[0], answer[1]])
}

/// A VMM that hands its machine over; says whether that was taken.
fn hand_over(path: &Path, config: &[u8]) -> u16 {
    let file = File::from(rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(&memory(), 0).unwrap();
    let mut stream = connect(path);
    assert_eq!(ask(&mut stream, 1, &[]), 1);
    stream.write_all(&header(7, 4)).unwrap();
    let (fds, mut space) = ([file.as_fd()], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(&stream, &[IoSlice::new(&[0; 4])], &mut control, SendFlags::empty()).unwrap();
    assert_eq!((answer(&mut stream), ask(&mut stream, 2, config), ask(&mut stream, 3, b"{}")), (1, 1, 1));
    ask(&mut stream, 8, &[])
}

/// A VMM that waits for a machine, and asks for its second page.
fn wait_for_one(listener: &UnixListener) {
    let (mut stream, _) = listener.accept().unwrap();
    let mut memory_fd = None;
    for expected in [1, 7, 2, 3, 8] {
        let mut request = [0; 16];
        stream.read_exact(&mut request).unwrap();
        assert_eq!(request[0], expected);
        if expected == 7 {
            let (mut number, mut space) = ([0; 4], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
            let mut control = RecvAncillaryBuffer::new(&mut space);
            recvmsg(&stream, &mut [IoSliceMut::new(&mut number)], &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
            memory_fd = control.drain().find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut rights) => rights.next().map(File::from),
                _ => None,
            });
        } else {
            stream.read_exact(&mut vec![0; u64::from_le_bytes(*request[8..].first_chunk().unwrap()) as usize]).unwrap();
        }
        stream.write_all(&header(1, 0)).unwrap();
    }
    let (mut faults, _) = listener.accept().unwrap();
    faults.read_exact(&mut [0; 2]).unwrap();
    let page = PAGE as u64;
    assert_eq!(ask(&mut faults, 9, &[page.to_le_bytes(), page.to_le_bytes()].concat()), 1);
    let mut there = [0; PAGE];
    memory_fd.unwrap().read_exact_at(&mut there, page).unwrap();
    assert!(there == memory()[PAGE..2 * PAGE]);
}

fn bank(folder: &Path) -> PathBuf {
    let bank = folder.join("bank");
    assert_eq!(run(&["bank", "init", text(&bank)]).code(), Some(0));
    bank
}

#[test]
fn a_machine_is_taken_over_with_its_disk_and_handed_to_another_on_demand() {
    let folder = tempfile::tempdir().unwrap();
    let (bank, path, disk) = (bank(folder.path()), folder.path().join("save"), folder.path().join("disk"));
    std::fs::write(&disk, [3; 9000]).unwrap();
    let words = ["bank", "deposit", text(&bank), "vm7", "--cloud-hypervisor", text(&path), "--disk", text(&disk), "--json"];
    let taken = Running::farbus(&words);
    assert_eq!(hand_over(&path, CONFIG), 1);
    let end = taken.wait(SOON);
    assert_eq!(end.code(), Some(0), "{}", end.stderr);
    assert_eq!(serde_json::from_str::<Value>(&end.stdout).unwrap()["machine"], "vm7@1");
    assert!(!path.exists(), "its socket stays");

    let path = folder.path().join("restore");
    let listener = UnixListener::bind(&path).unwrap();
    let out = format!("disk0={}", folder.path().join("out").display());
    let words =
        ["bank", "withdraw", text(&bank), "vm7", "--cloud-hypervisor", text(&path), "--on-demand", "--section", &out, "--json"];
    let handed = Running::farbus(&words);
    wait_for_one(&listener);
    let end = handed.wait(SOON);
    assert_eq!(end.code(), Some(0), "{}", end.stderr);
    let report: Value = serde_json::from_str(&end.stdout).unwrap();
    assert_eq!((&report["cloud_hypervisor"]["faults"], &report["cloud_hypervisor"]["placed"]), (&1.into(), &16.into()), "{report}");
    assert!(std::fs::read(folder.path().join("out")).unwrap() == [3; 9000]);
}

#[test]
fn what_goes_wrong_is_said_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let (bank, path, file) = (bank(folder.path()), folder.path().join("save"), folder.path().join("file"));
    std::fs::write(&file, "text").unwrap();
    let taken = Running::farbus(&["bank", "deposit", text(&bank), "vm7", "--cloud-hypervisor", text(&path)]);
    assert_eq!(hand_over(&path, b"{}"), 2);
    taken.wait(SOON).assert_refusal(1, &["its configuration", "shared=on"]);
    run(&["bank", "deposit", text(&bank), "vm7", "--cloud-hypervisor", text(&file)])
        .assert_refusal(1, &["cannot listen", "choose a path"]);
    run(&["bank", "deposit", text(&bank), "vm7", "--cloud-hypervisor", "x", "--memory", "y"])
        .assert_refusal(2, &["cannot be used"]);
    assert_eq!(run(&["bank", "deposit", text(&bank), "vm7", "--memory", text(&file)]).code(), Some(0));
    let withdraw = ["bank", "withdraw", text(&bank), "vm7", "--cloud-hypervisor", text(&path)];
    run(&withdraw).assert_refusal(1, &["not saved by Cloud Hypervisor", "--to DIR"]);
    run(&["bank", "withdraw", text(&bank), "vm7", "--to", "x", "--on-demand"]).assert_refusal(2, &["--cloud-hypervisor"]);
}
