//! The lender's word after the hellos: welcome, or why there is no link.
//!
//! Several borrowers may be saying hello at once, and the first whose hello is complete gets the device. Another then hears 8 bytes,
//! `verdict` and 1: "the device is lent to another borrower". No byte of a link is sent before a welcome.

use std::time::Duration;

use thiserror::Error;

use super::exchange::{ExchangeError, HelloStream, Timed};

/// First bytes of every verdict; one byte of code follows.
const MAGIC: [u8; 7] = *b"verdict";
const WELCOME: u8 = 0;
const LENT: u8 = 1;
const WEDGED: u8 = 2;
const KEPT: u8 = 3;
const NOT_KEPT: u8 = 4;
const CROWDED: u8 = 5;
const GONE: u8 = 6;
const HELD: u8 = 7;
const OTHERS: u8 = 8;

/// Why a borrower whose hello was good gets no link.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Refusal {
    /// Somebody else has the device.
    #[error("the device is lent to another borrower")]
    Lent,
    /// The device has not ended what it did for somebody who has left.
    #[error("the device does not end what it was doing for its last borrower")]
    Wedged,
    /// It serves as many as it may.
    #[error("as many are served there as may be at a time")]
    Crowded,
    /// The device is kept for a function that left it and is restored elsewhere, and this is not the one.
    #[error("the device is kept for a function that has left it, and this borrower does not have that function's state")]
    Kept,
    /// The device is not kept for this function any more: it was reset, and can be had as it is by who does not ask for its rest.
    #[error("the device is not kept for this function any more: it was reset")]
    NotKept,
    /// The device itself is gone, and has not come back yet.
    #[error("the device is gone at the lender")]
    Gone,
    /// It is held for a borrower whose link was lost and who may come back.
    #[error("the device is held for a borrower whose link was lost: try again in some seconds")]
    Held,
    /// Somebody else had it since this borrower lost its link: what it would tell the device again would undo what that one did.
    #[error("another borrower has had the device since this one lost its link, or it is not known that none has")]
    Others,
    /// A reason of a later version of farbus.
    #[error("the lender refuses for reason {0}, which this version does not know")]
    Unknown(u8),
}

impl Refusal {
    const fn code(self) -> u8 {
        match self {
            Self::Lent => LENT,
            Self::Wedged => WEDGED,
            Self::Crowded => CROWDED,
            Self::Kept => KEPT,
            Self::NotKept => NOT_KEPT,
            Self::Gone => GONE,
            Self::Held => HELD,
            Self::Others => OTHERS,
            Self::Unknown(code) => code,
        }
    }
}

/// What a lender says.
pub type Verdict = Result<(), Refusal>;

/// Says it, within `allowed`.
///
/// # Errors
/// [`ExchangeError`]; the stream is of no use then.
pub fn tell<S: HelloStream>(stream: &mut S, verdict: Verdict, allowed: Duration) -> Result<(), ExchangeError> {
    let [a, b, c, d, e, f, g] = MAGIC;
    let code = verdict.map_or_else(Refusal::code, |()| WELCOME);
    Timed::new(stream, allowed).send(&[a, b, c, d, e, f, g, code])?;
    stream.set_timeout(None).map_err(ExchangeError::Host)
}

/// Waits at most `allowed` for it.
///
/// # Errors
/// [`ExchangeError`], [`ExchangeError::PeerClosed`] where the lender left instead; the stream is of no use then.
pub fn hear<S: HelloStream>(stream: &mut S, allowed: Duration) -> Result<Verdict, ExchangeError> {
    let mut bytes = [0; MAGIC.len() + 1];
    Timed::new(stream, allowed).receive(&mut bytes)?;
    stream.set_timeout(None).map_err(ExchangeError::Host)?;
    let [magic @ .., code] = bytes;
    match code {
        _ if magic != MAGIC => Err(ExchangeError::Verdict { found: bytes }),
        WELCOME => Ok(Ok(())),
        LENT => Ok(Err(Refusal::Lent)),
        WEDGED => Ok(Err(Refusal::Wedged)),
        CROWDED => Ok(Err(Refusal::Crowded)),
        KEPT => Ok(Err(Refusal::Kept)),
        NOT_KEPT => Ok(Err(Refusal::NotKept)),
        GONE => Ok(Err(Refusal::Gone)),
        HELD => Ok(Err(Refusal::Held)),
        OTHERS => Ok(Err(Refusal::Others)),
        other => Ok(Err(Refusal::Unknown(other))),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    const SOON: Duration = Duration::from_millis(100);

    #[test]
    fn what_is_told_is_heard() {
        let (mut lender, mut borrower) = UnixStream::pair().unwrap();
        for verdict in [
            Ok(()),
            Err(Refusal::Lent),
            Err(Refusal::Wedged),
            Err(Refusal::Kept),
            Err(Refusal::NotKept),
            Err(Refusal::Crowded),
            Err(Refusal::Gone),
            Err(Refusal::Held),
            Err(Refusal::Others),
            Err(Refusal::Unknown(200)),
        ] {
            tell(&mut lender, verdict, SOON).unwrap();
            assert_eq!(hear(&mut borrower, SOON).unwrap(), verdict);
        }
    }

    #[test]
    fn anything_else_is_no_verdict() {
        let (mut lender, mut borrower) = UnixStream::pair().unwrap();
        assert!(matches!(hear(&mut borrower, SOON), Err(ExchangeError::Deadline { .. })));
        lender.write_all(b"farbus\r\n").unwrap();
        assert!(matches!(hear(&mut borrower, SOON), Err(ExchangeError::Verdict { found }) if found == *b"farbus\r\n"));
        lender.write_all(b"verd").unwrap();
        drop(lender);
        assert!(matches!(hear(&mut borrower, SOON), Err(ExchangeError::PeerClosed { received: 4, .. })));
    }
}
