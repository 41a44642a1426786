//! A small private authority: it signs the certificates by which lenders and borrowers of one site know each other.
//!
//! `Authority::create("lab", days)` makes a key and a certificate for it; `authority.issue(&request)` makes the key and the certificate of
//! borrower vm7. What is made is written by [`crate::store`].

use std::net::IpAddr;
use std::time::SystemTime;

use farbus_transport::link::hello::Role;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, string::Ia5String,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{DnsName, PrivateKeyDer};
use thiserror::Error;
use time::OffsetDateTime;

use crate::certificate::{Certificate, CertificateError, Moment, Untimely, Validity, chain, pem_problem};
use crate::identity::{Identity, Name};

/// Why nothing was made or signed.
#[derive(Debug, Error)]
pub enum AuthorityError {
    /// An address that no certificate can hold.
    #[error("{0:?} is neither a DNS name nor an IP address")]
    Address(String),
    /// Borrowers are known by name only.
    #[error("a borrower needs no address: lenders know it by its name")]
    BorrowerAddress,
    /// The authority's certificate is over, or will be before what it signs.
    #[error("the authority {0}")]
    Untimely(Untimely),
    /// The certificate would outlive its authority's.
    #[error("a certificate until {wanted} would outlive its authority, which is valid until {authority}")]
    Outlives {
        /// Its last moment.
        wanted: Moment,
        /// The authority's.
        authority: Moment,
    },
    /// No authority that farbus made.
    #[error("this is no authority that `farbus cert init` made: {0}")]
    Foreign(String),
    /// The certificate cannot be read.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// The key and the certificate are not of one pair.
    #[error("the authority's key is not the one of its certificate")]
    OtherKey,
    /// The library refused.
    #[error("cannot make a certificate: {0}")]
    Library(#[from] rcgen::Error),
}

/// An authority with its key.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: Certificate,
    pem: String,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

/// What to sign.
#[derive(Clone, Debug)]
pub struct Request {
    /// Whose it will be.
    pub identity: Identity,
    /// Where a lender is reached: DNS names and IP addresses. Its name is one of them by itself.
    pub addresses: Vec<String>,
    /// From when until when.
    pub validity: Validity,
}

/// A certificate with its key and its authority, each in PEM form.
pub struct Issued {
    /// The certificate.
    pub certificate: String,
    /// Its key (PKCS#8). A secret.
    pub key: String,
    /// The authority's certificate.
    pub authority: String,
}

impl Authority {
    /// Makes one called `name`.
    ///
    /// # Errors
    /// [`AuthorityError::Library`].
    pub fn create(name: &Name, validity: Validity) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate()?;
        let mut params = params(&subject(name), validity);
        // It signs lenders and borrowers, no other authority.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let made = params.self_signed(&key)?;
        let certificate = Certificate::parse(made.der())?;
        Ok(Self { issuer: Issuer::new(params, key), certificate, pem: made.pem() })
    }

    /// Takes one up again from its certificate and key.
    ///
    /// # Errors
    /// [`AuthorityError`].
    pub fn from_pem(certificate: &str, key: &str) -> Result<Self, AuthorityError> {
        // Looked at here, because the library that takes it does not say what is wrong with it.
        PrivateKeyDer::from_pem_slice(key.as_bytes())
            .map_err(|error| AuthorityError::Foreign(format!("its key is not usable: {}", pem_problem(&error))))?;
        let key = KeyPair::from_pem(key)?;
        let chain = chain(certificate.as_bytes()).map_err(AuthorityError::Foreign)?;
        let [der] = chain.as_slice() else {
            return Err(AuthorityError::Foreign(format!("there are {} certificates", chain.len())));
        };
        let parsed = Certificate::parse(der)?;
        let name = parsed.subject.strip_prefix("CN=").and_then(|name| name.parse::<Name>().ok());
        let Some(name) = name.filter(|_| parsed.is_authority) else {
            return Err(AuthorityError::Foreign(format!("its subject is {:?}", parsed.subject)));
        };
        if !certifies(der, &key) {
            return Err(AuthorityError::OtherKey);
        }
        let params = params(&subject(&name), parsed.validity);
        Ok(Self { issuer: Issuer::new(params, key), certificate: parsed, pem: certificate.to_owned() })
    }

    /// What its certificate says.
    pub fn certificate(&self) -> &Certificate {
        &self.certificate
    }

    /// Its certificate in PEM form: what everybody who trusts it needs.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Its key in PEM form. A secret.
    pub fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// Makes a key and signs its certificate.
    ///
    /// # Errors
    /// [`AuthorityError`].
    pub fn issue(&self, request: &Request) -> Result<Issued, AuthorityError> {
        self.certificate.validity.check(Moment(SystemTime::now())).map_err(AuthorityError::Untimely)?;
        let (wanted, authority) = (request.validity.until, self.certificate.validity.until);
        if wanted > authority {
            return Err(AuthorityError::Outlives { wanted, authority });
        }
        let mut params = params(&subject(&request.identity.name), request.validity);
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.subject_alt_names = alternative_names(request)?;
        params.extended_key_usages = vec![match request.identity.role {
            Role::Lender => ExtendedKeyUsagePurpose::ServerAuth,
            Role::Borrower => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        let key = KeyPair::generate()?;
        let made = params.signed_by(&key, &self.issuer)?;
        Ok(Issued { certificate: made.pem(), key: key.serialize_pem(), authority: self.pem.clone() })
    }
}

fn subject(name: &Name) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, name.as_str());
    subject
}

fn params(subject: &DistinguishedName, validity: Validity) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = subject.clone();
    params.not_before = OffsetDateTime::from(validity.from.0);
    params.not_after = OffsetDateTime::from(validity.until.0);
    params
}

