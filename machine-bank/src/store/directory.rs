//! A store in a directory: a file for each object, written under another name, synced and renamed, so that it is there whole or not at all.
//!
//! Pack 9f… is `packs/9f…`; while it is written it is `tmp/4711-3`, and a process that is killed leaves that, which the next sweep removes.
//! Locks are flock(2) on files in `locks`: they end with their process, however it ends.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{FlockOperation, flock};

use super::{Draft, Durability, Guard, Hold, Kind, Object, Pin, Store, StoreError, valid_name};
use crate::page::Root;

/// Files that are kept open for reading.
const OPEN_FILES: usize = 256;
/// How often a lock that somebody else has is tried again.
const RETRY: Duration = Duration::from_millis(5);

/// Tells the temporary files of one process apart.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// A bank's objects in a directory.
#[derive(Debug)]
pub struct Directory {
    root: PathBuf,
    open: OpenFiles,
}

/// Files that are kept open; one that somebody replaced is read as it was until it is doubted.
type OpenFiles = Arc<Mutex<HashMap<(Kind, String), Arc<File>>>>;

impl Directory {
    /// Opens the store at `root`.
    ///
    /// # Errors
    /// There is none.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let root = root.into();
        for folder in Kind::ALL.map(folder) {
            let path = root.join(folder);
            fs::metadata(&path)
                .map_err(|error| StoreError::io(format!("{} is no bank: {folder} is missing", root.display()), error))?;
        }
        Ok(Self { root, open: Arc::default() })
    }

    /// Makes the folders of a store at `root`, which may be there and empty, and opens it.
    ///
    /// # Errors
    /// It cannot be written, or something else is there.
    pub fn create(root: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let root = root.into();
        let fail = |error| StoreError::io(format!("cannot make a bank in {}", root.display()), error);
        if let Some(parent) = root.parent() {
            fs::create_dir_all(parent).map_err(fail)?;
        }
        // The memory of machines is nobody else's to read, whatever the umask is; who made the directory has said whose it is.
        match DirBuilder::new().mode(0o700).create(&root) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && root.is_dir() => {}
            made => made.map_err(fail)?,
        }
        let folders: Vec<_> = Kind::ALL.map(folder).into_iter().chain(["tmp", "locks"]).collect();
        for entry in fs::read_dir(&root).map_err(fail)? {
            let name = entry.map_err(fail)?.file_name();
            if !folders.iter().any(|folder| name == *folder) {
                return Err(fail(io::Error::new(io::ErrorKind::AlreadyExists, format!("{} is there", name.display()))));
            }
        }
        for folder in folders {
            fs::create_dir_all(root.join(folder)).map_err(fail)?;
        }
        sync_folder(&root).map_err(fail)?;
        Self::open(root)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.root
    }

    fn folder(&self, kind: Kind) -> PathBuf {
        self.root.join(folder(kind))
    }

    fn file(&self, kind: Kind, name: &str) -> Result<Arc<File>, StoreError> {
        let key = (kind, name.to_owned());
        if let Some(file) = self.open.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(file.clone());
        }
        if !valid_name(name) {
            return Err(StoreError::Name(name.to_owned()));
        }
        let path = self.folder(kind).join(name);
        let file = File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => StoreError::Missing { kind, name: name.to_owned() },
            _ => StoreError::io(format!("cannot read {}", path.display()), error),
        })?;
        let file = Arc::new(file);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.len() >= OPEN_FILES {
            open.clear();
        }
        open.insert(key, file.clone());
        Ok(file)
    }

    fn forget(&self, kind: Kind, name: &str) {
        forget(&self.open, kind, name);
    }

    /// Opens a file of `locks`, which is made where it is missing.
    fn lock_file(&self, name: &str) -> Result<File, StoreError> {
        let path = self.root.join("locks").join(name);
        let open = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path);
        open.map_err(|error| StoreError::io(format!("cannot lock {}", path.display()), error))
    }
}

fn forget(open: &OpenFiles, kind: Kind, name: &str) {
    open.lock().unwrap_or_else(PoisonError::into_inner).remove(&(kind, name.to_owned()));
}

