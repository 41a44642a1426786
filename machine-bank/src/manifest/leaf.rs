//! A leaf: the names of 4,096 pages (16 MiB), in full or as what differs from the same leaf of another machine.
//!
//! A leaf with two pages that are not zero is a bitmap of 512 bytes and 64 bytes of names; one in which page 5 changed is `1, 0, 5` and a name:
//! 38 bytes, so a changed page costs 34.

use crate::codec::{Input, Malformed};
use crate::page::PageId;

/// Pages of a full leaf.
pub const LEAF: usize = 4096;

/// How a leaf is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// All pages are zero: no bytes.
    Zero,
    /// As in the base: no bytes.
    Same,
    /// All names, in `len` bytes of the manifest from `offset`.
    Full {
        /// From the manifest's beginning.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// What differs from the base.
    Delta {
        /// From the manifest's beginning.
        offset: u64,
        /// Bytes.
        len: u32,
    },
}

/// A leaf that is yet to be placed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encoded {
    /// All pages are zero.
    Zero,
    /// As in the base.
    Same,
    /// All names.
    Full(Vec<u8>),
    /// What differs from the base.
    Delta(Vec<u8>),
}

/// The shortest way to write `ids` down where the base's leaf is `base`.
pub fn encode(ids: &[PageId], base: Option<&[PageId]>) -> Encoded {
    let stored = ids.iter().filter(|id| !id.is_zero()).count();
    if stored == 0 {
        return Encoded::Zero;
    }
    let full_len = ids.len().div_ceil(8) + stored * 32;
    if let Some(base) = base.filter(|base| base.len() == ids.len()) {
        let differs =
            || ids.iter().zip(base).enumerate().filter(|(_, (new, old))| new != old).map(|(at, (new, _))| (at as u16, new));
        let (mut set, mut zeroed) = (0, 0);
        for (_, id) in differs() {
            if id.is_zero() { zeroed += 1 } else { set += 1 }
        }
        if set + zeroed == 0 {
            return Encoded::Same;
        }
        if 4 + set * 34 + zeroed * 2 < full_len {
            let mut bytes = Vec::with_capacity(4 + set * 34 + zeroed * 2);
            bytes.extend_from_slice(&(set as u16).to_le_bytes());
            bytes.extend_from_slice(&(zeroed as u16).to_le_bytes());
            differs().filter(|(_, id)| !id.is_zero()).for_each(|(at, _)| bytes.extend_from_slice(&at.to_le_bytes()));
            differs().filter(|(_, id)| id.is_zero()).for_each(|(at, _)| bytes.extend_from_slice(&at.to_le_bytes()));
            differs().filter(|(_, id)| !id.is_zero()).for_each(|(_, id)| bytes.extend_from_slice(&id.0));
            return Encoded::Delta(bytes);
        }
    }
    let mut bytes = vec![0; ids.len().div_ceil(8)];
    bytes.reserve(stored * 32);
    for (at, id) in ids.iter().enumerate().filter(|(_, id)| !id.is_zero()) {
        bytes[at / 8] |= 1 << (at % 8);
        bytes.extend_from_slice(&id.0);
    }
    Encoded::Full(bytes)
}

/// The names of a leaf of `pages` pages, written in full.
///
/// # Errors
/// It is not that, or names a page of zeros.
pub fn parse_full(bytes: &[u8], pages: usize) -> Result<Vec<PageId>, Malformed> {
    let mut input = Input::new(bytes);
    let bitmap = input.take(pages.div_ceil(8))?;
    if !pages.is_multiple_of(8) && bitmap.last().is_some_and(|last| last >> (pages % 8) != 0) {
        return Err(Malformed::Value("a page behind the end of a leaf", pages as u64));
    }
    let mut ids = Vec::with_capacity(pages);
    for at in 0..pages {
        ids.push(if bitmap[at / 8] >> (at % 8) & 1 == 1 { stored(&mut input)? } else { PageId::ZERO });
    }
    input.end()?;
    Ok(ids)
}

