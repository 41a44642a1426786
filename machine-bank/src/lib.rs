//! Machine Bank: virtual machines saved and re-instantiated by content. Memory, disks and device state go into a store in which every page is once.
//!
//! `bank.deposit("vm7", …)` for the second time stores what no machine in the bank has, and names the rest; `bank.withdraw(…)` writes any deposit to
//! files again, each page verified before it is written.
//!
//! # The format, version 1
//!
//! Numbers are little-endian. A **page** is 4096 bytes. Its name is BLAKE3 of them, 32 bytes; in a bank with a tenant key, keyed BLAKE3 under
//! `derive_key("farbus machine bank 1 page", key)`. The page of zeros is named by 32 zero bytes and never stored. Memory and disks share one space of names.
//!
//! A **group** is 1 to 16 new pages, in the order in which they were found: a byte `0` and the pages, or a byte `1` and one zstd frame of them, whichever
//! is shorter. A **pack** ([`pack`]) holds groups up to 8 MiB and their directory; it is written once and named by the directory's hash.
//!
//! A machine is a **manifest** ([`manifest`]): sections with a kind (memory, disk, device state, working set), a name and a length, each a list of
//! names of pages in **leaves** of 4096 (16 MiB). The head has a hash for each leaf; the hash of the head is the machine's **root**. A leaf is written in full,
//! or as what differs from the same leaf of a base. So the root says what the machine is, and the leaves may be written anew without changing it.
//!
//! An **index** ([`index`]) says in which pack each page is. It follows from the packs and is made again where it is damaged.
//!
//! Leaf and head are hashed by BLAKE3 keyed with `derive_key("farbus machine bank 1 leaf", key)` and `… root`, where `key` is empty without a tenant key.
//!
//! ## A worked example
//!
//! A machine `tiny` has a memory of three pages: `A` 4096 times, zeros, and `A` again. It is deposited at the millisecond 1,795,000,000,001, and once more
//! when page 2 has become zero. That is one pack and two manifests, which are golden files of the tests (`machine-bank/tests/golden`):
//!
//! ```text
//! pack 8015421f…, 117 bytes
//!    0  "FBPACK1\n"
//!    8  01                            zstd
//!    9  28 b5 2f fd 60 00 0f 4d …     a frame of 19 bytes: 4096 times "A"
//!   28  01 00 00 00                   directory: 1 group,
//!   32  14 00 00 00 01                    of 20 bytes, of 1 page,
//!   37  45 98 e0 01 cd 6e 4c 4f …         whose name this is
//!   69  29 00 00 00, 0                the directory has 41 bytes
//!   77  80 15 42 1f 56 2d 05 ee …     and this hash, of which half is the pack's name
//!  109  "FBPACKE\n"
//!
//! manifest tiny@00000001@a8831790…, 280 bytes
//!    0  "FBMACH1\n"
//!    8  05                            a leaf of 3 pages: 0 and 2 are not zero,
//!    9  45 98 …, 45 98 …                  and have these names
//!   73  01 00, 04 "tiny"              head: version 1, the machine,
//!   80  01 5e 56 ee a1 01 00 00           when,
//!   88  0 (32)                            no parent,
//!  120  01 00                             1 section:
//!  122  01, 06 "memory"                       memory, its name,
//!  130  00 30 00 00 …                         12288 bytes,
//!  138  3, 1, 0, 1, 1, 24                     pages, zero, as in the parent, known, new, bytes of the new ones (8 bytes each),
//!  186  bc f6 8e 6a …                         the hash of its leaf
//!  218  0 (32), 00                    table: no base, depth 0,
//!  251  02, 8, 65                         the leaf is full, in 65 bytes from byte 8
//!  264  145, 46, "FBMACHE\n"          bytes of head and table
//!
//! manifest tiny@00000002@100e9288…, 221 bytes
//!    8  00 00, 01 00, 02 00           the leaf: no page has another name, 1 became zero: page 2
//!   14  …                             head, with a8831790… as the parent
//!  159  a8 83 17 90 …, 01             table: rests on that one, depth 1,
//!  192  03, 8, 6                          the leaf is what differs, in 6 bytes from byte 8
//! ```
//!
//! # Who owns what
//!
//! [`Bank`] owns a [`Store`](store::Store) and says how pages are named. A [`Deposit`] owns the index while it adds to it; a
//! [`Withdrawal`] owns a manifest and a [`Reader`], which hands out pages by name, verified.
//! A [`lazy::FaultServer`] owns a cache and the threads that place them as they are used; a [`track::WriteTracker`] says what was written since.

pub mod archive;
pub mod bank;
pub mod cloud_hypervisor;
pub mod codec;
pub mod deposit;
pub mod index;
pub mod keep;
mod known;
pub mod lazy;
pub mod manifest;
pub mod pack;
pub mod page;
pub mod qemu;
pub mod reader;
pub mod remote;
pub mod socket;
pub mod store;
pub mod track;
pub mod withdraw;

pub use bank::{Bank, BankError};
pub use deposit::{Changes, Deposit, DepositOptions, FileSource, Parent, Source};
pub use manifest::{Entry, Manifest, SectionKind};
pub use page::{PAGE, PageId, Root};
pub use reader::Reader;
pub use withdraw::Withdrawal;
