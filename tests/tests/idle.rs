//! A link that has nothing to do costs nothing, and whoever waits for it can do so with tokio or with epoll.
//!
//! A lender whose borrower is silent for a second uses less than 5 ms of CPU and is not scheduled once more than it must; the first register
//! read after that is answered all the same.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use farbus_pci_shim::vfio_user::client::Client;
use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::lender::{LenderSession, PollOptions};
use farbus_remote_dma::model::nvme::{Nvme, NvmeOptions};
use farbus_remote_dma::wait::Waker;
use farbus_remote_dma::{Attachment, Backend, BarAddress, Host, Mediation, Ticket, Width};
use farbus_tests::Running;
use farbus_transport::shm::{ShmFabric, ShmOptions};
use farbus_transport::{CloseReason, Event, Events, Fabric, Message, Nanos, Op, Signal};
use rustix::event::epoll;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

const SOON: Duration = Duration::from_millis(50);
const AMPLE: Duration = Duration::from_secs(20);
const CPU_LIMIT: Duration = Duration::from_millis(5);
/// Wake-ups in a silent second that are not the link's doing: none of ours, and room for the kernel's own.
const SWITCH_LIMIT: u64 = 2;

fn pair() -> (ShmFabric, ShmFabric) {
    ShmFabric::pair(ShmOptions::default()).unwrap()
}

fn say(fabric: &mut ShmFabric, text: &[u8]) {
    fabric.post(Signal::No, Op::Send { message: text }).unwrap();
    fabric.flush();
}

fn heard(fabric: &mut ShmFabric) -> Vec<Event> {
    let mut events = Events::new();
    fabric.poll(Nanos::now(), &mut events);
    events.as_slice().to_vec()
}

fn message(text: &[u8]) -> Event {
    Event::Message(Message::new(text).unwrap())
}

/// The descriptor as a runtime wants it: owned. It stands for the same open file.
fn wake_fd(fabric: &ShmFabric) -> OwnedFd {
    fabric.wake_fd().unwrap().try_clone_to_owned().unwrap()
}

#[tokio::test(flavor = "current_thread")]
async fn a_link_is_waited_for_with_tokio() {
    let (mut lender, mut borrower) = pair();
    // SAFETY: `wake_fd` gives a descriptor of its own, which is open until the `AsyncFd` that owns it is dropped, and is always the same.
    let waiting = unsafe { AsyncFd::register(wake_fd(&borrower)) }.unwrap();
    for round in 0..20_u8 {
        assert!(borrower.arm());
        assert!(timeout(SOON, waiting.readable()).await.is_err(), "round {round}: woken by nothing");
        let sent = round.to_le_bytes();
        say(&mut lender, &sent);
        let mut ready = timeout(AMPLE, waiting.readable()).await.expect("not woken").unwrap();
        assert_eq!(heard(&mut borrower), [message(&sent)]);
        ready.clear_ready();
    }
    assert!(borrower.arm());
    drop(lender);
    let _ready = timeout(AMPLE, waiting.readable()).await.expect("the end wakes nobody").unwrap();
    assert!(matches!(heard(&mut borrower)[..], [Event::Closed(_)]));
}

#[tokio::test(flavor = "current_thread")]
async fn a_message_between_the_last_poll_and_arming_is_not_slept_through() {
    let (mut lender, mut borrower) = pair();
    assert!(heard(&mut borrower).is_empty());
    say(&mut lender, b"now");
    assert!(!borrower.arm(), "there is something to poll");
    assert_eq!(heard(&mut borrower), [message(b"now")]);
}

#[test]
fn a_link_is_waited_for_with_epoll() {
    let (mut lender, mut borrower) = pair();
    let set = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let fd = wake_fd(&borrower);
    epoll::add(&set, fd.as_fd(), epoll::EventData::new_u64(7), epoll::EventFlags::IN).unwrap();
    let wait = |limit: Duration| {
        let mut events = Vec::with_capacity(4);
        let limit = rustix::event::Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
        epoll::wait(&set, rustix::buffer::spare_capacity(&mut events), Some(&limit)).unwrap();
        events.iter().map(|event| event.data.u64()).collect::<Vec<_>>()
    };
    for round in 0..20_u8 {
        assert!(borrower.arm());
        assert!(wait(Duration::from_millis(5)).is_empty(), "round {round}: woken by nothing");
        let sent = round.to_le_bytes();
        say(&mut lender, &sent);
        assert_eq!(wait(AMPLE), [7]);
        assert_eq!(wait(AMPLE), [7], "level-triggered until it is polled");
        assert_eq!(heard(&mut borrower), [message(&sent)]);
    }
    assert!(borrower.arm());
    drop(lender);
    assert_eq!(wait(AMPLE), [7]);
}

