//! The borrower's session as the function's attachment: what the function asks becomes a message, and where it must know the outcome, a wait.
//!
//! `bar_write(BAR0 + 0x1018, B4, 17)` is posted and forgotten; `unmap(0, 1 MiB)` returns when the lender has said that no DMA touches it any more.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use farbus_transport::{CloseReason, Fabric, Memory, Nanos};

use super::{Answer, BorrowerSession, RestState, refusal};
use crate::address::{BarAddress, Iova, Width};
use crate::attachment::{Activity, Attachment, AttachmentError, Host, MapError, MediationAnswer, Ticket, Window, WindowMemory};
use crate::backend::{InterruptMode, ResetKind};
use crate::device::DeviceDescription;
use crate::dirty_log::DirtyLog;
use crate::message::{Outcome, ToLender};
use crate::rest::{Rest, RestToken};

/// Between two times that the counters are told.
const POLLS_PER_TELL: u32 = 64;

impl<F: Fabric> Attachment for BorrowerSession<F> {
    fn description(&self) -> &DeviceDescription {
        &self.description
    }

    fn bar_read(&mut self, at: BarAddress, width: Width, host: &mut dyn Host) -> u64 {
        if self.gone.is_some() {
            return width.all_ones();
        }
        self.counters.bar_reads += 1;
        let sequence = self.next_sequence();
        self.send(ToLender::BarRead { sequence, at, width });
        self.flushing = true;
        self.give_slots_back();
        let answer = self.wait_for(sequence, self.options.read_deadline, host);
        self.flushing = false;
        self.overdue = answer.is_none() && self.gone.is_none();
        match answer {
            Some(Answer::Value(value)) => {
                self.counters.read_waited(self.waited);
                width.truncate(value)
            }
            Some(Answer::Outcome(_)) => {
                self.close(CloseReason::Protocol("an acknowledgement where a value was due"));
                width.all_ones()
            }
            None => {
                self.counters.reads_timed_out += 1;
                width.all_ones()
            }
        }
    }

    fn bar_write(&mut self, at: BarAddress, width: Width, value: u64, _host: &mut dyn Host) {
        if self.gone.is_some() {
            return;
        }
        self.counters.bar_writes += 1;
        self.rest = RestState::Running;
        self.send(ToLender::BarWrite { at, width, value });
        self.unflushed = true;
    }

    fn flush(&mut self) {
        self.unflushed = false;
        self.link.flush();
    }

    fn map(&mut self, window: Window, host: &mut dyn Host) -> Result<(), MapError> {
        self.memories.check_map(&window)?;
        let Window { iova, len, access, .. } = window;
        let (key, offset) = match &window.memory {
            WindowMemory::Mediated => (None, 0),
            WindowMemory::Mapped { memory, offset, proven } => {
                let known = self.memories.key_of(memory);
                let key = match known {
                    Some(key) => key,
                    None => {
                        let offer = self.memories.offer(&mut self.link.fabric, memory, *proven)?;
                        let sequence = self.next_sequence();
                        let asked = self.ask(
                            sequence,
                            ToLender::Offer { sequence, memory: offer.memory, dirty: offer.dirty, proven: *proven },
                            host,
                        );
                        if let Err(error) = asked {
                            return Err(self.forget(offer.memory.key).err().unwrap_or(error));
                        }
                        offer.memory.key
                    }
                };
                if *proven && known.is_some() {
                    self.prove(memory, host);
                }
                (Some(key), *offset)
            }
        };
        let sequence = self.next_sequence();
        let mapped = self.ask(sequence, ToLender::Map { sequence, iova, len, memory: key, offset, access }, host);
        let mapped = mapped.and_then(|()| self.memories.insert(window, key));
        // Where the link is gone as well, all memory was taken back with it.
        if mapped.is_err()
            && self.gone.is_none()
            && let Some(key) = key.filter(|key| self.memories.is_unused(*key))
            && let Err(error) = self.withdraw(key, host)
        {
            tracing::warn!(%error, key, "memory that no window uses could not be withdrawn");
        }
        mapped
    }

    fn unmap(&mut self, iova: Iova, len: u64, host: &mut dyn Host) -> Result<(), MapError> {
        if self.memories.check_unmap(iova, len)? == 0 {
            return Ok(());
        }
        let sequence = self.next_sequence();
        let asked = self.ask(sequence, ToLender::Unmap { sequence, iova, len }, host);
        self.out_of_it(asked)?;
        for key in self.memories.remove(iova, len)? {
            self.withdraw(key, host)?;
        }
        Ok(())
    }

    fn prove(&mut self, memory: &Arc<Memory>, _host: &mut dyn Host) {
        if self.gone.is_none()
            && let Some(key) = self.memories.prove(memory)
        {
            self.send(ToLender::Prove { key });
            self.link.flush();
        }
    }

