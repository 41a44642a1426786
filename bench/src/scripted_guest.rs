//! A guest whose whole state lies in its memory: it drives an NVMe function by interrupts, writes blocks of a pattern, and verifies every block that it reads.
//!
//! Block 17 is written for the third time: its bytes say "block 17, generation 3" in a way that no torn or mixed block says. Copy the 4 MiB of memory elsewhere,
//! and `step` goes on there as if nothing had been: that is what makes it a machine that can be moved, deposited, and restarted from a deposit.
//!
//! ```text
//!   0x0000 registers   0x1000 admin queues   0x4000 queue 1 (16 entries)   0x8000 queue 2 (64 entries)   0x1_0000 buffers   0x10_0000 generations
//! ```
#![expect(clippy::expect_used, reason = "the guest's own addresses lie in its own memory")]

use std::sync::Arc;

use farbus_pci_shim::{AccessError, Embedded, IrqSink, MessageInterrupt};
use farbus_remote_dma::guest_memory::SliceMemory;
use farbus_remote_dma::{BarAddress, GuestAddress, GuestMemory, Width};
use farbus_transport::{Memory, Nanos};

/// Bytes of the guest's memory.
pub const MEMORY_BYTES: u64 = 4 << 20;
/// Bytes of a block of the pattern.
pub const BLOCK_BYTES: u64 = 4096;
/// Blocks that the guest uses.
pub const BLOCKS: u64 = 512;
/// Logical blocks of a block.
pub const LOGICAL: u64 = BLOCK_BYTES / 512;

const RANDOM: u64 = 0x00;
const VERIFIED: u64 = 0x08;
const WRITTEN: u64 = 0x10;
const LIMIT: u64 = 0x18;
/// For each queue: tail, head, phase, interrupt heard (8 bytes each).
const QUEUES: u64 = 0x100;
/// For each command: 1 + its kind (0 none), block, generation, queue (8 bytes each).
const COMMANDS: u64 = 0x400;
const COMMAND_COUNT: u64 = 48;
const BUFFERS: u64 = 0x1_0000;
const GENERATIONS: u64 = 0x10_0000;

const READ: u64 = 2;
const WRITE: u64 = 1;

/// Submission base, completion base, entries, by queue.
const LAYOUT: [(u64, u64, u64); 3] = [(0x1000, 0x2000, 32), (0x4000, 0x5000, 16), (0x8000, 0xa000, 64)];

/// The function under the guest.
pub type Device<S> = Embedded<S, SliceMemory>;

/// Tells the guest of interrupts by setting its queue's flag in its memory, as an interrupt controller in the VMM would.
#[derive(Clone, Debug)]
pub struct FlagSink(pub Arc<Memory>);

impl IrqSink for FlagSink {
    fn pin(&mut self, _asserted: bool) {}

    fn message(&mut self, irq: MessageInterrupt) {
        // Vector n is queue n's, because the guest says so.
        self.0
            .atomic_u64(QUEUES + u64::from(irq.vector.min(2)) * 32 + 24)
            .expect("its own memory")
            .store(1, std::sync::atomic::Ordering::Release);
    }
}

/// What the guest found wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Wrong(pub String);

/// The guest's CPU: all that it knows is in the memory.
#[derive(Clone, Debug)]
pub struct Guest {
    memory: Arc<Memory>,
}

impl Guest {
    /// A CPU on this memory: new memory must be booted first.
    pub fn new(memory: Arc<Memory>) -> Self {
        Self { memory }
    }

    /// The memory.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// As a VMM hands it to a function.
    pub fn slice(&self) -> SliceMemory {
        SliceMemory::new(GuestAddress(0), Arc::clone(&self.memory))
    }

    /// Blocks that were read and were right.
    pub fn verified(&self) -> u64 {
        self.get(VERIFIED)
    }

    /// Blocks whose write was acknowledged.
    pub fn written(&self) -> u64 {
        self.get(WRITTEN)
    }

    /// Commands that have no completion yet.
    pub fn in_flight(&self) -> u64 {
        (0..COMMAND_COUNT).filter(|id| self.get(COMMANDS + id * 32) != 0).count() as u64
    }

    /// The generation of a block, as far as the guest knows: 0 was never written.
    pub fn generation(&self, block: u64) -> u64 {
        self.get(GENERATIONS + block * 8)
    }

    /// Tells the guest what is on its disk, where it cannot know.
    pub fn set_generation(&self, block: u64, generation: u64) {
        self.set(GENERATIONS + block * 8, generation);
    }

