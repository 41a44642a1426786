//! Accesses to guest memory that the function's owner makes for the device, and the interrupts that wait behind them.
//!
//! The device stores a completion where there is no descriptor, then raises vector 3: the owner takes the store as a [`MediationRequest`],
//! makes it, answers its ticket; only then does the guest hear of vector 3. Otherwise it would look before the bytes are there.

use std::collections::VecDeque;

use farbus_remote_dma::{Iova, Mediation, MediationAnswer, Ticket};

/// The most mediations that wait for the owner; more are answered with a fault, so that a peer cannot fill our memory.
pub const MAX_MEDIATIONS: usize = farbus_remote_dma::lender::MAX_MEDIATIONS;

/// The longest mediation in bytes, which also lies inside one page of this size.
const PAGE_BYTES: u64 = 4096;

/// One access to guest memory for the owner to make and to answer by [`crate::Function::answer`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MediationRequest {
    /// Names it in the answer.
    pub ticket: Ticket,
    /// First address.
    pub iova: Iova,
    /// What to do.
    pub kind: MediationKind,
}

/// What a mediation does. Stores must take effect in the order they were handed out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MediationKind {
    /// Read guest memory and answer [`MediationAnswer::Fetched`].
    Fetch {
        /// Bytes, 1 to 4,096.
        len: u32,
    },
    /// Write guest memory and answer [`MediationAnswer::Stored`].
    Store {
        /// What to write, 1 to 4,096 bytes.
        bytes: Vec<u8>,
        /// The guest may be polling the last 32-bit word: it must become visible last.
        polled: bool,
    },
}

impl MediationKind {
    fn len(&self) -> u64 {
        match self {
            Self::Fetch { len } => u64::from(*len),
            Self::Store { bytes, .. } => bytes.len() as u64,
        }
    }
}

/// What the device signalled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    Vector(u16),
    Pin(bool),
}

impl Signal {
    /// Whether the later of two makes the earlier one needless once a third comes.
    fn same_source(self, other: Self) -> bool {
        match (self, other) {
            (Self::Vector(a), Self::Vector(b)) => a == b,
            (Self::Pin(_), Self::Pin(_)) => true,
            _ => false,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    Fetched(u32),
    Stored,
}

#[derive(Debug)]
struct Open {
    sequence: u64,
    ticket: Ticket,
    expected: Expected,
}

#[derive(Debug)]
struct Deferred {
    /// Every open store up to this sequence number goes first.
    after: u64,
    signal: Signal,
}

/// What is asked of the owner and not answered yet.
#[derive(Debug, Default)]
pub(crate) struct Mediations {
    sequence: u64,
    /// Not handed out yet.
    queue: VecDeque<(u64, MediationRequest)>,
    /// Not answered yet, handed out or not, in order.
    open: VecDeque<Open>,
    deferred: VecDeque<Deferred>,
    refused: VecDeque<Ticket>,
}

impl Mediations {
    /// The attachment asks. What is malformed or too much is refused: see [`Mediations::take_refused`].
    pub(crate) fn ask(&mut self, ticket: Ticket, mediation: Mediation<'_>) {
        let (iova, kind, expected) = match mediation {
            Mediation::Fetch { iova, len } => (iova, MediationKind::Fetch { len }, Expected::Fetched(len)),
            Mediation::Store { iova, bytes, polled } if bytes.len() as u64 <= PAGE_BYTES => {
                let bytes = bytes.to_vec();
                (iova, MediationKind::Store { bytes, polled }, Expected::Stored)
            }
            Mediation::Store { .. } => return self.refuse(ticket),
        };
        let in_one_page = kind.len() > 0 && iova.0 % PAGE_BYTES + kind.len() <= PAGE_BYTES;
        if !in_one_page || self.open.len() >= MAX_MEDIATIONS {
            return self.refuse(ticket);
        }
        self.sequence += 1;
        let sequence = self.sequence;
        self.queue.push_back((sequence, MediationRequest { ticket, iova, kind }));
        self.open.push_back(Open { sequence, ticket, expected });
    }

    /// The next for the owner.
    pub(crate) fn take(&mut self) -> Option<MediationRequest> {
        self.queue.pop_front().map(|(_, request)| request)
    }

    /// Whether nothing is asked that is not answered, and no signal waits.
    pub(crate) fn is_quiet(&self) -> bool {
        self.open.is_empty() && self.deferred.is_empty() && self.refused.is_empty()
    }

    /// Whether the owner has something to take.
    pub(crate) fn waiting(&self) -> bool {
        !self.queue.is_empty()
    }

    /// The owner answers: what to pass on. `None` where nothing was handed out under this ticket.
    pub(crate) fn close<'a>(&mut self, ticket: Ticket, answer: MediationAnswer<'a>) -> Option<MediationAnswer<'a>> {
        let first_queued = self.queue.front().map_or(u64::MAX, |(sequence, _)| *sequence);
        let handed_out = |open: &Open| open.ticket == ticket && open.sequence < first_queued;
        let index = self.open.iter().position(handed_out)?;
        let open = self.open.remove(index)?;
        Some(match (open.expected, answer) {
            (Expected::Fetched(len), MediationAnswer::Fetched(bytes)) if bytes.len() as u64 == u64::from(len) => answer,
            (Expected::Stored, MediationAnswer::Stored) => answer,
            (_, MediationAnswer::Fault) => answer,
            (expected, _) => {
                tracing::error!(?ticket, ?expected, "a mediation was answered with something else: taken as a fault");
                MediationAnswer::Fault
            }
        })
    }

