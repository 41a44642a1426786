//! What two banks say to each other: messages of at most 56 bytes, and the bodies and parts that they point to.
//!
//! "Fetch pages 3, 4 and 9 of leaf 31" is a request whose body of 552 bytes lies in lane 2 of the client's area; the answer is "614 bytes in lane 5 of
//! the slab, the last". Numbers are little-endian; every length is checked before anything is taken.

use crate::codec::{Input, Malformed, put_text};
use crate::manifest::LEAF;
use crate::page::{PageId, Root};
use crate::store::{Kind, Object};

/// The version of the protocol.
pub const VERSION: u16 = 1;
/// Requests of a client that can be under way, and pieces of memory for them on each side.
pub const LANES: usize = 8;
/// Bytes of a request's body at most: a lane of the client's area.
pub const BODY: usize = 1 << 20;
/// Bytes of a part of an answer at most: a lane of the server's slab.
pub const PART: usize = 2 << 20;
/// Bytes of a body, or of a part, that travels in its message.
pub const INLINE: usize = 44;
/// Names in one question at most.
pub const MOST_NAMES: usize = 4096;
/// Bytes of a bitmap over a leaf.
pub const BITMAP: usize = LEAF / 8;

const HEADER: usize = 12;
const NO_LANE: u8 = 0xff;

/// What a client can say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToServer {
    /// First: its version, and its area.
    Hello {
        /// The protocol's version.
        version: u16,
        /// Of the area.
        grant: (u64, u64),
    },
    /// Something is wanted.
    Request(Request),
    /// It is there.
    Ping,
}

/// Something that is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What, by [`Op::code`]; read with the body.
    pub op: u8,
    /// The lane that it has, and whose place in the area has the body.
    pub lane: u8,
    /// The lanes of the slab that the answer may use, a bit each.
    pub lent: u8,
    /// Where the body is.
    pub body: Carried,
}

/// Bytes that belong to a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Carried {
    /// They are in it.
    Inline(Vec<u8>),
    /// So many are in the lane.
    Lane(u32),
}

/// What a server can say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToClient {
    /// First: its version, and its slab.
    Welcome {
        /// The protocol's version.
        version: u16,
        /// Of the slab.
        grant: (u64, u64),
    },
    /// An answer, or a part of one.
    Answer(Answer),
    /// It works on something that takes long.
    Wait,
}

/// An answer, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// How it went.
    pub status: Status,
    /// The request's lane.
    pub lane: u8,
    /// Whether nothing follows.
    pub last: bool,
    /// Where its bytes are, and in which lane where they are in one.
    pub part: (Carried, u8),
}

/// How a request went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It was done.
    Done,
    /// There is no such thing, or not for this client.
    Missing,
    /// This client may not do that, or what it sent is wrong; the part says why.
    Refused,
    /// Others use the bank otherwise.
    Busy,
    /// The store is full.
    Full,
    /// The store cannot be written.
    ReadOnly,
    /// The store failed.
    Failed,
    /// The machine was deposited by somebody else meanwhile.
    Overtaken,
}

impl Status {
    const ALL: [Self; 8] =
        [Self::Done, Self::Missing, Self::Refused, Self::Busy, Self::Full, Self::ReadOnly, Self::Failed, Self::Overtaken];

    fn code(self) -> u8 {
        Self::ALL.iter().position(|status| *status == self).unwrap_or_default() as u8
    }

    fn from_code(code: u8) -> Result<Self, Malformed> {
        Self::ALL.get(usize::from(code)).copied().ok_or(Malformed::Value("a status", code.into()))
    }
}

impl Carried {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        match self {
            Self::Inline(bytes) => bytes.len(),
            Self::Lane(len) => *len as usize,
        }
    }

    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&(self.len() as u32).to_le_bytes());
        if let Self::Inline(bytes) = self {
            out.extend_from_slice(bytes);
        }
    }

    /// Short ones are in the message, and no others.
    fn parse(input: &mut Input<'_>, most: usize) -> Result<Self, Malformed> {
        let len = input.u32()?;
        if len as usize > most {
            return Err(Malformed::Value("a body's length", len.into()));
        }
        let carried = if len as usize <= INLINE { Self::Inline(input.take(len as usize)?.to_vec()) } else { Self::Lane(len) };
        input.end()?;
        Ok(carried)
    }
}

fn lane(byte: u8) -> Result<u8, Malformed> {
    if usize::from(byte) < LANES { Ok(byte) } else { Err(Malformed::Value("a lane", byte.into())) }
}

fn reserved(bytes: &[u8]) -> Result<(), Malformed> {
    bytes.iter().find(|byte| **byte != 0).map_or(Ok(()), |byte| Err(Malformed::Value("a reserved byte", (*byte).into())))
}

fn greeting(kind: u8, version: u16, (key, len): (u64, u64)) -> Vec<u8> {
    let mut out = vec![kind, 0];
    out.extend_from_slice(&version.to_le_bytes());
    out.extend_from_slice(&key.to_le_bytes());
    out.extend_from_slice(&len.to_le_bytes());
    out
}

