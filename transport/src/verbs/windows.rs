//! Type-2 memory windows (InfiniBand Architecture Specification 1.4, volume 1, section 10.6.7): a key for a part of a region that is made and unmade by
//! work requests, in order with all others, where a region of its own costs a walk over its pages.
//!
//! A grant of 64 KiB of a 2 GiB region is one bind request; revoking it is one invalidate. rxe binds windows and does not hold anybody to their
//! bounds, so a device is asked once, by a write of 8 bytes behind a window's end that must fail, before its windows are used.

use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::chain::{BATCH, Bytes, Sends, What};
use super::context::ProtectionDomain;
use super::device::OpenPort;
use super::error::VerbsError;
use super::establish::{self, connected_pair};
use super::objects::{CompletionQueue, MemoryRegion, no_completion, report_leak};
use super::sys::{
    IBV_ACCESS_LOCAL_WRITE, IBV_ACCESS_MW_BIND, IBV_DEVICE_MEM_WINDOW_TYPE_2B, IBV_MW_TYPE_2, IBV_WC_SUCCESS, ibv_access_flags,
    ibv_mw, ibv_mw_bind_info, ibv_send_wr__bindgen_ty_4__bindgen_ty_1,
};
use crate::memory::Memory;

/// How grants are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GrantMethod {
    /// By windows where the device has them and holds its peers to their bounds, by regions elsewhere.
    #[default]
    Probe,
    /// Each grant is a memory region of its own.
    Regions,
    /// Each grant is a type-2 memory window, whether or not its bounds are enforced: for tests.
    Windows,
}

/// A window, bound or not.
pub(super) struct MemoryWindow {
    domain: Arc<ProtectionDomain>,
    raw: NonNull<ibv_mw>,
    key: u32,
}

// SAFETY: as for the other objects of libibverbs (objects.rs).
unsafe impl Send for MemoryWindow {}

/// A window to be bound; lives no longer than the chain it is pushed to.
#[derive(Clone, Copy)]
pub(super) struct Bind(ibv_send_wr__bindgen_ty_4__bindgen_ty_1);

impl Bind {
    pub(super) fn parts(self) -> ibv_send_wr__bindgen_ty_4__bindgen_ty_1 {
        self.0
    }
}

impl MemoryWindow {
    pub(super) fn new(domain: &Arc<ProtectionDomain>) -> Result<Self, VerbsError> {
        let raw = domain.alloc_window(IBV_MW_TYPE_2)?;
        // SAFETY: just made.
        let key = unsafe { raw.as_ref() }.rkey;
        Ok(Self { domain: Arc::clone(domain), raw, key })
    }

    /// The key under which the peer reaches the window, once it is bound.
    pub(super) fn key(&self) -> u32 {
        self.key
    }

    /// A request that opens `len` bytes of `region` from `offset`. The key is a new one: its last byte is the owner's to choose
    /// (section 10.6.7.2.2), so that an earlier binding's key is dead.
    pub(super) fn bind(&mut self, region: &MemoryRegion, offset: u64, len: u64, access: ibv_access_flags) -> What {
        let old = self.key;
        self.key = (old & 0xffff_ff00) | (old.wrapping_add(1) & 0xff);
        let info = ibv_mw_bind_info { mr: region.raw(), addr: region.address() + offset, length: len, mw_access_flags: access };
        What::Bind(Bind(ibv_send_wr__bindgen_ty_4__bindgen_ty_1 { mw: self.raw.as_ptr(), rkey: self.key, bind_info: info }))
    }

    /// To be called when a bind was handed over: the provider takes the next binding's old key from here.
    pub(super) fn bound(&mut self) {
        // SAFETY: made by alloc_window and not freed before self is dropped; nobody else looks at it.
        unsafe { self.raw.as_mut() }.rkey = self.key;
    }
}

impl Drop for MemoryWindow {
    fn drop(&mut self) {
        report_leak(self.domain.free_window(self.raw), "free a memory window");
    }
}

