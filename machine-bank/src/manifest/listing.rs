//! Which machines are in a bank, by the names of the manifests: machine, number of the deposit, root.
//!
//! `vm7@00000003@9f…` is the third deposit of `vm7`; what people write is `vm7` (the last), `vm7@3`, or at least 6 digits of the root.

use std::fmt;

use super::head::valid_machine;
use crate::page::Root;
use crate::store::{Kind, Object, Store, StoreError};

/// A manifest that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The machine.
    pub machine: String,
    /// Which of its deposits, from 1; it is never used again while a later one is there.
    pub number: u64,
    /// The root.
    pub root: Root,
    /// Bytes of the manifest.
    pub len: u64,
}

impl Entry {
    /// The object that holds it.
    pub fn object(&self) -> String {
        format!("{}@{:08}@{}", self.machine, self.number, self.root)
    }

    pub(crate) fn parse(object: &Object) -> Option<Self> {
        Self::named(&object.name, object.len)
    }

    fn named(object: &str, len: u64) -> Option<Self> {
        let mut parts = object.split('@');
        let (machine, number, root) = (parts.next()?, parts.next()?, parts.next()?);
        let number = number.bytes().all(|digit| digit.is_ascii_digit()).then(|| number.parse().ok())??;
        let root = Root::from_hex(root)?;
        let whole = parts.next().is_none() && valid_machine(machine);
        whole.then(|| Self { machine: machine.to_owned(), number, root, len })
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.machine, self.number)
    }
}

/// What people call the deposit that an object holds: `vm7@3`.
pub fn deposit_of(object: &str) -> Option<String> {
    Entry::named(object, 0).map(|entry| entry.to_string())
}

/// All of them, by machine and number.
#[derive(Clone, Debug, Default)]
pub struct Listing(pub Vec<Entry>);

impl Listing {
    /// What is there now. Objects with other names are left out.
    ///
    /// # Errors
    /// The store's fault.
    pub fn read(store: &dyn Store) -> Result<Self, StoreError> {
        let mut entries: Vec<_> = store.list(Kind::Manifest)?.iter().filter_map(Entry::parse).collect();
        entries.sort_by(|a, b| (&a.machine, a.number, a.root).cmp(&(&b.machine, b.number, b.root)));
        Ok(Self(entries))
    }

    /// The last deposit of a machine.
    pub fn last(&self, machine: &str) -> Option<&Entry> {
        self.0.iter().rfind(|entry| entry.machine == machine)
    }

    /// By root.
    pub fn by_root(&self, root: &Root) -> Option<&Entry> {
        self.0.iter().find(|entry| entry.root == *root)
    }

    /// By what people write: `vm7`, `vm7@3`, or at least 6 digits of the root; `None` also where that says more than one.
    pub fn find(&self, wish: &str) -> Option<&Entry> {
        if let Some(entry) = self.last(wish) {
            return Some(entry);
        }
        if let Some((machine, number)) = wish.split_once('@') {
            let number: u64 = number.parse().ok()?;
            return self.only(|entry| entry.machine == machine && entry.number == number);
        }
        if wish.len() < 6 {
            return None;
        }
        self.only(|entry| entry.root.to_string().starts_with(wish))
    }

    fn only(&self, wanted: impl Fn(&Entry) -> bool) -> Option<&Entry> {
        let mut found = self.0.iter().filter(|entry| wanted(entry));
        found.next().filter(|_| found.next().is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_are_found_by_what_people_write() {
        let entry = |machine: &str, number, root: u8| Entry { machine: machine.to_owned(), number, root: Root([root; 32]), len: 0 };
        let listing = Listing(vec![entry("vm7", 1, 0x11), entry("vm7", 2, 0x22), entry("vm7", 2, 0x12), entry("x", 1, 0x22)]);
        let find = |wish| listing.find(wish).map(|entry| (entry.machine.as_str(), entry.number, entry.root.0[0]));
        assert_eq!(
            (find("vm7"), find("vm7@1"), find("111111")),
            (Some(("vm7", 2, 0x12)), Some(("vm7", 1, 0x11)), Some(("vm7", 1, 0x11)))
        );
        for nothing in ["vm7@2", "222222", "11", "vm8", "vm7@", "vm7@x", "@1", ""] {
            assert_eq!(find(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn an_entry_comes_back_from_its_objects_name() {
        let entry = Entry { machine: "vm7".to_owned(), number: 3, root: Root([0xab; 32]), len: 5 };
        let object = |name: String| Object { name, len: 5, modified: std::time::SystemTime::UNIX_EPOCH };
        assert_eq!(Entry::parse(&object(entry.object())), Some(entry.clone()));
        for wrong in ["vm7@+3@", "@00000003@", "vm7@3@@"] {
            assert_eq!(Entry::parse(&object(format!("{wrong}{}", entry.root))), None);
        }
        assert_eq!((deposit_of(&entry.object()).as_deref(), deposit_of("vm7")), (Some("vm7@3"), None));
    }
}
