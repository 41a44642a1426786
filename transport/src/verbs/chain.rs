//! Chains of work requests: filled one by one without allocating, linked once, handed to the device with one doorbell.
//!
//! Three posts make three entries of one array; `flush` writes the two `next` pointers between them and passes the first to the device. Bytes that travel
//! inside a request are copied into the chain when it is posted, so that their source is free at once.

use super::objects::{MemoryRegion, zeroed};
use super::sys::{
    IBV_SEND_INLINE, IBV_SEND_SIGNALED, IBV_WR_BIND_MW, IBV_WR_LOCAL_INV, IBV_WR_RDMA_READ, IBV_WR_RDMA_WRITE,
    IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WR_SEND, ibv_recv_wr, ibv_send_wr, ibv_sge,
};
use super::windows::Bind;
use super::wire::{SLOT_BYTES, SLOTS};
use crate::memory::Memory;

/// Work requests in one chain at most; a full chain is handed over at once.
pub(super) const BATCH: usize = 64;

/// Bytes that one request of ours carries inside itself at most, however many the device would take: more is cheaper to fetch than to copy.
pub(super) const MAX_INLINE: usize = 256;

/// What a request does, and to which bytes of the peer.
#[derive(Clone, Copy)]
pub(super) enum What {
    Send,
    Write {
        address: u64,
        key: u32,
    },
    WriteNotify {
        address: u64,
        key: u32,
        notify: u32,
    },
    Read {
        address: u64,
        key: u32,
    },
    /// Opens a memory window.
    Bind(Bind),
    /// Ends the use of a key.
    Invalidate {
        key: u32,
    },
}

