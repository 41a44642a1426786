//! Why a request of a client is not done: a status for its program, and a text for who reads it.
//!
//! A store that is full is status 4 and "the store is full: …"; a machine that the client may not read is status 1, as one that is not there.

use super::super::wire::Status;
use crate::codec::Malformed;
use crate::index::IndexError;
use crate::manifest::ManifestError;
use crate::store::StoreError;

/// Why a request is not done.
pub(super) struct Failure(pub Status, pub String);

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let status = match &error {
            StoreError::Missing { .. } => Status::Missing,
            StoreError::Busy { .. } => Status::Busy,
            StoreError::Full(_) => Status::Full,
            StoreError::ReadOnly(_) => Status::ReadOnly,
            StoreError::Refused(_) => Status::Refused,
            _ => Status::Failed,
        };
        Self(status, error.to_string())
    }
}

impl From<ManifestError> for Failure {
    fn from(error: ManifestError) -> Self {
        match error {
            ManifestError::Store(error) => error.into(),
            other => Self(Status::Failed, other.to_string()),
        }
    }
}

impl From<IndexError> for Failure {
    fn from(error: IndexError) -> Self {
        match error {
            IndexError::Store(error) => error.into(),
            other => Self(Status::Failed, other.to_string()),
        }
    }
}

impl From<Malformed> for Failure {
    fn from(error: Malformed) -> Self {
        refused(error.to_string())
    }
}

pub(super) fn refused(why: impl Into<String>) -> Failure {
    Failure(Status::Refused, why.into())
}

/// The same for a machine that is not there and for one of others.
pub(super) fn missing() -> Failure {
    Failure(Status::Missing, "there is no such machine".to_owned())
}
