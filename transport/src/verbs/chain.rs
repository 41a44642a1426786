//! Chains of work requests: filled one by one without allocating, linked once, handed to the device with one doorbell.
//!
//! Three posts fill three entries of one array, which are linked from the start; `flush` ends the chain behind the third and passes the first to the
//! device. Bytes that travel inside a request are copied into the chain when it is posted, so that their source is free at once.

use super::objects::{MemoryRegion, zeroed};
use super::sys::{
    IBV_SEND_INLINE, IBV_SEND_SIGNALED, IBV_WR_BIND_MW, IBV_WR_LOCAL_INV, IBV_WR_RDMA_READ, IBV_WR_RDMA_WRITE,
    IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WR_SEND, ibv_recv_wr, ibv_send_wr, ibv_sge,
};
use super::windows::Bind;
use super::wire::{HEADER, SLOT_BYTES, SLOTS};
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
    /// Copied into the request: a slot's header and what follows it.
    Slot { header: [u8; HEADER], body: &'a [u8] },
    /// Copied into the request out of memory.
    CopiedFrom { memory: &'a Memory, offset: u64, len: u32 },
    /// Fetched, or filled, by the device.
    Registered { region: &'a MemoryRegion, offset: u64, len: u32 },
}

impl Bytes<'_> {
    /// How many the device fetches from memory or fills there.
    #[inline]
    pub(super) fn fetched_or_filled(&self) -> u32 {
        if let Self::Registered { len, .. } = self { *len } else { 0 }
    }
}

/// Work requests for the send queue.
pub(super) struct Sends {
    /// Each names its gather entry and the request behind it, but for the one that ended the last chain.
    requests: Box<[ibv_send_wr]>,
    gathers: Box<[ibv_sge]>,
    inline: Box<[[u8; MAX_INLINE]]>,
    len: usize,
    ended_at: usize,
}

// SAFETY: the pointers in the entries lead into the boxes beside them, or are NULL; nothing is tied to a thread.
unsafe impl Send for Sends {}

impl Sends {
    pub(super) fn new() -> Self {
        let mut sends = Self {
            requests: vec![zeroed!(ibv_send_wr); BATCH].into(),
            gathers: vec![zeroed!(ibv_sge); BATCH].into(),
            inline: vec![[0; MAX_INLINE]; BATCH].into(),
            len: 0,
            ended_at: BATCH - 1,
        };
        let (requests, gathers) = (sends.requests.as_mut_ptr(), sends.gathers.as_mut_ptr());
        for (index, request) in sends.requests.iter_mut().enumerate() {
            request.sg_list = gathers.wrapping_add(index);
            request.next = if index + 1 < BATCH { requests.wrapping_add(index + 1) } else { std::ptr::null_mut() };
        }
        sends
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
            Bytes::Slot { header, body } => {
                let Some((front, room)) = inline.split_first_chunk_mut() else { return false };
                let Some(room) = room.get_mut(..body.len()) else { return false };
                *front = header;
                room.copy_from_slice(body);
                (inline.as_ptr().addr() as u64, (HEADER + body.len()) as u32, 0, true)
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

    /// Ends the chain behind what was pushed and starts anew: its first request. Valid until the next push.
    #[inline]
    pub(super) fn link(&mut self) -> Option<*mut ibv_send_wr> {
        let last = std::mem::take(&mut self.len).checked_sub(1)?;
        let requests = self.requests.as_mut_ptr();
        if self.ended_at != last {
            let next = if self.ended_at + 1 < BATCH { requests.wrapping_add(self.ended_at + 1) } else { std::ptr::null_mut() };
            self.requests.get_mut(self.ended_at)?.next = next;
            self.requests.get_mut(last)?.next = std::ptr::null_mut();
            self.ended_at = last;
        }
        Some(self.requests.as_mut_ptr())
    }
}

/// Receive buffers, and those on their way back to the device.
pub(super) struct Receives {
    slots: MemoryRegion,
    /// One for each slot, which it names for good.
    requests: Box<[ibv_recv_wr]>,
    /// Whether the device has the slot, or is about to be given it.
    out: Box<[bool]>,
    /// The chain of those that go back: its first and its last slot.
    chain: Option<(u32, u32)>,
    len: u32,
    _gathers: Box<[ibv_sge]>,
}

// SAFETY: as for Sends.
unsafe impl Send for Receives {}

impl Receives {
    /// Over `slots`, a registered memory of [`SLOTS`] times [`SLOT_BYTES`]; slot n is request `first_id` + n. All of them are on their way.
    pub(super) fn new(slots: MemoryRegion, first_id: u64) -> Self {
        let mut requests: Box<[_]> = vec![zeroed!(ibv_recv_wr); SLOTS as usize].into();
        let mut gathers: Box<[_]> = vec![zeroed!(ibv_sge); SLOTS as usize].into();
        let first_gather = gathers.as_mut_ptr();
        for (slot, (request, gather)) in requests.iter_mut().zip(&mut gathers).enumerate() {
            let addr = slots.address() + (slot * SLOT_BYTES) as u64;
            *gather = ibv_sge { addr, length: SLOT_BYTES as u32, lkey: slots.lkey() };
            request.wr_id = first_id + slot as u64;
            request.sg_list = first_gather.wrapping_add(slot);
            request.num_sge = 1;
        }
        let mut receives =
            Self { slots, requests, out: vec![false; SLOTS as usize].into(), chain: None, len: 0, _gathers: gathers };
        for slot in 0..SLOTS {
            receives.push(slot);
        }
        receives
    }

    /// Slots that are on their way.
    #[inline]
    pub(super) fn len(&self) -> u32 {
        self.len
    }

    /// A slot came back from the device. False where the device did not have it.
    #[inline]
    pub(super) fn came_back(&mut self, slot: u32) -> bool {
        self.out.get_mut(slot as usize).is_some_and(std::mem::take)
    }

    /// Gives a slot back to the device, with the next [`Receives::link`].
    #[inline]
    pub(super) fn push(&mut self, slot: u32) {
        let requests = self.requests.as_mut_ptr();
        let (Some(request), Some(out)) = (self.requests.get_mut(slot as usize), self.out.get_mut(slot as usize)) else { return };
        // A slot is in the chain once, or the chain would be a ring.
        if std::mem::replace(out, true) {
            return;
        }
        request.next = std::ptr::null_mut();
        let first = match self.chain {
            Some((first, last)) => {
                if let Some(before) = self.requests.get_mut(last as usize) {
                    before.next = requests.wrapping_add(slot as usize);
                }
                first
            }
            None => slot,
        };
        self.chain = Some((first, slot));
        self.len += 1;
    }

    /// The header that the device put into a slot; zeros, which are none, where there is no such slot.
    #[inline]
    pub(super) fn header(&self, slot: u32) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        self.read(slot, 0, &mut header);
        header
    }

    /// The bytes from `offset` on that the device put into a slot; they stay as they were where there are not so many.
    #[inline]
    pub(super) fn read(&self, slot: u32, offset: usize, into: &mut [u8]) {
        if offset + into.len() <= SLOT_BYTES {
            let at = u64::from(slot) * SLOT_BYTES as u64 + offset as u64;
            // Outside of the slots there is nothing to read.
            drop(self.slots.memory().read(at, into));
        }
    }

    /// The chain of those that go back, which ends with NULL. Valid until the next push.
    #[inline]
    pub(super) fn link(&mut self) -> Option<*mut ibv_recv_wr> {
        let (first, _) = self.chain.take()?;
        self.len = 0;
        Some(self.requests.as_mut_ptr().wrapping_add(first as usize))
    }
}
