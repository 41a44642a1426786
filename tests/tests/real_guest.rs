//! An unmodified Linux guest in an unmodified QEMU on a borrowed drive: the whole machine, as its users run it.
//!
//! `farbus lend` and `farbus borrow` are processes, the guest's own nvme driver is the judge inside, e2fsck and a comparison of every file the
//! judge outside. The first run fetches QEMU and a kernel into a cache folder (`ci/guest/fetch`).

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use farbus_tests::Running;
use farbus_tests::guest::{Boot, Image, turn};
use farbus_tests::process::{AMPLE, text};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// Bytes of the pattern that `full` writes.
const PATTERN_BYTES: u64 = 64 << 20;

/// A lender and a borrower of one image.
struct Lab {
    folder: TempDir,
    image: Image,
    lender: Running,
}

impl Lab {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = Image::pack(folder.path().join("disk.img"));
        let link = format!("shm:{}/link", folder.path().display());
        let mut lender = Running::farbus(&["lend", "--json", "--device", &image.device(), "--listen", &link]);
        lender.event("listening", AMPLE);
        Self { folder, image, lender }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("vfio-user")
    }

    fn borrow(&mut self, more: &[&str]) -> Running {
        let link = format!("shm:{}/link", self.folder.path().display());
        let socket = self.socket();
        let mut args = vec!["borrow", "--json", "--from", &link, "--vfio-user", text(&socket)];
        args.extend(more);
        let mut borrower = Running::farbus(&args);
        borrower.event("serving", AMPLE);
        self.lender.event("lent", AMPLE);
        borrower
    }

    /// Ends both in order and fails unless both say so.
    fn end(mut self, borrower: Running) -> (TempDir, Image) {
        borrower.terminate();
        let end = borrower.wait(AMPLE);
        assert_eq!(end.code(), Some(0), "{end:?}");
        end.assert_no_panic();
        self.lender.event("returned", AMPLE);
        self.lender.terminate();
        let end = self.lender.wait(AMPLE);
        assert_eq!(end.code(), Some(0), "{end:?}");
        end.assert_no_panic();
        (self.folder, self.image)
    }
}

fn boot<'a>(socket: &'a Path, scenario: &'a str) -> Boot<'a> {
    Boot { socket, scenario, share: true, when: None }
}

