//! A `mapped-ram` file as QEMU wrote it, or as anybody did: where its blocks' pages and bitmaps are, everything bounds-checked.
//!
//! `Saved::open(&file)?.blocks()[0]` is `pc.ram`, 134,217,728 bytes at byte 1,048,576, of which a bitmap of 4,096 bytes at byte 139 says what is not zero.

use std::fmt;
use std::io;

use thiserror::Error;

use super::kept::{Kept, KeptBlock, section_name};
use crate::deposit::Source;
use crate::manifest::head::{MOST_BYTES, MOST_SECTIONS};
use crate::page::PAGE;

const MAGIC: u32 = 0x5145_564d;
const VERSION: u32 = 3;
const CONFIGURATION: u8 = 7;
const SUBSECTION: u8 = 5;
const COMMAND: u8 = 8;
const SECTION_START: u8 = 1;
/// Bits of a RAM record that are flags, and those that are met here.
const FLAGS: u64 = 0xfff;
const MEM_SIZE: u64 = 4;
const EOS: u64 = 0x10;
const MULTIFD_FLUSH: u64 = 0x200;
const HEADER_VERSION: u32 = 1;
/// Sizes of a page that a target of QEMU has.
const PAGE_SIZES: std::ops::RangeInclusive<u64> = PAGE as u64..=1 << 16;
/// Blocks at most, so that the machine has sections left for its disks.
const MOST_BLOCKS: usize = MOST_SECTIONS - 32;
/// Names of capabilities and commands before the memory at most.
const MOST_WORDS: u32 = 64;

/// Why a file is no saved machine that can be deposited.
#[derive(Debug, Error)]
pub enum Refused {
    /// It cannot be read.
    #[error("it cannot be read: {0}")]
    Source(#[from] io::Error),
    /// It ends too early.
    #[error("it ends at byte {0}, where more should come")]
    Ends(u64),
    /// It is something else.
    #[error("it is no file that QEMU saved a machine to")]
    Magic,
    /// A version that is not known.
    #[error("{0} has version {1}, and {2} is read")]
    Version(&'static str, u32, u32),
    /// It was saved as a stream.
    #[error("its memory was saved as a stream, without the capability mapped-ram")]
    Stream,
    /// Something comes before the memory that cannot be stepped over.
    #[error("{0} comes before its memory, which is not read")]
    Unknown(String),
    /// A value that makes no sense.
    #[error("{0} is {1:#x}")]
    Value(&'static str, u64),
    /// There are too many.
    #[error("it has more than {MOST_BLOCKS} blocks of memory")]
    Blocks,
}

/// A block of memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// What QEMU calls it: `pc.ram`.
    pub name: String,
    /// What the bank calls it.
    pub section: String,
    /// Bytes.
    pub len: u64,
    /// Bytes of a page, a power of two of at least 4096.
    pub page_size: u64,
    /// Where its pages begin in the file, a multiple of 4096.
    pub pages_at: u64,
    /// Bit `i % 8` of byte `i / 8`: whether page `i` is in the file.
    pub bitmap: Vec<u8>,
}

/// A file that was looked through.
pub struct Saved<'a> {
    source: &'a dyn Source,
    blocks: Vec<Block>,
    kept: Kept,
}

impl<'a> Saved<'a> {
    /// Looks a file through up to the end of its list of blocks.
    ///
    /// # Errors
    /// See [`Refused`].
    pub fn open(source: &'a dyn Source) -> Result<Self, Refused> {
        let mut stream = Stream { source, at: 0 };
        if stream.u32().map_err(|_| Refused::Magic)? != MAGIC {
            return Err(Refused::Magic);
        }
        let version = stream.u32()?;
        if version != VERSION {
            return Err(Refused::Version("the stream", version, VERSION));
        }
        let ignores_shared = stream.up_to_memory()?;
        let blocks = stream.blocks(ignores_shared)?;
        let kept = blocks.iter().map(|block| KeptBlock { section: block.section.clone(), at: block.pages_at, len: block.len });
        let kept = Kept::new(source.len(), kept.collect()).map_err(|_| Refused::Value("the length of the file", source.len()))?;
        Ok(Self { source, blocks, kept })
    }

    /// The file.
    pub fn source(&self) -> &'a dyn Source {
        self.source
    }

    /// Its blocks of memory, in the order in which they lie.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// How the rest of it is kept.
    pub fn kept(&self) -> &Kept {
        &self.kept
    }
}

impl fmt::Debug for Saved<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Saved").field("kept", &self.kept).finish_non_exhaustive()
    }
}

/// The stream, from some place on.
struct Stream<'a> {
    source: &'a dyn Source,
    at: u64,
}

