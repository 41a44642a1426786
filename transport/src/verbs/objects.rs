//! The objects of libibverbs as values that free themselves, each holding what it was made from, so that they go in the only order that works.
//!
//! A `MemoryRegion` holds its `Memory` and its `ProtectionDomain`, which holds its `Context`: the pages stay mapped as long as the device may write
//! them, and the device stays open as long as anything of it is left.

use std::ffi::{CStr, c_int};
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;

use super::chain::{Receives, Sends};
use super::error::VerbsError;
use super::library::Library;
use super::sys::{
    IBV_QPT_RC, ibv_access_flags, ibv_async_event, ibv_comp_channel, ibv_context, ibv_context_ops, ibv_cq, ibv_device_attr,
    ibv_event_type, ibv_gid_entry, ibv_mr, ibv_mw, ibv_mw_type, ibv_pd, ibv_port_attr, ibv_qp, ibv_qp_attr, ibv_qp_cap,
    ibv_qp_init_attr, ibv_wc,
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

/// Names of the devices of this host.
pub(super) fn device_names(library: &Library) -> Vec<String> {
    let mut names = Vec::new();
    each_device(library, |name, _| names.push(name));
    names
}

fn each_device(library: &Library, mut visit: impl FnMut(String, *mut super::sys::ibv_device)) {
    let mut count: c_int = 0;
    // SAFETY: `count` is written; NULL means that there is no list.
    let list = unsafe { (library.get_device_list)(&raw mut count) };
    if list.is_null() {
        return;
    }
    for index in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: ibv_get_device_list(3): the list has `count` entries, valid until it is freed below.
        let device = unsafe { *list.wrapping_add(index) };
        // SAFETY: a device of a list that is not freed yet.
        let name = unsafe { (library.get_device_name)(device) };
        if !name.is_null() {
            // SAFETY: NUL-terminated, and valid as long as the list.
            visit(unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned(), device);
        }
    }
    // SAFETY: freed once; devices that were opened stay open (ibv_open_device(3)).
    unsafe { (library.free_device_list)(list) };
}

/// An open device.
pub(super) struct Context {
    library: &'static Library,
    raw: NonNull<ibv_context>,
    name: String,
}

// SAFETY: libibverbs is thread-safe (its manual, "thread safety" in every provider of rdma-core); we add no shared state.
unsafe impl Send for Context {}
// SAFETY: as for Send.
unsafe impl Sync for Context {}

