//! The PCI function that a guest sees: every access of its CPU comes in here, every interrupt leaves here.
//!
//! A 4-byte store of 17 to BAR0 + 0x1018 is checked, found to be neither the MSI-X table's nor a constant, named "submission queue 3's tail"
//! by the NVMe profile, and posted to the [`Attachment`]; vector 3 comes back through the MSI-X table to the [`IrqSink`].
//!
//! ```text
//!   config_write ─► Space ─► interrupt mode, bus master, reset ─┐
//!   bar_write ─► Routes ─► MSI-X table                           ├─► Attachment ─► the device, wherever it is
//!                      └─► Profile ─────────────────────────────┘        │
//!   IrqSink ◄── masks, pending bits, INTx ◄── stores of guest memory ◄────┘ (Front, as the attachment's Host)
//! ```

mod front;
mod lazy;
mod memory;
mod options;
mod recovery;
mod restore;
mod save;
#[cfg(test)]
mod tests;
mod windows;
mod workbench;

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Weak};
use std::time::Instant;

use farbus_remote_dma::dirty_log::DirtyLogs;
use farbus_remote_dma::{
    Activity, Attachment, AttachmentError, BarAddress, DeviceDescription, InterruptMode, MediationAnswer, ResetKind, Width,
};
use farbus_transport::{CloseReason, Memory, Nanos, Tally, Teller};

use crate::access::AccessError;
use crate::config::{AddressSpace, Space, Written};
use crate::irq::IrqSink;
use crate::profile::{Profile, RegisterName, Verdict};
use crate::routes::{Route, Routes};
use front::Front;
use lazy::Lazy;
pub use options::{Counters, FunctionError, FunctionOptions, InterruptOwner};
use recovery::Recovery;
pub use recovery::RecoveryParts;
pub use restore::{RestoreError, Restored};
pub use save::QuiesceError;
use windows::Windows;

/// A PCI function whose device is behind an [`Attachment`]. One thread at a time uses it; a register access blocks
/// for no longer than the attachment's deadline for a register read (2 s unless chosen otherwise), or, where the device is looked for when it is lost, until
/// it is back or given up; `map`, `unmap`, `reset` and the dirty log ask the
/// device's side one or several questions, each with the deadline for such (10 s).
pub struct Function<S: IrqSink> {
    attachment: Box<dyn Attachment>,
    description: DeviceDescription,
    routes: Routes,
    profile: Box<dyn Profile>,
    front: Front<S>,
    lazy: Lazy,
    /// Between [`Function::arm`] and the next poll somebody sleeps, and nobody would send what waits for company.
    armed: bool,
    /// What the attachment was told last.
    bus_master: bool,
    mode: InterruptMode,
    /// A bit for each BAR whose accesses are carried out, kept beside the registers because every access asks.
    decoded: u8,
    gone: bool,
    windows: Windows,
    /// How it gets its device again; `None` where it does not.
    recovery: Option<Recovery>,
    /// Memory that was mapped at some time.
    memories: Vec<Weak<Memory>>,
    /// Pages that devices which were lost wrote, and nobody has taken.
    carried: DirtyLogs,
    /// How often something that changes the device was done, to tell that nothing was since it came to rest.
    quiesced: Option<u64>,
    map_changes: u64,
    /// Hears of the counters now and then.
    teller: Option<Teller>,
    polls: u32,
}

impl<S: IrqSink> Function<S> {
    /// The function of an attachment's device, as after power-on.
    ///
    /// # Errors
    /// [`FunctionError::Description`].
    pub fn new(attachment: Box<dyn Attachment>, sink: S, options: FunctionOptions) -> Result<Self, FunctionError> {
        let mut function = Self::untouched(attachment, sink, options)?;
        // The device may have been used before.
        function.attachment.set_bus_master(false, &mut function.front);
        function.attachment.set_interrupt_mode(InterruptMode::Pin, &mut function.front);
        function.settle();
        Ok(function)
    }

    /// What the device is.
    pub fn description(&self) -> &DeviceDescription {
        &self.description
    }

    /// What lies where in its BARs.
    pub(crate) fn routes(&self) -> &Routes {
        &self.routes
    }

