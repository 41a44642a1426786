//! The format as bytes: files of version 1 are read as long as there is a version 1, and what is written today is what was written then.
//!
//! `golden/` holds a bank with the machine `tiny` of the crate's documentation. FARBUS_WRITE_GOLDEN=1 writes it anew, which only a new version may need:
//! compressed bytes alone may differ with zstd, so packs are compared by their names, which are the hashes of what they hold.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

mod common;

use std::path::{Path, PathBuf};

use common::{open, withdraw};
use farbus_machine_bank::archive::{export, import};
use farbus_machine_bank::keep::verify;
use farbus_machine_bank::manifest::{Counts, LeafNames, Writer};
use farbus_machine_bank::pack::Packer;
use farbus_machine_bank::page::Identity;
use farbus_machine_bank::store::{Durability, Kind, MemoryStore, Store};
use farbus_machine_bank::{Bank, Changes, PAGE, PageId, SectionKind};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn memory() -> Vec<u8> {
    let mut memory = vec![b'A'; 3 * PAGE];
    memory[PAGE..2 * PAGE].fill(0);
    memory
}

/// The bank of the documentation, deposited at the millisecond 1,795,000,000,000, and its second deposit, in which page 2 is zero.
fn written_today() -> MemoryStore {
    let store = MemoryStore::new();
    let bank = Bank::init(Box::new(store.clone()), None).unwrap();
    let (identity, page) = (Identity::plain(), [b'A'; PAGE]);
    let mut packer = Packer::new().unwrap();
    let id = identity.page(&page);
    assert!(packer.push(id, &page).is_none());
    let sealed = packer.take().seal();
    store.put(Kind::Pack, &sealed.id.name(), &sealed.bytes, Durability::Durable).unwrap();
    let mut base = None;
    for (number, ids, counts) in [
        (1, [id, PageId::ZERO, id], Counts { pages: 3, zero: 1, content: 1, new: 1, new_bytes: 24, ..Counts::default() }),
        (2, [id, PageId::ZERO, PageId::ZERO], Counts { pages: 3, zero: 2, position: 1, ..Counts::default() }),
    ] {
        let parent = base.as_ref().map(|base: &std::sync::Arc<farbus_machine_bank::Manifest>| base.root);
        let below = base.as_ref().map(|base| base.leaf(&store, &identity, 0, 0).unwrap());
        let mut writer = Writer::new(&store, base).unwrap();
        let section = writer.section(SectionKind::Memory, "memory", 3 * PAGE as u64);
        writer.leaf(section, 0, &LeafNames::new(&identity, &ids, below.as_deref())).unwrap();
        writer.count(section, counts);
        let entry = writer.finish(&identity, "tiny", 1_795_000_000_000 + number, parent, |_| Ok(number)).unwrap();
        base = Some(bank.manifest(&entry).unwrap());
    }
    store
}

fn read_golden() -> MemoryStore {
    let store = MemoryStore::new();
    for kind in Kind::ALL {
        for entry in std::fs::read_dir(golden().join(kind.to_string())).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            store.put(kind, &name, &std::fs::read(entry.path()).unwrap(), Durability::Durable).unwrap();
        }
    }
    store
}

#[test]
fn a_bank_of_version_1_is_read() {
    if std::env::var_os("FARBUS_WRITE_GOLDEN").is_some() {
        let today = written_today();
        // A deposit of nothing new writes an index.
        common::deposit(&open(today.clone()), "index", &memory(), Changes::HashAll);
        for kind in Kind::ALL {
            std::fs::create_dir_all(golden().join(kind.to_string())).unwrap();
            for object in today.list(kind).unwrap().iter().filter(|object| !object.name.starts_with("index@")) {
                std::fs::write(
                    golden().join(kind.to_string()).join(&object.name),
                    today.read_all(kind, &object.name, object.len).unwrap(),
                )
                .unwrap();
            }
        }
    }
    let bank = open(read_golden());
    assert!(withdraw(&bank, "tiny@1", "memory").unwrap() == memory());
    let mut second = memory();
    second[2 * PAGE..].fill(0);
    assert!(withdraw(&bank, "tiny@2", "memory").unwrap() == second);
    assert_eq!(verify(&bank, &|_| {}).unwrap().faults, []);
}

#[test]
fn what_is_written_today_is_version_1() {
    let (golden, today) = (read_golden(), written_today());
    for kind in [Kind::Config, Kind::Manifest] {
        let names =
            |store: &MemoryStore| store.list(kind).unwrap().into_iter().map(|object| (object.name, object.len)).collect::<Vec<_>>();
        assert_eq!(names(&golden), names(&today), "{kind}");
        for (name, len) in names(&golden) {
            assert!(golden.read_all(kind, &name, len).unwrap() == today.read_all(kind, &name, len).unwrap(), "{kind} {name}");
        }
    }
    let packs = |store: &MemoryStore| store.list(Kind::Pack).unwrap().into_iter().map(|object| object.name).collect::<Vec<_>>();
    assert_eq!(packs(&golden), packs(&today));
}

#[test]
fn the_documentation_shows_the_golden_files() {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    for kind in [Kind::Pack, Kind::Manifest] {
        for object in read_golden().list(kind).unwrap() {
            let shown = match object.name.rsplit_once('@') {
                Some((machine, root)) => format!("{machine}@{}…", &root[..8]),
                None => format!("{}…", &object.name[..8]),
            };
            assert!(text.contains(&shown), "{shown} is not in the documentation");
        }
    }
}

/// The archives of both machines, the second since the first.
fn archives(store: MemoryStore) -> [(&'static str, Vec<u8>); 2] {
    let bank = open(store);
    [("tiny@1", None), ("tiny@2-since-1", Some("tiny@1"))].map(|(name, since)| {
        let (machine, _) = name.split_once('-').unwrap_or((name, ""));
        let (entry, since) = (bank.find(machine).unwrap(), since.map(|since| bank.find(since).unwrap()));
        let mut archive = Vec::new();
        export(&bank, &entry, since.as_ref(), &mut archive, &|_| {}).unwrap();
        (name, archive)
    })
}

#[test]
fn archives_of_version_1_are_read_and_written() {
    let folder = golden().join("archive");
    if std::env::var_os("FARBUS_WRITE_GOLDEN").is_some() {
        std::fs::create_dir_all(&folder).unwrap();
        for (name, archive) in archives(written_today()) {
            std::fs::write(folder.join(name), archive).unwrap();
        }
    }
    let (_, bank) = common::memory_bank();
    for (name, today) in archives(read_golden()) {
        let golden = std::fs::read(folder.join(name)).unwrap();
        // Behind the head, the first leaf and its names are groups, which compress as zstd does, and a hash.
        let same = 73 + 4 + u32::from_le_bytes(*golden[73..].first_chunk().unwrap()) as usize + 5;
        assert!(golden[..same] == today[..same], "{name}");
        let made = import(&bank, &mut &golden[..], &|_| {}).unwrap();
        let (machine, _) = name.split_once('-').unwrap_or((name, ""));
        let there = open(read_golden()).find(machine).unwrap();
        assert_eq!((made.machine, made.root), (machine.to_owned(), there.root.to_string()));
    }
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/archive/mod.rs")).unwrap();
    for (name, archive) in archives(read_golden()) {
        assert!(
            text.contains(&format!("{name}, {} bytes", archive.len())),
            "{name} of {} bytes is not in the documentation",
            archive.len()
        );
    }
}