    /// Takes back what touches the range and was not handed out: those are refused.
    pub(crate) fn withdraw(&mut self, iova: Iova, len: u64) {
        let last = iova.0.saturating_add(len.saturating_sub(1));
        self.withdraw_where(|request| {
            let request_last = request.iova.0.saturating_add(request.kind.len() - 1);
            len > 0 && request.iova.0 <= last && iova.0 <= request_last
        });
    }

    /// Takes back all that was not handed out, and forgets the signals that wait: the device is being reset.
    pub(crate) fn fence(&mut self) {
        self.withdraw_where(|_| true);
        self.deferred.clear();
    }

    /// Whoever asked is gone: nothing is asked any more, and an answer that is still to come is to nobody.
    pub(crate) fn forget(&mut self) {
        self.queue.clear();
        self.open.clear();
        self.deferred.clear();
        self.refused.clear();
    }

    /// Refuses a mediation: it touches nothing, and the attachment is told of a fault.
    pub(crate) fn refuse(&mut self, ticket: Ticket) {
        self.refused.push_back(ticket);
    }

    /// How many were refused and not taken.
    pub(crate) fn refused(&self) -> usize {
        self.refused.len()
    }

    /// A ticket to answer with a fault.
    pub(crate) fn take_refused(&mut self) -> Option<Ticket> {
        self.refused.pop_front()
    }

    /// The device signals. `false` where stores go first: the signal is kept for [`Mediations::release`].
    pub(crate) fn pass(&mut self, signal: Signal) -> bool {
        let Some(after) = self.last_store() else { return true };
        let mut same = self.deferred.iter().enumerate().filter(|(_, deferred)| deferred.signal.same_source(signal));
        // Two of one source are enough: the first must not starve behind later stores, the last must not come before them.
        let second = same.nth(1).map(|(index, _)| index);
        if let Some(index) = second {
            self.deferred.remove(index);
        }
        self.deferred.push_back(Deferred { after, signal });
        false
    }

    /// The next signal whose stores are all answered.
    pub(crate) fn release(&mut self) -> Option<Signal> {
        let after = self.deferred.front()?.after;
        let mut stores = self.open.iter().filter(|open| open.expected == Expected::Stored);
        if stores.next().is_some_and(|store| store.sequence <= after) {
            return None;
        }
        self.deferred.pop_front().map(|deferred| deferred.signal)
    }

    fn last_store(&self) -> Option<u64> {
        let mut stores = self.open.iter().rev().filter(|open| open.expected == Expected::Stored);
        stores.next().map(|open| open.sequence)
    }

