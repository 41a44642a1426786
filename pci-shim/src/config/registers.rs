//! Configuration space as bytes: each bit is read-only, writable, or cleared by writing one; some survive a function level reset.
//!
//! The low half of BAR0 of a 16 KiB memory BAR reads 0x0000_0004 and has the write mask 0xffff_c000, so a driver that writes all ones reads
//! 0xffff_c004 back and knows the size. Nothing here knows what a register means; that is the layer above.

use crate::access::AccessError;

/// Bytes of the configuration space of a PCI Express function (PCIe 5.0, section 7.2.2).
pub const CONFIG_BYTES: usize = 4096;

type Bytes = Box<[u8; CONFIG_BYTES]>;

/// The bytes and what may happen to each bit.
#[derive(Clone, Debug)]
pub(crate) struct Registers {
    value: Bytes,
    initial: Bytes,
    writable: Bytes,
    clear_on_one: Bytes,
    sticky: Bytes,
}

impl Registers {
    /// All zero, all read-only.
    pub(crate) fn new() -> Self {
        let zero = || Box::new([0; CONFIG_BYTES]);
        Self { value: zero(), initial: zero(), writable: zero(), clear_on_one: zero(), sticky: zero() }
    }

    /// Gives a register its initial value and the bits that can be written.
    pub(crate) fn define<const N: usize>(&mut self, offset: u16, initial: [u8; N], writable: [u8; N]) {
        store(&mut self.value, offset, &initial);
        store(&mut self.initial, offset, &initial);
        store(&mut self.writable, offset, &writable);
    }

    /// The bits that writing one clears.
    pub(crate) fn clear_on_one<const N: usize>(&mut self, offset: u16, bits: [u8; N]) {
        store(&mut self.clear_on_one, offset, &bits);
    }

    /// The bits that a function level reset leaves alone.
    pub(crate) fn sticky<const N: usize>(&mut self, offset: u16, bits: [u8; N]) {
        store(&mut self.sticky, offset, &bits);
    }

    /// Any range inside the space.
    pub(crate) fn read(&self, offset: u16, into: &mut [u8]) -> Result<(), AccessError> {
        let error = AccessError::Config { offset, len: into.len() };
        let from = range(offset, into.len()).and_then(|range| self.value.get(range));
        into.copy_from_slice(from.ok_or(error)?);
        Ok(())
    }

    /// What the guest writes, through the masks.
    pub(crate) fn write(&mut self, offset: u16, bytes: &[u8]) -> Result<(), AccessError> {
        let error = AccessError::Config { offset, len: bytes.len() };
        let range = range(offset, bytes.len()).ok_or(error)?;
        let masks = self.writable.iter().zip(self.clear_on_one.iter());
        for ((value, (writable, clear)), byte) in self.value.iter_mut().zip(masks).skip(range.start).zip(bytes) {
            *value = (*value & !writable | byte & writable) & !(byte & clear);
        }
        Ok(())
    }

    /// What the function itself writes, past the masks.
    pub(crate) fn set<const N: usize>(&mut self, offset: u16, bytes: [u8; N]) {
        store(&mut self.value, offset, &bytes);
    }

    /// The register at an offset of ours.
    pub(crate) fn fetch<const N: usize>(&self, offset: u16) -> [u8; N] {
        let mut bytes = [0; N];
        if let Some(from) = range(offset, N).and_then(|range| self.value.get(range)) {
            bytes.copy_from_slice(from);
        }
        bytes
    }

    pub(crate) fn u16(&self, offset: u16) -> u16 {
        u16::from_le_bytes(self.fetch(offset))
    }

    pub(crate) fn u32(&self, offset: u16) -> u32 {
        u32::from_le_bytes(self.fetch(offset))
    }

    /// All bytes, for a saved state.
    pub(crate) fn all(&self) -> &[u8; CONFIG_BYTES] {
        &self.value
    }

    /// Takes saved bytes, where those that software cannot change are ours; `also` are the bits that the function itself changes. Nothing is taken otherwise.
    pub(crate) fn load(&mut self, saved: &[u8; CONFIG_BYTES], also: &[(u16, u32)]) -> bool {
        let mut changes = self.writable.clone();
        for (change, clear) in changes.iter_mut().zip(self.clear_on_one.iter()) {
            *change |= clear;
        }
        for (offset, bits) in also {
            for (place, bits) in changes.iter_mut().skip(usize::from(*offset)).zip(bits.to_le_bytes()) {
                *place |= bits;
            }
        }
        let fixed =
            saved.iter().zip(self.initial.iter()).zip(changes.iter()).all(|((saved, ours), change)| (saved ^ ours) & !change == 0);
        if fixed {
            self.value.copy_from_slice(saved);
        }
        fixed
    }

    /// Back to the initial values; sticky bits stay where `keep_sticky`.
    pub(crate) fn reset(&mut self, keep_sticky: bool) {
        let sources = self.initial.iter().zip(self.sticky.iter());
        for (value, (initial, sticky)) in self.value.iter_mut().zip(sources) {
            let kept = if keep_sticky { *sticky } else { 0 };
            *value = *value & kept | initial & !kept;
        }
    }
}

fn range(offset: u16, len: usize) -> Option<std::ops::Range<usize>> {
    let start = usize::from(offset);
    start.checked_add(len).filter(|end| *end <= CONFIG_BYTES).map(|end| start..end)
}

fn store(bytes: &mut Bytes, offset: u16, from: &[u8]) {
    debug_assert!(range(offset, from.len()).is_some(), "a register of ours lies outside the space");
    if let Some(to) = range(offset, from.len()).and_then(|range| bytes.get_mut(range)) {
        to.copy_from_slice(from);
    }
}
