//! Parts of BARs that the server shares as memory: accessed by single loads and stores of exactly the access's width, without a message.
//!
//! A server that offers 4 KiB from BAR0 + 0x1000 in a sealed memfd has its doorbell at 0x1008 written by one 32-bit store. A file that can
//! shrink under us is not mapped, because an access behind its new end would kill the process; its registers are reached by messages.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use farbus_remote_dma::{BarAddress, Width};
use farbus_transport::Memory;
use farbus_transport::memory::is_sealed;

use super::reply::{Area, Region};

struct Mapped {
    bar: u8,
    area: Area,
    memory: Arc<Memory>,
}

/// What is mapped.
#[derive(Default)]
pub(super) struct Areas(Vec<Mapped>);

impl Areas {
    /// Maps what `region` offers, as far as that is safe.
    pub(super) fn add(&mut self, index: u32, region: &Region, fds: Vec<OwnedFd>, unsealed: bool) {
        let Some(fd) = fds.into_iter().next().filter(|_| !region.areas.is_empty()) else { return };
        if !unsealed && !is_sealed(&fd) {
            tracing::info!(
                index,
                "the registers that the server shares lie in a file that can shrink: they are reached by messages"
            );
            return;
        }
        for area in &region.areas {
            let Some(offset) = region.file_offset.checked_add(area.offset).filter(|_| area.len > 0) else { continue };
            let mapped = fd.try_clone().map_err(farbus_transport::MemoryError::from_host("copy a descriptor"));
            match mapped.and_then(|fd| Memory::map_file(fd, offset, area.len, true)) {
                Ok(memory) => self.0.push(Mapped { bar: index as u8, area: *area, memory }),
                Err(error) => tracing::info!(%error, index, "registers that the server shares are reached by messages"),
            }
        }
    }

    /// One load; `None` where that place, or that width, is reached by messages.
    pub(super) fn load(&self, at: BarAddress, width: Width) -> Option<u64> {
        let (memory, offset) = self.find(at, width)?;
        match width {
            Width::B1 => memory.atomic_bytes(offset, 1)?.first().map(|byte| u64::from(byte.load(Ordering::Acquire))),
            Width::B2 => None,
            Width::B4 => memory.atomic_u32(offset).ok().map(|word| u64::from(word.load(Ordering::Acquire))),
            Width::B8 => memory.atomic_u64(offset).ok().map(|word| word.load(Ordering::Acquire)),
        }
    }

    /// One store; false where that place, or that width, is reached by messages.
    pub(super) fn store(&self, at: BarAddress, width: Width, value: u64) -> bool {
        let Some((memory, offset)) = self.find(at, width) else { return false };
        match width {
            Width::B1 => memory
                .atomic_bytes(offset, 1)
                .and_then(<[_]>::first)
                .map(|byte| byte.store(value as u8, Ordering::Release))
                .is_some(),
            Width::B2 => false,
            Width::B4 => memory.atomic_u32(offset).map(|word| word.store(value as u32, Ordering::Release)).is_ok(),
            Width::B8 => memory.atomic_u64(offset).map(|word| word.store(value, Ordering::Release)).is_ok(),
        }
    }

    fn find(&self, at: BarAddress, width: Width) -> Option<(&Memory, u64)> {
        let mapped = self.0.iter().find(|mapped| {
            let inside = at.offset.checked_sub(mapped.area.offset);
            mapped.bar == at.bar && inside.is_some_and(|offset| offset + width.bytes() <= mapped.area.len)
        })?;
        Some((&mapped.memory, at.offset - mapped.area.offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_area_is_loaded_and_stored_and_nothing_beside_it() {
        let memory = Memory::memfd("bar", 0x2000).unwrap();
        let region = Region { size: 0x4000, flags: 7, file_offset: 0, areas: vec![Area { offset: 0x1000, len: 0x1000 }] };
        let fd = || memory.file().unwrap().0.try_clone_to_owned().unwrap();
        let mut areas = Areas::default();
        areas.add(0, &region, vec![fd()], false);
        let at = |offset| BarAddress { bar: 0, offset };
        assert!(areas.store(at(0x1008), Width::B4, 17));
        assert_eq!((areas.load(at(0x1008), Width::B4), areas.load(at(0x1008), Width::B1)), (Some(17), Some(17)));
        assert_eq!(memory.atomic_u32(0x1008).unwrap().load(Ordering::Relaxed), 17);
        assert_eq!(areas.load(at(0x1008), Width::B8), Some(17));
        assert!(
            !areas.store(at(0x1008), Width::B2, 1)
                && !areas.store(at(0xffc), Width::B4, 1)
                && !areas.store(at(0x2000), Width::B4, 1)
        );
        assert_eq!(areas.load(BarAddress { bar: 1, offset: 0x1008 }, Width::B4), None);
    }

    #[test]
    fn a_file_that_can_shrink_is_not_mapped_unless_that_was_asked_for() {
        let region = Region { size: 0x1000, flags: 7, file_offset: 0, areas: vec![Area { offset: 0, len: 0x1000 }] };
        let file = || {
            let file = tempfile::tempfile().unwrap();
            file.set_len(0x1000).unwrap();
            OwnedFd::from(file)
        };
        for (unsealed, found) in [(false, None), (true, Some(0))] {
            let mut areas = Areas::default();
            areas.add(0, &region, vec![file()], unsealed);
            assert_eq!(areas.load(BarAddress { bar: 0, offset: 0 }, Width::B4), found);
        }
        // One that is too short is no mapping, sealed or not.
        let mut areas = Areas::default();
        areas.add(0, &Region { size: 0x2000, areas: vec![Area { offset: 0, len: 0x2000 }], ..region }, vec![file()], true);
        assert_eq!(areas.load(BarAddress { bar: 0, offset: 0 }, Width::B4), None);
    }
}
