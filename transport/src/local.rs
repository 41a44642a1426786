//! This side's registered memory, for fabrics whose registration costs nothing and for devices that need no fabric at all.
//!
//! `regions.register(image, Access::READ)` gives a region; a span of it resolves to the memory and an offset until it is deregistered.

use std::sync::Arc;

use crate::fabric::RegisterError;
use crate::memory::{Mapped, Memory, MemoryError};
use crate::span::{Access, LocalRegion, LocalSpan};
use crate::table::{MAX_REGIONS, Table};

/// Registered memory by region.
#[derive(Debug, Default)]
pub struct LocalRegions {
    table: Table<Arc<Memory>>,
}

impl LocalRegions {
    /// Makes memory usable in operations.
    ///
    /// # Errors
    /// [`RegisterError`].
    pub fn register(&mut self, memory: Arc<Memory>, access: Access) -> Result<LocalRegion, RegisterError> {
        if access.write && !memory.writable() {
            return Err(MemoryError::ReadOnly.into());
        }
        let len = memory.len();
        let name = self.table.insert(memory).ok_or(RegisterError::TooMany { limit: MAX_REGIONS })?;
        Ok(LocalRegion { name, len, access })
    }

    /// Ends the use of a region; its spans resolve to nothing from now on.
    pub fn deregister(&mut self, region: LocalRegion) {
        self.table.remove(region.name);
    }

    /// The memory behind a region.
    pub fn memory(&self, region: &LocalRegion) -> Option<Arc<Memory>> {
        self.table.find(region.name).map(Arc::clone)
    }

    /// The memory and the offset in it where a span begins.
    #[inline]
    pub fn resolve(&self, span: LocalSpan) -> Option<(&Memory, u64)> {
        self.table.find(span.name).map(|memory| (&**memory, span.offset))
    }

    /// A span as memory that stays mapped as long as the result lives.
    pub fn map(&self, span: LocalSpan) -> Option<Mapped> {
        Mapped::new(Arc::clone(self.table.find(span.name)?), span.offset, u64::from(span.len)).ok()
    }
}
