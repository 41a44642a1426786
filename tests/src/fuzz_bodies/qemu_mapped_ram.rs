//! QEMU's mapped-ram files: whatever a file says, it is refused, or each byte of it is in one block or in what is kept beside them, and comes back to its place.
//!
//! Bytes `00 30 00 00` and pieces `00 00 00 00 04 "QEVM"`, … are a file of 12 KiB that begins like a saved machine and is zero where no piece says otherwise.

use std::io;

use farbus_machine_bank::deposit::Source;
use farbus_machine_bank::page::PAGE;
use farbus_machine_bank::qemu::{Kept, Saved};

use super::input::Input;

/// Bytes of a block or of the rest that are compared.
const COMPARED: u64 = 256 << 10;

/// The length of a file, and pieces of it.
pub fn qemu_mapped_ram(bytes: &[u8]) {
    let mut input = Input(bytes);
    if let Ok(kept) = Kept::parse(bytes) {
        assert_eq!(kept.encode(), bytes);
    }
    let Some(len) = input.u32() else { return };
    let mut file = Pieces { len: len.into(), pieces: Vec::new() };
    while let (Some(at), Some(piece)) = (input.u32(), input.piece()) {
        file.pieces.push((at.into(), piece));
    }
    let Ok(saved) = Saved::open(&file) else { return };
    let kept = saved.kept();
    assert_eq!(Kept::parse(&kept.encode()).as_ref(), Ok(kept), "a header comes back");
    let inside: u64 = kept.blocks().iter().map(|block| block.len).sum();
    assert_eq!(kept.len(), kept.header_len() as u64 + file.len - inside);
    for block in saved.blocks() {
        let source = saved.pages(block);
        let page = block.page_size;
        for at in 0..(block.len / page).min(COMPARED / page) {
            let (mut is, mut was) = (vec![1; page as usize], vec![2; page as usize]);
            source.read_at(at * page, &mut is).expect("it lies in the file");
            file.read_at(block.pages_at + at * page, &mut was).expect("it lies in the file");
            let there = block.bitmap[(at / 8) as usize] >> (at % 8) & 1 == 1;
            assert!(is == if there { was } else { vec![0; page as usize] }, "page {at} of {}", block.name);
            let data = source.data_from(at * page).expect("it lies in the file");
            assert_eq!(there, data.is_some_and(|data| data.start == at * page), "page {at} of {}", block.name);
        }
    }
    let rest = saved.rest();
    let (mut all, mut at) = (vec![0; kept.len().min(COMPARED) as usize], kept.header_len() as u64);
    rest.read_at(0, &mut all).expect("it lies in the file");
    assert!(all.starts_with(&kept.encode()), "it begins with its header");
    while let Some((place, len)) = kept.place(at).filter(|_| at < COMPARED) {
        let len = len.min(kept.len().min(COMPARED) - at);
        let mut was = vec![0; len as usize];
        file.read_at(place, &mut was).expect("it lies in the file");
        assert!(all[at as usize..][..len as usize] == was, "byte {at} of the rest");
        assert!(kept.blocks().iter().all(|block| place + len <= block.at || place >= block.at + block.len), "in a block");
        at += len;
    }
    assert!(at == kept.len() || at >= COMPARED, "the rest ends early, at {at} of {}", kept.len());
    assert!(kept.place(u64::MAX - PAGE as u64).is_none());
}

/// A file that is zero but for some pieces.
struct Pieces<'a> {
    len: u64,
    pieces: Vec<(u64, &'a [u8])>,
}

impl Source for Pieces<'_> {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset + buf.len() as u64;
        assert!(end <= self.len, "{end} of {} bytes", self.len);
        buf.fill(0);
        for (at, piece) in &self.pieces {
            let (from, to) = ((*at).max(offset), (at + piece.len()).min(end));
            if from < to {
                buf[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&piece[(from - at) as usize..(to - at) as usize]);
            }
        }
        Ok(())
    }
}
