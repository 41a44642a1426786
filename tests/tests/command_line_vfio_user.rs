//! `farbus lend --device vfio-user:SOCKET`, through the program itself: a device that another `farbus` serves is lent on, and comes back after its server died.
//!
//! An NVMe controller is lent, borrowed at a.sock, lent again as the device of a.sock, and every byte is compared across both links; then the
//! server of a.sock is killed, and the second lender says so, and lends again when somebody serves a.sock again.

use std::fs;
use std::os::unix::net::UnixListener;

use farbus_tests::Running;
use farbus_tests::place::{Place, assert_end_in_order, assert_nvme, reason};
use farbus_tests::process::{AMPLE, run};
use serde_json::Value;

/// Lends on what a server at `socket` has.
fn lend_on(place: &Place, socket: &str) -> Running {
    let device = format!("vfio-user:{}", place.name(socket));
    let mut lender = Running::farbus(&["lend", "--json", "--device", &device, "--listen", &second_link(place)]);
    lender.event("listening", AMPLE);
    lender
}

fn second_link(place: &Place) -> String {
    format!("shm:{}", place.name("second"))
}

fn borrow_on(place: &Place, socket: &str) -> Running {
    let mut borrower = Running::farbus(&[
        "borrow",
        "--json",
        "--reconnect",
        "100ms",
        "--from",
        &second_link(place),
        "--vfio-user",
        &place.name(socket),
    ]);
    borrower.event("serving", AMPLE);
    borrower
}

#[test]
fn every_byte_of_a_device_that_is_lent_on_is_compared_across_both_links() {
    let place = Place::new();
    let blocks = (0..(8_u64 << 20) / 512).flat_map(|block| block.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes().repeat(64));
    fs::write(place.path("disk.img"), blocks.collect::<Vec<u8>>()).unwrap();
    fs::copy(place.path("disk.img"), place.path("copy.img")).unwrap();
    let mut first = place.lend();
    let borrower = place.borrow("a.sock");
    let mut second = lend_on(&place, "a.sock");
    let (image, svg, from) = (place.name("copy.img"), place.name("demo.svg"), second_link(&place));
    let args = ["demo", "--json", "--seconds", "0.1", "--image", &image, "--svg", &svg, "--from", &from];
    let end = Running::farbus(&args).wait(10 * AMPLE);
    assert_eq!(end.code(), Some(0), "{end:?}");
    let report: Value = serde_json::from_str(&end.stdout).unwrap();
    assert_eq!(report["verified"], true, "{report}");
    assert!(report["bytes_verified"].as_u64().unwrap() >= 4 * (8 << 20), "{report}");
    second.event("returned", AMPLE);
    // And once more by a VMM at a socket.
    let last = borrow_on(&place, "b.sock");
    assert_nvme(&mut place.vmm("b.sock"));
    assert_end_in_order(last);
    second.event("returned", AMPLE);
    assert_end_in_order(second);
    assert_end_in_order(borrower);
    first.event("returned", AMPLE);
    assert_end_in_order(first);
}

#[test]
fn a_device_whose_server_dies_is_gone_and_lent_again_when_it_is_back() {
    let place = Place::new();
    let mut first = place.lend();
    let server = place.borrow("a.sock");
    let mut second = lend_on(&place, "a.sock");
    let mut borrower = borrow_on(&place, "b.sock");
    second.event("lent", AMPLE);
    let mut vmm = place.vmm("b.sock");
    assert_nvme(&mut vmm);
    server.kill();
    let why = reason(&second.event("gone", AMPLE));
    assert_eq!(why, "its server closed the connection");
    // The VMM sees a dead slot, when its borrower has looked for the device long enough, and nobody else gets it.
    borrower.event("lender-gone", AMPLE);
    let mut bytes = [0; 4];
    vmm.region_read(0, 8, &mut bytes).unwrap();
    assert_eq!(bytes, [0xff; 4]);
    let end = run(&["borrow", "--from", &second_link(&place), "--vfio-user", &place.name("c.sock")]);
    end.assert_refusal(1, &["the device is gone at the lender", "try again"]);
    drop(vmm);
    borrower.event("ended", AMPLE);
    drop(server.wait(AMPLE));
    first.event("returned", AMPLE);
    fs::remove_file(place.path("a.sock")).unwrap();
    let server = place.borrow("a.sock");
    let back = reason(&second.event("returned", 2 * AMPLE));
    assert!(back.contains("its server closed the connection"), "{back}");
    let again = borrow_on(&place, "d.sock");
    assert_nvme(&mut place.vmm("d.sock"));
    assert_end_in_order(again);
    assert_end_in_order(second);
    assert_end_in_order(server);
    assert_end_in_order(first);
}

#[test]
fn a_server_that_is_none_is_refused_with_what_to_do() {
    let place = Place::new();
    let lend = |device: &str| run(&["lend", "--device", device, "--listen", &place.link()]);
    lend("vfio-user:").assert_refusal(2, &["needs a server's socket"]);
    lend("vfio-user:x,ro").assert_refusal(2, &["no option of vfio-user", "map-unsealed"]);
    lend(&format!("vfio-user:{}", place.name("nobody")))
        .assert_refusal(1, &["cannot connect", "is the server of the device running"]);
    lend(&format!("vfio-user:{}", place.name("disk.img"))).assert_refusal(1, &["cannot connect"]);
    // It accepts, and says nothing.
    let _silent = UnixListener::bind(place.path("silent")).unwrap();
    lend(&format!("vfio-user:{}", place.name("silent")))
        .assert_refusal(1, &["did not answer within 1500 ms", "look at the server"]);
    // It has a client.
    let mut first = place.lend();
    let server = place.borrow("a.sock");
    let vmm = place.vmm("a.sock");
    lend(&format!("vfio-user:{}", place.name("a.sock"))).assert_refusal(1, &["end that first"]);
    drop(vmm);
    assert_end_in_order(server);
    first.event("returned", AMPLE);
    assert_end_in_order(first);
}
