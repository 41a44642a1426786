//! A controller of the least size that the driver's protocol needs, and the ways in which a real one fails.
//!
//! A store to the tail doorbell carries the commands out at once, or, with `Fault::OutOfOrder`, at the next poll and in reverse order;
//! `Fault::Fatal` makes the next command set CSTS.CFS instead. The real controller model is elsewhere; this one exists to misbehave.

#![allow(dead_code, reason = "tests and micro benchmarks each use a part of it")]

use std::sync::Arc;

use farbus_bench::driver::{self, DmaMemory, Registers};
use farbus_remote_dma::{Iova, Width};
use farbus_transport::Memory;

pub const BASE: Iova = Iova(0x1_0000_0000);
pub const BLOCK: u64 = 512;
const PAGE: u64 = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    /// CSTS.RDY never comes.
    NeverReady,
    /// The next I/O command sets CSTS.CFS and is not answered.
    Fatal,
    /// I/O commands are not answered.
    Hang,
    /// After the next I/O command every register reads as all ones.
    Gone,
    /// I/O completions name a command that was never submitted.
    Stray,
    /// I/O commands are carried out at the next poll, last one first.
    OutOfOrder,
    /// I/O commands fail with "LBA out of range".
    Refuse,
    /// The data arrives after the completion was seen: what the ordering rule forbids.
    DataLate,
    /// The namespace's blocks carry metadata.
    Metadata,
}

#[derive(Clone, Copy, Debug, Default)]
struct Queue {
    submissions: u64,
    completions: u64,
    depth: u64,
    head: u64,
    tail: u64,
    completion_tail: u64,
    phase: bool,
    interrupts: bool,
}

#[derive(Debug)]
pub struct StubController {
    pub fault: Fault,
    pub memory: Arc<Memory>,
    pub disk: Arc<Memory>,
    pub doorbells: u64,
    pub interrupts: u64,
    pub flushes: u64,
    pub shut_down: bool,
    cc: u32,
    csts: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
    queues: [Queue; 9],
    late: Option<[u8; 64]>,
}

impl StubController {
    pub fn new(memory: Arc<Memory>, blocks: u64) -> Self {
        Self {
            fault: Fault::None,
            memory,
            disk: Memory::memfd("disk", blocks * BLOCK).unwrap(),
            doorbells: 0,
            interrupts: 0,
            flushes: 0,
            shut_down: false,
            cc: 0,
            csts: 0,
            aqa: 0,
            asq: 0,
            acq: 0,
            queues: [Queue::default(); 9],
            late: None,
        }
    }

    fn place(address: u64) -> u64 {
        address.checked_sub(BASE.0).expect("the driver gave an address outside its memory")
    }

    fn doorbell(&mut self, offset: u64, value: u64) {
        self.doorbells += 1;
        let index = ((offset - driver::DOORBELLS) / 4) as usize;
        let (queue, is_completion) = (index / 2, index % 2 == 1);
        let depth = self.queues[queue].depth;
        assert!(value < depth, "doorbell {value} of a queue of {depth}");
        if is_completion {
            return;
        }
        self.queues[queue].tail = value;
        if queue == 0 || self.fault != Fault::OutOfOrder {
            self.run(queue);
        }
    }

    fn run(&mut self, queue: usize) {
        while self.queues[queue].head != self.queues[queue].tail {
            let entry = self.next_entry(queue);
            if queue == 0 {
                self.admin(&entry);
            } else {
                self.io(queue, &entry);
            }
        }
    }

    fn run_reversed(&mut self, queue: usize) {
        let mut entries = Vec::new();
        while self.queues[queue].head != self.queues[queue].tail {
            entries.push(self.next_entry(queue));
        }
        for entry in entries.iter().rev() {
            self.io(queue, entry);
        }
    }

    fn next_entry(&mut self, queue: usize) -> [u8; 64] {
        let q = &mut self.queues[queue];
        let mut entry = [0; 64];
        self.memory.read(Self::place(q.submissions) + q.head * 64, &mut entry).unwrap();
        q.head = (q.head + 1) % q.depth;
        entry
    }

    fn complete(&mut self, queue: usize, identifier: u32, status: u32, result: u32) {
        let q = &mut self.queues[queue];
        let word = identifier | (u32::from(q.phase) << 16) | (status << 17);
        let mut entry = [0; 16];
        entry[0..4].copy_from_slice(&result.to_le_bytes());
        entry[12..16].copy_from_slice(&word.to_le_bytes());
        let at = Self::place(q.completions) + q.completion_tail * 16;
        self.memory.store_last_word_last(at, &entry).unwrap();
        q.completion_tail = (q.completion_tail + 1) % q.depth;
        q.phase ^= q.completion_tail == 0;
        self.interrupts += u64::from(q.interrupts);
    }

    fn admin(&mut self, entry: &[u8; 64]) {
        let (prp1, cdw10, cdw11) = (wide(entry, 24), word(entry, 40), word(entry, 44));
        let mut result = 0;
        match entry[0] {
            0x06 => {
                let mut data = [0_u8; 4096];
                match cdw10 {
                    0 => {
                        data[..8].copy_from_slice(&(self.disk.len() / BLOCK).to_le_bytes());
                        data[130] = 9;
                        data[128] = u8::from(self.fault == Fault::Metadata) * 8;
                    }
                    1 => {
                        data[4..24].copy_from_slice(b"STUB                ");
                        data[77] = 8;
                    }
                    _ => data[0] = 1,
                }
                self.memory.write(Self::place(prp1), &data).unwrap();
            }
            0x09 => result = 7 | (7 << 16),
            0x05 => {
                self.queues[(cdw10 & 0xffff) as usize] = Queue {
                    completions: prp1,
                    depth: u64::from(cdw10 >> 16) + 1,
                    phase: true,
                    interrupts: cdw11 & 2 != 0,
                    ..Queue::default()
                }
            }
            0x01 => self.queues[(cdw10 & 0xffff) as usize].submissions = prp1,
            0x00 | 0x04 => {}
            opcode => panic!("admin opcode {opcode:#x}"),
        }
        self.complete(0, u32::from(entry[2]), 0, result);
    }

