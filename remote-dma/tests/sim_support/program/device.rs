//! What the device is told: DMA both ways at any place, also where it may not, and more of it than the guest's side takes at once.
//!
//! A write of 300 bytes across two windows is foreseen in the model, its vector expected, its buffer slot busy until all is done.

use super::*;

impl Play {
    pub(super) fn free_slot(&mut self) -> usize {
        if let Some(free) = self.busy.iter().position(|busy| !busy) {
            return free;
        }
        self.sync();
        0
    }

    pub(super) fn place(&mut self) -> (u64, u64) {
        // Also a little outside the areas, on both sides.
        let iova = self.choices.between(BASE - 64, Guest::end() + 64);
        let len = if self.choices.chance(500) { self.choices.between(1, 64) } else { self.choices.between(1, SLOT_BYTES) };
        (iova, len)
    }

    pub(super) fn command(&mut self, command: u64, slot: usize, iova: u64, len: u64) {
        for (register, value) in
            [(FROM, slot as u64 * SLOT_BYTES), (IOVA, iova), (LEN, len), (STAMP, self.stamp), (COMMAND, command)]
        {
            self.write(register, value);
        }
    }

    /// More pages at once than the guest's side takes by messages, then a register read in the middle of it.
    pub(super) fn storm(&mut self) {
        for _ in 0..self.choices.between(4, 16) {
            let iova = self.choices.between(BASE + 3 * AREA_BYTES, Guest::end() - 2 * SLOT_BYTES);
            self.device_writes(iova, SLOT_BYTES - 8);
        }
        match self.choices.below(4) {
            0 => self.reset(),
            1 => self.remap_area(0),
            2 => self.dirty(),
            _ => self.read_value(),
        }
    }

    pub(super) fn device_writes(&mut self, iova: u64, len: u64) {
        let slot = self.free_slot();
        // The polled word is aligned and stays inside its page and its window.
        let end = (iova + len) & !3;
        let (Some(len), true) = (end.checked_sub(iova).filter(|len| *len > 0), end % 4096 <= 4088) else { return };
        let mut bytes = vec![0; len as usize];
        self.choices.fill(&mut bytes);
        self.stamp += 1;
        let word = POLLED_WORD ^ self.stamp;
        let mut guest = self.guest.lock().unwrap();
        let allowed = if self.master { guest.resolve(iova, len) } else { None };
        if let Some((pieces, direct)) = allowed {
            let Some((polled, polled_direct)) = guest.resolve(end, 8) else { return };
            let polled = polled[0].clone();
            // What reaches guest memory in two ways has no order but that of the vectors.
            if direct != polled_direct || !may_write(&mut guest, &self.reading, &pieces, &polled, direct) {
                return;
            }
            guest.foresee(&pieces, &bytes);
            guest.foresee(std::slice::from_ref(&polled), &word.to_le_bytes());
            if direct {
                self.written_pages.extend(pages(&pieces).chain(pages(std::slice::from_ref(&polled))));
            }
            let write = Write { pieces, bytes: bytes.clone(), polled, word, direct, marks: BTreeSet::new(), overwritten: false };
            guest.expected.push_back(Expected::Write(write));
            self.done += 1;
            self.busy[slot] = true;
        } else {
            self.faults += 1;
        }
        drop(guest);
        self.fill_slot(slot, &bytes);
        self.command(WRITE, slot, iova, len);
    }

    pub(super) fn fill_slot(&mut self, slot: usize, bytes: &[u8]) {
        let start = slot as u64 * SLOT_BYTES;
        self.buffer.write(start, bytes).unwrap();
        self.buffer_model[start as usize..start as usize + bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn device_reads(&mut self) {
        let slot = self.free_slot();
        let (iova, len) = self.place();
        let guest = self.guest.lock().unwrap();
        let allowed = if self.master { guest.resolve(iova, len) } else { None };
        if let Some((pieces, direct)) = allowed {
            let unordered = guest.expected.iter().any(|expected| match expected {
                Expected::Write(write) => pieces.iter().any(|piece| {
                    let data = write.pieces.iter().any(|other| other.meets(piece));
                    direct && (write.polled.meets(piece) || data && !write.direct)
                }),
                Expected::Vector(_) => false,
            });
            if unordered {
                return;
            }
            let bytes = guest.expected_at(&pieces);
            drop(guest);
            let start = slot * SLOT_BYTES as usize;
            self.buffer_model[start..start + bytes.len()].copy_from_slice(&bytes);
            self.reading.extend(pieces.into_iter().map(|piece| (piece, direct)));
            self.done += 1;
            self.busy[slot] = true;
        } else {
            drop(guest);
            self.faults += 1;
        }
        self.command(READ, slot, iova, len);
    }

    /// Waits until the device has done everything, and looks at all memory.
    pub(super) fn sync(&mut self) {
        for _ in 0..2000 {
            // A polled word that goes by message, because messages are crowded, may come after the device is done with its data.
            let done = self.read(DONE) == self.done && self.guest().expected.is_empty();
            if done || self.cut {
                break;
            }
            // As a VMM does: what the device waits for is answered between two accesses of the guest.
            self.let_pass();
            self.answer();
        }
        let (done, faults) = (self.read(DONE), self.read(FAULTS));
        if (done, faults) != (self.done, self.faults) {
            let should = (self.done, self.faults);
            self.guest().complain(format!("the device has done and refused {:?}, not {should:?}", (done, faults)));
        }
        while !self.guest().tickets.is_empty() {
            self.answer();
        }
        self.busy = [false; SLOTS];
        self.told.lock().unwrap().clear();
        self.reading.clear();
        self.guest().asked = 0;
        self.guest().compare("all is done");
        let mut is = vec![0; self.buffer_model.len()];
        self.buffer.read(0, &mut is).unwrap();
        if let Some(at) = is.iter().zip(&self.buffer_model).position(|(is, should)| is != should) {
            let should = self.buffer_model[at];
            self.guest().complain(format!("the device read {:#x} into {at:#x}, not {should:#x}", is[at]));
        }
    }
}

/// Whether a write may be asked for while others are under way; marks those whose place it takes.
fn may_write(guest: &mut Guest, reading: &[(Piece, bool)], pieces: &[Piece], polled: &Piece, direct: bool) -> bool {
    let all = || pieces.iter().chain([polled]);
    if all().any(|piece| reading.iter().any(|(other, _)| other.meets(piece))) {
        return false;
    }
    let meets = |other: &Piece| all().any(|piece| piece.meets(other));
    let refused = guest.expected.iter().any(|expected| match expected {
        Expected::Write(write) => {
            let data = write.pieces.iter().any(meets);
            // A polled word is stored by a CPU, later than one-sided writes behind it may land; a guest does not reuse its place before.
            (data || meets(&write.polled)) && (write.direct != direct || direct && meets(&write.polled))
        }
        Expected::Vector(_) => false,
    });
    if !refused {
        for expected in &mut guest.expected {
            if let Expected::Write(write) = expected {
                write.overwritten |= write.pieces.iter().any(meets) || meets(&write.polled);
            }
        }
    }
    !refused
}