fn alternative_names(request: &Request) -> Result<Vec<SanType>, AuthorityError> {
    let mut names = vec![SanType::URI(Ia5String::try_from(request.identity.to_string())?)];
    if request.identity.role == Role::Borrower {
        return if request.addresses.is_empty() { Ok(names) } else { Err(AuthorityError::BorrowerAddress) };
    }
    if let Ok(name) = dns_name(request.identity.name.as_str()) {
        names.push(name);
    }
    for address in &request.addresses {
        let name = match address.parse::<IpAddr>() {
            Ok(ip) => SanType::IpAddress(ip),
            Err(_) => dns_name(address)?,
        };
        if !names.contains(&name) {
            names.push(name);
        }
    }
    Ok(names)
}

fn dns_name(text: &str) -> Result<SanType, AuthorityError> {
    let wrong = || AuthorityError::Address(text.to_owned());
    DnsName::try_from(text).map_err(|_| wrong())?;
    Ok(SanType::DnsName(Ia5String::try_from(text).map_err(|_| wrong())?))
}

/// Whether the public key in a certificate is that of `key`.
fn certifies(der: &[u8], key: &KeyPair) -> bool {
    use x509_cert::der::Decode;
    let Ok(parsed) = x509_cert::Certificate::from_der(der) else { return false };
    let public = &parsed.tbs_certificate().subject_public_key_info().subject_public_key;
    public.as_bytes() == Some(key.public_key_raw())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificate::CLOCK_SKEW;

    fn lab() -> Authority {
        Authority::create(&"lab".parse().unwrap(), Validity::days_from_now(10)).unwrap()
    }

    fn request(identity: &str, addresses: &[&str], days: u32) -> Request {
        Request {
            identity: Identity::from_uri(identity).unwrap(),
            addresses: addresses.iter().map(|&address| address.to_owned()).collect(),
            validity: Validity::days_from_now(days),
        }
    }

    fn read(pem: &str) -> Certificate {
        Certificate::parse(&chain(pem.as_bytes()).unwrap()[0]).unwrap()
    }

    #[test]
    fn a_certificate_says_what_was_asked_for() {
        let authority = lab();
        let wanted = request("farbus:lender/nas", &["nas.example.org", "10.0.0.7", "fd00::7", "nas"], 3);
        let certificate = read(&authority.issue(&wanted).unwrap().certificate);
        assert_eq!(certificate.identity.as_ref(), Some(&wanted.identity));
        assert_eq!(certificate.addresses, ["nas", "nas.example.org", "10.0.0.7", "fd00::7"]);
        assert_eq!((certificate.subject.as_str(), certificate.issuer.as_str()), ("CN=nas", "CN=lab"));
        assert!(!certificate.is_authority && authority.certificate().is_authority);
        let length = certificate.validity.until.0.duration_since(certificate.validity.from.0).unwrap();
        assert_eq!(length.as_secs(), 3 * 86_400 + CLOCK_SKEW.as_secs());
        let borrower = read(&authority.issue(&request("farbus:borrower/vm7", &[], 1)).unwrap().certificate);
        assert_eq!(borrower.identity.unwrap().to_string(), "farbus:borrower/vm7");
        assert!(borrower.addresses.is_empty());
    }

    #[test]
    fn an_authority_that_is_taken_up_again_signs_as_before() {
        let authority = lab();
        let again = Authority::from_pem(authority.pem(), &authority.key_pem()).unwrap();
        assert_eq!(again.certificate(), authority.certificate());
        let issued = again.issue(&request("farbus:borrower/vm7", &[], 1)).unwrap();
        assert_eq!(issued.authority, authority.pem());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let authority = lab();
        let refused = |identity, addresses: &[&str], days| authority.issue(&request(identity, addresses, days)).err().unwrap();
        assert!(matches!(refused("farbus:borrower/a", &["10.0.0.1"], 1), AuthorityError::BorrowerAddress));
        assert!(matches!(refused("farbus:borrower/a", &[], 11), AuthorityError::Outlives { .. }));
        for wrong in ["", "two words", "10.0.0", "a_b..c", "*"] {
            assert!(matches!(refused("farbus:lender/a", &[wrong], 1), AuthorityError::Address(_)), "{wrong}");
        }
        let past = Validity { from: Moment(SystemTime::now() - 2 * CLOCK_SKEW), until: Moment(SystemTime::now() - CLOCK_SKEW) };
        let over = Authority::create(&"old".parse().unwrap(), past).unwrap();
        assert!(matches!(
            over.issue(&request("farbus:borrower/a", &[], 0)),
            Err(AuthorityError::Untimely(Untimely::Expired { .. }))
        ));
    }

    #[test]
    fn another_key_and_another_certificate_are_no_authority() {
        let (authority, other) = (lab(), lab());
        let cut_off = Authority::from_pem(authority.pem(), &authority.key_pem()[..60]).unwrap_err().to_string();
        assert!(cut_off.ends_with("its key is not usable: it is cut off: there is no line -----END PRIVATE KEY-----"), "{cut_off}");
        assert!(matches!(Authority::from_pem(authority.pem(), &other.key_pem()), Err(AuthorityError::OtherKey)));
        let leaf = authority.issue(&request("farbus:borrower/vm7", &[], 1)).unwrap();
        assert!(matches!(Authority::from_pem(&leaf.certificate, &leaf.key), Err(AuthorityError::Foreign(_))));
        assert!(matches!(Authority::from_pem("", &authority.key_pem()), Err(AuthorityError::Foreign(_))));
        assert!(matches!(Authority::from_pem(authority.pem(), "no key"), Err(AuthorityError::Foreign(_))));
    }
}
