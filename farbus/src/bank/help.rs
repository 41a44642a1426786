//! What to do about what went wrong with a bank.
//!
//! A directory that is full: "free some space there: farbus bank gc removes what no machine needs"; a tenant's bank without its key: "name the key with
//! --tenant-key FILE".

use std::error::Error;

use farbus_machine_bank::BankError;
use farbus_machine_bank::archive::{ExportError, ImportError};
use farbus_machine_bank::bank::FindError;
use farbus_machine_bank::cloud_hypervisor::{RestoreError, SaveError};
use farbus_machine_bank::deposit::DepositError;
use farbus_machine_bank::keep::CopyError;
use farbus_machine_bank::manifest::ManifestError;
use farbus_machine_bank::qemu::QemuError;
use farbus_machine_bank::reader::ReadError;
use farbus_machine_bank::store::{Kind, StoreError};
use farbus_machine_bank::withdraw::WithdrawError;

use super::args::Place;
use crate::failure::Advise;

/// Says what could not be done, and what to do about why.
pub trait Helped<T> {
    /// `what` failed with a bank at `place`.
    ///
    /// # Errors
    /// The error that it was, with both.
    fn helped(self, what: impl Into<String>, place: &Place) -> anyhow::Result<T>;
}

impl<T, E: Error + Send + Sync + 'static> Helped<T> for Result<T, E> {
    fn helped(self, what: impl Into<String>, place: &Place) -> anyhow::Result<T> {
        self.map_err(anyhow::Error::new).or_else(|error| {
            let hint = hint(&error, place);
            Err(error).advise(what, hint)
        })
    }
}

/// Errors pass their causes' text on as their own, so the whole chain is looked at from the outside.
fn hint(error: &anyhow::Error, place: &Place) -> String {
    let bank = &place.bank;
    for cause in error.chain() {
        if let Some(error) = cause.downcast_ref::<BankError>() {
            match error {
                BankError::KeyNeeded => return "name the key that it was made with: --tenant-key FILE".to_owned(),
                BankError::WrongKey => return "name the key that it was made with, or none where there was none".to_owned(),
                BankError::Exists => return "use it as it is, or choose another place".to_owned(),
                BankError::Malformed(_) => {
                    return "restore its file config/bank from a copy: the machines are as they were".to_owned();
                }
                BankError::Store(error) => return store_hint(error, place),
            }
        }
        if let Some(error) = of_store(cause) {
            return store_hint(error, place);
        }
        if let Some(FindError::None(_)) = cause.downcast_ref() {
            return format!(
                "farbus bank list {bank} shows what is there; write MACHINE, MACHINE@NUMBER, or 6 or more digits of a root"
            );
        }
        if let Some(error) = cause.downcast_ref::<DepositError>() {
            match error {
                DepositError::Source(_) => {
                    return "name files that this user can read, and that nobody shortens meanwhile".to_owned();
                }
                DepositError::Parent(FindError::None(_)) => {
                    return format!("farbus bank list {bank} shows what is there; \"none\" compares with nothing");
                }
                DepositError::Manifest(_) => {
                    return format!("farbus bank verify {bank} tells what is damaged; --parent none deposits without it");
                }
                DepositError::Name(_) | DepositError::Twice(_) => {
                    return "choose another name, for a section with NAME=FILE".to_owned();
                }
                DepositError::Store(error) => return store_hint(error, place),
                _ => {}
            }
        }
        match cause.downcast_ref() {
            Some(ImportError::Malformed(_)) => {
                return "export the machine again, and compare the sizes of the two files".to_owned();
            }
            Some(ImportError::Keys(_)) => {
                return "import it into a bank of the same tenant; or withdraw the machine there and deposit it here".to_owned();
            }
            Some(ImportError::NoBase(_)) => {
                return format!(
                    "import that machine first, or export the whole one, without --since; farbus bank list {bank} shows what is there"
                );
            }
            Some(ImportError::Source(_)) => return "name a file that this user can read".to_owned(),
            _ => {}
        }
        if let Some(ExportError::Target(_)) = cause.downcast_ref() {
            return "choose a place that this user can write, on a file system with room for it".to_owned();
        }
        if let Some(RestoreError::Other(_)) = cause.downcast_ref() {
            return "withdraw its sections: --to DIR, or --section SECTION=FILE".to_owned();
        }
        if matches!(cause.downcast_ref(), Some(SaveError::Refused(_)))
            || matches!(cause.downcast_ref(), Some(RestoreError::Refused(_)))
        {
            return "the other end has to be a Cloud Hypervisor that can migrate to another process (July 2026 or newer), with --memory shared=on; its log says more".to_owned();
        }
        match cause.downcast_ref() {
            Some(QemuError::Other) => return "withdraw its sections: --to DIR, or --section SECTION=FILE".to_owned(),
            Some(QemuError::Malformed(_) | QemuError::Block { .. }) => {
                return "whoever deposited it did so wrongly; its sections can be withdrawn: --to DIR".to_owned();
            }
            Some(QemuError::Withdraw(WithdrawError::Target(_))) => {
                return "choose a place that this user can write, on a file system with room for it".to_owned();
            }
            _ => {}
        }
        if let Some(CopyError::Keys) = cause.downcast_ref() {
            return "copy between banks of one tenant; or withdraw the machine and deposit it there".to_owned();
        }
        if matches!(cause.downcast_ref(), Some(ManifestError::Malformed { .. } | ManifestError::NoBase { .. }))
            || matches!(cause.downcast_ref(), Some(ReadError::Missing(_) | ReadError::Damaged { .. }))
        {
            return format!("farbus bank verify {bank} tells which machines are whole; an earlier deposit of this one may be");
        }
        if let Some(error) = cause.downcast_ref::<StoreError>() {
            return store_hint(error, place);
        }
    }
    format!("farbus bank verify {bank} tells whether the bank is whole")
}

