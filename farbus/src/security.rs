//! How the two sides of an `rdma:` link know each other: the options for it, and what they come to.
//!
//! `--tls lab/borrower/vm7` names the folder that `farbus cert issue` made; without it, and without a word, nothing is lent or borrowed over a
//! network: plain TCP has to be asked for with `--plain`, and beyond this host's loopback twice.

use std::path::PathBuf;
use std::time::SystemTime;

use clap::Args;
use farbus_control::allow::{AllowError, EVERYBODY};
use farbus_control::certificate::{Moment, Untimely};
use farbus_control::credentials::CredentialsError;
use farbus_control::identity::Name;
use farbus_control::{AllowList, BorrowerSecurity, CredentialFiles, Credentials, LenderSecurity};
use farbus_transport::link::hello::Role;

use crate::failure::{Advise, misuse, refusal};
use crate::link_address::LinkAddress;
use crate::values::parse_allowed;

/// Above these arguments in the help; said of each, because a heading for all would stay for what follows them.
const HEADING: &str = "Security of rdma: links";

/// What a side shows the other.
#[derive(Clone, Debug, Default, Args)]
pub struct SecurityArgs {
    /// The folder that `farbus cert issue` made for this side: cert.pem, key.pem and authority.pem
    #[arg(long, help_heading = HEADING, value_name = "DIR", conflicts_with_all = ["cert", "key", "authority", "plain"])]
    pub tls: Option<PathBuf>,
    /// This side's certificate, instead of --tls
    #[arg(long, help_heading = HEADING, value_name = "FILE", requires_all = ["key", "authority"], conflicts_with = "plain")]
    pub cert: Option<PathBuf>,
    /// Its key
    #[arg(long, help_heading = HEADING, value_name = "FILE", requires = "cert")]
    pub key: Option<PathBuf>,
    /// The certificate of the authority that the other side's must be signed by
    #[arg(long, help_heading = HEADING, value_name = "FILE", requires = "cert")]
    pub authority: Option<PathBuf>,
    /// No TLS: nobody is known, and everybody on the way can read and change what is said. On this host's loopback only
    #[arg(long, help_heading = HEADING)]
    pub plain: bool,
    /// With --plain: on other networks too
    #[arg(long, help_heading = HEADING, requires = "plain")]
    pub plain_beyond_loopback: bool,
}

/// Who may borrow.
#[derive(Clone, Debug, Default, Args)]
pub struct AllowArgs {
    /// Borrowers that may have the device, by the names in their certificates; '*' for all that the authority knows
    #[arg(long, help_heading = HEADING, value_name = "NAME", value_delimiter = ',', conflicts_with = "plain", value_parser = parse_allowed)]
    pub allow: Vec<String>,
    /// A file of such names, one a line; read again for each borrower
    #[arg(long, help_heading = HEADING, value_name = "FILE", conflicts_with = "plain")]
    pub allow_file: Option<PathBuf>,
}

/// Which lender is wanted.
#[derive(Clone, Debug, Default, Args)]
pub struct PeerArgs {
    /// The lender of this name, wherever it is; without it, the one whose certificate is for the HOST that is connected to
    #[arg(long, help_heading = HEADING, value_name = "NAME", conflicts_with = "plain")]
    pub peer: Option<Name>,
}

/// What to do where nothing was said.
const CHOOSE: &str = "name the folder of this side's certificate with --tls DIR (`farbus cert --help` says how to make one), or use --plain on loopback";

