//! What lies below a bank, written by somebody else: a sealed object that was changed opens to what was sealed or to an error, a cache's file never changes a byte, and a
//! note of numbers leads to a number that is free or to none.
//!
//! A first byte of 0 and `40 80 01` turn a bit of the first block of an object of 40,000 bytes: reads of that block are refused, and the others come out right.

use std::os::unix::fs::FileExt;

use farbus_machine_bank::Bank;
use farbus_machine_bank::store::{CachedStore, Durability, Kind, MemoryStore, SealedStore, Store, StoreError};

use super::input::Input;

const LEN: usize = 40_000;
const KEY: [u8; 32] = [9; 32];
/// A cache of one set.
const CACHE: u64 = 4096 + 16 * (64 + 32768);

/// Sealed, cached or noted, by the first byte.
pub fn bank_layers(bytes: &[u8]) {
    let mut input = Input(bytes);
    let Some(which) = input.u8() else { return };
    let plain: Vec<u8> = (0..LEN as u32).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
    match which {
        3 => noted(input.0),
        _ if which % 3 == 0 => changed(&mut input, &plain),
        _ if which % 3 == 1 => made_up(input.0),
        _ => cached(&mut input, &plain),
    }
}

fn put(store: &dyn Store, bytes: &[u8]) {
    store.put(Kind::Pack, "p", bytes, Durability::Durable).expect("memory can be written");
}

fn changed(input: &mut Input<'_>, plain: &[u8]) {
    let store = MemoryStore::new();
    put(&SealedStore::new(Box::new(store.clone()), &KEY), plain);
    let mut sealed = store.read_all(Kind::Pack, "p", u64::MAX).expect("it is there");
    while let (Some(at), Some(value)) = (input.u16(), input.u8()) {
        if value == 0xee {
            sealed.truncate(at.into());
        } else if let Some(byte) = sealed.get_mut(usize::from(at)) {
            *byte ^= value;
        }
    }
    put(&store, &sealed);
    let opened = SealedStore::new(Box::new(store), &KEY);
    assert!(opened.list(Kind::Pack).is_ok_and(|listed| listed.len() == 1));
    for (offset, piece) in (0..).step_by(3000).zip(plain.chunks(3000)) {
        let mut back = vec![0; piece.len()];
        match opened.read(Kind::Pack, "p", offset, &mut back) {
            Ok(()) => assert!(back == piece, "other bytes came out"),
            Err(error) => assert!(matches!(error, StoreError::Unsealed { .. }), "{error}"),
        }
    }
}

/// A note of numbers with these fields, and with them as they are.
fn noted(fields: &[u8]) {
    let copy = [fields, blake3::hash(fields).as_bytes()].concat();
    for note in [[&copy[..], &copy].concat(), fields.to_vec()] {
        let store = MemoryStore::new();
        let bank = Bank::init(Box::new(store.clone()), None).expect("memory can be written");
        store.put(Kind::Config, "numbers", &note, Durability::Durable).expect("memory can be written");
        match bank.next_number("vm7") {
            Ok(number) => assert!(number > 0, "a deposit without a number"),
            Err(error) => assert!(matches!(error, StoreError::Io { .. }), "{error}"),
        }
    }
}

/// An object that nobody with the key has written.
fn made_up(bytes: &[u8]) {
    let store = MemoryStore::new();
    put(&store, bytes);
    let opened = SealedStore::new(Box::new(store), &KEY);
    assert!(matches!(opened.len(Kind::Pack, "p"), Err(StoreError::Unsealed { .. })));
    assert!(opened.list(Kind::Pack).is_ok_and(|listed| listed.len() == 1));
}

fn cached(input: &mut Input<'_>, plain: &[u8]) {
    let folder = tempfile::tempdir().expect("there is a folder for temporary files");
    let store = MemoryStore::new();
    put(&store, plain);
    let read = || {
        let cache = CachedStore::new(Box::new(store.clone()), folder.path(), CACHE);
        let mut back = vec![0; LEN];
        cache.read(Kind::Pack, "p", 0, &mut back).expect("memory can be read");
        assert!(back == plain, "other bytes came out");
    };
    read();
    let file = std::fs::File::options().write(true).read(true).open(folder.path().join("blocks")).expect("the cache is there");
    while let (Some(at), Some(value)) = (input.u32(), input.u8()) {
        let at = u64::from(at) % CACHE;
        let mut byte = [0];
        if file.read_exact_at(&mut byte, at).is_ok() {
            file.write_all_at(&[byte[0] ^ value], at).expect("it can be written");
        }
        if value == 0xee {
            file.set_len(at).expect("it can be cut");
        }
    }
    read();
    read();
}
