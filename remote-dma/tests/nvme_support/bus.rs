//! The bus: guest memory at IOVA 0, optional holes, optional lateness from a seed, a virtual clock.
//!
//! A late completion entry is applied only after every earlier data write, as the seam promises; late data writes among themselves in any order.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use farbus_remote_dma::dirty_log::DirtyLog;
use farbus_remote_dma::{Backend, Bus, DmaBuffer, DmaFault, DmaTag, Iova, Progress};
use farbus_transport::local::LocalRegions;
use farbus_transport::{Access, LocalRegion, LocalSpan, Mapped, Memory, Nanos, RegisterError};

/// A small generator (xorshift), so that a seed is one number.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit
    }
}

enum Late {
    Read { tag: DmaTag, iova: Iova, into: LocalSpan },
    Write { tag: DmaTag, iova: Iova, from: LocalSpan },
    Polled { tag: DmaTag, iova: Iova, bytes: Vec<u8> },
    Interrupt(u16),
    Pin(bool),
}

pub struct TestBus {
    pub guest: Arc<Memory>,
    /// Ranges that no DMA may touch.
    pub holes: Vec<Range<u64>>,
    /// Whether [`Bus::map`] answers with memory.
    pub mappable: bool,
    pub clock: Nanos,
    pub interrupts: Vec<u16>,
    pub pin: bool,
    pub pin_changes: u32,
    /// The pages that were written through [`Bus::map`].
    pub direct: DirtyLog,
    pub dmas: u64,
    /// Late DMAs that end with a fault, of 1,000.
    pub late_faults_permille: u64,
    /// Late data writes all end with a fault; reads and completions do not.
    pub late_writes_fault: bool,
    /// Breaks the seam's promise: completions may overtake the data written before them.
    pub overtaking: bool,
    late: Option<Random>,
    queue: Vec<Late>,
    locals: LocalRegions,
}

impl TestBus {
    pub fn new(len: u64) -> Self {
        Self {
            guest: Memory::memfd("test-guest", len).unwrap(),
            holes: Vec::new(),
            mappable: true,
            clock: Nanos(1),
            interrupts: Vec::with_capacity(1 << 16),
            pin: false,
            pin_changes: 0,
            direct: DirtyLog::new(len).unwrap(),
            dmas: 0,
            late_faults_permille: 0,
            late_writes_fault: false,
            overtaking: false,
            late: None,
            queue: Vec::new(),
            locals: LocalRegions::default(),
        }
    }

    pub fn late(mut self, seed: u64) -> Self {
        self.late = Some(Random(seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15) | 1));
        self
    }

    pub fn pass(&mut self, time: Duration) {
        self.clock = self.clock + time;
    }

    pub fn pending(&self) -> usize {
        self.queue.len()
    }

    /// The session ended: regions and late DMAs are gone.
    pub fn end(&mut self) {
        self.queue.clear();
        self.locals = LocalRegions::default();
    }

    /// Ends up to `count` late DMAs; false where none was left.
    pub fn advance(&mut self, device: &mut dyn Backend, count: usize) -> bool {
        for _ in 0..count {
            let Some(pick) = self.pick() else { return false };
            let fault = match &mut self.late {
                Some(random) if self.late_faults_permille > 0 => random.below(1000) < self.late_faults_permille,
                _ => false,
            };
            let late = self.queue.remove(pick);
            let fault = fault || self.late_writes_fault && matches!(late, Late::Write { .. });
            let (tag, iova) = match late {
                Late::Read { tag, iova, into } => {
                    if !fault {
                        self.copy(iova, into, true);
                    }
                    (tag, iova)
                }
                Late::Write { tag, iova, from } => {
                    if !fault {
                        self.copy(iova, from, false);
                    }
                    (tag, iova)
                }
                Late::Polled { tag, iova, bytes } => {
                    self.guest.store_last_word_last(iova.0, &bytes).unwrap();
                    device.dma_done(tag, Ok(()), self);
                    continue;
                }
                Late::Interrupt(vector) => {
                    self.interrupts.push(vector);
                    continue;
                }
                Late::Pin(asserted) => {
                    self.change_pin(asserted);
                    continue;
                }
            };
            let result = if fault { Err(DmaFault::Unmapped { iova, len: 1 }) } else { Ok(()) };
            device.dma_done(tag, result, self);
        }
        true
    }

    /// A late operation that may end now: reads at any time; writes before the first ordered operation; that one once it is first.
    fn pick(&mut self) -> Option<usize> {
        let random = self.late.as_mut()?;
        if self.overtaking && !self.queue.is_empty() {
            return Some(random.below(self.queue.len() as u64) as usize);
        }
        let mut fence_seen = false;
        let mut earlier_writes = false;
        let mut eligible = Vec::new();
        for (index, late) in self.queue.iter().enumerate() {
            match late {
                Late::Read { .. } => eligible.push(index),
                Late::Write { .. } if !fence_seen => {
                    eligible.push(index);
                    earlier_writes = true;
                }
                Late::Write { .. } => {}
                _ => {
                    if !fence_seen && !earlier_writes {
                        eligible.push(index);
                    }
                    fence_seen = true;
                }
            }
        }
        (!eligible.is_empty()).then(|| eligible[random.below(eligible.len() as u64) as usize])
    }

    fn copy(&self, iova: Iova, local: LocalSpan, from_guest: bool) {
        let (memory, offset) = self.locals.resolve(local).expect("a span of a region that is registered");
        if from_guest {
            memory.copy_from(offset, &self.guest, iova.0, u64::from(local.len())).unwrap();
        } else {
            self.guest.copy_from(iova.0, memory, offset, u64::from(local.len())).unwrap();
        }
    }

    fn check(&self, iova: Iova, len: u64) -> Result<(), DmaFault> {
        let unmapped = DmaFault::Unmapped { iova, len };
        let end = iova.0.checked_add(len).filter(|end| *end <= self.guest.len()).ok_or(unmapped)?;
        let hit = self.holes.iter().any(|hole| iova.0 < hole.end && hole.start < end);
        if hit { Err(unmapped) } else { Ok(()) }
    }

    fn change_pin(&mut self, asserted: bool) {
        assert_ne!(self.pin, asserted, "a level that does not change is not told");
        self.pin = asserted;
        self.pin_changes += 1;
    }
}

