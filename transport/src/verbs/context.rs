//! An open device and its protection domains: what everything else of libibverbs is made from, and outlives.
//!
//! `Context::open(library, "rxe0")` opens the device of that name; the last of what was made from it closes it. Its errors name the device.

use std::ffi::{CStr, c_int};
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::error::VerbsError;
use super::library::Library;
use super::objects::{checked, report_leak, zeroed};
use super::sys::{
    ibv_async_event, ibv_context, ibv_context_ops, ibv_device_attr, ibv_event_type, ibv_gid_entry, ibv_mw, ibv_mw_type, ibv_pd,
    ibv_port_attr,
};

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
    pub(super) library: &'static Library,
    pub(super) raw: NonNull<ibv_context>,
    name: String,
    /// How often the device would not give memory back.
    kept_memory: AtomicU64,
}

// SAFETY: libibverbs is thread-safe (its manual, "thread safety" in every provider of rdma-core); we add no shared state.
unsafe impl Send for Context {}
// SAFETY: as for Send.
unsafe impl Sync for Context {}

impl Context {
    /// The device goes on having memory that it was to give back.
    pub(super) fn note_kept_memory(&self) {
        self.kept_memory.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn kept_memory(&self) -> u64 {
        self.kept_memory.load(Ordering::Relaxed)
    }

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
            Some(Ok(raw)) => Ok(Some(Arc::new(Self { library, raw, name: name.to_owned(), kept_memory: AtomicU64::new(0) }))),
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
    pub(super) fn operations(&self) -> ibv_context_ops {
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
    pub(super) context: Arc<Context>,
    pub(super) raw: NonNull<ibv_pd>,
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
