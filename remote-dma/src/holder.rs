//! Who has a device over several links: a borrower that lost its link comes back as the same, and finds out whether anybody else had the device meanwhile.
//!
//! A borrower says "hold" and 16 random bytes with its hello; its link is cut; it comes back and says "back" and the same bytes. The lender has it in its book as the last
//! one: it gets the device, reset, and tells it again what was not answered. Had another borrower had the device meanwhile, what the first would tell again would
//! overwrite what that one wrote: so it is refused for good, however it was parted from its lender, and also by a lender that was started again.

use std::fmt;
use std::io;
use std::time::{Duration, Instant};

use farbus_transport::CloseReason;
use farbus_transport::link::verdict::Refusal;

use crate::backend::Backend;
use crate::rest::RestToken;

const REST: [u8; 5] = *b"rest ";
const HOLD: [u8; 5] = *b"hold ";
const BACK: [u8; 5] = *b"back ";
const TOKEN_BYTES: usize = 16;

/// Names one borrower's having a device, from its first link to its last.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct HolderToken(pub [u8; TOKEN_BYTES]);

impl HolderToken {
    /// A token that nobody else has.
    ///
    /// # Errors
    /// The kernel has no random bytes.
    pub fn random() -> io::Result<Self> {
        RestToken::random().map(|token| Self(token.0))
    }
}

impl fmt::Debug for HolderToken {
    /// Who can read a log must not be able to come back as another.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HolderToken(..)")
    }
}

/// As whom a borrower comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holding {
    /// It will be known by this.
    First(HolderToken),
    /// It had the device under this, and has told it what it was not answered.
    Again(HolderToken),
}

/// What a borrower's hello says beside the version: its description.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Claim {
    /// The rest of a kept device that it comes to end.
    pub rest: Option<RestToken>,
    /// As whom; `None`: it will never come back.
    pub holding: Option<Holding>,
}

impl Claim {
    /// The description.
    pub fn encode(&self) -> Vec<u8> {
        let mut description = Vec::new();
        if let Some(rest) = &self.rest {
            description.extend(REST.iter().chain(&rest.0));
        }
        match &self.holding {
            Some(Holding::First(token)) => description.extend(HOLD.iter().chain(&token.0)),
            Some(Holding::Again(token)) => description.extend(BACK.iter().chain(&token.0)),
            None => {}
        }
        description
    }

    /// Of a description; what it does not know it takes for nothing.
    pub fn parse(mut description: &[u8]) -> Self {
        let mut claim = Self::default();
        while let Some((tag, rest)) = description.split_first_chunk::<{ REST.len() }>()
            && let Some((token, rest)) = rest.split_first_chunk::<TOKEN_BYTES>()
        {
            match *tag {
                REST => claim.rest = Some(RestToken(*token)),
                HOLD => claim.holding = Some(Holding::First(HolderToken(*token))),
                BACK => claim.holding = Some(Holding::Again(HolderToken(*token))),
                _ => break,
            }
            description = rest;
        }
        claim
    }
}

/// What a device remembers of its borrower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HolderNote {
    /// Who had it last: of the token no more than tells it from others, because whoever can read an image can read its note.
    pub mark: [u8; MARK_BYTES],
    /// That one is not expected back: it left in order, or is dead.
    pub left: bool,
    /// Since when the host that lent it runs. What was written and not flushed is gone with a host, and whoever comes back has no answers to tell it of.
    pub boot: u64,
}

const MARK_BYTES: usize = 16;

impl HolderNote {
    /// Bytes of an encoded note.
    pub const BYTES: usize = MARK_BYTES + 1 + 8;

    /// As bytes.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [u8::from(self.left); Self::BYTES];
        bytes[..MARK_BYTES].copy_from_slice(&self.mark);
        bytes[MARK_BYTES + 1..].copy_from_slice(&self.boot.to_le_bytes());
        bytes
    }

    /// From bytes; `None` where they are none of a note's.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let (mark, rest) = bytes.split_first_chunk()?;
        let (left, boot) = rest.split_first()?;
        let left = match left {
            0 => false,
            1 => true,
            _ => return None,
        };
        Some(Self { mark: *mark, left, boot: u64::from_le_bytes(boot.try_into().ok()?) })
    }
}

