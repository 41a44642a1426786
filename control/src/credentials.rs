//! What one side shows the other, and by what it judges the other: a certificate, its key, and the authority that both trust.
//!
//! `Credentials::load(&CredentialFiles::in_folder("lab/borrower/vm7"))` takes the three files that `farbus cert issue` made for vm7.

use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use rustls::sign::CertifiedKey;
use thiserror::Error;

use crate::certificate::{Certificate, CertificateError, Moment, Untimely, chain, pem_problem};
use crate::identity::Identity;
use crate::read::{ReadError, read};
use crate::store::{AUTHORITY, CERTIFICATE, KEY};

/// The cryptography of both sides: ring's.
pub(crate) static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| Arc::new(rustls::crypto::ring::default_provider()));

/// Where credentials lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CredentialFiles {
    /// The certificate, and any between it and the authority's.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The authority, or several.
    pub authority: PathBuf,
}

impl CredentialFiles {
    /// The three of a folder that `farbus cert issue` made.
    pub fn in_folder(folder: &Path) -> Self {
        Self { certificate: folder.join(CERTIFICATE), key: folder.join(KEY), authority: folder.join(AUTHORITY) }
    }
}

/// Why there are no credentials. The culprit is this side.
#[derive(Debug, Error)]
pub enum CredentialsError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ReadError,
    },
    /// Whoever reads the key can pose as its owner.
    #[error("{path} can be read by everybody on this host (mode {mode:04o})")]
    Exposed {
        /// The key's file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// A part is no PEM, or the wrong PEM.
    #[error("the {part} is not usable: {why}")]
    Unusable {
        /// Which of the three.
        part: &'static str,
        /// Why.
        why: String,
    },
    /// A certificate's bytes are wrong.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// The certificate does not say whose it is.
    #[error("the certificate of {subject} has no one name that begins with farbus:lender/ or farbus:borrower/")]
    Unnamed {
        /// Whose it is in words.
        subject: String,
    },
    /// What is given as the authority may not sign.
    #[error("the authority's certificate of {subject} is none of an authority")]
    NoAuthority {
        /// Whose it is in words.
        subject: String,
    },
    /// The key and the certificate are not of one pair.
    #[error("the key is not the one of the certificate")]
    OtherKey,
    /// This side's certificate is not valid now.
    #[error("this side's certificate {0}")]
    Untimely(Untimely),
    /// The authority's is not valid now.
    #[error("the authority's certificate {0}")]
    AuthorityUntimely(Untimely),
}

/// A certificate with its key, and the authority by which the peer's is judged.
#[derive(Clone)]
pub struct Credentials {
    pub(crate) own: Arc<CertifiedKey>,
    pub(crate) roots: Arc<RootCertStore>,
    says: Arc<Says>,
}

/// What the certificates say.
struct Says {
    identity: Identity,
    certificate: Certificate,
    authorities: Vec<Certificate>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("certificate", &self.says.certificate)
            .field("authorities", &self.says.authorities)
            .finish_non_exhaustive()
    }
}

impl Credentials {
    /// Reads them from files.
    ///
    /// # Errors
    /// [`CredentialsError`].
    pub fn load(files: &CredentialFiles) -> Result<Self, CredentialsError> {
        let read = |path: &Path| read(path).map_err(|source| CredentialsError::Unreadable { path: path.to_path_buf(), source });
        let (certificate, authority, key) = (read(&files.certificate)?, read(&files.authority)?, read(&files.key)?);
        if let Ok(found) = std::fs::metadata(&files.key)
            && found.permissions().mode() & 0o004 != 0
        {
            return Err(CredentialsError::Exposed { path: files.key.clone(), mode: found.permissions().mode() & 0o7777 });
        }
        Self::from_pem(&certificate, &key, &authority)
    }

