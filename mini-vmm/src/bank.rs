//! Which bank a VMM keeps its machine in, as it is said on its command line: any that `farbus bank` has, but over a link those of this host.
//!
//! `--bank /srv/bank`, `--bank s3://backups/lab`, or `--bank shm:/run/bank --tenant-key vm.key`, where `farbus bank serve` serves one whose pages are named under a key.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use farbus_machine_bank::Bank;
use farbus_machine_bank::page::{KEY, key_of};
use farbus_machine_bank::store::{BankAddress, ShmPath, Store};

/// Bytes of a key's file that are looked at.
const MOST_KEY: u64 = 4096;

/// The bank.
#[derive(Args, Clone, Debug, Default)]
pub struct BankArgs {
    /// The bank, as `farbus bank init` makes it: a directory, s3://BUCKET/PREFIX, file:///DIRECTORY, or shm:PATH where `farbus bank serve` serves one.
    #[arg(long, value_name = "BANK")]
    pub bank: Option<BankAddress>,
    /// A file with the tenant's key, where the bank has one: 32 bytes, or 64 hexadecimal digits.
    #[arg(long, value_name = "FILE", requires = "bank")]
    pub tenant_key: Option<PathBuf>,
}

impl BankArgs {
    /// Opens it, if one was named.
    ///
    /// # Errors
    /// There is none, it needs another key, or the store's fault.
    pub fn open(&self) -> Result<Option<Bank>> {
        let Some(address) = &self.bank else { return Ok(None) };
        let open = || -> Result<Bank> {
            let key = self.tenant_key.as_deref().map(read_key).transpose()?;
            let connect = |link: &ShmPath| -> Result<Box<dyn Store>> { Ok(Box::new(link.connect()?)) };
            let store = address.store(connect)?;
            Ok(Bank::open(store, key.as_ref())?)
        };
        open().with_context(|| format!("no bank in {address}")).map(Some)
    }
}

fn read_key(path: &Path) -> Result<[u8; KEY]> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MOST_KEY).read_to_end(&mut bytes));
    read.with_context(|| format!("cannot read the tenant key {}", path.display()))?;
    key_of(&bytes)
        .with_context(|| format!("{} is no tenant key: 32 bytes, or 64 lower-case hexadecimal digits on one line", path.display()))
}

#[cfg(test)]
mod tests {
    use farbus_machine_bank::store::Directory;

    use super::*;

    fn said(bank: &str, tenant_key: Option<&Path>) -> BankArgs {
        BankArgs { bank: Some(bank.parse().unwrap()), tenant_key: tenant_key.map(Path::to_owned) }
    }

    #[test]
    fn a_sealed_bank_opens_with_the_key_in_a_file_and_with_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let (bank, key, other) = (folder.path().join("bank"), folder.path().join("key"), folder.path().join("other"));
        std::fs::write(&key, "07".repeat(32) + "\n").unwrap();
        std::fs::write(&other, [8; 31]).unwrap();
        Bank::init_sealed(Box::new(Directory::create(&bank).unwrap()), &[7; KEY]).unwrap();
        let bank = bank.to_str().unwrap();
        assert!(said(bank, Some(&key)).open().unwrap().is_some());
        let why = |tenant_key| format!("{:#}", said(bank, tenant_key).open().unwrap_err());
        assert!(why(None).contains("key"), "{}", why(None));
        assert!(why(Some(&other)).contains("is no tenant key"));
        assert!(BankArgs::default().open().unwrap().is_none());
    }

    #[test]
    fn every_kind_of_address_is_taken_and_what_is_not_there_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().display().to_string();
        for bank in [format!("{path}/none"), format!("file://{path}/none"), format!("shm:{path}/none")] {
            let why = format!("{:#}", said(&bank, None).open().unwrap_err());
            assert!(why.contains(&format!("no bank in {bank}")), "{why}");
        }
        assert!("rdma:nas:7001".parse::<BankAddress>().unwrap_err().contains("farbus bank copy"));
    }

    #[cfg(feature = "object")]
    #[test]
    fn a_directory_of_objects_is_a_bank_too() {
        use farbus_machine_bank::store::object::{ObjectOptions, ObjectStore};
        let folder = tempfile::tempdir().unwrap();
        let store = ObjectStore::local(folder.path(), true, ObjectOptions::default()).unwrap();
        Bank::init(Box::new(store), None).unwrap();
        let bank = said(&format!("file://{}", folder.path().display()), None).open().unwrap().unwrap();
        assert!(bank.listing().unwrap().0.is_empty());
    }
}
