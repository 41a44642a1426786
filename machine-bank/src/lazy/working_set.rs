//! The working set: which groups of 64 KiB a machine used first after it was withdrawn, in that order, kept with it as a section of its own.
//!
//! `vm7@3` was withdrawn lazily and touched groups 4, 5, 900 before it was up; `keep` makes `vm7@4`, the same machine with a section
//! `working-set.memory` of 20 bytes, and whoever withdraws that has three groups there before the machine asks.

use farbus_transport::MemoryError;
use thiserror::Error;

use crate::bank::Bank;
use crate::codec::{Input, Malformed};
use crate::deposit::{Changes, DepositError, DepositOptions, DepositReport, Parent, Source};
use crate::manifest::{Entry, SectionKind};
use crate::pack::GROUP;
use crate::reader::{At, Scratch, Wanted};
use crate::withdraw::{WithdrawError, Withdrawal};

const MAGIC: &[u8; 8] = b"FBWSET1\n";
/// Groups at most: those of 64 GiB.
pub const MOST_GROUPS: usize = 1 << 20;

/// Groups of a section in the order of their first use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    /// By number, from 0.
    pub groups: Vec<u64>,
}

/// Why a working set was not kept or read.
#[derive(Debug, Error)]
pub enum WorkingSetError {
    /// What is kept is something else.
    #[error("the working set: {0}")]
    Malformed(#[from] Malformed),
    /// It cannot be read.
    #[error("the working set: {0}")]
    Read(#[from] WithdrawError),
    /// It cannot be kept.
    #[error("the working set is not kept: {0}")]
    Keep(#[from] DepositError),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// What the section is called that goes with one.
pub fn section_name(section: &str) -> String {
    format!("working-set.{section}")
}

impl WorkingSet {
    /// As it is kept: 8 bytes of magic, and 4 little-endian ones for each group.
    pub fn encode(&self) -> Vec<u8> {
        let numbers = self.groups.iter().take(MOST_GROUPS).filter_map(|group| u32::try_from(*group).ok());
        MAGIC.iter().copied().chain(numbers.flat_map(u32::to_le_bytes)).collect()
    }

    /// Of a section of `len` bytes.
    ///
    /// # Errors
    /// It is something else, or names groups that the section does not have.
    pub fn parse(bytes: &[u8], len: u64) -> Result<Self, Malformed> {
        let mut input = Input::new(bytes);
        if input.array::<8>()? != *MAGIC {
            return Err(Malformed::Magic("working set"));
        }
        let most = len.div_ceil(GROUP as u64);
        let mut groups = Vec::with_capacity(input.left() / 4);
        while input.left() > 0 {
            let group = u64::from(input.u32()?);
            if group >= most || groups.len() >= MOST_GROUPS {
                return Err(Malformed::Value("a group of a working set", group));
            }
            groups.push(group);
        }
        Ok(Self { groups })
    }

    /// That of a section of a machine, where it has one.
    ///
    /// # Errors
    /// It is damaged, or the store's fault. It only says what to fetch first: a withdrawal can go on without.
    pub fn of(bank: &Bank, withdrawal: &Withdrawal<'_>, section: &str) -> Result<Option<Self>, WorkingSetError> {
        let manifest = withdrawal.manifest();
        let (Some(at), Some(of)) = (manifest.section(&section_name(section)), manifest.section(section)) else { return Ok(None) };
        let about = &manifest.head.sections[at];
        if about.kind != SectionKind::WorkingSet || about.len > (MAGIC.len() + 4 * MOST_GROUPS) as u64 {
            return Err(Malformed::Value("the length of a working set", about.len).into());
        }
        let (mut bytes, mut scratch) =
            (vec![0; about.len.next_multiple_of(crate::PAGE as u64) as usize], Scratch::new().map_err(WithdrawError::from)?);
        for leaf in 0..about.leaves.len() {
            let ids = manifest.leaf(bank.store(), bank.identity(), at, leaf).map_err(WithdrawError::from)?;
            let first = leaf * crate::manifest::LEAF;
            let wanted: Vec<_> = (first..)
                .zip(&ids)
                .filter(|(_, id)| !id.is_zero())
                .map(|(page, id)| Wanted { id: *id, token: page as u64, at: At { section: at as u16, page: page as u64 } })
                .collect();
            let mut sink = |page: u64, contents: &[u8; crate::PAGE]| {
                bytes[page as usize * crate::PAGE..][..crate::PAGE].copy_from_slice(contents);
            };
            withdrawal.reader().fetch(&wanted, &mut scratch, &mut sink).map_err(WithdrawError::from)?;
        }
        Ok(Some(Self::parse(&bytes[..about.len as usize], manifest.head.sections[of].len)?))
    }

    /// Deposits the machine once more, with this as the working set of `section`: a manifest of some hundred bytes and one page.
    ///
    /// # Errors
    /// The machine was deposited since, so that its memory would become the last again; or the store's fault. Then nothing has changed.
    pub fn keep(&self, bank: &Bank, entry: &Entry, section: &str) -> Result<DepositReport, WorkingSetError> {
        let mut deposit = bank.deposit(&entry.machine, &DepositOptions { parent: Parent::Last })?;
        let fresh = |machine: &Entry| machine.root == entry.root;
        if !deposit.parent().is_some_and(fresh) {
            return Err(DepositError::Overtaken(entry.to_string()).into());
        }
        let manifest = bank.manifest(entry).map_err(DepositError::from)?;
        let name = section_name(section);
        for about in manifest.head.sections.iter().filter(|about| about.name != name) {
            deposit.section(about.kind, &about.name, &Unread(about.len), Changes::None, &|_| {})?;
        }
        deposit.section(SectionKind::WorkingSet, &name, &&self.encode()[..], Changes::HashAll, &|_| {})?;
        Ok(deposit.commit_onto_parent()?)
    }
}

/// A section of which nothing is read, because nothing has changed.
struct Unread(u64);

impl Source for Unread {
    fn len(&self) -> u64 {
        self.0
    }

    fn read_at(&self, _: u64, _: &mut [u8]) -> std::io::Result<()> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_working_set_comes_back_and_what_is_none_is_refused() {
        let set = WorkingSet { groups: vec![4, 0, 900] };
        let bytes = set.encode();
        assert_eq!(bytes.len(), 20);
        assert_eq!(WorkingSet::parse(&bytes, 901 * GROUP as u64), Ok(set));
        assert!(WorkingSet::parse(&bytes, 900 * GROUP as u64).is_err(), "a group that the section does not have");
        assert!(WorkingSet::parse(&bytes[..19], u64::MAX).is_err() && WorkingSet::parse(b"FBWSET2\n", 1).is_err());
    }
}
