//! What two banks say to each other: messages of at most 56 bytes, and the bodies and parts that they point to.
//!
//! "Fetch pages 3, 4 and 9 of leaf 31" is a request whose body of 552 bytes lies in lane 2 of the client's area; the answer is "614 bytes in lane 5 of
//! the slab, the last". Numbers are little-endian; every length is checked before anything is taken.

mod op;
mod part;

use crate::codec::{Input, Malformed};
use crate::manifest::LEAF;

pub use op::Op;
pub use part::{SentGroup, parse_objects, parse_part, put_objects, put_table, table_len};

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
    /// It is there, and what it holds it still needs.
    Keep,
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
    /// This client has as much of something as one may have.
    Quota,
}

impl Status {
    const ALL: [Self; 9] = [
        Self::Done,
        Self::Missing,
        Self::Refused,
        Self::Busy,
        Self::Full,
        Self::ReadOnly,
        Self::Failed,
        Self::Overtaken,
        Self::Quota,
    ];

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
            Self::Keep => vec![4],
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
            4 => input.end().map(|()| Self::Keep),
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
            ToServer::Keep,
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
        for wrong in [vec![2, 4, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0], vec![2, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0x11, 0], vec![5], vec![]] {
            assert!(ToServer::parse(&wrong).is_err(), "{wrong:?}");
        }
    }
}