    /// The generation that a block has when all that the guest was told of is taken in: a write may be completed and the guest has not looked yet.
    pub fn acknowledged_generation(&self, block: u64) -> u64 {
        let done = self.under_way(block).filter(|id| self.is_completed(*id) && self.get(COMMANDS + id * 32) == WRITE);
        done.map_or_else(|| self.generation(block), |id| self.get(COMMANDS + id * 32 + 16))
    }

    /// Tells a guest that went back in time what is on its disk now. A read that it had begun and that was not carried out yet finds that, too; a write
    /// that was completed brings nothing of before back.
    pub fn learn(&self, block: u64, generation: u64) {
        self.set_generation(block, generation);
        let Some(id) = self.under_way(block) else { return };
        let write = self.get(COMMANDS + id * 32) == WRITE;
        if write == self.is_completed(id) {
            self.set(COMMANDS + id * 32 + 16, generation);
        }
    }

    /// The command on a block.
    fn under_way(&self, block: u64) -> Option<u64> {
        (0..COMMAND_COUNT).find(|id| self.get(COMMANDS + id * 32) != 0 && self.get(COMMANDS + id * 32 + 8) == block)
    }

    /// Whether the completion of a command lies in its queue.
    fn is_completed(&self, id: u64) -> bool {
        let queue = self.get(COMMANDS + id * 32 + 24);
        let (_, base, entries) = LAYOUT[queue as usize];
        let (mut head, mut phase) = (self.get(QUEUES + queue * 32 + 8), self.get(QUEUES + queue * 32 + 16));
        for _ in 0..entries {
            let word =
                self.memory.atomic_u32(base + head * 16 + 12).expect("its own memory").load(std::sync::atomic::Ordering::Acquire);
            if u64::from(word >> 16 & 1) != phase {
                return false;
            }
            if u64::from(word & 0xffff) == id {
                return true;
            }
            head = (head + 1) % entries;
            phase ^= u64::from(head == 0);
        }
        false
    }

    /// Begins no more commands than this in all from now on; those under way go on.
    pub fn begin_at_most(&self, commands: u64) {
        self.set(LIMIT, commands);
    }

    /// What firmware and a driver do: memory space, bus master, MSI-X, the controller, two queue pairs, and two requests for events that wait.
    pub fn boot<S: IrqSink>(&self, device: &mut Device<S>, seed: u64) -> Result<(), Wrong> {
        self.set(RANDOM, seed | 1);
        self.set(LIMIT, u64::MAX);
        device.config_write(0x04, &[0x06, 0x00]).map_err(access)?;
        for vector in 0..3 {
            for (at, value) in [(0, 0xfee0_0000), (8, 0x40 + vector), (12, 0)] {
                write(device, 0x2000 + vector * 16 + at, value)?;
            }
        }
        device.config_write(0x72, &[0x00, 0x80]).map_err(access)?;
        for (queue, (_, base, entries)) in (0..).zip(LAYOUT) {
            self.memory.write(base, &vec![0; (entries * 16) as usize]).map_err(|error| Wrong(error.to_string()))?;
            for (at, value) in [(0, 0), (8, 0), (16, 1), (24, 0)] {
                self.set(QUEUES + queue * 32 + at, value);
            }
        }
        let (submission, completion, entries) = LAYOUT[0];
        for (at, value) in [
            (0x24, (entries - 1) << 16 | (entries - 1)),
            (0x28, submission),
            (0x2c, 0),
            (0x30, completion),
            (0x34, 0),
            (0x14, 0x46_0001),
        ] {
            write(device, at, value)?;
        }
        while read(device, 0x1c)? & 3 != 1 {
            device.poll(Nanos::now());
        }
        self.admin(device, 0x09, [0x07, 0x0001_0001, 0], 0)?;
        for queue in 1..=2u64 {
            let (submission, completion, entries) = LAYOUT[queue as usize];
            let name = (queue | (entries - 1) << 16) as u32;
            self.admin(device, 0x05, [name, (queue << 16 | 3) as u32, 0], completion)?;
            self.admin(device, 0x01, [name, (queue << 16 | 1) as u32, 0], submission)?;
        }
        for id in 0x70..0x72 {
            self.put(0, &entry(0x0c, id, 0, 0, [0; 3]));
            self.ring(device, 0)?;
        }
        Ok(())
    }