fn folder(kind: Kind) -> &'static str {
    match kind {
        Kind::Config => "config",
        Kind::Pack => "packs",
        Kind::Index => "index",
        Kind::Manifest => "manifests",
    }
}

/// A name that nobody else has: containers that share a directory each have a process 1.
fn unique() -> Result<String, StoreError> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|error| StoreError::io("cannot draw a name", io::Error::from(error)))?;
    Ok(format!("{}-{}-{:016x}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed), u64::from_le_bytes(random)))
}

fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

impl Store for Directory {
    fn address(&self) -> String {
        self.root.display().to_string()
    }

    fn list(&self, kind: Kind) -> Result<Vec<Object>, StoreError> {
        let path = self.folder(kind);
        let fail = |error| StoreError::io(format!("cannot list {}", path.display()), error);
        let mut objects = Vec::new();
        for entry in fs::read_dir(&path).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            // What is removed while we look is not there.
            let Ok(about) = entry.metadata() else { continue };
            if let Ok(name) = entry.file_name().into_string()
                && valid_name(&name)
                && about.is_file()
            {
                objects.push(Object { name, len: about.len(), modified: about.modified().unwrap_or(SystemTime::UNIX_EPOCH) });
            }
        }
        Ok(objects)
    }

    fn read(&self, kind: Kind, name: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        let file = self.file(kind, name)?;
        file.read_exact_at(buf, offset).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                StoreError::Ends { kind, name: name.to_owned(), wanted: offset.saturating_add(buf.len() as u64) }
            }
            _ => StoreError::io(format!("cannot read {kind} {name}"), error),
        })
    }

    fn len(&self, kind: Kind, name: &str) -> Result<u64, StoreError> {
        let about = self.file(kind, name)?.metadata();
        about.map(|about| about.len()).map_err(|error| StoreError::io(format!("cannot read {kind} {name}"), error))
    }

    fn create(&self, kind: Kind) -> Result<Box<dyn Draft>, StoreError> {
        let name = unique()?;
        let temporary = self.root.join("tmp").join(name);
        let fail = |error| StoreError::io(format!("cannot write {}", temporary.display()), error);
        let file = OpenOptions::new().create_new(true).write(true).open(&temporary).map_err(fail)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| fail(error.into()))?;
        let open = self.open.clone();
        Ok(Box::new(FileDraft { folder: self.folder(kind), temporary, file, kind, open, committed: false }))
    }

    fn sync(&self, kind: Kind) -> Result<(), StoreError> {
        let path = self.folder(kind);
        sync_folder(&path).map_err(|error| StoreError::io(format!("cannot sync {}", path.display()), error))
    }

    fn remove(&self, kind: Kind, name: &str) -> Result<(), StoreError> {
        if !valid_name(name) {
            return Err(StoreError::Name(name.to_owned()));
        }
        self.forget(kind, name);
        let path = self.folder(kind).join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(StoreError::io(format!("cannot remove {}", path.display()), error))
            }
            _ => Ok(()),
        }
    }

    fn hold(&self, hold: Hold, wait: Duration) -> Result<Box<dyn Guard>, StoreError> {
        let file = self.lock_file(if hold == Hold::Commit { "commit" } else { "use" })?;
        let operation = match hold {
            Hold::Deposit => FlockOperation::NonBlockingLockShared,
            Hold::Commit | Hold::Sweep => FlockOperation::NonBlockingLockExclusive,
        };
        let until = Instant::now() + wait;
        loop {
            match flock(&file, operation) {
                Ok(()) => return Ok(Box::new(FileGuard { _file: file, remove: None })),
                Err(rustix::io::Errno::WOULDBLOCK) => {}
                Err(error) => return Err(StoreError::io("cannot lock the bank", error.into())),
            }
            if Instant::now() >= until {
                let by = match hold {
                    Hold::Deposit => "another process removes from this bank, or collects its garbage",
                    Hold::Commit => "another process does not end naming what it deposited",
                    Hold::Sweep => "another process deposits into this bank, or removes from it",
                };
                return Err(StoreError::Busy { by: by.to_owned() });
            }
            std::thread::sleep(RETRY);
        }
    }

    fn pin(&self, root: Root) -> Result<Box<dyn Guard>, StoreError> {
        // Under its name only when it is locked: one that is not has a dead owner.
        let unique = unique()?;
        let (new, name) = (format!("new-{unique}"), format!("pin-{unique}"));
        let mut file = self.lock_file(&new)?;
        let (new, path) = (self.root.join("locks").join(new), self.root.join("locks").join(name));
        let fail = |error| StoreError::io(format!("cannot write {}", path.display()), error);
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| fail(error.into()))?;
        let text = format!("{root} {}\n", std::process::id());
        file.write_all(text.as_bytes()).and_then(|()| fs::rename(&new, &path)).map_err(fail)?;
        Ok(Box::new(FileGuard { _file: file, remove: Some(path) }))
    }

    fn pins(&self) -> Result<Vec<Pin>, StoreError> {
        let folder = self.root.join("locks");
        let fail = |error| StoreError::io(format!("cannot list {}", folder.display()), error);
        let mut pins = Vec::new();
        for entry in fs::read_dir(&folder).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            if !entry.file_name().as_encoded_bytes().starts_with(b"pin-") {
                continue;
            }
            let path = entry.path();
            let Ok(file) = File::open(&path) else { continue };
            if flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
                // Its owner has let go; who removes it first does not matter.
                if let Err(error) = fs::remove_file(&path) {
                    tracing::debug!(%error, path = %path.display(), "a dead process's pin stays");
                }
                continue;
            }
            let text = io::read_to_string(file).map_err(fail)?;
            let mut words = text.split_whitespace();
            if let (Some(root), Some(pid)) = (words.next().and_then(Root::from_hex), words.next().and_then(|pid| pid.parse().ok()))
            {
                pins.push(Pin { root, pid });
            }
        }
        Ok(pins)
    }

    fn doubt(&self, kind: Kind, name: &str) {
        self.forget(kind, name);
    }

    fn tidy(&self) -> Result<u64, StoreError> {
        let path = self.root.join("tmp");
        let fail = |error| StoreError::io(format!("cannot tidy {}", path.display()), error);
        let mut freed = 0;
        for entry in fs::read_dir(&path).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let Ok(file) = File::open(entry.path()) else { continue };
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                freed += file.metadata().map_err(fail)?.len();
                fs::remove_file(entry.path()).map_err(fail)?;
            }
        }
        Ok(freed)
    }
}

