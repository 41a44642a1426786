//! Pages and what they are called: 4 KiB, named by the BLAKE3 hash of their contents, keyed where tenants are kept apart.
//!
//! A page of 4096 bytes `0x41` is `PageId(7d0c…)` in every bank without a tenant key, wherever it was: in memory or on a disk. A page of zeros is
//! [`PageId::ZERO`], which names it without a hash and is never stored.

mod many;

use std::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use many::{LANES, Lanes};

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// Bytes of a tenant's key.
pub const KEY: usize = 32;

/// The contents of a page, named: 32 bytes of BLAKE3 over its 4096 bytes, or all zeros for the page of zeros.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(transparent)]
pub struct PageId(pub [u8; 32]);

impl PageId {
    /// The page of zeros. No other page has this name: that would be a preimage of 32 zero bytes.
    pub const ZERO: Self = Self([0; 32]);

    /// Whether this is the page of zeros.
    pub fn is_zero(&self) -> bool {
        *self == Self::ZERO
    }
}

impl fmt::Debug for PageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageId({})", hex(&self.0[..8]))
    }
}

impl fmt::Display for PageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

/// The name of a deposited machine: the hash of its manifest's head, from which every byte of it follows.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Root(pub [u8; 32]);

impl Root {
    /// From 64 hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<Self> {
        from_hex(text).map(Self)
    }
}

impl fmt::Display for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Root({})", hex(&self.0[..8]))
    }
}

/// How a bank hashes: plain BLAKE3 for pages, or keyed with what only a tenant knows, so that nobody else can ask whether a page is there.
#[derive(Clone)]
pub struct Identity {
    page_key: Option<[u8; KEY]>,
    lanes: Lanes,
    leaf_key: [u8; KEY],
    root_key: [u8; KEY],
    check: [u8; 32],
}

impl Identity {
    /// For a bank without a tenant key: `b3sum` of a page is its name.
    pub fn plain() -> Self {
        Self::derived(None, &[])
    }

    /// For a bank whose pages are named under `key`.
    pub fn keyed(key: &[u8; KEY]) -> Self {
        Self::derived(Some(blake3::derive_key("farbus machine bank 1 page", key)), key)
    }

    fn derived(page_key: Option<[u8; KEY]>, material: &[u8]) -> Self {
        Self {
            page_key,
            lanes: Lanes::new(page_key.as_ref()),
            leaf_key: blake3::derive_key("farbus machine bank 1 leaf", material),
            root_key: blake3::derive_key("farbus machine bank 1 root", material),
            check: blake3::derive_key("farbus machine bank 1 check", material),
        }
    }

    /// What a bank keeps to recognise its key by: it tells nothing about the key.
    pub fn check(&self) -> [u8; 32] {
        self.check
    }

    /// Whether a tenant's key is in it.
    pub fn is_keyed(&self) -> bool {
        self.page_key.is_some()
    }

    /// The name of a page's contents. `page` is [`PAGE`] bytes.
    pub fn page(&self, page: &[u8]) -> PageId {
        debug_assert_eq!(page.len(), PAGE, "a page has one length");
        if is_zero(page) {
            return PageId::ZERO;
        }
        self.hashed(page)
    }

    fn hashed(&self, page: &[u8]) -> PageId {
        PageId(match &self.page_key {
            None => *blake3::hash(page).as_bytes(),
            Some(key) => *blake3::keyed_hash(key, page).as_bytes(),
        })
    }