    fn withdraw_where(&mut self, mut touches: impl FnMut(&MediationRequest) -> bool) {
        let (mut withdrawn, refused) = (VecDeque::new(), &mut self.refused);
        self.queue.retain(|(sequence, request)| {
            let stays = !touches(request);
            if !stays {
                withdrawn.push_back(*sequence);
                refused.push_back(request.ticket);
            }
            stays
        });
        // Both are in order of their numbers.
        self.open.retain(|entry| {
            let stays = withdrawn.front() != Some(&entry.sequence);
            if !stays {
                withdrawn.pop_front();
            }
            stays
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(at: u64) -> Mediation<'static> {
        Mediation::Store { iova: Iova(at), bytes: &[1, 2, 3, 4], polled: true }
    }

    #[test]
    fn an_interrupt_never_overtakes_the_data_that_it_announces() {
        let mut mediations = Mediations::default();
        assert!(mediations.pass(Signal::Vector(1)));
        mediations.ask(Ticket(1), store(0x1000));
        mediations.ask(Ticket(2), store(0x2000));
        assert!(!mediations.pass(Signal::Vector(3)));
        mediations.ask(Ticket(3), store(0x3000));
        assert!(!mediations.pass(Signal::Vector(4)));
        while mediations.take().is_some() {}
        // Answered out of order: 3 waits for 1 and 2, and 4 for 3 as well.
        assert_eq!(mediations.close(Ticket(2), MediationAnswer::Stored), Some(MediationAnswer::Stored));
        assert_eq!(mediations.release(), None);
        mediations.close(Ticket(1), MediationAnswer::Stored);
        assert_eq!(mediations.release(), Some(Signal::Vector(3)));
        assert_eq!(mediations.release(), None);
        mediations.close(Ticket(3), MediationAnswer::Fault);
        assert_eq!(mediations.release(), Some(Signal::Vector(4)));
        assert_eq!(mediations.release(), None);
    }

    #[test]
    fn a_flood_of_signals_behind_one_slow_store_is_bounded_and_the_first_does_not_starve() {
        let mut mediations = Mediations::default();
        mediations.ask(Ticket(0), store(0));
        for ticket in 1..2000 {
            assert!(!mediations.pass(Signal::Vector(7)));
            assert!(!mediations.pass(Signal::Pin(ticket % 2 == 0)));
            mediations.ask(Ticket(ticket), store(0));
        }
        assert!(mediations.deferred.len() <= 4);
        mediations.take();
        mediations.close(Ticket(0), MediationAnswer::Stored);
        assert_eq!(mediations.release(), Some(Signal::Vector(7)));
        assert_eq!(mediations.release(), Some(Signal::Pin(false)));
        assert_eq!(mediations.release(), None);
        while mediations.take().is_some() {}
        for ticket in 1..2000 {
            mediations.close(Ticket(ticket), MediationAnswer::Stored);
        }
        assert_eq!(mediations.release(), Some(Signal::Vector(7)));
        assert_eq!(mediations.release(), Some(Signal::Pin(false)), "the last level wins");
    }

    #[test]
    fn a_peer_cannot_fill_the_borrowers_memory_or_leave_a_page() {
        let mut mediations = Mediations::default();
        for ticket in 0..MAX_MEDIATIONS as u32 + 10 {
            mediations.ask(Ticket(ticket), store(0));
        }
        assert_eq!((mediations.queue.len(), mediations.refused()), (MAX_MEDIATIONS, 10));
        let mut mediations = Mediations::default();
        let fetch = |iova, len| Mediation::Fetch { iova: Iova(iova), len };
        for bad in [fetch(0, 0), fetch(0, 4097), fetch(1, 4096), fetch(u64::MAX, 2), fetch(0, u32::MAX)] {
            mediations.ask(Ticket(9), bad);
            assert_eq!(mediations.take_refused(), Some(Ticket(9)));
        }
        mediations.ask(Ticket(1), fetch(u64::MAX, 1));
        assert_eq!(mediations.refused(), 0);
    }

    #[test]
    fn what_is_unmapped_before_the_owner_took_it_is_never_touched() {
        let mut mediations = Mediations::default();
        for (ticket, at) in [(1, 0xffc), (2, 0x1000), (3, 0x1ffc), (4, 0x2000)] {
            mediations.ask(Ticket(ticket), store(at));
        }
        mediations.withdraw(Iova(0x1000), 0x1000);
        assert_eq!((mediations.take_refused(), mediations.take_refused()), (Some(Ticket(2)), Some(Ticket(3))));
        let left: Vec<u32> = std::iter::from_fn(|| mediations.take()).map(|request| request.ticket.0).collect();
        assert_eq!(left, [1, 4]);
        assert_eq!(mediations.close(Ticket(2), MediationAnswer::Stored), None);
    }

    #[test]
    fn an_answer_of_the_wrong_length_or_kind_is_a_fault_and_not_data() {
        let mut mediations = Mediations::default();
        for answer in [MediationAnswer::Fetched(&[0; 7]), MediationAnswer::Stored] {
            mediations.ask(Ticket(1), Mediation::Fetch { iova: Iova(0), len: 8 });
            assert_eq!(mediations.close(Ticket(1), answer), None, "answered before it was handed out");
            mediations.take();
            assert_eq!(mediations.close(Ticket(1), answer), Some(MediationAnswer::Fault));
            assert_eq!(mediations.close(Ticket(1), answer), None, "answered twice");
        }
    }
}
