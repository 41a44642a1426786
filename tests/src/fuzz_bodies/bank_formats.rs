//! The formats of a bank: whatever lies in a store parses to what encodes to the same bytes, or is refused, and no group is more than it can be.
//!
//! A first byte of 0 and the head of a manifest with a section of 4 TiB and two leaf hashes is refused, because there are not as many leaves.

use farbus_machine_bank::codec::Malformed;
use farbus_machine_bank::manifest::leaf::{self, Form, LEAF};
use farbus_machine_bank::manifest::{Head, Table, split};
use farbus_machine_bank::pack::{GROUP, GROUP_PAGES, GroupDecoder, PackId, parse_directory, parse_pack, parse_trailer};
use farbus_machine_bank::page::{PAGE, PageId};

use super::input::Input;

/// One of the formats, by the first byte.
pub fn bank_formats(bytes: &[u8]) {
    let mut input = Input(bytes);
    let Some(which) = input.u8() else { return };
    match which % 6 {
        0 => head(input.0),
        1 => table(&mut input),
        2 => full_leaf(&mut input),
        3 => delta(&mut input),
        4 => pack(&mut input),
        _ => group(input.0),
    }
}

fn head(bytes: &[u8]) {
    if let Ok(head) = Head::parse(bytes) {
        assert_eq!(head.encode(), bytes);
        let pages: u64 = head
            .sections
            .iter()
            .map(|section| (0..section.leaves.len()).map(|leaf| section.pages_of(leaf) as u64).sum::<u64>())
            .sum();
        assert_eq!(pages, head.sections.iter().map(farbus_machine_bank::manifest::Section::pages).sum::<u64>());
    }
}

fn table(input: &mut Input<'_>) {
    let (Some(len), Some(end)) = (input.u16(), input.u64()) else { return };
    let Some((head, table)) = input.0.split_at_checked(usize::from(len)) else { return };
    let Ok(head) = Head::parse(head) else { return };
    if let Ok(parsed) = Table::parse(table, &head, end) {
        assert_eq!(parsed.encode(), table);
        for form in parsed.forms.iter().flatten() {
            if let Form::Full { offset, len } | Form::Delta { offset, len } = form {
                assert!(offset + u64::from(*len) <= end, "a leaf reaches behind the leaves");
            }
        }
    }
    if let Some(trailer) = table.first_chunk()
        && let Ok((head, table, table_end)) = split(trailer, end)
    {
        assert!(8 <= head && head <= table && table <= table_end && table_end < end);
    }
}

fn full_leaf(input: &mut Input<'_>) {
    let Some(pages) = input.u16() else { return };
    let pages = usize::from(pages) % (LEAF + 1);
    if let Ok(ids) = leaf::parse_full(input.0, pages) {
        assert_eq!(ids.len(), pages);
        let stored = ids.iter().filter(|id| !id.is_zero()).count();
        let named = leaf::named(Form::Full { offset: 0, len: 0 }, input.0, pages).expect("it was parsed");
        assert_eq!(named.len(), stored);
        if stored > 0 {
            assert_eq!(leaf::encode(&ids, None), leaf::Encoded::Full(input.0.to_vec()));
        }
    }
}

fn delta(input: &mut Input<'_>) {
    let Some(pages) = input.u16() else { return };
    let base = vec![PageId([1; 32]); usize::from(pages) % (LEAF + 1)];
    let mut ids = base.clone();
    let applied = leaf::apply_delta(input.0, &mut ids);
    if applied.is_ok() {
        leaf::named(Form::Delta { offset: 0, len: 0 }, input.0, base.len()).expect("it was applied");
        let again = match leaf::encode(&ids, Some(&base)) {
            leaf::Encoded::Zero => vec![PageId::ZERO; ids.len()],
            leaf::Encoded::Same => base,
            leaf::Encoded::Full(bytes) => leaf::parse_full(&bytes, ids.len()).expect("what was encoded is parsed"),
            leaf::Encoded::Delta(bytes) => {
                let mut again = base;
                leaf::apply_delta(&bytes, &mut again).expect("what was encoded is applied");
                again
            }
        };
        assert_eq!(again, ids);
    }
}

/// The directory is hashed here, as a hostile store would, so that what is behind the hash is reached.
fn pack(input: &mut Input<'_>) {
    let Some(offset) = input.u32() else { return };
    let directory = input.0;
    let hash = *blake3::hash(directory).as_bytes();
    let id = PackId(*hash.first_chunk().expect("a hash is longer"));
    match parse_directory(id, directory, offset.into(), hash) {
        Ok(entries) => {
            for (_, place) in &entries {
                assert!(place.offset >= 8 && u64::from(place.offset) + u64::from(place.len) <= offset.into());
                assert!(usize::from(place.slot) < GROUP_PAGES && place.len as usize <= GROUP + 1);
            }
        }
        Err(refused) => assert_ne!(refused, Malformed::Hash("a pack's directory")),
    }
    assert!(parse_pack(id, directory).is_err(), "a directory is no pack");
    if let Some(trailer) = directory.first_chunk()
        && let Ok((at, len, _)) = parse_trailer(trailer, offset.into())
    {
        assert!(at + len as u64 <= offset.into());
    }
}

fn group(bytes: &[u8]) {
    let mut pages = Box::new([0; GROUP]);
    let mut decoder = GroupDecoder::new().expect("there is memory");
    if let Ok(len) = decoder.decode(bytes, &mut pages) {
        assert!(len > 0 && len <= GROUP && len % PAGE == 0, "{len} bytes of pages");
    }
}
