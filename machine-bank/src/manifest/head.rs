//! A manifest's head: everything about a machine except the names of its pages, for which it has one hash for each leaf; its own hash is the root.
//!
//! The head of `vm7` with 512 MiB of memory and a disk of as much is some 2.2 KB: a name, a time, a parent, two sections with 32 leaves each.
//! Whoever knows the root can tell whether head, leaves and pages are what was deposited, whoever keeps them.

use serde::Serialize;

use super::leaf::LEAF;
use crate::codec::{Input, Malformed, put_text};
use crate::page::{PAGE, Root};

/// The version that is written and read.
pub const VERSION: u16 = 1;
/// Sections of a machine at most.
pub const MOST_SECTIONS: usize = 256;
/// Bytes of a section at most: 4 TiB.
pub const MOST_BYTES: u64 = 1 << 42;
/// Bytes of a head at most.
pub const MOST_HEAD: usize = 64 << 20;

/// What a section is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SectionKind {
    /// Guest memory; byte 0 is guest-physical address 0, or where the VMM's own layout begins.
    Memory,
    /// A disk image, raw.
    Disk,
    /// What the VMM and the functions keep, in their own formats.
    DeviceState,
    /// Which pages a machine needs first.
    WorkingSet,
}

impl SectionKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Memory, Self::Disk, Self::DeviceState, Self::WorkingSet];

    fn code(self) -> u8 {
        match self {
            Self::Memory => 1,
            Self::Disk => 2,
            Self::DeviceState => 3,
            Self::WorkingSet => 4,
        }
    }

    fn from_code(code: u8) -> Result<Self, Malformed> {
        Self::ALL.into_iter().find(|kind| kind.code() == code).ok_or(Malformed::Value("a section's kind", code.into()))
    }
}

/// What became of a section's pages, for statistics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Pages in all.
    pub pages: u64,
    /// Pages of zeros, which are named only.
    pub zero: u64,
    /// Not zero, and as the parent had them at the same place.
    pub position: u64,
    /// Not zero, and in the bank already.
    pub content: u64,
    /// Stored by this deposit.
    pub new: u64,
    /// Bytes that the new ones took, compressed.
    pub new_bytes: u64,
}

impl Counts {
    /// Both.
    pub fn add(&mut self, other: &Self) {
        let Self { pages, zero, position, content, new, new_bytes } = other;
        for (sum, more) in [
            (&mut self.pages, pages),
            (&mut self.zero, zero),
            (&mut self.position, position),
            (&mut self.content, content),
            (&mut self.new, new),
            (&mut self.new_bytes, new_bytes),
        ] {
            *sum = sum.saturating_add(*more);
        }
    }
}

/// A section: its length and the hashes of its leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// What it is.
    pub kind: SectionKind,
    /// What it is called: `memory`, `disk0`.
    pub name: String,
    /// Bytes; the last page is filled up with zeros.
    pub len: u64,
    /// What became of its pages.
    pub counts: Counts,
    /// The hashes of its leaves.
    pub leaves: Vec<[u8; 32]>,
}

impl Section {
    /// Pages of it.
    pub fn pages(&self) -> u64 {
        pages(self.len)
    }

    /// Pages of leaf `leaf`, which is below the number of leaves.
    pub fn pages_of(&self, leaf: usize) -> usize {
        pages_of(self.len, leaf)
    }
}

/// Pages of `len` bytes.
pub fn pages(len: u64) -> u64 {
    len.div_ceil(PAGE as u64)
}

/// Leaves of `len` bytes, which are at most [`MOST_BYTES`].
pub fn leaves(len: u64) -> usize {
    pages(len).div_ceil(LEAF as u64) as usize
}

/// Pages of leaf `leaf` of `len` bytes.
pub fn pages_of(len: u64, leaf: usize) -> usize {
    pages(len).saturating_sub(leaf as u64 * LEAF as u64).min(LEAF as u64) as usize
}

/// Everything about a machine but the names of its pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The machine's name.
    pub machine: String,
    /// When it was deposited, in milliseconds since 1970.
    pub created_ms: u64,
    /// The deposit that it was compared with.
    pub parent: Option<Root>,
    /// Its sections.
    pub sections: Vec<Section>,
}