    /// The sink.
    pub fn sink(&self) -> &S {
        &self.front.sink
    }

    /// The sink, to change it.
    pub fn sink_mut(&mut self) -> &mut S {
        &mut self.front.sink
    }

    /// How often things happened.
    pub fn counters(&self) -> Counters {
        self.front.counters
    }

    /// Tells `tally`, which has [`Counters::NAMES`], how often things happened: every 64 polls, and before each sleep.
    pub fn tell(&mut self, tally: Arc<Tally>) {
        self.teller = Some(Teller::new(tally));
    }

    #[inline]
    fn tell_counters(&mut self) {
        if let Some(teller) = &mut self.teller {
            teller.tell(&self.front.counters.values());
        }
    }

    /// The configuration space as it is now.
    pub fn config(&self) -> &Space {
        &self.front.space
    }

    /// What people call a register, where the device's class says.
    pub fn register(&self, at: BarAddress) -> Option<RegisterName> {
        self.profile.register(at)
    }

    /// Which place in a BAR an address of the machine is, as the guest has set the function up; `None` where the function does not
    /// decode it. A BAR that the guest has not placed yet lies at 0: ask RAM first.
    pub fn decode(&self, space: AddressSpace, address: u64) -> Option<BarAddress> {
        self.front.space.decode(space, address)
    }

    /// Reads any range inside configuration space; all ones where the device is gone.
    ///
    /// # Errors
    /// [`AccessError::Config`]; `into` is untouched.
    pub fn config_read(&mut self, offset: u16, into: &mut [u8]) -> Result<(), AccessError> {
        self.front.counters.config_reads += 1;
        self.refusable(|function| function.front.space.read(offset, into))?;
        if self.gone().is_some() {
            into.fill(0xff);
        }
        Ok(())
    }

    /// Writes any range inside configuration space, and does what the registers ask for: interrupt mode, bus mastering, power, reset. A
    /// function level reset undoes what the same write changed elsewhere.
    ///
    /// # Errors
    /// [`AccessError::Config`]; nothing was written.
    pub fn config_write(&mut self, offset: u16, bytes: &[u8]) -> Result<(), AccessError> {
        self.front.counters.config_writes += 1;
        let written = self.refusable(|function| function.front.space.write(offset, bytes))?;
        match written {
            Written::Stored => self.follow(),
            Written::FunctionLevelReset => {
                if let Err(error) = self.reset(ResetKind::Function) {
                    // The guest cannot be told but by what it reads next: all ones, if the device is gone.
                    tracing::error!(%error, "the guest's function level reset did not reach the device");
                }
            }
        }
        Ok(())
    }

    /// Reads a register. All ones where the device is gone or late, and, where the function decodes, while the BAR is not decoded. Stores
    /// that are still to be taken by [`Function::next_mediation`] come before the answer: make them before the guest's CPU runs on. All that
    /// the device made before it answered are among them. What is answered here (MSI-X, constants, what the profile knows) waits for nothing:
    /// only a read that reaches the device flushes writes.
    ///
    /// # Errors
    /// Any [`AccessError`] but that of configuration space.
    pub fn bar_read(&mut self, at: BarAddress, width: Width) -> Result<u64, AccessError> {
        self.refusable(|function| function.routes.check(at, width))?;
        let local = self.local_read(at, width);
        if let Some(value) = local {
            self.front.counters.bar_reads_local += 1;
            return Ok(value);
        }
        self.front.counters.bar_reads_remote += 1;
        self.release_lazy();
        // Only who looks for a lost device asks for the time: a read has no other use for it.
        let began = self.recovery.is_some().then(Instant::now);
        let mut value = width.truncate(self.attachment.bar_read(at, width, &mut self.front));
        // Late rather than wrong: what it would have said, it says when it is back.
        while self.is_overdue(began) || self.is_lost() && self.wait_for_device() {
            value = width.truncate(self.attachment.bar_read(at, width, &mut self.front));
        }
        self.profile.answered(at, width, value);
        self.settle();
        tracing::trace!(%at, value, register = self.profile.register(at).map(tracing::field::display), "read");
        Ok(value)
    }