    /// Takes them from PEM texts.
    ///
    /// # Errors
    /// [`CredentialsError`].
    pub fn from_pem(certificate: &[u8], key: &[u8], authority: &[u8]) -> Result<Self, CredentialsError> {
        let unusable = |part| move |why| CredentialsError::Unusable { part, why };
        let own = chain(certificate).map_err(unusable("certificate"))?;
        let parsed = own.first().map(|der| Certificate::parse(der)).transpose()?;
        // A chain is never empty.
        let Some(parsed) = parsed else { return Err(unusable("certificate")("there is none".to_owned())) };
        let Some(identity) = parsed.identity.clone() else { return Err(CredentialsError::Unnamed { subject: parsed.subject }) };
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| unusable("key")(pem_problem(&error)))?;
        let own = CertifiedKey::from_der(own, key, &PROVIDER).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => CredentialsError::OtherKey,
            other => unusable("key")(other.to_string()),
        })?;
        let (mut roots, mut authorities) = (RootCertStore::empty(), Vec::new());
        for der in chain(authority).map_err(unusable("authority's certificate"))? {
            let parsed = Certificate::parse(&der)?;
            if !parsed.is_authority {
                return Err(CredentialsError::NoAuthority { subject: parsed.subject });
            }
            roots.add(der).map_err(|error| unusable("authority's certificate")(error.to_string()))?;
            authorities.push(parsed);
        }
        Ok(Self { own: Arc::new(own), roots: Arc::new(roots), says: Arc::new(Says { identity, certificate: parsed, authorities }) })
    }

    /// Whether they are valid at `moment`: the peer would refuse, and less clearly.
    ///
    /// # Errors
    /// [`CredentialsError::Untimely`], [`CredentialsError::AuthorityUntimely`] where none of the authorities is valid.
    pub fn check(&self, moment: Moment) -> Result<(), CredentialsError> {
        self.says.certificate.validity.check(moment).map_err(CredentialsError::Untimely)?;
        let mut untimely = self.says.authorities.iter().map(|authority| authority.validity.check(moment));
        // One that is valid is enough; TLS itself does not look at the times of what it is told to trust.
        if untimely.clone().any(|checked| checked.is_ok()) {
            return Ok(());
        }
        untimely.find_map(Result::err).map_or(Ok(()), |untimely| Err(CredentialsError::AuthorityUntimely(untimely)))
    }

    /// Whose they are.
    pub fn identity(&self) -> &Identity {
        &self.says.identity
    }

    /// What this side's certificate says.
    pub fn certificate(&self) -> &Certificate {
        &self.says.certificate
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::authority::{Authority, Issued, Request};
    use crate::certificate::Validity;
    use crate::store::save_issued;

    const IDENTITY: &str = "farbus:borrower/vm7";

    fn issued(days: u32) -> Issued {
        let authority = Authority::create(&"lab".parse().unwrap(), Validity::days_from_now(days + 1)).unwrap();
        let identity = Identity::from_uri(IDENTITY).unwrap();
        authority.issue(&Request { identity, addresses: Vec::new(), validity: Validity::days_from_now(days) }).unwrap()
    }

    fn take(certificate: &str, key: &str, authority: &str) -> Result<Credentials, CredentialsError> {
        Credentials::from_pem(certificate.as_bytes(), key.as_bytes(), authority.as_bytes())
    }

    #[test]
    fn the_files_of_a_folder_are_credentials_until_everybody_can_read_the_key() {
        let scratch = tempfile::tempdir().unwrap();
        let place = save_issued(scratch.path(), &Identity::from_uri(IDENTITY).unwrap(), &issued(1), false).unwrap();
        let files = CredentialFiles::in_folder(&place);
        assert_eq!(Credentials::load(&files).unwrap().identity().to_string(), IDENTITY);
        std::fs::set_permissions(&files.key, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(Credentials::load(&files), Err(CredentialsError::Exposed { mode: 0o644, .. })));
        std::fs::remove_file(&files.authority).unwrap();
        let Err(CredentialsError::Unreadable { path, .. }) = Credentials::load(&files) else { panic!() };
        assert_eq!(path, files.authority);
    }

    #[test]
    fn parts_that_do_not_belong_together_are_refused() {
        let (one, other) = (issued(1), issued(1));
        assert!(take(&one.certificate, &one.key, &one.authority).is_ok());
        // Another authority may be trusted than the one that signed for this side.
        assert!(take(&one.certificate, &one.key, &other.authority).is_ok());
        assert!(matches!(take(&one.certificate, &other.key, &one.authority), Err(CredentialsError::OtherKey)));
        assert!(matches!(take(&one.authority, &one.key, &one.authority), Err(CredentialsError::Unnamed { .. })));
        assert!(matches!(take(&one.certificate, &one.key, &one.certificate), Err(CredentialsError::NoAuthority { .. })));
        for (part, certificate, key, authority) in [
            ("certificate", &one.key, &one.key, &one.authority),
            ("key", &one.certificate, &one.certificate, &one.authority),
            ("authority's certificate", &one.certificate, &one.key, &one.key),
        ] {
            let Err(CredentialsError::Unusable { part: found, .. }) = take(certificate, key, authority) else { panic!("{part}") };
            assert_eq!(found, part);
        }
    }

    #[test]
    fn times_are_judged_for_both_certificates() {
        let credentials = {
            let one = issued(10);
            take(&one.certificate, &one.key, &one.authority).unwrap()
        };
        let at = |seconds: u64| Moment(SystemTime::now() + Duration::from_secs(seconds));
        assert!(credentials.check(at(0)).is_ok());
        assert!(matches!(credentials.check(at(11 * 86_400)), Err(CredentialsError::Untimely(Untimely::Expired { .. }))));
        let past = Moment(SystemTime::now() - Duration::from_secs(86_400));
        assert!(matches!(credentials.check(past), Err(CredentialsError::Untimely(Untimely::NotYetValid { .. }))));
        let (long, short) = (issued(10), issued(1));
        let mixed = take(&long.certificate, &long.key, &short.authority).unwrap();
        assert!(matches!(mixed.check(at(5 * 86_400)), Err(CredentialsError::AuthorityUntimely(Untimely::Expired { .. }))));
    }
}