impl Head {
    /// As it is stored and hashed.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&VERSION.to_le_bytes());
        put_text(&mut out, &self.machine);
        out.extend_from_slice(&self.created_ms.to_le_bytes());
        out.extend_from_slice(&self.parent.map_or([0; 32], |root| root.0));
        out.extend_from_slice(&(self.sections.len() as u16).to_le_bytes());
        for section in &self.sections {
            out.push(section.kind.code());
            put_text(&mut out, &section.name);
            out.extend_from_slice(&section.len.to_le_bytes());
            let Counts { pages, zero, position, content, new, new_bytes } = section.counts;
            [pages, zero, position, content, new, new_bytes].iter().for_each(|count| out.extend_from_slice(&count.to_le_bytes()));
            section.leaves.iter().for_each(|hash| out.extend_from_slice(hash));
        }
        out
    }

    /// From what [`Head::encode`] made.
    ///
    /// # Errors
    /// It is something else, or of another version.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut input = Input::new(bytes);
        let version = input.u16()?;
        if version != VERSION {
            return Err(Malformed::Version(version, VERSION));
        }
        let machine = name(&mut input)?;
        let created_ms = input.u64()?;
        let parent = input.array::<32>()?;
        let count = usize::from(input.u16()?);
        if count > MOST_SECTIONS {
            return Err(Malformed::Value("the number of sections", count as u64));
        }
        let mut sections: Vec<Section> = Vec::with_capacity(count);
        for _ in 0..count {
            let section = section(&mut input)?;
            if sections.iter().any(|other| other.name == section.name) {
                return Err(Malformed::Value("the number of sections of one name", 2));
            }
            sections.push(section);
        }
        input.end()?;
        Ok(Self { machine, created_ms, parent: (parent != [0; 32]).then_some(Root(parent)), sections })
    }
}

fn section(input: &mut Input<'_>) -> Result<Section, Malformed> {
    let kind = SectionKind::from_code(input.u8()?)?;
    let name = name(input)?;
    let len = input.u64()?;
    if len > MOST_BYTES {
        return Err(Malformed::Value("a section's length", len));
    }
    let mut counts = [0; 6];
    for count in &mut counts {
        *count = input.u64()?;
    }
    let [pages, zero, position, content, new, new_bytes] = counts;
    let hashes = input.take(leaves(len) * 32)?.as_chunks::<32>().0.to_vec();
    Ok(Section { kind, name, len, counts: Counts { pages, zero, position, content, new, new_bytes }, leaves: hashes })
}

fn name(input: &mut Input<'_>) -> Result<String, Malformed> {
    let text = input.text()?;
    if valid_machine(text) { Ok(text.to_owned()) } else { Err(Malformed::Value("a name's length", text.len() as u64)) }
}

/// Whether a machine or a section can be called that: 1 to 64 letters, digits, `.`, `_` and `-`, not beginning with `.` or `-`.
pub fn valid_machine(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && !name.starts_with(['.', '-'])
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head() -> Head {
        let section = |kind, name: &str, len| Section {
            kind,
            name: name.to_owned(),
            len,
            counts: Counts { pages: 1, new: 1, new_bytes: 9, ..Counts::default() },
            leaves: vec![[7; 32]; leaves(len)],
        };
        Head {
            machine: "vm7".to_owned(),
            created_ms: 1_795_000_000_000,
            parent: Some(Root([9; 32])),
            sections: vec![section(SectionKind::Memory, "memory", 17 << 20), section(SectionKind::DeviceState, "devices", 1)],
        }
    }

    #[test]
    fn a_head_comes_back_and_one_that_is_cut_or_goes_on_does_not() {
        let bytes = head().encode();
        assert_eq!(Head::parse(&bytes), Ok(head()));
        for len in 0..bytes.len() {
            assert!(Head::parse(&bytes[..len]).is_err(), "{len} bytes");
        }
        assert_eq!(Head::parse(&[&bytes[..], &[0]].concat()), Err(Malformed::Trailing(1)));
        assert_eq!(Head::parse(&[2, 0]), Err(Malformed::Version(2, 1)));
    }

    #[test]
    fn names_and_lengths_that_cannot_be_are_refused() {
        for change in [
            |head: &mut Head| head.machine = "../x".to_owned(),
            |head: &mut Head| head.sections[1].name = "memory".to_owned(),
            |head: &mut Head| head.sections[1].name = String::new(),
            |head: &mut Head| head.sections[0].leaves.truncate(1),
            |head: &mut Head| head.sections[1].len = MOST_BYTES + 1,
        ] {
            let mut head = head();
            change(&mut head);
            assert!(Head::parse(&head.encode()).is_err(), "{head:?}");
        }
    }

    #[test]
    fn pages_and_leaves_are_counted_up() {
        assert_eq!((pages(0), pages(1), pages(4097)), (0, 1, 2));
        assert_eq!((leaves(0), leaves(16 << 20), leaves((16 << 20) + 1)), (0, 1, 2));
        assert_eq!((pages_of((16 << 20) + 1, 0), pages_of((16 << 20) + 1, 1), pages_of(1, 1)), (4096, 1, 0));
    }
}
