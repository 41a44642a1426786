//! Guest memory reached through the owner. Example: vector 3 is told after the store before it is answered, not when it is raised.

use super::*;
use crate::embed::Embedded;
use crate::mediation::MediationKind;
use crate::scripted::Say;
use farbus_remote_dma::guest_memory::SliceMemory;
use farbus_remote_dma::{GuestAddress, GuestMemory, GuestMemoryError, GuestRegion, Iova};
use std::sync::Mutex;

fn store(ticket: u32, at: u64, byte: u8) -> Say {
    Say::Store(Ticket(ticket), Iova(at), vec![byte; 16])
}

/// What the guest finds at 0x1000 when it hears of vector 3, with an owner that answers after (or, the twin, before) it has stored.
fn seen_by_the_guest(answers_first: bool) -> u8 {
    let mut bench = Bench::running();
    let mut memory = vec![0u8; 0x2000];
    let mut seen = None;
    bench.script.say([store(1, 0x1000, 0xab), Say::Vector(3)]);
    bench.poll();
    let mut look = |bench: &mut Bench, memory: &[u8]| {
        if !bench.told().is_empty() {
            seen = Some(memory[0x1000]);
        }
    };
    look(&mut bench, &memory);
    while let Some(request) = bench.function.next_mediation() {
        let MediationKind::Store { bytes, polled: true } = request.kind else {
            panic!("a polled store was asked for")
        };
        if answers_first {
            bench.function.answer(request.ticket, MediationAnswer::Stored);
            look(&mut bench, &memory);
        }
        let start = request.iova.0 as usize;
        memory[start..start + bytes.len()].copy_from_slice(&bytes);
        if !answers_first {
            bench.function.answer(request.ticket, MediationAnswer::Stored);
            look(&mut bench, &memory);
        }
    }
    seen.unwrap()
}

#[test]
fn the_guest_never_hears_of_data_that_is_not_in_its_memory_yet() {
    assert_eq!(seen_by_the_guest(false), 0xab);
    assert_eq!(seen_by_the_guest(true), 0, "the twin that breaks the rule must be found out");
}

#[test]
fn an_unmapped_range_is_not_touched_by_stores_that_were_asked_for_before() {
    let mut bench = Bench::running();
    bench.script.say([store(1, 0x1000, 1), store(2, 0x5000, 2)]);
    bench.poll();
    bench.script.say([store(3, 0x1ff0, 3)]);
    bench.function.unmap(Iova(0x1000), 0x1000).unwrap();
    let expected = [
        Call::Unmap(Iova(0x1000), 0x1000),
        Call::Fault(Ticket(1)),
        Call::Fault(Ticket(3)),
    ];
    assert_eq!(bench.script.calls(), expected);
    assert_eq!(bench.function.next_mediation().map(|request| request.ticket), Some(Ticket(2)));
    assert_eq!(bench.function.next_mediation(), None);
}

#[test]
fn an_owner_does_not_sleep_on_a_mediation_that_waits() {
    let mut bench = Bench::running();
    bench.script.say([Say::Fetch(Ticket(1), Iova(0x10), 8)]);
    bench.poll();
    assert!(!bench.function.arm());
    bench.function.next_mediation().unwrap();
    assert!(bench.function.arm());
    bench.function.answer(Ticket(1), MediationAnswer::Fetched(&[7; 8]));
    assert_eq!(bench.script.calls(), [Call::Fetched(Ticket(1), vec![7; 8])]);
    bench.function.answer(Ticket(1), MediationAnswer::Fault);
    assert_eq!(bench.script.calls(), [], "a second answer goes nowhere");
    assert_eq!(bench.function.counters().mediations, 1);
}

/// Guest memory without a descriptor: all of it is mediated.
#[derive(Clone)]
struct Bytes(Arc<Mutex<Vec<u8>>>);

impl Bytes {
    fn with<T>(&self, at: GuestAddress, len: usize, use_it: impl FnOnce(&mut [u8]) -> T) -> Result<T, GuestMemoryError> {
        let mut bytes = self.0.lock().unwrap();
        let start = at.0 as usize;
        let len_bytes = len as u64;
        let range = bytes.get_mut(start..start + len);
        range.map(use_it).ok_or(GuestMemoryError {
            at: at.0,
            len: len_bytes,
        })
    }
}

impl GuestMemory for Bytes {
    fn regions(&self) -> Vec<GuestRegion> {
        vec![GuestRegion {
            start: GuestAddress(0),
            len: 0x2000,
            memory: None,
        }]
    }

    fn read(&self, at: GuestAddress, into: &mut [u8]) -> Result<(), GuestMemoryError> {
        self.with(at, into.len(), |bytes| into.copy_from_slice(bytes))
    }

    fn write(&self, at: GuestAddress, from: &[u8]) -> Result<(), GuestMemoryError> {
        self.with(at, from.len(), |bytes| bytes.copy_from_slice(from))
    }
}

#[test]
fn an_embedded_function_makes_the_devices_stores_before_a_register_read_reveals_them() {
    let script = Script::default();
    let memory = Bytes(Arc::new(Mutex::new(vec![5; 0x2000])));
    let attachment = script.attachment(description());
    let mut embedded = Embedded::new(attachment, RecorderSink::default(), memory.clone()).unwrap();
    let (iova, len, direct) = (Iova(0), 0x2000, false);
    assert!(script.calls().contains(&Call::Map { iova, len, direct }));
    embedded.config_write(COMMAND, &[0x06, 0]).unwrap();
    script.calls();
    let fetch = |ticket, at, len| Say::Fetch(Ticket(ticket), Iova(at), len);
    script.say([
        fetch(1, 0x10, 4),
        store(2, 0x1000, 9),
        fetch(3, 0x2000, 1),
        store(4, 0x1ff8, 1),
    ]);
    let at = BarAddress { bar: 0, offset: 0x1c };
    embedded.bar_read(at, Width::B4).unwrap();
    assert_eq!(memory.0.lock().unwrap()[0x1000..0x1010], [9; 16]);
    let calls = script.calls();
    let expected = [
        Call::Read(at, Width::B4),
        Call::Fault(Ticket(4)), // leaves its page: refused at once
        Call::Fetched(Ticket(1), vec![5; 4]),
        Call::Stored(Ticket(2)),
        Call::Fault(Ticket(3)), // outside guest memory
    ];
    assert_eq!(calls, expected);
}

#[test]
fn memory_with_a_descriptor_is_granted_and_not_mediated() {
    let script = Script::default();
    let memory = Memory::memfd("farbus-test", 0x10000).unwrap();
    let memory = SliceMemory::new(GuestAddress(0x10_0000), memory);
    Embedded::new(script.attachment(description()), RecorderSink::default(), memory).unwrap();
    let (iova, len, direct) = (Iova(0x10_0000), 0x10000, true);
    assert!(script.calls().contains(&Call::Map { iova, len, direct }));
}