fn mark_of(token: HolderToken) -> [u8; MARK_BYTES] {
    let hash = blake3::Hasher::new_derive_key("farbus 2026-11-27 who had a device last").update(&token.0).finalize();
    let mut mark = [0; MARK_BYTES];
    mark.copy_from_slice(&hash.as_bytes()[..MARK_BYTES]);
    mark
}

/// Names the time since this host was started; `None` where the kernel does not say.
fn boot() -> Option<u64> {
    let text = std::fs::read("/proc/sys/kernel/random/boot_id").ok()?;
    blake3::hash(&text).as_bytes().first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
}

/// The lender's book of one device: who had it last, and for whom it is held.
#[derive(Debug)]
pub struct Holders {
    last: Option<HolderNote>,
    /// Until when only the last one gets it.
    held_until: Option<Instant>,
    /// Both, before the device was given to whoever has it now.
    before: (Option<HolderNote>, Option<Instant>),
    hold: Duration,
    boot: Option<u64>,
}

impl Holders {
    /// Of a device that nobody has. Where the device remembers a borrower that did not leave, because its lender died, it is held for that one for `hold`. What it
    /// remembers of before this host was started is of no use.
    pub fn new(device: &dyn Backend, hold: Duration, now: Instant) -> Self {
        let boot = boot();
        let last = device.holder().filter(|note| Some(note.boot) == boot);
        let held_until = last.filter(|note| !note.left).map(|_| now + hold);
        Self { last, held_until, before: (last, held_until), hold, boot }
    }

    /// Whether who comes as this may have the device, as after a reset.
    ///
    /// # Errors
    /// [`Refusal::Held`] for now, [`Refusal::Others`] for good: also where it is not known who had it, because the device cannot remember.
    pub fn may_have(&self, holding: Option<Holding>, now: Instant) -> Result<(), Refusal> {
        match holding {
            Some(Holding::Again(token)) if self.last.is_some_and(|last| last.mark == mark_of(token)) => Ok(()),
            Some(Holding::Again(_)) => Err(Refusal::Others),
            Some(Holding::First(_)) | None if self.held_until.is_some_and(|until| now < until) => Err(Refusal::Held),
            Some(Holding::First(_)) | None => Ok(()),
        }
    }

    /// Who came as this gets the device. Noted at the device before anything is written by it.
    ///
    /// # Errors
    /// There are no random bytes for one that has no name.
    pub fn lent(&mut self, holding: Option<Holding>, device: &mut dyn Backend) -> io::Result<()> {
        let token = match holding {
            Some(Holding::First(token) | Holding::Again(token)) => token,
            None => HolderToken::random()?,
        };
        let note = HolderNote { mark: mark_of(token), left: false, boot: self.boot.unwrap_or_default() };
        self.before = (self.last, self.held_until);
        (self.last, self.held_until) = (Some(note), None);
        device.note_holder(note);
        Ok(())
    }

    /// Who was to get it never did: it is as before.
    pub fn never_lent(&mut self, device: Option<&mut dyn Backend>) {
        (self.last, self.held_until) = self.before;
        if let (Some(note), Some(device)) = (self.last, device) {
            device.note_holder(note);
        }
    }

