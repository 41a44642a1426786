//! What a client lets the device use: windows by DMA address, and one mapping per file however many windows show it.
//!
//! A guest with a virtual IOMMU maps 4 KiB at a time: a thousand `DMA_MAP`s with descriptors of one memfd become a thousand windows into
//! one mapping of it, from its first byte to its last, because the device number and inode of all descriptors are the same.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use farbus_remote_dma::{AttachmentError, Iova, MapError, Window, WindowMemory};
use farbus_transport::{Access, Memory, MemoryError};
use rustix::fs::FileType;
use rustix::io::Errno;

use super::served::Served;
use super::share::Trust;
use super::wire::{DmaMap, DmaUnmap, MAP_READABLE, MAP_WRITEABLE, MAX_DMA_MAPS, PAGE_BYTES, UNMAP_ALL};

/// Names a file, whichever descriptor it came by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FileKey {
    device: u64,
    inode: u64,
}

/// A file that windows show.
pub(super) struct SharedFile {
    /// Mappings from its first byte on; a later one is longer, made after the file grew.
    pub(super) memories: Vec<Arc<Memory>>,
    pub(super) trust: Trust,
    windows: usize,
}

struct Mapped {
    len: u64,
    /// The file and where in it the window begins.
    file: Option<(FileKey, u64)>,
}

/// All windows of one client.
#[derive(Default)]
pub(super) struct Maps {
    windows: BTreeMap<u64, Mapped>,
    files: HashMap<FileKey, SharedFile>,
}

impl Maps {
    /// Does what a `DMA_MAP` says.
    ///
    /// # Errors
    /// `EEXIST` for addresses that are mapped, `EINVAL` for a range, flags or file offset that cannot be mapped, `ENOSPC` for too many
    /// maps, `ENOMEM` where the device's side cannot take the memory, `ENODEV` where it is gone. A file that it refuses is no error: the
    /// window is mediated.
    pub(super) fn map<D: Served>(&mut self, device: &mut D, map: &DmaMap, fds: Vec<OwnedFd>) -> Result<(), Errno> {
        let end = checked_range(map.address, map.size)?;
        if map.flags == 0 || map.flags & !(MAP_READABLE | MAP_WRITEABLE) != 0 || fds.len() > 1 {
            return Err(Errno::INVAL);
        }
        if self.overlaps(map.address, end) {
            return Err(Errno::EXIST);
        }
        if self.windows.len() >= MAX_DMA_MAPS {
            return Err(Errno::NOSPC);
        }
        let writeable = map.flags & MAP_WRITEABLE != 0;
        let shown = match fds.into_iter().next() {
            Some(fd) => self.file(fd, map.offset, map.size, writeable)?,
            None => None,
        };
        let memory = match &shown {
            Some((key, memory)) => WindowMemory::Mapped {
                memory: Arc::clone(memory),
                offset: map.offset,
                proven: self.files.get(key).is_some_and(|file| file.trust == Trust::Proven),
            },
            None => WindowMemory::Mediated,
        };
        let file = shown.map(|(key, _)| (key, map.offset));
        let window = Window {
            iova: Iova(map.address),
            len: map.size,
            access: Access { read: map.flags & MAP_READABLE != 0, write: writeable },
            memory,
        };
        let mapped = match (device.map(window.clone()), &file) {
            (Err(MapError::Attachment(AttachmentError::Refused(why))), Some((key, _))) => {
                // The client cannot do without its memory, and by messages it is right, only slow.
                let mediated = device.map(Window { memory: WindowMemory::Mediated, ..window });
                if mediated.is_ok() {
                    tracing::warn!(
                        why,
                        "the device's side refused a map's file: its memory is reached by messages, which is slow; give the guest \
                         memory-backend-memfd with share=on, or lend with --accept-unsealed"
                    );
                    if let Some(shown) = self.files.get_mut(key).filter(|shown| shown.windows == 0) {
                        // Nor is it offered again for each further window.
                        shown.trust = Trust::NotShared;
                    }
                }
                mediated
            }
            (mapped, _) => mapped,
        };
        if let Err(error) = mapped {
            tracing::warn!(%error, "a map was refused");
            self.forget_unused_files();
            return Err(errno(&error));
        }
        if let Some(shown) = file.and_then(|(key, _)| self.files.get_mut(&key)) {
            shown.windows += 1;
        }
        self.windows.insert(map.address, Mapped { len: map.size, file });
        Ok(())
    }

    /// The addresses that a `DMA_UNMAP` names.
    ///
    /// # Errors
    /// `EINVAL` for a range that cannot be mapped, that would split a window, or for flags other than "all"; a dirty bitmap is not kept by
    /// address, so `EOPNOTSUPP` for that.
    pub(super) fn range_to_unmap(&self, unmap: &DmaUnmap) -> Result<Vec<(u64, u64)>, Errno> {
        match unmap.flags {
            0 => {
                let end = checked_range(unmap.address, unmap.size)?;
                let split = |(start, window): (&u64, &Mapped)| {
                    let window_end = start.saturating_add(window.len);
                    window_end > unmap.address && (*start < unmap.address || window_end > end)
                };
                if self.windows.range(..end).rev().take(1).any(split) || self.straddles(unmap.address) {
                    return Err(Errno::INVAL);
                }
                Ok(self.windows.range(unmap.address..end).map(|(start, window)| (*start, window.len)).collect())
            }
            UNMAP_ALL if unmap.address == 0 && unmap.size == 0 => {
                Ok(self.windows.iter().map(|(start, window)| (*start, window.len)).collect())
            }
            flags if flags & super::wire::UNMAP_DIRTY_BITMAP != 0 => Err(Errno::OPNOTSUPP),
            _ => Err(Errno::INVAL),
        }
    }

