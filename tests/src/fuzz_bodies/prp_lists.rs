//! The walk over a command's PRP entries: it ends, and names exactly as many bytes as the command moves, as the specification lays them out.
//!
//! 12 KiB from PRP1 = 0x800 in 4 KiB pages must be 2 KiB there and then three entries, whatever the entries say; a plain re-reading of NVMe
//! 1.4, section 4.3, page by page, says which addresses are right.

use farbus_remote_dma::Iova;
use farbus_remote_dma::model::nvme::prp::{Cursor, Step};

use super::input::Input;

/// A command's PRP1, PRP2 and lists.
pub fn prp_lists(bytes: &[u8]) {
    let mut input = Input(bytes);
    let (Some(prp1), Some(prp2), Some(len), Some(shift)) = (input.u64(), input.u64(), input.u32(), input.u8()) else { return };
    let page = 4096_u32 << (shift % 5);
    let len = len % (1 << 20) + 1;
    // Lists read the rest of the input over and over, so that a short input is a long list too; sometimes rounded to pages.
    let round = shift & 0x80 != 0;
    let entry = |list: u64, index: u32| {
        let whole = input.0.chunks_exact(8);
        let count = whole.len().max(1) as u64;
        let picked = input.0.chunks_exact(8).nth(((list / 8).wrapping_add(u64::from(index)) % count) as usize);
        let value = picked.map_or(0, |chunk| chunk.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)));
        if round { value & !u64::from(page - 1) } else { value }
    };

    let mut walked = Vec::new();
    let mut cursor = Cursor::new(prp1, prp2, len, page);
    let mut list = 0;
    let outcome = loop {
        assert!(walked.len() <= 520, "the walk does not end");
        assert!(cursor.left() <= len);
        match cursor.step(|index| entry(list, index)) {
            Ok(Step::Range { iova: Iova(iova), len }) => walked.push((iova, len)),
            Ok(Step::List { iova: Iova(iova), entries }) => {
                let inside = iova % u64::from(page) + u64::from(entries) * 8;
                assert!(entries > 0 && inside <= u64::from(page), "a list of {entries} entries at {iova:#x} leaves its page");
                list = iova;
            }
            Ok(Step::Done) => break true,
            Err(_) => break false,
        }
    };
    let expected = plainly(prp1, prp2, len, page, entry);
    assert_eq!(outcome, expected.is_some(), "one reading accepts what the other refuses");
    if let Some(expected) = expected {
        assert_eq!(pages(&walked, page), pages(&expected, page));
        assert_eq!(walked.iter().map(|(_, len)| u64::from(*len)).sum::<u64>(), u64::from(len));
    }
}

/// Section 4.3 page by page; `None` where an entry has an offset that it must not have.
fn plainly(prp1: u64, prp2: u64, len: u32, page: u32, entry: impl Fn(u64, u32) -> u64) -> Option<Vec<(u64, u32)>> {
    let offset_of = |address: u64| (address % u64::from(page)) as u32;
    if !prp1.is_multiple_of(4) {
        return None;
    }
    let first = len.min(page - offset_of(prp1));
    let mut ranges = vec![(prp1, first)];
    let mut left = len - first;
    if left == 0 {
        return Some(ranges);
    }
    if left <= page {
        ranges.push((prp2, left));
        return (offset_of(prp2) == 0).then_some(ranges);
    }
    let (mut list, mut index) = (prp2, 0);
    if !list.is_multiple_of(8) {
        return None;
    }
    while left > 0 {
        let is_last = offset_of(list) + (index + 1) * 8 == page;
        let address = entry(list, index);
        if offset_of(address) != 0 {
            return None;
        }
        // The last entry of a list is a pointer to the next one, unless it names all that is left.
        if is_last && left > page {
            (list, index) = (address, 0);
            continue;
        }
        let part = left.min(page);
        ranges.push((address, part));
        left -= part;
        index += 1;
    }
    Some(ranges)
}

/// Ranges cut at page boundaries, so that neighbours merged into one compare equal to those that were not.
fn pages(ranges: &[(u64, u32)], page: u32) -> Vec<(u64, u32)> {
    let mut cut = Vec::new();
    for &(mut at, mut len) in ranges {
        while len > 0 {
            let part = len.min(page - (at % u64::from(page)) as u32);
            cut.push((at, part));
            at = at.wrapping_add(u64::from(part));
            len -= part;
        }
    }
    cut
}
