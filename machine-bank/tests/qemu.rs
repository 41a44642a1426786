//! QEMU's mapped-ram files in a bank: what comes out is the file that went in, and what is no such file is refused.
//!
//! A file of two blocks, `pc.ram` of 300 pages and a ROM of 3, is deposited, changed, deposited again, and withdrawn twice, byte for byte.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;

use common::{contents, machine, memory_bank, work};
use farbus_machine_bank::deposit::DepositReport;
use farbus_machine_bank::qemu::{Kept, QemuError, Refused, SECTION, Saved};
use farbus_machine_bank::store::Kind;
use farbus_machine_bank::{Bank, Changes, DepositOptions, PAGE, SectionKind};

/// Bytes from which the pages of a block may begin, as in QEMU.
const ALIGNED: usize = 1 << 20;

/// A file as QEMU writes it, and where its blocks' pages are.
fn saved(blocks: &[(&str, &[u8])]) -> (Vec<u8>, Vec<usize>) {
    let mut file =
        b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-11.1\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0amapped-ram".to_vec();
    file.extend_from_slice(b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04");
    let all: u64 = blocks.iter().map(|(_, pages)| pages.len() as u64).sum();
    file.extend_from_slice(&(all | 4).to_be_bytes());
    let mut places = Vec::new();
    for (name, pages) in blocks {
        file.push(name.len() as u8);
        file.extend_from_slice(name.as_bytes());
        file.extend_from_slice(&(pages.len() as u64).to_be_bytes());
        let bitmap_at = file.len() + 28;
        let mut bitmap = vec![0_u8; (pages.len() / PAGE).div_ceil(64) * 8];
        for (at, _) in pages.chunks_exact(PAGE).enumerate().filter(|(_, page)| page.iter().any(|byte| *byte != 0)) {
            bitmap[at / 8] |= 1 << (at % 8);
        }
        let pages_at = (bitmap_at + bitmap.len()).next_multiple_of(ALIGNED);
        file.extend_from_slice(&1_u32.to_be_bytes());
        [PAGE, bitmap_at, pages_at].iter().for_each(|number| file.extend_from_slice(&(*number as u64).to_be_bytes()));
        file.extend_from_slice(&bitmap);
        file.resize(pages_at, 0);
        file.extend_from_slice(pages);
        places.push(pages_at);
    }
    file.extend_from_slice(&0x10_u64.to_be_bytes());
    file.extend((0..50_000_u32).flat_map(|n| (n * n).to_le_bytes()));
    (file, places)
}

fn deposit(bank: &Bank, name: &str, file: &[u8]) -> DepositReport {
    let source = &file;
    let saved = Saved::open(source).unwrap();
    let mut deposit = bank.deposit(name, &DepositOptions::default()).unwrap();
    for block in saved.blocks() {
        deposit.section(SectionKind::Memory, &block.section, &saved.pages(block), Changes::HashAll, &|_| {}).unwrap();
    }
    deposit.section(SectionKind::DeviceState, SECTION, &saved.rest(), Changes::HashAll, &|_| {}).unwrap();
    deposit.commit().unwrap()
}

fn withdraw_to(bank: &Bank, wish: &str, file: &File) -> Result<u64, QemuError> {
    let entry = bank.find(wish).unwrap();
    let report = bank.withdraw(&entry).unwrap().qemu(file, &|_| {})?;
    Ok(report.sections.iter().map(|(_, report)| report.fetched).sum())
}

fn withdrawn(bank: &Bank, wish: &str) -> Vec<u8> {
    let file = tempfile::tempfile().unwrap();
    withdraw_to(bank, wish, &file).unwrap();
    contents(&file)
}

#[test]
fn a_saved_machine_comes_out_byte_for_byte_and_again_after_it_worked() {
    let (_, bank) = memory_bank();
    let (mut ram, rom) = (machine(1, 5000), machine(2, 3));
    let (first, _) = saved(&[("pc.ram", &ram), ("/rom@etc/acpi/tables", &rom)]);
    let report = deposit(&bank, "vm7", &first);
    assert!(report.counts.zero > 1500, "{report:?}");
    work(&mut ram, 3, 20);
    let (second, _) = saved(&[("pc.ram", &ram), ("/rom@etc/acpi/tables", &rom)]);
    let report = deposit(&bank, "vm7", &second);
    // Its changed pages, and the page of the file that has the bitmap.
    assert!((1..=21).contains(&report.counts.new), "{report:?}");
    assert_eq!(report.parent.as_deref(), Some("vm7@1"));
    assert!(withdrawn(&bank, "vm7@1") == first && withdrawn(&bank, "vm7@2") == second);
    let entry = bank.find("vm7").unwrap();
    let names: Vec<_> = bank.manifest(&entry).unwrap().head.sections.iter().map(|section| section.name.clone()).collect();
    assert_eq!(names, ["pc.ram", "rom_etc_acpi_tables", "qemu"]);
}

#[test]
fn what_is_right_in_a_file_stays_and_what_is_wrong_does_not() {
    let (_, bank) = memory_bank();
    let (ram, rom) = (machine(4, 700), machine(5, 3));
    let (file, places) = saved(&[("pc.ram", &ram), ("rom", &rom)]);
    deposit(&bank, "vm7", &file);
    let target = tempfile::tempfile().unwrap();
    let fetched = withdraw_to(&bank, "vm7", &target).unwrap();
    assert!(withdraw_to(&bank, "vm7", &target).unwrap() <= 1, "only the header of what is kept is not in the file");
    // One byte in a block, one where a page is zero, one around the blocks, and a tail.
    let zero = ram.chunks_exact(PAGE).position(|page| page.iter().all(|byte| *byte == 0)).unwrap();
    for at in [places[0] + 5, places[0] + zero * PAGE + 9, 20, places[0] + ram.len() + 100, file.len() - 1, file.len() + 10_000] {
        target.write_all_at(b"?", at as u64).unwrap();
    }
    let again = withdraw_to(&bank, "vm7", &target).unwrap();
    assert!(again <= 6 && again < fetched, "{again} of {fetched} pages");
    assert!(contents(&target) == file);
}

#[test]
fn a_page_whose_bit_is_clear_is_zero_whatever_the_file_has_there() {
    let (_, bank) = memory_bank();
    let mut ram = machine(6, 100);
    ram[7 * PAGE..8 * PAGE].fill(0);
    let (file, places) = saved(&[("pc.ram", &ram)]);
    let mut stale = file.clone();
    stale[places[0] + 7 * PAGE..][..8].copy_from_slice(b"obsolete");
    deposit(&bank, "vm7", &stale);
    assert!(withdrawn(&bank, "vm7") == file);
}

#[test]
fn a_damaged_page_makes_no_file_and_another_machine_is_none() {
    let (store, bank) = memory_bank();
    let (file, _) = saved(&[("pc.ram", &machine(7, 200))]);
    deposit(&bank, "vm7", &file);
    common::deposit(&bank, "other", &machine(8, 10), Changes::HashAll);
    let target = tempfile::tempfile().unwrap();
    assert!(matches!(withdraw_to(&bank, "other", &target), Err(QemuError::Other)));
    assert_eq!(contents(&target).len(), 0);
    for pack in farbus_machine_bank::store::Store::list(&store, Kind::Pack).unwrap() {
        store.flip(Kind::Pack, &pack.name, 3000, 3);
    }
    assert!(matches!(withdraw_to(&bank, "vm7", &target), Err(QemuError::Withdraw(_))));
}

#[test]
fn what_was_kept_of_a_file_is_believed_only_where_it_fits_the_machine() {
    let (_, bank) = memory_bank();
    let (file, _) = saved(&[("pc.ram", &machine(9, 60))]);
    let bytes = &file[..];
    let saved = Saved::open(&bytes).unwrap();
    let rest: Vec<u8> = {
        use farbus_machine_bank::Source;
        let source = saved.rest();
        let mut all = vec![0; source.len() as usize];
        source.read_at(0, &mut all).unwrap();
        all
    };
    let entry = |name: &str, memory: &str, pages: usize, rest: &[u8]| {
        let mut deposit = bank.deposit(name, &DepositOptions::default()).unwrap();
        deposit.section(SectionKind::Memory, memory, &machine(9, pages).as_slice(), Changes::HashAll, &|_| {}).unwrap();
        deposit.section(SectionKind::DeviceState, SECTION, &rest, Changes::HashAll, &|_| {}).unwrap();
        deposit.commit().unwrap().machine
    };
    let target = tempfile::tempfile().unwrap();
    withdraw_to(&bank, &entry("whole", "pc.ram", 60, &rest), &target).unwrap();
    assert!(contents(&target) == file);
    let block = |error| matches!(error, Err(QemuError::Block { len: 245_760, .. }));
    assert!(block(withdraw_to(&bank, &entry("other-name", "ram", 60, &rest), &target)));
    assert!(block(withdraw_to(&bank, &entry("shorter", "pc.ram", 59, &rest), &target)));
    for wrong in [&rest[..rest.len() - 1], &rest[..100], &[], &b"text"[..], &[0; 9000]] {
        let name = format!("wrong-{}", wrong.len());
        assert!(matches!(withdraw_to(&bank, &entry(&name, "pc.ram", 60, wrong), &target), Err(QemuError::Malformed(_))), "{name}");
    }
    // A header whose blocks lie in each other, or behind the end.
    for place in [0, 1, u64::MAX - 4095] {
        let mut wrong = rest.clone();
        wrong[29..37].copy_from_slice(&place.to_le_bytes());
        let made = Kept::parse(&wrong[..PAGE]);
        let name = format!("place-{place}");
        let withdrawn = withdraw_to(&bank, &entry(&name, "pc.ram", 60, &wrong), &target);
        assert!(made.is_err() == matches!(withdrawn, Err(QemuError::Malformed(_))), "{name}: {made:?} {withdrawn:?}");
    }
}

#[test]
fn what_qemu_did_not_save_so_is_refused_with_what_it_is() {
    let (file, _) = saved(&[("pc.ram", &machine(10, 20))]);
    let open = |bytes: &[u8]| Saved::open(&bytes).map(|_| ());
    assert!(matches!(open(b""), Err(Refused::Magic)) && matches!(open(&[0; 5000]), Err(Refused::Magic)));
    let at = file.windows(10).position(|word| word == b"mapped-ram").unwrap();
    let mut other = file.clone();
    other[at..at + 10].copy_from_slice(b"postcopy-x");
    assert!(matches!(open(&other), Err(Refused::Stream)));
    let mut other = file.clone();
    other[at + 16..at + 19].copy_from_slice(b"vga");
    assert!(matches!(open(&other), Err(Refused::Unknown(_))));
    for len in 0..500 {
        assert!(open(&file[..len]).is_err(), "{len} bytes");
    }
    assert!(open(&file[..ALIGNED + 20 * PAGE + 7]).is_err() && open(&file[..ALIGNED + 20 * PAGE + 8]).is_ok());
}
