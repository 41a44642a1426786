//! What is saved of an NVMe controller, and how far each queue is: determined while the device is at rest, from the entries that it wrote.
//!
//! Queue 1 has 64 entries, the driver has taken up to 9 and 3 more with the right phase lie behind: the device is at 12, and the newest entry says that it has
//! consumed the submission queue up to 21, of which the driver's tail is 25: four commands wait in guest memory.
//!
//! The bytes (section 6 of the function's state, profile 1): version (2), the registers 0x00 to 0x37 as written (56), INTMS (4), the 12 bytes of CAP and VS
//! and which are known (24), enabled (1), then, where enabled: why the queues are not known (text, empty where they are), the submission queues (count 2; each
//! number 2, base 8, entries 4, completion queue 2, head 4, tail 4), the completion queues (count 2; each number 2, base 8, entries 4, vector 2 or 65,535,
//! head 4, its phase 1, tail 4, its phase 1, whether the driver has been round 1, commands
//! outstanding 4 or 4,294,967,295), features (count 2; 64 each), and the requests for events that wait (count 2; 64 each).

use std::collections::BTreeMap;

use super::queues::{Completions, Entry, NOT_SEEN, Queues, SUBMISSION_BYTES, feature_key, opcode};
use super::{Fixed, Nvme};
use crate::profile::Peek;
use crate::state::StateError;
use crate::state::codec::{Input, Output};

const VERSION: u16 = 1;
const NO_VECTOR: u16 = u16::MAX;
const NOT_COUNTED: u32 = u32::MAX;
/// Entries of the longest queue (NVM Express 1.4, section 3.1.1: MQES is 16 bits, zero-based).
const MOST_ENTRIES: u32 = 1 << 16;

type Command = [u8; SUBMISSION_BYTES as usize];

/// A submission queue at rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SavedSubmission {
    pub(super) id: u16,
    pub(super) base: u64,
    pub(super) entries: u32,
    pub(super) completions: u16,
    /// Where the device is.
    pub(super) head: u32,
    /// Where the driver is.
    pub(super) tail: u32,
}

/// A completion queue at rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SavedCompletions {
    pub(super) id: u16,
    pub(super) base: u64,
    pub(super) entries: u32,
    pub(super) vector: Option<u16>,
    /// Where the driver is, and the phase that it waits for.
    pub(super) head: u32,
    pub(super) head_phase: bool,
    /// Where the device is, and the phase of its next entry.
    pub(super) tail: u32,
    pub(super) tail_phase: bool,
    /// Whether the driver has been round once.
    pub(super) round: bool,
    /// Commands whose completions the driver has not taken; `None` where nobody has counted.
    pub(super) outstanding: Option<u32>,
}

impl SavedCompletions {
    /// As its driver left it, with the device at `end`.
    pub(super) const fn of(id: u16, queue: &Completions, end: Posted) -> Self {
        Self {
            id,
            base: queue.base,
            entries: queue.entries,
            vector: queue.vector,
            head: queue.head,
            head_phase: queue.phase,
            tail: end.tail,
            tail_phase: end.phase,
            round: queue.round,
            outstanding: queue.outstanding,
        }
    }

    /// Entries that the driver has not taken.
    pub(super) const fn unread(&self) -> u32 {
        if self.tail >= self.head { self.tail - self.head } else { self.tail + self.entries - self.head }
    }
}

/// The queues of an enabled controller at rest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct SavedQueues {
    /// Why this is not all; empty where it is.
    pub(super) unknown: String,
    pub(super) submissions: Vec<SavedSubmission>,
    pub(super) completions: Vec<SavedCompletions>,
    pub(super) features: Vec<Command>,
    pub(super) events: Vec<Command>,
}

impl SavedQueues {
    /// From what is known, and from the entries in guest memory.
    pub(super) fn of(known: &Queues, guest: &dyn Peek) -> Self {
        let mut known = known.clone();
        let mut saved = Self::default();
        let mut heads = BTreeMap::new();
        let mut seen_all = BTreeMap::new();
        if let Err(why) = find(&mut known, guest, &mut saved, &mut heads, &mut seen_all) {
            known.unknown.get_or_insert(why);
        }
        if let Some(why) = known.unknown {
            return Self { unknown: why.to_owned(), ..Self::default() };
        }
        saved.features = known.features.values().copied().collect();
        saved
    }