impl SecurityArgs {
    /// For the lender at `address`.
    pub fn lender(&self, allow: &AllowArgs, address: &LinkAddress) -> anyhow::Result<LenderSecurity> {
        if self.plain {
            return Ok(LenderSecurity::Plain { beyond_loopback: self.plain_beyond_loopback });
        }
        let credentials = self.credentials(address, Role::Lender)?;
        let mut list = AllowList::default();
        if allow.allow.is_empty() && allow.allow_file.is_none() {
            let hint = format!(
                "name borrowers with --allow NAME or --allow-file FILE; --allow '{EVERYBODY}' lends to all of the authority"
            );
            return Err(misuse("nobody is allowed to borrow", hint));
        }
        let wrong = |error: AllowError| {
            Err(error).advise("the list of those who may borrow is wrong", "use the names that `farbus cert show` prints")
        };
        for name in &allow.allow {
            list.add(name).or_else(wrong)?;
        }
        if let Some(path) = &allow.allow_file {
            list.add_file(path).or_else(wrong)?;
        }
        Ok(LenderSecurity::Tls { credentials, allow: list })
    }

    /// For a borrower from `address`.
    pub fn borrower(&self, peer: &PeerArgs, address: &LinkAddress) -> anyhow::Result<BorrowerSecurity> {
        if self.plain {
            return Ok(BorrowerSecurity::Plain { beyond_loopback: self.plain_beyond_loopback });
        }
        Ok(BorrowerSecurity::Tls { credentials: self.credentials(address, Role::Borrower)?, peer: peer.peer.clone() })
    }

    /// Whether anything was said.
    pub fn is_given(&self) -> bool {
        self.tls.is_some() || self.cert.is_some() || self.plain
    }

    /// For an address that needs none of it: an option that does nothing is a misunderstanding.
    pub fn none(&self, address: &LinkAddress, others: bool) -> anyhow::Result<()> {
        if others || self.is_given() {
            let hint = "leave these options out: shared memory is for processes of one user, which the kernel knows";
            return Err(misuse(format!("{address} takes no options of TLS and the like"), hint));
        }
        Ok(())
    }

    fn credentials(&self, address: &LinkAddress, role: Role) -> anyhow::Result<Credentials> {
        let files = match (&self.tls, &self.cert, &self.key, &self.authority) {
            (Some(folder), ..) => CredentialFiles::in_folder(folder),
            (None, Some(certificate), Some(key), Some(authority)) => {
                CredentialFiles { certificate: certificate.clone(), key: key.clone(), authority: authority.clone() }
            }
            _ => return Err(misuse(format!("{address} needs TLS"), CHOOSE)),
        };
        let loaded = Credentials::load(&files).and_then(|credentials| {
            credentials.check(Moment(SystemTime::now()))?;
            Ok(credentials)
        });
        let credentials = loaded.or_else(|error| {
            let advice = advice(&error, &files, role);
            Err(error).advise("cannot use this side's certificate", advice)
        })?;
        let found = credentials.identity().role;
        if found != role {
            let hint = format!("make one with `farbus cert issue DIR --name NAME --role {role}`");
            return Err(refusal(format!("{} is the certificate of a {found}, not of a {role}", files.certificate.display()), hint));
        }
        Ok(credentials)
    }
}

/// What to do.
fn advice(error: &CredentialsError, files: &CredentialFiles, role: Role) -> String {
    match error {
        CredentialsError::Exposed { path, .. } => {
            format!("chmod 600 {}, and make a new one if others may have read it", path.display())
        }
        CredentialsError::Untimely(Untimely::Expired { .. }) => {
            format!("make a new one: farbus cert issue DIR --name NAME --role {role} --replace")
        }
        CredentialsError::AuthorityUntimely(Untimely::Expired { .. }) => {
            "make a new authority with `farbus cert init`, and certificates of it for both sides".to_owned()
        }
        CredentialsError::Untimely(Untimely::NotYetValid { .. })
        | CredentialsError::AuthorityUntimely(Untimely::NotYetValid { .. }) => "look at this host's clock: date -u".to_owned(),
        CredentialsError::OtherKey => {
            format!("take both from one folder: {} and {}", files.certificate.display(), files.key.display())
        }
        CredentialsError::Unreadable { .. } => {
            format!("make one with `farbus cert issue DIR --name NAME --role {role}` and name its folder with --tls")
        }
        _ => format!(
            "`farbus cert show {}` says what it is; `farbus cert issue` makes one that is right",
            files.certificate.display()
        ),
    }
}
