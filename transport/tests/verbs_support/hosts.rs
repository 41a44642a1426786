//! Two hosts of the lab: which one this is, how they meet, how the link between them is made worse, and how late this machine is.
//!
//! On host a `meet(3)` listens on port 7003 and on host b it connects there; then both bring up a queue pair over that connection.
//! `black_hole()` makes every packet disappear as `lab-link blackhole` does, only faster, until `lab_link("restore")`.

use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use farbus_transport::link::control::Framed;
use farbus_transport::verbs::VerbsFabric;

use super::choice;

/// How long one host waits for the other, which may be behind by a whole test.
const MEETING: Duration = Duration::from_secs(30);

/// Whether this is host a. Fails where there are not two.
pub fn is_a() -> bool {
    let name = |name: &str| std::env::var(name).unwrap_or_default();
    let host = name("FARBUS_LAB_HOST");
    let two = name("FARBUS_LAB_ADDRESS") != name("FARBUS_LAB_PEER");
    assert!(two && (host == "a" || host == "b"), "this needs two hosts: ci/softroce --two-hosts runs it on both");
    host == "a"
}

fn tcp(number: u16) -> TcpStream {
    let port = 7000 + number;
    let deadline = Instant::now() + MEETING;
    let listener = is_a().then(|| {
        let listener = TcpListener::bind(("0.0.0.0", port)).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    });
    loop {
        let stream = match &listener {
            Some(listener) => listener.accept().map(|(stream, _)| stream),
            None => {
                let peer = format!("{}:{port}", std::env::var("FARBUS_LAB_PEER").unwrap());
                TcpStream::connect_timeout(&peer.parse().unwrap(), Duration::from_secs(2))
            }
        };
        match stream {
            Ok(stream) => {
                stream.set_nonblocking(false).unwrap();
                stream.set_nodelay(true).unwrap();
                return stream;
            }
            Err(error) => assert!(Instant::now() < deadline, "the other host does not come: {error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A link with the other host; both call it with the same number, which no other meeting of the run has.
pub fn meet(number: u16) -> VerbsFabric {
    let control = Framed::new(tcp(number)).unwrap();
    VerbsFabric::establish(&choice(), Box::new(control)).unwrap_or_else(|error| panic!("no link between the hosts: {error}"))
}

pub fn run(command: &str) {
    let words: Vec<&str> = command.split(' ').collect();
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap_or_else(|error| panic!("{command}: {error}"));
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Makes packets in both directions disappear without a word, from one moment to the next.
pub fn black_hole() {
    let batch = "qdisc replace dev eth0 root netem loss 100%\nfilter add dev eth0 ingress prio 1 matchall action drop\n";
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("batch");
    std::fs::write(&file, batch).unwrap();
    run(&format!("tc -batch {}", file.display()));
}

/// Gets ready for a cut, so that it takes effect at once.
pub fn prepare_cut() {
    run("tc qdisc replace dev eth0 clsact");
}

/// Takes the network device down, as when a cable is pulled.
pub fn pull_cable() {
    run("ip link set eth0 down");
}

/// How many packets of this host its link has lost on purpose since it was told to lose some.
pub fn packets_lost() -> u64 {
    let output = Command::new("tc").args(["-s", "qdisc", "show", "dev", "eth0", "root"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let number = text.split_once("dropped ").and_then(|(_, rest)| rest.split(',').next()).and_then(|number| number.parse().ok());
    number.unwrap_or_else(|| panic!("tc says nothing of dropped packets: {text}"))
}

/// Changes the link of this host.
pub fn lab_link(what: &str) {
    run(&format!("lab-link {what}"));
}

/// Mends the link when it is dropped, however the test ends.
pub struct Mended;

impl Drop for Mended {
    fn drop(&mut self) {
        lab_link("restore");
    }
}

/// Measures how much later than asked a thread of this machine is woken: what no limit of time can be held against.
pub struct Lateness {
    stop: Arc<AtomicBool>,
    worst: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Lateness {
    pub fn watch() -> Self {
        const NAP: Duration = Duration::from_millis(5);
        let (stop, worst) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, late) = (Arc::clone(&stop), Arc::clone(&worst));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let before = Instant::now();
                std::thread::sleep(NAP);
                let over = before.elapsed().saturating_sub(NAP);
                late.fetch_max(over.as_nanos() as u64, Ordering::Relaxed);
            }
        });
        Self { stop, worst, thread: Some(thread) }
    }

    /// The worst so far.
    pub fn worst(&self) -> Duration {
        Duration::from_nanos(self.worst.load(Ordering::Relaxed))
    }
}

impl Drop for Lateness {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}
