//! `farbus` between two sides that know each other by certificates only, over queue pairs of a real RDMA device or soft-RoCE, through the program itself.
//!
//! vm7, who is on the list, gets the drive; vm8, who is not, is told so, and the lender names it; and the next one is served. `ci/softroce`
//! runs these where there is no device.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::net::TcpStream;
use std::time::{Duration, Instant};

use farbus_pci_shim::vfio_user::client::Client;
use farbus_tests::Running;
use farbus_tests::place::{Place, assert_demo_verified, assert_end_in_order, assert_nvme, reason, version};
use farbus_tests::process::{AMPLE, End, run};
use serde_json::Value;

/// Two sides on this host, at an address of its RDMA device.
struct Hosts {
    place: Place,
    address: String,
    device: String,
}

/// What a lender was told, and where it listens.
struct Lender {
    process: Running,
    at: String,
}

impl Hosts {
    /// With an authority, a lender nas at this address, and borrowers vm7 and vm8.
    fn new() -> Self {
        let variable = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: ci/softroce sets it"));
        let hosts = Self { place: Place::new(), address: variable("FARBUS_LAB_ADDRESS"), device: variable("FARBUS_RDMA_DEV") };
        hosts.authority("lab");
        hosts
    }

    fn authority(&self, folder: &str) {
        let lab = self.place.name(folder);
        for args in [
            &["cert", "init", &lab][..],
            &["cert", "issue", &lab, "--name", "nas", "--role", "lender", "--address", &self.address],
            &["cert", "issue", &lab, "--name", "far", "--role", "lender", "--address", "192.0.2.99"],
            &["cert", "issue", &lab, "--name", "vm7", "--role", "borrower"],
            &["cert", "issue", &lab, "--name", "vm8", "--role", "borrower"],
        ] {
            let end = run(args);
            assert_eq!(end.code(), Some(0), "{end:?}");
        }
    }

    /// Lends `disk.img` with `options`.
    fn lend(&self, options: &[&str]) -> Lender {
        let (device, listen) = (self.place.device("disk.img"), format!("rdma:{}:0,dev={}", self.address, self.device));
        let mut process = Running::farbus(&[&["lend", "--json", "--device", &device, "--listen", &listen][..], options].concat());
        let at = process.event("listening", AMPLE)["address"].as_str().unwrap().to_owned();
        Lender { process, at }
    }

    /// Lends to vm7 as nas.
    fn nas(&self) -> Lender {
        self.lend(&["--tls", &self.place.name("lab/lender/nas"), "--allow", "vm7"])
    }

    fn start(&self, lender: &Lender, socket: &str, options: &[&str]) -> Running {
        let socket = self.place.name(socket);
        Running::farbus(&[&["borrow", "--json", "--from", &lender.at, "--vfio-user", &socket][..], options].concat())
    }

    /// Borrows; returns when a VMM can connect.
    fn borrow(&self, lender: &Lender, socket: &str, options: &[&str]) -> Running {
        let mut borrower = self.start(lender, socket, options);
        borrower.event("serving", AMPLE);
        borrower
    }

    /// vm7 of `folder`, as an option.
    fn vm7(&self, folder: &str) -> [String; 2] {
        ["--tls".to_owned(), self.place.name(&format!("{folder}/borrower/vm7"))]
    }

    fn vmm(&self, socket: &str) -> Client {
        Client::open(self.place.path(socket), AMPLE).unwrap()
    }

    /// A whole round of vm7.
    #[track_caller]
    fn assert_served(&self, lender: &mut Lender) {
        let [tls, folder] = self.vm7("lab");
        let borrower = self.borrow(lender, "next", &[&tls, &folder]);
        assert_eq!(lender.process.event("lent", AMPLE)["peer"], "vm7");
        assert_nvme(&mut self.vmm("next"));
        assert_end_in_order(borrower);
        let said = reason(&lender.process.event("returned", AMPLE));
        assert!(said.contains("closed the link"), "a borrower that left in order: {said}");
    }

