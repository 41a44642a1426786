//! Register writes and what they set going: enabling, resetting, shutting down, doorbells (NVMe 1.4, sections 3.1, 7.3, 7.6).
//!
//! 1 in bit 0 of CC (0x14) reads the admin queues' place from AQA, ASQ and ACQ and makes CSTS.RDY 1; 0 there drops every command, and
//! RDY becomes 0 when the last DMA and the last job of the media ended.

use super::queues::{CompletionQueue, SubmissionQueue};
use super::registers::{Configuration, DOORBELLS, MSIX_TABLE, Registers, Shutdown, offset};
use super::slots::Phase;
use super::{Events, Features, Life, Nvme, QUEUE_COUNT};
use crate::address::{Iova, Width};
use crate::backend::{Bus, InterruptMode};

/// The slot named by jobs that belong to no command: the flush of a shutdown.
pub(super) const NO_SLOT: u32 = u32::MAX;

impl Nvme {
    /// A write inside BAR0.
    pub(super) fn register_write(&mut self, at: u64, width: Width, value: u64, bus: &mut dyn Bus) {
        if at >= DOORBELLS {
            // Doorbells are dwords (section 3.1.24); the table behind them belongs to the function.
            if width == Width::B4 && at < u64::from(MSIX_TABLE) {
                self.doorbell(at - DOORBELLS, value as u32, bus);
            } else {
                self.counters.ignored_accesses += 1;
            }
            return;
        }
        match width {
            Width::B4 => self.dword_write(at, value as u32),
            Width::B8 => {
                self.dword_write(at, value as u32);
                self.dword_write(at + 4, (value >> 32) as u32);
            }
            Width::B1 | Width::B2 => self.counters.ignored_accesses += 1,
        }
    }

    fn dword_write(&mut self, at: u64, value: u32) {
        let registers = &mut self.registers;
        let low = |old: u64| old & !0xffff_ffff | u64::from(value & 0xffff_f000);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match at {
            offset::INTMS => registers.masked |= value,
            offset::INTMC => registers.masked &= !value,
            offset::CC => self.configure(Configuration(value & 0x00ff_fff1)),
            offset::AQA => registers.admin_attributes = value & 0x0fff_0fff,
            offset::ASQ => registers.admin_submission = low(registers.admin_submission),
            0x2c => registers.admin_submission = high(registers.admin_submission),
            offset::ACQ => registers.admin_completion = low(registers.admin_completion),
            0x34 => registers.admin_completion = high(registers.admin_completion),
            // CAP, VS, CSTS and all that is reserved.
            _ => self.counters.ignored_accesses += 1,
        }
    }

    fn configure(&mut self, new: Configuration) {
        let old = std::mem::replace(&mut self.registers.configuration, new);
        match (old.enabled(), new.enabled()) {
            (false, true) if self.life == Life::Disabled => self.enable(),
            (true, false) => self.begin_reset(),
            _ => {}
        }
        if new.enabled() && old.enabled() {
            // What may not change while enabled does not (section 3.1.5): page size, command set, arbitration.
            const FIXED: u32 = 0x3ff0;
            self.registers.configuration = Configuration(new.0 & !FIXED | old.0 & FIXED);
        }
        if new.shutdown() != 0 && old.shutdown() == 0 {
            self.shut_down();
        }
    }

    fn enable(&mut self) {
        let registers = &self.registers;
        let page = u64::from(self.page_bytes());
        let aligned = registers.admin_submission.is_multiple_of(page) && registers.admin_completion.is_multiple_of(page);
        let entries = registers.admin_entries();
        let (Some((submission, completion)), true) = (entries, aligned && registers.configuration.supported()) else {
            self.fail();
            return;
        };
        let (sq, cq) = (Iova(registers.admin_submission), Iova(registers.admin_completion));
        if let (Some(first), Some(second)) = (self.submission.first_mut(), self.completion.first_mut()) {
            *first = SubmissionQueue::new(sq, submission, 0);
            *second = CompletionQueue::new(cq, completion, Some(0));
            second.users = 1;
        }
        self.life = Life::Ready;
        self.registers.ready = true;
        // A shutdown that was asked for while disabled was complete at once; it does not outlive the next enabling.
        self.registers.shutdown = Shutdown::None;
    }

