//! Lazy withdrawal: a machine runs at once, and its memory comes when it is used, every page verified before anybody can see it.
//!
//! `server.withdraw(&bank, &entry, Backing::Anonymous, LazyOptions::default())?.memory()` is 512 MiB of which nothing is there; the first read of
//! it waits for 64 KiB: some 40 us where the local cache has them, and a fetch, a decompression and sixteen hashes where only the store does.
//!
//! # Who does what
//!
//! The kernel tells faults by userfaultfd ([`Uffd`]). One handler thread ([`FaultServer`]) answers those that the [`Cache`] can; a pager thread for
//! each machine fetches the others, and in between the [`WorkingSet`] and the rest. A page is hashed when it comes from the store; in the cache it is
//! in memory that only this process writes.
//!
//! # Where pages come to lie
//!
//! Into anonymous memory and memfds groups are copied (UFFDIO_COPY). A private view of the cache's memfd ([`Backing::View`]) maps them
//! (UFFDIO_CONTINUE): machines of one image have one copy of what none of them wrote, and a write makes a page the writer's own. Pages of zeros are
//! mapped to the kernel's (UFFDIO_ZEROPAGE). One page is never both: who was there first stays, so that nothing that a machine wrote is overwritten.
//!
//! # What cannot be had
//!
//! A store that is away (a link that is down, an error of the disk, a server that does not answer) is waited for: whoever uses a page of it waits, it is asked
//! again after 10 ms and then more and more seldom, up to every 2 s, and [`LazyOptions::on_store`] is told that it is away and that it is back. That goes on for as
//! long as the machine is there, or until the limit of [`Patience`]. Meanwhile other machines are served, and this one too with what the cache has.
//!
//! What is proven to be damaged or lost, by a store that is there and was asked four times, is reported, and the use of those pages is a SIGBUS
//! (UFFDIO_POISON, Linux 6.6). An older kernel leaves whoever uses them waiting: to stop watching would answer with zeros, which is a wrong byte.
//!
//! # Clients that others wrote
//!
//! [`firecracker`] serves the memory of a Firecracker that loads a snapshot with a page-fault handler as its memory backend.
//!
//! # Limits
//!
//! A mapping has one userfaultfd, so a machine that is being withdrawn cannot have its writes tracked by another one. Memory in pages of 2 MiB is
//! not served. A machine's memory goes with its [`LazyMachine`]; that of another process keeps waiting, if it kept its descriptor open.

mod area;
mod away;
mod bits;
mod cache;
mod device;
pub mod firecracker;
mod image;
mod pager;
mod regions;
mod report;
mod served;
mod server;
mod state;
mod uffd;
mod waits;
mod working_set;

pub use area::Area;
pub(crate) use away::{Away, Unread, Waiting};
pub use away::{OnStore, Patience, StoreEvent};
pub(crate) use bits::Bits;
pub use cache::{Cache, CachedImage, Held};
pub(crate) use image::{Image, pages_of};
pub use regions::{MOST_REGIONS, Region, RegionError, Regions};
pub use report::{Failure, LazyReport, OnFailure};
pub use server::{Backing, FaultServer, LazyError, LazyMachine, LazyOptions};
pub use uffd::{Event, Features, PlaceError, Placed, Uffd, UffdError, Watch};
pub use working_set::{WorkingSet, WorkingSetError, section_name};
