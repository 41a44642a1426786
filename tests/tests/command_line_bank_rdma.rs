//! A bank over queue pairs of a real RDMA device or soft-RoCE: who is on the list deposits and withdraws by one-sided reads, each what the rules say.
//!
//! vm7 deposits 8 MiB at nas and takes them out again byte for byte; how many bytes and messages that were is printed. `ci/softroce` runs this where there is
//! no device.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use farbus_tests::Running;
use farbus_tests::place::Place;
use farbus_tests::process::{AMPLE, run};
use serde_json::Value;

struct Lab {
    place: Place,
    server: Running,
    at: String,
}

impl Lab {
    /// A bank that nas serves to vm7, who may do everything, and to vm8, who may read what vm7 calls shared.
    fn new() -> Self {
        let variable = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: ci/softroce sets it"));
        let (place, address, device) = (Place::new(), variable("FARBUS_LAB_ADDRESS"), variable("FARBUS_RDMA_DEV"));
        let (lab, bank) = (place.name("lab"), place.name("bank"));
        for words in [
            &["cert", "init", &lab][..],
            &["cert", "issue", &lab, "--name", "nas", "--role", "lender", "--address", &address],
            &["cert", "issue", &lab, "--name", "vm7", "--role", "borrower"],
            &["cert", "issue", &lab, "--name", "vm8", "--role", "borrower"],
            &["cert", "issue", &lab, "--name", "vm9", "--role", "borrower"],
            &["bank", "init", &bank],
        ] {
            let end = run(words);
            assert_eq!(end.code(), Some(0), "{end:?}");
        }
        let (listen, nas) = (format!("rdma:{address}:0,dev={device}"), place.name("lab/lender/nas"));
        let mut server = Running::farbus(&[
            "bank",
            "serve",
            &bank,
            "--json",
            "--listen",
            &listen,
            "--tls",
            &nas,
            "--allow",
            "vm7,vm8",
            "--read",
            "*=vm7",
            "--write",
            "*=vm7",
            "--read",
            "shared*=vm8",
        ]);
        let at = server.event("serving", AMPLE)["address"].as_str().unwrap().to_owned();
        Self { place, server, at }
    }

    fn run(&self, who: &str, words: &[&str]) -> farbus_tests::process::End {
        let (command, rest) = words.split_first().unwrap();
        let tls = self.place.name(&format!("lab/borrower/{who}"));
        run(&[&["bank", command, &self.at], rest, &["--tls", &tls, "--json"]].concat())
    }

    #[track_caller]
    fn ok(&self, who: &str, words: &[&str]) -> Value {
        let end = self.run(who, words);
        assert_eq!(end.code(), Some(0), "{words:?}: {end:?}");
        serde_json::from_str(&end.stdout).unwrap()
    }
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_machine_goes_into_a_bank_over_queue_pairs_and_comes_out_byte_for_byte() {
    let mut lab = Lab::new();
    let mut memory: Vec<u8> = (0..2_097_152_u32).flat_map(|n| (n / 300).wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    memory[3 << 20..5 << 20].fill(0);
    let (ram, out) = (lab.place.name("ram"), lab.place.name("out"));
    std::fs::write(&ram, &memory).unwrap();
    let deposited = lab.ok("vm7", &["deposit", "shared", "--memory", &ram]);
    assert_eq!(deposited["counts"]["pages"], 2048);
    lab.server.event("left", AMPLE);
    memory[4096..8192].fill(7);
    std::fs::write(&ram, &memory).unwrap();
    let second = lab.ok("vm7", &["deposit", "shared", "--memory", &ram]);
    assert_eq!((&second["machine"], &second["counts"]["new"]), (&"shared@2".into(), &1.into()));
    for who in ["vm7", "vm8"] {
        let withdrawn = lab.ok(who, &["withdraw", "shared", "--to", &out, "--replace"]);
        assert!(std::fs::read(lab.place.path("out/memory")).unwrap() == memory);
        eprintln!("withdrawn by {who}: {}", withdrawn["wire"]);
    }
    eprintln!("deposited: {}; once more: {}", deposited["wire"], second["wire"]);
    // What vm8 may not: it has never heard of other machines, and deposits nothing; vm9 is not let in.
    lab.ok("vm7", &["deposit", "own", "--memory", &ram]);
    let listed = lab.ok("vm8", &["list"]);
    assert_eq!(listed["machines"].as_array().unwrap().len(), 2, "{listed}");
    lab.run("vm8", &["withdraw", "own", "--to", &out, "--replace"]).assert_refusal(1, &["no machine"]);
    lab.run("vm8", &["deposit", "shared", "--memory", &ram]).assert_refusal(1, &["deposit nothing here"]);
    lab.run("vm9", &["list"]).assert_refusal(1, &["not one that the peer allows"]);
    lab.server.terminate();
    assert_eq!(lab.server.event("ended", AMPLE)["reason"], "SIGTERM");
    let end = lab.server.wait(AMPLE);
    assert_eq!(end.code(), Some(0), "{end:?}");
    let bank = lab.place.name("bank");
    let verified = run(&["bank", "verify", &bank]);
    assert_eq!(verified.code(), Some(0), "{verified:?}");
}
