//! Archives that anybody may have written: a bank that imports one has afterwards what it had before, and at most one machine more, which is whole.
//!
//! The golden archive of `tiny@2` since `tiny@1` makes a second machine; any change of it is refused, and the first machine is what it was.

use farbus_machine_bank::archive::{export, import};
use farbus_machine_bank::keep::verify;
use farbus_machine_bank::page::Identity;
use farbus_machine_bank::store::MemoryStore;
use farbus_machine_bank::{Bank, PAGE};

/// The archive of `tiny@1` that others can rest on.
const FIRST: &[u8] = include_bytes!("../../../machine-bank/tests/golden/archive/tiny@1");

/// The bytes as an archive; those with a first byte of 0xff behind it, mended: the hash at the end is made to fit, as a hostile sender would.
pub fn bank_archive(bytes: &[u8]) {
    let mut archive = bytes.to_vec();
    if let Some((0xff, mended)) = bytes.split_first() {
        archive = mended.to_vec();
        archive.extend_from_slice(blake3::hash(mended).as_bytes());
    }
    let bank = Bank::init(Box::new(MemoryStore::new()), None).expect("memory can be written");
    let first = import(&bank, &mut &FIRST[..], &|_| {}).expect("a golden file is imported");
    match import(&bank, &mut &archive[..], &|_| {}) {
        Ok(made) => {
            assert!(made.was_there || made.root != first.root);
            let head = archive.get(73..77).and_then(|len| archive.get(77..77 + u32::from_le_bytes(*len.first_chunk()?) as usize));
            assert_eq!(made.root, Identity::plain().root(head.expect("it was read")).to_string());
            if !made.was_there {
                // What it says of itself is read back, and is whole.
                let entry = bank.find(&made.root).expect("it is there");
                let mut again = Vec::new();
                export(&bank, &entry, None, &mut again, &|_| {}).expect("it is whole");
            }
        }
        Err(refused) => {
            assert!(!refused.to_string().is_empty());
            assert_eq!(bank.listing().expect("memory can be listed").0.len(), 1, "a refused archive made a machine");
        }
    }
    let report = verify(&bank, &|_| {}).expect("memory has no fault");
    assert!(report.faults.is_empty(), "{:?}", report.faults);
    let entry = bank.find(&first.root).expect("it is there");
    let file = tempfile::tempfile().expect("there is a folder for temporary files");
    bank.withdraw(&entry).and_then(|machine| machine.section("memory", &file, &|_| {})).expect("it is whole");
    let mut out = vec![1; 3 * PAGE];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut out, 0).expect("it is as long as the machine");
    assert!(out[..PAGE].iter().all(|byte| *byte == b'A') && out[PAGE..2 * PAGE].iter().all(|byte| *byte == 0));
}
