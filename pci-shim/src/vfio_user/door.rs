//! Who may come in: a thread that keeps the listening socket while a server serves, lets one client in at a time, and tells the others.
//!
//! A second QEMU that connects while the first one runs has its `VERSION` answered with `EBUSY` at once, and says so and ends. The first
//! notices nothing: the thread that serves it never looks at the listening socket, and this one sleeps but for such a moment.
//!
//! Only who has begun to speak comes in, so a connection that says nothing keeps nobody out. One that speaks when the client inside has hung
//! up is not refused: it waits until the device is reset, so that a VM can be started again as soon as it has ended.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, Scope};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SocketFlags};

use super::session::timespec;
use super::socket::{Incoming, Input, Output};

/// Connections that may be silent at a time; one more ends the oldest.
const MAX_SILENT: usize = 16;
/// Between two attempts to accept where descriptors or memory are short.
const SHORTAGE: Duration = Duration::from_millis(100);

/// A client that was let in; shared with the thread at the door, which looks whether it is still there.
pub(super) type Visitor = Arc<OwnedFd>;

/// The server's side of the door. Dropping it ends the thread.
pub(super) struct Door {
    visitors: Receiver<Result<Visitor, Errno>>,
    arrived: Arc<OwnedFd>,
    bell: Arc<Bell>,
}

/// How the server reaches the thread at the door.
struct Bell {
    rung: OwnedFd,
    left: AtomicBool,
    ended: AtomicBool,
}

impl Door {
    /// Opens it: from now on clients are accepted. `listener` does not block; a client may be silent for `patience`.
    ///
    /// # Errors
    /// No thread or descriptor is left.
    pub(super) fn open<'scope>(
        scope: &'scope Scope<'scope, '_>,
        listener: &'scope UnixListener,
        patience: Duration,
    ) -> io::Result<Self> {
        let (sender, visitors) = channel();
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let arrived = Arc::new(event()?);
        let bell = Arc::new(Bell { rung: event()?, left: AtomicBool::new(false), ended: AtomicBool::new(false) });
        let keeper = Keeper {
            listener,
            patience,
            visitors: sender,
            arrived: Arc::clone(&arrived),
            bell: Arc::clone(&bell),
            silent: Vec::new(),
            inside: None,
            next: None,
        };
        Builder::new().name("farbus-door".into()).spawn_scoped(scope, move || keeper.run())?;
        Ok(Self { visitors, arrived, bell })
    }

    /// The next client, if one has come. No system call where none has.
    ///
    /// # Errors
    /// What the kernel answered to the thread at the door; nobody comes any more.
    pub(super) fn visitor(&self) -> Result<Option<Visitor>, Errno> {
        let Ok(visitor) = self.visitors.try_recv() else { return Ok(None) };
        // Only there to end a sleep, and it has.
        let _emptied = rustix::io::read(&self.arrived, &mut [0_u8; 8]);
        visitor.map(Some)
    }

    /// Readable when a client has come.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.arrived.as_fd()
    }

    /// The client that was let in last is gone: the next may come.
    pub(super) fn left(&self) {
        self.bell.left.store(true, Ordering::Release);
        ring(&self.bell.rung);
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.bell.ended.store(true, Ordering::Release);
        ring(&self.bell.rung);
    }
}

/// A connection of which nothing was heard yet.
struct Silent {
    client: OwnedFd,
    until: Instant,
}

/// The thread at the door.
struct Keeper<'a> {
    listener: &'a UnixListener,
    patience: Duration,
    visitors: Sender<Result<Visitor, Errno>>,
    arrived: Arc<OwnedFd>,
    bell: Arc<Bell>,
    /// The oldest first.
    silent: Vec<Silent>,
    /// Who is served.
    inside: Option<Visitor>,
    /// Who spoke when the one inside had hung up already.
    next: Option<OwnedFd>,
}

