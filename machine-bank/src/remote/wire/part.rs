//! What the larger answers are made of: listings of objects, and parts of fetched pages with their tables.
//!
//! A part with pages 0 and 4095 in one group of 3 bytes is a table of 20 bytes and the group behind it.

use super::reserved;
use crate::codec::{Input, Malformed, put_text};
use crate::manifest::LEAF;
use crate::store::Object;

/// Objects in a part, and whether there are more behind them.
pub fn put_objects(out: &mut Vec<u8>, objects: &[Object], more: bool) {
    out.push(u8::from(more));
    out.extend_from_slice(&(objects.len() as u32).to_le_bytes());
    for Object { name, len, modified } in objects {
        put_text(out, name);
        out.extend_from_slice(&len.to_le_bytes());
        let since = modified.duration_since(std::time::SystemTime::UNIX_EPOCH).unwrap_or_default();
        out.extend_from_slice(&(since.as_millis() as u64).to_le_bytes());
    }
}

/// What [`put_objects`] made.
///
/// # Errors
/// It is something else.
pub fn parse_objects(part: &[u8]) -> Result<(Vec<Object>, bool), Malformed> {
    let mut input = Input::new(part);
    let (more, count) = (input.u8()?, input.u32()? as usize);
    reserved(&[more & !1])?;
    // A name of one byte, its length and two numbers.
    let mut objects = Vec::with_capacity(count.min(input.left() / 18));
    for _ in 0..count {
        let name = input.text()?.to_owned();
        if !crate::store::valid_name(&name) {
            return Err(Malformed::Value("the length of an object's name", name.len() as u64));
        }
        let (len, ms) = (input.u64()?, input.u64()?);
        let modified = std::time::SystemTime::UNIX_EPOCH.checked_add(std::time::Duration::from_millis(ms));
        objects.push(Object { name, len, modified: modified.ok_or(Malformed::Value("a time", ms))? });
    }
    input.end()?;
    Ok((objects, more == 1))
}

/// A group in a part: its bytes, and for each wanted page its number in the leaf and in the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SentGroup {
    /// Where in the part its bytes are.
    pub bytes: std::ops::Range<usize>,
    /// Page in the leaf, page in the group.
    pub pages: Vec<(u16, u8)>,
}

/// The table in front of the groups of a part: pages that no pack has, and for each group its length and pages.
pub fn put_table(out: &mut Vec<u8>, missing: &[u16], groups: &[(u32, Vec<(u16, u8)>)]) {
    out.extend_from_slice(&(missing.len() as u16).to_le_bytes());
    missing.iter().for_each(|page| out.extend_from_slice(&page.to_le_bytes()));
    out.extend_from_slice(&(groups.len() as u16).to_le_bytes());
    for (len, pages) in groups {
        out.extend_from_slice(&len.to_le_bytes());
        out.extend_from_slice(&(pages.len() as u16).to_le_bytes());
        for (page, slot) in pages {
            out.extend_from_slice(&page.to_le_bytes());
            out.push(*slot);
        }
    }
}

/// Bytes of the table of a group with so many pages.
pub fn table_len(pages: usize) -> usize {
    6 + 3 * pages
}

/// What a part of fetched pages holds: the pages that are missing, and the groups.
///
/// # Errors
/// It is something else, or its groups are not exactly what follows the table.
pub fn parse_part(part: &[u8]) -> Result<(Vec<u16>, Vec<SentGroup>), Malformed> {
    let mut input = Input::new(part);
    let page = |input: &mut Input<'_>| {
        let page = input.u16()?;
        if usize::from(page) < LEAF { Ok(page) } else { Err(Malformed::Value("a page of a leaf", page.into())) }
    };
    let count = usize::from(input.u16()?);
    let missing = (0..count).map(|_| page(&mut input)).collect::<Result<Vec<_>, _>>()?;
    let count = usize::from(input.u16()?);
    let mut groups = Vec::with_capacity(count.min(input.left() / 6));
    let mut total = 0_usize;
    for _ in 0..count {
        let (len, pages) = (input.u32()? as usize, usize::from(input.u16()?));
        if len > crate::pack::GROUP + 1 {
            return Err(Malformed::Value("a group's length", len as u64));
        }
        let pages = (0..pages).map(|_| Ok((page(&mut input)?, input.u8()?))).collect::<Result<Vec<_>, _>>()?;
        groups.push(SentGroup { bytes: total..total + len, pages });
        total += len;
    }
    if input.left() != total {
        return Err(Malformed::Value("the length of a part's groups", input.left() as u64));
    }
    let at = part.len() - total;
    groups.iter_mut().for_each(|group| group.bytes = group.bytes.start + at..group.bytes.end + at);
    Ok((missing, groups))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_says_where_its_groups_are_and_nothing_else() {
        let mut part = Vec::new();
        put_table(&mut part, &[5], &[(3, vec![(0, 1), (4095, 15)]), (2, vec![(7, 0)])]);
        part.extend_from_slice(b"abcde");
        let (missing, groups) = parse_part(&part).unwrap();
        assert_eq!((missing, groups[0].pages.clone()), (vec![5], vec![(0, 1), (4095, 15)]));
        assert_eq!((&part[groups[0].bytes.clone()], &part[groups[1].bytes.clone()]), (&b"abc"[..], &b"de"[..]));
        for len in 0..part.len() {
            assert!(parse_part(&part[..len]).is_err());
        }
        part.push(0);
        assert!(parse_part(&part).is_err());
        let mut outside = Vec::new();
        put_table(&mut outside, &[LEAF as u16], &[]);
        assert!(parse_part(&outside).is_err());
    }
}