    fn encode(&self, out: &mut Output) {
        out.text(&self.unknown);
        out.u16(self.submissions.len() as u16);
        for queue in &self.submissions {
            out.u16(queue.id);
            out.u64(queue.base);
            out.u32(queue.entries);
            out.u16(queue.completions);
            out.u32(queue.head);
            out.u32(queue.tail);
        }
        out.u16(self.completions.len() as u16);
        for queue in &self.completions {
            out.u16(queue.id);
            out.u64(queue.base);
            out.u32(queue.entries);
            out.u16(queue.vector.unwrap_or(NO_VECTOR));
            out.u32(queue.head);
            out.u8(u8::from(queue.head_phase));
            out.u32(queue.tail);
            out.u8(u8::from(queue.tail_phase));
            out.u8(u8::from(queue.round));
            out.u32(queue.outstanding.unwrap_or(NOT_COUNTED));
        }
        for commands in [&self.features, &self.events] {
            out.u16(commands.len() as u16);
            commands.iter().for_each(|command| out.bytes(command));
        }
    }

    fn parse(input: &mut Input<'_>) -> Result<Self, StateError> {
        let unknown = input.text()?;
        let within = |entries: u32, places: [u32; 2]| {
            let fits = (1..=MOST_ENTRIES).contains(&entries) && places.iter().all(|place| *place < entries);
            if fits { Ok(()) } else { Err(StateError::Malformed("a queue that one side has left")) }
        };
        let count = usize::from(input.u16()?);
        let submissions = input.list(count, |input| {
            let (id, base, entries, completions) = (input.u16()?, input.u64()?, input.u32()?, input.u16()?);
            let (head, tail) = (input.u32()?, input.u32()?);
            within(entries, [head, tail])?;
            Ok(SavedSubmission { id, base, entries, completions, head, tail })
        })?;
        let count = usize::from(input.u16()?);
        let completions = input.list(count, |input| {
            let (id, base, entries, vector) = (input.u16()?, input.u64()?, input.u32()?, input.u16()?);
            let (head, head_phase, tail, tail_phase) = (input.u32()?, input.bool()?, input.u32()?, input.bool()?);
            let (round, outstanding) = (input.bool()?, input.u32()?);
            within(entries, [head, tail])?;
            let vector = (vector != NO_VECTOR).then_some(vector);
            Ok(SavedCompletions {
                id,
                base,
                entries,
                vector,
                head,
                head_phase,
                tail,
                tail_phase,
                round,
                outstanding: (outstanding != NOT_COUNTED).then_some(outstanding),
            })
        })?;
        let mut commands = || {
            let count = usize::from(input.u16()?);
            input.list(count, Input::array)
        };
        let (features, events) = (commands()?, commands()?);
        Ok(Self { unknown, submissions, completions, features, events })
    }
}

/// The end of what a controller has posted to a completion queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Posted {
    /// Its next entry, and the phase of that.
    pub(super) tail: u32,
    pub(super) phase: bool,
    /// Whether every entry was written.
    pub(super) round: bool,
}

/// Looks at what lies in a completion queue and was not taken, in order.
pub(super) fn posted(queue: &Completions, guest: &dyn Peek, mut each: impl FnMut(Entry)) -> Result<Posted, &'static str> {
    let (mut tail, mut phase, mut round) = (queue.head, queue.phase, queue.round);
    let mut unread = 0;
    while let Some(entry) = Some(Entry::read(queue.base, tail, guest).ok_or(NOT_SEEN)?).filter(|entry| entry.phase == phase) {
        unread += 1;
        if unread >= queue.entries {
            return Err("a completion queue holds more than it can");
        }
        each(entry);
        tail += 1;
        if tail == queue.entries {
            (tail, phase, round) = (0, !phase, true);
        }
    }
    Ok(Posted { tail, phase, round })
}

