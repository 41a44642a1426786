//! Counts allocations of the calling thread, so that "none per operation" is a measurement.
//!
//! A binary installs `#[global_allocator] static ALLOCATOR: CountingAllocator = CountingAllocator;` and compares `allocations_here()`
//! before and after a million reads: the difference is 0, or there is a bug.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// Const and without a destructor: reading it can neither allocate nor fail.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, with a count per thread of everything that was allocated or reallocated.
#[derive(Clone, Copy, Debug, Default)]
pub struct CountingAllocator;

// SAFETY: every call goes to `System` with the arguments that the caller vouched for; counting touches no memory of the allocator.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise on `layout` is passed on unchanged.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as in `alloc`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: `old` came from `System`, because every method here asks it; the rest is the caller's promise.
        unsafe { System.realloc(old, layout, new_size) }
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        // SAFETY: as in `realloc`.
        unsafe { System.dealloc(old, layout) }
    }
}

#[inline]
fn count() {
    ALLOCATIONS.with(|allocations| allocations.set(allocations.get().wrapping_add(1)));
}

/// Allocations and reallocations of the calling thread so far; stays 0 in a program that did not install [`CountingAllocator`].
pub fn allocations_here() -> u64 {
    ALLOCATIONS.with(Cell::get)
}