struct Nobody;

impl Host for Nobody {
    fn interrupt(&mut self, vector: u16) {
        panic!("vector {vector} of an idle device");
    }
    fn pin(&mut self, asserted: bool) {
        panic!("pin {asserted} of an idle device");
    }
    fn mediate(&mut self, _ticket: Ticket, mediation: Mediation<'_>) {
        panic!("{mediation:?} of an idle device");
    }
}

/// CPU time and voluntary context switches of a thread of this process (proc_pid_schedstat, proc_pid_status(5)).
fn cost(thread: i32) -> (Duration, u64) {
    let about = |file: &str| std::fs::read_to_string(format!("/proc/self/task/{thread}/{file}")).unwrap();
    let on_cpu_ns: u64 = about("schedstat").split_whitespace().next().unwrap().parse().unwrap();
    let status = about("status");
    let switches = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
    (Duration::from_nanos(on_cpu_ns), switches.trim().parse().unwrap())
}

#[test]
fn an_idle_lender_uses_no_cpu_and_is_not_woken() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let nvme: Box<dyn Backend> = Box::new(Nvme::open(&image, NvmeOptions::default()).unwrap());
    let description = nvme.description().clone();
    let (lender, borrower) = pair();
    let stop = Waker::new().unwrap();
    let stopped = stop.clone();
    let (tell, told) = std::sync::mpsc::channel();
    let lender = std::thread::spawn(move || {
        tell.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
        let mut session = LenderSession::new(lender, nvme).map_err(|(error, _)| error).unwrap();
        let reason = session.run(PollOptions::default(), &stopped);
        session.end().unwrap();
        reason
    });
    let thread = told.recv().unwrap();
    let options = BorrowerOptions { read_deadline: AMPLE, ..BorrowerOptions::default() };
    let mut session = BorrowerSession::new(borrower, description, options).unwrap();
    let version =
        |session: &mut BorrowerSession<ShmFabric>| session.bar_read(BarAddress { bar: 0, offset: 8 }, Width::B4, &mut Nobody);
    assert_eq!(version(&mut session), 0x0001_0400);

    // It has polled for 50 us and sleeps.
    std::thread::sleep(Duration::from_millis(100));
    let (cpu_before, switches_before) = cost(thread);
    let started = Instant::now();
    std::thread::sleep(Duration::from_secs(1));
    let (cpu_after, switches_after) = cost(thread);
    let (cpu, switches) = (cpu_after - cpu_before, switches_after - switches_before);
    println!("idle for {:?}: {cpu:?} of CPU, {switches} wake-ups", started.elapsed());
    assert!(cpu < CPU_LIMIT, "{cpu:?} of CPU in an idle second");
    assert!(switches <= SWITCH_LIMIT, "{switches} wake-ups in an idle second");

    assert_eq!(version(&mut session), 0x0001_0400, "it sleeps for ever");
    stop.set();
    assert_eq!(lender.join().unwrap(), CloseReason::Local);
}

/// Voluntary context switches of all threads of a process.
fn switches_of(process: u32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    tasks
        .map(|task| {
            let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let switches = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
            switches.trim().parse::<u64>().unwrap()
        })
        .sum()
}

#[test]
fn lend_and_borrow_sleep_while_nobody_does_anything() {
    let folder = tempfile::tempdir().unwrap();
    let name = |file: &str| folder.path().join(file).to_str().unwrap().to_owned();
    std::fs::File::create(name("disk.img")).unwrap().set_len(1 << 20).unwrap();
    let (device, link) = (format!("nvme:{}", name("disk.img")), format!("shm:{}", name("link")));
    let mut lender = Running::farbus(&["lend", "--json", "--device", &device, "--listen", &link]);
    lender.event("listening", AMPLE);
    let mut borrower = Running::farbus(&["borrow", "--json", "--from", &link, "--vfio-user", &name("vmm")]);
    borrower.event("serving", AMPLE);
    for with_vmm in [false, true] {
        let vmm = with_vmm.then(|| Client::open(name("vmm"), AMPLE).unwrap());
        std::thread::sleep(Duration::from_millis(200));
        let before = [lender.id(), borrower.id()].map(switches_of);
        std::thread::sleep(Duration::from_secs(1));
        let after = [lender.id(), borrower.id()].map(switches_of);
        for (who, (before, after)) in ["lend", "borrow"].into_iter().zip(before.into_iter().zip(after)) {
            println!("{who}, a client: {with_vmm}: {} wake-ups", after - before);
            assert!(after - before <= SWITCH_LIMIT, "{who} woke {} times in an idle second", after - before);
        }
        drop(vmm);
    }
}