    /// One turn of the CPU: handles interrupts, and begins up to `depth` commands. True where it did anything.
    pub fn step<S: IrqSink>(&self, device: &mut Device<S>, depth: u64) -> Result<bool, Wrong> {
        let mut worked = false;
        for queue in 0..3 {
            let heard = QUEUES + queue * 32 + 24;
            if self.get(heard) != 0 {
                self.set(heard, 0);
                worked |= self.reap(device, queue)?;
            }
        }
        let mut rung = [false; 3];
        for id in 0..COMMAND_COUNT.min(depth) {
            if self.get(COMMANDS + id * 32) == 0
                && self.get(LIMIT) > 0
                && let Some(queue) = self.begin(id)
            {
                rung[queue as usize] = true;
            }
        }
        for queue in 1..3 {
            if rung[queue as usize] {
                worked = true;
                self.ring(device, queue)?;
            }
        }
        Ok(worked)
    }

    /// Steps, and lets the device work, until all that is under way has ended; begins nothing.
    pub fn drain<S: IrqSink>(&self, device: &mut Device<S>) -> Result<(), Wrong> {
        self.set(LIMIT, 0);
        let began = std::time::Instant::now();
        while self.in_flight() > 0 {
            self.step(device, 0)?;
            device.poll(Nanos::now());
            if began.elapsed() > std::time::Duration::from_secs(20) {
                return Err(Wrong(format!("{} commands never end: an interrupt was lost, or a command", self.in_flight())));
            }
        }
        Ok(())
    }

    /// Begins a command under a free name; `None` where all that it could do is under way already.
    fn begin(&self, id: u64) -> Option<u64> {
        let random = self.random();
        let (kind, block, queue) = (if random & 1 == 0 { WRITE } else { READ }, random >> 8 & (BLOCKS - 1), 1 + (random >> 4 & 1));
        let busy =
            (0..COMMAND_COUNT).any(|other| self.get(COMMANDS + other * 32) != 0 && self.get(COMMANDS + other * 32 + 8) == block);
        let in_queue = (0..COMMAND_COUNT)
            .filter(|other| self.get(COMMANDS + other * 32) != 0 && self.get(COMMANDS + other * 32 + 24) == queue);
        if busy || in_queue.count() as u64 >= LAYOUT[queue as usize].2 - 1 {
            return None;
        }
        let generation = self.generation(block) + u64::from(kind == WRITE);
        let buffer = BUFFERS + id * BLOCK_BYTES;
        let bytes = if kind == WRITE { pattern(block, generation) } else { vec![0xee; BLOCK_BYTES as usize] };
        self.memory.write(buffer, &bytes).expect("its own memory");
        for (at, value) in [(0, kind), (8, block), (16, generation), (24, queue)] {
            self.set(COMMANDS + id * 32 + at, value);
        }
        self.set(LIMIT, self.get(LIMIT) - 1);
        self.put(queue, &entry(kind as u8, id as u16, 1, buffer, [(block * LOGICAL) as u32, 0, LOGICAL as u32 - 1]));
        Some(queue)
    }

    /// Takes all completions of a queue.
    fn reap<S: IrqSink>(&self, device: &mut Device<S>, queue: u64) -> Result<bool, Wrong> {
        let mut taken = false;
        while let Some((id, status)) = self.take(queue)? {
            taken = true;
            if queue == 0 {
                return Err(Wrong(format!("a request for events was answered: command {id:#x}, status {status:#x}")));
            }
            self.ended(id, status)?;
        }
        if taken {
            self.ring_head(device, queue)?;
        }
        Ok(taken)
    }

    fn ended(&self, id: u64, status: u16) -> Result<(), Wrong> {
        let at = COMMANDS + id * 32;
        let [kind, block, generation] = [0, 8, 16].map(|offset| self.get(at + offset));
        if id >= COMMAND_COUNT || kind == 0 {
            return Err(Wrong(format!("command {id:#x} was completed, and is not under way")));
        }
        if status != 0 {
            return Err(Wrong(format!("command {id:#x} on block {block} ended with status {status:#x}")));
        }
        self.set(at, 0);
        if kind == WRITE {
            self.set_generation(block, generation);
            self.set(WRITTEN, self.written() + 1);
            return Ok(());
        }
        let mut bytes = vec![0; BLOCK_BYTES as usize];
        self.memory.read(BUFFERS + id * BLOCK_BYTES, &mut bytes).map_err(|error| Wrong(error.to_string()))?;
        if generation_of(block, &bytes) != Some(generation) {
            let (found, head) = (generation_of(block, &bytes), &bytes[..24]);
            return Err(Wrong(format!("block {block} should be of generation {generation} and is of {found:?}: {head:02x?}")));
        }
        self.set(VERIFIED, self.verified() + 1);
        Ok(())
    }

