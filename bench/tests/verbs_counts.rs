//! What an operation over queue pairs costs in work requests, doorbells, reports and notifications: exact, so no machine is too slow for these.
//!
//! A read of a lent register is one work request and one doorbell of each side; a third request, say for credits that nobody waits for, fails here.
//! `FARBUS_RDMA_DEV=rxe0 cargo test -p farbus-bench --test verbs_counts -- --ignored --test-threads 1`; `ci/softroce` runs it where there is no
//! device. A device that was promised and is not there fails every case.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use farbus_bench::measure::two_cores;
use farbus_bench::suite::{LentNvme, LentRegister, Traffic, pinned_by_a_link};
use farbus_transport::verbs::{Counters, DeviceChoice};

const OPERATIONS: u64 = 320;

fn choice() -> DeviceChoice {
    DeviceChoice { device: std::env::var("FARBUS_RDMA_DEV").ok(), ..DeviceChoice::default() }
}

fn register() -> LentRegister {
    LentRegister::start(&choice(), two_cores().unwrap()[1]).unwrap()
}

/// Of work requests that nobody waits for, one in 16 may report: a report is work for the device and for who polls.
#[track_caller]
fn report_seldom(side: &Counters) {
    assert!(side.signalled * 16 <= side.work_requests, "{side:?}");
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_register_read_is_one_work_request_and_one_doorbell_of_each_side() {
    let traffic = register().count_reads(OPERATIONS).unwrap();
    for side in [traffic.borrower, traffic.lender] {
        assert_eq!((side.work_requests, side.doorbells, side.received), (OPERATIONS, OPERATIONS, OPERATIONS), "{traffic:?}");
        report_seldom(&side);
    }
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_burst_of_64_posted_writes_is_at_most_two_doorbells() {
    const BURSTS: u64 = 10;
    let Traffic { borrower, lender, .. } = register().count_bursts(BURSTS, 64).unwrap();
    assert!(borrower.doorbells <= 2 * BURSTS, "{borrower:?}");
    assert!(borrower.work_requests <= 64 * BURSTS, "{borrower:?}");
    // The lender says nothing but that it has taken 64 slots.
    assert!(lender.work_requests <= BURSTS + 1, "{lender:?}");
    report_seldom(&borrower);
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn an_nvme_read_of_4_kib_is_at_most_four_work_requests_and_three_notifications() {
    let traffic = LentNvme::start(&choice(), two_cores().unwrap()[1]).unwrap().count_reads(OPERATIONS).unwrap();
    assert!(traffic.of_both(|side| side.work_requests) <= 4.0, "{traffic:?}");
    assert!(traffic.of_both(|side| side.received) <= 3.0, "{traffic:?}");
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_link_pins_at_most_8_mib_beside_the_guests_memory() {
    let pinned = |guest| pinned_by_a_link(&choice(), two_cores().unwrap()[1], guest).unwrap();
    let bytes = pinned(64 << 20);
    assert!(bytes <= 8 << 20, "{bytes} bytes");
    // However much the guest has.
    let more = pinned(256 << 20);
    assert_eq!(more, bytes, "a larger guest has more pinned beside its memory");
}