    fn io(&mut self, queue: usize, entry: &[u8; 64]) {
        let identifier = word(entry, 0) >> 16;
        match self.fault {
            Fault::Hang => return,
            Fault::Fatal => {
                self.csts |= 2;
                return;
            }
            Fault::Gone => {
                self.csts = u32::MAX;
                return;
            }
            Fault::Stray => return self.complete(queue, identifier ^ 0x20, 0, 0),
            Fault::Refuse => return self.complete(queue, identifier, 0x4080, 0),
            Fault::DataLate if entry[0] == 2 => self.late = Some(*entry),
            _ => match entry[0] {
                0 => self.flushes += 1,
                _ => self.transfer(entry),
            },
        }
        self.complete(queue, identifier, 0, 0);
    }

    fn transfer(&mut self, entry: &[u8; 64]) {
        let mut disk_at = wide(entry, 40) * BLOCK;
        let mut left = (u64::from(word(entry, 48) & 0xffff) + 1) * BLOCK;
        let (prp1, prp2) = (wide(entry, 24), wide(entry, 32));
        let first = left.min(PAGE - prp1 % PAGE);
        self.piece(entry[0], prp1, disk_at, first);
        left -= first;
        disk_at += first;
        let mut list = prp2;
        let single = left <= PAGE;
        while left > 0 {
            let address = if single { prp2 } else { self.list_entry(list) };
            if !single && list % PAGE == PAGE - 8 && left > PAGE {
                list = address;
                continue;
            }
            let len = left.min(PAGE);
            self.piece(entry[0], address, disk_at, len);
            left -= len;
            disk_at += len;
            list += 8;
        }
    }

    fn list_entry(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read(Self::place(at), &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn piece(&self, opcode: u8, address: u64, disk_at: u64, len: u64) {
        let at = Self::place(address);
        match opcode {
            1 => self.disk.copy_from(disk_at, &self.memory, at, len).unwrap(),
            2 => self.memory.copy_from(at, &self.disk, disk_at, len).unwrap(),
            opcode => panic!("opcode {opcode:#x}"),
        }
    }
}

impl Registers for StubController {
    fn read(&mut self, offset: u64, width: Width) -> u64 {
        assert_eq!(width, Width::B4);
        if self.csts == u32::MAX {
            return Width::B4.all_ones();
        }
        match offset {
            // MQES 1024, CQR, TO 0 (the driver's own least time), NVM command set.
            driver::CAP => 0x0001_03ff,
            0x04 => 0x20,
            driver::CC => u64::from(self.cc),
            driver::CSTS => u64::from(self.csts),
            _ => 0,
        }
    }

    fn write(&mut self, offset: u64, width: Width, value: u64) {
        assert_eq!(width, Width::B4);
        if offset >= driver::DOORBELLS {
            return self.doorbell(offset, value);
        }
        let half = |old: u64, high: bool| match high {
            false => (old & !0xffff_ffff) | value,
            true => (old & 0xffff_ffff) | (value << 32),
        };
        match offset {
            driver::AQA => self.aqa = value as u32,
            0x28 | 0x2c => self.asq = half(self.asq, offset == 0x2c),
            0x30 | 0x34 => self.acq = half(self.acq, offset == 0x34),
            driver::CC => {
                self.cc = value as u32;
                self.csts &= !0b1111;
                if self.cc & driver::CC_SHUTDOWN_NORMAL != 0 {
                    self.shut_down = true;
                    self.csts |= 0b1001;
                } else if self.cc & 1 != 0 && self.fault != Fault::NeverReady {
                    self.csts |= 1;
                    self.queues = [Queue::default(); 9];
                    self.queues[0] = Queue {
                        submissions: self.asq,
                        completions: self.acq,
                        depth: u64::from(self.aqa & 0xfff) + 1,
                        phase: true,
                        ..Queue::default()
                    };
                }
            }
            _ => {}
        }
    }

    fn poll(&mut self) {
        if self.fault == Fault::OutOfOrder {
            (1..self.queues.len()).for_each(|queue| self.run_reversed(queue));
        }
        if let Some(entry) = self.late.take() {
            self.transfer(&entry);
        }
    }
}

fn word(entry: &[u8; 64], at: usize) -> u32 {
    u32::from_le_bytes(entry[at..at + 4].try_into().unwrap())
}

fn wide(entry: &[u8; 64], at: usize) -> u64 {
    u64::from_le_bytes(entry[at..at + 8].try_into().unwrap())
}

/// Memory for a driver, and a stub with a disk of `blocks` that reaches it.
pub fn pair(blocks: u64) -> (StubController, DmaMemory) {
    let memory = Memory::memfd("guest", 64 << 20).unwrap();
    (StubController::new(Arc::clone(&memory), blocks), DmaMemory::new(memory, BASE))
}