    /// The names of many pages, which takes less than half as long as one after the other. `names` gets as many.
    pub fn pages<'a>(&self, pages: impl IntoIterator<Item = &'a [u8; PAGE]>, names: &mut Vec<PageId>) {
        names.clear();
        let (mut batch, mut places, mut count) = ([&[0; PAGE]; LANES], [0; LANES], 0);
        for page in pages {
            if !is_zero(page) {
                (batch[count], places[count]) = (page, names.len());
                count += 1;
            }
            names.push(PageId::ZERO);
            if count == LANES {
                self.fill(&batch, &places, names);
                count = 0;
            }
        }
        self.fill(&batch[..count], &places[..count], names);
    }

    fn fill(&self, batch: &[&[u8; PAGE]], places: &[usize], names: &mut [PageId]) {
        // A few pages fill more lanes each for itself.
        if batch.len() < LANES / 2 {
            batch.iter().zip(places).for_each(|(page, place)| names[*place] = self.hashed(*page));
            return;
        }
        for (hash, place) in self.lanes.hash(batch).into_iter().zip(places) {
            names[*place] = PageId(hash);
        }
    }

    /// The hash of a leaf: of the names of its pages, zero pages included.
    pub fn leaf(&self, ids: &[PageId]) -> [u8; 32] {
        *blake3::keyed_hash(&self.leaf_key, ids.as_bytes()).as_bytes()
    }

    /// The hash of a manifest's head.
    pub fn root(&self, head: &[u8]) -> Root {
        Root(*blake3::keyed_hash(&self.root_key, head).as_bytes())
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.page_key.is_some() { "Identity(keyed)" } else { "Identity(plain)" })
    }
}

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Most pages that are not zero say so in their first bytes; the rest is compared by memcmp with itself, one byte apart.
    match bytes.split_first() {
        None => true,
        Some((first, rest)) => *first == 0 && rest == &bytes[..rest.len()],
    }
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]).filter_map(|digit| char::from_digit(digit.into(), 16)).collect()
}

/// A tenant's key as it is kept in a file: 32 bytes, or 64 lower-case hexadecimal digits on one line.
pub fn key_of(bytes: &[u8]) -> Option<[u8; KEY]> {
    let hex = std::str::from_utf8(bytes).ok().and_then(|text| from_hex::<KEY>(text.trim_ascii_end()));
    hex.or_else(|| bytes.try_into().ok())
}

/// `N` bytes from exactly 2 `N` lower-case hexadecimal digits.
pub fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let value = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = value(pair[0])? << 4 | value(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_named_by_its_contents_and_by_the_key_where_there_is_one() {
        let page = [0x41; PAGE];
        let plain = Identity::plain().page(&page);
        assert_eq!(plain.0, *blake3::hash(&page).as_bytes());
        let (ours, theirs) = (Identity::keyed(&[1; KEY]), Identity::keyed(&[2; KEY]));
        assert!(ours.page(&page) != plain && ours.page(&page) != theirs.page(&page));
        assert_eq!(ours.page(&[0; PAGE]), PageId::ZERO);
        assert!(ours.check() != theirs.check());
    }

    #[test]
    fn many_pages_have_the_names_that_each_has_alone() {
        let page = |n: usize| {
            let mut page = [0; PAGE];
            // Every fifth is zero.
            page[n * 37 % PAGE] = if n.is_multiple_of(5) { 0 } else { n as u8 };
            page
        };
        for identity in [Identity::plain(), Identity::keyed(&[1; KEY])] {
            for count in [0, 1, 7, 8, 15, 16, 17, 40, 100] {
                let pages: Vec<_> = (0..count).map(page).collect();
                let mut names = vec![PageId([9; 32]); 3];
                identity.pages(&pages, &mut names);
                let alone: Vec<_> = pages.iter().map(|page| identity.page(page)).collect();
                assert_eq!(names, alone, "{count} pages, {identity:?}");
            }
        }
    }

    #[test]
    fn zero_is_told_from_almost_zero() {
        let mut page = [0; PAGE];
        assert!(is_zero(&page) && is_zero(&[]));
        for at in [0, 1, 7, 8, 63, 64, 4095] {
            page[at] = 1;
            assert!(!is_zero(&page), "{at}");
            page[at] = 0;
        }
    }

    #[test]
    fn hexadecimal_digits_go_both_ways() {
        assert_eq!(from_hex::<3>("00ff1a"), Some([0, 255, 26]));
        assert_eq!(hex(&[0, 255, 26]), "00ff1a");
        for wrong in ["00ff1", "00ff1A", "00ff1g", "00ff1a00"] {
            assert_eq!(from_hex::<3>(wrong), None);
        }
    }
}