    /// A borrower that does not get the device; what the lender says of it.
    #[track_caller]
    fn assert_refused(&self, lender: &mut Lender, options: &[&str], words: &[&str]) -> Value {
        let end: End = self.start(lender, "refused", options).wait(AMPLE);
        end.assert_refusal(1, words);
        assert!(!self.place.path("refused").exists(), "a socket that nobody serves");
        lender.process.event("refused", AMPLE)
    }
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn who_is_allowed_gets_the_drive_and_who_is_not_is_told_and_named() {
    let hosts = Hosts::new();
    let mut lender = hosts.nas();
    hosts.assert_served(&mut lender);
    let vm8 = hosts.place.name("lab/borrower/vm8");
    let said = hosts.assert_refused(&mut lender, &["--tls", &vm8], &["not one that the peer allows", "hint: ", "--allow"]);
    assert!(reason(&said).contains("vm8, who is not on the list"), "{said}");
    assert!(said["from"].as_str().unwrap().starts_with(&hosts.address), "{said}");
    hosts.assert_served(&mut lender);
    assert_end_in_order(lender.process);
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_second_borrower_is_told_that_the_device_is_lent() {
    let hosts = Hosts::new();
    let mut lender = hosts.lend(&["--tls", &hosts.place.name("lab/lender/nas"), "--allow", "vm7,vm8"]);
    let [tls, folder] = hosts.vm7("lab");
    let first = hosts.borrow(&lender, "first", &[&tls, &folder]);
    lender.process.event("lent", AMPLE);
    let mut vmm = hosts.vmm("first");
    let vm8 = hosts.place.name("lab/borrower/vm8");
    let said = hosts.assert_refused(&mut lender, &["--tls", &vm8], &["lent to another borrower", "try again"]);
    assert!(reason(&said).contains("lent to another"), "{said}");
    assert_nvme(&mut vmm);
    drop(vmm);
    assert_end_in_order(first);
    lender.process.event("returned", AMPLE);
    hosts.assert_served(&mut lender);
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn certificates_that_do_not_fit_are_named_on_both_sides() {
    let hosts = Hosts::new();
    hosts.authority("other");
    let mut lender = hosts.nas();
    // The borrower does not know the lender's authority, and says so to it.
    let [tls, stranger] = hosts.vm7("other");
    let said = hosts.assert_refused(&mut lender, &[&tls, &stranger], &["not signed by the authority", "of one authority"]);
    assert!(reason(&said).contains("does not know the authority"), "{said}");
    // Here the lender does not know the borrower's.
    let part = |file: &str| hosts.place.name(&format!("other/borrower/vm7/{file}"));
    let trusting = hosts.place.name("lab/authority.pem");
    let options = ["--cert", &part("cert.pem"), "--key", &part("key.pem"), "--authority", &trusting];
    let said = hosts.assert_refused(&mut lender, &options, &["does not know the authority", "of one authority"]);
    assert!(reason(&said).contains("not signed by the authority"), "{said}");
    let [tls, folder] = hosts.vm7("lab");
    let said = hosts.assert_refused(&mut lender, &[&tls, &folder, "--peer", "far"], &["is that of nas, not of far", "--peer nas"]);
    assert!(reason(&said).contains("not one that the peer allows"), "{said}");
    let said = hosts.assert_refused(&mut lender, &["--plain", "--plain-beyond-loopback"], &["speaks TLS", "use --tls"]);
    assert!(reason(&said).contains("speaks plain TCP"), "{said}");
    hosts.assert_served(&mut lender);
    assert_end_in_order(lender.process);

    // A certificate that is for another host.
    let mut far = hosts.lend(&["--tls", &hosts.place.name("lab/lender/far"), "--allow", "*"]);
    hosts.assert_refused(&mut far, &[&tls, &folder], &["but for far, 192.0.2.99", "--peer NAME"]);
    let borrower = hosts.borrow(&far, "vmm", &[&tls, &folder, "--peer", "far"]);
    assert_nvme(&mut hosts.vmm("vmm"));
    assert_end_in_order(borrower);
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn plain_tcp_links_too_where_it_is_said_twice() {
    let hosts = Hosts::new();
    let plain = ["--plain", "--plain-beyond-loopback"];
    let mut lender = hosts.lend(&plain);
    let borrower = hosts.borrow(&lender, "vmm", &plain);
    assert!(lender.process.event("lent", AMPLE).get("peer").is_none());
    assert_nvme(&mut hosts.vmm("vmm"));
    assert_end_in_order(borrower);
    lender.process.event("returned", AMPLE);
    let [tls, folder] = hosts.vm7("lab");
    hosts.assert_refused(&mut lender, &[&tls, &folder], &["speaks plain TCP", "--plain on both"]);
    // Once is not enough, and the lender is not even asked.
    let once = hosts.start(&lender, "refused", &["--plain"]).wait(AMPLE);
    once.assert_refusal(1, &["not on this host's loopback", "--plain-beyond-loopback"]);
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn strangers_keep_nobody_out() {
    let hosts = Hosts::new();
    let mut lender = hosts.nas();
    let at = lender.at.strip_prefix("rdma:").unwrap().split(',').next().unwrap().to_owned();
    let strangers: Vec<_> = (0..40).map(|_| TcpStream::connect(&at).unwrap()).collect();
    hosts.assert_served(&mut lender);
    drop(strangers);
    hosts.assert_served(&mut lender);
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_killed_borrower_gives_the_device_back_and_a_killed_lender_ends_the_borrower() {
    let hosts = Hosts::new();
    let mut lender = hosts.nas();
    let [tls, folder] = hosts.vm7("lab");
    let borrower = hosts.borrow(&lender, "vmm", &[&tls, &folder]);
    lender.process.event("lent", AMPLE);
    borrower.kill();
    let said = reason(&lender.process.event("returned", AMPLE));
    assert!(said.contains("gone") || said.contains("closed"), "{said}");
    drop(borrower);
    hosts.assert_served(&mut lender);

    let mut borrower = hosts.borrow(&lender, "vmm", &[&tls, &folder]);
    lender.process.event("lent", AMPLE);
    let mut vmm = hosts.vmm("vmm");
    assert_nvme(&mut vmm);
    lender.process.kill();
    let started = Instant::now();
    while version(&mut vmm) != u32::MAX {
        assert!(started.elapsed() < AMPLE, "a register of a dead device still has a value");
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(vmm);
    borrower.event("ended", AMPLE);
    let end = borrower.wait(AMPLE);
    assert_eq!(end.code(), Some(3), "{end:?}");
    end.assert_no_panic();
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn the_demo_compares_every_byte_over_a_link_with_certificates_of_its_own() {
    let hosts = Hosts::new();
    let (image, svg) = (hosts.place.name("disk.img"), hosts.place.name("demo.svg"));
    let link = format!("rdma:{}:0,dev={}", hosts.address, hosts.device);
    let args = ["demo", "--json", "--seconds", "0.1", "--image", &image, "--svg", &svg, "--link", &link];
    let end = Running::farbus(&args).wait(10 * AMPLE);
    assert_demo_verified(&end);
}
