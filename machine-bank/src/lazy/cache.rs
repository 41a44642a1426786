//! The local cache: groups of 64 KiB that were fetched and verified, in one memfd for each section of a machine, at the offsets that they have there.
//!
//! The first machine of an image has group 12 fetched; the second is answered from the memfd, by a copy of 64 KiB or, where it maps the memfd
//! privately, by mapping its sixteen pages. All images of a cache together hold at most what it was told; who was not used goes first.
//!
//! A group that goes is punched out of its memfd under the lock that placing takes for reading: nobody copies what is being taken away. Machines
//! that had its pages mapped lose those that they did not write, and are answered anew when they use them.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use farbus_transport::{Memory, MemoryError};
use rustix::fs::{FallocateFlags, fallocate};

use crate::manifest::Entry;
use crate::pack::GROUP;
use crate::page::{PAGE, Root};

/// What the cache knows of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// Nothing.
    Absent,
    /// It is all zeros.
    Zero,
    /// It is in the memfd.
    There,
}

/// The groups of one section of one machine.
#[derive(Debug)]
pub struct CachedImage {
    /// Bytes of the section.
    len: u64,
    memory: Arc<Memory>,
    held: RwLock<Vec<Held>>,
    used: Vec<AtomicBool>,
    /// Groups that are in the memfd.
    there: AtomicUsize,
}

/// A bounded cache of images.
#[derive(Debug)]
pub struct Cache {
    most: u64,
    inner: Mutex<Inner>,
    evicted: AtomicU64,
}

#[derive(Debug, Default)]
struct Inner {
    images: HashMap<(Root, String), Arc<CachedImage>>,
    /// Groups that are there, in the order in which they came or were last found used.
    order: VecDeque<(Weak<CachedImage>, usize)>,
}

impl Cache {
    /// A cache of at most `bytes`, at least one group.
    pub fn new(bytes: u64) -> Arc<Self> {
        Arc::new(Self { most: (bytes / GROUP as u64).max(1), inner: Mutex::default(), evicted: AtomicU64::new(0) })
    }

    /// The groups of a section of `len` bytes of a machine, shared by all who ask. They stay for who comes later; an image of which no group is left
    /// goes when nobody uses it and another one comes.
    ///
    /// # Errors
    /// The host's fault.
    pub fn image(&self, entry: &Entry, section: &str, len: u64) -> Result<Arc<CachedImage>, MemoryError> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(image) = inner.images.get(&(entry.root, section.to_owned())) {
            return Ok(image.clone());
        }
        // An image that nobody uses and of which nothing is left is a memfd for nothing.
        inner.images.retain(|_, image| Arc::strong_count(image) > 1 || image.there.load(Ordering::Relaxed) > 0);
        let groups = len.max(1).div_ceil(GROUP as u64) as usize;
        let memory = Memory::memfd("farbus-bank-cache", len.max(1).next_multiple_of(PAGE as u64))?;
        let used = (0..groups).map(|_| AtomicBool::new(false)).collect();
        let held = RwLock::new(vec![Held::Absent; groups]);
        let image = Arc::new(CachedImage { len, memory, held, used, there: AtomicUsize::new(0) });
        inner.images.insert((entry.root, section.to_owned()), image.clone());
        Ok(image)
    }

    /// Bytes of a section of a machine whose groups it has, or would have.
    pub(super) fn len_of(&self, entry: &Entry, section: &str) -> Option<u64> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.images.get(&(entry.root, section.to_owned())).map(|image| image.len)
    }

    /// Takes a group, verified by the caller; `None`: it is zero. Others go where there is no room.
    ///
    /// # Errors
    /// The host's fault.
    pub fn insert(&self, image: &Arc<CachedImage>, group: usize, bytes: Option<&[u8]>) -> Result<(), MemoryError> {
        let Some(bytes) = bytes else {
            image.set(group, Held::Zero);
            return Ok(());
        };
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if image.held(group) != Held::Absent {
            return Ok(());
        }
        while inner.order.len() as u64 >= self.most {
            let Some((weak, old)) = inner.order.pop_front() else { break };
            let Some(other) = weak.upgrade() else { continue };
            if other.used.get(old).is_some_and(|used| used.swap(false, Ordering::Relaxed)) {
                inner.order.push_back((weak, old));
            } else {
                other.punch(old)?;
                self.evicted.fetch_add(1, Ordering::Relaxed);
            }
        }
        image.fill(group, bytes)?;
        inner.order.push_back((Arc::downgrade(image), group));
        Ok(())
    }

    /// Groups that are there.
    pub fn groups(&self) -> u64 {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).order.len() as u64
    }

    /// Images that are known.
    pub fn images(&self) -> usize {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).images.len()
    }

    /// Groups that went to make room.
    pub fn evicted(&self) -> u64 {
        self.evicted.load(Ordering::Relaxed)
    }
}

