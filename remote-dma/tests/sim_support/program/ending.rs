//! How a play ends: the lender leaves in order, the link is cut with everything under way, or the borrower has had enough.
//!
//! After a cut a register read is all ones within its deadline, and once the lender has let go no byte of guest memory changes; memory that
//! the borrower takes back from a lender that sleeps is its own at once, whatever that lender does when it wakes.

use super::*;

impl Play {
    pub(super) fn finish(&mut self) {
        self.sync();
        self.dirty();
        self.read_value();
        let lender = self.machine.lock().unwrap().lender.take();
        drop(lender.map(|lender| lender.end().unwrap()));
        self.await_the_end(CloseReason::PeerClosed);
    }

    pub(super) fn await_the_end(&mut self, reason: CloseReason) {
        let started = self.world.now();
        let mut seat = self.seat();
        while self.session.gone().is_none() && self.world.now().since(started) < Duration::from_secs(20) {
            self.session.poll(self.world.now(), &mut seat);
            if self.world.next_at().is_none() {
                self.world.advance(Duration::from_millis(100));
            }
        }
        if self.session.gone() != Some(reason) {
            let heard = self.session.gone();
            self.guest().complain(format!("the borrower heard {heard:?} of its lender's end, not {reason}"));
        }
        self.cut = true;
        if self.read(VALUE) != u64::MAX {
            self.guest().complain("a device that is gone has a register");
        }
        self.write(VALUE, 1);
        let unmapped = self.session.unmap(Iova(BASE), AREA_BYTES, &mut seat);
        if let Err(error) = unmapped {
            self.guest().complain(format!("memory cannot be taken from a lender that is gone: {error}"));
        }
        let is_gone = matches!(
            self.session.reset(ResetKind::Function, &mut seat),
            Err(AttachmentError::Gone(_)) if self.session.gone().is_some()
        );
        if !is_gone {
            self.guest().complain("a device that is gone was reset");
        }
    }

    /// Doorbells that the lender has not obeyed, and DMA that it has begun.
    fn begin_more(&mut self) {
        for _ in 0..3 {
            self.ahead_of_the_cut();
            self.machine.lock().unwrap().pump();
        }
        self.ahead_of_the_cut();
    }

    /// The lender does not run for longer than anybody waits: the unmap takes the memory back without it.
    pub(super) fn give_up(&mut self) {
        self.sync();
        self.begin_more();
        self.machine.lock().unwrap().frozen_until = self.world.now() + Duration::from_secs(3600);
        let asked = self.world.now();
        let mut seat = self.seat();
        let unmapped = self.session.unmap(Iova(BASE), AREA_BYTES, &mut seat);
        let took = self.world.now().since(asked);
        if unmapped.is_err() || took > CONTROL_DEADLINE + SLACK || self.session.gone().is_none() {
            self.guest().complain(format!("giving up a lender that sleeps took {took:?} and gave {unmapped:?}"));
        }
        self.machine.lock().unwrap().frozen_until = Nanos(0);
        taken_back(&self.machine, &self.guest, &self.world, &mut self.choices);
    }

    /// The session is dropped, and with it the device's right to the memory.
    pub(super) fn leave(mut self, steps: u64) -> Result<(), String> {
        self.begin_more();
        let Self { session, machine, guest, world, mut choices, .. } = self;
        drop(session);
        taken_back(&machine, &guest, &world, &mut choices);
        super::verdict(steps, &world, &guest)
    }

    /// Doorbells that reach the lender and are not obeyed before the cut.
    pub(super) fn ahead_of_the_cut(&mut self) {
        for _ in 0..self.choices.below(4) {
            if self.choices.chance(700) {
                let (iova, len) = self.place();
                self.device_writes(iova, len);
            } else {
                self.device_reads();
            }
        }
        self.world.advance(Duration::from_micros(self.choices.below(500)));
    }

    /// What the device was told is done has happened, whatever became of the link.
    fn told_is_done(&mut self) {
        let told = std::mem::take(&mut *self.told.lock().unwrap());
        let mut guest = self.guest.lock().unwrap();
        for done in told {
            if done.command == READ {
                let range = done.from as usize..(done.from + done.len) as usize;
                let mut bytes = vec![0; done.len as usize];
                self.buffer.read(done.from, &mut bytes).unwrap();
                if self.buffer_model.get(range).is_none_or(|should| should != bytes) {
                    guest.complain("the device was told that a read is done which did not happen");
                }
                continue;
            }
            let write = guest.expected.iter().find_map(|expected| match expected {
                Expected::Write(write) if write.word == POLLED_WORD ^ done.stamp && !write.overwritten => Some(write.clone()),
                _ => None,
            });
            if write.is_some_and(|write| guest.read(&write.pieces) != write.bytes) {
                guest.complain("the device was told that a write is done which did not happen");
            }
        }
    }

