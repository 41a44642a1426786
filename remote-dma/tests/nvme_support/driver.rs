//! A driver for one controller: admin queue, IO queues, commands by identifier, completions by phase.
//!
//! `driver.read(1, 8, 8)` fills slot 9 of queue 1, rings 10 at its doorbell, polls until the entry with its identifier has the expected
//! phase, rings the completion doorbell, and hands out the 4 KiB that arrived.

use std::time::{Duration, Instant};

use farbus_remote_dma::model::Nvme;
use farbus_remote_dma::{Activity, Backend, BarAddress, InterruptMode, Width};

use super::bus::TestBus;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub result: u32,
    pub queue_head: u16,
    pub queue: u16,
    pub identifier: u16,
    /// Type and code, without the do-not-retry bit.
    pub status: u16,
}

#[derive(Clone, Copy, Default, Debug)]
pub struct Sqe {
    pub opcode: u8,
    pub namespace: u32,
    pub prp1: u64,
    pub prp2: u64,
    pub dwords: [u32; 6],
}

impl Sqe {
    pub fn bytes(&self, identifier: u16) -> [u8; 64] {
        let mut bytes = [0; 64];
        bytes[0] = self.opcode;
        bytes[2..4].copy_from_slice(&identifier.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.namespace.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.prp1.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.prp2.to_le_bytes());
        for (at, dword) in self.dwords.iter().enumerate() {
            bytes[40 + at * 4..44 + at * 4].copy_from_slice(&dword.to_le_bytes());
        }
        bytes
    }

    pub fn io(opcode: u8, lba: u64, blocks: u32) -> Self {
        Self { opcode, namespace: 1, dwords: [lba as u32, (lba >> 32) as u32, blocks.wrapping_sub(1), 0, 0, 0], ..Self::default() }
    }
}

#[derive(Clone, Copy, Default)]
pub struct Queue {
    pub sq: u64,
    pub cq: u64,
    pub entries: u32,
    pub tail: u32,
    pub head: u32,
    pub phase: bool,
}

pub struct Driver {
    pub nvme: Nvme,
    pub bus: TestBus,
    pub queues: Vec<Queue>,
    next_identifier: u16,
    next_page: u64,
}

pub const PAGE: u64 = 4096;

impl Driver {
    pub fn attached(nvme: Nvme, bus: TestBus) -> Self {
        let mut driver = Self { nvme, bus, queues: vec![Queue::default(); 65], next_identifier: 0, next_page: 0x10_0000 };
        driver.nvme.attach(&mut driver.bus).unwrap();
        driver.nvme.set_interrupt_mode(InterruptMode::Msix, &mut driver.bus);
        driver
    }

    /// Attached, enabled, with `queues` IO queue pairs of `entries` entries.
    pub fn ready(nvme: Nvme, bus: TestBus, queues: u16, entries: u32) -> Self {
        let mut driver = Self::attached(nvme, bus);
        driver.enable();
        for queue in 1..=queues {
            assert_eq!(driver.create(queue, entries), 0);
        }
        driver
    }

    pub fn pages(&mut self, count: u64) -> u64 {
        let at = self.next_page;
        self.next_page += count * PAGE;
        assert!(self.next_page <= self.bus.guest.len(), "guest memory is used up");
        at
    }

    pub fn write_register(&mut self, offset: u64, width: Width, value: u64) {
        self.nvme.bar_write(BarAddress { bar: 0, offset }, width, value, &mut self.bus);
    }

    pub fn read_register(&mut self, offset: u64, width: Width) -> u64 {
        self.nvme.bar_read(BarAddress { bar: 0, offset }, width, &mut self.bus)
    }

    pub fn status(&mut self) -> u32 {
        self.read_register(0x1c, Width::B4) as u32
    }

    pub fn enable(&mut self) {
        let (sq, cq) = (self.pages(1), self.pages(1));
        self.bus.guest.write(cq, &[0; 4096]).unwrap();
        self.queues = vec![Queue::default(); 65];
        self.queues[0] = Queue { sq, cq, entries: 32, phase: true, ..Queue::default() };
        self.write_register(0x24, Width::B4, 0x001f_001f);
        self.write_register(0x28, Width::B8, sq);
        self.write_register(0x30, Width::B8, cq);
        self.write_register(0x14, Width::B4, 0x0046_0001);
        assert_eq!(self.status() & 3, 1);
    }

    pub fn disable(&mut self) {
        self.write_register(0x14, Width::B4, 0x0046_0000);
        self.until(|driver| driver.status() & 1 == 0);
    }

    /// Creates queue pair `queue`; the status of the first refusal.
    pub fn create(&mut self, queue: u16, entries: u32) -> u16 {
        let bytes = u64::from(entries) * 64;
        let (sq, cq) = (self.pages(bytes.div_ceil(PAGE)), self.pages((bytes / 4).div_ceil(PAGE)));
        self.bus.guest.write(cq, &vec![0; entries as usize * 16]).unwrap();
        self.queues[usize::from(queue)] = Queue { sq, cq, entries, phase: true, ..Queue::default() };
        let id = u32::from(queue) | (entries - 1) << 16;
        let made = self.admin(Sqe { opcode: 5, prp1: cq, dwords: [id, u32::from(queue) << 16 | 3, 0, 0, 0, 0], ..Sqe::default() });
        if made.status != 0 {
            return made.status;
        }
        self.admin(Sqe { opcode: 1, prp1: sq, dwords: [id, u32::from(queue) << 16 | 1, 0, 0, 0, 0], ..Sqe::default() }).status
    }

