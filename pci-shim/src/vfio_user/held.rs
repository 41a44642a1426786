//! Replies that wait for stores: a command's answer must not reach the client before what it promises about guest memory holds.
//!
//! The client reads a register while two `DMA_WRITE`s that the device asked for earlier are on their way: its reply is held until both are
//! answered. After `DEVICE_RESET` and `DMA_UNMAP` every `DMA_WRITE` of before is awaited, because it could land later. Commands that come
//! meanwhile wait in order.
//!
//! A client may be unable to make an access while it waits for a reply: QEMU 11.1.3 holds a lock across both (`hw/vfio-user/proxy.c`). Then
//! the wait ends after [`Options::flush_limit`]; a register read is answered ahead of the stores, and from then on without a wait, and a reset
//! or unmap with `ETIMEDOUT`, because what was sent before may still land. Guests whose memory is shared never meet this.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use farbus_transport::Nanos;
use rustix::io::Errno;

use super::served::Served;
use super::session::Session;
use super::wire::Header;

/// Commands that wait behind a held reply, above which nothing more is read from the client.
const MAX_DEFERRED: usize = 1024;
/// Bytes of those.
const MAX_DEFERRED_BYTES: usize = 4 << 20;

/// What a reply waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Until {
    /// Every store up to this number is answered, or overdue.
    Stored(u64),
    /// No store that was sent is without its answer, however old.
    Quiet,
    /// The same for stores that touch one of these ranges: first byte and bytes.
    QuietIn(Vec<(u64, u64)>),
}

/// Whether the client makes accesses while it waits for a reply of ours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Serves {
    #[default]
    Unknown,
    Yes,
    No,
}

struct Held {
    header: Header,
    reply: Vec<u8>,
    until: Until,
    /// What the client is told if the wait ends without what it waited for; `None` for the reply all the same.
    otherwise: Option<Errno>,
    deadline: Nanos,
}

/// A command that came while a reply was held.
struct Deferred {
    header: Header,
    body: Vec<u8>,
    fds: Vec<OwnedFd>,
    excess_fds: bool,
}

/// The held reply of one client, and what waits behind it.
#[derive(Default)]
pub(super) struct Waiting {
    held: Option<Held>,
    deferred: VecDeque<Deferred>,
    deferred_bytes: usize,
    serves: Serves,
}

impl Waiting {
    /// When the held reply goes out at the latest.
    pub(super) fn deadline(&self) -> Option<Nanos> {
        self.held.as_ref().map(|held| held.deadline)
    }

    /// Whether no more commands may be taken now.
    pub(super) fn is_full(&self) -> bool {
        self.deferred.len() >= MAX_DEFERRED || self.deferred_bytes >= MAX_DEFERRED_BYTES
    }

    /// Whether a reply is held, so that commands wait.
    pub(super) fn is_held(&self) -> bool {
        self.held.is_some()
    }

    pub(super) fn defer(&mut self, header: &Header, body: &[u8], fds: Vec<OwnedFd>, excess_fds: bool) {
        self.deferred_bytes += body.len();
        self.deferred.push_back(Deferred { header: *header, body: body.to_vec(), fds, excess_fds });
    }
}

impl<D: Served> Session<'_, D> {
    /// Keeps a reply, whose body is in `self.reply`, until what it waits for has come. False where it is not worth the wait.
    pub(super) fn hold(&mut self, header: &Header, until: Until, otherwise: Option<Errno>) -> bool {
        let limit = match self.waiting.serves {
            Serves::Yes => self.options.dma_deadline,
            // What a guest's CPU waits for is not worth a wait that is known to be in vain.
            Serves::No if otherwise.is_none() => return false,
            Serves::Unknown | Serves::No => self.options.flush_limit,
        };
        let (reply, deadline) = (self.reply.clone(), Nanos::now() + limit);
        self.waiting.held = Some(Held { header: *header, reply, until, otherwise, deadline });
        true
    }

    /// The client answered an access. While a reply is held it waits for that, so it makes accesses while it waits.
    pub(super) fn client_serves(&mut self) {
        if let Some(held) = &mut self.waiting.held {
            self.waiting.serves = Serves::Yes;
            held.deadline = Nanos::now() + self.options.dma_deadline;
        }
    }

    /// Sends the held reply if it may go, and does what waited behind it.
    pub(super) fn release(&mut self) {
        while self.end.is_none()
            && let Some(held) = &self.waiting.held
        {
            let ended = self.mediator.has_ended(&held.until);
            if !ended && Nanos::now() < held.deadline {
                return;
            }
            let Some(Held { header, reply, otherwise, .. }) = self.waiting.held.take() else { return };
            if !ended {
                self.give_up(otherwise.is_some());
            }
            self.reply = reply;
            match otherwise.filter(|_| !ended) {
                Some(errno) => self.refuse(&header, errno),
                None => self.acknowledge(&header),
            }
            while self.end.is_none()
                && !self.waiting.is_held()
                && let Some(Deferred { header, body, fds, excess_fds }) = self.waiting.deferred.pop_front()
            {
                self.waiting.deferred_bytes -= body.len();
                self.command(&header, &body, fds, excess_fds, true);
                self.settle();
            }
        }
    }

    /// A wait was in vain.
    fn give_up(&mut self, is_promise: bool) {
        if self.waiting.serves == Serves::Unknown {
            self.waiting.serves = Serves::No;
            tracing::warn!(
                "the client makes no access for the device while it waits for a reply: what goes by message may be late for a register \
                 read; start the virtual machine with share=on (QEMU: -object memory-backend-memfd,share=on)"
            );
        }
        if is_promise {
            tracing::error!("the client left stores of the device unanswered over a reset or unmap: they may still land");
        }
    }
}
