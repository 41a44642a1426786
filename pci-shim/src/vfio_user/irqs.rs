//! The client's side of interrupts: eventfds by interrupt index and vector, masks, and what was raised while nobody listened.
//!
//! The device raises vector 3 before the client has registered its eventfd: vector 3 is pending, and the `SET_IRQS` that brings the eventfd
//! signals it at once. INTx is a level: signalling it masks it, and an unmask while it is still asserted signals it again.
//!
//! Two things are kept longer than they need be, on purpose. Pending vectors survive a client that tears all vectors down and sets them up
//! again (as QEMU does for each vector it adds): a second signal is harmless, a lost one hangs a guest. And a disabled MSI-X stays the
//! function's way to signal until the client sets up another, so that vectors raised during such a teardown are pending, not turned into INTx.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use farbus_remote_dma::{DeviceDescription, InterruptMode};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::message::{IrqAction, IrqData, SetIrqs};
use super::wire::{ERR, INTX, IRQ_AUTOMASKED, IRQ_EVENTFD, IRQ_INDEXES, IRQ_MASKABLE, IrqInfo, MSI, MSIX, REQ};

/// An eventfd of the client's that cannot make us wait.
#[derive(Debug)]
struct Doorbell {
    fd: OwnedFd,
    may_block: bool,
}

impl Doorbell {
    /// # Errors
    /// `EINVAL` for a descriptor that is no anonymous inode: a full pipe or socket would block us.
    fn new(fd: OwnedFd) -> Result<Self, Errno> {
        let stat = rustix::fs::fstat(&fd)?;
        if stat.st_mode & libc::S_IFMT != 0 {
            return Err(Errno::INVAL);
        }
        let may_block = !rustix::fs::fcntl_getfl(&fd)?.contains(OFlags::NONBLOCK);
        Ok(Self { fd, may_block })
    }

    fn ring(&self) {
        if self.may_block && !ready(self.fd.as_fd(), PollFlags::OUT) {
            // Its counter is full: it is signalled as much as it can be.
            return;
        }
        match rustix::io::write(&self.fd, &1_u64.to_ne_bytes()) {
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(errno) => tracing::warn!(%errno, "a client's eventfd cannot be signalled"),
        }
    }
}

fn ready(fd: BorrowedFd<'_>, events: PollFlags) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, events)];
    rustix::event::poll(&mut fds, Some(&Timespec::default())).is_ok() && fds.iter().any(|fd| fd.revents().contains(events))
}

#[derive(Debug, Default)]
struct Line {
    trigger: Option<Doorbell>,
    masked: bool,
    pending: bool,
}

impl Line {
    fn raise(&mut self) {
        self.pending = true;
        self.settle();
    }

    fn settle(&mut self) {
        if self.pending
            && !self.masked
            && let Some(doorbell) = &self.trigger
        {
            doorbell.ring();
            self.pending = false;
        }
    }
}

/// Vectors that wait until a store is in guest memory.
#[derive(Debug)]
struct Held {
    after_store: u64,
    vectors: Vec<u16>,
}

/// Where a function's interrupts go when a vfio-user client owns them.
#[derive(Debug)]
pub struct ClientInterrupts {
    lines: [Vec<Line>; IRQ_INDEXES as usize],
    /// Vectors raised since the last [`ClientInterrupts::deliver`].
    raised: Vec<u16>,
    held: VecDeque<Held>,
    asserted: bool,
    pin_raised: bool,
    pin_after_store: Option<u64>,
    /// A client's descriptor that unmasks INTx when it is signalled.
    unmask: Option<Arc<OwnedFd>>,
    mode: InterruptMode,
}

impl ClientInterrupts {
    /// For a device that is `description`; nobody listens yet.
    pub fn new(description: &DeviceDescription) -> Self {
        let lines = |count: usize| std::iter::repeat_with(Line::default).take(count).collect::<Vec<_>>();
        let msix = description.msix.as_ref().map_or(0, |msix| usize::from(msix.vectors));
        Self {
            lines: [
                lines(usize::from(description.pin)),
                lines(usize::from(description.msi_vectors)),
                lines(msix),
                lines(1),
                lines(1),
            ],
            raised: Vec::with_capacity(msix.max(usize::from(description.msi_vectors))),
            held: VecDeque::new(),
            asserted: false,
            pin_raised: false,
            pin_after_store: None,
            unmask: None,
            mode: InterruptMode::Pin,
        }
    }

    /// The device's INTx level.
    pub fn pin(&mut self, asserted: bool) {
        self.pin_raised |= asserted && !self.asserted;
        self.asserted = asserted;
    }

