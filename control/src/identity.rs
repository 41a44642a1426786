//! Who a certificate speaks for: a role and a name, written as one URI among its subject alternative names.
//!
//! `farbus:borrower/vm7` is a borrower called vm7, and `farbus lend --allow vm7` means that one. A certificate has exactly one such name.

use std::fmt;
use std::str::FromStr;

use farbus_transport::link::hello::Role;
use thiserror::Error;

/// Bytes of the longest name: a DNS label's (RFC 1035, section 2.3.4), because a lender's name is one of its DNS names too.
pub const MAX_NAME: usize = 63;

const SCHEME: &str = "farbus:";

/// What a lender or a borrower is called: letters, digits, `.`, `-` and `_`, at most [`MAX_NAME`], and a letter or digit first.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(String);

/// Why a text is no name.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0:?} is no name: use 1 to {MAX_NAME} letters, digits, '.', '-' and '_', a letter or digit first")]
pub struct NameError(String);

impl Name {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let first = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
        let all = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte));
        if first && all && text.len() <= MAX_NAME { Ok(Self(text.to_owned())) } else { Err(NameError(text.to_owned())) }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A role and a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Which end of a link it may be.
    pub role: Role,
    /// What it is called.
    pub name: Name,
}

impl Identity {
    /// What a URI says; `None` where it speaks of something else than farbus, or is wrong.
    pub fn from_uri(uri: &str) -> Option<Self> {
        let (role, name) = uri.strip_prefix(SCHEME)?.split_once('/')?;
        let role = [Role::Lender, Role::Borrower].into_iter().find(|known| known.to_string() == role)?;
        Some(Self { role, name: name.parse().ok()? })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}", self.role, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for role in [Role::Lender, Role::Borrower] {
            for name in ["a", "vm7", "rack-3.host_12", &"x".repeat(MAX_NAME)] {
                let identity = Identity { role, name: name.parse().unwrap() };
                assert_eq!(Identity::from_uri(&identity.to_string()), Some(identity));
            }
        }
    }

    #[test]
    fn anything_else_is_nobody() {
        for uri in
            ["", "farbus:", "farbus:borrower", "farbus:borrower/", "farbus:owner/a", "spiffe:borrower/a", "farbus:borrower/a/b"]
        {
            assert_eq!(Identity::from_uri(uri), None, "{uri}");
        }
        for name in ["", "-a", ".a", "a b", "a,b", "*", "é", "a/b", "a\n", &"x".repeat(MAX_NAME + 1)] {
            assert!(name.parse::<Name>().is_err(), "{name}");
        }
    }
}