    /// Takes windows away that [`Maps::range_to_unmap`] named.
    ///
    /// # Errors
    /// What the device's side answered; the windows before the one that failed are gone.
    pub(super) fn unmap<D: Served>(&mut self, device: &mut D, windows: &[(u64, u64)]) -> Result<(), Errno> {
        for (start, len) in windows {
            device.unmap(Iova(*start), *len).map_err(|error| {
                tracing::warn!(%error, "an unmap was refused");
                errno(&error)
            })?;
            let shown = self.windows.remove(start).and_then(|window| window.file);
            if let Some(file) = shown.and_then(|(key, _)| self.files.get_mut(&key)) {
                file.windows -= 1;
            }
        }
        self.forget_unused_files();
        Ok(())
    }

    /// Every window, by first address and length.
    pub(super) fn all(&self) -> Vec<(u64, u64)> {
        self.windows.iter().map(|(start, window)| (*start, window.len)).collect()
    }

    /// The bytes that the mapping of a file shows for a range, where the file's trust is still open.
    pub(super) fn sample(&self, iova: Iova, len: usize) -> Option<(FileKey, Vec<u8>)> {
        let (start, window) = self.windows.range(..=iova.0).next_back()?;
        let (key, base) = window.file?;
        let inside = iova.0 - start;
        if inside.checked_add(len as u64)? > window.len {
            return None;
        }
        let file = self.files.get(&key).filter(|file| file.trust == Trust::Open)?;
        let mut bytes = vec![0; len];
        let offset = base.checked_add(inside)?;
        file.memories.last()?.read(offset, &mut bytes).ok()?;
        Some((key, bytes))
    }

    pub(super) fn file_mut(&mut self, key: FileKey) -> Option<&mut SharedFile> {
        self.files.get_mut(&key)
    }

    pub(super) fn files_mut(&mut self) -> impl Iterator<Item = &mut SharedFile> {
        self.files.values_mut()
    }

    fn straddles(&self, at: u64) -> bool {
        self.windows.range(..at).next_back().is_some_and(|(start, window)| start.saturating_add(window.len) > at)
    }

    fn overlaps(&self, address: u64, end: u64) -> bool {
        self.straddles(address) || self.windows.range(address..end).next().is_some()
    }

    fn forget_unused_files(&mut self) {
        self.files.retain(|_, file| file.windows > 0);
    }

    /// The mapping of a descriptor's file; `None` where its bytes can only be reached by messages.
    fn file(&mut self, fd: OwnedFd, offset: u64, size: u64, writeable: bool) -> Result<Option<(FileKey, Arc<Memory>)>, Errno> {
        let needed = offset.checked_add(size).filter(|_| offset.is_multiple_of(PAGE_BYTES)).ok_or(Errno::INVAL)?;
        let stat = rustix::fs::fstat(&fd)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            tracing::info!("a map's descriptor is no regular file: its memory is reached by messages");
            return Ok(None);
        }
        let length = u64::try_from(stat.st_size).unwrap_or(0);
        if needed > length {
            tracing::warn!(needed, length, "a map leaves its file");
            return Err(Errno::INVAL);
        }
        let key = FileKey { device: stat.st_dev, inode: stat.st_ino };
        let known = self.files.get(&key);
        if known.is_some_and(|file| file.trust == Trust::NotShared) {
            return Ok(None);
        }
        if let Some(memory) = known.and_then(|file| file.memories.last()).filter(|memory| memory.len() >= needed) {
            let usable = memory.writable() || !writeable;
            return Ok(usable.then(|| (key, Arc::clone(memory))));
        }
        let writable = !rustix::fs::fcntl_getfl(&fd)?.contains(rustix::fs::OFlags::WRONLY)
            && rustix::fs::fcntl_getfl(&fd)?.contains(rustix::fs::OFlags::RDWR);
        if writeable && !writable {
            // The client's own stores cannot be in this file, so it is not the memory that the guest writes.
            tracing::info!("a writeable map's descriptor is read-only: its memory is reached by messages");
            return Ok(None);
        }
        let memory = match Memory::map_file(fd, 0, length, writable) {
            Ok(memory) => memory,
            Err(MemoryError::FileTooShort { .. }) => return Err(Errno::INVAL),
            Err(error) => {
                tracing::warn!(%error, "a map's file cannot be mapped: its memory is reached by messages");
                return Ok(None);
            }
        };
        let file = self.files.entry(key).or_insert_with(|| SharedFile { memories: Vec::new(), trust: Trust::Open, windows: 0 });
        file.memories.push(Arc::clone(&memory));
        Ok(Some((key, memory)))
    }
}

/// The end of a range of whole pages.
fn checked_range(address: u64, size: u64) -> Result<u64, Errno> {
    let end = address.checked_add(size).ok_or(Errno::INVAL)?;
    if size == 0 || !address.is_multiple_of(PAGE_BYTES) || !size.is_multiple_of(PAGE_BYTES) {
        return Err(Errno::INVAL);
    }
    Ok(end)
}

fn errno(error: &MapError) -> Errno {
    match error {
        MapError::Overlap { .. } => Errno::EXIST,
        MapError::Range { .. } => Errno::INVAL,
        MapError::TooMany { .. } => Errno::NOSPC,
        MapError::Grant(_) => Errno::NOMEM,
        MapError::Attachment(_) => Errno::NODEV,
    }
}
