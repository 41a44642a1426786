//! The driver and the cases on a controller across a queue pair: every byte, interrupts, a lender that ends, and what an operation asks of the host.
//!
//! 8 MiB of this machine's files are read in full with eight reads of 128 KiB in flight, written to by all six cases, verified, restored and
//! verified again through a remote controller, in the soft-RoCE lab or on an RNIC.

mod rig;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use farbus_bench::driver::{DriverError, DriverOptions, Io};
use farbus_bench::measure::{CountingAllocator, Latencies, allocations_here, count_syscalls};
use farbus_bench::workload::{Budget, CASES};
use farbus_transport::{Access, Event, Events, Fabric, Memory, Nanos, Op, OpId, Regions, Signal};
use rig::{Place, QUEUE, rig, verbs_pair};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const BYTES: u64 = 8 << 20;

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn every_byte_is_right_across_a_queue_pair() {
    rig::every_byte_is_right(Place::Verbs, &rig::original(BYTES), BYTES, 200);
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_completion_comes_by_interrupt_across_a_queue_pair() {
    rig::a_completion_comes_by_interrupt(Place::Verbs, &rig::original(BYTES), BYTES);
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_lender_that_ends_is_named_and_not_waited_for() {
    let options = DriverOptions { command_timeout: Duration::from_secs(2), ..DriverOptions::default() };
    let mut rig = rig(Place::Verbs, &rig::original(BYTES), BYTES, options);
    drop(rig.lender.take());
    let into = &rig.driver.allocate(4096).unwrap();
    let error = rig.driver.execute(QUEUE, &Io::Read { block: 0, into }).unwrap_err();
    assert!(matches!(error, DriverError::Gone), "{error}");
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn the_data_path_does_not_allocate_and_asks_the_kernel_only_to_ring_a_doorbell() {
    const COMMANDS: u64 = 100;
    let mut rig = rig(Place::VerbsPolling, &rig::original(BYTES), BYTES, DriverOptions::default());
    let mut latencies = Latencies::new();
    for case in CASES {
        rig.workload.run(&mut rig.driver, case, Budget::Commands(COMMANDS)).unwrap();
        let (before, lender_before) = (allocations_here(), rig.lender_allocations.load(Ordering::Relaxed));
        let started = Instant::now();
        let work = || rig.workload.run_into(&mut rig.driver, case, Budget::Commands(COMMANDS), &mut latencies);
        let (run, counts) = count_syscalls(work).unwrap();
        let (took, allocations) = (started.elapsed(), allocations_here() - before);
        run.unwrap();
        let lender_allocations = rig.lender_allocations.load(Ordering::Relaxed) - lender_before;
        println!("{}: {counts:?} for {COMMANDS} commands in {} ms", case.name, took.as_millis());
        assert_eq!((allocations, lender_allocations), (0, 0), "{}", case.name);
        // A command is two register writes, its tail and its head, and each is at most one doorbell; soft-RoCE's is one system call.
        assert!(counts.total <= 2 * COMMANDS + looks(took) && counts.futex == 0, "{}: {counts:?}", case.name);
    }
}

/// System calls for looking at what raises no completion: two each time, a few times a second.
fn looks(took: Duration) -> u64 {
    2 * (2 + took.as_millis() as u64 / 50)
}

#[test]
#[ignore = "needs an RDMA device; ci/softroce runs it"]
fn a_flush_is_one_doorbell_and_nothing_else_allocates_or_asks_the_kernel() {
    const ROUNDS: u64 = 300;
    let (mut ours, mut theirs) = verbs_pair();
    let memory = |name| Memory::memfd(name, 64 << 10).unwrap();
    let near = ours.register(memory("near"), Access::READ_WRITE).unwrap();
    let far = theirs.register_for_peer(memory("far"), Access::READ_WRITE).unwrap();
    let grant = theirs.export(&far, Access::READ_WRITE).unwrap();
    let remote = ours.import(&grant).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let peer = scope.spawn(|| {
            let (mut events, mut heard) = (Events::new(), 0_u64);
            let before = allocations_here();
            // What was sent is received, and may still be untaken when the sender hears so.
            let mut stopped: Option<Instant> = None;
            while stopped.is_none_or(|stopped| heard < 100 + ROUNDS && stopped.elapsed() < Duration::from_secs(2)) {
                if stopped.is_none() && stop.load(Ordering::Relaxed) {
                    stopped = Some(Instant::now());
                }
                events.clear();
                theirs.poll(Nanos::now(), &mut events);
                heard += events.as_slice().len() as u64;
            }
            (heard, allocations_here() - before)
        });
        let mut events = Events::new();
        let mut round = |id| {
            let long = near.span(0, 4096, Access::READ_WRITE).unwrap();
            let (short, into) = (near.span(8192, 64, Access::READ).unwrap(), near.span(16384, 4096, Access::WRITE).unwrap());
            ours.post(Signal::No, Op::Write { from: long, to: remote.span(0, 4096, Access::WRITE).unwrap() }).unwrap();
            ours.post(Signal::No, Op::Write { from: short, to: remote.span(8192, 64, Access::WRITE).unwrap() }).unwrap();
            ours.post(Signal::No, Op::Read { from: remote.span(0, 4096, Access::READ).unwrap(), into }).unwrap();
            ours.post(Signal::Yes(OpId(id)), Op::Send { message: b"a message" }).unwrap();
            ours.flush();
            let done = |events: &Events| events.as_slice().contains(&Event::Done(OpId(id)));
            while !done(&events) {
                events.clear();
                ours.poll(Nanos::now(), &mut events);
            }
            ours.counters()
        };
        let first = (0..100).map(&mut round).last().unwrap();
        let (before, started) = (allocations_here(), Instant::now());
        let (last, counts) = count_syscalls(|| (100..100 + ROUNDS).map(&mut round).last().unwrap()).unwrap();
        let (took, allocations) = (started.elapsed(), allocations_here() - before);
        stop.store(true, Ordering::Relaxed);
        let (heard, peers_allocations) = peer.join().unwrap();
        let doorbells = last.doorbells - first.doorbells;
        println!("{counts:?}, {doorbells} doorbells, {} requests", last.work_requests - first.work_requests);
        assert_eq!((allocations, peers_allocations, heard), (0, 0, 100 + ROUNDS));
        assert_eq!(doorbells, ROUNDS);
        assert!((doorbells..=doorbells + looks(took)).contains(&counts.total) && counts.futex == 0, "{counts:?}");
    });
}
