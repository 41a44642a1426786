//! Borrowing: a session with the lender at a unix socket, for a new function or for one that continues on a kept device.
//!
//! `borrow("/run/nvme0", None)` asks for the device; `borrow("/run/nvme0", Some(token))` for the device that a function has left there under this token.

use std::path::Path;

use anyhow::Result;
use farbus_remote_dma::borrower::{BorrowerOptions, BorrowerSession};
use farbus_remote_dma::{Attachment, Claim, DeviceDescription, RestToken};
use farbus_transport::link::hello::{Hello, Role, SPOKEN};
use farbus_transport::link::verdict::Refusal;
use farbus_transport::shm::{self, Connection, ListenError, ShmOptions};

/// The lender's device for a function that left it under `token`: at rest as it was, or, where its lease is over, after its reset.
///
/// # Errors
/// As [`borrow`].
pub fn borrow_again(path: &Path, token: RestToken) -> Result<Box<dyn Attachment>> {
    let gone = |error: &anyhow::Error| matches!(error.downcast_ref(), Some(ListenError::Refused { refusal: Refusal::NotKept, .. }));
    match borrow(path, Some(token)) {
        Err(error) if gone(&error) => borrow(path, None),
        borrowed => borrowed,
    }
}

/// The lender's device.
///
/// # Errors
/// There is no lender, it refuses, or it says what cannot be.
pub fn borrow(path: &Path, token: Option<RestToken>) -> Result<Box<dyn Attachment>> {
    let description = Claim { rest: token, holding: None }.encode();
    let hello = Hello { versions: SPOKEN, role: Role::Borrower, features: 0, epoch: 0, description };
    let Connection { fabric, agreed } = shm::connect(path, &hello, ShmOptions::default())?;
    let device = DeviceDescription::decode(&agreed.peer.description)?;
    let session = BorrowerSession::new(fabric, device, BorrowerOptions::default())?;
    Ok(Box::new(match token {
        Some(token) => session.continuing(token),
        None => session,
    }))
}
