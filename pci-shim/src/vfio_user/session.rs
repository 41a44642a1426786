//! One client, from its `VERSION` to its end: commands in order, each answered exactly once unless it wants no answer.
//!
//! Message 9 asks for 4 bytes of region 0 at 0x1c: the function reads BAR0 + 0x1c, and 36 bytes go back with the same message number, behind
//! the stores that the device made before. A message that makes no sense is answered with an errno and the next one is read; only a stream
//! that cannot be followed ends the client.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use farbus_remote_dma::{Activity, InterruptMode, ResetKind};
use farbus_transport::Nanos;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::Shutdown;

use super::commands::Promise;
use super::held::Waiting;
use super::maps::Maps;
use super::mediation::{Finding, Mediator};
use super::message::parse;
use super::options::{ClientEnd, OnGone, Options, ServeError, host};
use super::served::Served;
use super::server::{StopHandle, Told};
use super::share::{OnUnshared, Trust};
use super::socket::{Incoming, Input, Output, Received};
use super::wire::{Command, Header, MAX_DATA_BYTES};

/// Bytes that wait for a client, above which nothing more is read from it.
const MAX_BACKLOG: usize = 4 << 20;
/// Polls of a busy device between two looks at the socket.
const BUSY_POLLS: u32 = 16;

/// One client's connection and all that it set up.
pub(super) struct Session<'a, D> {
    pub(super) device: &'a mut D,
    pub(super) options: &'a Options,
    socket: BorrowedFd<'a>,
    /// What its user is told once.
    pub(super) told: &'a Told,
    output: Output,
    pub(super) maps: Maps,
    pub(super) mediator: Mediator,
    /// The body of the reply that is being made.
    pub(super) reply: Vec<u8>,
    pub(super) waiting: Waiting,
    pub(super) agreed: bool,
    proof_due: bool,
    /// Whether it was said that the device is gone.
    mourned: bool,
    pub(super) mode: InterruptMode,
    pub(super) end: Option<ClientEnd>,
}

/// Serves one client until it ends; its maps and descriptors are gone when this returns, and the device is reset if it was used.
///
/// # Errors
/// [`ServeError`] where the kernel does not let us wait.
pub(super) fn serve_client<D: Served>(
    device: &mut D,
    options: &Options,
    socket: BorrowedFd<'_>,
    stop: &StopHandle,
    told: &Told,
) -> Result<ClientEnd, ServeError> {
    let mut session = Session {
        mode: InterruptMode::Pin,
        mediator: Mediator::new(MAX_DATA_BYTES, options.dma_deadline),
        device,
        options,
        socket,
        told,
        output: Output::default(),
        maps: Maps::default(),
        reply: Vec::with_capacity(4096),
        waiting: Waiting::default(),
        agreed: false,
        proof_due: false,
        mourned: false,
        end: None,
    };
    let end = session.run(stop);
    // Before the reset, which may take its time: who was sent away hears it now, and who comes now waits for the reset and is not refused.
    if let Err(errno) = rustix::net::shutdown(socket, Shutdown::Both) {
        tracing::debug!(%errno, "a client was gone already");
    }
    session.close();
    end
}

