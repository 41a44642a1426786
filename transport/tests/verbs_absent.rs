//! Why there is no RDMA link, said so that somebody can mend it: each cause made real, and its text compared.
//!
//! With the port's network device down, `establish` fails as "port 1 of rxe0 is down, not active: bring its network interface up". A library that
//! cannot be used is tried everywhere; what needs a device, or takes it away, runs in the soft-RoCE lab.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

mod verbs_support;

use std::process::Command;
use std::time::{Duration, Instant};

use farbus_transport::verbs::{DeviceChoice, VerbsFabric, devices};
use farbus_transport::{Access, Fabric, GrantError, Memory, Nanos, Regions, RegisterError};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use verbs_support::{Link, choice, pair};

// ---- the library ----

/// What a program says of its devices whose libibverbs.so.1 is a file of these bytes. It is this program's test of that name again, in a process of
/// its own, because a library is loaded once.
fn with_library(test: &str, bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("libibverbs.so.1"), bytes).unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, "1")
        .env("LD_LIBRARY_PATH", folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    said.lines().find_map(|line| line.split_once("why: ")).map(|(_, why)| why.to_owned()).unwrap_or(said)
}

/// Set in a child of a test.
const CHILD: &str = "FARBUS_TEST_CHILD";

/// In a child, says why there are no devices.
fn says_why_as_a_child() -> bool {
    let child = std::env::var_os(CHILD).is_some();
    if child {
        println!("why: {}", devices().unwrap_err());
    }
    child
}

const HELP: &str = "; on Debian: apt-get install libibverbs1 ibverbs-providers";

#[test]
fn a_library_that_cannot_be_loaded_is_named_with_the_reason() {
    if says_why_as_a_child() {
        return;
    }
    for bytes in [&b""[..], b"this is no library"] {
        let why = with_library("a_library_that_cannot_be_loaded_is_named_with_the_reason", bytes);
        assert!(why.starts_with("no RDMA library: ") && why.contains("libibverbs.so.1") && why.ends_with(HELP), "{why}");
    }
}

#[test]
fn a_library_that_lacks_a_function_is_named_with_the_function() {
    if says_why_as_a_child() {
        return;
    }
    // Any library that is surely there: the one that every program has.
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let libc = maps.lines().find_map(|line| line.split_whitespace().last().filter(|path| path.contains("/libgcc_s.so")));
    let library = std::fs::read(libc.unwrap()).unwrap();
    let why = with_library("a_library_that_lacks_a_function_is_named_with_the_function", &library);
    assert!(why.starts_with("no RDMA library: ") && why.contains("ibv_get_device_list") && why.ends_with(HELP), "{why}");
}

// ---- the device ----

fn refused(choice: &DeviceChoice) -> String {
    let Err(error) = VerbsFabric::pair(choice) else { panic!("a link over {choice:?}") };
    error.to_string()
}

