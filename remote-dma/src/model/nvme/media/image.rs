//! An image by its path: opened, locked and measured here, and then mapped where nothing can take its bytes away, or read and written.
//!
//! `open("/proc/self/fd/7", false)` of a sealed memfd allocates every page that it lacks and maps it, so that a read of 4 KiB is one copy to the
//! guest. `open("/dev/shm/disk.img", false)` finds tmpfs, where reading is a copy too, and one that fails in good order when somebody has
//! shortened the file; `open("/var/lib/disk.img", false)` finds a disk and starts four threads. The lock is held as long as the media lives.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use farbus_transport::Memory;
use farbus_transport::memory::is_sealed;
use rustix::fs::{FallocateFlags, FlockOperation, SeekFrom};
use rustix::io::Errno;

use super::{FileMedia, Media, MediaError, MemoryMedia, checked_len};

/// `f_type` of the file systems whose files are memory (statfs(2), linux/magic.h).
mod magic {
    pub(super) const TMPFS: u64 = 0x0102_1994;
    pub(super) const RAMFS: u64 = 0x8584_58f6;
    pub(super) const HUGETLBFS: u64 = 0x9584_58f6;
}

/// An image that is open, locked and of a good length.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) file: File,
    pub(super) len: u64,
    pub(super) identity: u64,
    pub(super) read_only: bool,
}

/// Opens and locks the image at `path`: as memory where its bytes are in memory already, and neither can the file become shorter nor a page
/// fail to be there. A file that can become shorter is never mapped, because whoever shortens it would end this process with SIGBUS.
///
/// # Errors
/// [`MediaError`] says what is wrong with it and what to do.
pub fn open(path: &Path, read_only: bool) -> Result<Box<dyn Media>, MediaError> {
    let image = Image::open(path, read_only)?;
    if !image.can_be_mapped() {
        return Ok(Box::new(FileMedia::over(image, path)?));
    }
    let memory = Memory::map_file(image.file.into(), 0, image.len, !read_only)?;
    Ok(Box::new(MemoryMedia::of_file(memory, image.identity)))
}

impl Image {
    pub(super) fn open(path: &Path, read_only: bool) -> Result<Self, MediaError> {
        let host = |what| move |source| MediaError::Host { what, path: path.to_owned(), source };
        // Looked at before it is opened, because opening a pipe for writing waits for its reader.
        let metadata = std::fs::metadata(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => MediaError::Missing { path: path.to_owned() },
            _ => host("look at")(source),
        })?;
        let kind = metadata.file_type();
        if kind.is_dir() {
            return Err(MediaError::Directory { path: path.to_owned() });
        }
        if !kind.is_file() && !kind.is_block_device() {
            return Err(MediaError::Kind { path: path.to_owned() });
        }
        let file =
            OpenOptions::new().read(true).write(!read_only).custom_flags(libc::O_NONBLOCK).open(path).map_err(host("open"))?;
        let lock = if read_only { FlockOperation::NonBlockingLockShared } else { FlockOperation::NonBlockingLockExclusive };
        rustix::fs::flock(&file, lock).map_err(|errno| match errno {
            Errno::WOULDBLOCK => MediaError::Locked { path: path.to_owned() },
            _ => host("lock")(errno.into()),
        })?;
        let len = checked_len(path, size(&file).map_err(host("measure"))?)?;
        let identity = metadata.dev() << 48 ^ metadata.rdev() << 32 ^ metadata.ino();
        Ok(Self { file, len, identity, read_only })
    }

    /// The file system's number, for a regular file.
    fn file_system(&self) -> Option<u64> {
        self.file.metadata().ok().filter(std::fs::Metadata::is_file)?;
        // The kernel's word is signed on some machines; the magic numbers have 32 bits.
        rustix::fs::fstatfs(&self.file).ok().map(|stat| stat.f_type as u64 & 0xffff_ffff)
    }

    /// Whether reading and writing is a copy from memory to memory, which waits for nobody.
    pub(super) fn is_in_memory(&self) -> bool {
        matches!(self.file_system(), Some(magic::TMPFS | magic::RAMFS))
    }

    /// Whether the bytes stay, with every page there or promised: touching a hole for which tmpfs has no page would be a SIGBUS.
    fn can_be_mapped(&self) -> bool {
        if !is_sealed(&self.file) || size(&self.file).ok() != Some(self.len) {
            return false;
        }
        match self.file_system() {
            Some(magic::TMPFS) if self.read_only => self.has_no_hole(),
            Some(magic::TMPFS) => match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, self.len) {
                Ok(()) => true,
                Err(errno) => {
                    tracing::warn!(%errno, "the image's missing pages cannot be had now: it is read and written instead of mapped");
                    false
                }
            },
            // Mapping a file on hugetlbfs reserves its pages or fails.
            Some(magic::HUGETLBFS) => true,
            _ => false,
        }
    }

    /// Pages that were allocated and never written count as holes here, which is on the safe side.
    fn has_no_hole(&self) -> bool {
        rustix::fs::seek(self.file.as_fd(), SeekFrom::Hole(0)).is_ok_and(|hole| hole == self.len)
    }
}

