//! Which numbers deposits have had that are not there any more: none of them is given again, so that `vm7@3` in a log means what it meant.
//!
//! `vm7@1` to `vm7@3` are removed, and their pages swept: the bank notes that vm7 had 3 numbers, and its next deposit is `vm7@4`. What is there needs no note.
//!
//! ```text
//! "FBNUMB1\n", floor (8), machines (4), and of each: name, the highest number (8); BLAKE3 of that (32)      twice, so that one damage costs nothing
//! ```
//! The floor is for all machines that are not named: what is beyond a million machines is not told apart any more. It is written before a machine is removed, by who
//! has the bank for itself.

use std::collections::BTreeMap;
use std::io;

use crate::codec::{Input, Malformed, put_text};
use crate::manifest::Entry;
use crate::store::{Durability, Kind, Store, StoreError};

/// What they are kept in.
pub(crate) const OBJECT: &str = "numbers";
const MAGIC: &[u8; 8] = b"FBNUMB1\n";
/// Machines that are told apart.
const MOST: usize = 1 << 20;
/// Bytes of the longest note.
const MOST_BYTES: u64 = 2 * (8 + 8 + 4 + MOST as u64 * (2 + 64 + 8) + 32);

/// The highest number that a machine had of which it is not there any more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Numbers {
    machines: BTreeMap<String, u64>,
    /// Of machines that are not named.
    floor: u64,
}

impl Numbers {
    /// Those that a bank notes.
    ///
    /// # Errors
    /// The store's fault, or both copies of the note are damaged: then nobody knows which number is free.
    pub fn read(store: &dyn Store) -> Result<Self, StoreError> {
        let bytes = match store.read_all(Kind::Config, OBJECT, MOST_BYTES) {
            Ok(bytes) => bytes,
            Err(StoreError::Missing { .. }) => return Ok(Self::default()),
            Err(error) => return Err(error),
        };
        let (first, second) = bytes.split_at(bytes.len() / 2);
        parse(first).or_else(|_| parse(second)).map_err(|error| {
            let what = format!(
                "what the bank notes of the numbers of deposits that were removed (config {OBJECT}) is damaged: restore it from a copy, or remove it and accept that a number may be given twice"
            );
            StoreError::Io { what, source: io::Error::new(io::ErrorKind::InvalidData, error) }
        })
    }

    /// The highest number that a machine had, or 0.
    pub fn given(&self, machine: &str) -> u64 {
        self.machines.get(machine).copied().unwrap_or_default().max(self.floor)
    }

    /// Notes that these are about to go, and writes it down.
    ///
    /// # Errors
    /// The store's fault, or the note is damaged.
    pub fn note<'e>(store: &dyn Store, going: impl Iterator<Item = &'e Entry>) -> Result<(), StoreError> {
        let before = Self::read(store)?;
        let mut noted = before.clone();
        for entry in going.filter(|entry| entry.number > before.given(&entry.machine)) {
            let number = noted.machines.entry(entry.machine.clone()).or_default();
            *number = entry.number.max(*number);
        }
        if noted == before {
            return Ok(());
        }
        if noted.machines.len() > MOST {
            noted.floor = noted.machines.values().copied().max().unwrap_or_default().max(noted.floor);
            noted.machines.clear();
        }
        store.put(Kind::Config, OBJECT, &[noted.encode(), noted.encode()].concat(), Durability::Durable)?;
        store.sync(Kind::Config)
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&self.floor.to_le_bytes());
        out.extend_from_slice(&(self.machines.len() as u32).to_le_bytes());
        for (machine, number) in &self.machines {
            put_text(&mut out, machine);
            out.extend_from_slice(&number.to_le_bytes());
        }
        let hash = blake3::hash(&out);
        out.extend_from_slice(hash.as_bytes());
        out
    }
}

fn parse(bytes: &[u8]) -> Result<Numbers, Malformed> {
    let (fields, hash) = bytes.split_last_chunk::<32>().ok_or(Malformed::Ends)?;
    if blake3::hash(fields).as_bytes() != hash {
        return Err(Malformed::Hash("the note of numbers"));
    }
    let mut input = Input::new(fields);
    if input.array::<8>()? != *MAGIC {
        return Err(Malformed::Magic("note of numbers"));
    }
    let (floor, count) = (input.u64()?, input.u32()?);
    let mut machines = BTreeMap::new();
    for _ in 0..count {
        machines.insert(input.text()?.to_owned(), input.u64()?);
    }
    input.end()?;
    Ok(Numbers { machines, floor })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::Root;
    use crate::store::MemoryStore;

    fn entry(machine: &str, number: u64) -> Entry {
        Entry { machine: machine.to_owned(), number, root: Root([1; 32]), len: 0 }
    }

    #[test]
    fn the_highest_number_stays_known_and_one_damage_costs_nothing() {
        let store = MemoryStore::new();
        assert_eq!(Numbers::read(&store).unwrap().given("vm7"), 0);
        Numbers::note(&store, [entry("vm7", 3), entry("vm7", 2), entry("db", 1)].iter()).unwrap();
        Numbers::note(&store, [entry("vm7", 1)].iter()).unwrap();
        let given = |machine| Numbers::read(&store).map(|numbers| numbers.given(machine));
        assert_eq!((given("vm7").unwrap(), given("db").unwrap(), given("web").unwrap()), (3, 1, 0));
        let len = store.len(Kind::Config, OBJECT).unwrap() as usize;
        for at in 0..len {
            store.flip(Kind::Config, OBJECT, at, 1);
            assert_eq!(given("vm7").unwrap(), 3, "byte {at}");
            store.flip(Kind::Config, OBJECT, (at + len / 2) % len, 2);
            assert!(given("vm7").is_err_and(|error| error.to_string().contains("config numbers")), "byte {at} twice");
            store.flip(Kind::Config, OBJECT, (at + len / 2) % len, 2);
            store.flip(Kind::Config, OBJECT, at, 1);
        }
        store.tear(Kind::Config, OBJECT, len - 1);
        assert!(given("vm7").is_err());
    }

    #[test]
    fn what_is_parsed_is_what_was_written() {
        let numbers = Numbers { machines: [("vm7".to_owned(), 3), ("a".to_owned(), u64::MAX)].into(), floor: 9 };
        let bytes = numbers.encode();
        assert_eq!(parse(&bytes).unwrap(), numbers);
        assert!((0..bytes.len()).all(|len| parse(&bytes[..len]).is_err()));
        assert_eq!((numbers.given("vm7"), numbers.given("other")), (9, 9));
    }
}
