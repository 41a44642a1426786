//! The objects of libibverbs as values that free themselves, each holding what it was made from, so that they go in the only order that works.
//!
//! A `MemoryRegion` holds its `Memory` and its `ProtectionDomain`, which holds its `Context`: the pages stay mapped as long as the device may write
//! them, and the device stays open as long as anything of it is left.

use std::ffi::c_int;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use super::chain::{Receives, Sends};
use super::context::{Context, ProtectionDomain};
use super::error::VerbsError;
use super::sys::{
    IBV_QPT_RC, ibv_access_flags, ibv_comp_channel, ibv_cq, ibv_mr, ibv_qp, ibv_qp_attr, ibv_qp_cap, ibv_qp_init_attr, ibv_wc,
};
use crate::memory::{Memory, MemoryError};

/// An all-zero value of a plain C struct.
macro_rules! zeroed {
    ($plain:ty) => {
        // SAFETY: a struct of sys.rs made of integers, raw pointers, optional function pointers and unions of those: all zero bytes are valid.
        unsafe { std::mem::zeroed::<$plain>() }
    };
}
pub(super) use zeroed;

/// Memory that the device may use.
pub(super) struct MemoryRegion {
    domain: Arc<ProtectionDomain>,
    raw: NonNull<ibv_mr>,
    memory: Arc<Memory>,
    lkey: u32,
    rkey: u32,
}

// SAFETY: as for Context.
unsafe impl Send for MemoryRegion {}

impl MemoryRegion {
    pub(super) fn new(domain: &Arc<ProtectionDomain>, memory: &Arc<Memory>, access: ibv_access_flags) -> Result<Self, MemoryError> {
        let library = domain.context.library;
        let len = memory.len() as usize;
        // SAFETY: the memory is mapped for `len` bytes as long as `memory` lives, which the result holds until after deregistration.
        let raw = unsafe { (library.reg_mr)(domain.raw.as_ptr(), memory.base().as_ptr().cast(), len, access as c_int) };
        let Some(raw) = NonNull::new(raw) else {
            let source = io::Error::last_os_error();
            if let (Some(libc::ENOMEM), Some(limit)) = (source.raw_os_error(), lock_limit()) {
                return Err(MemoryError::LockLimit { asked: memory.len(), limit });
            }
            return Err(MemoryError::Host { what: "register memory with the RDMA device", source });
        };
        // SAFETY: just made, and not freed before the result is dropped.
        let keys = unsafe { raw.as_ref() };
        let (lkey, rkey) = (keys.lkey, keys.rkey);
        Ok(Self { domain: Arc::clone(domain), raw, memory: Arc::clone(memory), lkey, rkey })
    }

    pub(super) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    pub(super) fn lkey(&self) -> u32 {
        self.lkey
    }

    /// For binding windows to it.
    pub(super) fn raw(&self) -> *mut ibv_mr {
        self.raw.as_ptr()
    }

    /// What the peer needs to reach the region.
    pub(super) fn rkey(&self) -> u32 {
        self.rkey
    }

    /// The address of the region's first byte, as the device knows it.
    pub(super) fn address(&self) -> u64 {
        self.memory.base().as_ptr().addr() as u64
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        // SAFETY: made by reg_mr and freed once; when this returns the device does not touch the memory any more (ibv_dereg_mr(3)).
        let failed = unsafe { (self.domain.context.library.dereg_mr)(self.raw.as_ptr()) };
        if failed != 0 {
            self.domain.context.note_kept_memory();
        }
        report_leak(failed, "deregister memory");
    }
}

/// Where finished work requests are reported, with the channel that wakes a sleeper.
pub(super) struct CompletionQueue {
    context: Arc<Context>,
    channel: NonNull<ibv_comp_channel>,
    raw: NonNull<ibv_cq>,
    poll_cq: unsafe extern "C" fn(*mut ibv_cq, c_int, *mut ibv_wc) -> c_int,
    req_notify_cq: unsafe extern "C" fn(*mut ibv_cq, c_int) -> c_int,
}

// SAFETY: as for Context; one thread at a time owns the queue.
unsafe impl Send for CompletionQueue {}
// SAFETY: as for Context: polling and arming lock inside the provider.
unsafe impl Sync for CompletionQueue {}