fn first_mib_sum(image: &Image) -> String {
    let mut bytes = vec![0; 1 << 20];
    std::fs::File::open(&image.path).unwrap().read_exact(&mut bytes).unwrap();
    Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn an_unmodified_guest_mounts_verifies_writes_and_resets_a_borrowed_drive() {
    let _turn = turn();
    let mut lab = Lab::new();
    let borrower = lab.borrow(&[]);
    let socket = lab.socket();
    let verdict = boot(&socket, "full").run();
    verdict.assert_ok();
    assert_eq!(verdict.number("drive", "bytes"), 256 << 20);
    assert!(verdict.number("checksums", "files") >= 1000);
    assert_eq!(verdict.number("written", "bytes"), PATTERN_BYTES);
    assert_eq!(verdict.number("read-back", "bytes"), PATTERN_BYTES);
    assert!(verdict.number("interrupts", "count") > 0);
    verdict.passed("unmount");

    let reset = verdict.passed("reset");
    let (reads, writes) = reset["inflight"].split_once('+').unwrap();
    let in_flight = reads.parse::<u64>().unwrap() + writes.parse::<u64>().unwrap();
    assert!(in_flight > 0, "the reset met no IO: {reset:?}");
    let rounds = |key: &str| reset[key].parse::<u64>().unwrap();
    assert!(rounds("rounds") > rounds("rounds_before"), "the IO did not go on after the reset: {reset:?}");

    let (_folder, image) = lab.end(borrower);
    image.judge(true);
}

#[test]
fn an_unmodified_guest_uses_a_drive_that_is_lent_on_by_a_client_of_its_vfio_user_server() {
    let _turn = turn();
    let mut lab = Lab::new();
    let borrower = lab.borrow(&[]);
    let (device, link) = (format!("vfio-user:{}", text(&lab.socket())), format!("shm:{}/second", lab.folder.path().display()));
    let mut second = Running::farbus(&["lend", "--json", "--device", &device, "--listen", &link]);
    second.event("listening", AMPLE);
    let socket = lab.folder.path().join("last");
    let mut last = Running::farbus(&["borrow", "--json", "--from", &link, "--vfio-user", text(&socket)]);
    last.event("serving", AMPLE);
    let verdict = boot(&socket, "full").run();
    verdict.assert_ok();
    assert!(verdict.number("checksums", "files") >= 1000);
    assert_eq!(verdict.number("read-back", "bytes"), PATTERN_BYTES);
    assert!(verdict.number("interrupts", "count") > 0);
    verdict.passed("reset");
    for running in [last, second] {
        running.terminate();
        let end = running.wait(AMPLE);
        assert_eq!(end.code(), Some(0), "{end:?}");
        end.assert_no_panic();
    }
    let (_folder, image) = lab.end(borrower);
    image.judge(true);
}

#[test]
fn a_lender_killed_mid_io_gives_the_guest_an_error_and_a_clean_power_off() {
    let _turn = turn();
    let mut lab = Lab::new();
    let mut borrower = lab.borrow(&[]);
    let socket = lab.socket();
    let when = Some(("io-running", format!("kill -9 {}", lab.lender.id())));
    let verdict = Boot { when, ..boot(&socket, "lender-dies") }.run();
    verdict.assert_ok();
    // The driver's own limit is set to 4 s; it needs a few of them.
    assert!(verdict.number("io-error", "after_ms") < 60_000);
    assert!(verdict.number("no-hang", "late_ms") < 30_000);
    assert!(lab.lender.has_ended());

    let reason = borrower.event("ended", AMPLE)["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("lender") && reason.contains("gone"), "who ended it? {reason:?}");
    let end = borrower.wait(AMPLE);
    // A device that was lost is a failure, of its own kind.
    assert_eq!(end.code(), Some(3), "{end:?}");
    end.assert_no_panic();
    lab.image.judge(false);
}

#[test]
fn a_lender_killed_and_started_again_five_times_mid_io_costs_a_linux_guest_a_pause_and_nothing_else() {
    const KILLS: usize = 5;
    let _turn = turn();
    let mut lab = Lab::new();
    let mut borrower = lab.borrow(&["--reconnect", "60s"]);
    let socket = lab.socket();
    let folder = lab.folder.path().to_owned();
    let (script, last) = (folder.join("restarts"), folder.join("last-lender"));
    let lend = format!(
        "{} lend --json --device {} --listen shm:{}/link",
        farbus_tests::program::farbus().display(),
        lab.image.device(),
        folder.display()
    );
    let steps = format!(
        "pid={}\nfor i in $(seq {KILLS}); do\n  kill -9 $pid\n  sleep 0.2\n  {lend} >/dev/null 2>&1 &\n  pid=$!\n  echo $pid >{}\n  sleep 2\ndone\n",
        lab.lender.id(),
        last.display()
    );
    std::fs::write(&script, steps).unwrap();
    let when = Some(("io-running", format!("setsid sh {} >/dev/null 2>&1 &", script.display())));
    let verdict = Boot { when, ..boot(&socket, "lender-restarts") }.run();
    verdict.assert_ok();
    println!("{} rounds of IO over {KILLS} kills", verdict.number("went-on", "rounds"));
    for _ in 0..KILLS {
        let away = borrower.event("lender-back", AMPLE)["away_us"].as_u64().unwrap();
        println!("away for {away} us");
    }
    assert!(lab.lender.has_ended());
    borrower.terminate();
    let end = borrower.wait(AMPLE);
    assert_eq!(end.code(), Some(0), "{end:?}");
    end.assert_no_panic();
    let pid: i32 = std::fs::read_to_string(&last).unwrap().trim().parse().unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), rustix::process::Signal::TERM).unwrap();
}

#[test]
fn memory_that_is_not_shared_is_found_and_served_by_messages() {
    let _turn = turn();
    let mut lab = Lab::new();
    let borrower = lab.borrow(&[]);
    let socket = lab.socket();
    let verdict = Boot { share: false, ..boot(&socket, "smoke") }.run();
    verdict.assert_ok();
    assert_eq!(verdict.passed("raw-read")["sha256"], first_mib_sum(&lab.image));
    borrower.complaint("share=on", AMPLE);
    let (_folder, image) = lab.end(borrower);
    image.judge(false);
}

#[test]
fn memory_that_is_not_shared_is_refused_with_what_to_do_and_the_next_vm_is_served() {
    let _turn = turn();
    let mut lab = Lab::new();
    let borrower = lab.borrow(&["--unshared", "refuse"]);
    let socket = lab.socket();
    let started = Instant::now();
    let verdict = Boot { share: false, ..boot(&socket, "smoke") }.run();
    assert!(!verdict.end.status.success(), "a drive over memory that is not the guest's: {}", verdict.end.stdout);
    assert_ne!(verdict.end.code(), Some(124), "it hung: {}", verdict.end.stdout);
    assert!(started.elapsed() < Duration::from_secs(120), "it took {:?}", started.elapsed());
    assert!(!verdict.end.stdout.contains("pass raw-read"), "{}", verdict.end.stdout);
    borrower.complaint("share=on", AMPLE);

    // The same process, and memory as it should be.
    let verdict = boot(&socket, "smoke").run();
    verdict.assert_ok();
    assert_eq!(verdict.passed("raw-read")["sha256"], first_mib_sum(&lab.image));
    let (_folder, image) = lab.end(borrower);
    image.judge(false);
}

#[test]
fn a_second_vm_gets_the_drive_after_the_first_left() {
    let _turn = turn();
    let mut lab = Lab::new();
    let borrower = lab.borrow(&[]);
    let socket = lab.socket();
    for _ in 0..2 {
        let verdict = boot(&socket, "smoke").run();
        verdict.assert_ok();
        assert_eq!(verdict.passed("raw-read")["sha256"], first_mib_sum(&lab.image));
    }
    let (_folder, image) = lab.end(borrower);
    image.judge(false);
}
