//! A saved function that somebody changed: it is refused with a reason, or restored to a function that goes on without a panic, on a device that was reset.
//!
//! Bytes that begin with an even number are parsed as they are. Otherwise they are changes to the state of a guest at work, `pp pp ll bytes…` each: `10 02 01 ff` puts
//! 0xff at byte 0x210; the checksum is made good, so that what lies behind it is reached: the queues of the NVMe profile, say, which a controller is brought back to.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use farbus_pci_shim::{Embedded, FunctionState};
use farbus_remote_dma::model::{Nvme, NvmeOptions};
use farbus_remote_dma::native::Native;
use farbus_remote_dma::{BarAddress, GuestAddress, Width};
use farbus_transport::{Memory, Nanos};

use super::input::Input;
use crate::scripted_guest::{BLOCK_BYTES, BLOCKS, FlagSink, Guest, MEMORY_BYTES};

const HASH_BYTES: usize = 32;

fn native() -> Box<Native> {
    let image = Memory::memfd("fuzz-image", BLOCKS * BLOCK_BYTES).expect("memory");
    let options = NvmeOptions { serial: Some("fuzz".into()), ..NvmeOptions::default() };
    Box::new(Native::inline(Box::new(Nvme::in_memory(image, options).expect("a controller"))).expect("it attaches"))
}

/// A state of a guest at work, and the guest's memory in it.
fn at_work() -> &'static (Vec<u8>, Vec<u8>) {
    static STATE: OnceLock<(Vec<u8>, Vec<u8>)> = OnceLock::new();
    STATE.get_or_init(|| {
        let guest = Guest::new(Memory::memfd("fuzz-guest", MEMORY_BYTES).expect("memory"));
        let mut device = Embedded::new(native(), FlagSink(Arc::clone(guest.memory())), guest.slice()).expect("a function");
        guest.boot(&mut device, 9).expect("it boots");
        for _ in 0..20 {
            guest.step(&mut device, 8).expect("it works");
            device.poll(Nanos::now());
        }
        device.quiesce(Duration::from_secs(10)).expect("it comes to rest");
        let mut memory = vec![0; MEMORY_BYTES as usize];
        guest.memory().read(0, &mut memory).expect("its own memory");
        (device.save().expect("it is saved"), memory)
    })
}

/// A state that came from anywhere.
pub fn function_state(bytes: &[u8]) {
    let mut input = Input(bytes);
    let Some(first) = input.u8() else { return };
    if first & 1 == 0 {
        if let Ok(state) = FunctionState::parse(input.0) {
            let again = state.encode();
            assert_eq!(FunctionState::parse(&again).as_ref(), Ok(&state), "a state is not what it was written as");
        }
        return;
    }
    let (good, contents) = at_work();
    let mut state = good.clone();
    while let (Some(at), Some(piece)) = (input.u16(), input.piece()) {
        for (place, byte) in state.iter_mut().skip(usize::from(at)).zip(piece) {
            *place = *byte;
        }
    }
    if let Some((body, hash)) = state.split_last_chunk_mut::<HASH_BYTES>() {
        hash.copy_from_slice(blake3::hash(body).as_bytes());
    }
    let memory = Memory::memfd("fuzz-guest", MEMORY_BYTES).expect("memory");
    memory.write(0, contents).expect("its own memory");
    let slice = farbus_remote_dma::guest_memory::SliceMemory::new(GuestAddress(0), Arc::clone(&memory));
    match Embedded::restore(native(), FlagSink(memory), slice, &state) {
        Err(refused) => assert!(!refused.to_string().is_empty()),
        Ok((mut function, _)) => {
            function.resume();
            for _ in 0..8 {
                function.poll(Nanos::now());
            }
            let at = BarAddress { bar: 0, offset: 0x1c };
            assert!(function.bar_read(at, Width::B4).is_ok());
            // It can be saved again, as whatever it is now.
            if function.quiesce(Duration::from_millis(100)).is_ok() {
                let saved = function.save().expect("a function at rest is saved");
                FunctionState::parse(&saved).expect("what was saved is a state");
            }
        }
    }
}