fn name() -> String {
    choice().device.unwrap_or_else(|| devices().unwrap()[0].name.clone())
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_device_that_does_not_exist_is_named_beside_those_that_do() {
    let why = refused(&DeviceChoice { device: Some("mlx5_7".to_owned()), ..DeviceChoice::default() });
    assert!(why.starts_with("no RDMA device is called mlx5_7; there are: ") && why.contains(&name()), "{why}");
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_port_that_does_not_exist_is_named_beside_their_number() {
    for port in [0, 99] {
        let why = refused(&DeviceChoice { port: Some(port), ..choice() });
        assert!(why.starts_with(&format!("{} has no port {port}; it has ", name())), "{why}");
    }
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn an_address_that_does_not_exist_is_named_by_its_index() {
    let why = refused(&DeviceChoice { gid: Some(99), ..choice() });
    let expected = format!("port 1 of {} has no RoCE v2 address at index 99: give its network interface an IP address", name());
    assert_eq!(why, expected);
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn memory_that_may_not_be_locked_is_refused_with_the_limit_and_the_command() {
    const LIMIT: u64 = 64 << 10;
    let (mut left, _right) = pair();
    let before = getrlimit(Resource::Memlock);
    // The right to lock more belongs to a thread, so one of its own gives it up.
    let (register, establish) = std::thread::spawn(move || {
        let mut sets = capabilities(None).unwrap();
        for set in [&mut sets.effective, &mut sets.permitted] {
            set.remove(CapabilitySet::IPC_LOCK);
        }
        set_capabilities(None, sets).unwrap();
        setrlimit(Resource::Memlock, Rlimit { current: Some(LIMIT), ..before }).unwrap();
        let register = left.register(Memory::memfd("guest", 1 << 20).unwrap(), Access::READ_WRITE);
        // A link has memory of its own, too.
        setrlimit(Resource::Memlock, Rlimit { current: Some(4096), ..before }).unwrap();
        let establish = VerbsFabric::pair(&choice()).map(|_| ());
        setrlimit(Resource::Memlock, before).unwrap();
        (register, establish)
    })
    .join()
    .unwrap();
    let help = "run `ulimit -l unlimited` first, or set LimitMEMLOCK=infinity in its systemd unit";
    let expected = format!("cannot lock 1048576 bytes for the device: this process may lock {LIMIT} in all; {help}");
    let error = register.unwrap_err();
    assert!(matches!(error, RegisterError::Memory(_)), "{error:?}");
    assert_eq!(error.to_string(), expected);
    // What a user sees, whose guest's memory is registered to be granted.
    assert_eq!(GrantError::from(error).to_string(), expected);
    let why = establish.unwrap_err().to_string();
    assert!(why.starts_with("cannot lock ") && why.contains("this process may lock 4096 in all") && why.ends_with(help), "{why}");
}

// ---- what takes the device away ----

/// Whether this is a machine of the lab, whose device may be taken away; said where it is not.
fn is_lab(what: &str) -> bool {
    let lab = std::env::var_os("FARBUS_LAB_HOST").is_some();
    if !lab {
        eprintln!("not run: {what}: only in the lab, because it takes the device away");
    }
    lab
}

fn run(command: &str) {
    let words: Vec<&str> = command.split(' ').collect();
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap_or_else(|error| panic!("{command}: {error}"));
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Runs a command when it is dropped, however the test ends.
struct Afterwards(&'static str);

impl Drop for Afterwards {
    fn drop(&mut self) {
        run(self.0);
        let deadline = Instant::now() + Duration::from_secs(5);
        // A device that has come back needs a moment until its port is up.
        while VerbsFabric::pair(&choice()).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

const ADD: &str = "rdma link add rxe0 type rxe netdev dummy0";

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_port_that_is_down_is_named_with_its_state() {
    if !is_lab("a port that is down") {
        return;
    }
    run("ip link set dummy0 down");
    let up = Afterwards("ip link set dummy0 up");
    assert_eq!(refused(&choice()), "port 1 of rxe0 is down, not active: bring its network interface up");
    let nameless = refused(&DeviceChoice::default());
    assert_eq!(nameless, "port 1 of rxe0 is down, not active: bring its network interface up");
    drop(up);
    Link::new().works();
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_host_whose_only_device_is_gone_has_none() {
    if !is_lab("no device") {
        return;
    }
    run("rdma link delete rxe0");
    let back = Afterwards(ADD);
    let none = "no RDMA device on this host; soft-RoCE: modprobe rdma_rxe && rdma link add rxe0 type rxe netdev eth0";
    assert_eq!(devices().unwrap_err().to_string(), none);
    assert_eq!(refused(&choice()), none);
    drop(back);
    Link::new().works();
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_port_that_goes_down_and_up_ends_no_link_that_had_nothing_to_send() {
    if !is_lab("a port that goes down and up") {
        return;
    }
    let mut link = Link::new();
    run("ip link set dummy0 down");
    let up = Afterwards("ip link set dummy0 up");
    let until = Instant::now() + Duration::from_millis(300);
    while Instant::now() < until {
        for end in &mut link.ends {
            let mut events = farbus_transport::Events::new();
            end.poll(Nanos::now(), &mut events);
            assert_eq!(events.as_slice(), []);
        }
    }
    drop(up);
    link.works();
}
