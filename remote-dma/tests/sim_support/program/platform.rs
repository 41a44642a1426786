//! What the guest's platform does: windows come and go, the device is reset, memory is proven, marks are taken, threads are not scheduled.
//!
//! A window is taken away with DMA to it under way; at the acknowledgement all of that has landed, and the guest changes the memory.

use super::*;

impl Play {
    pub(super) fn map(&mut self, area: usize) {
        let (memory, window) = {
            let guest = self.guest();
            let found = &guest.areas[area];
            let memory = Arc::clone(&guest.memories[found.memory]);
            let proven = found.kind == Kind::Direct;
            let behind = match found.kind {
                Kind::Mediated => WindowMemory::Mediated,
                _ => WindowMemory::Mapped { memory: Arc::clone(&memory), offset: found.offset, proven },
            };
            let iova = Iova(BASE + area as u64 * AREA_BYTES);
            (found.memory, Window { iova, len: AREA_BYTES, access: Access::READ_WRITE, memory: behind })
        };
        let mut seat = self.seat();
        match self.session.map(window, &mut seat) {
            Ok(()) => self.guest().areas[area].mapped = true,
            Err(error) => return self.guest().complain(format!("area {area} cannot be mapped: {error}")),
        }
        let behind = Arc::clone(&self.guest().memories[memory]);
        let log = self.session.dirty_log(&behind, &mut seat).cloned();
        self.guest().logs[memory] = log;
    }

    pub(super) fn remap(&mut self) {
        let area = self.choices.below(5) as usize;
        self.remap_area(area);
    }

    /// Takes a window away, with DMA to it under way, changes the memory, and gives it back.
    pub(super) fn remap_area(&mut self, area: usize) {
        let (memory, offset) = {
            let guest = self.guest();
            (guest.areas[area].memory, guest.areas[area].offset)
        };
        let piece = Piece { memory, range: offset..offset + AREA_BYTES };
        // A fetch that is answered after its window has gone is a fault, rightly; the model would have to guess which.
        let crowded = self.guest().asked >= STAGING_SLOTS;
        let stored_later = self.guest().expected.iter().any(|expected| match expected {
            Expected::Write(write) => {
                (crowded || !write.direct) && write.pieces.iter().chain([&write.polled]).any(|other| other.meets(&piece))
            }
            Expected::Vector(_) => false,
        });
        if stored_later || self.reading.iter().any(|(other, direct)| !direct && other.meets(&piece)) {
            self.sync();
        }
        let asked = self.world.now();
        let mut seat = self.seat();
        if let Err(error) = self.session.unmap(Iova(BASE + area as u64 * AREA_BYTES), AREA_BYTES, &mut seat) {
            return self.guest().complain(format!("area {area} cannot be unmapped: {error}"));
        }
        if self.world.now().since(asked) > CONTROL_DEADLINE + SLACK {
            self.guest().complain("an unmap took longer than its deadline");
        }
        self.expect_landed_unless_crowded("an unmap was acknowledged");
        self.guest().areas[area].mapped = false;
        self.marked_before_the_acknowledgement(memory);
        // Reads that were under way have read: their memory is free too.
        self.reading.retain(|(other, _)| !other.meets(&piece));
        let mut bytes = vec![0; AREA_BYTES as usize];
        self.choices.fill(&mut bytes);
        {
            let mut guest = self.guest();
            guest.memories[memory].write(offset, &bytes).unwrap();
            guest.foresee(&[piece], &bytes);
        }
        for _ in 0..self.choices.below(20) {
            self.let_pass();
        }
        self.map(area);
        if area == 3 {
            let mut guest = self.guest();
            guest.areas[3].kind = if self.proven { Kind::Direct } else { Kind::Unproven };
        }
    }

