//! A write that nobody waits for, kept until it has company: what comes next takes it along, in order, and after 50 µs it goes alone.
//!
//! A driver that has taken an NVMe completion stores 6 to its queue's head, and soon 17 to a tail: over RDMA that is one work request instead of two.
//! A second head of the same queue takes the place of the first, which says nothing that the second does not.

use std::time::Duration;

use farbus_remote_dma::{Attachment, BarAddress, Host, Width};
use farbus_transport::Nanos;

/// How long a write waits for company: a few times what a driver needs from a completion to its next command, and too short for a controller whose
/// completion queue is full to matter.
pub(super) const PATIENCE: Duration = Duration::from_micros(50);

#[derive(Clone, Copy, Debug)]
struct Write {
    at: BarAddress,
    width: Width,
    value: u64,
    /// When it was first seen to wait.
    since: Option<Nanos>,
}

/// At most one write that waits.
#[derive(Debug, Default)]
pub(super) struct Lazy(Option<Write>);

impl Lazy {
    /// Keeps a write, behind one that waits already; a later one of the same register takes the place of the earlier, and its time.
    pub(super) fn keep(&mut self, at: BarAddress, width: Width, value: u64, attachment: &mut dyn Attachment, host: &mut dyn Host) {
        match &mut self.0 {
            Some(write) if (write.at, write.width) == (at, width) => write.value = value,
            _ => {
                self.release(attachment, host);
                self.0 = Some(Write { at, width, value, since: None });
            }
        }
    }

    /// Hands over what waits, before anything else that the device could tell from it; whether there was anything. It is not flushed.
    #[inline]
    pub(super) fn release(&mut self, attachment: &mut dyn Attachment, host: &mut dyn Host) -> bool {
        let write = self.0.take();
        if let Some(Write { at, width, value, .. }) = write {
            attachment.bar_write(at, width, value, host);
        }
        write.is_some()
    }

    /// As [`Lazy::release`], of what has waited for [`PATIENCE`].
    #[inline]
    pub(super) fn release_late(&mut self, now: Nanos, attachment: &mut dyn Attachment, host: &mut dyn Host) -> bool {
        let Some(write) = &mut self.0 else { return false };
        now.since(*write.since.get_or_insert(now)) >= PATIENCE && self.release(attachment, host)
    }

    /// Whether something waits.
    pub(super) fn waits(&self) -> bool {
        self.0.is_some()
    }

    /// The device is reset: what waits would be told to another life of it.
    pub(super) fn forget(&mut self) {
        self.0 = None;
    }
}