impl Context {
    pub(super) fn open(library: &'static Library, name: &str) -> Result<Option<Arc<Self>>, VerbsError> {
        let mut opened = None;
        each_device(library, |found, device| {
            if found == name && opened.is_none() {
                // SAFETY: a device of a list that is not freed yet.
                let raw = unsafe { (library.open_device)(device) };
                opened = Some(NonNull::new(raw).ok_or_else(io::Error::last_os_error));
            }
        });
        match opened {
            None => Ok(None),
            Some(Ok(raw)) => Ok(Some(Arc::new(Self { library, raw, name: name.to_owned() }))),
            Some(Err(source)) => Err(VerbsError::Device { device: name.to_owned(), what: "be opened", source }),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// For `map_err`: what the device refused.
    pub(super) fn refused(&self, what: &'static str) -> impl FnOnce(io::Error) -> VerbsError + use<> {
        let device = self.name.clone();
        move |source| VerbsError::Device { device, what, source }
    }

    pub(super) fn query(&self) -> Result<ibv_device_attr, VerbsError> {
        let mut attributes = zeroed!(ibv_device_attr);
        // SAFETY: an open context; `attributes` is written.
        let errno = unsafe { (self.library.query_device)(self.raw.as_ptr(), &raw mut attributes) };
        checked(errno).map_err(self.refused("tell its limits"))?;
        Ok(attributes)
    }

    pub(super) fn query_port(&self, port: u8) -> Result<ibv_port_attr, VerbsError> {
        let mut attributes = zeroed!(ibv_port_attr);
        // SAFETY: an open context; the exported function fills the first part of the struct, up to `link_layer`, and the rest stays zero.
        let errno = unsafe { (self.library.query_port)(self.raw.as_ptr(), port, &raw mut attributes) };
        checked(errno).map_err(self.refused("tell the state of its port"))?;
        Ok(attributes)
    }

    /// The provider's own functions.
    fn operations(&self) -> ibv_context_ops {
        // SAFETY: an open context, whose provider filled its operations when it was opened and leaves them.
        unsafe { self.raw.as_ref() }.ops
    }

    /// The addresses of all ports.
    pub(super) fn gids(&self) -> Result<Vec<ibv_gid_entry>, VerbsError> {
        const MOST: usize = 512;
        let mut entries = vec![zeroed!(ibv_gid_entry); MOST];
        let size = size_of::<ibv_gid_entry>();
        // SAFETY: an open context and room for MOST entries of the size that is passed along.
        let count = unsafe { (self.library.query_gid_table)(self.raw.as_ptr(), entries.as_mut_ptr(), MOST, 0, size) };
        match usize::try_from(count) {
            Ok(count) => {
                entries.truncate(count);
                Ok(entries)
            }
            Err(_) => Err(self.refused("tell its addresses")(io::Error::from_raw_os_error(count.unsigned_abs() as i32))),
        }
    }

    fn async_fd_raw(&self) -> RawFd {
        // SAFETY: an open context, whose descriptor stays the same until it is closed.
        unsafe { self.raw.as_ref() }.async_fd
    }

    /// Readable when the device has an event of its own.
    pub(super) fn async_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: open as long as the context, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.async_fd_raw()) }
    }

    /// The next asynchronous event of the device, acknowledged; `None` where there is none (the descriptor is non-blocking).
    pub(super) fn next_async_event(&self) -> Option<ibv_event_type> {
        let mut event = zeroed!(ibv_async_event);
        // SAFETY: an open context; `event` is written where 0 is returned.
        if unsafe { (self.library.get_async_event)(self.raw.as_ptr(), &raw mut event) } != 0 {
            return None;
        }
        let kind = event.event_type;
        // SAFETY: an event that was just taken, acknowledged once.
        unsafe { (self.library.ack_async_event)(&raw mut event) };
        Some(kind)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: everything made from the context holds an Arc of it, so this is the last use.
        let failed = unsafe { (self.library.close_device)(self.raw.as_ptr()) };
        report_leak(failed, "close a device");
    }
}

/// What ties regions and queue pairs together: a key works only on queue pairs of its own domain.
pub(super) struct ProtectionDomain {
    context: Arc<Context>,
    raw: NonNull<ibv_pd>,
}

// SAFETY: as for Context.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as for Context.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    pub(super) fn new(context: &Arc<Context>) -> Result<Arc<Self>, VerbsError> {
        // SAFETY: an open context.
        let raw = unsafe { (context.library.alloc_pd)(context.raw.as_ptr()) };
        let raw = NonNull::new(raw).ok_or_else(io::Error::last_os_error).map_err(context.refused("make a protection domain"))?;
        Ok(Arc::new(Self { context: Arc::clone(context), raw }))
    }
}

impl ProtectionDomain {
    /// A memory window, to be given back by [`ProtectionDomain::free_window`].
    pub(super) fn alloc_window(&self, kind: ibv_mw_type) -> Result<NonNull<ibv_mw>, VerbsError> {
        let refused = self.context.refused("make a memory window");
        let Some(alloc_mw) = self.context.operations().alloc_mw else {
            return Err(refused(io::ErrorKind::Unsupported.into()));
        };
        // SAFETY: a live domain.
        let raw = unsafe { alloc_mw(self.raw.as_ptr(), kind) };
        NonNull::new(raw).ok_or_else(io::Error::last_os_error).map_err(refused)
    }

    /// Frees a window of this domain; an errno.
    pub(super) fn free_window(&self, window: NonNull<ibv_mw>) -> c_int {
        let Some(dealloc_mw) = self.context.operations().dealloc_mw else { return libc::ENOSYS };
        // SAFETY: made by alloc_window of this domain, whose owner (windows.rs) frees it once.
        unsafe { dealloc_mw(window.as_ptr()) }
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: regions and queue pairs of the domain hold an Arc of it, so this is the last use.
        let failed = unsafe { (self.context.library.dealloc_pd)(self.raw.as_ptr()) };
        report_leak(failed, "free a protection domain");
    }
}

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
fn checked(errno: c_int) -> io::Result<()> {
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