    /// Sends what [`Function::post_write`] posted, but for a write that nobody waits for ([`Verdict::ForwardWithNext`]): that goes with what comes next,
    /// or with a poll soon after.
    pub fn flush(&mut self) {
        self.attachment.flush();
    }

    /// Writes a register: posted, in order, and not seen by the device when this returns.
    ///
    /// # Errors
    /// Any [`AccessError`] but that of configuration space.
    pub fn bar_write(&mut self, at: BarAddress, width: Width, value: u64) -> Result<(), AccessError> {
        let written = self.post_write(at, width, value);
        self.flush();
        written
    }

    /// As [`Function::bar_write`], as one of several: they may wait for each other until [`Function::flush`].
    ///
    /// # Errors
    /// As [`Function::bar_write`].
    pub fn post_write(&mut self, at: BarAddress, width: Width, value: u64) -> Result<(), AccessError> {
        self.refusable(|function| function.routes.check(at, width))?;
        let value = width.truncate(value);
        if !self.decodes(at.bar) {
            self.front.counters.bar_writes_local += 1;
            self.front.space.note_unsupported_request(true);
            return Ok(());
        }
        match self.routes.of_write(at) {
            Route::Table(offset) => {
                self.front.counters.bar_writes_local += 1;
                if let Some(msix) = &mut self.front.msix {
                    msix.write_table(offset, width, value);
                }
                self.front.tell();
            }
            Route::Pending(_) => self.front.counters.bar_writes_local += 1,
            Route::Constant(_) | Route::Device => {
                tracing::trace!(%at, value, register = self.profile.register(at).map(tracing::field::display), "write");
                self.front.counters.bar_writes_remote += 1;
                match self.profile.write(at, width, value, &self.windows) {
                    // The pin may be lowered by it.
                    Verdict::ForwardWithNext if self.mode != InterruptMode::Pin && !self.armed => {
                        self.lazy.keep(at, width, value, &mut *self.attachment, &mut self.front);
                    }
                    Verdict::Forward | Verdict::ForwardWithNext => {
                        self.release_lazy();
                        self.attachment.bar_write(at, width, value, &mut self.front);
                    }
                }
                self.settle();
            }
        }
        Ok(())
    }

    /// What the client of a vfio-user server enabled. Ignored with [`InterruptOwner::Function`], whose registers say.
    pub fn set_client_interrupts(&mut self, mode: InterruptMode) {
        self.front.client_mode = mode;
        self.follow();
    }

    /// Fences DMA, resets the device, and puts all registers back as the kind of reset says. Windows stay. What the device said before is
    /// not told any more. Registers are reset even where the device did not answer.
    ///
    /// # Errors
    /// [`AttachmentError`].
    pub fn reset(&mut self, kind: ResetKind) -> Result<(), AttachmentError> {
        self.front.counters.resets += 1;
        self.lazy.forget();
        self.front.fence();
        if std::mem::take(&mut self.bus_master) {
            self.attachment.set_bus_master(false, &mut self.front);
        }
        let mut reset = self.attachment.reset(kind, &mut self.front);
        if self.is_lost() {
            // The one that takes its place is reset, too.
            reset = Ok(());
        }
        self.profile.reset(kind);
        self.front.restart(kind);
        // Said again even if it is the same: the device may have forgotten.
        self.mode = self.front.mode();
        self.decoded = self.front.decoded();
        self.attachment.set_interrupt_mode(self.mode, &mut self.front);
        self.settle();
        reset
    }

    /// Takes what has happened at the device: interrupts go to the sink, mediations to [`Function::next_mediation`]. Never blocks.
    pub fn poll(&mut self, now: Nanos) -> Activity {
        const POLLS_PER_TELL: u32 = 64;
        self.armed = false;
        self.polls = self.polls.wrapping_add(1);
        if self.polls.is_multiple_of(POLLS_PER_TELL) {
            self.tell_counters();
        }
        if self.lazy.release_late(now, &mut *self.attachment, &mut self.front) {
            self.attachment.flush();
        }
        let activity = self.attachment.poll(now, &mut self.front);
        self.settle();
        if self.attachment.gone().is_some() {
            return self.mourn(activity);
        }
        activity
    }

