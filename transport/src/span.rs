//! Checked pieces of registered memory: a span exists only because its bounds and permission were checked when it was made.
//!
//! `grant_of_queue.span(0x40, 64, Access::READ)` names bytes 0x40 to 0x7f of a peer's region, or says why it cannot. Spans are
//! plain values that name their region by index and generation, so one that outlives its region is refused, never followed.

use thiserror::Error;

/// What an owner lets others do with memory, or what an operation needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    /// The bytes may be read.
    pub read: bool,
    /// The bytes may be written.
    pub write: bool,
}

impl Access {
    /// Nothing is allowed.
    pub const NONE: Self = Self { read: false, write: false };
    /// Reading only.
    pub const READ: Self = Self { read: true, write: false };
    /// Writing only.
    pub const WRITE: Self = Self { read: false, write: true };
    /// Reading and writing.
    pub const READ_WRITE: Self = Self { read: true, write: true };

    /// Whether all that `needed` asks for is allowed here.
    pub const fn allows(self, needed: Self) -> bool {
        (self.read || !needed.read) && (self.write || !needed.write)
    }

    /// As two bits: bit 0 read, bit 1 write.
    pub const fn bits(self) -> u8 {
        self.read as u8 | (self.write as u8) << 1
    }

    /// From two bits; `None` where others are set.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        if bits > 3 {
            return None;
        }
        Some(Self { read: bits & 1 != 0, write: bits & 2 != 0 })
    }
}

/// Why a span could not be made.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum SpanError {
    /// The range is not inside the region.
    #[error("range {offset:#x} + {len:#x} is outside a region of {region_len:#x} bytes")]
    OutOfBounds {
        /// First byte, from the region's start.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// The region's length in bytes.
        region_len: u64,
    },
    /// The region does not allow the access.
    #[error("access {needed:?} is not allowed by {allowed:?}")]
    Denied {
        /// What the operation needs.
        needed: Access,
        /// What the region allows.
        allowed: Access,
    },
}

/// Names a registered region inside one fabric; the generation tells a reused index from its predecessor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RegionName {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

macro_rules! region_and_span {
    ($region:ident, $span:ident, $whose:literal) => {
        #[doc = concat!("A registered memory region of ", $whose, ", as one fabric knows it.")]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $region {
            pub(crate) name: RegionName,
            pub(crate) len: u64,
            pub(crate) access: Access,
        }

        impl $region {
            /// Length in bytes.
            pub const fn len(&self) -> u64 {
                self.len
            }

            /// Whether the region has no bytes.
            pub const fn is_empty(&self) -> bool {
                self.len == 0
            }

            /// What may be done with the bytes.
            pub const fn access(&self) -> Access {
                self.access
            }

            /// The `len` bytes from `offset`, for an operation that needs `needed`.
            ///
            /// # Errors
            /// [`SpanError`] where the range leaves the region or the access is not allowed.
            pub fn span(&self, offset: u64, len: u32, needed: Access) -> Result<$span, SpanError> {
                let inside = offset.checked_add(u64::from(len)).is_some_and(|end| end <= self.len);
                if !inside {
                    return Err(SpanError::OutOfBounds { offset, len: u64::from(len), region_len: self.len });
                }
                if !self.access.allows(needed) {
                    return Err(SpanError::Denied { needed, allowed: self.access });
                }
                Ok($span { name: self.name, offset, len, access: needed })
            }
        }

        #[doc = concat!("Bytes inside a region of ", $whose, ": bounds and permission were checked when it was made.")]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $span {
            pub(crate) name: RegionName,
            pub(crate) offset: u64,
            pub(crate) len: u32,
            pub(crate) access: Access,
        }

        impl $span {
            /// Length in bytes.
            pub const fn len(&self) -> u32 {
                self.len
            }

            /// Whether the span has no bytes.
            pub const fn is_empty(&self) -> bool {
                self.len == 0
            }

            /// First byte, from the region's start.
            pub const fn offset(&self) -> u64 {
                self.offset
            }

            /// The part of `len` bytes that starts `from` bytes into this span; `None` where it would leave the span.
            pub fn part(&self, from: u32, len: u32) -> Option<Self> {
                (from.checked_add(len)? <= self.len).then(|| Self { offset: self.offset + u64::from(from), len, ..*self })
            }
        }
    };
}

region_and_span!(LocalRegion, LocalSpan, "this side");
region_and_span!(RemoteRegion, RemoteSpan, "the peer");

#[cfg(test)]
mod tests {
    use super::*;

    fn region(len: u64, access: Access) -> RemoteRegion {
        RemoteRegion { name: RegionName { index: 0, generation: 0 }, len, access }
    }

    #[test]
    fn a_span_never_leaves_its_region() {
        let region = region(0x1000, Access::READ);
        assert!(region.span(0xfff, 1, Access::READ).is_ok());
        for (offset, len) in [(0xfff, 2), (0x1000, 1), (u64::MAX, 1), (u64::MAX, u32::MAX)] {
            assert!(matches!(region.span(offset, len, Access::READ), Err(SpanError::OutOfBounds { .. })), "{offset:#x} + {len:#x}");
        }
    }

    #[test]
    fn a_span_never_widens_permission() {
        let refused = region(16, Access::READ).span(0, 16, Access::WRITE);
        assert_eq!(refused, Err(SpanError::Denied { needed: Access::WRITE, allowed: Access::READ }));
    }

    #[test]
    fn a_part_stays_inside_its_span() {
        let span = region(0x1000, Access::READ).span(0x100, 0x80, Access::READ).unwrap();
        assert_eq!(span.part(0x40, 0x40).map(|part| part.offset()), Some(0x140));
        assert_eq!(span.part(0x40, 0x41), None);
        assert_eq!(span.part(u32::MAX, 2), None);
    }
}