    /// The device raised a vector of MSI or MSI-X, whichever is on.
    pub fn message(&mut self, vector: u16) {
        if !self.raised.contains(&vector) {
            self.raised.push(vector);
        }
    }

    /// How the client is signalled.
    pub fn mode(&self) -> InterruptMode {
        self.mode
    }

    /// Whether [`ClientInterrupts::deliver`] has something to do.
    pub fn has_news(&self) -> bool {
        !self.raised.is_empty() || self.pin_raised || !self.held.is_empty() || self.pin_after_store.is_some()
    }

    /// Signals what was raised, except what must wait for stores: anything raised while `newest_store` was the last of them and not all up
    /// to it were answered. `oldest_unanswered` is the first store whose answer is missing.
    pub fn deliver(&mut self, newest_store: u64, oldest_unanswered: Option<u64>) {
        let done = |after: u64| oldest_unanswered.is_none_or(|oldest| oldest > after);
        while self.held.front().is_some_and(|held| done(held.after_store)) {
            for vector in self.held.pop_front().into_iter().flat_map(|held| held.vectors) {
                self.raise(vector);
            }
        }
        if self.pin_after_store.is_some_and(done) {
            self.pin_after_store = None;
        }
        if done(newest_store) {
            let mut raised = std::mem::take(&mut self.raised);
            for vector in raised.drain(..) {
                self.raise(vector);
            }
            // Keeps its room: raising allocates nothing.
            self.raised = raised;
        } else if !self.raised.is_empty() {
            let vectors = self.raised.drain(..);
            match self.held.back_mut().filter(|held| held.after_store == newest_store) {
                Some(held) => held.vectors.extend(vectors),
                None => self.held.push_back(Held { after_store: newest_store, vectors: vectors.collect() }),
            }
        }
        if std::mem::take(&mut self.pin_raised) && !done(newest_store) {
            self.pin_after_store = Some(newest_store);
        }
        self.settle_pin();
    }

    /// What `DEVICE_GET_IRQ_INFO` answers; `None` for an index that does not exist.
    pub fn info(&self, index: u32) -> Option<IrqInfo> {
        let count = self.lines.get(index as usize)?.len();
        let flags = match index {
            _ if count == 0 => 0,
            INTX => IRQ_EVENTFD | IRQ_MASKABLE | IRQ_AUTOMASKED,
            MSI | MSIX => IRQ_EVENTFD | IRQ_MASKABLE,
            _ => IRQ_EVENTFD,
        };
        Some(IrqInfo { argsz: size_of::<IrqInfo>() as u32, flags, index, count: count as u32 })
    }

    /// Does what a `DEVICE_SET_IRQS` with these descriptors says.
    ///
    /// # Errors
    /// `EINVAL` for a range that the index does not have, a descriptor that is no eventfd, or as many descriptors as neither 0 nor the count;
    /// `ENOTTY` for what an index cannot do.
    pub fn set(&mut self, set: &SetIrqs<'_>, fds: Vec<OwnedFd>) -> Result<(), Errno> {
        let lines = self.lines.get(set.index as usize).ok_or(Errno::INVAL)?;
        if set.count == 0 {
            self.disable(set.index);
            return Ok(());
        }
        let range = set.start as usize..set.start.checked_add(set.count).ok_or(Errno::INVAL)? as usize;
        if range.end > lines.len() || (!matches!(set.data, IrqData::Eventfd) && !fds.is_empty()) {
            return Err(Errno::INVAL);
        }
        if matches!(set.index, ERR | REQ) && set.action != IrqAction::Trigger {
            return Err(Errno::NOTTY);
        }
        match (set.action, set.data) {
            (IrqAction::Trigger, IrqData::Eventfd) => self.register(set.index, range, fds),
            (IrqAction::Unmask, IrqData::Eventfd) if set.index == INTX => {
                let none = fds.is_empty();
                let fd = fds.into_iter().next();
                // Read by us, so it must never make us wait.
                self.unmask =
                    fd.map(Doorbell::new).transpose()?.filter(|doorbell| !doorbell.may_block).map(|doorbell| Arc::new(doorbell.fd));
                (set.count == 1 && (self.unmask.is_some() || none)).then_some(()).ok_or(Errno::INVAL)
            }
            (IrqAction::Mask | IrqAction::Unmask, IrqData::Eventfd) => Err(Errno::NOTTY),
            (action, data) => {
                let chosen = |i: usize| match data {
                    IrqData::Bool(flags) => flags.get(i).is_some_and(|flag| *flag != 0),
                    _ => true,
                };
                for (i, vector) in range.enumerate().filter(|(i, _)| chosen(*i)) {
                    let _ = i;
                    self.act(set.index, vector, action);
                }
                Ok(())
            }
        }
    }