impl CompletionQueue {
    /// A queue with room for `entries` completions.
    pub(super) fn new(context: &Arc<Context>, entries: u32) -> Result<Arc<Self>, VerbsError> {
        let library = context.library;
        // SAFETY: an open context.
        let channel = unsafe { (library.create_comp_channel)(context.raw.as_ptr()) };
        let channel =
            NonNull::new(channel).ok_or_else(io::Error::last_os_error).map_err(context.refused("make a completion channel"))?;
        let entries = c_int::try_from(entries).unwrap_or(c_int::MAX);
        // SAFETY: context and channel live; no user pointer; vector 0 exists on every device.
        let raw = unsafe { (library.create_cq)(context.raw.as_ptr(), entries, std::ptr::null_mut(), channel.as_ptr(), 0) };
        let operations = context.operations();
        let (Some(raw), Some(poll_cq), Some(req_notify_cq)) = (NonNull::new(raw), operations.poll_cq, operations.req_notify_cq)
        else {
            let source = io::Error::last_os_error();
            // SAFETY: the channel was made above and nothing uses it.
            report_leak(unsafe { (library.destroy_comp_channel)(channel.as_ptr()) }, "destroy a completion channel");
            return Err(context.refused("make a completion queue")(source));
        };
        let queue = Self { context: Arc::clone(context), channel, raw, poll_cq, req_notify_cq };
        rustix::io::ioctl_fionbio(queue.fd(), true)
            .map_err(|errno| context.refused("make its channel non-blocking")(errno.into()))?;
        Ok(Arc::new(queue))
    }

    /// Moves finished work requests into `into`; how many there were. Enters the kernel on no device that rdma-core supports.
    #[inline]
    pub(super) fn poll(&self, into: &mut [ibv_wc]) -> io::Result<usize> {
        let room = c_int::try_from(into.len()).unwrap_or(c_int::MAX);
        // SAFETY: a live queue, and room for as many entries as are asked for.
        let count = unsafe { (self.poll_cq)(self.raw.as_ptr(), room, into.as_mut_ptr()) };
        usize::try_from(count).map_err(|_| io::Error::other("the completion queue overran"))
    }

    /// Makes the next completion put an event into the channel.
    pub(super) fn request_notification(&self) -> io::Result<()> {
        // SAFETY: a live queue.
        checked(unsafe { (self.req_notify_cq)(self.raw.as_ptr(), 0) })
    }

    /// Readable when a notification that was asked for has come.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: a live channel.
        let fd = unsafe { self.channel.as_ref() }.fd;
        // SAFETY: open as long as the channel, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    /// Takes what has come into the channel, so that it is readable no more.
    pub(super) fn take_notifications(&self) {
        loop {
            let (mut queue, mut user) = (std::ptr::null_mut(), std::ptr::null_mut());
            // SAFETY: a live, non-blocking channel; both are written where 0 is returned.
            if unsafe { (self.context.library.get_cq_event)(self.channel.as_ptr(), &raw mut queue, &raw mut user) } != 0 {
                return;
            }
            // SAFETY: the one queue of this channel, acknowledged once for the event taken.
            unsafe { (self.context.library.ack_cq_events)(queue, 1) };
        }
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: queue pairs hold an Arc of their completion queue, and all events were acknowledged as they were taken.
        report_leak(unsafe { (self.context.library.destroy_cq)(self.raw.as_ptr()) }, "destroy a completion queue");
        // SAFETY: its one queue was just destroyed.
        report_leak(unsafe { (self.context.library.destroy_comp_channel)(self.channel.as_ptr()) }, "destroy a completion channel");
    }
}

/// A reliable-connected queue pair.
pub(super) struct QueuePair {
    /// Held, because a queue pair must go before its domain.
    domain: Arc<ProtectionDomain>,
    /// Held, because a queue pair must go before its completion queue.
    _completions: Arc<CompletionQueue>,
    raw: NonNull<ibv_qp>,
    number: u32,
    capacity: ibv_qp_cap,
    post_send: PostSend,
    post_recv: PostReceive,
}

type PostSend = unsafe extern "C" fn(*mut ibv_qp, *mut super::sys::ibv_send_wr, *mut *mut super::sys::ibv_send_wr) -> c_int;
type PostReceive = unsafe extern "C" fn(*mut ibv_qp, *mut super::sys::ibv_recv_wr, *mut *mut super::sys::ibv_recv_wr) -> c_int;

// SAFETY: as for Context; one thread at a time owns the pair.
unsafe impl Send for QueuePair {}