fn parse_greeting(input: &mut Input<'_>) -> Result<(u16, (u64, u64)), Malformed> {
    reserved(&[input.u8()?])?;
    let greeting = (input.u16()?, (input.u64()?, input.u64()?));
    input.end()?;
    Ok(greeting)
}

impl ToServer {
    /// As it is sent.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Hello { version, grant } => greeting(1, *version, *grant),
            Self::Request(Request { op, lane, lent, body }) => {
                let mut out = vec![2, *op, *lane, *lent, 0, 0, 0, 0];
                body.put(&mut out);
                debug_assert!(out.len() <= HEADER + INLINE, "a message has at most 56 bytes");
                out
            }
            Self::Ping => vec![3],
        }
    }

    /// From what a client sent.
    ///
    /// # Errors
    /// It is none of them.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut input = Input::new(bytes);
        match input.u8()? {
            1 => parse_greeting(&mut input).map(|(version, grant)| Self::Hello { version, grant }),
            2 => {
                let (op, lane, lent) = (input.u8()?, lane(input.u8()?)?, input.u8()?);
                reserved(input.take(4)?)?;
                Ok(Self::Request(Request { op, lane, lent, body: Carried::parse(&mut input, BODY)? }))
            }
            3 => input.end().map(|()| Self::Ping),
            other => Err(Malformed::Value("a client's message", other.into())),
        }
    }
}

impl ToClient {
    /// As it is sent.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Welcome { version, grant } => greeting(1, *version, *grant),
            Self::Answer(Answer { status, lane, last, part: (part, part_lane) }) => {
                let part_lane = if matches!(part, Carried::Lane(_)) { *part_lane } else { NO_LANE };
                let mut out = vec![2, status.code(), *lane, part_lane, u8::from(*last), 0, 0, 0];
                part.put(&mut out);
                debug_assert!(out.len() <= HEADER + INLINE, "a message has at most 56 bytes");
                out
            }
            Self::Wait => vec![3],
        }
    }

    /// From what a server sent.
    ///
    /// # Errors
    /// It is none of them.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut input = Input::new(bytes);
        match input.u8()? {
            1 => parse_greeting(&mut input).map(|(version, grant)| Self::Welcome { version, grant }),
            2 => {
                let (status, of, part_lane, last) = (Status::from_code(input.u8()?)?, lane(input.u8()?)?, input.u8()?, input.u8()?);
                reserved(input.take(3)?)?;
                reserved(&[last & !1])?;
                let part = Carried::parse(&mut input, PART)?;
                let part_lane = match part {
                    Carried::Lane(_) => lane(part_lane)?,
                    Carried::Inline(_) if part_lane == NO_LANE => NO_LANE,
                    Carried::Inline(_) => return Err(Malformed::Value("the lane of a short answer", part_lane.into())),
                };
                Ok(Self::Answer(Answer { status, lane: of, last: last == 1, part: (part, part_lane) }))
            }
            3 => input.end().map(|()| Self::Wait),
            other => Err(Malformed::Value("a server's message", other.into())),
        }
    }
}

/// What is wanted, with its body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Objects of a kind whose names are behind this one.
    List(Kind, String),
    /// What the bank says of itself.
    Config,
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
    /// A stream is a manifest of so many bytes and this root; the deposit's number, or 0 for the next.
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
            Self::Config => 2,
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
            Self::Config => {}
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
            2 => Self::Config,
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
    fn what_is_sent_is_what_is_heard_and_what_is_cut_is_refused() {
        let client = [
            ToServer::Hello { version: 1, grant: (7, 8 << 20) },
            ToServer::Request(Request { op: 4, lane: 7, lent: 0x81, body: Carried::Inline(vec![3; INLINE]) }),
            ToServer::Request(Request { op: 4, lane: 0, lent: 1, body: Carried::Lane(BODY as u32) }),
            ToServer::Ping,
        ];
        for message in client {
            let bytes = message.encode();
            assert!(bytes.len() <= 56);
            assert_eq!(ToServer::parse(&bytes), Ok(message));
            for len in 0..bytes.len() {
                assert!(ToServer::parse(&bytes[..len]).is_err());
            }
        }
        let server = [
            ToClient::Welcome { version: 1, grant: (7, 16 << 20) },
            ToClient::Answer(Answer {
                status: Status::Busy,
                lane: 3,
                last: true,
                part: (Carried::Inline(b"no".to_vec()), NO_LANE),
            }),
            ToClient::Answer(Answer { status: Status::Done, lane: 3, last: false, part: (Carried::Lane(PART as u32), 6) }),
            ToClient::Wait,
        ];
        for message in server {
            let bytes = message.encode();
            assert!(bytes.len() <= 56);
            assert_eq!(ToClient::parse(&bytes), Ok(message));
            for len in 0..bytes.len() {
                assert!(ToClient::parse(&bytes[..len]).is_err());
            }
        }
        for wrong in [vec![2, 4, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0], vec![2, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0x11, 0], vec![4], vec![]] {
            assert!(ToServer::parse(&wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn every_request_comes_back_from_its_body() {
        let root = Root([9; 32]);
        let ops = [
            Op::List(Kind::Manifest, "vm7@".to_owned()),
            Op::Config,
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
        assert!(Op::parse(99, &[]).is_err() && Op::parse(2, &[0]).is_err());
    }

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
