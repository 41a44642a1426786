//! Authorities and certificates as files: secrets only their owner can read, and nothing overwritten unless asked for.
//!
//! `farbus cert init lab` makes `lab/authority.pem` and `lab/authority.key`; `farbus cert issue lab --name vm7 --role borrower` makes the folder
//! `lab/borrower/vm7` with `authority.pem`, `cert.pem` and `key.pem`: all that the host of vm7 needs.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::authority::{Authority, AuthorityError, Issued};
use crate::identity::Identity;
use crate::read::{ReadError, read_text};

/// An authority's certificate, in its own folder and beside each certificate that it signed.
pub const AUTHORITY: &str = "authority.pem";
/// An authority's key.
pub const AUTHORITY_KEY: &str = "authority.key";
/// A lender's or borrower's certificate.
pub const CERTIFICATE: &str = "cert.pem";
/// Its key.
pub const KEY: &str = "key.pem";

/// Why files were not read or written.
#[derive(Debug, Error)]
pub enum StoreError {
    /// There is something already.
    #[error("{0} exists already and is left as it is")]
    Exists(PathBuf),
    /// There is no authority.
    #[error("there is no authority in {0}")]
    NoAuthority(PathBuf),
    /// A file of it cannot be read.
    #[error("cannot read {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ReadError,
    },
    /// It is wrong.
    #[error("the authority in {folder}: {source}")]
    Authority {
        /// Its folder.
        folder: PathBuf,
        /// Why.
        source: AuthorityError,
    },
    /// The host refused.
    #[error("cannot {what} {path}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
}

/// Writes a new authority into `folder`, which is made where it is missing.
///
/// # Errors
/// [`StoreError::Exists`] where an authority is there already, [`StoreError::Host`].
pub fn save_authority(folder: &Path, authority: &Authority) -> Result<(), StoreError> {
    private_folder(folder)?;
    let key = folder.join(AUTHORITY_KEY);
    write_new(&key, &authority.key_pem())?;
    write_new(&folder.join(AUTHORITY), authority.pem()).inspect_err(|_| {
        // The key that this call made is nobody's.
        drop(std::fs::remove_file(&key));
    })
}

/// Takes up the authority in `folder`.
///
/// # Errors
/// [`StoreError`].
pub fn open_authority(folder: &Path) -> Result<Authority, StoreError> {
    let read = |name: &str| {
        let path = folder.join(name);
        read_text(&path).map_err(|source| match source.is_missing() {
            true => StoreError::NoAuthority(folder.to_path_buf()),
            false => StoreError::Unreadable { path, source },
        })
    };
    let (certificate, key) = (read(AUTHORITY)?, read(AUTHORITY_KEY)?);
    Authority::from_pem(&certificate, &key).map_err(|source| StoreError::Authority { folder: folder.to_path_buf(), source })
}

/// Writes a certificate with all that its owner needs into a folder of its own below the authority's, and says where.
///
/// # Errors
/// [`StoreError::Exists`] unless `replace`, [`StoreError::Host`].
pub fn save_issued(folder: &Path, identity: &Identity, issued: &Issued, replace: bool) -> Result<PathBuf, StoreError> {
    let all = folder.join(identity.role.to_string());
    let place = all.join(identity.name.as_str());
    if !replace && place.symlink_metadata().is_ok() {
        return Err(StoreError::Exists(place));
    }
    private_folder(&all)?;
    // Whole or not at all: the files are made beside their place and moved there together.
    let beside = |what: &str| all.join(format!(".{}.{what}-{}", identity.name, std::process::id()));
    let (new, old) = (beside("new"), beside("old"));
    let host = |what, path: &Path| {
        let path = path.to_path_buf();
        move |source| StoreError::Host { what, path, source }
    };
    DirBuilder::new().mode(0o700).create(&new).map_err(host("make", &new))?;
    let written = write_new(&new.join(KEY), &issued.key)
        .and_then(|()| write_new(&new.join(CERTIFICATE), &issued.certificate))
        .and_then(|()| write_new(&new.join(AUTHORITY), &issued.authority))
        .and_then(|()| {
            if replace && place.symlink_metadata().is_ok() {
                std::fs::rename(&place, &old).map_err(host("move away", &place))?;
            }
            std::fs::rename(&new, &place).map_err(host("make", &place))
        });
    if let Err(error) = written {
        drop(std::fs::remove_dir_all(&new));
        return Err(error);
    }
    match std::fs::remove_dir_all(&old) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(host("remove", &old)(error)),
        _ => Ok(place),
    }
}