/// How far everybody is.
fn find(
    known: &mut Queues,
    guest: &dyn Peek,
    saved: &mut SavedQueues,
    heads: &mut BTreeMap<u16, u32>,
    seen_all: &mut BTreeMap<u16, bool>,
) -> Result<(), &'static str> {
    for (id, queue) in known.learn(guest)? {
        let end = posted(&queue, guest, |_| {})?;
        let Posted { tail, round, .. } = end;
        // The newest entry of each submission queue says how far that was consumed when its last command was completed.
        let written = if round { queue.entries } else { tail };
        for back in 1..=written {
            let index = (tail + queue.entries - back) % queue.entries;
            let entry = Entry::read(queue.base, index, guest).ok_or(NOT_SEEN)?;
            heads.entry(entry.queue).or_insert(u32::from(entry.queue_head));
        }
        seen_all.insert(id, !round);
        saved.completions.push(SavedCompletions::of(id, &queue, end));
    }
    for (id, queue) in known.submissions() {
        let head = match heads.get(&id) {
            _ if id == 0 => admin_head(known, queue.tail),
            Some(head) => *head,
            None if seen_all.get(&queue.completions) == Some(&true) => 0,
            None => return Err("how far a submission queue was consumed can no longer be seen"),
        };
        if head >= queue.entries {
            return Err("a completion names a place that its submission queue does not have");
        }
        let (base, entries, completions, tail) = (queue.base, queue.entries, queue.completions, queue.tail);
        saved.submissions.push(SavedSubmission { id, base, entries, completions, head, tail });
    }
    for queue in saved.completions.iter().filter(|queue| queue.unread() == queue.entries - 1) {
        // Full: what was begun waits for room, unless all that has no completion was not begun either.
        let not_begun = |queue: &SavedSubmission| (queue.tail + queue.entries - queue.head) % queue.entries;
        let own = saved.submissions.iter().filter(|submission| submission.completions == queue.id);
        let not_begun: u32 = own.map(not_begun).sum();
        let silent = if queue.id == 0 {
            known.pending.iter().filter(|pending| pending.opcode() == opcode::EVENT_REQUEST).count() as u32
        } else {
            0
        };
        let waits = queue.outstanding.and_then(|outstanding| outstanding.checked_sub(queue.unread() + not_begun + silent));
        if waits != Some(0) {
            return Err("a completion queue is full, and commands wait for room in it");
        }
    }
    saved.events =
        known.pending.iter().take_while(|pending| pending.opcode() == opcode::EVENT_REQUEST).map(|it| it.entry).collect();
    Ok(())
}

/// Requests for events wait without a completion; the first other command that has none was not begun, because everything that was has ended.
fn admin_head(known: &Queues, tail: u32) -> u32 {
    let not_begun = known.pending.iter().find(|pending| pending.opcode() != opcode::EVENT_REQUEST);
    not_begun.map_or(tail, |pending| pending.slot)
}

impl Nvme {
    pub(super) fn encode(&self, guest: &dyn Peek) -> Vec<u8> {
        let mut out = Output::default();
        out.u16(VERSION);
        out.bytes(&self.written);
        out.u32(self.masked);
        out.bytes(&self.fixed.bytes);
        self.fixed.known.iter().for_each(|known| out.u8(u8::from(*known)));
        out.u8(u8::from(self.admin.is_some()));
        if self.admin.is_some() {
            // Where a loaded state has not gone on yet, it is still as loaded.
            self.loaded.clone().unwrap_or_else(|| SavedQueues::of(&self.queues, guest)).encode(&mut out);
        }
        out.0
    }

    pub(super) fn decode(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        let mut input = Input(bytes);
        let version = input.u16()?;
        if version != VERSION {
            return Err(StateError::Malformed("an nvme profile of another version"));
        }
        let written = input.array()?;
        let masked = input.u32()?;
        let mut fixed = Fixed { bytes: input.array()?, ..Fixed::default() };
        for known in &mut fixed.known {
            *known = input.bool()?;
        }
        let enabled = input.bool()?;
        let saved = if enabled { Some(SavedQueues::parse(&mut input)?) } else { None };
        input.end()?;
        (self.written, self.masked, self.fixed) = (written, masked, fixed);
        self.admin = enabled.then(|| self.enabled_with());
        if let (Some(admin), Some(saved)) = (&self.admin, &saved) {
            self.queues = Queues::restored(admin, self.last_queue, saved);
        }
        self.loaded = saved;
        Ok(())
    }
}

impl Queues {
    /// As they were before they were saved, but for what the driver had not taken, which is found again.
    fn restored(admin: &super::AdminQueues, last: u16, saved: &SavedQueues) -> Self {
        let mut queues = Self::new(admin, last);
        if !saved.unknown.is_empty() {
            queues.unknown = Some("it was not known when the function was saved");
        }
        for queue in &saved.completions {
            queues.restore_completions(queue);
        }
        for queue in &saved.submissions {
            queues.restore_submission(queue);
        }
        for feature in &saved.features {
            queues.features.insert(feature_key(feature), *feature);
        }
        queues.pending.extend(saved.events.iter().map(|entry| super::queues::Pending { slot: 0, entry: *entry }));
        queues
    }
}
