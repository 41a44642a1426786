//! The first message each side of a link sends: which versions it speaks, which end it is, and what it lends.
//!
//! A lender's hello is 40 bytes of header (magic `farbus\r\n`, versions 1 to 1, role 1, features, epoch) and up to 64 KiB that
//! describe the device, which this layer carries and does not read. The header is the same in all versions, so that a peer of any
//! age can say "peer speaks versions 3 to 4, this side 1 to 1". All numbers are little-endian.

use thiserror::Error;

pub use super::exchange::{ExchangeError, HelloStream, exchange};

/// First bytes of every hello. The line end shows a text-mode relay, as in PNG's signature.
pub const MAGIC: [u8; 8] = *b"farbus\r\n";

/// Bytes of the fixed header.
pub const HEADER_LEN: usize = 40;

/// Bytes of the longest description.
pub const MAX_DESCRIPTION: usize = 64 << 10;

/// The versions of the link protocol that this code speaks.
pub const SPOKEN: Versions = Versions { min: 1, max: 1 };

/// A range of protocol versions, both ends included; never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    min: u16,
    max: u16,
}

impl Versions {
    /// The versions `min` to `max`; `None` where that is empty.
    pub const fn new(min: u16, max: u16) -> Option<Self> {
        if min > max { None } else { Some(Self { min, max }) }
    }

    /// The newest version in both ranges.
    pub fn newest_common(self, other: Self) -> Option<u16> {
        let newest = self.max.min(other.max);
        (newest >= self.min.max(other.min)).then_some(newest)
    }
}

impl std::fmt::Display for Versions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} to {}", self.min, self.max)
    }
}

/// Which end of a link a side is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Has the device.
    Lender,
    /// Has the VM.
    Borrower,
}

impl Role {
    const fn byte(self) -> u8 {
        match self {
            Self::Lender => 1,
            Self::Borrower => 2,
        }
    }

    const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Lender),
            2 => Some(Self::Borrower),
            _ => None,
        }
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Lender => "lender",
            Self::Borrower => "borrower",
        })
    }
}

/// What a side says of itself first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Protocol versions it speaks.
    pub versions: Versions,
    /// Which end it is.
    pub role: Role,
    /// Optional abilities, one bit each; bits that the other side does not know are left unused.
    pub features: u64,
    /// The lease this link belongs to: grants of another epoch are dead.
    pub epoch: u64,
    /// What the upper layer wants the peer to know (the lent device, say); at most [`MAX_DESCRIPTION`] bytes.
    pub description: Vec<u8>,
}

/// The fixed part of a hello, before its description is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Protocol versions the sender speaks.
    pub versions: Versions,
    /// Which end the sender is.
    pub role: Role,
    /// Optional abilities of the sender.
    pub features: u64,
    /// The sender's epoch.
    pub epoch: u64,
    /// Bytes of description that follow, at most [`MAX_DESCRIPTION`].
    pub description_len: u32,
}

/// What two hellos agree on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// The version both speak from now on.
    pub version: u16,
    /// The features both have.
    pub features: u64,
    /// What the peer said.
    pub peer: Hello,
}

/// Why bytes are no hello. The culprit is the peer.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum HelloError {
    /// The bytes end too early, or go on too long.
    #[error("a hello of {actual} bytes where {needed} were announced")]
    Length {
        /// Bytes there are.
        actual: u64,
        /// Bytes there should be.
        needed: u64,
    },
    /// It does not begin with [`MAGIC`]: something else is talking.
    #[error("not a farbus peer: its first bytes are {found:02x?}")]
    Magic {
        /// The first bytes.
        found: [u8; 8],
    },
    /// An empty range of versions.
    #[error("peer claims to speak versions {min} to {max}")]
    Versions {
        /// Lowest version.
        min: u16,
        /// Highest version.
        max: u16,
    },
    /// Neither lender nor borrower.
    #[error("peer claims role {0}, which is neither lender (1) nor borrower (2)")]
    Role(u8),
    /// Bytes that must be zero are not.
    #[error("reserved bytes of the hello are {0:02x?}")]
    Reserved([u8; 3]),
    /// The description is too long.
    #[error("a description of {len} bytes is over the limit of {MAX_DESCRIPTION}")]
    Description {
        /// Bytes announced.
        len: u32,
    },
}

