//! A device at rest: what it began has ended, it begins nothing new, and it keeps its state for whoever knows the token of this rest.
//!
//! A borrower that means to leave draws a token, has the device paused under it, saves its function's state with the token in it, and leaves with "keep
//! it for 30 s". Whoever comes with that state within the 30 s finds the device as it was; another token is refused, and afterwards the device is reset.

use std::fmt;
use std::io;
use std::time::{Duration, Instant};

use crate::backend::Backend;
use crate::holder::Claim;
use crate::journal::Mark;

/// Names one rest of one device: 16 random bytes, so that nobody who has not read the saved state can claim the device, and no older state fits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct RestToken(pub [u8; 16]);

impl RestToken {
    /// A token that nobody else has.
    ///
    /// # Errors
    /// The kernel has no random bytes.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 16];
        // The kernel gives up to 256 bytes at once (getrandom(2)).
        let given = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        if given == bytes.len() { Ok(Self(bytes)) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// What a borrower's hello says (its description) who comes for a kept device and does not mean to come back.
    pub fn claim(&self) -> Vec<u8> {
        Claim { rest: Some(*self), holding: None }.encode()
    }

    /// Whether both are the same, in a time that does not say where they differ.
    pub fn matches(&self, other: &Self) -> bool {
        self.0.iter().zip(other.0).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
    }
}

impl fmt::Debug for RestToken {
    /// Who can read a log must not be able to claim a device.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RestToken(..)")
    }
}

/// A device that came to rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rest {
    /// Its name.
    pub token: RestToken,
    /// How far the device's journal was; `None` where it keeps none.
    pub mark: Option<Mark>,
}

/// How long a device is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// For whom.
    pub token: RestToken,
    /// How long from the end of the session on.
    pub time: Duration,
}

/// A device that is at rest between two sessions, as the first left it.
pub struct Kept {
    backend: Box<dyn Backend>,
    lease: Lease,
    since: Instant,
}

impl Kept {
    /// Of a parked device.
    pub(crate) fn new(backend: Box<dyn Backend>, lease: Lease) -> Self {
        Self { backend, lease, since: Instant::now() }
    }

    /// How much longer it is kept; `None` when the lease is over.
    pub fn left(&self) -> Option<Duration> {
        self.lease.time.checked_sub(self.since.elapsed()).filter(|left| !left.is_zero())
    }

    /// The device for who has its token, once.
    ///
    /// # Errors
    /// The same again where the token is another, or the lease is over.
    pub fn claim(self, token: &RestToken) -> Result<Continued, Self> {
        if self.left().is_some() && self.lease.token.matches(token) {
            Ok(Continued { backend: self.backend, token: self.lease.token })
        } else {
            Err(self)
        }
    }

    /// Gives the lease up: the device is as after power-on.
    pub fn give_up(self) -> Box<dyn Backend> {
        let mut backend = self.backend;
        backend.detach();
        backend
    }

    /// What the device is, and what its journal says.
    pub fn device(&self) -> &dyn Backend {
        &*self.backend
    }
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kept").field("device", &self.backend.description().name).field("left", &self.left()).finish_non_exhaustive()
    }
}

/// A kept device that was claimed, on its way to its next session.
pub struct Continued {
    pub(crate) backend: Box<dyn Backend>,
    pub(crate) token: RestToken,
}

impl Continued {
    /// The device, to note something at it.
    pub fn device_mut(&mut self) -> &mut dyn Backend {
        &mut *self.backend
    }

    /// What the device is.
    pub fn device(&self) -> &dyn Backend {
        &*self.backend
    }
}

impl Continued {
    /// The session did not come about: the device is kept for `time` more, for the same.
    pub fn keep_again(self, time: Duration) -> Kept {
        Kept::new(self.backend, Lease { token: self.token, time })
    }
}

impl fmt::Debug for Continued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Continued").field("device", &self.backend.description().name).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Edu;

    fn kept(token: RestToken, time: Duration) -> Kept {
        Kept::new(Box::new(Edu::new().unwrap()), Lease { token, time })
    }

    #[test]
    fn a_claim_is_heard_as_it_was_said_and_nothing_else_is_one() {
        let token = RestToken::random().unwrap();
        assert_eq!(Claim::parse(&token.claim()).rest, Some(token));
    }

    #[test]
    fn only_the_right_token_within_the_lease_claims_a_device() {
        let (right, wrong) = (RestToken::random().unwrap(), RestToken::random().unwrap());
        let kept_long = kept(right, Duration::from_secs(60)).claim(&wrong).expect_err("a stranger claimed the device");
        assert!(kept_long.left().is_some());
        assert_eq!(kept_long.claim(&right).unwrap().device().description().name, Edu::new().unwrap().description().name);
        let late = kept(right, Duration::ZERO);
        assert!(late.left().is_none() && late.claim(&right).is_err(), "a lease that is over was honoured");
        assert!(!format!("{right:?}").contains(&right.0[0].to_string()) || right.0[0] < 10, "a token in a log");
    }
}
