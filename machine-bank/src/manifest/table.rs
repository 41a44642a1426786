//! A manifest's table: how each leaf is written, and which other manifest those that are not written in full rest on.
//!
//! Forms `[Same, Delta { offset: 8, len: 38 }]` with base `9f…` and depth 1: the first leaf is as in 9f…, the second differs in one page.

use super::head::{Head, MOST_HEAD};
use super::leaf::{Form, LEAF};
use super::{DEEPEST, END, MAGIC, TRAILER};
use crate::codec::{Input, Malformed};
use crate::page::Root;

/// Where and how leaves are written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// What leaves that are not written in full rest on.
    pub base: Option<Root>,
    /// Manifests below this one, at most [`DEEPEST`].
    pub depth: u8,
    /// For each section, for each leaf.
    pub forms: Vec<Vec<Form>>,
}

impl Table {
    /// As it is stored.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&self.base.map_or([0; 32], |root| root.0));
        out.push(self.depth);
        for form in self.forms.iter().flatten() {
            let (code, place) = match form {
                Form::Zero => (0, None),
                Form::Same => (1, None),
                Form::Full { offset, len } => (2, Some((offset, len))),
                Form::Delta { offset, len } => (3, Some((offset, len))),
            };
            out.push(code);
            if let Some((offset, len)) = place {
                out.extend_from_slice(&offset.to_le_bytes());
                out.extend_from_slice(&len.to_le_bytes());
            }
        }
        out
    }

    /// Bytes of base and depth.
    pub(super) const FRONT: usize = 33;

    /// Base and depth, with which a table begins.
    pub(super) fn parse_front(input: &mut Input<'_>) -> Result<(Option<Root>, u8), Malformed> {
        let base = input.array::<32>()?;
        let base = (base != [0; 32]).then_some(Root(base));
        let depth = input.u8()?;
        if depth > DEEPEST || (depth == 0) != base.is_none() {
            return Err(Malformed::Value("a manifest's depth", depth.into()));
        }
        Ok((base, depth))
    }

    /// The table of a manifest with this head, whose leaves lie before byte `end`.
    ///
    /// # Errors
    /// It is something else.
    pub fn parse(bytes: &[u8], head: &Head, end: u64) -> Result<Self, Malformed> {
        let mut input = Input::new(bytes);
        let (base, depth) = Self::parse_front(&mut input)?;
        let mut forms = Vec::with_capacity(head.sections.len());
        for section in &head.sections {
            let leaves = (0..section.leaves.len()).map(|_| form(&mut input, end, base.is_some()));
            forms.push(leaves.collect::<Result<Vec<_>, _>>()?);
        }
        input.end()?;
        Ok(Self { base, depth, forms })
    }
}

fn form(input: &mut Input<'_>, end: u64, based: bool) -> Result<Form, Malformed> {
    let code = input.u8()?;
    if code < 2 {
        return if code == 0 {
            Ok(Form::Zero)
        } else if based {
            Ok(Form::Same)
        } else {
            Err(Malformed::Value("a leaf's form without a base", code.into()))
        };
    }
    let (offset, len) = (input.u64()?, input.u32()?);
    let fits = offset >= MAGIC.len() as u64 && offset.checked_add(len.into()).is_some_and(|to| to <= end);
    // The longest: a position and a name for each page.
    if !fits || len as usize > 4 + LEAF * 34 {
        return Err(Malformed::Value("a leaf's place", offset));
    }
    match code {
        2 => Ok(Form::Full { offset, len }),
        3 if based => Ok(Form::Delta { offset, len }),
        _ => Err(Malformed::Value("a leaf's form", code.into())),
    }
}

/// Where head and table begin in a manifest of `total` bytes that ends with `trailer`, and where the table ends.
///
/// # Errors
/// It is no manifest's trailer.
pub fn split(trailer: &[u8; TRAILER], total: u64) -> Result<(u64, u64, u64), Malformed> {
    let mut input = Input::new(trailer);
    let (head, table, end) = (input.u32()?, input.u32()?, input.array::<8>()?);
    if end != *END {
        return Err(Malformed::Magic("manifest"));
    }
    for len in [head, table] {
        if len as usize > MOST_HEAD {
            return Err(Malformed::Value("the length of a manifest's head", len.into()));
        }
    }
    let table_end = total.checked_sub(TRAILER as u64).ok_or(Malformed::Ends)?;
    let table_at = table_end.checked_sub(table.into()).ok_or(Malformed::Ends)?;
    let head_at = table_at.checked_sub(head.into()).filter(|at| *at >= MAGIC.len() as u64).ok_or(Malformed::Ends)?;
    Ok((head_at, table_at, table_end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::head::{Counts, Section, SectionKind};

    fn head() -> Head {
        let leaves = vec![[0; 32]; 4];
        let section = Section { kind: SectionKind::Disk, name: "d".to_owned(), len: 64 << 20, counts: Counts::default(), leaves };
        Head { machine: "m".to_owned(), created_ms: 0, parent: None, sections: vec![section] }
    }

    #[test]
    fn a_table_comes_back_and_one_that_points_outside_does_not() {
        let forms = vec![vec![Form::Zero, Form::Same, Form::Full { offset: 8, len: 100 }, Form::Delta { offset: 108, len: 40 }]];
        let table = Table { base: Some(Root([1; 32])), depth: 3, forms };
        let bytes = table.encode();
        assert_eq!(Table::parse(&bytes, &head(), 148), Ok(table.clone()));
        assert!(Table::parse(&bytes, &head(), 147).is_err(), "a leaf reaches into the head");
        for len in 0..bytes.len() {
            assert!(Table::parse(&bytes[..len], &head(), 148).is_err(), "{len} bytes");
        }
        for (base, depth) in [(None, 0), (None, 1), (Some(Root([1; 32])), 0), (Some(Root([1; 32])), DEEPEST + 1)] {
            let wrong = Table { base, depth, ..table.clone() };
            assert!(Table::parse(&wrong.encode(), &head(), 148).is_err(), "{base:?} at depth {depth}");
        }
    }

    #[test]
    fn a_trailer_that_points_before_the_beginning_is_refused() {
        let trailer = |head: u32, table: u32| {
            let bytes = [&head.to_le_bytes()[..], &table.to_le_bytes(), END].concat();
            *bytes.first_chunk::<TRAILER>().unwrap()
        };
        assert_eq!(split(&trailer(10, 5), 100), Ok((69, 79, 84)));
        assert!(split(&trailer(80, 5), 100).is_err() && split(&trailer(10, 85), 100).is_err());
        assert!(split(&trailer(u32::MAX, 5), 100).is_err() && split(&[0; TRAILER], 100).is_err());
    }
}
