//! What a bank keeps of a `mapped-ram` file beside its blocks of memory: a header that says where these were, and everything around them.
//!
//! Of a file of 140,591,542 bytes with blocks from 0x100000, 0x8200000 and four more, 5.9 MB are kept, of which 82 KB are not zero.

use crate::codec::{Input, Malformed, put_text};
use crate::manifest::head::{MOST_BYTES, MOST_SECTIONS};
use crate::manifest::valid_machine;
use crate::page::{PAGE, hex};

/// What the section is called.
pub const SECTION: &str = "qemu";
const MAGIC: &[u8; 8] = b"FBQEMU1\n";
/// Bytes before the list of blocks.
const FIXED: usize = 8 + 4 + 2 + 8;
/// Bytes of the longest header: a name, two numbers and a length for each block.
const MOST_HEADER: usize = (FIXED + MOST_SECTIONS * (1 + 64 + 16)).next_multiple_of(PAGE);

/// Where a block of memory was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptBlock {
    /// Its section.
    pub section: String,
    /// Where its pages begin in the file, a multiple of 4096.
    pub at: u64,
    /// Bytes of them, a multiple of 4096.
    pub len: u64,
}

/// The header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    file_len: u64,
    blocks: Vec<KeptBlock>,
}

impl Kept {
    /// Of a file of `file_len` bytes.
    ///
    /// # Errors
    /// The blocks overlap, are out of order, too many, or reach behind its end.
    pub fn new(file_len: u64, blocks: Vec<KeptBlock>) -> Result<Self, Malformed> {
        if file_len > MOST_BYTES * 2 {
            return Err(Malformed::Value("the length of a file", file_len));
        }
        if blocks.len() > MOST_SECTIONS {
            return Err(Malformed::Value("the number of blocks", blocks.len() as u64));
        }
        let (mut end, page) = (0, PAGE as u64);
        for (at, block) in blocks.iter().enumerate() {
            let fits = block.at >= end && block.at.is_multiple_of(page) && block.len > 0 && block.len.is_multiple_of(page);
            end = block
                .at
                .checked_add(block.len)
                .filter(|end| fits && *end <= file_len)
                .ok_or(Malformed::Value("the place of a block", block.at))?;
            if blocks[..at].iter().any(|other| other.section == block.section) {
                return Err(Malformed::Value("the number of blocks of one name", 2));
            }
        }
        Ok(Self { file_len, blocks })
    }

    /// Bytes of the file.
    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    /// The blocks, in the order in which they lie.
    pub fn blocks(&self) -> &[KeptBlock] {
        &self.blocks
    }

    /// The header as it is stored.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&(self.header_len() as u32).to_le_bytes());
        out.extend_from_slice(&(self.blocks.len() as u16).to_le_bytes());
        out.extend_from_slice(&self.file_len.to_le_bytes());
        for block in &self.blocks {
            put_text(&mut out, &block.section);
            out.extend_from_slice(&block.at.to_le_bytes());
            out.extend_from_slice(&block.len.to_le_bytes());
        }
        out.resize(self.header_len(), 0);
        out
    }

    /// Bytes of the header.
    pub fn header_len(&self) -> usize {
        (FIXED + self.blocks.iter().map(|block| 1 + block.section.len() + 16).sum::<usize>()).next_multiple_of(PAGE)
    }

    /// How many bytes a header has that begins with these.
    ///
    /// # Errors
    /// It is none.
    pub fn announced(first: &[u8; PAGE]) -> Result<usize, Malformed> {
        let mut input = Input::new(first);
        if input.array::<8>()? != *MAGIC {
            return Err(Malformed::Magic("section that a QEMU file was kept in"));
        }
        let len = input.u32()?;
        usize::try_from(len)
            .ok()
            .filter(|len| (PAGE..=MOST_HEADER).contains(len) && len.is_multiple_of(PAGE))
            .ok_or(Malformed::Value("the length of a header", len.into()))
    }

    /// From what [`Kept::encode`] made.
    ///
    /// # Errors
    /// It is something else.
    pub fn parse(header: &[u8]) -> Result<Self, Malformed> {
        let announced = Self::announced(header.first_chunk().ok_or(Malformed::Ends)?)?;
        let mut input = Input::new(header);
        input.take(12)?;
        let (count, file_len) = (input.u16()?, input.u64()?);
        if usize::from(count) > MOST_SECTIONS {
            return Err(Malformed::Value("the number of blocks", count.into()));
        }
        let mut blocks = Vec::with_capacity(count.into());
        for _ in 0..count {
            let section = input.text()?;
            if !valid_machine(section) {
                return Err(Malformed::Value("a name's length", section.len() as u64));
            }
            blocks.push(KeptBlock { section: section.to_owned(), at: input.u64()?, len: input.u64()? });
        }
        let kept = Self::new(file_len, blocks)?;
        if header.len() != announced || kept.header_len() != announced || !crate::page::is_zero(input.take(input.left())?) {
            return Err(Malformed::Value("the length of a header", announced as u64));
        }
        Ok(kept)
    }

    /// Bytes of the section.
    pub fn len(&self) -> u64 {
        self.header_len() as u64 + self.file_len - self.blocks.iter().map(|block| block.len).sum::<u64>()
    }

    /// Never: there is a header.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Where in the file byte `offset` of the section is, and how many follow it there; the header's bytes, and what is behind the end, are nowhere.
    pub fn place(&self, offset: u64) -> Option<(u64, u64)> {
        let mut at = offset.checked_sub(self.header_len() as u64).filter(|_| offset < self.len())?;
        for block in &self.blocks {
            if at < block.at {
                return Some((at, block.at - at));
            }
            at += block.len;
        }
        Some((at, self.file_len - at))
    }
}

