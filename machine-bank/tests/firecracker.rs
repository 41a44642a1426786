//! A client that does as Firecracker does when it loads a snapshot, in a process of its own, and others that do it wrongly.
//!
//! The client maps two regions, has their faults told to a userfaultfd, passes that with a list of the regions, and finds the machine's bytes there;
//! a client without a descriptor, with wrong JSON or with regions that overlap is refused, and the next one is served.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{deposit, machine, memory_bank};
use farbus_machine_bank::lazy::firecracker::{FaultSocket, Mapping, Told};
use farbus_machine_bank::lazy::{Area, Cache, FaultServer, Features, LazyOptions, LazyReport, Uffd, Watch};
use farbus_machine_bank::{Changes, PAGE};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

const CLIENT: &str = "FARBUS_TEST_FIRECRACKER_CLIENT";
const SEED: u64 = 21;
const PAGES: usize = 1000;
/// The first region's pages; the second has the others.
const SPLIT: usize = 605;

fn send(stream: &UnixStream, json: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    assert_eq!(sendmsg(stream, &[IoSlice::new(json)], &mut control, SendFlags::empty()).unwrap(), json.len());
}

fn mapping(area: &Area, offset: usize) -> Mapping {
    let page = Some(PAGE as u64);
    Mapping {
        base_host_virt_addr: area.address(),
        size: area.len(),
        offset: (offset * PAGE) as u64,
        page_size: page,
        page_size_kib: page,
    }
}

fn check(area: &Area, at: usize, expected: &[u8]) {
    let mut bytes = vec![0; PAGE];
    area.memory().read((at * PAGE) as u64, &mut bytes).unwrap();
    assert!(bytes == expected, "page {at} of the region at {:#x}", area.address());
}

/// What Firecracker does, as far as its handler sees it.
fn client(socket: &Path, manner: &str) {
    let bytes = machine(SEED, PAGES);
    let pages = bytes.as_chunks::<PAGE>().0;
    let uffd = Uffd::new(Features::EVENT_REMOVE).unwrap();
    let low = Area::anonymous((SPLIT * PAGE) as u64).unwrap();
    let high = Area::anonymous(((PAGES - SPLIT) * PAGE) as u64).unwrap();
    [&low, &high].into_iter().for_each(|area| area.watch(&uffd, Watch::MISSING).unwrap());
    let stream = UnixStream::connect(socket).unwrap();
    let json = serde_json::to_vec(&[mapping(&low, 0), mapping(&high, SPLIT)]).unwrap();
    send(&stream, &json, &[uffd.as_fd()]);
    // Versions differ in whether they keep it.
    if manner != "stay" {
        drop(stream);
    }
    if manner == "blocking" {
        let flags = rustix::fs::fcntl_getfl(&uffd).unwrap();
        rustix::fs::fcntl_setfl(&uffd, flags - rustix::fs::OFlags::NONBLOCK).unwrap();
    }
    if manner == "balloon" {
        balloon(&low, pages);
        println!("client: the balloon is done");
        return;
    }
    // A balloon takes pages: one that was there, and one of a group that never was.
    check(&low, 100, &pages[100]);
    low.give_back(100 * PAGE as u64, 2 * PAGE as u64).unwrap();
    low.give_back(400 * PAGE as u64, PAGE as u64).unwrap();
    for at in (0..SPLIT).rev() {
        if [100, 101, 400].contains(&at) { check(&low, at, &[0; PAGE]) } else { check(&low, at, &pages[at]) }
    }
    pages[SPLIT..].iter().enumerate().for_each(|(at, page)| check(&high, at, page));
    low.memory().write(0, b"alive").unwrap();
    println!("client: {PAGES} pages are right");
    if manner == "stay" {
        std::io::stdout().flush().unwrap();
        std::thread::sleep(Duration::from_secs(600));
    }
}

/// Pages are given back by one thread while others use them: each is what it was or zero, once zero it stays so, and nobody waits for ever.
fn balloon(area: &Area, pages: &[[u8; PAGE]]) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            (0..2000)
                .for_each(|n: u64| area.give_back(n * 37 % (SPLIT as u64 - 3) * PAGE as u64, (1 + n % 3) * PAGE as u64).unwrap())
        });
        for reader in 0..2 {
            scope.spawn(move || {
                let mut zero = [false; SPLIT];
                for n in 0..6000 {
                    let at = (n * 101 + reader * 300) % SPLIT;
                    let mut bytes = [0; PAGE];
                    area.memory().read((at * PAGE) as u64, &mut bytes).unwrap();
                    assert!(
                        bytes == [0; PAGE] || (bytes == pages[at] && !zero[at]),
                        "page {at}, which was given back: {}",
                        zero[at]
                    );
                    zero[at] |= bytes == [0; PAGE] && pages[at] != [0; PAGE];
                }
            });
        }
    });
}