    /// Prepares to sleep: true where [`Function::wake_fd`] will become readable at the next event; false where there is work.
    pub fn arm(&mut self) -> bool {
        if self.lazy.waits() {
            self.send_all();
        }
        self.armed = true;
        self.tell_counters();
        if self.is_lost() {
            // What it said while it was looked for is in its descriptor.
            return true;
        }
        let idle = !self.front.mediations.waiting() && self.front.mediations.refused() == 0;
        idle && self.attachment.arm()
    }

    /// Readable when an armed function has events.
    pub fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        if self.lost_since().is_some() { self.search_fd() } else { self.attachment.wake_fd() }
    }

    /// Why the device is gone for good, once it is. Then every read is all ones, as from an empty slot. One that is looked for
    /// ([`Function::reattaching`]) is not.
    pub fn gone(&self) -> Option<CloseReason> {
        self.attachment.gone().filter(|_| self.recovery.as_ref().is_none_or(Recovery::is_over))
    }

    /// The attachment itself.
    pub fn attachment_mut(&mut self) -> &mut dyn Attachment {
        self.release_lazy();
        &mut *self.attachment
    }

    fn local_read(&mut self, at: BarAddress, width: Width) -> Option<u64> {
        if !self.decodes(at.bar) {
            self.front.space.note_unsupported_request(false);
            return Some(width.all_ones());
        }
        let value = match self.routes.of_read(at, width) {
            Route::Table(offset) => self.front.msix.as_ref().map(|msix| msix.read_table(offset, width)),
            Route::Pending(offset) => self.front.msix.as_ref().map(|msix| msix.read_pending(offset, width)),
            Route::Constant(value) => Some(value),
            Route::Device => self.profile.read(at, width),
        };
        // What is known here must not hide that the device is not there any more.
        value.map(|value| if self.gone().is_some() { width.all_ones() } else { value })
    }

    /// `bar` has been checked: it is one of six.
    fn decodes(&self, bar: u8) -> bool {
        self.decoded >> bar & 1 != 0
    }

    /// Tells the attachment and the guest what changed in the registers. Bus mastering is taken before anything else and given last.
    fn follow(&mut self) {
        let (bus_master, mode) = (self.front.space.bus_master(), self.front.mode());
        self.decoded = self.front.decoded();
        self.release_lazy();
        if self.bus_master && !bus_master {
            self.attachment.set_bus_master(false, &mut self.front);
        }
        if mode != self.mode {
            self.mode = mode;
            self.attachment.set_interrupt_mode(mode, &mut self.front);
        }
        if bus_master && !self.bus_master {
            self.attachment.set_bus_master(true, &mut self.front);
        }
        self.bus_master = bus_master;
        self.front.tell();
        self.settle();
    }

    /// Sends everything that waits.
    pub(crate) fn send_all(&mut self) {
        self.release_lazy();
        self.attachment.flush();
    }

    /// What comes now must find what was written before.
    #[inline]
    fn release_lazy(&mut self) {
        self.lazy.release(&mut *self.attachment, &mut self.front);
    }

    /// After every call of the attachment: refused mediations are answered, and signals whose stores are made are told.
    fn settle(&mut self) {
        // No more than there are now: an answer may bring the next question, which waits for the next call.
        for _ in 0..self.front.mediations.refused() {
            let Some(ticket) = self.front.mediations.take_refused() else {
                break;
            };
            self.attachment.answer(ticket, MediationAnswer::Fault, &mut self.front);
        }
        self.front.release();
    }

    fn refusable<T>(&mut self, access: impl FnOnce(&mut Self) -> Result<T, AccessError>) -> Result<T, AccessError> {
        let result = access(self);
        if result.is_err() {
            self.front.counters.refused += 1;
        }
        result
    }
}

impl<S: IrqSink + std::fmt::Debug> std::fmt::Debug for Function<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Function")
            .field("name", &self.description.name)
            .field("sink", &self.front.sink)
            .field("counters", &self.front.counters)
            .finish_non_exhaustive()
    }
}
