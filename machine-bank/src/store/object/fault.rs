//! What went wrong with an object store, sorted by who can do something about it.
//!
//! A service that refuses the connection is [`StoreError::Unreachable`]; one that says `507 Insufficient Storage` is [`StoreError::Full`]; a key that may not
//! write is [`StoreError::ReadOnly`].

use std::error::Error;
use std::io::{self, ErrorKind};
use std::time::Duration;

use object_store::client::{HttpError, HttpErrorKind};

use crate::store::{Kind, StoreError};

/// Why a request has no answer.
#[derive(Debug)]
pub enum Failure {
    /// It was answered, or could not be sent.
    Refused(object_store::Error),
    /// It took longer than it may.
    Late(Duration),
    /// The threads that do requests are gone.
    Ended,
}

impl From<object_store::Error> for Failure {
    fn from(error: object_store::Error) -> Self {
        Self::Refused(error)
    }
}

impl Failure {
    /// The error of a read of this object.
    pub fn of(self, kind: Kind, name: &str) -> StoreError {
        match self {
            Self::Refused(object_store::Error::NotFound { .. }) => StoreError::Missing { kind, name: name.to_owned() },
            other => sorted(&format!("cannot read {kind} {name}"), false, other),
        }
    }
}

/// This host's fault.
pub fn host(what: String, kind: ErrorKind, why: impl Into<Box<dyn Error + Send + Sync>>) -> StoreError {
    StoreError::Io { what, source: io::Error::new(kind, why) }
}

/// What `what` failed with.
pub fn sorted(what: &str, writing: bool, failure: Failure) -> StoreError {
    let error = match failure {
        Failure::Refused(error) => error,
        Failure::Late(limit) => {
            let source = io::Error::new(ErrorKind::TimedOut, format!("no answer in {limit:?}"));
            return StoreError::Unreachable { what: what.to_owned(), source };
        }
        Failure::Ended => return host(what.to_owned(), ErrorKind::Other, "the threads that do requests are gone"),
    };
    if let object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } = &error {
        let source = io::Error::new(ErrorKind::PermissionDenied, error);
        return if writing { StoreError::ReadOnly(source) } else { StoreError::Io { what: what.to_owned(), source } };
    }
    if let Some(kind) = io_kind(&error) {
        return StoreError::io(what, io::Error::new(kind, error));
    }
    let text = error.to_string();
    let says = |words: &[&str]| words.iter().any(|word| text.contains(word));
    // The crate keeps the status to itself, and says it.
    if says(&["507 Insufficient Storage", "StorageFull", "QuotaExceeded", "InsufficientStorage"]) {
        return StoreError::Full(io::Error::new(ErrorKind::StorageFull, error));
    }
    // Listings and removals say it in words only.
    if says(&["403 Forbidden", "401 Unauthorized", "AccessDenied"]) {
        let source = io::Error::new(ErrorKind::PermissionDenied, error);
        return if writing { StoreError::ReadOnly(source) } else { StoreError::Io { what: what.to_owned(), source } };
    }
    if says(&["404 Not Found", "NoSuchBucket"]) || matches!(error, object_store::Error::NotFound { .. }) {
        return host(what.to_owned(), ErrorKind::NotFound, error);
    }
    let network = chain(&error).find_map(|cause| cause.downcast_ref::<HttpError>()).is_some_and(|error| {
        use HttpErrorKind::{Connect, Interrupted, Request, Timeout, Unknown};
        // Unknown: a connection that was reset while the request was being sent, for one.
        matches!(error.kind(), Connect | Request | Timeout | Interrupted | Unknown)
    });
    if network || says(&["500 Internal", "502 Bad Gateway", "503 Service", "504 Gateway", "429 Too Many", "SlowDown"]) {
        return StoreError::Unreachable { what: what.to_owned(), source: io::Error::other(error) };
    }
    host(what.to_owned(), ErrorKind::Other, error)
}

fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error| (*error).source())
}

/// The kind of the file system's error below, if it is one.
fn io_kind(error: &object_store::Error) -> Option<ErrorKind> {
    if chain(error).any(|cause| cause.is::<HttpError>()) {
        return None;
    }
    chain(error).find_map(|cause| cause.downcast_ref::<io::Error>()).map(io::Error::kind)
}