/// What a block's section is called: its name with `_` for what a name cannot have, and with a part of its hash where that is another's.
pub(super) fn section_name(name: &str, taken: &dyn Fn(&str) -> bool) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let plain: String = name.chars().map(plain).collect();
    let plain = plain.trim_start_matches(['.', '-', '_']);
    if valid_machine(plain) && plain != SECTION && !taken(plain) {
        return plain.to_owned();
    }
    // Names of one file that are the same have the same hash: then a number is what tells them apart.
    let start: String = plain.chars().take(40).collect();
    let hash = hex(&blake3::hash(name.as_bytes()).as_bytes()[..4]);
    (0_u32..).map(|number| format!("block-{start}-{hash}{number:x}")).find(|name| !taken(name)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept() -> Kept {
        let block = |section: &str, at, len| KeptBlock { section: section.to_owned(), at, len };
        Kept::new(0x4_1234, vec![block("pc.ram", 0x1000, 0x1_0000), block("pc.bios", 0x2_0000, 0x2000)]).unwrap()
    }

    #[test]
    fn a_header_comes_back_and_one_that_is_changed_does_not() {
        let bytes = kept().encode();
        assert_eq!(Kept::parse(&bytes), Ok(kept()));
        assert_eq!(bytes[..22], *b"FBQEMU1\n\x00\x10\x00\x00\x02\x00\x34\x12\x04\x00\x00\x00\x00\x00");
        assert!(Kept::parse(&bytes[..4095]).is_err() && Kept::parse(&[&bytes[..], &[0; PAGE]].concat()).is_err());
        for at in [0, 8, 11, 12, 200, 4095] {
            let mut wrong = bytes.clone();
            wrong[at] ^= 0x80;
            assert!(Kept::parse(&wrong).is_err(), "byte {at}");
        }
    }

    #[test]
    fn blocks_that_overlap_or_reach_out_are_refused() {
        let block = |section: &str, at, len| KeptBlock { section: section.to_owned(), at, len };
        for wrong in [
            vec![block("a", 0, 0x2000), block("b", 0x1000, 0x1000)],
            vec![block("a", 0x2000, 0x1000), block("b", 0, 0x1000)],
            vec![block("a", 0, 0x1000), block("a", 0x1000, 0x1000)],
            vec![block("a", 0, 0x1_1000)],
            vec![block("a", u64::MAX - 0xfff, 0x1000)],
            vec![block("a", 5, 0x1000)],
            vec![block("a", 0, 0)],
        ] {
            assert!(Kept::new(0x1_0000, wrong.clone()).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_rest_is_the_file_without_the_blocks() {
        let kept = kept();
        assert_eq!(kept.len(), 4096 + 0x4_1234 - 0x1_2000);
        assert_eq!((kept.place(0), kept.place(4095)), (None, None));
        assert_eq!(kept.place(4096), Some((0, 0x1000)));
        assert_eq!(kept.place(4096 + 0x1000), Some((0x1_1000, 0xf000)));
        assert_eq!(kept.place(4096 + 0x1_0000), Some((0x2_2000, 0x4_1234 - 0x2_2000)));
        assert_eq!((kept.place(kept.len() - 1), kept.place(kept.len())), (Some((0x4_1233, 1)), None));
    }

    #[test]
    fn blocks_get_names_that_sections_can_have() {
        let none = |_: &str| false;
        assert_eq!(section_name("pc.ram", &none), "pc.ram");
        assert_eq!(section_name("/rom@etc/acpi/tables", &none), "rom_etc_acpi_tables");
        assert_eq!(section_name("0000:00:02.0/vga.vram", &none), "0000_00_02.0_vga.vram");
        for hard in ["", "qemu", "//", "ä", &"x".repeat(255)] {
            let name = section_name(hard, &none);
            assert!(valid_machine(&name) && name.starts_with("block-"), "{hard:?}: {name:?}");
            assert_ne!(section_name(hard, &|taken| taken == name), name);
        }
        assert_ne!(section_name("a/b", &|taken| taken == "a_b"), "a_b");
    }
}