    /// A window is gone: whatever the device wrote through it is marked, also where it was the last one of its memory.
    fn marked_before_the_acknowledgement(&mut self, memory: usize) {
        let behind = Arc::clone(&self.guest().memories[memory]);
        let mut seat = self.seat();
        let log = self.session.dirty_log(&behind, &mut seat).cloned();
        let mut guest = self.guest.lock().unwrap();
        if log.is_some() {
            guest.logs[memory] = log;
        }
        guest.take_marks();
        let (marked, stored) = (guest.marked.clone(), guest.stored.clone());
        let missing: Vec<_> =
            self.written_pages.iter().filter(|page| page.0 == memory && !marked.contains(page) && !stored.contains(page)).collect();
        if !missing.is_empty() {
            guest.complain(format!("an unmap was acknowledged before the marks of pages {missing:?}"));
        }
        if self.session.counters().late > 0 {
            guest.complain("a mark or a polled word came after its window was gone");
        }
    }

    pub(super) fn reset(&mut self) {
        // What mediated writes leave behind is not known; from the acknowledgement on nothing may change it.
        let unknown: Vec<Piece> = {
            let mut guest = self.guest();
            guest.lenient = true;
            let mediated = guest.expected.iter().flat_map(|expected| match expected {
                Expected::Write(write) if write.direct => vec![write.polled.clone()],
                Expected::Write(write) => write.pieces.iter().chain([&write.polled]).cloned().collect(),
                Expected::Vector(_) => Vec::new(),
            });
            mediated.collect()
        };
        let mut seat = self.seat();
        if let Err(error) = self.session.reset(ResetKind::Function, &mut seat) {
            return self.guest().complain(format!("the device cannot be reset: {error}"));
        }
        self.expect_landed_unless_crowded("a reset was acknowledged");
        (self.done, self.faults, self.value) = (0, 0, 0);
        self.busy = [false; SLOTS];
        self.reading.clear();
        let mut guest = self.guest.lock().unwrap();
        guest.lenient = false;
        for piece in &unknown {
            let left = guest.read(std::slice::from_ref(piece));
            guest.foresee(std::slice::from_ref(piece), &left);
        }
        self.buffer.read(0, &mut self.buffer_model).unwrap();
        guest.compare("after a reset");
    }

    pub(super) fn toggle_master(&mut self) {
        self.master = !self.master || self.choices.chance(500);
        let mut seat = self.seat();
        self.session.set_bus_master(self.master, &mut seat);
    }

    pub(super) fn dirty(&mut self) {
        let mut missing = Vec::new();
        let mut seat = self.seat();
        for index in 0..3 {
            let memory = Arc::clone(&self.guest().memories[index]);
            if self.session.dirty_log(&memory, &mut seat).is_none() {
                self.guest().complain(format!("memory {index} has no dirty log"));
            }
        }
        let mut guest = self.guest.lock().unwrap();
        guest.take_marks();
        missing.extend(self.written_pages.drain(..).filter(|page| !guest.marked.contains(page) && !guest.stored.contains(page)));
        guest.marked.clear();
        guest.stored.clear();
        if !missing.is_empty() {
            guest.complain(format!("pages {missing:?} were written and are not in the dirty log"));
        }
    }

    /// The memory of area 3 is found to be the guest's own, at a moment when nothing goes by message.
    pub(super) fn prove(&mut self) {
        self.sync();
        let memory = Arc::clone(&self.guest().memories[2]);
        let mut seat = self.seat();
        self.session.prove(&memory, &mut seat);
        self.proven = true;
        self.guest().areas[3].kind = Kind::Direct;
    }

    /// The lender's thread is not scheduled for seconds: reads meet their deadline, and late answers answer nothing.
    pub(super) fn freeze(&mut self) {
        let until = self.world.now() + READ_DEADLINE + Duration::from_millis(self.choices.between(0, 900));
        self.machine.lock().unwrap().frozen_until = until;
        self.read(VALUE);
        while self.world.now() < until {
            self.world.advance(Duration::from_millis(10));
        }
        self.machine.lock().unwrap().frozen_until = Nanos(0);
        self.sync();
        self.read_value();
    }
}
