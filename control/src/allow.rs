//! Who may borrow the device that is lent: names of borrowers, given one by one or in a file.
//!
//! `vm7,vm8` allows these two, `*` every borrower whom the authority knows. A file has a name on each line, and is read again for each borrower,
//! so that a name that is taken out of it is refused from then on.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::identity::{Name, NameError};
use crate::read::{ReadError, read_text};

/// Allows every borrower of the authority.
pub const EVERYBODY: &str = "*";

/// Why a list is none. The culprit is this side.
#[derive(Debug, Error)]
pub enum AllowError {
    /// A name is none.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A line of the file is no name.
    #[error("line {line} of {path}: {source}")]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from one.
        line: usize,
        /// What is wrong.
        source: NameError,
    },
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ReadError,
    },
}

/// Who may borrow. Empty, it allows nobody.
#[derive(Clone, Debug, Default)]
pub struct AllowList {
    everybody: bool,
    names: BTreeSet<Name>,
    file: Option<PathBuf>,
}

impl AllowList {
    /// Allows one more: a name or [`EVERYBODY`].
    ///
    /// # Errors
    /// [`AllowError::Name`].
    pub fn add(&mut self, text: &str) -> Result<(), AllowError> {
        if text == EVERYBODY {
            self.everybody = true;
        } else {
            self.names.insert(text.parse()?);
        }
        Ok(())
    }

    /// Allows those in `path` too: a name a line; empty lines and what follows a `#` mean nothing.
    ///
    /// # Errors
    /// [`AllowError`], where the file is wrong already.
    pub fn add_file(&mut self, path: &Path) -> Result<(), AllowError> {
        read(path)?;
        self.file = Some(path.to_path_buf());
        Ok(())
    }

    /// Whether `name` may borrow now.
    ///
    /// # Errors
    /// [`AllowError`] where that cannot be told, because the file has become wrong.
    pub fn allows(&self, name: &Name) -> Result<bool, AllowError> {
        if self.everybody || self.names.contains(name) {
            return Ok(true);
        }
        let listed = self.file.as_deref().map(read).transpose()?.unwrap_or_default();
        Ok(listed.everybody || listed.names.contains(name))
    }
}

fn read(path: &Path) -> Result<AllowList, AllowError> {
    let text = read_text(path).map_err(|source| AllowError::Unreadable { path: path.to_path_buf(), source })?;
    let mut list = AllowList::default();
    for (at, line) in text.lines().enumerate() {
        let name = line.split('#').next().unwrap_or_default().trim();
        if name.is_empty() {
            continue;
        }
        list.add(name).map_err(|error| match error {
            AllowError::Name(source) => AllowError::Line { path: path.to_path_buf(), line: at + 1, source },
            other => other,
        })?;
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(list: &AllowList, name: &str) -> bool {
        list.allows(&name.parse().unwrap()).unwrap()
    }

    #[test]
    fn nobody_is_allowed_who_is_not_named() {
        let mut list = AllowList::default();
        assert!(!allows(&list, "vm7"));
        list.add("vm7").unwrap();
        assert!(allows(&list, "vm7") && !allows(&list, "vm8") && !allows(&list, "VM7") && !allows(&list, "vm77"));
        assert!(matches!(list.add("vm*"), Err(AllowError::Name(_))));
        list.add(EVERYBODY).unwrap();
        assert!(allows(&list, "vm8"));
    }

    #[test]
    fn a_file_is_read_again_for_each_borrower_and_one_that_broke_allows_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("allowed");
        let mut list = AllowList::default();
        assert!(matches!(list.add_file(&path), Err(AllowError::Unreadable { .. })));
        std::fs::write(&path, "# the lab\n\n  vm7  # on rack 3\nvm8\n").unwrap();
        list.add_file(&path).unwrap();
        assert!(allows(&list, "vm7") && allows(&list, "vm8") && !allows(&list, "vm9") && !allows(&list, "rack"));
        std::fs::write(&path, "vm8\n").unwrap();
        assert!(!allows(&list, "vm7") && allows(&list, "vm8"));
        std::fs::write(&path, "vm8\nvm 9\n").unwrap();
        assert!(matches!(list.allows(&"vm8".parse().unwrap()), Err(AllowError::Line { line: 2, .. })));
        std::fs::write(&path, "#".repeat((1 << 20) + 1)).unwrap();
        assert!(list.allows(&"vm8".parse().unwrap()).unwrap_err().to_string().ends_with("it has more than 1048576 bytes"));
        std::fs::remove_file(&path).unwrap();
        // A pipe in its place keeps nobody waiting.
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
        assert!(list.allows(&"vm8".parse().unwrap()).unwrap_err().to_string().ends_with("it is no file but a pipe"));
        std::fs::remove_file(&path).unwrap();
        assert!(list.allows(&"vm8".parse().unwrap()).is_err());
        std::fs::write(&path, "*\n").unwrap();
        assert!(allows(&list, "vm1"));
    }
}