/// This side's bytes of a request.
#[derive(Clone, Copy)]
pub(super) enum Bytes<'a> {
    /// Copied into the request.
    Copied(&'a [u8]),
    /// Copied into the request out of memory.
    CopiedFrom { memory: &'a Memory, offset: u64, len: u32 },
    /// Fetched, or filled, by the device.
    Registered { region: &'a MemoryRegion, offset: u64, len: u32 },
}

/// Work requests for the send queue.
pub(super) struct Sends {
    requests: Box<[ibv_send_wr]>,
    gathers: Box<[ibv_sge]>,
    inline: Box<[[u8; MAX_INLINE]]>,
    len: usize,
}

// SAFETY: the pointers in the entries lead into the boxes beside them, or are NULL; nothing is tied to a thread.
unsafe impl Send for Sends {}

impl Sends {
    pub(super) fn new() -> Self {
        Self {
            requests: vec![zeroed!(ibv_send_wr); BATCH].into(),
            gathers: vec![zeroed!(ibv_sge); BATCH].into(),
            inline: vec![[0; MAX_INLINE]; BATCH].into(),
            len: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_full(&self) -> bool {
        self.len >= BATCH
    }

    /// Adds a request named `id`. False, and nothing added, where the chain is full or copied bytes are too many or not there.
    #[inline]
    pub(super) fn push(&mut self, id: u64, signalled: bool, what: What, bytes: Bytes<'_>) -> bool {
        let (Some(request), Some(gather), Some(inline)) =
            (self.requests.get_mut(self.len), self.gathers.get_mut(self.len), self.inline.get_mut(self.len))
        else {
            return false;
        };
        let (address, len, key, inlined) = match bytes {
            Bytes::Copied(bytes) => {
                let Some(room) = inline.get_mut(..bytes.len()) else { return false };
                room.copy_from_slice(bytes);
                (inline.as_ptr().addr() as u64, bytes.len() as u32, 0, !bytes.is_empty())
            }
            Bytes::CopiedFrom { memory, offset, len } => {
                let Some(room) = inline.get_mut(..len as usize) else { return false };
                if memory.read(offset, room).is_err() {
                    return false;
                }
                (inline.as_ptr().addr() as u64, len, 0, true)
            }
            Bytes::Registered { region, offset, len } => (region.address() + offset, len, region.lkey(), false),
        };
        *gather = ibv_sge { addr: address, length: len, lkey: key };
        request.wr_id = id;
        // A gather entry of length zero means 2 GiB to some devices.
        request.num_sge = i32::from(len > 0);
        request.send_flags = if signalled { IBV_SEND_SIGNALED } else { 0 } | if inlined { IBV_SEND_INLINE } else { 0 };
        request.opcode = match what {
            What::Send => IBV_WR_SEND,
            What::Write { .. } => IBV_WR_RDMA_WRITE,
            What::WriteNotify { .. } => IBV_WR_RDMA_WRITE_WITH_IMM,
            What::Read { .. } => IBV_WR_RDMA_READ,
            What::Bind(_) => IBV_WR_BIND_MW,
            What::Invalidate { .. } => IBV_WR_LOCAL_INV,
        };
        match what {
            What::Send => {}
            What::Write { address, key } | What::WriteNotify { address, key, .. } | What::Read { address, key } => {
                request.wr.rdma.remote_addr = address;
                request.wr.rdma.rkey = key;
                if let What::WriteNotify { notify, .. } = what {
                    request.__bindgen_anon_1.imm_data = notify.to_be();
                }
            }
            What::Bind(bind) => request.__bindgen_anon_2.bind_mw = bind.parts(),
            What::Invalidate { key } => request.__bindgen_anon_1.invalidate_rkey = key,
        }
        self.len += 1;
        true
    }

    /// Makes the last request report when it is done.
    #[inline]
    pub(super) fn signal_last(&mut self) {
        if let Some(request) = self.len.checked_sub(1).and_then(|last| self.requests.get_mut(last)) {
            request.send_flags |= IBV_SEND_SIGNALED;
        }
    }

    /// Links what was pushed and starts anew: the first request of a chain that ends with NULL. Valid until the next push.
    #[inline]
    pub(super) fn link(&mut self) -> Option<*mut ibv_send_wr> {
        let count = std::mem::take(&mut self.len);
        let (requests, gathers) = (self.requests.as_mut_ptr(), self.gathers.as_mut_ptr());
        for (index, request) in self.requests.iter_mut().enumerate().take(count) {
            request.sg_list = gathers.wrapping_add(index);
            request.next = if index + 1 < count { requests.wrapping_add(index + 1) } else { std::ptr::null_mut() };
        }
        (count > 0).then_some(self.requests.as_mut_ptr())
    }
}

/// Receive buffers on their way back to the device.
pub(super) struct Receives {
    slots: MemoryRegion,
    requests: Box<[ibv_recv_wr]>,
    gathers: Box<[ibv_sge]>,
    len: usize,
}

// SAFETY: as for Sends.
unsafe impl Send for Receives {}

impl Receives {
    /// Over `slots`, a registered memory of [`SLOTS`] times [`SLOT_BYTES`].
    pub(super) fn new(slots: MemoryRegion) -> Self {
        let (requests, gathers) =
            (vec![zeroed!(ibv_recv_wr); SLOTS as usize].into(), vec![zeroed!(ibv_sge); SLOTS as usize].into());
        Self { slots, requests, gathers, len: 0 }
    }

    /// Gives a slot back to the device, with the next [`Receives::link`].
    #[inline]
    pub(super) fn push(&mut self, id: u64, slot: u32) {
        let address = self.slots.address() + u64::from(slot) * SLOT_BYTES as u64;
        if let (Some(request), Some(gather)) = (self.requests.get_mut(self.len), self.gathers.get_mut(self.len)) {
            *gather = ibv_sge { addr: address, length: SLOT_BYTES as u32, lkey: self.slots.lkey() };
            request.wr_id = id;
            request.num_sge = 1;
            self.len += 1;
        }
    }

    /// The bytes that the device put into a slot.
    #[inline]
    pub(super) fn read(&self, slot: u32) -> [u8; SLOT_BYTES] {
        let mut bytes = [0; SLOT_BYTES];
        // A slot that does not exist reads as zeros, which is no message.
        if self.slots.memory().read(u64::from(slot) * SLOT_BYTES as u64, &mut bytes).is_err() {
            return [0; SLOT_BYTES];
        }
        bytes
    }

    #[inline]
    pub(super) fn link(&mut self) -> Option<*mut ibv_recv_wr> {
        let count = std::mem::take(&mut self.len);
        let (requests, gathers) = (self.requests.as_mut_ptr(), self.gathers.as_mut_ptr());
        for (index, request) in self.requests.iter_mut().enumerate().take(count) {
            request.sg_list = gathers.wrapping_add(index);
            request.next = if index + 1 < count { requests.wrapping_add(index + 1) } else { std::ptr::null_mut() };
        }
        (count > 0).then_some(self.requests.as_mut_ptr())
    }
}
