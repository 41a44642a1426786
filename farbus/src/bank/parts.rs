//! Files under another name until all of them are there, so that what is interrupted leaves nothing that looks whole and goes on where it was.
//!
//! `vm7.ram` is written as `vm7.ram.farbus-part`; when every file of a withdrawal is whole each gets its own name, and never in the place of a file that came there
//! meanwhile, unless that was wished.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, OFlags, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::failure::{Advise, refusal};

/// Behind the name of a file of which all is not there yet.
const PART: &str = ".farbus-part";
/// What to do where a file cannot be written.
pub const PLACE: &str = "choose a place that this user can write, on a file system with room for it";

/// A file that is being written.
#[derive(Debug)]
pub struct Part {
    file: PathBuf,
    part: PathBuf,
    target: File,
}

impl Part {
    /// Begins to write `file`, or goes on with what an earlier process has written of it.
    pub fn begin(file: &Path) -> anyhow::Result<Self> {
        let part = name(file);
        let what = || format!("cannot write {}", part.display());
        let mut options = File::options();
        options.create(true).truncate(false).read(true).write(true);
        // No link is followed to a file that is somebody's, and no pipe is waited for.
        options.custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed());
        let target = options.open(&part).advise(what(), PLACE)?;
        if !target.metadata().advise(what(), PLACE)?.is_file() {
            return Err(refusal(format!("{}: it is no ordinary file", what()), "move it away, or choose another name"));
        }
        match target.try_lock() {
            Err(TryLockError::WouldBlock) => {
                return Err(refusal(
                    format!("{}: another process is writing it", what()),
                    "wait for its end, or choose another name",
                ));
            }
            // A file system without locks.
            Err(TryLockError::Error(error)) => tracing::debug!(%error, "two processes could write one file"),
            Ok(()) => {}
        }
        Ok(Self { file: file.to_owned(), part, target })
    }

    /// What is written so far.
    pub fn target(&self) -> &File {
        &self.target
    }

    /// All of it is there: it gets its name, in the place of what has it only where that is wished.
    pub fn finish(self, replace: bool) -> anyhow::Result<()> {
        let renamed = if replace { fs::rename(&self.part, &self.file) } else { rename_new(&self.part, &self.file) };
        match renamed {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(there(&self.file)),
            renamed => renamed.advise(format!("cannot write {}", self.file.display()), PLACE),
        }
    }

    /// Takes away what was written.
    pub fn forget(self) {
        if let Err(error) = fs::remove_file(&self.part) {
            tracing::debug!(%error, path = %self.part.display(), "a part of a file stays");
        }
    }
}

/// Something has the name.
pub fn there(file: &Path) -> anyhow::Error {
    refusal(format!("{} is there", file.display()), "choose another name, or say --replace")
}

/// Whether an earlier process has begun to write a file.
pub fn is_begun(file: &Path) -> bool {
    name(file).symlink_metadata().is_ok()
}

fn name(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(PART);
    name.into()
}

fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // The file system cannot (rename(2)); a second name that takes the first one's place cannot replace anything either.
        Err(Errno::INVAL | Errno::NOSYS) => fs::hard_link(from, to).and_then(|()| fs::remove_file(from)),
        renamed => Ok(renamed?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_file_has_its_name_when_it_is_whole_and_nothing_else_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ram");
        let part = Part::begin(&file).unwrap();
        part.target().write_all_at(b"new", 0).unwrap();
        assert!(is_begun(&file) && !file.exists());
        assert!(Part::begin(&file).is_err(), "two write one file");
        // Somebody makes it meanwhile.
        fs::write(&file, "old").unwrap();
        assert!(part.finish(false).is_err());
        assert_eq!(fs::read(&file).unwrap(), b"old");
        Part::begin(&file).unwrap().finish(true).unwrap();
        assert!(fs::read(&file).unwrap() == b"new" && !is_begun(&file));
    }

    #[test]
    fn a_link_in_the_place_of_a_part_leads_nowhere() {
        let folder = tempfile::tempdir().unwrap();
        let (file, other) = (folder.path().join("ram"), folder.path().join("other"));
        fs::write(&other, "mine").unwrap();
        std::os::unix::fs::symlink(&other, name(&file)).unwrap();
        assert!(Part::begin(&file).is_err());
        assert_eq!(fs::read(&other).unwrap(), b"mine");
    }
}