/// Why two sides that understand each other still cannot be linked.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Disagreement {
    /// No version is spoken by both.
    #[error("peer speaks versions {peer}, this side {ours}")]
    Version {
        /// The peer's.
        peer: Versions,
        /// This side's.
        ours: Versions,
    },
    /// One must be the lender and one the borrower.
    #[error("both sides are the {0}")]
    SameRole(Role),
}

impl Header {
    /// Parses the header alone. Versions are read before anything a later version could change the meaning of.
    ///
    /// # Errors
    /// [`HelloError`].
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self, HelloError> {
        let magic = field::<0, 8>(bytes);
        if magic != MAGIC {
            return Err(HelloError::Magic { found: magic });
        }
        let (min, max) = (u16::from_le_bytes(field::<8, 2>(bytes)), u16::from_le_bytes(field::<10, 2>(bytes)));
        let versions = Versions::new(min, max).ok_or(HelloError::Versions { min, max })?;
        let [role] = field::<12, 1>(bytes);
        let role = Role::from_byte(role).ok_or(HelloError::Role(role))?;
        let reserved = field::<13, 3>(bytes);
        if reserved != [0; 3] {
            return Err(HelloError::Reserved(reserved));
        }
        let description_len = u32::from_le_bytes(field::<32, 4>(bytes));
        if description_len as usize > MAX_DESCRIPTION {
            return Err(HelloError::Description { len: description_len });
        }
        let [a, b, c, rest] = field::<36, 4>(bytes);
        if [a, b, c, rest] != [0; 4] {
            return Err(HelloError::Reserved([a | rest, b, c]));
        }
        Ok(Self {
            versions,
            role,
            features: u64::from_le_bytes(field::<16, 8>(bytes)),
            epoch: u64::from_le_bytes(field::<24, 8>(bytes)),
            description_len,
        })
    }

    /// Whether this side, as `ours`, can be linked with the sender: the version to speak and the common features.
    ///
    /// # Errors
    /// [`Disagreement`].
    pub fn agree(&self, ours: &Hello) -> Result<(u16, u64), Disagreement> {
        let version =
            self.versions.newest_common(ours.versions).ok_or(Disagreement::Version { peer: self.versions, ours: ours.versions })?;
        if self.role == ours.role {
            return Err(Disagreement::SameRole(self.role));
        }
        Ok((version, self.features & ours.features))
    }

    pub(super) fn with(self, description: Vec<u8>) -> Hello {
        Hello { versions: self.versions, role: self.role, features: self.features, epoch: self.epoch, description }
    }
}

impl Hello {
    /// The bytes to send.
    ///
    /// # Errors
    /// [`HelloError::Description`] where the description is too long.
    pub fn encode(&self) -> Result<Vec<u8>, HelloError> {
        let len = u32::try_from(self.description.len()).unwrap_or(u32::MAX);
        if self.description.len() > MAX_DESCRIPTION {
            return Err(HelloError::Description { len });
        }
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.description.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&self.versions.min.to_le_bytes());
        bytes.extend_from_slice(&self.versions.max.to_le_bytes());
        bytes.extend_from_slice(&[self.role.byte(), 0, 0, 0]);
        bytes.extend_from_slice(&self.features.to_le_bytes());
        bytes.extend_from_slice(&self.epoch.to_le_bytes());
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&self.description);
        Ok(bytes)
    }

    /// Parses a whole hello, no byte more or less.
    ///
    /// # Errors
    /// [`HelloError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, HelloError> {
        let actual = bytes.len() as u64;
        let (header, description) =
            bytes.split_first_chunk::<HEADER_LEN>().ok_or(HelloError::Length { actual, needed: HEADER_LEN as u64 })?;
        let header = Header::parse(header)?;
        if description.len() != header.description_len as usize {
            return Err(HelloError::Length { actual, needed: HEADER_LEN as u64 + u64::from(header.description_len) });
        }
        Ok(header.with(description.to_vec()))
    }
}

