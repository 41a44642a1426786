//! What a user can get wrong about links between hosts: certificates, who may borrow, plain TCP, addresses; through the program itself.
//!
//! `farbus lend --listen rdma:0.0.0.0:7000` without a word about security exits with status 1 and says how to get a certificate. What two hosts
//! make of each other's certificates is in control/tests; here nobody needs an RDMA device.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use farbus_control::authority::Request;
use farbus_control::certificate::{Moment, Validity};
use farbus_control::identity::Identity;
use farbus_control::store::{open_authority, save_issued};
use farbus_tests::place::Place;
use farbus_tests::process::{End, run, text};
use serde_json::Value;

/// A place with an authority in `lab`, a lender nas and a borrower vm7.
fn lab() -> Place {
    let place = Place::new();
    let lab = place.name("lab");
    for args in [
        &["cert", "init", &lab][..],
        &["cert", "issue", &lab, "--name", "nas", "--role", "lender", "--address", "127.0.0.1"],
        &["cert", "issue", &lab, "--name", "vm7", "--role", "borrower"],
    ] {
        let end = run(args);
        assert_eq!(end.code(), Some(0), "{end:?}");
    }
    place
}

fn object(end: &End) -> Value {
    assert_eq!(end.code(), Some(0), "{end:?}");
    serde_json::from_str(&end.stdout).unwrap()
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// Tries to lend over RDMA.
fn lend(place: &Place, at: &str, options: &[&str]) -> End {
    let device = place.device("disk.img");
    run(&[&["lend", "--device", &device, "--listen", at][..], options].concat())
}

/// Tries to borrow over RDMA.
fn borrow(place: &Place, from: &str, options: &[&str]) -> End {
    let socket = place.name("vmm");
    let end = run(&[&["borrow", "--from", from, "--vfio-user", &socket][..], options].concat());
    assert!(!place.path("vmm").exists(), "a socket that nobody serves");
    end
}

#[test]
fn an_authority_and_what_it_signs_are_made_shown_and_kept() {
    let place = lab();
    for (file, wanted) in [
        ("lab/authority.pem", serde_json::json!({ "authority": true, "name": null, "role": null, "issuer": "CN=farbus" })),
        (
            "lab/lender/nas/cert.pem",
            serde_json::json!({ "authority": false, "name": "nas", "role": "lender", "issuer": "CN=farbus" }),
        ),
        (
            "lab/borrower/vm7/cert.pem",
            serde_json::json!({ "authority": false, "name": "vm7", "role": "borrower", "issuer": "CN=farbus" }),
        ),
    ] {
        let shown = object(&run(&["cert", "show", "--json", &place.name(file)]));
        let [certificate] = shown["certificates"].as_array().unwrap().as_slice() else { panic!("{shown}") };
        for (key, value) in wanted.as_object().unwrap() {
            assert_eq!(&certificate[key], value, "{file}: {certificate}");
        }
        assert_eq!(certificate["valid"], true);
        assert_eq!(mode(&place.path(file)), 0o600);
    }
    for secret in ["lab/authority.key", "lab/lender/nas/key.pem", "lab/borrower/vm7/key.pem"] {
        assert_eq!(mode(&place.path(secret)), 0o600, "{secret}");
    }
    let people = run(&["cert", "show", &place.name("lab/lender/nas/cert.pem")]);
    for words in ["name   nas", "role   lender", "for    nas, 127.0.0.1", "valid, 364 days left"] {
        assert!(people.stdout.contains(words), "{words}: {}", people.stdout);
    }
}

#[test]
fn nothing_that_exists_is_overwritten_unless_it_is_said() {
    let place = lab();
    let lab = place.name("lab");
    let read = |file: &str| std::fs::read(place.path(file)).unwrap();
    let (authority, certificate) = (read("lab/authority.key"), read("lab/borrower/vm7/cert.pem"));
    run(&["cert", "init", &lab]).assert_refusal(1, &["exists already", "hint: choose another folder"]);
    let issue = ["cert", "issue", &lab, "--name", "vm7", "--role", "borrower"];
    run(&issue).assert_refusal(1, &["exists already", "hint: add --replace"]);
    assert_eq!((read("lab/authority.key"), read("lab/borrower/vm7/cert.pem")), (authority, certificate.clone()));
    object(&run(&[&issue[..], &["--replace", "--json"]].concat()));
    assert_ne!(read("lab/borrower/vm7/cert.pem"), certificate);
}

#[test]
fn certificates_that_make_no_sense_are_refused_with_what_would() {
    let place = lab();
    let lab = place.name("lab");
    let issue = |more: &[&str]| run(&[&["cert", "issue", &lab][..], more].concat());
    issue(&["--name", "a b", "--role", "lender"]).assert_refusal(2, &["no name", "letters, digits"]);
    issue(&["--name", "a", "--role", "owner"]).assert_refusal(2, &["lender", "borrower"]);
    issue(&["--name", "a", "--role", "lender", "--days", "0"]).assert_refusal(2, &["--days"]);
    issue(&["--name", "a", "--role", "lender", "--days", "36500"]).assert_refusal(1, &["outlive", "fewer --days"]);
    issue(&["--name", "a", "--role", "lender", "--address", "two words"]).assert_refusal(2, &["two words", "--address 10.0.0.7"]);
    issue(&["--name", "a", "--role", "borrower", "--address", "10.0.0.7"])
        .assert_refusal(2, &["no address", "leave --address out"]);
    let nowhere = place.name("nowhere");
    run(&["cert", "issue", &nowhere, "--name", "a", "--role", "lender"])
        .assert_refusal(1, &["no authority in", "farbus cert init"]);
    place.image("small.img", 4096);
    run(&["cert", "show", &place.name("small.img")]).assert_refusal(1, &["no certificate in PEM form", "cert.pem"]);
    run(&["cert", "show", &nowhere]).assert_refusal(1, &["No such file"]);
    // Over a file there is no folder.
    run(&["cert", "init", &place.name("disk.img/lab")]).assert_refusal(1, &["cannot make", "may write"]);
}

#[test]
fn without_a_word_about_security_nothing_is_lent_or_borrowed() {
    let place = lab();
    lend(&place, "rdma:127.0.0.1:0", &[]).assert_refusal(2, &["needs TLS", "tip: ", "--tls DIR", "farbus cert"]);
    borrow(&place, "rdma:127.0.0.1:7000", &[]).assert_refusal(2, &["needs TLS", "--tls DIR", "farbus cert"]);
    let (nas, vm7) = (place.name("lab/lender/nas"), place.name("lab/borrower/vm7"));
    lend(&place, "rdma:127.0.0.1:0", &["--tls", &nas]).assert_refusal(2, &["nobody is allowed", "--allow NAME", "--allow '*'"]);
    // Each is for its role.
    lend(&place, "rdma:127.0.0.1:0", &["--tls", &vm7, "--allow", "*"]).assert_refusal(1, &["of a borrower", "--role lender"]);
    borrow(&place, "rdma:127.0.0.1:7000", &["--tls", &nas]).assert_refusal(1, &["of a lender", "--role borrower"]);
}

#[test]
fn plain_tcp_is_for_loopback_unless_it_is_said_twice() {
    let place = lab();
    lend(&place, "rdma:0.0.0.0:0", &["--plain"]).assert_refusal(1, &["not on this host's loopback", "--plain-beyond-loopback"]);
    lend(&place, "rdma:0.0.0.0:0", &["--plain-beyond-loopback"]).assert_refusal(2, &["--plain"]);
    let nas = place.name("lab/lender/nas");
    lend(&place, "rdma:127.0.0.1:0", &["--plain", "--tls", &nas]).assert_refusal(2, &["--tls", "--plain"]);
    lend(&place, "rdma:127.0.0.1:0", &["--plain", "--allow", "vm7"]).assert_refusal(2, &["--allow", "--plain"]);
    borrow(&place, "rdma:127.0.0.1:7000", &["--plain", "--peer", "nas"]).assert_refusal(2, &["--peer", "--plain"]);
}

#[test]
fn shared_memory_takes_no_options_of_a_network() {
    let place = lab();
    let (nas, vm7) = (place.name("lab/lender/nas"), place.name("lab/borrower/vm7"));
    for options in [&["--tls", &nas][..], &["--plain"], &["--allow", "vm7"]] {
        lend(&place, &place.link(), options).assert_refusal(2, &["takes no options of TLS", "one user"]);
        assert!(!place.path("link").exists());
    }
    borrow(&place, &place.link(), &["--tls", &vm7]).assert_refusal(2, &["takes no options of TLS"]);
    borrow(&place, &place.link(), &["--peer", "nas"]).assert_refusal(2, &["takes no options of TLS"]);
}

#[test]
fn a_list_that_is_wrong_is_refused_at_the_start() {
    let place = lab();
    let nas = place.name("lab/lender/nas");
    let lend = |options: &[&str]| lend(&place, "rdma:127.0.0.1:0", &[&["--tls", &nas][..], options].concat());
    lend(&["--allow", "vm7,vm 8"]).assert_refusal(2, &["--allow", "\"vm 8\" is no name"]);
    lend(&["--allow", ""]).assert_refusal(2, &["--allow", "\"\" is no name"]);
    lend(&["--allow-file", &place.name("nowhere")]).assert_refusal(1, &["cannot read", "nowhere"]);
    std::fs::write(place.path("allowed"), "vm7\nvm/8\n").unwrap();
    lend(&["--allow-file", &place.name("allowed")]).assert_refusal(1, &["line 2", "vm/8"]);
}

/// What a user may name where a file is wanted, and what it is called: none of them may be waited for or read without end.
fn no_files(place: &Place) -> [(String, &'static str); 4] {
    let (fifo, socket) = (place.path("fifo"), place.path("socket"));
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::from(0o600), 0).unwrap();
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    [
        (place.name("fifo"), "it is no file but a pipe"),
        (place.name("socket"), "it is no file but a socket"),
        (place.name("lab"), "it is no file but a directory"),
        ("/dev/zero".to_owned(), "it is no file but a device"),
    ]
}

#[test]
fn what_is_no_file_or_too_long_is_never_waited_for_nor_read() {
    let place = lab();
    let nas = |file: &str| place.name(&format!("lab/lender/nas/{file}"));
    let (cert, key, authority) = (nas("cert.pem"), nas("key.pem"), nas("authority.pem"));
    std::fs::File::create(place.path("long")).unwrap().set_len((1 << 20) + 1).unwrap();
    let long = (place.name("long"), "it has more than 1048576 bytes");
    for (name, said) in no_files(&place).into_iter().chain([long]) {
        run(&["cert", "show", &name]).assert_refusal(1, &[said]);
        lend(&place, "rdma:127.0.0.1:0", &["--tls", &nas(""), "--allow-file", &name]).assert_refusal(1, &[said]);
        for [cert, key, authority] in [[&name, &key, &authority], [&cert, &name, &authority], [&cert, &key, &name]] {
            let files = ["--cert", cert, "--key", key, "--authority", authority];
            lend(&place, "rdma:127.0.0.1:0", &[&files[..], &["--allow", "vm7"]].concat()).assert_refusal(1, &[said]);
            borrow(&place, "rdma:127.0.0.1:7000", &files).assert_refusal(1, &[said]);
        }
    }
    std::fs::rename(place.path("fifo"), place.path("lab/authority.key")).unwrap();
    run(&["cert", "issue", &place.name("lab"), "--name", "a", "--role", "lender"]).assert_refusal(1, &["no file but a pipe"]);
}

#[test]
fn credentials_that_cannot_be_used_are_refused_with_what_to_do() {
    let place = lab();
    let from = "rdma:127.0.0.1:7000";
    borrow(&place, from, &["--tls", &place.name("nowhere")]).assert_refusal(1, &["cannot read", "cert.pem", "farbus cert issue"]);
    let vm7 = |file: &str| place.name(&format!("lab/borrower/vm7/{file}"));
    borrow(&place, from, &["--cert", &vm7("cert.pem")]).assert_refusal(2, &["--key", "--authority"]);
    let mixed = ["--cert", &vm7("cert.pem"), "--key", &place.name("lab/lender/nas/key.pem"), "--authority", &vm7("authority.pem")];
    borrow(&place, from, &mixed).assert_refusal(1, &["key is not the one", "from one folder"]);
    let swapped = ["--cert", &vm7("authority.pem"), "--key", &vm7("key.pem"), "--authority", &vm7("authority.pem")];
    borrow(&place, from, &swapped).assert_refusal(1, &["farbus:lender/ or farbus:borrower/", "farbus cert show"]);

    std::fs::set_permissions(vm7("key.pem"), std::fs::Permissions::from_mode(0o644)).unwrap();
    borrow(&place, from, &["--tls", &place.name("lab/borrower/vm7")]).assert_refusal(1, &["read by everybody", "chmod 600"]);

    let authority = open_authority(&place.path("lab")).unwrap();
    let hour = Duration::from_secs(3600);
    for (name, from_now, words) in [("old", false, ["expired at", "--replace"]), ("early", true, ["not valid before", "date -u"])] {
        let now = SystemTime::now();
        let (begin, end) = if from_now { (now + hour, now + 2 * hour) } else { (now - 2 * hour, now - hour) };
        let identity = Identity::from_uri(&format!("farbus:borrower/{name}")).unwrap();
        let validity = Validity { from: Moment(begin), until: Moment(end) };
        let issued = authority.issue(&Request { identity: identity.clone(), addresses: Vec::new(), validity }).unwrap();
        let folder = save_issued(&place.path("lab"), &identity, &issued, false).unwrap();
        borrow(&place, from, &["--tls", text(&folder)]).assert_refusal(1, &words);
    }
}

#[test]
fn a_device_that_is_not_there_is_said_before_anybody_is_asked() {
    let place = lab();
    let (nas, vm7) = (place.name("lab/lender/nas"), place.name("lab/borrower/vm7"));
    // On a host without RDMA for that reason, on one with it for the name.
    lend(&place, "rdma:127.0.0.1:0,dev=none_0", &["--tls", &nas, "--allow", "*"])
        .assert_refusal(1, &["cannot lend over RDMA", "no RDMA"]);
    borrow(&place, "rdma:127.0.0.1:1,dev=none_0", &["--tls", &vm7]).assert_refusal(1, &["cannot borrow from", "no RDMA"]);
}

#[test]
fn a_port_that_cannot_be_used_is_refused() {
    let place = lab();
    let nas = place.name("lab/lender/nas");
    let tls = ["--tls", &nas, "--allow", "*"];
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    lend(&place, &format!("rdma:{}", taken.local_addr().unwrap()), &tls)
        .assert_refusal(1, &["in use by another process", "another port"]);
    // RFC 5737: an address of nobody's.
    lend(&place, "rdma:192.0.2.1:0", &tls).assert_refusal(1, &["cannot listen at", "0.0.0.0"]);
    lend(&place, "rdma:no-such-host.invalid:0", &tls).assert_refusal(1, &["no-such-host.invalid", "IP address"]);
    for wrong in ["rdma:", "rdma:nas", "rdma:fd00::1:7000", "rdma:nas:7000,mtu=1"] {
        lend(&place, wrong, &tls).assert_refusal(2, &["rdma:"]);
        borrow(&place, wrong, &[]).assert_refusal(2, &["rdma:"]);
    }
    borrow(&place, "rdma:nas:0", &["--plain"]).assert_refusal(2, &["port 0"]);
}

#[test]
fn the_demo_makes_its_own_certificates_and_takes_none() {
    let place = lab();
    let (svg, vm7) = (place.name("demo.svg"), place.name("lab/borrower/vm7"));
    let demo = |options: &[&str]| run(&[&["demo", "--svg", &svg][..], options].concat());
    demo(&["--tls", &vm7]).assert_refusal(2, &["makes the certificates", "--from"]);
    demo(&["--from", "rdma:127.0.0.1:1"]).assert_refusal(2, &["--image"]);
    let image = place.name("disk.img");
    demo(&["--from", "rdma:127.0.0.1:1,dev=none_0", "--image", &image, "--tls", &vm7]).assert_refusal(1, &["no RDMA"]);
    demo(&["--from", "rdma:127.0.0.1:1", "--image", &image]).assert_refusal(2, &["needs TLS"]);
}