impl CachedImage {
    /// What is behind it, for private views.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Runs `place` with what is known of a group, which stays true meanwhile.
    pub fn with<R>(&self, group: usize, place: impl FnOnce(Held, &Memory) -> R) -> R {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        let state = held.get(group).copied().unwrap_or(Held::Absent);
        if state == Held::There {
            self.used[group].store(true, Ordering::Relaxed);
        }
        place(state, &self.memory)
    }

    /// What is known of a group.
    pub fn held(&self, group: usize) -> Held {
        self.held.read().unwrap_or_else(PoisonError::into_inner).get(group).copied().unwrap_or(Held::Absent)
    }

    fn set(&self, group: usize, state: Held) {
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = held.get_mut(group).filter(|held| **held == Held::Absent) {
            *held = state;
        }
    }

    fn fill(&self, group: usize, bytes: &[u8]) -> Result<(), MemoryError> {
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        let start = (group * GROUP) as u64;
        let room = self.memory.len().saturating_sub(start).min(bytes.len() as u64) as usize;
        self.memory.write(start, &bytes[..room])?;
        if let Some(held) = held.get_mut(group) {
            *held = Held::There;
            self.there.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Takes a group out, and gives its memory back.
    fn punch(&self, group: usize) -> Result<(), MemoryError> {
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        let start = (group * GROUP) as u64;
        let len = self.memory.len().saturating_sub(start).min(GROUP as u64);
        // First it is not there: a punch that fails half-way leaves zeros that nobody is answered with.
        if let Some(held) = held.get_mut(group).filter(|held| **held == Held::There) {
            *held = Held::Absent;
            self.there.fetch_sub(1, Ordering::Relaxed);
        }
        let Some((file, offset)) = self.memory.file() else { return Ok(()) };
        fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset + start, len)
            .map_err(|errno| MemoryError::Host { what: "take a group out of the cache", source: errno.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(n: u8) -> Entry {
        Entry { machine: "vm".to_owned(), number: 1, root: Root([n; 32]), len: 0 }
    }

    fn bytes_of(image: &CachedImage, group: usize) -> Option<Vec<u8>> {
        image.with(group, |held, memory| {
            let mut bytes = vec![0; GROUP];
            memory.read((group * GROUP) as u64, &mut bytes).unwrap();
            (held == Held::There).then_some(bytes)
        })
    }

    #[test]
    fn who_was_not_used_goes_first_and_what_is_there_is_what_was_put_there() {
        let cache = Cache::new(3 * GROUP as u64);
        let image = cache.image(&entry(1), "memory", 10 * GROUP as u64).unwrap();
        let other = cache.image(&entry(2), "memory", 10 * GROUP as u64).unwrap();
        for group in 0..3 {
            cache.insert(&image, group, Some(&[group as u8 + 1; GROUP])).unwrap();
        }
        assert_eq!(bytes_of(&image, 0), Some(vec![1; GROUP]));
        cache.insert(&other, 7, Some(&[9; GROUP])).unwrap();
        assert_eq!((image.held(0), image.held(1), image.held(2)), (Held::There, Held::Absent, Held::There));
        assert_eq!((bytes_of(&other, 7), bytes_of(&image, 1)), (Some(vec![9; GROUP]), None));
        assert_eq!((cache.groups(), cache.evicted()), (3, 1));
        cache.insert(&image, 5, None).unwrap();
        assert_eq!((image.held(5), cache.groups()), (Held::Zero, 3), "zeros take no room");
    }

    #[test]
    fn an_image_is_shared_and_goes_when_nobody_uses_it_and_nothing_of_it_is_left() {
        let cache = Cache::new(GROUP as u64);
        let image = cache.image(&entry(1), "memory", 100).unwrap();
        assert!(Arc::ptr_eq(&image, &cache.image(&entry(1), "memory", 100).unwrap()));
        assert!(!Arc::ptr_eq(&image, &cache.image(&entry(1), "disk0", 100).unwrap()));
        cache.insert(&image, 0, Some(&[5; PAGE])).unwrap();
        let second = cache.image(&entry(2), "memory", 100).unwrap();
        assert_eq!(cache.images(), 2, "the disk's went, in which nothing was");
        drop(image);
        let image = cache.image(&entry(1), "memory", 100).unwrap();
        assert_eq!(image.held(0), Held::There, "what nobody uses stays for who comes later");
        drop(image);
        // The only group that there is room for is another's now.
        cache.insert(&second, 0, Some(&[6; PAGE])).unwrap();
        assert_eq!((cache.groups(), cache.images()), (1, 2));
        let third = cache.image(&entry(3), "memory", 100).unwrap();
        assert_eq!(cache.images(), 2, "the first went");
        assert!(cache.image(&entry(1), "memory", 100).unwrap().held(0) == Held::Absent && third.held(0) == Held::Absent);
    }
}
