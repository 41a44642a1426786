//! A bank that goes away while a Cloud Hypervisor's guest needs a page of it: the guest waits, and goes on when the bank is back.
//!
//! The request for page 50 is answered 1.5 s later, when the bank is there again; one whose asker has gone meanwhile is not waited for.

#[path = "common/mod.rs"]
mod common;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::memory_bank;
use common::migration::*;
use farbus_machine_bank::PAGE;
use farbus_machine_bank::cloud_hypervisor::{RestoreError, RestoreOptions};
use farbus_machine_bank::lazy::{Patience, StoreEvent};

#[test]
fn a_guest_waits_for_a_bank_that_is_away_and_one_that_goes_meanwhile_is_not_waited_for() {
    let (store, bank) = memory_bank();
    saved(&bank, |stream| assert_eq!(hand_over(stream, COMPLETE_PAUSED), Some(1))).unwrap();
    let memory = memory();
    let told = Arc::new(Mutex::new(Vec::new()));
    let hear = told.clone();
    let on_store = Arc::new(move |event: &StoreEvent| hear.lock().unwrap().push(event.clone()));
    let options = RestoreOptions { on_demand: true, resume: true, on_store, ..RestoreOptions::default() };
    let mut waits = |stream: &mut UnixStream, received: &Received| {
        store.disappear();
        let start = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(1500));
                store.heal();
            });
            assert_eq!(fault(stream, 50 * PAGE as u64, PAGE as u64), Some(1));
        });
        assert!(start.elapsed() >= Duration::from_millis(1500));
        assert!(page_of(&received.slots[0].1, 50) == memory[50 * PAGE..51 * PAGE]);
    };
    let (report, _) = restored(&bank, options.clone(), Some(&mut waits));
    let report = report.unwrap();
    assert!(report.faults == 1 && report.away_ms >= 1300, "{report:?}");
    let heard = told.lock().unwrap().clone();
    assert!(matches!(&heard[..], [StoreEvent::Away { .. }, StoreEvent::Back { .. }]), "{heard:?}");
    // Who asks and goes is not waited for.
    let mut goes = |stream: &mut UnixStream, _: &Received| {
        store.disappear();
        let range = [0_u64, PAGE as u64].map(u64::to_le_bytes).concat();
        stream.write_all(&[&header(PAGE_FAULT, 16)[..], &range].concat()).unwrap();
        std::thread::sleep(Duration::from_millis(300));
    };
    let start = Instant::now();
    let (report, _) = restored(&bank, options.clone(), Some(&mut goes));
    assert!(start.elapsed() < Duration::from_secs(20), "{report:?}");
    assert_eq!(report.unwrap().faults, 0);
    store.heal();
    // With a limit the page is given up, and the other end hears of it.
    let patience = Patience { give_up: Some(Duration::from_millis(200)), ..Patience::default() };
    let mut given_up = |stream: &mut UnixStream, _: &Received| {
        store.disappear();
        assert_eq!(fault(stream, 0, PAGE as u64), Some(2));
    };
    let (report, _) = restored(&bank, RestoreOptions { patience, ..options }, Some(&mut given_up));
    assert!(matches!(report, Err(RestoreError::Page(0))), "{report:?}");
}
