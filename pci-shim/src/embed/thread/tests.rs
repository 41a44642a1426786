//! Ports and the thread behind them: order, bursts, waking, and what is read when the thread has ended.
//!
//! Two vCPUs store 0 to 499 each to a register of their own; the device sees each of the two series in order.

use farbus_remote_dma::guest_memory::SliceMemory;
use farbus_remote_dma::{BarAddress, GuestAddress, Width};
use farbus_transport::Memory;

use super::*;
use crate::access::AccessError;
use crate::irq::{RecorderSink, Told};
use crate::scripted::{Call, Say, Script, description};

type Thread = FunctionThread<RecorderSink, SliceMemory>;

const COMMAND: u16 = 0x04;

fn register(offset: u64) -> BarAddress {
    BarAddress { bar: 0, offset }
}

fn start(vcpus: usize, spin: Duration) -> (Script, Thread, Vec<VcpuPort>) {
    let script = Script::default();
    let memory = SliceMemory::new(GuestAddress(0), Memory::memfd("guest", 8192).unwrap());
    let function = Embedded::new(script.attachment(description()), RecorderSink::default(), memory).unwrap();
    let (thread, mut ports) = FunctionThread::start(function, vcpus, FunctionThreadOptions { spin }).unwrap();
    ports[0].config_write(COMMAND, &[0x07, 0]).unwrap();
    script.calls();
    (script, thread, ports)
}

fn writes(script: &Script, offset: u64) -> Vec<u64> {
    let calls = script.calls().into_iter();
    calls
        .filter_map(|call| if let Call::Write(at, _, value) = call { (at == register(offset)).then_some(value) } else { None })
        .collect()
}

#[test]
fn each_vcpus_writes_arrive_in_its_order_and_its_read_follows_them() {
    let (script, _thread, ports) = start(2, Duration::from_millis(1));
    let vcpus = ports.into_iter().zip([0x1008, 0x1010]).map(|(mut port, offset)| {
        std::thread::spawn(move || {
            for value in 0..500 {
                port.bar_write(register(offset), Width::B4, value).unwrap();
            }
            port.bar_read(register(0x1c), Width::B4).unwrap()
        })
    });
    let vcpus: Vec<_> = vcpus.collect();
    assert!(vcpus.into_iter().all(|vcpu| vcpu.join().unwrap() == 0));
    let calls = script.calls();
    for offset in [0x1008, 0x1010] {
        let written = calls.iter().filter(|call| matches!(call, Call::Write(at, ..) if *at == register(offset)));
        let expected = (0..500).map(|value| Call::Write(register(offset), Width::B4, value));
        assert!(written.cloned().eq(expected), "{offset:#x}");
    }
    let reads: Vec<_> =
        calls.iter().enumerate().filter(|(_, call)| matches!(call, Call::Read(..))).map(|(place, _)| place).collect();
    assert!(reads.len() == 2 && reads[1] == calls.len() - 1 && reads[0] >= 500, "{reads:?}");
}

#[test]
fn what_was_posted_while_the_thread_was_busy_is_one_flush() {
    let script = Script::default();
    let memory = SliceMemory::new(GuestAddress(0), Memory::memfd("guest", 4096).unwrap());
    let mut function = Embedded::new(script.attachment(description()), RecorderSink::default(), memory).unwrap();
    function.config_write(COMMAND, &[0x07, 0]).unwrap();
    let shared = Arc::new(Shared { routes: function.function.routes().clone(), over: AtomicBool::new(false) });
    let (mut vcpu, served) = port(&shared).unwrap();
    let mut owner = Owner { function, served: vec![served], stop: Waker::new().unwrap(), over: Over(shared) };
    for value in 0..64 {
        vcpu.bar_write(register(0x1008), Width::B4, value).unwrap();
    }
    let before = script.flushes();
    assert!(owner.serve());
    assert_eq!((script.flushes() - before, writes(&script, 0x1008).len()), (1, 64));
    assert!(!owner.serve());
    assert_eq!(script.flushes() - before, 1, "nothing was posted");
}

#[test]
fn a_thread_that_sleeps_is_woken_by_each_access() {
    let (script, thread, mut ports) = start(2, Duration::ZERO);
    for value in 0..50 {
        std::thread::sleep(Duration::from_millis(1));
        ports[1].bar_write(register(0x1008), Width::B4, value).unwrap();
        std::thread::sleep(Duration::from_micros(value * 20));
        assert_eq!(ports[0].bar_read(register(0x1c), Width::B4).unwrap(), 0);
    }
    assert!(thread.stop().is_some());
    assert_eq!(writes(&script, 0x1008), (0..50).collect::<Vec<_>>());
}

#[test]
fn an_access_that_hardware_cannot_make_is_refused_at_the_port() {
    let (script, _thread, mut ports) = start(1, Duration::from_millis(1));
    let port = &mut ports[0];
    assert!(matches!(port.bar_write(register(0x1016), Width::B4, 0), Err(AccessError::Misaligned { .. })));
    assert!(matches!(port.bar_read(register(0x4000), Width::B4), Err(AccessError::PastEnd { .. })));
    assert_eq!(port.config_read(4092, &mut [0; 8]), Err(AccessError::Config { offset: 4092, len: 8 }));
    assert_eq!(port.config_write(0, &[0; 9]), Err(AccessError::Config { offset: 0, len: 9 }));
    assert_eq!(script.calls(), []);
    let mut identity = [0; 4];
    port.config_read(0, &mut identity).unwrap();
    assert_eq!(identity, [0x1d, 0x1d, 0x1f, 0x1f]);
}

#[test]
fn the_thread_signals_interrupts_and_gives_the_function_back() {
    let (script, thread, mut ports) = start(1, Duration::from_millis(1));
    script.say([Say::Pin(true)]);
    assert_eq!(ports[0].bar_read(register(0x1c), Width::B4).unwrap(), 0);
    ports[0].bar_write(register(0x1008), Width::B4, 7).unwrap();
    let mut function = thread.stop().unwrap();
    assert_eq!(writes(&script, 0x1008), [7]);
    assert_eq!(function.function_mut().sink_mut().take(), [Told::Pin(true)]);
    assert_eq!(ports[0].bar_read(register(0x1c), Width::B4).unwrap(), u64::from(u32::MAX));
    let mut identity = [0; 4];
    ports[0].config_read(0, &mut identity).unwrap();
    assert_eq!(identity, [0xff; 4]);
    // More than there is room for: nobody waits for a thread that has ended.
    for value in 0..1000 {
        ports[0].bar_write(register(0x1008), Width::B4, value).unwrap();
    }
}