impl QueuePair {
    /// A pair that reports to `completions`, with at least the capacity asked for.
    pub(super) fn new(
        domain: &Arc<ProtectionDomain>,
        completions: &Arc<CompletionQueue>,
        wanted: ibv_qp_cap,
    ) -> Result<Self, VerbsError> {
        let context = &domain.context;
        let mut attributes = zeroed!(ibv_qp_init_attr);
        attributes.send_cq = completions.raw.as_ptr();
        attributes.recv_cq = completions.raw.as_ptr();
        attributes.cap = wanted;
        attributes.qp_type = IBV_QPT_RC;
        // SAFETY: the domain and both queues live and are of one context; the capacity is written back.
        let raw = unsafe { (context.library.create_qp)(domain.raw.as_ptr(), &raw mut attributes) };
        let raw = NonNull::new(raw).ok_or_else(io::Error::last_os_error).map_err(context.refused("make a queue pair"))?;
        let operations = context.operations();
        let (Some(post_send), Some(post_recv)) = (operations.post_send, operations.post_recv) else {
            // SAFETY: just made and used by nothing.
            report_leak(unsafe { (context.library.destroy_qp)(raw.as_ptr()) }, "destroy a queue pair");
            return Err(context.refused("post work requests")(io::ErrorKind::Unsupported.into()));
        };
        // SAFETY: just made.
        let number = unsafe { raw.as_ref() }.qp_num;
        let completions = Arc::clone(completions);
        let domain = Arc::clone(domain);
        Ok(Self { domain, _completions: completions, raw, number, capacity: attributes.cap, post_send, post_recv })
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    /// Bytes that may travel inside a work request.
    pub(super) fn max_inline(&self) -> u32 {
        self.capacity.max_inline_data
    }

    pub(super) fn modify(&self, attributes: &mut ibv_qp_attr, mask: u32, what: &'static str) -> Result<(), VerbsError> {
        let context = &self.domain.context;
        // SAFETY: a live pair; the attributes are read.
        let errno = unsafe { (context.library.modify_qp)(self.raw.as_ptr(), attributes, mask as c_int) };
        checked(errno).map_err(context.refused(what))
    }

    /// Hands a chain of work requests to the device: one doorbell.
    #[inline]
    pub(super) fn post(&mut self, sends: &mut Sends) -> io::Result<()> {
        let Some(first) = sends.link() else { return Ok(()) };
        let mut refused = std::ptr::null_mut();
        // SAFETY: a live pair; `link` made a chain that ends with NULL, whose gather lists name registered memory or, where inline, bytes that
        // were checked to be mapped and stay so until this call has copied them (chain.rs).
        checked(unsafe { (self.post_send)(self.raw.as_ptr(), first, &raw mut refused) })
    }

    /// Hands receive buffers to the device.
    #[inline]
    pub(super) fn post_receives(&mut self, receives: &mut Receives) -> io::Result<()> {
        let Some(first) = receives.link() else { return Ok(()) };
        let mut refused = std::ptr::null_mut();
        // SAFETY: a live pair; `link` made a chain that ends with NULL over slots of one registered memory (chain.rs).
        checked(unsafe { (self.post_recv)(self.raw.as_ptr(), first, &raw mut refused) })
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: made by create_qp and freed once; when this returns nothing of the pair is under way (ibv_destroy_qp(3)).
        let failed = unsafe { (self.domain.context.library.destroy_qp)(self.raw.as_ptr()) };
        report_leak(failed, "destroy a queue pair");
    }
}

/// Bytes that this process may lock; `None` without a limit.
fn lock_limit() -> Option<u64> {
    rustix::process::getrlimit(rustix::process::Resource::Memlock).current
}

/// A function of libibverbs that returns an errno, or -1 with errno set.
pub(super) fn checked(errno: c_int) -> io::Result<()> {
    match errno {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        errno => Err(io::Error::from_raw_os_error(errno.abs())),
    }
}

pub(super) fn report_leak(failed: c_int, what: &'static str) {
    if let Err(error) = checked(failed) {
        tracing::error!(%error, "could not {what}: it leaks");
    }
}

/// A completion to be overwritten.
pub(super) fn no_completion() -> ibv_wc {
    zeroed!(ibv_wc)
}

/// The word that came with a notification.
#[inline]
pub(super) fn immediate(completion: &ibv_wc) -> u32 {
    // SAFETY: both members of the union are 32-bit integers.
    u32::from_be(unsafe { completion.__bindgen_anon_1.imm_data })
}
