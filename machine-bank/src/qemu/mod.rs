//! QEMU's `mapped-ram` files: a machine saved into one file by a stock QEMU goes into a bank by its pages, and comes out as a file that QEMU resumes from.
//!
//! 140 MB that QEMU 11.1 wrote for a guest of 128 MiB are six RAM blocks, of which `pc.ram` becomes the section `pc.ram` and
//! `/rom@etc/acpi/tables` the section `rom_etc_acpi_tables`; all else, with the device state, becomes the section `qemu`.
//!
//! # What QEMU writes
//!
//! Numbers are big-endian. `QEVM`, a version of 4 bytes (3), the configuration (a byte 7, the machine type, and sections below it, of which one lists `mapped-ram`), and
//! the beginning of section `ram`: the bytes of all RAM blocks with flag 4, and then for each block its name, its length, and a header of 28
//! bytes: version 1, page size, where its bitmap is, where its pages are. The bitmap has one bit for each page, in words of 8 bytes; pages lie at multiples of
//! 1 MiB, each at its place, and the stream goes on behind them. A page whose bit is clear is zero, whatever the file has at its place.
//!
//! Source: QEMU's `docs/devel/migration/mapped-ram.rst`, `migration/ram.c` (`mapped_ram_setup_ramblock`, `ram_load_setup`) and `migration/savevm.c`;
//! held against files of QEMU 11.1.3. Whether multifd or direct IO wrote the file makes no difference to it.
//!
//! # What the bank keeps
//!
//! The section `qemu` (device state) is a header, padded with zeros to whole pages, and the file without the blocks' pages:
//!
//! ```text
//!    0  "FBQEMU1\n"
//!    8  u32 bytes of the header, a multiple of 4096; u16 blocks
//!   14  u64 bytes of the file
//!   22  for each block: section (a byte and a name), u64 where its pages are in the file, u64 bytes of them
//! ```
//!
//! numbers little-endian as in the rest of the bank. A withdrawn file has the same stream, the same bitmaps and the same pages, and is the same file byte for byte
//! unless QEMU wrote a page that was zero in the end, which a running guest can cause: such a place is a hole then.
//!
//! A machine whose memory is a file that QEMU shares (`memory-backend-file`, `share=on`) needs none of this: the file is a section `memory`, and the
//! stream that QEMU writes with `x-ignore-shared`, which has all but that memory, is a section `devices`.

mod kept;
mod saved;
mod source;
mod withdraw;

pub use kept::{Kept, KeptBlock, SECTION};
pub use saved::{Block, Refused, Saved};
pub use source::{BlockSource, RestSource};
pub use withdraw::{QemuError, QemuReport};