    /// Writes an entry without ringing.
    pub fn put(&mut self, queue: u16, sqe: &Sqe) -> u16 {
        self.next_identifier = self.next_identifier.wrapping_add(1);
        let identifier = self.next_identifier;
        self.put_bytes(queue, &sqe.bytes(identifier));
        identifier
    }

    pub fn put_bytes(&mut self, queue: u16, bytes: &[u8; 64]) {
        let slot = &mut self.queues[usize::from(queue)];
        self.bus.guest.write(slot.sq + u64::from(slot.tail) * 64, bytes).unwrap();
        slot.tail = (slot.tail + 1) % slot.entries;
    }

    pub fn ring(&mut self, queue: u16) {
        let tail = self.queues[usize::from(queue)].tail;
        self.write_register(0x1000 + u64::from(queue) * 8, Width::B4, u64::from(tail));
    }

    pub fn ring_completion(&mut self, queue: u16) {
        let head = self.queues[usize::from(queue)].head;
        self.write_register(0x1004 + u64::from(queue) * 8, Width::B4, u64::from(head));
    }

    /// The next entry of a completion queue, where its phase says it is new; the doorbell is not rung.
    pub fn take(&mut self, queue: u16) -> Option<Entry> {
        let slot = &mut self.queues[usize::from(queue)];
        let mut bytes = [0; 16];
        self.bus.guest.read(slot.cq + u64::from(slot.head) * 16, &mut bytes).unwrap();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        if (word(12) >> 16 & 1 == 1) != slot.phase {
            return None;
        }
        slot.head += 1;
        if slot.head == slot.entries {
            slot.head = 0;
            slot.phase = !slot.phase;
        }
        Some(Entry {
            result: word(0),
            queue_head: word(8) as u16,
            queue: (word(8) >> 16) as u16,
            identifier: word(12) as u16,
            status: (word(12) >> 17 & 0x7ff) as u16,
        })
    }

    /// One round of the session: late DMA, the device's poll, time where it asks for it.
    pub fn turn(&mut self) -> bool {
        let advanced = self.bus.advance(&mut self.nvme, 3);
        match self.nvme.poll(&mut self.bus) {
            Activity::Busy => true,
            Activity::Idle(Some(wait)) => {
                self.bus.pass(wait);
                true
            }
            Activity::Idle(None) if advanced || self.bus.pending() > 0 => true,
            Activity::Idle(None) => {
                // What is left is the media's; sleeping as a session does tests that nobody is forgotten.
                if self.nvme.in_flight() > 0
                    && self.nvme.arm()
                    && let Some(fd) = self.nvme.wake_fd()
                {
                    let mut ready = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
                    let wait = rustix::event::Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
                    return rustix::event::poll(&mut ready, Some(&wait)).unwrap() > 0;
                }
                false
            }
        }
    }

    pub fn until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !done(self) {
            self.turn();
            assert!(Instant::now() < deadline, "nothing happens any more: {:?}", self.nvme);
        }
    }

    /// Everything that can be done without the driver.
    pub fn settle(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.turn() || self.nvme.in_flight() > 0 {
            assert!(Instant::now() < deadline, "it never comes to rest: {:?}", self.nvme);
        }
    }

    pub fn wait(&mut self, queue: u16) -> Entry {
        let mut entry = None;
        self.until(|driver| {
            entry = driver.take(queue);
            entry.is_some()
        });
        self.ring_completion(queue);
        entry.unwrap()
    }

    pub fn run(&mut self, queue: u16, sqe: Sqe) -> Entry {
        let identifier = self.put(queue, &sqe);
        self.ring(queue);
        let entry = self.wait(queue);
        assert_eq!((entry.queue, entry.identifier), (queue, identifier));
        entry
    }

    pub fn admin(&mut self, sqe: Sqe) -> Entry {
        self.run(0, sqe)
    }

    /// PRP1 and PRP2 for `len` bytes from `offset` in the first of `pages`; the list, if one is needed, is laid out in new pages.
    pub fn prps(&mut self, pages: &[u64], offset: u64, len: u64) -> (u64, u64) {
        let used = (offset + len).div_ceil(PAGE) as usize;
        let prp1 = pages[0] + offset;
        match used {
            0 | 1 => (prp1, 0),
            2 => (prp1, pages[1]),
            _ => {
                let list = self.pages(1);
                for (at, page) in pages[1..used].iter().enumerate() {
                    self.bus.guest.write(list + at as u64 * 8, &page.to_le_bytes()).unwrap();
                }
                (prp1, list)
            }
        }
    }

    pub fn identify(&mut self, cns: u32, namespace: u32) -> (Entry, Vec<u8>) {
        let page = self.pages(1);
        let entry = self.admin(Sqe { opcode: 6, namespace, prp1: page, dwords: [cns, 0, 0, 0, 0, 0], ..Sqe::default() });
        (entry, self.guest_bytes(page, 4096))
    }

    pub fn guest_bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.bus.guest.read(at, &mut bytes).unwrap();
        bytes
    }
}