/// The store's error in one that passes its text on as its own, where the chain does not show it.
fn of_store<'a>(cause: &'a (dyn Error + 'static)) -> Option<&'a StoreError> {
    let of_manifest = |error: &'a ManifestError| if let ManifestError::Store(error) = error { Some(error) } else { None };
    let of_read = |error: &'a ReadError| if let ReadError::Store(error) = error { Some(error) } else { None };
    if let Some(error) = cause.downcast_ref::<WithdrawError>() {
        return match error {
            WithdrawError::Store(error) => Some(error),
            WithdrawError::Manifest(error) => of_manifest(error),
            WithdrawError::Read(error) | WithdrawError::Page { error, .. } => of_read(error),
            _ => None,
        };
    }
    if let Some(error) = cause.downcast_ref::<CopyError>() {
        return match error {
            CopyError::Store(error) => Some(error),
            CopyError::Manifest(error) => of_manifest(error),
            CopyError::Read(error) => of_read(error),
            _ => None,
        };
    }
    if let Some(FindError::Store(error)) = cause.downcast_ref() {
        return Some(error);
    }
    let of_manifest = cause.downcast_ref().and_then(of_manifest);
    of_manifest.or_else(|| cause.downcast_ref().and_then(of_read))
}

fn store_hint(error: &StoreError, place: &Place) -> String {
    let bank = &place.bank;
    if bank.is_bucket()
        && let Some(hint) = bucket_hint(error)
    {
        return hint;
    }
    match error {
        StoreError::Busy { .. } => "try again when it has ended, or wait longer: --wait 5m".replace("5m", "300s"),
        StoreError::Full(_) => format!("free some space there: farbus bank gc {bank} removes what no machine needs"),
        StoreError::ReadOnly(_) => {
            format!("run it as a user that may write {bank}, on a file system that is not mounted read-only")
        }
        StoreError::Refused(_) => format!("who serves {bank} can do it there, or say more to farbus bank serve"),
        StoreError::Gone(_) => {
            format!("look whether farbus bank serve runs at {bank}, and run this again: what was done is not done twice")
        }
        StoreError::Unreachable { .. } => {
            format!(
                "see what keeps {bank} from answering, and run the same again: what was stored is found, and nothing half-done is seen"
            )
        }
        StoreError::Lapsed { .. } => {
            "run the same again: what was stored is found; a host that sleeps or is cut off meanwhile is taken for dead after 30 s"
                .to_owned()
        }
        StoreError::Unsealed { .. } => {
            format!("farbus bank verify {bank} tells which machines are whole; an earlier deposit of this one may be")
        }
        StoreError::Missing { kind: Kind::Config, .. } => format!("make a bank first: farbus bank init {bank}"),
        StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            format!("name a bank's directory, or make one: farbus bank init {bank}")
        }
        StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::AlreadyExists => {
            "name a directory that is empty or not there".to_owned()
        }
        _ => format!("look at the file system of {bank}; farbus bank verify {bank} tells whether the bank is whole"),
    }
}

/// What is otherwise where there is no file system to look at.
fn bucket_hint(error: &StoreError) -> Option<String> {
    let hint = match error {
        StoreError::Unreachable { .. } => {
            "see whether AWS_ENDPOINT_URL (or AWS_REGION) names a service that answers from here, and run the same again: what was stored is \
             found, and nothing half-done is seen"
        }
        // Its leases end by themselves, unlike locks.
        StoreError::Busy { .. } => "try again, or wait longer: --wait 60s; a process that died is waited for up to 32 s",
        StoreError::ReadOnly(_) => "use credentials that may write to the bucket: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        StoreError::Io { source, .. } => match source.kind() {
            std::io::ErrorKind::PermissionDenied => {
                "name credentials that may read the bucket: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, and AWS_SESSION_TOKEN where they are lent"
            }
            std::io::ErrorKind::NotFound => "make the bucket, or name another",
            std::io::ErrorKind::AlreadyExists => "use the bank that is there as it is, or choose another prefix",
            std::io::ErrorKind::InvalidInput => {
                "set AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; AWS_ALLOW_HTTP=true where an http:// service is wanted"
            }
            _ => "look at what the service says of it",
        },
        _ => return None,
    };
    Some(hint.to_owned())
}
