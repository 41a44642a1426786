//! The driver against a controller that does, and does not, what the specification says.
//!
//! 700 writes through a queue of 8 entries wrap the ring 87 times; every one must be found on the disk, and in the order of its token.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a panic is how a test fails")]

mod stub_controller;

use std::time::{Duration, Instant};

use farbus_bench::driver::{Driver, DriverError, DriverOptions, Io, QueueIndex};
use stub_controller::{BLOCK, Fault, StubController, pair};

const QUEUE: QueueIndex = QueueIndex(1);

fn start(fault: Fault, options: DriverOptions) -> Result<Driver<StubController>, DriverError> {
    let (mut stub, dma) = pair(16_384);
    stub.fault = fault;
    Driver::start(stub, dma, options)
}

fn short() -> DriverOptions {
    DriverOptions { depth: 8, command_timeout: Duration::from_millis(30), ..DriverOptions::default() }
}

#[test]
fn a_controller_comes_up_says_who_it_is_and_goes_down_in_order() {
    let options = DriverOptions { queues: 8, depth: 1024, ..short() };
    let driver = start(Fault::None, options).unwrap();
    assert_eq!(driver.identity().serial, "STUB");
    assert_eq!(driver.identity().max_transfer, Some(1 << 20));
    assert_eq!((driver.namespace().blocks, driver.namespace().block_bytes), (16_384, BLOCK));
    let stub = driver.shutdown().unwrap();
    assert!(stub.shut_down);
}

#[test]
fn a_stopped_driver_can_be_followed_by_another() {
    let driver = start(Fault::None, short()).unwrap();
    let stub = driver.into_registers();
    let dma = farbus_bench::driver::DmaMemory::new(std::sync::Arc::clone(&stub.memory), stub_controller::BASE);
    let mut driver = Driver::start(stub, dma, short()).unwrap();
    driver.execute(QUEUE, &Io::Flush).unwrap();
    assert_eq!(driver.registers_mut().flushes, 1);
}

/// Writes and reads through rings that wrap, several commands at once, in the order the fault makes.
fn exchange(fault: Fault) {
    let mut driver = start(fault, short()).unwrap();
    let buffers: Vec<_> = (0..7).map(|_| driver.allocate(4096).unwrap()).collect();
    for round in 0..100_u64 {
        for (token, buffer) in (0..).zip(&buffers) {
            buffer.write(0, &[(round + token) as u8; 4096]).unwrap();
            let block = (round * 7 + token) * 8;
            driver.submit(QUEUE, &Io::Write { block, from: buffer }, token).unwrap();
        }
        assert!(matches!(driver.submit(QUEUE, &Io::Flush, 99), Err(DriverError::Full { queue: 1 })));
        let doorbells = driver.registers_mut().doorbells;
        driver.ring(QUEUE).unwrap();
        let mut seen = 0_u32;
        while driver.in_flight(QUEUE).unwrap() > 0 {
            driver
                .reap_some(QUEUE, |done| {
                    assert!(done.status.ok());
                    seen |= 1 << done.token;
                })
                .unwrap();
        }
        assert_eq!(seen, 0x7f, "every token once");
        assert_eq!(driver.registers_mut().doorbells, doorbells + 2, "one doorbell each way for seven commands");
    }
    for block in 0..700_u64 {
        let buffer = &buffers[0];
        driver.execute(QUEUE, &Io::Read { block: block * 8, into: buffer }).unwrap();
        let mut data = [0; 4096];
        buffer.read(0, &mut data).unwrap();
        assert_eq!(data, [(block / 7 + block % 7) as u8; 4096]);
    }
}

#[test]
fn every_write_is_found_where_it_belongs_when_rings_wrap() {
    exchange(Fault::None);
}

#[test]
fn completions_in_any_order_find_their_commands() {
    exchange(Fault::OutOfOrder);
}

#[test]
fn a_transfer_of_any_length_and_offset_moves_exactly_its_bytes() {
    let options = DriverOptions { max_transfer: 1 << 20, ..short() };
    let mut driver = start(Fault::None, options).unwrap();
    let arena = driver.allocate((1 << 20) + 4096).unwrap();
    let pattern: Vec<u8> = (0..1 << 20).map(|at| (at % 251) as u8).collect();
    for (offset, len) in [(0, 512), (4, 4096), (2048, 8192), (512, 128 << 10), (0, 1 << 20), (4092, 1 << 20)] {
        let out = arena.slice(offset, len).unwrap();
        out.write(0, &pattern[..len as usize]).unwrap();
        driver.execute(QUEUE, &Io::Write { block: 3, from: &out }).unwrap();
        out.write(0, &vec![0; len as usize]).unwrap();
        driver.execute(QUEUE, &Io::Read { block: 3, into: &out }).unwrap();
        let mut back = vec![0; len as usize];
        out.read(0, &mut back).unwrap();
        assert!(back == pattern[..len as usize], "{len} bytes at {offset}");
    }
}