/// Whether grants over this device are to be windows.
pub(super) fn are_to_be_used(method: GrantMethod, port: &OpenPort) -> Result<bool, VerbsError> {
    /// Asked once for each device of this process; of more devices than this, each time.
    static KNOWN: [OnceLock<(String, bool)>; 8] = [const { OnceLock::new() }; 8];
    match method {
        GrantMethod::Regions => return Ok(false),
        GrantMethod::Windows => return Ok(true),
        GrantMethod::Probe if port.limits.device_cap_flags & IBV_DEVICE_MEM_WINDOW_TYPE_2B == 0 => return Ok(false),
        GrantMethod::Probe => {}
    }
    let known = || KNOWN.iter().filter_map(OnceLock::get).find(|(name, _)| name == port.context.name());
    if let Some((_, enforced)) = known() {
        return Ok(*enforced);
    }
    let enforced = bounds_are_enforced(port).unwrap_or_else(|error| {
        tracing::warn!(%error, device = port.context.name(), "whether it enforces memory windows cannot be known");
        false
    });
    tracing::info!(
        device = port.context.name(),
        enforced,
        "memory windows: {}",
        if enforced {
            "each grant is one"
        } else {
            "the device does not enforce their bounds, so each grant is a region of its own"
        }
    );
    let mut answer = (port.context.name().to_owned(), enforced);
    for place in &KNOWN {
        match place.set(answer) {
            Ok(()) => break,
            Err(taken) => answer = taken,
        }
    }
    Ok(enforced)
}

/// Writes 8 bytes behind the end of a window, inside its region, over a pair of queue pairs that are connected to each other.
fn bounds_are_enforced(port: &OpenPort) -> Result<bool, VerbsError> {
    const WINDOW: u64 = 4096;
    let domain = ProtectionDomain::new(&port.context)?;
    let completions = CompletionQueue::new(&port.context, 2 * BATCH as u32)?;
    let memory = Memory::memfd("farbus-window-probe", 2 * WINDOW)?;
    let region = MemoryRegion::new(&domain, &memory, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_MW_BIND)?;
    let (mut owner, mut peer) = connected_pair(port, &domain, &completions)?;
    // Declared after the pair, so freed before it: a queue pair with a bound window is slow to go.
    let mut window = MemoryWindow::new(&domain)?;
    let mut sends = Sends::new();
    let refused = |what| port.context.refused(what);

    sends.push(1, true, window.bind(&region, 0, WINDOW, super::sys::IBV_ACCESS_REMOTE_WRITE), Bytes::Copied(&[]));
    owner.post(&mut sends).map_err(refused("bind a memory window"))?;
    if completion(&completions)? != IBV_WC_SUCCESS {
        return Ok(false);
    }
    window.bound();
    let write = |at: u64| What::Write { address: region.address() + at, key: window.key() };
    // The control: inside it must work, or a failure outside would prove nothing.
    for (at, works) in [(0, true), (WINDOW, false)] {
        sends.push(2, true, write(at), Bytes::Copied(&[7; 8]));
        peer.post(&mut sends).map_err(refused("write through a memory window"))?;
        if (completion(&completions)? == IBV_WC_SUCCESS) != works {
            return Ok(false);
        }
    }
    Ok(true)
}

fn completion(completions: &CompletionQueue) -> Result<u32, VerbsError> {
    let deadline = Instant::now() + establish::PEER_LIMIT;
    let mut found = [no_completion()];
    while Instant::now() < deadline {
        if completions.poll(&mut found).is_ok_and(|count| count > 0) {
            return Ok(found[0].status);
        }
        std::thread::sleep(Duration::from_micros(20));
    }
    let source = std::io::ErrorKind::TimedOut.into();
    Err(VerbsError::Device { device: "under test".to_owned(), what: "complete a request of a probe", source })
}
