//! Why a request of a vfio-user client failed.
//!
//! A server that refuses `DMA_MAP` with `EEXIST` is [`ClientError::Refused`] with command 2; one that says nothing for a second is
//! [`ClientError::Deadline`].

use std::io;

use rustix::io::Errno;
use thiserror::Error;

/// Why a request failed.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The server refused.
    #[error("the server refused command {command}: {errno}")]
    Refused {
        /// The command's number.
        command: u16,
        /// The errno in its reply.
        errno: Errno,
    },
    /// The server closed the connection.
    #[error("the server closed the connection")]
    Closed,
    /// The server's reply does not fit the question.
    #[error("the server's reply to command {command} does not fit")]
    Reply {
        /// The command's number.
        command: u16,
    },
    /// The server did not answer in time.
    #[error("the server did not answer within {deadline_ms} ms")]
    Deadline {
        /// The time allowed.
        deadline_ms: u64,
    },
    /// More descriptors than one message carries.
    #[error("{count} descriptors do not fit in one message")]
    TooManyFds {
        /// How many were given.
        count: usize,
    },
    /// The socket failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl ClientError {
    /// The errno of a refusal.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }
}
