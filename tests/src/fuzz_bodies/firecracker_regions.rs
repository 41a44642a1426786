//! The region list that a Firecracker passes to its page-fault handler: any bytes are a list that makes sense, the beginning of one, or refused.
//!
//! `[{"base_host_virt_addr":4096,"size":8192,"offset":0,"page_size":4096}]` of a section of 16 KiB is one region of two pages; cut off it may go on.

use farbus_machine_bank::PAGE;
use farbus_machine_bank::lazy::firecracker::parse;
use farbus_machine_bank::lazy::{MOST_REGIONS, Regions};

/// A section's pages, and the list.
pub fn firecracker_regions(bytes: &[u8]) {
    let Some((pages, list)) = bytes.split_first_chunk::<2>() else { return };
    let len = u64::from(u16::from_le_bytes(*pages)) * PAGE as u64;
    let regions = match parse(list) {
        Ok(Some(regions)) => regions,
        Ok(None) => return,
        Err(refused) => {
            assert!(!refused.to_string().is_empty());
            return;
        }
    };
    for cut in [list.len() / 2, list.trim_ascii_end().len().saturating_sub(1)] {
        assert!(!matches!(parse(&list[..cut]), Ok(Some(_))), "a list without its end is one");
    }
    let Ok(made) = Regions::new(regions.clone(), len) else { return };
    assert!((1..=MOST_REGIONS).contains(&regions.len()));
    assert_eq!(made.bytes(), regions.iter().map(|region| region.len).sum::<u64>());
    for region in regions {
        let (first, last) = (region.address, region.address + region.len - PAGE as u64);
        for (address, offset) in [(first, region.offset), (last, region.offset + region.len - PAGE as u64)] {
            assert!(offset + PAGE as u64 <= len.next_multiple_of(PAGE as u64), "a region reaches behind the section");
            assert_eq!(made.offset(address), Some(offset), "at {address:#x}");
        }
    }
}
