//! What a client wants, and how it is written in the body of a request.
//!
//! `Op::Leaf(root, 0, 31)` is op 4 with a body of 38 bytes: the root, section 0, leaf 31.

use super::{BITMAP, MOST_NAMES};
use crate::codec::{Input, Malformed, put_text};
use crate::page::{PageId, Root};
use crate::store::Kind;

/// What is wanted, with its body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Objects of a kind whose names are behind this one.
    List(Kind, String),
    /// What the bank says of itself: an object's name.
    Config(String),
    /// A machine's head, from a byte on.
    Head(Root, u32),
    /// The names of a leaf's pages.
    Leaf(Root, u16, u32),
    /// The pages of a leaf whose bits are set.
    Fetch(Root, u16, u32, Box<[u8; BITMAP]>),
    /// Which of these pages need not be sent.
    Have(Vec<PageId>),
    /// That nothing is swept until this is let go of; for so many milliseconds at most it may be waited.
    Hold(u32),
    /// That a machine is not removed until this is let go of.
    Pin(Root),
    /// A hold or a pin ends.
    LetGo(u32),
    /// Bytes of an object: its stream, the offset, and what is there.
    Stage(u32, u64, Vec<u8>),
    /// A stream is a pack of so many bytes.
    Pack(u32, u64, [u8; 16]),
    /// A stream is a manifest of so many bytes and this root; 0, or one more than the number of the machine's last deposit, which is to be the last still.
    Commit(u32, u64, Root, u64, String),
    /// A stream is given up.
    Discard(u32),
}

fn kind_code(kind: Kind) -> u8 {
    Kind::ALL.iter().position(|other| *other == kind).unwrap_or_default() as u8
}

impl Op {
    /// As it is named in a request.
    pub fn code(&self) -> u8 {
        match self {
            Self::List(..) => 1,
            Self::Config(_) => 2,
            Self::Head(..) => 3,
            Self::Leaf(..) => 4,
            Self::Fetch(..) => 5,
            Self::Have(_) => 6,
            Self::Hold(_) => 7,
            Self::Pin(_) => 8,
            Self::LetGo(_) => 9,
            Self::Stage(..) => 10,
            Self::Pack(..) => 11,
            Self::Commit(..) => 12,
            Self::Discard(_) => 13,
        }
    }

    /// The body.
    pub fn body(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::List(kind, after) => {
                out.push(kind_code(*kind));
                put_text(&mut out, after);
            }
            Self::Config(name) => put_text(&mut out, name),
            Self::Head(root, offset) => {
                out.extend_from_slice(&root.0);
                out.extend_from_slice(&offset.to_le_bytes());
            }
            Self::Leaf(root, section, leaf) => put_leaf(&mut out, root, *section, *leaf),
            Self::Fetch(root, section, leaf, bitmap) => {
                put_leaf(&mut out, root, *section, *leaf);
                out.extend_from_slice(&bitmap[..]);
            }
            Self::Have(ids) => ids.iter().for_each(|id| out.extend_from_slice(&id.0)),
            Self::Hold(number) | Self::LetGo(number) | Self::Discard(number) => out.extend_from_slice(&number.to_le_bytes()),
            Self::Pin(root) => out.extend_from_slice(&root.0),
            Self::Stage(stream, offset, bytes) => {
                out.extend_from_slice(&stream.to_le_bytes());
                out.extend_from_slice(&offset.to_le_bytes());
                out.extend_from_slice(bytes);
            }
            Self::Pack(stream, len, id) => {
                out.extend_from_slice(&stream.to_le_bytes());
                out.extend_from_slice(&len.to_le_bytes());
                out.extend_from_slice(id);
            }
            Self::Commit(stream, len, root, number, machine) => {
                out.extend_from_slice(&stream.to_le_bytes());
                out.extend_from_slice(&len.to_le_bytes());
                out.extend_from_slice(&root.0);
                out.extend_from_slice(&number.to_le_bytes());
                put_text(&mut out, machine);
            }
        }
        out
    }

    /// From a request's code and body.
    ///
    /// # Errors
    /// It is none of them.
    pub fn parse(code: u8, body: &[u8]) -> Result<Self, Malformed> {
        let mut input = Input::new(body);
        let op = match code {
            1 => {
                let kind = input.u8()?;
                let kind = *Kind::ALL.get(usize::from(kind)).ok_or(Malformed::Value("a kind", kind.into()))?;
                Self::List(kind, input.text()?.to_owned())
            }
            2 => Self::Config(input.text()?.to_owned()),
            3 => Self::Head(Root(input.array()?), input.u32()?),
            4 => Self::Leaf(Root(input.array()?), input.u16()?, input.u32()?),
            5 => Self::Fetch(Root(input.array()?), input.u16()?, input.u32()?, Box::new(input.array()?)),
            6 => {
                if body.len() > MOST_NAMES * 32 {
                    return Err(Malformed::Value("the number of names", body.len() as u64 / 32));
                }
                let (names, rest) = input.take(body.len())?.as_chunks::<32>();
                if !rest.is_empty() {
                    return Err(Malformed::Trailing(rest.len()));
                }
                Self::Have(names.iter().map(|name| PageId(*name)).collect())
            }
            7 => Self::Hold(input.u32()?),
            8 => Self::Pin(Root(input.array()?)),
            9 => Self::LetGo(input.u32()?),
            10 => Self::Stage(input.u32()?, input.u64()?, input.take(input.left())?.to_vec()),
            11 => Self::Pack(input.u32()?, input.u64()?, input.array()?),
            12 => Self::Commit(input.u32()?, input.u64()?, Root(input.array()?), input.u64()?, input.text()?.to_owned()),
            13 => Self::Discard(input.u32()?),
            other => return Err(Malformed::Value("what is wanted", other.into())),
        };
        input.end()?;
        Ok(op)
    }
}

fn put_leaf(out: &mut Vec<u8>, root: &Root, section: u16, leaf: u32) {
    out.extend_from_slice(&root.0);
    out.extend_from_slice(&section.to_le_bytes());
    out.extend_from_slice(&leaf.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::super::INLINE;
    use super::*;

    #[test]
    fn every_request_comes_back_from_its_body() {
        let root = Root([9; 32]);
        let ops = [
            Op::List(Kind::Manifest, "vm7@".to_owned()),
            Op::Config("bank".to_owned()),
            Op::Head(root, 5),
            Op::Leaf(root, 1, 2),
            Op::Fetch(root, 1, 2, Box::new([0x55; BITMAP])),
            Op::Have(vec![PageId([1; 32]), PageId([2; 32])]),
            Op::Hold(10_000),
            Op::Pin(root),
            Op::LetGo(4),
            Op::Stage(1, 2, vec![1, 2, 3]),
            Op::Pack(1, 2, [3; 16]),
            Op::Commit(1, 2, root, 3, "vm7".to_owned()),
            Op::Discard(5),
        ];
        for op in ops {
            assert_eq!(Op::parse(op.code(), &op.body()), Ok(op.clone()));
            assert!(!matches!(op, Op::Leaf(..)) || op.body().len() <= INLINE, "a leaf is asked for in one message");
        }
        assert!(Op::parse(6, &[0; 33]).is_err() && Op::parse(6, &vec![0; MOST_NAMES * 32 + 32]).is_err());
        assert!(Op::parse(99, &[]).is_err() && Op::parse(2, &[0, 0]).is_err());
    }
}
