//! `farbus` on two hosts: one lends, the other runs the demo with it, and every byte is compared across their link.
//!
//! `ci/softroce --two-hosts` runs this same program on host a, which has the authority and drives, and on host b, which lends as nas. The certificate of b
//! comes from a as a file would: over a connection of the test's own.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use farbus_tests::Running;
use farbus_tests::place::{Place, assert_demo_verified, assert_end_in_order};
use farbus_tests::process::{AMPLE, run};

/// Where host a hands out b's certificate.
const TABLE: u16 = 7100;
/// Where host b lends.
const LENDER: u16 = 7000;

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: ci/softroce sets it"))
}

/// Lines between the two hosts' tests.
struct Table {
    lines: BufReader<TcpStream>,
}

impl Table {
    fn new(host: &str) -> Self {
        let stream = if host == "a" { TcpListener::bind(("0.0.0.0", TABLE)).unwrap().accept().unwrap().0 } else { Self::connect() };
        stream.set_read_timeout(Some(10 * AMPLE)).unwrap();
        Self { lines: BufReader::new(stream) }
    }

    fn connect() -> TcpStream {
        let (peer, deadline) = (variable("FARBUS_LAB_PEER"), Instant::now() + AMPLE);
        loop {
            match TcpStream::connect((peer.as_str(), TABLE)) {
                Ok(stream) => return stream,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn say(&mut self, line: &str) {
        self.lines.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    fn hear(&mut self) -> String {
        let mut line = String::new();
        assert!(self.lines.read_line(&mut line).unwrap() > 0, "the other host's test has ended");
        line.trim_end().to_owned()
    }
}

/// The same image on both hosts, no two blocks of which are equal.
fn fill(place: &Place) {
    let blocks = (0..(8_u64 << 20) / 512).flat_map(|block| block.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes().repeat(64));
    fs::write(place.path("disk.img"), blocks.collect::<Vec<u8>>()).unwrap();
}

fn cert(args: &[&str]) {
    let end = run(&[&["cert"], args].concat());
    assert_eq!(end.code(), Some(0), "{end:?}");
}

/// Host a: the authority, and the demo.
fn drive(place: &Place, table: &mut Table) {
    let (lab, peer, device) = (place.name("lab"), variable("FARBUS_LAB_PEER"), variable("FARBUS_RDMA_DEV"));
    cert(&["init", &lab]);
    cert(&["issue", &lab, "--name", "nas", "--role", "lender", "--address", &peer]);
    cert(&["issue", &lab, "--name", "vm7", "--role", "borrower"]);
    let files = fs::read_dir(place.path("lab/lender/nas")).unwrap().map(|entry| {
        let path = entry.unwrap().path();
        (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read_to_string(path).unwrap())
    });
    table.say(&serde_json::to_string(&files.collect::<BTreeMap<_, _>>()).unwrap());
    assert_eq!(table.hear(), "lending");

    let (image, svg, vm7) = (place.name("disk.img"), place.name("demo.svg"), place.name("lab/borrower/vm7"));
    let from = format!("rdma:{peer}:{LENDER},dev={device}");
    let args = ["demo", "--json", "--seconds", "0.1", "--image", &image, "--svg", &svg, "--from", &from, "--tls", &vm7];
    let end = Running::farbus(&args).wait(10 * AMPLE);
    assert_demo_verified(&end);
    table.say("done");
    assert_eq!(table.hear(), "ended");
}

/// Host b: lends its own copy of the image to vm7.
fn lend(place: &Place, table: &mut Table) {
    let folder = place.path("nas");
    fs::create_dir(&folder).unwrap();
    for (name, text) in serde_json::from_str::<BTreeMap<String, String>>(&table.hear()).unwrap() {
        let path = folder.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    }
    let (device, nas) = (place.device("disk.img"), place.name("nas"));
    let listen = format!("rdma:0.0.0.0:{LENDER},dev={}", variable("FARBUS_RDMA_DEV"));
    let args = ["lend", "--json", "--device", &device, "--listen", &listen, "--tls", &nas, "--allow", "vm7"];
    let mut lender = Running::farbus(&args);
    lender.event("listening", AMPLE);
    table.say("lending");
    assert_eq!(lender.event("lent", AMPLE)["peer"], "vm7");
    assert_eq!(table.hear(), "done");
    lender.event("returned", AMPLE);
    assert_end_in_order(lender);
    table.say("ended");
}

#[test]
#[ignore = "needs two hosts with RDMA devices; ci/softroce --two-hosts runs it"]
fn the_demo_compares_every_byte_with_a_device_of_another_host() {
    let (host, place) = (variable("FARBUS_LAB_HOST"), Place::new());
    fill(&place);
    let mut table = Table::new(&host);
    if host == "a" { drive(&place, &mut table) } else { lend(&place, &mut table) }
}
