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
use farbus_mini_vmm::BankArgs;
use farbus_remote_dma::model::{Nvme, NvmeOptions};
use farbus_transport::Memory;
use tempfile::TempDir;

/// Says to this program that it is a borrower: its part, the lender's socket and the bank's address.
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

    /// Where everything of it is: the bank is in its folder `bank`.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Where the drive is lent.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("lender")
    }

    /// The bank.
    pub fn bank(&self) -> Bank {
        bank_at(self.folder.path().join("bank").to_str().unwrap())
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
        self.borrower_with(part, &self.folder.path().join("bank").display().to_string())
    }

    /// The same with the bank by another address.
    pub fn borrower_with(&self, part: &str, bank: &str) -> Child {
        let part = format!("{part}\n{}\n{bank}", self.socket().display());
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
    Some(Part { name: next().to_owned(), socket: next().into(), bank: bank_at(next()) })
}

/// A bank as a VMM's command line names it.
pub fn bank_at(address: &str) -> Bank {
    BankArgs { bank: Some(address.parse().unwrap()), tenant_key: None }.open().unwrap().unwrap()
}