    /// A descriptor that unmasks INTx when it becomes readable.
    pub fn unmask_fd(&self) -> Option<Arc<OwnedFd>> {
        self.unmask.clone()
    }

    /// Takes a signal of [`ClientInterrupts::unmask_fd`].
    pub fn take_unmask(&mut self) {
        let Some(fd) = &self.unmask else { return };
        if ready(fd.as_fd(), PollFlags::IN) {
            if let Err(errno) = rustix::io::read(fd, &mut [0_u8; 8]) {
                tracing::warn!(%errno, "a client's unmask eventfd cannot be read: it is dropped");
                self.unmask = None;
            }
            self.act(INTX, 0, IrqAction::Unmask);
        }
    }

    /// The device was reset: nothing is raised any more. Registrations stay.
    pub fn clear(&mut self) {
        self.raised.clear();
        self.held.clear();
        (self.asserted, self.pin_raised, self.pin_after_store) = (false, false, None);
        self.lines.iter_mut().flatten().for_each(|line| line.pending = false);
    }

    /// The client left: closes its descriptors and forgets everything.
    pub fn forget_client(&mut self) {
        self.clear();
        self.lines.iter_mut().flatten().for_each(|line| *line = Line::default());
        self.unmask = None;
        self.mode = InterruptMode::Pin;
    }

    fn raise(&mut self, vector: u16) {
        let index = match self.mode {
            InterruptMode::Pin => {
                tracing::debug!(vector, "a vector was raised while neither MSI nor MSI-X is on");
                return;
            }
            InterruptMode::Msi(_) => MSI,
            InterruptMode::Msix => MSIX,
        };
        match self.line(index, usize::from(vector)) {
            Some(line) => line.raise(),
            None => tracing::warn!(vector, "a vector was raised that the device does not have"),
        }
    }

    fn line(&mut self, index: u32, vector: usize) -> Option<&mut Line> {
        self.lines.get_mut(index as usize)?.get_mut(vector)
    }

    fn settle_pin(&mut self) {
        let level = self.asserted && self.pin_after_store.is_none();
        if let Some(line) = self.line(INTX, 0).filter(|line| level && !line.masked && line.trigger.is_some()) {
            line.raise();
            line.masked = true;
        }
    }

    fn act(&mut self, index: u32, vector: usize, action: IrqAction) {
        let Some(line) = self.line(index, vector) else { return };
        match action {
            IrqAction::Mask => line.masked = true,
            IrqAction::Unmask => {
                line.masked = false;
                line.settle();
            }
            IrqAction::Trigger => line.raise(),
        }
        if index == INTX {
            self.settle_pin();
        }
    }

    fn register(&mut self, index: u32, range: std::ops::Range<usize>, fds: Vec<OwnedFd>) -> Result<(), Errno> {
        if !fds.is_empty() && fds.len() != range.len() {
            return Err(Errno::INVAL);
        }
        let mut doorbells = fds.into_iter().map(Doorbell::new).collect::<Result<Vec<_>, _>>()?.into_iter();
        let mode = match index {
            INTX if doorbells.len() > 0 => Some(InterruptMode::Pin),
            MSI => {
                let listening = self
                    .lines
                    .get(MSI as usize)
                    .map_or(0, |lines| lines.iter().rposition(|line| line.trigger.is_some()).map_or(0, |last| last + 1));
                let vectors = listening.max(range.end).next_power_of_two();
                Some(InterruptMode::Msi(u8::try_from(vectors).unwrap_or(32)))
            }
            MSIX => Some(InterruptMode::Msix),
            _ => None,
        };
        if let Some(mode) = mode {
            self.switch(mode);
        }
        for vector in range {
            let doorbell = doorbells.next();
            if let Some(line) = self.line(index, vector) {
                line.trigger = doorbell;
                line.settle();
            }
        }
        if index == INTX {
            self.settle_pin();
        }
        Ok(())
    }

    fn switch(&mut self, mode: InterruptMode) {
        if std::mem::discriminant(&mode) != std::mem::discriminant(&self.mode) {
            self.lines.iter_mut().flatten().for_each(|line| line.pending = false);
        }
        self.mode = mode;
    }

    fn disable(&mut self, index: u32) {
        for line in self.lines.get_mut(index as usize).into_iter().flatten() {
            line.trigger = None;
            line.masked = false;
        }
        if index == INTX {
            self.unmask = None;
        }
    }
}

#[cfg(test)]
mod tests;