    /// One admin command, polled.
    fn admin<S: IrqSink>(&self, device: &mut Device<S>, opcode: u8, dwords: [u32; 3], prp: u64) -> Result<(), Wrong> {
        self.put(0, &entry(opcode, 0x60, 0, prp, dwords));
        self.ring(device, 0)?;
        let began = std::time::Instant::now();
        loop {
            device.poll(Nanos::now());
            if let Some((_, status)) = self.take(0)? {
                self.ring_head(device, 0)?;
                return if status == 0 { Ok(()) } else { Err(Wrong(format!("admin command {opcode:#x}: status {status:#x}"))) };
            }
            if began.elapsed() > std::time::Duration::from_secs(20) {
                return Err(Wrong(format!("admin command {opcode:#x} does not end")));
            }
        }
    }

    fn put(&self, queue: u64, entry: &[u8; 64]) {
        let (base, _, entries) = LAYOUT[queue as usize];
        let tail = self.get(QUEUES + queue * 32);
        self.memory.write(base + tail * 64, entry).expect("its own memory");
        self.set(QUEUES + queue * 32, (tail + 1) % entries);
    }

    fn ring<S: IrqSink>(&self, device: &mut Device<S>, queue: u64) -> Result<(), Wrong> {
        write(device, 0x1000 + queue * 8, self.get(QUEUES + queue * 32))
    }

    fn ring_head<S: IrqSink>(&self, device: &mut Device<S>, queue: u64) -> Result<(), Wrong> {
        write(device, 0x1004 + queue * 8, self.get(QUEUES + queue * 32 + 8))
    }

    /// The next completion of a queue: the command's name and status.
    fn take(&self, queue: u64) -> Result<Option<(u64, u16)>, Wrong> {
        let (_, base, entries) = LAYOUT[queue as usize];
        let at = QUEUES + queue * 32;
        let (head, phase) = (self.get(at + 8), self.get(at + 16));
        let word = self.memory.atomic_u32(base + head * 16 + 12).map_err(|error| Wrong(error.to_string()))?;
        let word = word.load(std::sync::atomic::Ordering::Acquire);
        if u64::from(word >> 16 & 1) != phase {
            return Ok(None);
        }
        self.set(at + 8, (head + 1) % entries);
        if head + 1 == entries {
            self.set(at + 16, phase ^ 1);
        }
        Ok(Some((u64::from(word & 0xffff), (word >> 17) as u16)))
    }

    fn random(&self) -> u64 {
        let mut x = self.get(RANDOM);
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.set(RANDOM, x);
        x.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn get(&self, at: u64) -> u64 {
        self.memory.atomic_u64(at).expect("its own memory").load(std::sync::atomic::Ordering::Acquire)
    }

    fn set(&self, at: u64, value: u64) {
        self.memory.atomic_u64(at).expect("its own memory").store(value, std::sync::atomic::Ordering::Release);
    }
}

/// What block `block` holds in its `generation`; generation 0 is zeros.
pub fn pattern(block: u64, generation: u64) -> Vec<u8> {
    if generation == 0 {
        return vec![0; BLOCK_BYTES as usize];
    }
    let words = (0..BLOCK_BYTES / 8).map(|at| match at {
        0 => block,
        1 => generation,
        _ => (block << 32 ^ generation).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(at.wrapping_mul(0xd1b5_4a32_d192_ed03)),
    });
    words.flat_map(u64::to_le_bytes).collect()
}

/// The generation that these bytes of block `block` are, whole and untorn; `None` where they are none.
pub fn generation_of(block: u64, bytes: &[u8]) -> Option<u64> {
    let generation = u64::from_le_bytes(bytes.get(8..16)?.try_into().ok()?);
    (bytes == pattern(block, generation)).then_some(generation)
}

fn entry(opcode: u8, id: u16, namespace: u32, prp: u64, dwords: [u32; 3]) -> [u8; 64] {
    let mut entry = [0; 64];
    entry[0] = opcode;
    entry[2..4].copy_from_slice(&id.to_le_bytes());
    entry[4..8].copy_from_slice(&namespace.to_le_bytes());
    entry[24..32].copy_from_slice(&prp.to_le_bytes());
    for (at, dword) in dwords.iter().enumerate() {
        entry[40 + at * 4..44 + at * 4].copy_from_slice(&dword.to_le_bytes());
    }
    entry
}

fn access(error: AccessError) -> Wrong {
    Wrong(error.to_string())
}

fn write<S: IrqSink, M: GuestMemory>(device: &mut Embedded<S, M>, offset: u64, value: u64) -> Result<(), Wrong> {
    device.bar_write(BarAddress { bar: 0, offset }, Width::B4, value).map_err(access)
}

fn read<S: IrqSink, M: GuestMemory>(device: &mut Embedded<S, M>, offset: u64) -> Result<u64, Wrong> {
    device.bar_read(BarAddress { bar: 0, offset }, Width::B4).map_err(access)
}