    fn answer(&mut self, ticket: Ticket, answer: MediationAnswer<'_>, _host: &mut dyn Host) {
        if self.gone.is_some() {
            return;
        }
        match self.staging.end(ticket, answer) {
            Ok((write, message)) => {
                if let Some(op) = write
                    && !self.link.post(farbus_transport::Signal::No, op)
                {
                    // The lender must not take what lies in its slot for the bytes. The link is given up by the next poll.
                    return;
                }
                self.send(message);
                self.link.flush();
            }
            Err(what) => tracing::debug!(?ticket, what, "a mediation was answered that nobody waits for"),
        }
    }

    fn set_interrupt_mode(&mut self, mode: InterruptMode, _host: &mut dyn Host) {
        if self.gone.is_none() {
            self.send(ToLender::InterruptMode(mode));
            self.link.flush();
        }
    }

    fn set_bus_master(&mut self, enabled: bool, _host: &mut dyn Host) {
        if self.gone.is_none() {
            self.send(ToLender::BusMaster(enabled));
            self.link.flush();
        }
    }

    fn reset(&mut self, kind: ResetKind, host: &mut dyn Host) -> Result<(), AttachmentError> {
        self.rest = RestState::Running;
        let sequence = self.next_sequence();
        self.ask(sequence, ToLender::Reset { sequence, kind }, host).map_err(|error| match error {
            MapError::Attachment(error) => error,
            _ => AttachmentError::Refused("a reset"),
        })
    }

    fn poll(&mut self, now: Nanos, host: &mut dyn Host) -> Activity {
        if self.gone.is_some() {
            self.link.finish(now);
            return Activity::Idle(None);
        }
        if self.unflushed {
            self.flush();
        }
        self.polls = self.polls.wrapping_add(1);
        if self.polls.is_multiple_of(POLLS_PER_TELL) {
            self.tell_counters();
        }
        if self.take_events(now, host) { Activity::Busy } else { Activity::Idle(None) }
    }

    fn arm(&mut self) -> bool {
        if self.unflushed {
            self.flush();
        }
        self.tell_counters();
        self.link.is_over() || self.link.arm()
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        if self.link.is_over() { None } else { self.link.wake_fd() }
    }

    fn gone(&self) -> Option<CloseReason> {
        self.gone
    }

    fn in_doubt(&self) -> bool {
        self.in_doubt
    }

    fn overdue(&self) -> bool {
        self.overdue
    }

    fn give_up(&mut self) {
        self.close(CloseReason::Local);
    }

    fn pause(&mut self, token: RestToken, _host: &mut dyn Host) -> Result<(), AttachmentError> {
        if let Some(reason) = self.gone {
            return Err(AttachmentError::Gone(reason));
        }
        let sequence = self.next_sequence();
        self.rest = RestState::Asked(sequence, token);
        self.send(ToLender::Pause { sequence, token });
        self.flush();
        Ok(())
    }

    fn rest(&mut self) -> Result<Option<Rest>, AttachmentError> {
        match (self.gone, self.rest) {
            (Some(reason), _) => Err(AttachmentError::Gone(reason)),
            (None, RestState::Refused) => Err(AttachmentError::Refused(refusal(Outcome::Restless))),
            (None, RestState::Resting(rest)) => Ok(Some(rest)),
            (None, RestState::Asked(..) | RestState::Running) => Ok(None),
        }
    }

    fn resume(&mut self, _host: &mut dyn Host) {
        self.rest = RestState::Running;
        self.continues = None;
        if self.gone.is_none() {
            self.send(ToLender::Resume);
            self.flush();
        }
    }

    fn keep(&mut self, lease: Duration, host: &mut dyn Host) -> Result<(), AttachmentError> {
        if self.gone.is_none() && !matches!(self.rest, RestState::Resting(_)) {
            return Err(AttachmentError::Refused(refusal(Outcome::Restless)));
        }
        let sequence = self.next_sequence();
        let lease_ms = u32::try_from(lease.as_millis()).unwrap_or(u32::MAX);
        let kept = self.ask(sequence, ToLender::Keep { sequence, lease_ms }, host);
        kept.map_err(|error| match error {
            MapError::Attachment(error) => error,
            _ => AttachmentError::Refused("to keep the device"),
        })?;
        // The lender let go of the memory; this takes it back, so that no key of this session is good for anything.
        self.close(CloseReason::Local);
        if self.in_doubt { Err(AttachmentError::Refused("it does not let go of memory that was taken back")) } else { Ok(()) }
    }

    fn continues(&self) -> Option<RestToken> {
        self.continues
    }

    fn dirty_log(&mut self, memory: &Arc<Memory>, host: &mut dyn Host) -> Option<&DirtyLog> {
        if self.gone.is_none() {
            // What the device wrote before this question is marked when it is answered. A lender that does not answer is closed by `ask`,
            // and then nothing more is written; the log is complete either way.
            let sequence = self.next_sequence();
            if let Err(error) = self.ask(sequence, ToLender::Fence { sequence }, host) {
                tracing::warn!(%error, "the dirty log was taken from a lender that is gone");
            }
        }
        self.memories.log_of(memory)
    }
}