impl<D: Served> Session<'_, D> {
    fn run(&mut self, stop: &StopHandle) -> Result<ClientEnd, ServeError> {
        let mut input = Input::new();
        let started = Nanos::now();
        let mut awake_until = started + self.options.spin;
        let mut busy_polls = 0;
        // Set when the socket was just found readable: the message is answered before the device is looked at.
        let mut readable = false;
        loop {
            let mut activity = Activity::Busy;
            if !std::mem::take(&mut readable) {
                activity = self.device.poll(Nanos::now());
                self.settle();
                self.release();
                if activity == Activity::Busy && busy_polls < BUSY_POLLS && self.end.is_none() && !stop.is_stopped() {
                    busy_polls += 1;
                    continue;
                }
            }
            busy_polls = 0;
            if self.end.is_none() && (activity == Activity::Busy || Nanos::now() < awake_until) && self.receive(&mut input) {
                activity = Activity::Busy;
            }
            if let Some(end) = self.end {
                return Ok(end);
            }
            if stop.is_stopped() {
                return Ok(ClientEnd::Stopped);
            }
            let now = Nanos::now();
            if !self.mourned
                && let Some(reason) = self.device.gone()
            {
                if self.options.on_gone == OnGone::End {
                    return Ok(ClientEnd::DeviceGone);
                }
                self.mourned = true;
                match &self.told.gone {
                    Some(hear) => hear(reason),
                    None => tracing::warn!(%reason, "the device is gone: its client reads all ones until it leaves"),
                }
            }
            if activity == Activity::Busy {
                awake_until = now + self.options.spin;
                continue;
            }
            let version_deadline = (!self.agreed).then_some(started + self.options.version_deadline);
            if version_deadline.is_some_and(|deadline| deadline <= now) {
                return Ok(ClientEnd::Misbehaved("it sent no VERSION in time"));
            }
            if now < awake_until {
                std::hint::spin_loop();
                continue;
            }
            let deadlines = [version_deadline, self.mediator.next_deadline(), self.waiting.deadline()];
            let until = deadlines.into_iter().flatten().map(|deadline| deadline.since(now)).min();
            readable = self.sleep(activity, until, stop)?;
        }
    }

    /// Waits for the client, the device, the stop handle or a time; says whether the client has sent something.
    fn sleep(&mut self, activity: Activity, until: Option<Duration>, stop: &StopHandle) -> Result<bool, ServeError> {
        let armed = self.device.arm();
        if !armed && self.device.wake_fd().is_some() {
            return Ok(false);
        }
        let own = match activity {
            Activity::Idle(after) => after,
            Activity::Busy => None,
        };
        // A device that can neither be armed nor waited for is polled now and then.
        let unarmed = (!armed).then_some(Duration::from_millis(1));
        let timeout = until.into_iter().chain(own).chain(unarmed).min().map(timespec);
        let backlog = self.output.backlog();
        let mut events = PollFlags::empty();
        if backlog < MAX_BACKLOG && !self.waiting.is_full() {
            events |= PollFlags::IN;
        }
        if backlog > 0 {
            events |= PollFlags::OUT;
        }
        let unmask = self.device.interrupts().unmask_fd();
        let polled = |fd, events| PollFd::from_borrowed_fd(fd, events);
        let stopped = || polled(stop.fd(), PollFlags::IN);
        let mut fds = [
            polled(self.socket, events),
            stopped(),
            unmask.as_ref().map_or_else(stopped, |fd| polled(fd.as_fd(), PollFlags::IN)),
            self.device.wake_fd().map_or_else(stopped, |fd| polled(fd, PollFlags::IN)),
        ];
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(host("wait for a client")(errno)),
        }
        let [socket, _, unmasked, _] = fds.map(|fd| fd.revents());
        let unmasked = unmask.is_some() && !unmasked.is_empty();
        if unmasked {
            self.device.interrupts().take_unmask();
        }
        if socket.contains(PollFlags::OUT) {
            self.flush();
        }
        Ok(socket.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR))
    }

    /// Takes and answers what the client sent; says whether it sent anything.
    fn receive(&mut self, input: &mut Input) -> bool {
        if self.output.backlog() >= MAX_BACKLOG {
            self.flush();
            return false;
        }
        if self.waiting.is_full() {
            return false;
        }
        match input.receive(self.socket, false) {
            Ok(Received::Bytes) => {}
            Ok(Received::Nothing) => return false,
            Ok(Received::Closed) => {
                self.end = Some(ClientEnd::Left);
                return false;
            }
            Err(error) => {
                self.broken(&error);
                return false;
            }
        }
        while self.end.is_none() {
            match input.next_message() {
                Some(Incoming::Message { header, body, fds, excess_fds, last }) => {
                    self.message(&header, body, fds, excess_fds, last)
                }
                Some(Incoming::TooLong(header)) => self.refuse(&header, Errno::TOOBIG),
                Some(Incoming::Broken(header)) => {
                    self.refuse(&header, Errno::INVAL);
                    self.end = Some(ClientEnd::Misbehaved("a message is shorter than its header"));
                }
                None => break,
            }
        }
        self.device.flush();
        true
    }

    fn message(&mut self, header: &Header, body: &[u8], fds: Vec<OwnedFd>, excess_fds: bool, last: bool) {
        if header.is_reply() {
            self.client_reply(header, body);
        } else if self.waiting.is_held() {
            self.waiting.defer(header, body, fds, excess_fds);
        } else {
            self.command(header, body, fds, excess_fds, last);
        }
        self.settle();
        self.release();
    }

    pub(super) fn command(&mut self, header: &Header, body: &[u8], fds: Vec<OwnedFd>, excess_fds: bool, last: bool) {
        if !header.is_command() || excess_fds {
            self.refuse(header, Errno::INVAL);
        } else if !self.agreed && header.command != Command::Version.number() {
            self.refuse(header, Errno::INVAL);
            self.end = Some(ClientEnd::Misbehaved("its first message was not VERSION"));
        } else {
            self.reply.clear();
            let outcome = parse(header.command, body).and_then(|request| self.dispatch(&request, fds));
            if last {
                // A doorbell is on its way before the client is told that it was taken; a burst goes together.
                self.device.flush();
            }
            match outcome {
                Ok(Some(Promise { until, otherwise })) if !self.mediator.has_ended(&until) => {
                    // What is waited for must be on its way.
                    self.settle();
                    if !self.hold(header, until, otherwise) {
                        self.acknowledge(header);
                    }
                }
                Ok(_) => self.acknowledge(header),
                Err(errno) => {
                    tracing::debug!(command = header.command, %errno, "a command was refused");
                    self.refuse(header, errno);
                }
            }
        }
    }

    fn client_reply(&mut self, header: &Header, body: &[u8]) {
        let now = Nanos::now();
        let finding = self.mediator.reply(header, body, self.device, &mut self.maps, self.socket, &mut self.output, now);
        self.client_serves();
        match finding {
            Ok(Finding::Nothing) => self.proof_due = self.maps.files_mut().any(|file| file.trust == Trust::Seen),
            Ok(Finding::NotShared) => match self.options.on_unshared {
                OnUnshared::Messages => tracing::warn!(
                    "the client's memory is not shared with us, so every dma goes by message, which is slow: \
                     start the virtual machine with share=on (QEMU: -object memory-backend-memfd,share=on)"
                ),
                OnUnshared::Refuse => {
                    tracing::error!(
                        "the client's memory is not shared with us: start the virtual machine with share=on \
                         (QEMU: -object memory-backend-memfd,share=on)"
                    );
                    self.end = Some(ClientEnd::NotShared);
                }
            },
            Err(error) => self.broken(&error),
        }
    }

    /// After every call of the device: what it asks of the client goes out, then the interrupts that may.
    pub(super) fn settle(&mut self) {
        self.mediator.collect(self.device);
        if !self.mediator.is_idle() {
            let now = Nanos::now();
            self.mediator.expire(self.device, now);
            self.mediator.collect(self.device);
            if let Err(error) = self.mediator.send(&self.maps, self.socket, &mut self.output, now) {
                self.broken(&error);
            }
            if self.mediator.is_ignored() {
                self.end = Some(ClientEnd::Misbehaved("it answers no DMA_READ and DMA_WRITE"));
            }
        }
        let (newest, oldest) = if self.device.orders_interrupts() { (0, None) } else { self.mediator.stores() };
        let interrupts = self.device.interrupts();
        if interrupts.has_news() {
            interrupts.deliver(newest, oldest);
        }
        if self.proof_due && self.mediator.is_idle() {
            self.proof_due = false;
            for file in self.maps.files_mut().filter(|file| file.trust == Trust::Seen) {
                file.trust = Trust::Proven;
                for memory in &file.memories {
                    self.device.prove(memory);
                }
            }
        }
    }

    pub(super) fn acknowledge(&mut self, header: &Header) {
        if !header.no_reply()
            && let Err(error) = self.output.send(self.socket, &header.reply(self.reply.len()), [&self.reply, &[]])
        {
            self.broken(&error);
        }
    }

    pub(super) fn refuse(&mut self, header: &Header, errno: Errno) {
        if !header.no_reply()
            && let Err(error) = self.output.send(self.socket, &header.refusal(errno), [&[], &[]])
        {
            self.broken(&error);
        }
    }

    fn flush(&mut self) {
        if let Err(error) = self.output.flush(self.socket) {
            self.broken(&error);
        }
    }

    fn broken(&mut self, error: &io::Error) {
        tracing::debug!(%error, "the connection to a client broke");
        self.end = Some(ClientEnd::Left);
    }

    /// Nothing of this client is left afterwards.
    fn close(&mut self) {
        self.device.interrupts().forget_client();
        self.mediator.fault_all(self.device);
        if self.agreed {
            if let Err(error) = self.device.reset(ResetKind::Conventional) {
                tracing::warn!(%error, "the device could not be reset after its client left");
            }
            self.mediator.fault_all(self.device);
        }
        let windows = self.maps.all();
        for window in windows {
            // One that fails must not keep the others.
            if let Err(errno) = self.maps.unmap(self.device, &[window]) {
                tracing::warn!(%errno, "a window could not be taken away after its client left");
            }
        }
        self.device.interrupts().forget_client();
        if self.mode != InterruptMode::Pin {
            self.device.set_client_interrupts(InterruptMode::Pin);
        }
    }
}

/// A time to sleep as poll(2) takes it.
pub(super) fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX), tv_nsec: i64::from(duration.subsec_nanos()) }
}
