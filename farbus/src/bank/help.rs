//! What to do about what went wrong with a bank.
//!
//! A directory that is full: "free some space there: farbus bank gc removes what no machine needs"; a tenant's bank without its key: "name the key with
//! --tenant-key FILE".

use std::error::Error;
use std::io::ErrorKind;

use farbus_machine_bank::BankError;
use farbus_machine_bank::archive::{ExportError, ImportError};
use farbus_machine_bank::bank::FindError;
use farbus_machine_bank::cloud_hypervisor::{RestoreError, SaveError};
use farbus_machine_bank::codec::Malformed;
use farbus_machine_bank::deposit::DepositError;
use farbus_machine_bank::index::IndexError;
use farbus_machine_bank::keep::{CopyError, RemoveError, RepairError, SweepError};
use farbus_machine_bank::manifest::ManifestError;
use farbus_machine_bank::qemu::QemuError;
use farbus_machine_bank::reader::ReadError;
use farbus_machine_bank::store::{Kind, StoreError};
use farbus_machine_bank::withdraw::WithdrawError;

use super::address::BankAddress;
use super::args::Place;
use super::{bucket, damage};
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
        self.or_else(|error| {
            let (hint, what) = (hint(&error, place), in_words(what.into(), &error, place));
            Err(error).advise(what, hint)
        })
    }
}

const WRITABLE: &str = "choose a place that this user can write, on a file system with room for it";
const SECTIONS: &str = "withdraw its sections: --to DIR, or --section SECTION=FILE";
const PEER: &str = "the other end has to be a Cloud Hypervisor that can migrate to another process (July 2026 or newer), with --memory shared=on; its log says more";
const MEMORY: &str = "end what uses this host's memory, or run it where there is more";