#[derive(Debug)]
struct FileDraft {
    folder: PathBuf,
    temporary: PathBuf,
    file: File,
    kind: Kind,
    open: OpenFiles,
    committed: bool,
}

impl Draft for FileDraft {
    fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.file.write_all(bytes).map_err(|error| StoreError::io(format!("cannot write a {}", self.kind), error))
    }

    fn commit(mut self: Box<Self>, name: &str, durability: Durability) -> Result<(), StoreError> {
        if !valid_name(name) {
            return Err(StoreError::Name(name.to_owned()));
        }
        let path = self.folder.join(name);
        let fail = |error| StoreError::io(format!("cannot write {}", path.display()), error);
        if durability == Durability::Durable {
            self.file.sync_data().map_err(fail)?;
        }
        fs::rename(&self.temporary, &path).map_err(fail)?;
        forget(&self.open, self.kind, name);
        self.committed = true;
        Ok(())
    }
}

impl Drop for FileDraft {
    fn drop(&mut self) {
        if !self.committed
            && let Err(error) = fs::remove_file(&self.temporary)
        {
            tracing::debug!(%error, path = %self.temporary.display(), "a temporary file stays");
        }
    }
}

/// The lock ends when the file is closed.
#[derive(Debug)]
struct FileGuard {
    _file: File,
    remove: Option<PathBuf>,
}

impl Guard for FileGuard {}

impl Drop for FileGuard {
    fn drop(&mut self) {
        if let Some(path) = &self.remove
            && let Err(error) = fs::remove_file(path)
        {
            tracing::debug!(%error, path = %path.display(), "a pin stays until the next sweep");
        }
    }
}