impl Keeper<'_> {
    fn run(mut self) {
        let failed = loop {
            if self.bell.ended.load(Ordering::Acquire) {
                return;
            }
            if self.bell.left.swap(false, Ordering::AcqRel) {
                self.inside = None;
            }
            if self.inside.is_none()
                && let Some(next) = self.next.take()
            {
                self.let_in(next);
            }
            if let Err(errno) = self.wait().and_then(|connected| if connected { self.accept() } else { Ok(()) }) {
                break errno;
            }
            self.look_at_the_silent();
        };
        // A server that is gone needs not hear it.
        let _unheard = self.visitors.send(Err(failed));
        ring(&self.arrived);
    }

    /// Sleeps until somebody connects, speaks or has been silent for too long, or the server rings; whether somebody connected.
    fn wait(&self) -> Result<bool, Errno> {
        let mut fds = Vec::with_capacity(2 + self.silent.len());
        fds.push(PollFd::new(&self.bell.rung, PollFlags::IN));
        fds.push(PollFd::new(self.listener, PollFlags::IN));
        fds.extend(self.silent.iter().map(|silent| PollFd::new(&silent.client, PollFlags::IN)));
        let first = self.silent.iter().map(|silent| silent.until).min();
        let timeout = first.map(|until| timespec(until.saturating_duration_since(Instant::now())));
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        let ready = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
        let (rung, connected) = (ready(0), ready(1));
        if rung {
            let _emptied = rustix::io::read(&self.bell.rung, &mut [0_u8; 8]);
        }
        Ok(connected)
    }

    fn accept(&mut self) -> Result<(), Errno> {
        match rustix::net::accept_with(self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(client) => {
                if self.silent.len() >= MAX_SILENT {
                    self.silent.remove(0);
                    tracing::warn!("a client that says nothing was sent away for another");
                }
                self.silent.push(Silent { client, until: Instant::now() + self.patience });
            }
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                tracing::warn!("no descriptors or memory left to accept a client: trying again in {} ms", SHORTAGE.as_millis());
                std::thread::sleep(SHORTAGE);
            }
            Err(errno) => return Err(errno),
        }
        Ok(())
    }

    /// Whoever has spoken comes in or is refused; who left or was silent for too long is forgotten.
    fn look_at_the_silent(&mut self) {
        let now = Instant::now();
        for silent in std::mem::take(&mut self.silent) {
            match rustix::net::recv(&silent.client, &mut [0_u8; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
                Ok((1.., _)) => self.judge(silent.client),
                Err(Errno::AGAIN | Errno::INTR) if silent.until > now => self.silent.push(silent),
                Err(Errno::AGAIN | Errno::INTR) => tracing::warn!("a client was sent away: it sent no VERSION in time"),
                Ok(_) | Err(_) => tracing::debug!("somebody connected and left"),
            }
        }
    }

    fn judge(&mut self, client: OwnedFd) {
        match &self.inside {
            None => self.let_in(client),
            // One who waited and left is no hindrance.
            Some(inside) if is_gone(inside) && self.next.as_ref().is_none_or(is_gone) => self.next = Some(client),
            Some(_) => refuse(&client),
        }
    }

    fn let_in(&mut self, client: OwnedFd) {
        let client = Arc::new(client);
        self.inside = Some(Arc::clone(&client));
        // A server that is gone has said so, and nobody is served any more.
        let _gone = self.visitors.send(Ok(client));
        ring(&self.arrived);
    }
}

fn ring(fd: &OwnedFd) {
    // The only failure is a full counter, which wakes as well.
    let _full = rustix::io::write(fd, &1_u64.to_ne_bytes());
}

/// Whether the other end of a connection is closed, or ours was shut.
fn is_gone(client: &OwnedFd) -> bool {
    let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    let mut fds = [PollFd::new(client, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&now)).is_ok() && fds.iter().any(|fd| fd.revents().intersects(gone))
}

/// Answers what one who comes too early has sent with `EBUSY`; its connection ends with that.
fn refuse(client: &OwnedFd) {
    let mut input = Input::new();
    // What it sent is there: clients send a message as a whole.
    let received = input.receive(client.as_fd(), false);
    let header = match input.next_message() {
        Some(Incoming::Message { header, .. } | Incoming::TooLong(header) | Incoming::Broken(header)) => header,
        None => {
            tracing::warn!(?received, "a second client was sent away: the device is in use");
            return;
        }
    };
    if header.is_command() && !header.no_reply() {
        match Output::default().send(client.as_fd(), &header.refusal(Errno::BUSY), [&[], &[]]) {
            Ok(()) => tracing::warn!("a second client was told that the device is in use"),
            Err(error) => tracing::info!(%error, "a second client left before it was told that the device is in use"),
        }
    }
}
