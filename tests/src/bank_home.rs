//! A host with a drive and a bank, and borrowers of that drive that are processes of their own: the test program itself, in another part.
//!
//! `place.borrower("works and deposits until it is killed")` starts the test `the_other_process` of this program in a process; there [`part`] says which part that is,
//! where the lender is and which bank it has.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;

use farbus_machine_bank::Bank;
use farbus_machine_bank::store::Directory;
use farbus_remote_dma::model::{Nvme, NvmeOptions};
use farbus_transport::Memory;
use tempfile::TempDir;

/// Says to this program that it is a borrower: its part, the lender's socket and the bank's folder.
const PART: &str = "FARBUS_TEST_BORROWER";

/// A folder with an empty bank, and a drive in memory.
pub struct BankHome {
    folder: TempDir,
    image: Arc<Memory>,
}

impl BankHome {
    /// One whose drive has so many bytes, all zero.
    pub fn new(bytes: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Bank::init(Box::new(Directory::create(folder.path().join("bank")).unwrap()), None).unwrap();
        Self { folder, image: Memory::memfd("image", bytes).unwrap() }
    }

    /// Where the drive is lent.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("lender")
    }

    /// The bank.
    pub fn bank(&self) -> Bank {
        open(&self.folder.path().join("bank"))
    }

    /// The drive, reset.
    pub fn nvme(&self) -> Box<Nvme> {
        Box::new(Nvme::in_memory(Arc::clone(&self.image), NvmeOptions::default()).unwrap())
    }

    /// What the drive has at a block, all of which are of `bytes`.
    pub fn block(&self, number: u64, bytes: u64) -> Vec<u8> {
        let mut block = vec![0; bytes as usize];
        self.image.read(number * bytes, &mut block).unwrap();
        block
    }

    /// This test program as a borrower in a process of its own.
    pub fn borrower(&self, part: &str) -> Child {
        let part = format!("{part}\n{}\n{}", self.socket().display(), self.folder.path().join("bank").display());
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "the_other_process", "--nocapture"]).env(PART, part).spawn().unwrap()
    }
}

/// What a borrower's process is to do.
pub struct Part {
    /// What it was called.
    pub name: String,
    /// The lender's socket.
    pub socket: PathBuf,
    /// The bank.
    pub bank: Bank,
}

/// The part of this process; nothing where it is the test itself.
pub fn part() -> Option<Part> {
    let part = std::env::var(PART).ok()?;
    let mut words = part.split('\n');
    let mut next = || words.next().unwrap();
    Some(Part { name: next().to_owned(), socket: next().into(), bank: open(Path::new(next())) })
}

fn open(folder: &Path) -> Bank {
    Bank::open(Box::new(Directory::open(folder).unwrap()), None).unwrap()
}
