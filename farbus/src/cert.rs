//! `farbus cert`: a small private authority, the certificates that it signs, and what a certificate says.
//!
//! `farbus cert init lab`, then `farbus cert issue lab --name vm7 --role borrower`, and lab/borrower/vm7 is what `farbus borrow --tls` wants.

use std::path::Path;
use std::time::SystemTime;

use farbus_control::authority::{Authority, AuthorityError, Request};
use farbus_control::certificate::{Certificate, Moment, Untimely, Validity};
use farbus_control::identity::Identity;
use farbus_control::store::{AUTHORITY_KEY, StoreError, open_authority, save_authority, save_issued};
use farbus_transport::link::hello::Role;
use serde_json::{Value, json};

use crate::cli::{CertArgs, CertCommand, CertInitArgs, CertIssueArgs, CertRole, CertShowArgs};
use crate::failure::{Advise, misuse};
use crate::output::print_line;

/// Days of a certificate, where nothing else is asked for.
const DAYS: u32 = 365;

/// Makes an authority or a certificate, or shows one.
pub fn run(args: &CertArgs) -> anyhow::Result<()> {
    match &args.command {
        CertCommand::Init(args) => init(args),
        CertCommand::Issue(args) => issue(args),
        CertCommand::Show(args) => show(args),
    }
}

fn init(args: &CertInitArgs) -> anyhow::Result<()> {
    let authority = Authority::create(&args.name, Validity::days_from_now(args.days))?;
    save_authority(&args.folder, &authority).or_else(|error| {
        let hint = match &error {
            StoreError::Exists(_) => "choose another folder; what the authority there has signed needs it",
            _ => "choose a folder that this user may write",
        };
        Err(error).advise("cannot make an authority", hint)
    })?;
    let folder = args.folder.display();
    let until = authority.certificate().validity.until;
    if args.json {
        print_line(&json!({ "folder": args.folder, "certificate": described(authority.certificate()) }).to_string());
    } else {
        print_line(&format!("authority {} in {folder}, until {until}", args.name));
        print_line(&format!("keep {folder}/{AUTHORITY_KEY} to yourself: whoever has it can make any certificate"));
    }
    Ok(())
}

fn issue(args: &CertIssueArgs) -> anyhow::Result<()> {
    let (role, word) = match args.role {
        CertRole::Lender => (Role::Lender, "lend"),
        CertRole::Borrower => (Role::Borrower, "borrow"),
    };
    let authority = open_authority(&args.folder).or_else(|error| {
        let hint = match &error {
            StoreError::NoAuthority(folder) => format!("make one: farbus cert init {}", folder.display()),
            _ => "use a folder that `farbus cert init` made, as its user".to_owned(),
        };
        Err(error).advise("cannot sign", hint)
    })?;
    let mut validity = Validity::days_from_now(args.days.unwrap_or(DAYS));
    if args.days.is_none() {
        validity.until = validity.until.min(authority.certificate().validity.until);
    }
    let request = Request { identity: Identity { role, name: args.name.clone() }, addresses: args.addresses.clone(), validity };
    let issued = authority.issue(&request).or_else(|error| {
        let hint = match &error {
            AuthorityError::BorrowerAddress => return Err(misuse(error.to_string(), "leave --address out")),
            AuthorityError::Address(_) => {
                return Err(misuse(error.to_string(), "name a host as in --address nas.example.org or --address 10.0.0.7"));
            }
            AuthorityError::Outlives { .. } => "ask for fewer --days",
            AuthorityError::Untimely(Untimely::Expired { .. }) => {
                "make a new authority with `farbus cert init`, and certificates of it for all"
            }
            AuthorityError::Untimely(Untimely::NotYetValid { .. }) => "look at this host's clock: date -u",
            _ => "this should not happen: say so where you got farbus",
        };
        Err(error).advise("cannot sign", hint)
    })?;
    let place = save_issued(&args.folder, &request.identity, &issued, args.replace).or_else(|error| {
        let hint = match &error {
            StoreError::Exists(_) => "add --replace to put a new one in its place, or choose another --name",
            _ => "use a folder that this user may write",
        };
        Err(error).advise("cannot keep the certificate", hint)
    })?;
    if args.json {
        let made = json!({ "folder": place, "role": role.to_string(), "name": args.name.to_string(), "addresses": args.addresses,
            "until": validity.until.to_string() });
        print_line(&made.to_string());
    } else {
        print_line(&format!("{role} {} in {}, until {}", args.name, place.display(), validity.until));
        print_line(&format!("copy that folder to its host; there: farbus {word} … --tls {}", short(&place)));
    }
    Ok(())
}

/// The last part of a folder's path.
fn short(place: &Path) -> String {
    place.file_name().map_or_else(|| place.display().to_string(), |name| name.display().to_string())
}

fn show(args: &CertShowArgs) -> anyhow::Result<()> {
    let all = Certificate::read(&args.file).advise("cannot show it", "name a file such as cert.pem or authority.pem")?;
    if args.json {
        let all: Vec<_> = all.iter().map(described).collect();
        print_line(&json!({ "certificates": all }).to_string());
        return Ok(());
    }
    for certificate in &all {
        let Certificate { subject, issuer, addresses, validity, .. } = certificate;
        print_line(&format!("{} {subject}, signed by {issuer}", kind(certificate)));
        if let Some(identity) = &certificate.identity {
            print_line(&format!("  name   {}", identity.name));
            print_line(&format!("  role   {}", identity.role));
        }
        if !addresses.is_empty() {
            print_line(&format!("  for    {}", addresses.join(", ")));
        }
        print_line(&format!("  from   {}", validity.from));
        print_line(&format!("  until  {} ({})", validity.until, state(validity)));
    }
    Ok(())
}

fn kind(certificate: &Certificate) -> &'static str {
    match (&certificate.identity, certificate.is_authority) {
        (_, true) => "authority",
        (Some(_), false) => "certificate of",
        (None, false) => "certificate that names no lender or borrower, of",
    }
}

fn state(validity: &Validity) -> String {
    let now = Moment(SystemTime::now());
    match validity.check(now) {
        Ok(()) => {
            let left = validity.until.0.duration_since(now.0).unwrap_or_default();
            format!("valid, {} days left", left.as_secs() / 86_400)
        }
        Err(Untimely::Expired { .. }) => "expired".to_owned(),
        Err(Untimely::NotYetValid { .. }) => "not valid yet".to_owned(),
    }
}

fn described(certificate: &Certificate) -> Value {
    json!({
        "name": certificate.identity.as_ref().map(|identity| identity.name.to_string()),
        "role": certificate.identity.as_ref().map(|identity| identity.role.to_string()),
        "authority": certificate.is_authority,
        "subject": certificate.subject,
        "issuer": certificate.issuer,
        "addresses": certificate.addresses,
        "from": certificate.validity.from.to_string(),
        "until": certificate.validity.until.to_string(),
        "valid": certificate.validity.check(Moment(SystemTime::now())).is_ok(),
    })
}