    /// CC.EN became 0: no DMA and no job starts any more.
    fn begin_reset(&mut self) {
        self.counters.resets += 1;
        self.life = Life::Resetting;
        self.cancel_jobs();
        self.finish_reset();
    }

    /// The end of a reset, once nothing is under way.
    pub(super) fn finish_reset(&mut self) {
        if self.in_flight_now() > 0 {
            return;
        }
        let kept = self.registers;
        self.wipe();
        // A controller reset keeps the admin queue registers (section 7.3.2) and all that CC says.
        self.registers = Registers {
            configuration: kept.configuration,
            admin_attributes: kept.admin_attributes,
            admin_submission: kept.admin_submission,
            admin_completion: kept.admin_completion,
            ..Registers::default()
        };
        if self.registers.configuration.enabled() {
            self.enable();
        }
    }

    fn in_flight_now(&self) -> usize {
        self.dmas + self.jobs_running
    }

    /// As after power-on. Nothing may be under way.
    pub(super) fn power_on(&mut self) {
        self.wipe();
        self.registers = Registers::default();
        self.errors.clear();
        self.mode = InterruptMode::Pin;
        self.paused = false;
    }

    /// Forgets every command, queue and setting; starts a new life.
    fn wipe(&mut self) {
        for index in 0..super::SLOTS {
            let Some(slot) = self.slots.get_mut(index).filter(|slot| slot.phase != Phase::Free) else {
                continue;
            };
            self.counters.dropped += u64::from(slot.phase != Phase::Drain);
            slot.outstanding = 0;
            self.release(index);
            self.slots.put_back(index);
        }
        self.submission.fill(SubmissionQueue::ABSENT);
        self.completion.fill(CompletionQueue::ABSENT);
        debug_assert!(self.submission.len() == usize::from(QUEUE_COUNT));
        self.waiting.clear();
        self.timers.clear();
        self.ready = 0;
        self.turn = 0;
        self.raised = 0;
        self.slots_reserved = 0;
        self.dmas = 0;
        self.released = false;
        self.shutdown_flush = false;
        self.features = Features::new(self.media.volatile_cache() && !self.options.read_only);
        self.events = Events::default();
        self.epoch = self.epoch.wrapping_add(1);
        self.life = Life::Disabled;
    }

    /// CC.SHN: completed writes reach stable storage before CSTS.SHST says so (section 7.6.2).
    fn shut_down(&mut self) {
        if self.features.write_cache_present && self.life == Life::Ready {
            self.registers.shutdown = Shutdown::Occurring;
            self.shutdown_flush = true;
            self.start_shutdown_flush();
        } else {
            self.registers.shutdown = Shutdown::Complete;
        }
    }

    pub(super) fn start_shutdown_flush(&mut self) {
        let Some(mut job) = self.jobs.pop() else { return };
        self.shutdown_flush = false;
        job.clear();
        job.kind = super::media::JobKind::Flush;
        job.slot = NO_SLOT;
        self.start_job(job);
    }

    fn doorbell(&mut self, at: u64, value: u32, bus: &mut dyn Bus) {
        // Before the controller is ready and after it failed, doorbells mean nothing (section 3.1.24).
        if !self.running() {
            self.counters.ignored_accesses += 1;
            return;
        }
        let (queue, is_completion) = ((at / 8) as u16, at & 4 != 0);
        let known = if is_completion {
            self.completion
                .get_mut(usize::from(queue))
                .filter(|completion| completion.exists())
                .map(|completion| completion.ring(value))
        } else {
            self.submission
                .get_mut(usize::from(queue))
                .filter(|submission| submission.exists())
                .map(|submission| submission.ring(value))
        };
        match known {
            Some(Ok(())) if is_completion => {
                self.room_made(queue, bus);
                self.pump(bus);
            }
            Some(Ok(())) => {
                self.mark_ready(queue);
                self.pump(bus);
            }
            Some(Err(_)) => self.invalid_doorbell(super::events::INVALID_DOORBELL_VALUE, bus),
            None => self.invalid_doorbell(super::events::INVALID_DOORBELL_REGISTER, bus),
        }
    }

    /// Ignored, counted, and told by an asynchronous event where the driver asked for events (figure 147).
    fn invalid_doorbell(&mut self, event: super::events::Event, bus: &mut dyn Bus) {
        self.counters.invalid_doorbells += 1;
        self.raise_event(event, bus);
    }
}