/// Changes `ids`, the base's, to what `bytes` say.
///
/// # Errors
/// It is no such leaf; `ids` may be changed in part.
pub fn apply_delta(bytes: &[u8], ids: &mut [PageId]) -> Result<(), Malformed> {
    let mut input = Input::new(bytes);
    let (set, zeroed) = (usize::from(input.u16()?), usize::from(input.u16()?));
    let set_at = input.take(set * 2)?.as_chunks::<2>().0;
    let zeroed_at = input.take(zeroed * 2)?.as_chunks::<2>().0;
    for at in zeroed_at {
        *page(ids, *at)? = PageId::ZERO;
    }
    for at in set_at {
        *page(ids, *at)? = stored(&mut input)?;
    }
    input.end()
}

fn page(ids: &mut [PageId], at: [u8; 2]) -> Result<&mut PageId, Malformed> {
    let at = u16::from_le_bytes(at);
    ids.get_mut(usize::from(at)).ok_or(Malformed::Value("a page behind the end of a leaf", at.into()))
}

fn stored(input: &mut Input<'_>) -> Result<PageId, Malformed> {
    let id = PageId(input.array()?);
    if id.is_zero() { Err(Malformed::Value("the name of a stored page", 0)) } else { Ok(id) }
}

/// The names that are written down in a leaf, without those that it takes from its base.
///
/// # Errors
/// It is no such leaf.
pub fn named(form: Form, bytes: &[u8], pages: usize) -> Result<Vec<PageId>, Malformed> {
    match form {
        Form::Zero | Form::Same => Ok(Vec::new()),
        Form::Full { .. } => {
            let mut ids = parse_full(bytes, pages)?;
            ids.retain(|id| !id.is_zero());
            Ok(ids)
        }
        Form::Delta { .. } => {
            let mut input = Input::new(bytes);
            let (set, zeroed) = (usize::from(input.u16()?), usize::from(input.u16()?));
            input.take((set + zeroed) * 2)?;
            let ids = (0..set).map(|_| stored(&mut input)).collect::<Result<Vec<_>, _>>()?;
            input.end()?;
            Ok(ids)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ids() -> impl Strategy<Value = Vec<PageId>> {
        proptest::collection::vec((0_u8..4).prop_map(|n| PageId([n; 32])), 1..70)
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_parsed(old in ids(), mut new in ids()) {
            new.resize(old.len(), PageId([3; 32]));
            for base in [None, Some(&old[..])] {
                let parsed = match encode(&new, base) {
                    Encoded::Zero => vec![PageId::ZERO; new.len()],
                    Encoded::Same => old.clone(),
                    Encoded::Full(bytes) => parse_full(&bytes, new.len()).unwrap(),
                    Encoded::Delta(bytes) => {
                        let mut ids = old.clone();
                        apply_delta(&bytes, &mut ids).unwrap();
                        ids
                    }
                };
                prop_assert_eq!(&parsed, &new);
            }
        }
    }

    #[test]
    fn a_changed_page_costs_34_bytes_and_one_that_became_zero_two() {
        let old = vec![PageId([1; 32]); LEAF];
        let mut new = old.clone();
        new[5] = PageId([2; 32]);
        new[4095] = PageId::ZERO;
        let Encoded::Delta(bytes) = encode(&new, Some(&old)) else { panic!("no delta") };
        assert_eq!(bytes.len(), 4 + 34 + 2);
        assert_eq!(encode(&old, Some(&old)), Encoded::Same);
        assert_eq!(encode(&[PageId::ZERO; 9], Some(&old[..9])), Encoded::Zero);
    }

    #[test]
    fn a_page_that_is_not_in_the_leaf_or_has_no_name_is_refused() {
        let mut ids = vec![PageId([1; 32]); 9];
        assert!(apply_delta(&[0, 0, 1, 0, 9, 0], &mut ids).is_err());
        assert!(apply_delta(&[0, 0, 1, 0, 8, 0], &mut ids).is_ok());
        assert!(apply_delta(&[&[1, 0, 0, 0, 0, 0][..], &[0; 32]].concat(), &mut ids).is_err());
        assert!(parse_full(&[0, 2], 9).is_err() && parse_full(&[0, 0], 9).is_ok() && parse_full(&[0, 0, 0], 9).is_err());
    }
}