fn private_folder(folder: &Path) -> Result<(), StoreError> {
    let made = DirBuilder::new().mode(0o700).recursive(true).create(folder);
    made.map_err(|source| StoreError::Host { what: "make", path: folder.to_path_buf(), source })
}

fn write_new(path: &Path, text: &str) -> Result<(), StoreError> {
    let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let written = opened.and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()));
    written.map_err(|source| match source.kind() {
        ErrorKind::AlreadyExists => StoreError::Exists(path.to_path_buf()),
        _ => StoreError::Host { what: "write", path: path.to_path_buf(), source },
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::authority::Request;
    use crate::certificate::Validity;

    fn lab() -> Authority {
        Authority::create(&"lab".parse().unwrap(), Validity::days_from_now(10)).unwrap()
    }

    fn issue(authority: &Authority) -> (Identity, Issued) {
        let identity = Identity::from_uri("farbus:borrower/vm7").unwrap();
        let request = Request { identity: identity.clone(), addresses: Vec::new(), validity: Validity::days_from_now(1) };
        (identity, authority.issue(&request).unwrap())
    }

    #[test]
    fn only_the_owner_can_read_what_is_made_and_it_can_be_taken_up_again() {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path().join("site/lab");
        let authority = lab();
        save_authority(&folder, &authority).unwrap();
        let again = open_authority(&folder).unwrap();
        let (identity, issued) = issue(&again);
        let place = save_issued(&folder, &identity, &issued, false).unwrap();
        assert_eq!(place, folder.join("borrower/vm7"));
        let files =
            [folder.join(AUTHORITY), folder.join(AUTHORITY_KEY), place.join(AUTHORITY), place.join(CERTIFICATE), place.join(KEY)];
        for path in &files {
            assert_eq!(std::fs::metadata(path).unwrap().mode() & 0o7777, 0o600, "{}", path.display());
        }
        for path in [&folder, &place] {
            assert_eq!(std::fs::metadata(path).unwrap().mode() & 0o7777, 0o700, "{}", path.display());
        }
        assert_eq!(std::fs::read_to_string(&files[4]).unwrap(), issued.key);
        assert_eq!(std::fs::read_dir(folder.join("borrower")).unwrap().count(), 1, "something is left over");
    }

    #[test]
    fn what_exists_is_kept_unless_it_is_to_be_replaced() {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path();
        let authority = lab();
        save_authority(folder, &authority).unwrap();
        assert!(matches!(save_authority(folder, &lab()), Err(StoreError::Exists(_))));
        // Half an authority is one too.
        std::fs::remove_file(folder.join(AUTHORITY_KEY)).unwrap();
        assert!(matches!(save_authority(folder, &lab()), Err(StoreError::Exists(_))));
        assert!(!folder.join(AUTHORITY_KEY).exists(), "a key without its certificate");
        assert!(matches!(open_authority(folder), Err(StoreError::NoAuthority(_))));

        let (identity, first) = issue(&authority);
        let place = save_issued(folder, &identity, &first, false).unwrap();
        let (_, second) = issue(&authority);
        assert!(matches!(save_issued(folder, &identity, &second, false), Err(StoreError::Exists(_))));
        assert_eq!(std::fs::read_to_string(place.join(KEY)).unwrap(), first.key);
        save_issued(folder, &identity, &second, true).unwrap();
        assert_eq!(std::fs::read_to_string(place.join(KEY)).unwrap(), second.key);
        assert_eq!(std::fs::read_dir(folder.join("borrower")).unwrap().count(), 1, "something is left over");
    }

    #[test]
    fn a_place_that_cannot_be_written_is_named() {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(matches!(save_authority(&file.join("lab"), &lab()), Err(StoreError::Host { .. })));
        assert!(matches!(open_authority(&scratch.path().join("nowhere")), Err(StoreError::NoAuthority(_))));
        std::fs::write(scratch.path().join(AUTHORITY), "").unwrap();
        std::fs::write(scratch.path().join(AUTHORITY_KEY), "").unwrap();
        assert!(matches!(open_authority(scratch.path()), Err(StoreError::Authority { .. })));
    }
}
