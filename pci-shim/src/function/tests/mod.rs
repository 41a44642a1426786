//! A function over a scripted attachment: what the guest does on one side, what the device says on the other, and what must come of it.

mod access;
mod fuzz;
mod interrupts;
mod lazy;
mod mediation;
mod reset;

use farbus_remote_dma::{BarAddress, DeviceDescription, Ticket, Width};
use farbus_transport::{Memory, Nanos};
use std::sync::Arc;

use super::*;
use crate::irq::{MessageInterrupt, RecorderSink, Told};
use crate::scripted::{Call, Script, description};

const TABLE: u64 = 0x2000;
const PENDING: u64 = 0x3000;
const COMMAND: u16 = 0x04;
const MSI_CONTROL: u16 = 0x52;
const MSIX_CONTROL: u16 = 0x72;

/// A vCPU thread may own a function.
const fn assert_send<T: Send>() {}
const _: () = assert_send::<Function<RecorderSink>>();

struct Bench {
    script: Script,
    function: Function<RecorderSink>,
}

impl Bench {
    fn new(interrupts: InterruptOwner) -> Self {
        Self::of(description(), interrupts)
    }

    fn of(description: DeviceDescription, interrupts: InterruptOwner) -> Self {
        let script = Script::default();
        let attachment = script.attachment(description);
        let function = Function::new(attachment, RecorderSink::default(), FunctionOptions { interrupts }).unwrap();
        assert_eq!(script.calls(), [Call::BusMaster(false), Call::Mode(InterruptMode::Pin)]);
        Self { script, function }
    }

    /// As a driver leaves it: decoding and bus mastering on, MSI-X on, vector `v` unmasked with data 0x4000 + `v`.
    fn running() -> Self {
        let mut bench = Self::new(InterruptOwner::Function);
        bench.config(COMMAND, 0x0007);
        bench.config(MSIX_CONTROL, 0x8000);
        for vector in 0..65 {
            bench.write(TABLE + vector * 16, Width::B8, 0xfee0_0000);
            bench.write(TABLE + vector * 16 + 8, Width::B8, 0x4000 + vector);
        }
        bench.script.calls();
        bench
    }

    fn config(&mut self, offset: u16, value: u16) {
        self.function.config_write(offset, &value.to_le_bytes()).unwrap();
    }

    fn config_read(&mut self, offset: u16) -> u16 {
        let mut bytes = [0; 2];
        self.function.config_read(offset, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    }

    fn write(&mut self, offset: u64, width: Width, value: u64) {
        self.function.bar_write(BarAddress { bar: 0, offset }, width, value).unwrap();
    }

    fn read(&mut self, offset: u64, width: Width) -> u64 {
        self.function.bar_read(BarAddress { bar: 0, offset }, width).unwrap()
    }

    fn mask(&mut self, vector: u64, masked: bool) {
        self.write(TABLE + vector * 16 + 12, Width::B4, u64::from(masked));
    }

    fn poll(&mut self) {
        self.function.poll(Nanos(0));
    }

    fn told(&mut self) -> Vec<Told> {
        self.function.sink_mut().take()
    }
}

fn message(vector: u16) -> Told {
    Told::Message(MessageInterrupt { vector, address: 0xfee0_0000, data: 0x4000 + u32::from(vector) })
}
