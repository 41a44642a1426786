//! What a certificate says, for the checks and for people: whose it is, what for, and from when to when.
//!
//! `farbus cert show cert.pem` prints a [`Certificate`]: borrower vm7, from 2026-11-27T05:21:17Z until 2027-11-27T05:21:17Z.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::{self, PemObject};
use thiserror::Error;
use x509_cert::der::{DateTime, Decode};
use x509_cert::ext::pkix::name::GeneralName;
use x509_cert::ext::pkix::{BasicConstraints, SubjectAltName};

use crate::identity::Identity;
use crate::read::{ReadError, read};

/// A moment, written as in 2026-11-27T05:21:17Z.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub SystemTime);

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match DateTime::from_system_time(self.0) {
            Ok(moment) => moment.fmt(f),
            // Nobody's certificate: years that X.509 cannot write (RFC 5280, section 4.1.2.5).
            Err(_) => f.write_str("a time beyond X.509's"),
        }
    }
}

/// From when until when something is valid, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// The first moment.
    pub from: Moment,
    /// The last.
    pub until: Moment,
}

/// How far clocks of two hosts may differ before a fresh certificate is not valid yet.
pub const CLOCK_SKEW: Duration = Duration::from_secs(3600);

impl Validity {
    /// From now on, and from a little earlier ([`CLOCK_SKEW`]) for hosts whose clocks are late.
    pub fn days_from_now(days: u32) -> Self {
        // Certificates have whole seconds (RFC 5280, section 4.1.2.5).
        let whole = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(whole);
        Self { from: Moment(now - CLOCK_SKEW), until: Moment(now + Duration::from_secs(u64::from(days) * 86_400)) }
    }

    /// Whether `moment` is in it.
    ///
    /// # Errors
    /// [`Untimely`].
    pub fn check(&self, moment: Moment) -> Result<(), Untimely> {
        if moment < self.from {
            Err(Untimely::NotYetValid { from: self.from })
        } else if moment > self.until {
            Err(Untimely::Expired { since: self.until })
        } else {
            Ok(())
        }
    }
}

/// Why a certificate is not valid at some moment.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Untimely {
    /// Too late.
    #[error("expired at {since}")]
    Expired {
        /// When.
        since: Moment,
    },
    /// Too early.
    #[error("is not valid before {from}")]
    NotYetValid {
        /// When it is.
        from: Moment,
    },
}

/// What one certificate says. Nothing is verified by reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// Who is its owner in words (RFC 4514).
    pub subject: String,
    /// Who signed it in words (RFC 4514).
    pub issuer: String,
    /// Whom farbus takes it for; `None` where it names nobody or more than one.
    pub identity: Option<Identity>,
    /// Whether it may sign others.
    pub is_authority: bool,
    /// DNS names and IP addresses of its host.
    pub addresses: Vec<String>,
    /// From when until when.
    pub validity: Validity,
}

/// Why there is no certificate to read.
#[derive(Debug, Error)]
pub enum CertificateError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ReadError,
    },
    /// It is no PEM file with certificates.
    #[error("{path} holds no certificate in PEM form: {why}")]
    NoPem {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A certificate's bytes are wrong.
    #[error("the certificate is malformed: {0}")]
    Malformed(String),
}