impl Bus for TestBus {
    fn now(&self) -> Nanos {
        self.clock
    }

    fn register(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError> {
        self.locals.register(memory, access)
    }

    fn dma_read(&mut self, tag: DmaTag, iova: Iova, into: LocalSpan) -> Result<Progress, DmaFault> {
        self.dmas += 1;
        self.check(iova, u64::from(into.len()))?;
        if self.late.is_some() {
            self.queue.push(Late::Read { tag, iova, into });
            return Ok(Progress::Pending);
        }
        self.copy(iova, into, true);
        Ok(Progress::Done)
    }

    fn dma_write(&mut self, tag: DmaTag, iova: Iova, from: LocalSpan) -> Result<Progress, DmaFault> {
        self.dmas += 1;
        self.check(iova, u64::from(from.len()))?;
        if self.late.is_some() {
            self.queue.push(Late::Write { tag, iova, from });
            return Ok(Progress::Pending);
        }
        self.copy(iova, from, false);
        Ok(Progress::Done)
    }

    fn dma_write_polled(&mut self, tag: DmaTag, iova: Iova, bytes: &[u8]) -> Result<Progress, DmaFault> {
        assert!(bytes.len() <= 32 && bytes.len().is_multiple_of(4) && iova.0.is_multiple_of(4));
        assert_eq!(iova.0 / 4096, (iova.0 + bytes.len() as u64 - 1) / 4096, "inside one page");
        self.dmas += 1;
        self.check(iova, bytes.len() as u64)?;
        if self.late.is_some() {
            let bytes = bytes.to_vec();
            self.queue.push(Late::Polled { tag, iova, bytes });
            return Ok(Progress::Pending);
        }
        self.guest.store_last_word_last(iova.0, bytes).unwrap();
        Ok(Progress::Done)
    }

    fn map(&mut self, iova: Iova, len: u64, access: Access) -> Result<Option<DmaBuffer>, DmaFault> {
        self.check(iova, len)?;
        if !self.mappable {
            return Ok(None);
        }
        let mapped = Mapped::new(Arc::clone(&self.guest), iova.0, len).unwrap();
        Ok(Some(if access.write {
            DmaBuffer::written(mapped, self.direct.clone(), iova.0, None)
        } else {
            DmaBuffer::read(mapped, None)
        }))
    }

    fn interrupt(&mut self, vector: u16) {
        if self.late.is_some() {
            self.queue.push(Late::Interrupt(vector));
        } else {
            self.interrupts.push(vector);
        }
    }

    fn set_pin(&mut self, asserted: bool) {
        if self.late.is_some() {
            self.queue.push(Late::Pin(asserted));
        } else {
            self.change_pin(asserted);
        }
    }
}