#[test]
fn what_leaves_the_namespace_or_the_limits_is_refused_here() {
    let mut driver = start(Fault::None, short()).unwrap();
    let buffer = driver.allocate(1 << 20).unwrap();
    let cases = [(16_384 - 7, 4096), (u64::MAX, 4096), (0, 1 << 20), (0, 100)];
    for (block, len) in cases {
        let into = &buffer.slice(0, len).unwrap();
        assert!(matches!(driver.execute(QUEUE, &Io::Read { block, into }), Err(DriverError::Limit { .. })));
    }
    assert!(matches!(driver.ring(QueueIndex(0)), Err(DriverError::NoQueue { queue: 0 })));
    assert!(matches!(driver.ring(QueueIndex(2)), Err(DriverError::NoQueue { queue: 2 })));
    assert_eq!(driver.in_flight(QUEUE).unwrap(), 0);
}

#[test]
fn a_failed_read_is_never_taken_for_data() {
    let mut driver = start(Fault::Refuse, short()).unwrap();
    let into = &driver.allocate(4096).unwrap();
    let error = driver.execute(QUEUE, &Io::Read { block: 0, into }).unwrap_err();
    assert_eq!(error.to_string(), "read: LBA out of range (status 0/0x80)");
}

#[test]
fn a_controller_that_fails_hangs_leaves_or_lies_is_named_in_bounded_time() {
    type Expected = fn(&DriverError) -> bool;
    let expectations: [(Fault, Expected); 4] = [
        (Fault::Fatal, |error| matches!(error, DriverError::Fatal { csts: 3 })),
        (Fault::Hang, |error| matches!(error, DriverError::Timeout { queue: 1, in_flight: 1, .. })),
        (Fault::Gone, |error| matches!(error, DriverError::Gone)),
        (Fault::Stray, |error| matches!(error, DriverError::StrayCompletion { queue: 1, .. })),
    ];
    for (fault, expected) in expectations {
        let mut driver = start(fault, short()).unwrap();
        let into = &driver.allocate(4096).unwrap();
        let began = Instant::now();
        let error = driver.execute(QUEUE, &Io::Read { block: 0, into }).unwrap_err();
        assert!(expected(&error), "{fault:?}: {error}");
        assert!(began.elapsed() < Duration::from_secs(5));
    }
    let error = start(Fault::NeverReady, short()).unwrap_err();
    assert!(matches!(error, DriverError::Ready { what: "become ready", .. }), "{error}");
    let error = start(Fault::Metadata, short()).unwrap_err();
    assert!(matches!(error, DriverError::Unsupported(_)), "{error}");
}

#[test]
fn a_driver_that_asks_for_too_much_hears_how_much_there_is() {
    let too_deep = DriverOptions { depth: 1025, ..short() };
    let error = start(Fault::None, too_deep).unwrap_err();
    assert_eq!(error.to_string(), "entries of a queue: asked for 1025, the controller allows 1024");
    let too_many = DriverOptions { queues: 9, ..short() };
    assert!(matches!(start(Fault::None, too_many), Err(DriverError::Limit { allowed: 8, .. })));
    let (stub, _) = pair(1);
    let small =
        farbus_bench::driver::DmaMemory::new(farbus_transport::Memory::memfd("small", 8192).unwrap(), stub_controller::BASE);
    assert!(matches!(Driver::start(stub, small, short()), Err(DriverError::DmaMemory { .. })));
}

#[test]
fn with_a_vector_the_driver_sleeps_until_the_interrupt_and_asks_for_it() {
    let options = DriverOptions { vectors: vec![1], ..short() };
    let mut driver = start(Fault::OutOfOrder, options).unwrap();
    let into = &driver.allocate(4096).unwrap();
    driver.submit(QUEUE, &Io::Read { block: 0, into }, 7).unwrap();
    driver.ring(QUEUE).unwrap();
    let mut token = None;
    driver.reap_by_interrupt(QUEUE, |_, _, _| Ok(()), |done| token = Some(done.token)).unwrap();
    assert_eq!(token, Some(7));
    assert_eq!(driver.registers_mut().interrupts, 1, "the completion queue was made with its vector");

    driver.registers_mut().fault = Fault::Hang;
    driver.submit(QUEUE, &Io::Read { block: 0, into }, 8).unwrap();
    driver.ring(QUEUE).unwrap();
    let mut waits = 0;
    let sleep = |_: &mut StubController, vector: u16, at_most: Duration| {
        waits += 1;
        assert_eq!(vector, 1);
        std::thread::sleep(at_most);
        Ok(())
    };
    let error = driver.reap_by_interrupt(QUEUE, sleep, |_| {}).unwrap_err();
    assert!(matches!(error, DriverError::Timeout { .. }), "{error}");
    assert_eq!(waits, 1, "it slept the whole time in one piece");
}