    /// The link is cut with everything under way.
    pub(super) fn after_the_cut(&mut self, detection: Duration) {
        // A queue that was full has room again when the end is known; an access waits for that too.
        let limit = READ_DEADLINE.max(detection) + SLACK;
        let before = self.choices.below(4);
        for _ in 0..before {
            // Posted writes to nobody; reads end at the deadline or when the cut is noticed.
            self.write(VALUE, 7);
            let asked = self.world.now();
            let value = {
                let mut seat = self.seat();
                self.session.bar_read(bar0(VALUE), Width::B8, &mut seat)
            };
            let took = self.world.now().since(asked);
            if value != u64::MAX {
                self.guest().complain(format!("a cut link brought {value:#x}"));
            }
            if took > limit {
                self.guest().complain(format!("a read over a cut link took {took:?}"));
            }
        }
        if self.choices.chance(300) && self.session.gone().is_none() {
            let mut seat = self.seat();
            let asked = self.world.now();
            let refused = self.session.unmap(Iova(BASE), AREA_BYTES, &mut seat);
            let took = self.world.now().since(asked);
            if took > CONTROL_DEADLINE + limit || matches!(refused, Err(MapError::Overlap { .. } | MapError::Range { .. })) {
                self.guest().complain(format!("an unmap over a cut link took {took:?} and gave {refused:?}"));
            }
        } else {
            self.await_the_end(CloseReason::PeerGone);
        }
        // The lender notices too, lets go of the memory and has its device back.
        let started = self.world.now();
        let lender = self.machine.lock().unwrap().lender.take();
        let Some(mut lender) = lender else { return };
        while lender.closed().is_none() && self.world.now().since(started) < Duration::from_secs(20) {
            lender.pump(self.world.now());
            if self.world.next_at().is_none() {
                self.world.advance(Duration::from_millis(100));
            }
        }
        if lender.closed() != Some(CloseReason::PeerGone) {
            let heard = lender.closed();
            self.guest().complain(format!("the lender heard {heard:?} of the cut"));
        }
        self.told_is_done();
        drop(lender.end().unwrap());
        self.nothing_else_changed();
    }

    /// Every byte is as foreseen, or was under way and is old or new.
    pub(super) fn nothing_else_changed(&mut self) {
        let snapshot: Vec<Vec<u8>> = {
            let guest = self.guest();
            (0..4).map(|memory| guest.read(&[Piece { memory, range: 0..guest.model[memory].len() as u64 }])).collect()
        };
        self.world.advance(Duration::from_secs(60));
        let mut guest = self.guest.lock().unwrap();
        let under_way: Vec<Piece> = guest
            .expected
            .iter()
            .filter_map(|expected| match expected {
                Expected::Write(write) => Some(write.pieces.iter().chain([&write.polled]).cloned().collect::<Vec<_>>()),
                Expected::Vector(_) => None,
            })
            .flatten()
            .collect();
        for (memory, before) in snapshot.iter().enumerate() {
            let now = guest.read(&[Piece { memory, range: 0..before.len() as u64 }]);
            if now != *before {
                guest.complain(format!("memory {memory} changed after the lender had let go"));
            }
            let strayed = now.iter().zip(&guest.model[memory]).enumerate().find(|(at, (is, should))| {
                let byte = Piece { memory, range: *at as u64..*at as u64 + 1 };
                is != should && !under_way.iter().any(|piece| piece.meets(&byte))
            });
            if let Some((at, _)) = strayed {
                guest.complain(format!("memory {memory} changed at {at:#x}, where nothing was under way"));
            }
        }
    }
}

/// The guest's memory is used for something else while the lender does what it had begun, and ends.
fn taken_back(machine: &Mutex<Machine>, guest: &Mutex<Guest>, world: &World, choices: &mut Seed) {
    let memories = guest.lock().unwrap().memories.clone();
    let contents: Vec<Vec<u8>> = memories
        .iter()
        .map(|memory| {
            let mut bytes = vec![0; memory.len() as usize];
            choices.fill(&mut bytes);
            memory.write(0, &bytes).unwrap();
            bytes
        })
        .collect();
    let Some(mut lender) = machine.lock().unwrap().lender.take() else { return };
    let started = world.now();
    while lender.closed().is_none() && world.now().since(started) < Duration::from_secs(20) {
        lender.pump(world.now());
        if world.next_at().is_none() {
            world.advance(Duration::from_millis(100));
        }
    }
    if lender.closed().is_none() {
        guest.lock().unwrap().complain("a lender does not hear that its borrower has left");
    }
    drop(lender.end().unwrap());
    world.advance(Duration::from_secs(60));
    for (index, (memory, should)) in memories.iter().zip(&contents).enumerate() {
        let mut is = vec![0; should.len()];
        memory.read(0, &mut is).unwrap();
        if let Some(at) = is.iter().zip(should).position(|(is, should)| is != should) {
            guest.lock().unwrap().complain(format!("memory {index} was changed at {at:#x} after it had been taken back"));
        }
    }
}