/// Bytes of a file or block device: the end is where seeking finds it.
fn size(file: &File) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, SeekFrom::End(0))?)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;
    use std::path::PathBuf;

    use super::super::{Job, JobError, JobKind};
    use super::*;

    const LEN: u64 = 64 << 10;

    /// A file of `LEN` bytes with a hole after its first 4 KiB, on tmpfs where there is one.
    fn image(folder: &Path) -> Option<tempfile::NamedTempFile> {
        let mut file = tempfile::NamedTempFile::new_in(folder).ok()?;
        file.write_all(&[7; 4096]).unwrap();
        file.as_file().set_len(LEN).unwrap();
        Some(file)
    }

    fn in_memory() -> Option<tempfile::NamedTempFile> {
        let folder = Path::new("/dev/shm");
        let stat = rustix::fs::statfs(folder).ok()?;
        (stat.f_type as u64 == magic::TMPFS).then(|| image(folder)).flatten()
    }

    /// A sealed memfd and a path to it.
    fn sealed() -> (File, PathBuf) {
        let memory = Memory::memfd("image", LEN).unwrap();
        let file = File::from(memory.file().unwrap().0.try_clone_to_owned().unwrap());
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        (file, path)
    }

    #[test]
    fn a_sealed_image_is_mapped_without_holes_and_stays_locked() {
        let (file, path) = sealed();
        let media = open(&path, false).unwrap();
        let memory = media.memory().unwrap();
        assert!(file.metadata().unwrap().blocks() * 512 >= LEN, "a hole could fault later");
        memory.write(LEN - 3, b"end").unwrap();
        let mut seen = [0; 3];
        file.read_exact_at(&mut seen, LEN - 3).unwrap();
        assert_eq!((&seen, media.len()), (b"end", LEN));
        assert!(matches!(open(&path, false), Err(MediaError::Locked { .. })));
        let identity = media.identity();
        drop(media);
        assert_eq!(open(&path, true).unwrap().identity(), identity, "a driver must find the same drive again");
    }

    #[test]
    fn a_read_only_image_with_a_hole_is_not_mapped_and_one_without_cannot_be_written() {
        let (file, path) = sealed();
        assert!(open(&path, true).unwrap().memory().is_none());
        file.write_all_at(&vec![1; LEN as usize], 0).unwrap();
        let media = open(&path, true).unwrap();
        assert!(media.memory().unwrap().write(0, b"x").is_err());
        assert!(open(&path, true).is_ok(), "readers share");
    }

    fn job(kind: JobKind, offset: u64, memory: &std::sync::Arc<Memory>) -> Box<Job> {
        let buffer = farbus_transport::Mapped::new(std::sync::Arc::clone(memory), 0, memory.len()).unwrap();
        Box::new(Job { kind, offset, len: memory.len(), buffers: vec![buffer.into()], ..Job::default() })
    }

    fn done(media: &mut dyn Media) -> Option<JobError> {
        let start = std::time::Instant::now();
        loop {
            if let Some(job) = media.reap() {
                return job.outcome;
            }
            assert!(start.elapsed().as_secs() < 10, "a job is never done");
        }
    }

    #[test]
    fn an_image_that_somebody_shortens_fails_whatever_comes() {
        let Some(file) = in_memory() else {
            eprintln!("not run: there is no tmpfs");
            return;
        };
        let mut media = open(file.path(), false).unwrap();
        assert!(media.memory().is_none(), "a file that can become shorter is mapped");
        let memory = Memory::memfd("guest", 4096).unwrap();
        media.submit(job(JobKind::Read, 0, &memory));
        assert!(media.busy(), "in memory nobody else is needed");
        assert_eq!(done(&mut *media), None);
        let mut seen = [0];
        memory.read(4095, &mut seen).unwrap();
        assert_eq!(seen, [7]);
        file.as_file().set_len(8192).unwrap();
        for (kind, offset) in [
            (JobKind::Read, 4096),
            (JobKind::Compare, 12 << 10),
            // The file would be as long again as the guest needs.
            (JobKind::Write { durable: true }, LEN - 4096),
            (JobKind::Read, LEN - 4096),
        ] {
            media.submit(job(kind, offset, &memory));
            assert_eq!(done(&mut *media), Some(JobError::Failed), "{kind:?} at {offset}");
        }
        assert_eq!(file.as_file().metadata().unwrap().len(), 8192);
        media.submit(job(JobKind::Read, 0, &memory));
        assert!(media.cancel().is_some() && media.cancel().is_none() && media.reap().is_none() && media.arm());
    }

    #[test]
    fn an_image_on_a_disk_goes_to_the_workers() {
        let Some(file) = image(Path::new(env!("CARGO_MANIFEST_DIR"))).or_else(|| image(Path::new("/var/tmp"))) else {
            eprintln!("not run: there is no folder for an image on a disk");
            return;
        };
        let stat = rustix::fs::statfs(file.path()).unwrap();
        let memory = [magic::TMPFS, magic::RAMFS].contains(&(stat.f_type as u64));
        let mut media = open(file.path(), false).unwrap();
        assert_eq!((media.memory().is_some(), media.volatile_cache()), (false, true));
        media.submit(job(JobKind::Read, 0, &Memory::memfd("guest", 4096).unwrap()));
        assert_eq!(media.busy(), memory);
        assert_eq!(done(&mut *media), None);
    }
}
