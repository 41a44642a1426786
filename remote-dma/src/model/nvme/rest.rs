//! A controller that comes to rest: it fetches nothing more, and every command that it has fetched ends as if nothing had been said.
//!
//! Of 63 commands in queue 3 the controller has fetched 17 when it is paused: those 17 get their completions and their interrupt, the other 46 stay in the
//! guest's memory, behind the queue's head, until it is told to go on. Requests for events, and commands for whose completion the driver has not made room,
//! stay where they are: they wait for the driver.

use super::registers::Shutdown;
use super::slots::Phase;
use super::{Life, Nvme};

impl Nvme {
    /// Whether it is paused and has nothing under way that it could end by itself.
    pub(super) fn has_come_to_rest(&self) -> bool {
        self.paused
            && self.dmas == 0
            && self.jobs_running == 0
            && self.slots_reserved == 0
            && self.life != Life::Resetting
            && !self.shutdown_flush
            && self.registers.shutdown != Shutdown::Occurring
            && self.raised_deliverable() == 0
            && self.slots.iter().all(|(_, slot)| matches!(slot.phase, Phase::Event | Phase::Full))
    }
}
