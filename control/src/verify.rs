//! Whether the peer's certificate is good enough, and why not, as the two checks that TLS calls during its handshake.
//!
//! The lender's check takes a borrower whom its authority signed and its list names; the others are told by an alert, access_denied for vm9 who
//! is not on the list, before they have seen anything but the lender's certificate.

use std::sync::{Arc, OnceLock};

use farbus_transport::link::hello::Role;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme};

use crate::allow::AllowList;
use crate::certificate::Certificate;
use crate::credentials::PROVIDER;
use crate::error::CertificateProblem;
use crate::identity::{Identity, Name};

/// What a check found out about a peer.
pub(crate) type Found = Result<Identity, CertificateProblem>;

/// Which lender a borrower wants.
#[derive(Clone, Debug)]
pub enum WantedLender {
    /// The one of this host: a DNS name or an address among the certificate's.
    Host(ServerName<'static>),
    /// The one of this name, wherever it is.
    Named(Name),
}

/// What TLS is told of a problem: it becomes the alert that the peer hears.
fn refusal(problem: &CertificateProblem) -> Error {
    Error::InvalidCertificate(match problem {
        CertificateProblem::OtherHost { .. } => CertificateError::NotValidForName,
        CertificateProblem::Role { .. } | CertificateProblem::Unnamed { .. } => CertificateError::InvalidPurpose,
        _ => CertificateError::ApplicationVerificationFailure,
    })
}

fn parse(der: &CertificateDer<'_>) -> Result<Certificate, Error> {
    Certificate::parse(der).map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))
}

/// A check of one connection: it keeps what it found.
#[derive(Debug)]
pub(crate) struct BorrowerCheck {
    chain: Arc<dyn ClientCertVerifier>,
    allow: Arc<AllowList>,
    found: OnceLock<Found>,
}

impl BorrowerCheck {
    /// TLS's own part, which all connections of a lender share.
    pub(crate) fn chain(roots: &Arc<RootCertStore>) -> Result<Arc<dyn ClientCertVerifier>, String> {
        let builder = WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(&PROVIDER));
        builder.clear_root_hint_subjects().build().map_err(|error| error.to_string())
    }

    pub(crate) fn new(chain: Arc<dyn ClientCertVerifier>, allow: Arc<AllowList>) -> Self {
        Self { chain, allow, found: OnceLock::new() }
    }

    /// What it found, if it was asked.
    pub(crate) fn found(&self) -> Option<&Found> {
        self.found.get()
    }

    fn judge(&self, certificate: &Certificate) -> Found {
        let identity = CertificateProblem::role(certificate, Role::Borrower)?;
        match self.allow.allows(&identity.name) {
            Ok(true) => Ok(identity),
            Ok(false) => Err(CertificateProblem::NotAllowed { name: identity.name }),
            Err(error) => Err(CertificateProblem::no_list(identity.name, &error)),
        }
    }
}

impl ClientCertVerifier for BorrowerCheck {
    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let certificate = parse(end_entity)?;
        let signed = self.chain.verify_client_cert(end_entity, intermediates, now);
        let (found, verdict) = match signed {
            Err(error) => (Err(CertificateProblem::found(&error, &certificate, Role::Borrower)), Err(error)),
            Ok(verified) => match self.judge(&certificate) {
                Ok(identity) => (Ok(identity), Ok(verified)),
                Err(problem) => (Err(problem.clone()), Err(refusal(&problem))),
            },
        };
        // TLS asks once.
        let _first = self.found.set(found);
        verdict
    }

    /// None: whom this side trusts is nobody's business before the peer has shown who it is.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// A check of one connection: it keeps what it found.
#[derive(Debug)]
pub(crate) struct LenderCheck {
    roots: Arc<RootCertStore>,
    wanted: WantedLender,
    found: OnceLock<Found>,
}

impl LenderCheck {
    pub(crate) fn new(roots: Arc<RootCertStore>, wanted: WantedLender) -> Self {
        Self { roots, wanted, found: OnceLock::new() }
    }

    /// What it found, if it was asked.
    pub(crate) fn found(&self) -> Option<&Found> {
        self.found.get()
    }

    fn judge(&self, parsed: &ParsedCertificate<'_>, certificate: &Certificate) -> Found {
        let identity = CertificateProblem::role(certificate, Role::Lender)?;
        match &self.wanted {
            WantedLender::Named(name) if *name != identity.name => {
                Err(CertificateProblem::OtherPeer { expected: name.clone(), found: identity.name })
            }
            WantedLender::Named(_) => Ok(identity),
            WantedLender::Host(host) => match verify_server_name(parsed, host) {
                Ok(()) => Ok(identity),
                Err(_) => Err(CertificateProblem::OtherHost {
                    host: host.to_str().into_owned(),
                    addresses: certificate.addresses.clone(),
                }),
            },
        }
    }
}

fn algorithms() -> &'static WebPkiSupportedAlgorithms {
    &PROVIDER.signature_verification_algorithms
}

impl ServerCertVerifier for LenderCheck {
    /// `_server_name` is what TLS was started with; whom this side wants is known better here.
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificate = parse(end_entity)?;
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let signed = verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms().all);
        let (found, verdict) = match signed {
            Err(error) => (Err(CertificateProblem::found(&error, &certificate, Role::Lender)), Err(error)),
            Ok(()) => match self.judge(&parsed, &certificate) {
                Ok(identity) => (Ok(identity), Ok(ServerCertVerified::assertion())),
                Err(problem) => (Err(problem.clone()), Err(refusal(&problem))),
            },
        };
        // TLS asks once.
        let _first = self.found.set(found);
        verdict
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, algorithms())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}
