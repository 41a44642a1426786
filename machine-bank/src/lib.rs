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
//! A machine `tiny` with a memory of three pages, `A` 4096 times, zeros, and `A` again, is one pack and one manifest. Both are golden files of the tests
//! (`machine-bank/tests/golden`):
//!
//! ```text
//! pack 1d6a…                                     manifest tiny@00000001@…
//!   0  "FBPACK1\n"                                 0  "FBMACH1\n"
//!   8  01, a zstd frame of 4096 x "A"              8  05                   pages 0 and 2 are not zero
//!  ..  1 group: its length, 1 page                 9  name of the A page, twice
//!  ..  name of the A page                         73  head: 1, "tiny", time, no parent, 1 section:
//!  ..  length of the directory, 0, its hash           memory "memory" of 12288 bytes, counts, 1 leaf hash
//!  ..  "FBPACKE\n"                                ..  table: no base, depth 0, leaf 0 is full: offset 8, 65 bytes
//!                                                 ..  lengths of head and table, "FBMACHE\n"
//! ```
//!
//! # Who owns what
//!
//! [`Bank`] owns a [`Store`](store::Store) and says how pages are named. A [`Deposit`] owns the index while it adds to it; a
//! [`Withdrawal`] owns a manifest and a [`Reader`], which is all that lazy withdrawal needs: pages by name, verified.

pub mod bank;
pub mod codec;
pub mod deposit;
pub mod index;
pub mod keep;
pub mod manifest;
pub mod pack;
pub mod page;
pub mod reader;
pub mod store;
pub mod withdraw;

pub use bank::{Bank, BankError};
pub use deposit::{Changes, Deposit, DepositOptions, FileSource, Parent, Source};
pub use manifest::{Entry, Manifest, SectionKind};
pub use page::{PAGE, PageId, Root};
pub use reader::Reader;
pub use withdraw::Withdrawal;