/// The `N` bytes at `AT` of a header; out of range is a compile error, not a panic.
fn field<const AT: usize, const N: usize>(bytes: &[u8; HEADER_LEN]) -> [u8; N] {
    const { assert!(AT + N <= HEADER_LEN) };
    std::array::from_fn(|i| bytes[AT + i])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_hello() -> impl Strategy<Value = Hello> {
        let description = proptest::collection::vec(any::<u8>(), 0..300);
        (any::<(u16, u16)>(), any::<bool>(), any::<u64>(), any::<u64>(), description).prop_map(
            |((a, b), lender, features, epoch, description)| Hello {
                versions: Versions::new(a.min(b), a.max(b)).unwrap(),
                role: if lender { Role::Lender } else { Role::Borrower },
                features,
                epoch,
                description,
            },
        )
    }

    fn versions(min: u16, max: u16) -> Versions {
        Versions::new(min, max).unwrap()
    }

    proptest! {
        #[test]
        fn what_is_sent_is_what_is_heard(hello in any_hello()) {
            prop_assert_eq!(Hello::parse(&hello.encode().unwrap()), Ok(hello));
        }

        #[test]
        fn no_bytes_panic_and_what_parses_encodes_back(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), keep: bool) {
            if keep && bytes.len() >= MAGIC.len() {
                bytes[..MAGIC.len()].copy_from_slice(&MAGIC);
            }
            if let Ok(hello) = Hello::parse(&bytes) {
                prop_assert_eq!(hello.encode().unwrap(), bytes);
            }
        }

        #[test]
        fn one_changed_byte_is_another_hello_or_none(hello in any_hello(), at: prop::sample::Index, flip in 1_u8..) {
            let mut bytes = hello.encode().unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert_ne!(Hello::parse(&bytes), Ok(hello));
        }

        #[test]
        fn a_cut_or_lengthened_hello_is_refused(hello in any_hello(), at: prop::sample::Index, extra: u8) {
            let mut bytes = hello.encode().unwrap();
            prop_assert!(Hello::parse(&bytes[..at.index(bytes.len())]).is_err());
            bytes.push(extra);
            prop_assert!(Hello::parse(&bytes).is_err());
        }

        #[test]
        fn both_sides_come_to_the_same_version(a in any_hello(), b in any_hello()) {
            let heard = |hello: &Hello| Header::parse(hello.encode().unwrap()[..HEADER_LEN].try_into().unwrap()).unwrap();
            let (at_a, at_b) = (heard(&b).agree(&a), heard(&a).agree(&b));
            prop_assert_eq!(at_a.is_ok(), at_b.is_ok());
            if let (Ok(at_a), Ok(at_b)) = (at_a, at_b) {
                prop_assert_eq!(at_a, at_b);
                let (version, _) = at_a;
                for side in [&a, &b] {
                    prop_assert!(side.versions.newest_common(versions(version, version)).is_some());
                }
            }
        }
    }

    #[test]
    fn the_bytes_of_version_1_never_change() {
        let hello = Hello { versions: SPOKEN, role: Role::Lender, features: 0x0102, epoch: 7, description: b"nvme".to_vec() };
        let bytes = hello.encode().unwrap();
        let expected = b"farbus\r\n\x01\0\x01\0\x01\0\0\0\x02\x01\0\0\0\0\0\0\x07\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0nvme";
        assert_eq!(bytes, expected);
    }

    #[test]
    fn a_disagreement_names_both_sides() {
        let peer = Header { versions: versions(3, 4), role: Role::Lender, features: 0, epoch: 0, description_len: 0 };
        let ours = Hello { versions: versions(1, 1), role: Role::Lender, features: 0, epoch: 0, description: Vec::new() };
        let refused = peer.agree(&ours).unwrap_err();
        assert_eq!(refused.to_string(), "peer speaks versions 3 to 4, this side 1 to 1");
        let peer = Header { versions: versions(1, 4), ..peer };
        assert_eq!(peer.agree(&ours).unwrap_err().to_string(), "both sides are the lender");
    }

    #[test]
    fn a_description_that_is_too_long_is_refused_on_both_sides() {
        let mut hello =
            Hello { versions: SPOKEN, role: Role::Lender, features: 0, epoch: 0, description: vec![0; MAX_DESCRIPTION] };
        let mut bytes = hello.encode().unwrap();
        assert!(Hello::parse(&bytes).is_ok());
        hello.description.push(0);
        assert!(matches!(hello.encode(), Err(HelloError::Description { len: 65537 })));
        bytes[32..36].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Hello::parse(&bytes), Err(HelloError::Description { len: u32::MAX }));
    }
}
