//! What was asked of the server and not yet answered: replies come in any order, and each must be to a question.
//!
//! A region read is sent as message 0x1003 and remembered in place 3; the reply 0x1003 of the same command takes it out, and a second reply
//! 0x1003, or one to another command, ends the connection.

use std::collections::VecDeque;

use farbus_remote_dma::{ReadTicket, Width};
use farbus_transport::Nanos;

use crate::vfio_user::wire::{Command, RegionAccess};

/// Questions at a time; message numbers are a place and a count of its uses.
pub(super) const MAX_ASKED: usize = 4096;

/// What a reply is to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    /// A register read; the ticket is taken away where nobody waits for it any more.
    Read {
        ticket: Option<ReadTicket>,
        access: RegionAccess,
        width: Width,
    },
    /// A register write.
    Write,
    /// A write to configuration space.
    Config,
    Irqs,
    /// Interrupts are turned off, which a server may have done by itself.
    IrqsOff,
    Map,
    Unmap,
    Reset,
}

impl Ask {
    const fn command(self) -> Command {
        match self {
            Self::Read { .. } => Command::RegionRead,
            Self::Write | Self::Config => Command::RegionWrite,
            Self::Irqs | Self::IrqsOff => Command::SetIrqs,
            Self::Map => Command::DmaMap,
            Self::Unmap => Command::DmaUnmap,
            Self::Reset => Command::DeviceReset,
        }
    }
}

/// All questions.
pub(super) struct Asked {
    places: Vec<Option<(u16, Ask)>>,
    free: Vec<u16>,
    uses: Vec<u8>,
    /// In the order they were asked, for the deadline: those that are answered fall out at the front.
    order: VecDeque<(u16, Nanos)>,
}

impl Asked {
    pub(super) fn new() -> Self {
        Self {
            places: vec![None; MAX_ASKED],
            free: (0..MAX_ASKED as u16).rev().collect(),
            uses: vec![0; MAX_ASKED],
            order: VecDeque::with_capacity(MAX_ASKED),
        }
    }

    /// Remembers a question; the number and command of its message, `None` where there are too many.
    pub(super) fn remember(&mut self, ask: Ask, now: Nanos) -> Option<(u16, Command)> {
        let place = self.free.pop()?;
        let uses = self.uses.get_mut(usize::from(place))?;
        *uses = uses.wrapping_add(1) & 0xf;
        let id = place | u16::from(*uses) << 12;
        *self.places.get_mut(usize::from(place))? = Some((id, ask));
        self.order.push_back((id, now));
        Some((id, ask.command()))
    }

    /// The question that a reply is to; `None` where there is none.
    pub(super) fn answered(&mut self, id: u16, command: u16) -> Option<Ask> {
        let place = id & (MAX_ASKED as u16 - 1);
        let slot = self.places.get_mut(usize::from(place))?;
        let (_, ask) = slot.take_if(|(asked, ask)| *asked == id && ask.command().number() == command)?;
        self.free.push(place);
        while self.order.front().is_some_and(|(id, _)| !is_open(&self.places, *id)) {
            self.order.pop_front();
        }
        // Those behind one that is not answered: each round of the places leaves at most one of each.
        if self.order.len() >= 2 * MAX_ASKED {
            let places = &self.places;
            self.order.retain(|(id, _)| is_open(places, *id));
        }
        Some(ask)
    }

    /// When the oldest open question was asked, and what it was.
    pub(super) fn oldest(&self) -> Option<(Ask, Nanos)> {
        let (id, since) = self.order.front()?;
        let (_, ask) = self.places.get(usize::from(id & (MAX_ASKED as u16 - 1)))?.as_ref()?;
        Some((*ask, *since))
    }

    pub(super) fn count(&self) -> usize {
        MAX_ASKED - self.free.len()
    }

    /// Hands out the tickets of all register reads, whose answers nobody waits for now.
    pub(super) fn give_up_reads(&mut self, mut each: impl FnMut(ReadTicket, Width)) {
        for (_, ask) in self.places.iter_mut().flatten() {
            if let Ask::Read { ticket, width, .. } = ask
                && let Some(ticket) = ticket.take()
            {
                each(ticket, *width);
            }
        }
    }
}

fn is_open(places: &[Option<(u16, Ask)>], id: u16) -> bool {
    places.get(usize::from(id & (MAX_ASKED as u16 - 1))).is_some_and(|place| place.is_some_and(|(open, _)| open == id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_is_to_one_question_of_its_command_and_only_once() {
        let mut asked = Asked::new();
        let (first, command) = asked.remember(Ask::Write, Nanos(1)).unwrap();
        let (second, _) = asked.remember(Ask::Reset, Nanos(2)).unwrap();
        assert_eq!(asked.answered(first, Command::DeviceReset.number()), None);
        assert_eq!(asked.answered(second, Command::DeviceReset.number()), Some(Ask::Reset));
        assert_eq!(asked.oldest(), Some((Ask::Write, Nanos(1))));
        assert_eq!(asked.answered(first, command.number()), Some(Ask::Write));
        assert_eq!(asked.answered(first, command.number()), None);
        assert_eq!((asked.oldest(), asked.count()), (None, 0));
    }

    #[test]
    fn there_are_so_many_questions_and_no_more_and_a_slow_one_holds_up_nothing() {
        let mut asked = Asked::new();
        let (slow, _) = asked.remember(Ask::Reset, Nanos(0)).unwrap();
        for now in 0..3 * MAX_ASKED as u64 {
            let (id, command) = asked.remember(Ask::Write, Nanos(now)).unwrap();
            assert_eq!(asked.answered(id, command.number()), Some(Ask::Write));
        }
        assert!(asked.order.len() <= 2 * MAX_ASKED);
        while asked.remember(Ask::Write, Nanos(9)).is_some() {}
        assert_eq!(asked.count(), MAX_ASKED);
        assert_eq!(asked.oldest(), Some((Ask::Reset, Nanos(0))));
        assert_eq!(asked.answered(slow, Command::DeviceReset.number()), Some(Ask::Reset));
    }
}