    /// It is back from its borrower, `device` where it was reset. `may_return`: a borrower without a link may be alive.
    pub fn left(&mut self, reason: CloseReason, may_return: bool, device: Option<&mut dyn Backend>, now: Instant) {
        let lost = match reason {
            CloseReason::PeerGone | CloseReason::Device(_) | CloseReason::DeviceLost(_) => true,
            CloseReason::PeerClosed | CloseReason::Local | CloseReason::Protocol(_) => false,
        };
        let expected = lost && may_return;
        self.held_until = expected.then(|| now + self.hold);
        if let (false, Some(last), Some(device)) = (expected, &mut self.last, device) {
            last.left = true;
            device.note_holder(*last);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Edu;

    const A: HolderToken = HolderToken([1; 16]);
    const B: HolderToken = HolderToken([2; 16]);

    #[test]
    fn a_claim_is_what_was_said_and_nonsense_claims_nothing() {
        let rest = Some(RestToken([7; 16]));
        for holding in [None, Some(Holding::First(A)), Some(Holding::Again(B))] {
            for rest in [None, rest] {
                let claim = Claim { rest, holding };
                assert_eq!(Claim::parse(&claim.encode()), claim);
            }
        }
        let note = HolderNote { mark: [9; 16], left: true, boot: 7 };
        assert_eq!(HolderNote::parse(&note.encode()), Some(note));
        assert_eq!((HolderNote::parse(&[1; 24]), HolderNote::parse(&[2; 25]), HolderNote::parse(&[1; 26])), (None, None, None));
        for nonsense in [&b""[..], b"rest", b"hold 15 bytes......", b"what 0123456789abcdef", &[0xff; 100]] {
            assert_eq!(Claim::parse(nonsense), Claim::default());
        }
    }

    #[test]
    fn who_comes_back_gets_the_device_unless_another_had_it_and_a_stranger_waits() {
        let mut device = Edu::new().unwrap();
        let now = Instant::now();
        let hold = Duration::from_secs(5);
        let mut book = Holders::new(&device, hold, now);
        assert_eq!(book.may_have(Some(Holding::First(A)), now), Ok(()));
        book.lent(Some(Holding::First(A)), &mut device).unwrap();
        book.left(CloseReason::PeerGone, true, Some(&mut device), now);
        assert_eq!(book.may_have(Some(Holding::First(B)), now), Err(Refusal::Held));
        assert_eq!(book.may_have(None, now), Err(Refusal::Held));
        assert_eq!(book.may_have(Some(Holding::Again(A)), now), Ok(()));
        // Time is up, another has it, and leaves.
        let late = now + hold;
        assert_eq!(book.may_have(Some(Holding::First(B)), late), Ok(()));
        book.lent(Some(Holding::First(B)), &mut device).unwrap();
        book.left(CloseReason::PeerClosed, true, Some(&mut device), late);
        assert_eq!(
            book.may_have(Some(Holding::Again(A)), late),
            Err(Refusal::Others),
            "what it tells again would undo what another wrote"
        );
        assert_eq!(book.may_have(Some(Holding::First(A)), late), Ok(()));
    }

    #[test]
    fn who_never_got_the_device_parts_nobody_from_it() {
        let mut device = Edu::new().unwrap();
        let now = Instant::now();
        let mut book = Holders::new(&device, Duration::ZERO, now);
        book.lent(Some(Holding::First(A)), &mut device).unwrap();
        book.left(CloseReason::PeerGone, true, Some(&mut device), now);
        book.lent(Some(Holding::First(B)), &mut device).unwrap();
        book.never_lent(Some(&mut device));
        assert_eq!(book.may_have(Some(Holding::Again(A)), now), Ok(()));
    }

    #[test]
    fn nobody_comes_back_to_a_device_of_which_it_is_not_known_who_had_it() {
        // This one remembers nothing, and its lender was started again.
        let device = Edu::new().unwrap();
        let now = Instant::now();
        let book = Holders::new(&device, Duration::from_secs(5), now);
        assert_eq!(book.may_have(Some(Holding::Again(A)), now), Err(Refusal::Others));
        assert_eq!(book.may_have(Some(Holding::First(A)), now), Ok(()));
    }

    #[test]
    fn one_without_a_name_parts_those_before_it_from_the_device_as_well() {
        let mut device = Edu::new().unwrap();
        let now = Instant::now();
        let mut book = Holders::new(&device, Duration::ZERO, now);
        book.lent(Some(Holding::First(A)), &mut device).unwrap();
        book.left(CloseReason::PeerGone, false, Some(&mut device), now);
        book.lent(None, &mut device).unwrap();
        book.left(CloseReason::PeerGone, false, Some(&mut device), now);
        assert_eq!(book.may_have(Some(Holding::Again(A)), now), Err(Refusal::Others));
    }
}