impl Stream<'_> {
    fn take(&mut self, len: usize) -> Result<Vec<u8>, Refused> {
        let end =
            self.at.checked_add(len as u64).filter(|end| *end <= self.source.len()).ok_or(Refused::Ends(self.source.len()))?;
        let mut bytes = vec![0; len];
        self.source.read_at(self.at, &mut bytes)?;
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Refused> {
        let mut array = [0; N];
        array.copy_from_slice(&self.take(N)?);
        Ok(array)
    }

    fn u8(&mut self) -> Result<u8, Refused> {
        self.array().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Result<u16, Refused> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, Refused> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, Refused> {
        self.array().map(u64::from_be_bytes)
    }

    /// A length of one byte, and as much text.
    fn text(&mut self) -> Result<String, Refused> {
        let len = self.u8()?;
        Ok(String::from_utf8_lossy(&self.take(len.into())?).into_owned())
    }

    /// Goes on to the records of section `ram`; whether blocks say at which address they are (`x-ignore-shared`).
    fn up_to_memory(&mut self) -> Result<bool, Refused> {
        let mut capabilities = None;
        let mut kind = self.u8()?;
        if kind == CONFIGURATION {
            (capabilities, kind) = self.configuration()?;
        }
        let mut commands = 0;
        while kind == COMMAND && commands < MOST_WORDS {
            self.u16()?;
            let len = self.u16()?;
            self.take(len.into())?;
            kind = self.u8()?;
            commands += 1;
        }
        if capabilities.as_ref().is_some_and(|all| !all.iter().any(|name| name == "mapped-ram")) {
            return Err(Refused::Stream);
        }
        if kind > COMMAND {
            return Err(Refused::Value("the kind of a section", kind.into()));
        }
        self.u32()?;
        let name = self.text()?;
        if kind != SECTION_START || name != "ram" {
            return Err(Refused::Unknown(format!("section {name:?}")));
        }
        self.u32()?;
        let version = self.u32()?;
        if version != 4 {
            return Err(Refused::Version("the memory", version, 4));
        }
        Ok(capabilities.is_some_and(|all| all.iter().any(|name| name == "x-ignore-shared")))
    }

    /// The capabilities that the configuration lists, if it does, and the kind of what follows it.
    fn configuration(&mut self) -> Result<(Option<Vec<String>>, u8), Refused> {
        let len = self.u32()?;
        if len > 255 {
            return Err(Refused::Value("the length of the machine's type", len.into()));
        }
        self.take(len as usize)?;
        // QEMU lists none where none is on, so a list that is missing is an empty one.
        let mut capabilities = Vec::new();
        loop {
            let kind = self.u8()?;
            if kind != SUBSECTION {
                return Ok((Some(capabilities), kind));
            }
            let name = self.text()?;
            self.u32()?;
            match name.as_str() {
                "configuration/target-page-bits" => _ = self.u32()?,
                "configuration/uuid" => _ = self.array::<16>()?,
                "configuration/capabilities" => {
                    let count = self.u32()?;
                    if count > MOST_WORDS {
                        return Err(Refused::Value("the number of capabilities", count.into()));
                    }
                    for _ in 0..count {
                        capabilities.push(self.text()?);
                    }
                }
                _ => return Err(Refused::Unknown(format!("{name:?}"))),
            }
        }
    }

    fn blocks(&mut self, ignores_shared: bool) -> Result<Vec<Block>, Refused> {
        let size = self.u64()?;
        if size & FLAGS != MEM_SIZE {
            return Err(Refused::Value("the first record of its memory", size));
        }
        let mut left = size & !FLAGS;
        if left > MOST_BYTES {
            return Err(Refused::Value("the bytes of its memory", left));
        }
        let (mut blocks, mut seen) = (Vec::<Block>::new(), 0);
        while left > 0 {
            seen += 1;
            if seen > MOST_BLOCKS {
                return Err(Refused::Blocks);
            }
            let (name, len) = (self.text()?, self.u64()?);
            left = left.checked_sub(len).filter(|_| len > 0).ok_or(Refused::Value("the length of a block", len))?;
            if ignores_shared {
                self.u64()?;
            }
            if let Some(block) = self.block(name, len, ignores_shared, &blocks)? {
                blocks.push(block);
            }
        }
        let end = self.u64()?;
        if end != EOS && end != MULTIFD_FLUSH {
            return Err(Refused::Value("the record behind the blocks", end));
        }
        Ok(blocks)
    }

    /// The header of a block, and over its pages; `None` is one that was not saved because it is shared.
    fn block(&mut self, name: String, len: u64, ignores_shared: bool, others: &[Block]) -> Result<Option<Block>, Refused> {
        let (version, page_size, bitmap_at, pages_at) = (self.u32()?, self.u64()?, self.u64()?, self.u64()?);
        if version != HEADER_VERSION {
            return Err(Refused::Version("a block of memory", version, HEADER_VERSION));
        }
        if !page_size.is_power_of_two() || !PAGE_SIZES.contains(&page_size) {
            return Err(Refused::Value("the size of a page", page_size));
        }
        if ignores_shared && bitmap_at == 0 && pages_at == 0 {
            return Ok(None);
        }
        if !len.is_multiple_of(page_size) {
            return Err(Refused::Value("the length of a block", len));
        }
        let bitmap_len = (len / page_size).div_ceil(64) * 8;
        let bitmap_end = bitmap_at.checked_add(bitmap_len).filter(|_| bitmap_at >= self.at);
        let bitmap_end = bitmap_end.ok_or(Refused::Value("the place of a bitmap", bitmap_at))?;
        if pages_at < bitmap_end || !pages_at.is_multiple_of(PAGE as u64) {
            return Err(Refused::Value("the place of a block's pages", pages_at));
        }
        let end = pages_at.checked_add(len).filter(|end| *end <= self.source.len()).ok_or(Refused::Ends(self.source.len()))?;
        // Its length is at most 128 MiB, because that of all blocks is bounded.
        let bitmap = Stream { source: self.source, at: bitmap_at }.take(bitmap_len as usize)?;
        let section = section_name(&name, &|taken| others.iter().any(|block| block.section == taken));
        self.at = end;
        Ok(Some(Block { name, section, len, page_size, pages_at, bitmap }))
    }
}