impl Certificate {
    /// Reads a certificate's DER bytes.
    ///
    /// # Errors
    /// [`CertificateError::Malformed`].
    pub fn parse(der: &[u8]) -> Result<Self, CertificateError> {
        let malformed = |error: x509_cert::der::Error| CertificateError::Malformed(error.to_string());
        let parsed = x509_cert::Certificate::from_der(der).map_err(malformed)?;
        let parsed = parsed.tbs_certificate();
        let names = parsed.get_extension::<SubjectAltName>().map_err(malformed)?.map(|(_, names)| names.0).unwrap_or_default();
        let identities: Vec<_> = names
            .iter()
            .filter_map(|name| match name {
                GeneralName::UniformResourceIdentifier(uri) => Identity::from_uri(uri.as_str()),
                _ => None,
            })
            .collect();
        let constraints = parsed.get_extension::<BasicConstraints>().map_err(malformed)?;
        let moment = |time: x509_cert::time::Time| Moment(time.to_system_time());
        Ok(Self {
            subject: parsed.subject().to_string(),
            issuer: parsed.issuer().to_string(),
            identity: <[Identity; 1]>::try_from(identities).ok().map(|[identity]| identity),
            is_authority: constraints.is_some_and(|(_, constraints)| constraints.ca),
            addresses: names.iter().filter_map(address).collect(),
            validity: Validity { from: moment(parsed.validity().not_before), until: moment(parsed.validity().not_after) },
        })
    }

    /// Reads the certificates of a PEM file.
    ///
    /// # Errors
    /// [`CertificateError`].
    pub fn read(path: &Path) -> Result<Vec<Self>, CertificateError> {
        let pem = read(path).map_err(|source| CertificateError::Unreadable { path: path.to_path_buf(), source })?;
        let chain = chain(&pem).map_err(|why| CertificateError::NoPem { path: path.to_path_buf(), why })?;
        chain.iter().map(|der| Self::parse(der)).collect()
    }
}

/// The certificates of a PEM text, at least one.
pub(crate) fn chain(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let chain = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>().map_err(|error| pem_problem(&error))?;
    if chain.is_empty() { Err("there is no BEGIN CERTIFICATE in it".to_owned()) } else { Ok(chain) }
}

/// What is wrong with a PEM text, in letters where the library prints bytes.
pub(crate) fn pem_problem(error: &pem::Error) -> String {
    match error {
        pem::Error::MissingSectionEnd { end_marker } => {
            format!("it is cut off: there is no line -----END {}-----", end_marker.escape_ascii())
        }
        pem::Error::IllegalSectionStart { line } => format!("the line {} begins no part of it", line.escape_ascii()),
        pem::Error::NoItemsFound => "there is nothing of the kind in it".to_owned(),
        other => other.to_string(),
    }
}

fn address(name: &GeneralName) -> Option<String> {
    match name {
        GeneralName::DnsName(name) => Some(name.as_str().to_owned()),
        GeneralName::IpAddress(bytes) => {
            let bytes = bytes.as_bytes();
            let v4 = || <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from);
            let v6 = || <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from);
            v4().or_else(v6).map(|address| address.to_string())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_written_as_people_and_programs_read_it() {
        let moment = |seconds| Moment(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).to_string();
        assert_eq!(moment(1_795_756_877), "2026-11-27T05:21:17Z");
        assert_eq!(moment(u64::MAX >> 8), "a time beyond X.509's");
    }

    #[test]
    fn noise_and_other_files_are_no_certificate() {
        assert!(matches!(Certificate::parse(&[0x30; 64]), Err(CertificateError::Malformed(_))));
        assert!(matches!(Certificate::parse(&[]), Err(CertificateError::Malformed(_))));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cert.pem");
        assert!(matches!(Certificate::read(&path), Err(CertificateError::Unreadable { .. })));
        for text in
            ["", "hello", "-----BEGIN CERTIFICATE-----\n???\n-----END CERTIFICATE-----\n", "-----BEGIN CERTIFICATE-----\nMIIB"]
        {
            std::fs::write(&path, text).unwrap();
            assert!(matches!(Certificate::read(&path), Err(CertificateError::NoPem { .. })), "{text}");
        }
        let said = Certificate::read(&path).unwrap_err().to_string();
        assert!(said.ends_with("it is cut off: there is no line -----END CERTIFICATE-----"), "{said}");
        std::fs::write(&path, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
        assert!(matches!(Certificate::read(&path), Err(CertificateError::Malformed(_))));
    }
}