/// What to do about `error`: the outermost that knows, of it and those that it passes on as its own.
fn hint(error: &(dyn Error + 'static), place: &Place) -> String {
    let hint = std::iter::successors(Some(error), |error| within(*error)).find_map(|error| of_one(error, place));
    hint.unwrap_or_else(|| "run it again with -vv, which says more on standard error".to_owned())
}

/// What failed, with what the service of a bucket has to do with it.
fn in_words(what: String, error: &(dyn Error + 'static), place: &Place) -> String {
    let BankAddress::Bucket { bucket, .. } = &place.bank else { return what };
    let store = std::iter::successors(Some(error), |error| within(*error)).find_map(|error| error.downcast_ref::<StoreError>());
    match store.and_then(|error| bucket::told(error, bucket)) {
        Some((told, _)) => format!("{what}: {told}"),
        None => what,
    }
}

/// The error that another passes on as its own, whose source the chain then does not show.
fn within<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a (dyn Error + 'static)> {
    macro_rules! passed_on {
        ($($kind:ident: $($variant:ident)+;)+) => {
            $(if let Some(error) = error.downcast_ref::<$kind>() {
                return match error {
                    $($kind::$variant(inner) => Some(inner),)+
                    _ => None,
                };
            })+
        };
    }
    if let Some(WithdrawError::Page { error, .. }) = error.downcast_ref() {
        return Some(error);
    }
    if let Some(RemoveError::Store(error)) = error.downcast_ref() {
        return Some(error);
    }
    passed_on! {
        BankError: Store;
        FindError: Store;
        ManifestError: Store;
        IndexError: Store;
        ReadError: Store Index;
        DepositError: Parent Manifest Index Store;
        WithdrawError: Manifest Read Store;
        CopyError: Manifest Read Index Store;
        RepairError: Read Index Store;
        SweepError: Manifest Index Read Store;
        ExportError: Manifest Read Store;
        ImportError: Manifest Index Store;
        SaveError: Deposit;
        RestoreError: Withdraw;
        QemuError: Withdraw;
    }
    None
}

/// What to do about an error itself; nothing where it only passes another on.
fn of_one(error: &(dyn Error + 'static), place: &Place) -> Option<String> {
    let bank = &place.bank;
    if let Some(error) = error.downcast_ref() {
        return of_bank(error, place);
    }
    if let Some(FindError::None(_)) = error.downcast_ref() {
        return Some(format!(
            "`farbus bank list {bank}` shows what is there; write MACHINE, MACHINE@NUMBER, or 6 or more digits of a root"
        ));
    }
    if let Some(error) = error.downcast_ref() {
        return of_deposit(error, place);
    }
    if let Some(error) = error.downcast_ref() {
        return of_import(error, place);
    }
    if let Some(error @ (ManifestError::Malformed { .. } | ManifestError::NoBase { .. })) = error.downcast_ref() {
        tracing::debug!(%error, "looking for what else cannot be read");
        return Some(damage::way_out_of(place));
    }
    if let Some(error) = error.downcast_ref() {
        return Some(store_hint(error, place));
    }
    let advice = match error.downcast_ref() {
        Some(ReadError::Missing(_) | ReadError::Damaged { .. }) => return Some(of_pages(place)),
        Some(ReadError::Sent(_)) => {
            return Some(format!("look at the bank on the host that serves {bank}: `farbus bank verify DIRECTORY`"));
        }
        Some(ReadError::Memory(_)) => MEMORY,
        _ => "",
    };
    let advice = match error.downcast_ref() {
        Some(IndexError::Pack { .. }) => return Some(of_pages(place)),
        _ => advice,
    };
    let advice = match error.downcast_ref() {
        Some(WithdrawError::Section(_)) => return Some(format!("`farbus bank show {bank} MACHINE` lists its sections")),
        Some(WithdrawError::Target(_)) => WRITABLE,
        _ => advice,
    };
    let advice = match error.downcast_ref() {
        Some(ExportError::Target(_)) => WRITABLE,
        Some(ExportError::Memory(_)) => MEMORY,
        _ => advice,
    };
    let advice = match error.downcast_ref() {
        Some(QemuError::Other) => SECTIONS,
        Some(QemuError::Malformed(_) | QemuError::Block { .. }) => {
            "whoever deposited it did so wrongly; its sections can be withdrawn: --to DIR"
        }
        _ => advice,
    };
    let advice = match error.downcast_ref() {
        Some(RestoreError::Other(_)) => SECTIONS,
        Some(RestoreError::Refused(_) | RestoreError::Stray(..)) => PEER,
        Some(RestoreError::Page(_)) => return Some(of_pages(place)),
        Some(RestoreError::Memory(_)) => MEMORY,
        _ => advice,
    };
    let advice = match error.downcast_ref() {
        Some(SaveError::Refused(_)) => PEER,
        _ => advice,
    };
    let advice = match error.downcast_ref() {
        Some(CopyError::Keys) => "copy between banks of one tenant; or withdraw the machine and deposit it there",
        Some(CopyError::Memory(_)) => MEMORY,
        _ => advice,
    };
    let no_memory =
        matches!(error.downcast_ref(), Some(SweepError::Memory(_))) || matches!(error.downcast_ref(), Some(RepairError::Memory(_)));
    let advice = if no_memory { MEMORY } else { advice };
    (!advice.is_empty()).then(|| advice.to_owned())
}

fn of_bank(error: &BankError, place: &Place) -> Option<String> {
    let advice = match error {
        BankError::KeyNeeded => "name the key that it was made with: --tenant-key FILE",
        BankError::WrongKey if place.tenant_key.is_some() => {
            "name the key that it was made with: another --tenant-key FILE, or leave it out where there was none"
        }
        BankError::WrongKey => "name the key that it was made with: --tenant-key FILE",
        BankError::Exists => "use it as it is, or choose another place",
        BankError::Malformed(Malformed::Version(..)) => "use the version of farbus that made it, or a later one",
        BankError::Nameless => "restore its object config/bank from a copy of the bank: it never changes; or choose another place",
        BankError::Malformed(_) => "restore its object config/bank from a copy: the machines are as they were",
        BankError::Store(_) => return None,
    };
    Some(advice.to_owned())
}

fn of_deposit(error: &DepositError, place: &Place) -> Option<String> {
    let bank = &place.bank;
    let advice = match error {
        DepositError::Source(_) => "name files that this user can read, and that nobody shortens meanwhile",
        DepositError::Parent(FindError::None(_)) => {
            return Some(format!("`farbus bank list {bank}` shows what is there; --parent none compares with nothing"));
        }
        DepositError::Manifest(error @ (ManifestError::Malformed { .. } | ManifestError::NoBase { .. })) => {
            return of_one(error, place)
                .map(|way| format!("--parent none deposits it all the same, beside what is damaged; {way}"));
        }
        DepositError::Name(_) | DepositError::Twice(_) => "choose another name, for a section with NAME=FILE",
        DepositError::Sections => "deposit fewer sections, or those beyond as a machine of their own",
        DepositError::TooLong { .. } => "deposit it as several sections",
        DepositError::Empty => "name files: --memory FILE, --disk FILE, --device-state FILE, --qemu FILE",
        DepositError::Overtaken(_) => "run it again: it follows what is the last deposit then",
        DepositError::Memory(_) => MEMORY,
        DepositError::Parent(_) | DepositError::Manifest(_) | DepositError::Index(_) | DepositError::Store(_) => return None,
    };
    Some(advice.to_owned())
}

fn of_import(error: &ImportError, place: &Place) -> Option<String> {
    let bank = &place.bank;
    let advice = match error {
        ImportError::Malformed(Malformed::Version(..)) => "use the version of farbus that wrote it, or a later one",
        ImportError::Malformed(_) => "export the machine again, and compare the sizes of the two files",
        ImportError::Keys(_) => "import it into a bank of the same tenant; or withdraw the machine there and deposit it here",
        ImportError::NoBase(_) => {
            return Some(format!(
                "import that machine first, or export the whole one, without --since; `farbus bank list {bank}` shows what is there"
            ));
        }
        ImportError::Source(_) => "name a file that this user can read",
        ImportError::Memory(_) => MEMORY,
        ImportError::Manifest(_) | ImportError::Index(_) | ImportError::Store(_) => return None,
    };
    Some(advice.to_owned())
}

/// Pages are damaged or not there.
fn of_pages(place: &Place) -> String {
    let bank = &place.bank;
    match bank {
        BankAddress::Link(_) => {
            "on the host that serves it `farbus bank verify DIRECTORY --repair` puts what is damaged aside, so that it can be stored again".to_owned()
        }
        _ => format!(
            "`farbus bank verify {bank} --repair` puts what is damaged aside; then the next deposit of the same machine, a copy from another bank or \
             an import stores it again. An earlier deposit may be whole: `farbus bank verify {bank}` names those that are not"
        ),
    }
}

fn store_hint(error: &StoreError, place: &Place) -> String {
    let bank = &place.bank;
    if let BankAddress::Bucket { bucket, .. } = bank
        && let Some((_, hint)) = bucket::told(error, bucket)
    {
        return hint;
    }
    let here = !matches!(bank, BankAddress::Link(_));
    match error {
        StoreError::Busy { .. } => "try again when it has ended, or wait longer: --wait 5m".to_owned(),
        StoreError::Full(_) if here => format!("free some space there: `farbus bank gc {bank}` removes what no machine needs"),
        StoreError::Full(_) => {
            "free some space on the host that serves it: `farbus bank gc DIRECTORY` removes what no machine needs".to_owned()
        }
        StoreError::ReadOnly(_) if here => {
            format!("run it as a user that may read and write {bank}, on a file system that is not mounted read-only")
        }
        StoreError::ReadOnly(_) => format!("see on the host that serves {bank} whether farbus bank serve may write there"),
        StoreError::Refused(_) => format!("who serves {bank} can do it there, or say more to farbus bank serve: --read, --write"),
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
        StoreError::Missing { kind: Kind::Config, .. } => {
            format!(
                "make a bank first: `farbus bank init {bank}`; or, where there was one, restore its object config/bank from a copy"
            )
        }
        StoreError::Missing { kind: Kind::Manifest, .. } => {
            format!("it was removed meanwhile: `farbus bank list {bank}` shows what is there")
        }
        StoreError::Unsealed { kind: Kind::Config, .. }
        | StoreError::Ends { kind: Kind::Config, .. }
        | StoreError::TooLong { kind: Kind::Config, .. } => {
            "restore its object config/bank from a copy: the machines are as they were".to_owned()
        }
        StoreError::Unsealed { kind: Kind::Manifest, .. }
        | StoreError::Ends { kind: Kind::Manifest, .. }
        | StoreError::TooLong { kind: Kind::Manifest, .. } => damage::way_out_of(place),
        StoreError::Missing { .. } | StoreError::Unsealed { .. } | StoreError::Ends { .. } | StoreError::TooLong { .. } => {
            of_pages(place)
        }
        StoreError::Name(_) => "use 1 to 64 letters, digits, '.', '_' and '-'".to_owned(),
        StoreError::Io { .. } if !here => {
            format!("farbus bank serve failed there: look at the bank on the host that serves {bank}")
        }
        StoreError::Io { source, .. } => match source.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => {
                format!("name a bank's directory, or make one: `farbus bank init {bank}`")
            }
            ErrorKind::AlreadyExists | ErrorKind::DirectoryNotEmpty => "name a directory that is empty or not there".to_owned(),
            _ => format!("look at the disk of {bank} (dmesg), and run the same again: what was stored is found"),
        },
    }
}

#[cfg(test)]
mod tests;