fn start(socket: &Path, manner: &str) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "a_client_in_another_process_finds_its_memory_and_wrong_ones_are_refused", "--nocapture"]);
    command.env(CLIENT, socket).env("MANNER", manner).stdout(Stdio::piped()).spawn().unwrap()
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < end, "{what}: not within a minute");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_client_in_another_process_finds_its_memory_and_wrong_ones_are_refused() {
    if let Err(error) = Uffd::new(Features::EVENT_REMOVE) {
        eprintln!("a client in another process: not run: {error}");
        return;
    }
    if let Some(socket) = std::env::var_os(CLIENT) {
        client(Path::new(&socket), &std::env::var("MANNER").unwrap());
        return;
    }
    let (_, bank) = memory_bank();
    deposit(&bank, "vm", &machine(SEED, PAGES), Changes::HashAll);
    let entry = bank.find("vm").unwrap();
    let bank = Arc::new(bank);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("faults.sock");
    // A socket of a server that died is no hindrance, and one of a living server is.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let socket = FaultSocket::bind(&path).unwrap();
    assert!(FaultSocket::bind(&path).is_err());

    let server = FaultServer::start(Cache::new(64 << 20)).unwrap();
    let (end, ended, refused) = (AtomicBool::new(false), Mutex::new(Vec::<LazyReport>::new()), Mutex::new(Vec::<String>::new()));
    let told = |told: Told<'_>| match told {
        Told::Begun(_) => {}
        Told::Ended(_, machine) => ended.lock().unwrap().push(machine.report()),
        Told::Refused(_, why) => refused.lock().unwrap().push(why.to_string()),
    };
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| socket.serve(&server, &bank, &entry, &LazyOptions::default(), &end, &told));
        // Whoever panics below leaves a server that ends.
        struct End<'a>(&'a AtomicBool);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _end = End(&end);
        let silent = UnixStream::connect(&path).unwrap();

        let wrong = |why: &str, json: &[u8], fds: &[BorrowedFd<'_>]| {
            let before = refused.lock().unwrap().len();
            let stream = UnixStream::connect(&path).unwrap();
            send(&stream, json, fds);
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            // Among others: the server that came in vain looked whether this one lives.
            wait_for(why, || refused.lock().unwrap()[before..].iter().any(|said| said.contains(why)));
        };
        let uffd = Uffd::new(Features(0)).unwrap();
        let area = Area::anonymous(20 * PAGE as u64).unwrap();
        let good = mapping(&area, 0);
        let json = |mappings: &[Mapping]| serde_json::to_vec(mappings).unwrap();
        let other = std::fs::File::open("/dev/null").unwrap();
        wrong("0 descriptors", &json(&[good]), &[]);
        wrong("2 descriptors", &json(&[good]), &[uffd.as_fd(), uffd.as_fd()]);
        wrong("no userfaultfd", &json(&[good]), &[other.as_fd()]);
        wrong("no list of regions", b"{\"regions\":1}", &[uffd.as_fd()]);
        wrong("no list of regions", b"[{\"base_host_virt_addr\":-1}]", &[uffd.as_fd()]);
        wrong("closed the connection after 7 bytes", b"[{\"base", &[uffd.as_fd()]);
        wrong("0 regions", b"[]", &[uffd.as_fd()]);
        wrong("overlap", &json(&[good, Mapping { offset: 512 * PAGE as u64, ..good }]), &[uffd.as_fd()]);
        wrong("overlap", &json(&[good, Mapping { base_host_virt_addr: 4096, ..good }]), &[uffd.as_fd()]);
        wrong("which has", &json(&[Mapping { offset: (PAGES - 19) as u64 * PAGE as u64, ..good }]), &[uffd.as_fd()]);
        wrong("2097152 bytes", &json(&[Mapping { page_size: Some(2 << 20), ..good }]), &[uffd.as_fd()]);
        wrong("whole pages", &json(&[Mapping { size: 5000, ..good }]), &[uffd.as_fd()]);

        // One that is stopped with faults under way, and two that are served meanwhile.
        let mut stopped = start(&path, "stay");
        let pid = rustix::process::Pid::from_child(&stopped);
        std::thread::sleep(Duration::from_millis(30));
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        // One that makes its descriptor blocking, which may hang, and does not make others hang.
        let mut blocking = start(&path, "blocking");
        for (manner, right) in [("", "1000 pages are right"), ("balloon", "the balloon is done"), ("", "1000 pages are right")] {
            let output = start(&path, manner).wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && said.contains(right), "{manner}: {said}");
        }
        blocking.kill().unwrap();
        blocking.wait().unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
        stopped.kill().unwrap();
        stopped.wait().unwrap();
        wait_for("the end of three clients", || ended.lock().unwrap().len() >= 3);
        for report in ended.lock().unwrap().iter() {
            assert_eq!((report.stray, report.poisoned, report.stuck), (0, 0, 0), "{report:?}");
        }
        drop(silent);
        end.store(true, Ordering::Relaxed);
        serving.join().unwrap().unwrap();
    });
    assert!(
        !path.exists() || {
            drop(socket);
            !path.exists()
        },
        "the socket stays"
    );
}
