//! Asynchronous events: what the driver is told without having asked for it just now (NVMe 1.4, section 5.2).
//!
//! A doorbell for a queue that does not exist completes one waiting event request with dword 0 = 0x0001_0000: error (0), invalid doorbell
//! register (0), details in log page 1. No further error event comes until the driver reads that page.

use super::Nvme;
use super::command::Status;
use super::engine::Flow;
use super::slots::Phase;
use crate::backend::Bus;

/// Event requests that may wait (AERL is one less).
pub(super) const MAX_REQUESTS: usize = 4;

/// Type, information and log page of an event, as in dword 0 (figure 146).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Event {
    kind: u8,
    information: u8,
    log_page: u8,
}

pub(super) const INVALID_DOORBELL_REGISTER: Event = Event {
    kind: 0,
    information: 0,
    log_page: 0x01,
};
pub(super) const INVALID_DOORBELL_VALUE: Event = Event {
    kind: 0,
    information: 1,
    log_page: 0x01,
};
pub(super) const TEMPERATURE: Event = Event {
    kind: 1,
    information: 1,
    log_page: 0x02,
};

/// Requests that wait and events that nobody asked for yet.
#[derive(Debug, Default)]
pub(super) struct Events {
    requests: [Option<u32>; MAX_REQUESTS],
    /// One bit an event in `KNOWN`.
    pending: u8,
    /// One bit a type: reported, and its log page not read since.
    masked: u8,
}

const KNOWN: [Event; 3] = [INVALID_DOORBELL_REGISTER, INVALID_DOORBELL_VALUE, TEMPERATURE];

impl Nvme {
    /// An asynchronous event request: waits in its slot.
    pub(super) fn request_event(&mut self, index: u32, bus: &mut dyn Bus) -> Flow {
        let Some(slot) = self.slots.get_mut(index) else {
            return Flow::Parked;
        };
        let Some(room) = self.events.requests.iter_mut().find(|request| request.is_none()) else {
            return slot.refuse(Status::EVENT_LIMIT_EXCEEDED);
        };
        *room = Some(index);
        slot.phase = Phase::Event;
        self.deliver_events(bus);
        Flow::Parked
    }

    /// Ends the request in slot `index`, if it is one.
    pub(super) fn withdraw_event_request(&mut self, index: u32) {
        for request in self.events.requests.iter_mut().filter(|request| **request == Some(index)) {
            *request = None;
        }
    }

    pub(super) fn raise_event(&mut self, event: Event, bus: &mut dyn Bus) {
        for (bit, known) in KNOWN.iter().enumerate() {
            if *known == event {
                self.events.pending |= 1 << bit;
            }
        }
        self.deliver_events(bus);
    }

    /// The driver read a log page without asking to retain its events (section 5.2).
    pub(super) fn log_page_was_read(&mut self, log_page: u8, bus: &mut dyn Bus) {
        for event in KNOWN.iter().filter(|event| event.log_page == log_page) {
            self.events.masked &= !(1 << event.kind);
        }
        self.deliver_events(bus);
    }

    fn deliver_events(&mut self, bus: &mut dyn Bus) {
        for (bit, event) in KNOWN.iter().enumerate() {
            let due = self.events.pending & 1 << bit != 0 && self.events.masked & 1 << event.kind == 0;
            if !due {
                continue;
            }
            let Some(index) = self.events.requests.iter_mut().find_map(Option::take) else {
                return;
            };
            self.events.pending &= !(1 << bit);
            self.events.masked |= 1 << event.kind;
            if let Some(slot) = self.slots.get_mut(index) {
                slot.result = u32::from(event.kind) | u32::from(event.information) << 8 | u32::from(event.log_page) << 16;
            }
            self.complete(index, bus);
        }
    }
}
