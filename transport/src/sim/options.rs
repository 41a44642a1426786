//! What a simulated link is like: its limits, its delays, its faults, and the one rule it may be told to break.
//!
//! `SimOptions::drawn(&mut Seed::new(7))` is a link with, say, 40 operations in flight, 2 to 90 us of delay and a peer 9 times slower;
//! `SimOptions { violate: Some(Violation::MessageBeforeData), ..SimOptions::default() }` is one that a conformance test must catch.

use crate::fabric::{Limits, MAX_MESSAGE};
use crate::sim::Seed;

/// How a simulated link behaves. All times are virtual.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SimOptions {
    /// Bytes of the longest operation.
    pub max_op_len: u32,
    /// Operations that may be posted and not yet completed; at least 1.
    pub queue_depth: u32,
    /// Messages and notifications that the peer holds before it polls; at least 1. More are refused as `Full` at the sender.
    pub receive_depth: u32,
    /// Regions that each side may register.
    pub max_regions: u32,
    /// Shortest way across, in nanoseconds.
    pub latency_min_ns: u64,
    /// Longest usual way across, in nanoseconds.
    pub latency_max_ns: u64,
    /// How many ways in a thousand take `tail_ns` longer.
    pub tail_permille: u32,
    /// What the unusual ways take longer, in nanoseconds.
    pub tail_ns: u64,
    /// Pieces that the bytes of one operation may land in, each at its own time; at least 1.
    pub max_pieces: u32,
    /// Writes and reads are carried out when they are posted, as over shared memory; only messages and notifications are under way.
    pub immediate: bool,
    /// The peer's memory can be mapped; then writes and reads are carried out when they are posted, whatever `immediate` says.
    pub peer_mappable: bool,
    /// How many posts in a thousand go on the wire before `flush`.
    pub eager_permille: u32,
    /// A side (0 or 1) whose ways are all this many times slower.
    pub slow: Option<(usize, u64)>,
    /// When the link is cut, in virtual nanoseconds; `None`: only by [`super::World::cut`].
    pub cut_at_ns: Option<u64>,
    /// How long after a cut a side notices, at least and at most, in nanoseconds.
    pub detection_ns: (u64, u64),
    /// Both ends get a descriptor to sleep on, all ways across take no time, and `poll` may be given real time. For the tests of sleeping.
    pub descriptors: bool,
    /// The rule to break.
    pub violate: Option<Violation>,
}

impl Default for SimOptions {
    fn default() -> Self {
        Self {
            max_op_len: 1 << 20,
            queue_depth: 128,
            receive_depth: 256,
            max_regions: 1024,
            latency_min_ns: 1_000,
            latency_max_ns: 5_000,
            tail_permille: 10,
            tail_ns: 100_000,
            max_pieces: 4,
            immediate: false,
            peer_mappable: false,
            eager_permille: 50,
            slow: None,
            cut_at_ns: None,
            detection_ns: (1_000_000, 5_000_000),
            descriptors: false,
            violate: None,
        }
    }
}

impl SimOptions {
    /// A link whose depths, delays and fault rates are drawn; it is never cut, breaks no rule, and all it carries takes time.
    pub fn drawn(seed: &mut Seed) -> Self {
        let latency_min_ns = seed.between(0, 3_000);
        Self {
            max_op_len: 1 << seed.between(12, 21),
            queue_depth: seed.between(2, 256) as u32,
            receive_depth: seed.between(1, 256) as u32,
            latency_min_ns,
            latency_max_ns: latency_min_ns + seed.between(0, 100_000),
            tail_permille: seed.between(0, 200) as u32,
            tail_ns: seed.between(0, 1_000_000),
            max_pieces: seed.between(1, 8) as u32,
            eager_permille: if seed.chance(300) { 1000 } else { seed.between(0, 500) as u32 },
            slow: seed.chance(300).then(|| (seed.below(2) as usize, seed.between(2, 20))),
            ..Self::default()
        }
    }

    pub(super) const fn is_immediate(&self) -> bool {
        self.immediate || self.peer_mappable
    }

    /// What the ends will say of themselves.
    pub(super) const fn limits(&self) -> Limits {
        Limits {
            max_message: MAX_MESSAGE as u32,
            max_op_len: self.max_op_len,
            queue_depth: self.queue_depth,
            immediate: self.is_immediate(),
            peer_mappable: self.peer_mappable,
            revocation_ends_link: false,
        }
    }
}

/// A rule of the Fabric contract, broken on purpose. Each is the twin of a conformance case, which must fail on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A message arrives before the writes posted ahead of it.
    MessageBeforeData,
    /// A notification arrives before its own write.
    NotifyBeforeData,
    /// Two messages change places.
    ReorderMessages,
    /// A message is lost where the peer has no room, and its sender is told nothing.
    LoseMessage,
    /// The last byte of a message is lost.
    ShortenMessage,
    /// A message over the limit is cut to it and sent.
    CutLongMessage,
    /// A message is delivered twice.
    RepeatMessage,
    /// A write is reported done before its bytes are there.
    DoneBeforeData,
    /// A signalled operation is reported twice.
    RepeatDone,
    /// The report of a signalled operation is lost.
    LoseDone,
    /// Two reports change places.
    ReorderDone,
    /// A read takes its bytes before earlier writes have landed.
    ReadPassesWrite,
    /// One bit of a write is flipped.
    FlipBit,
    /// The peer writes memory that was deregistered.
    WriteAfterRevoke,
    /// Spans of released regions still work.
    UseAfterRelease,
    /// Spans of local regions that were deregistered still work.
    UseAfterDeregister,
    /// Spans are used for what they were not made for.
    IgnoreAccess,
    /// Grants are not compared with what was exported.
    TrustGrants,
    /// A region may be exported with more than its access.
    WidenExports,
    /// Operations with spans of two lengths move the shorter one's bytes and succeed.
    IgnoreMismatch,
    /// Operations longer than the limit are carried out.
    IgnoreMaxOpLen,
    /// A write or read that is carried out at once and fails looks done.
    HideFailure,
    /// Memory is taken back without waiting for mappings of it that are in use.
    ForgetMappings,
    /// The end of the link is reported twice.
    CloseTwice,
    /// The end of the link is reported before what came earlier.
    CloseFirst,
    /// The peer's goodbye is never heard.
    LoseClose,
    /// `arm` says that one may sleep although events are there.
    ArmWithEvents,
    /// An armed side is not woken.
    LoseWake,
    /// The descriptor stays readable when all is polled.
    WakeForEver,
}

impl Violation {
    /// All of them.
    pub const ALL: [Self; 29] = [
        Self::MessageBeforeData,
        Self::NotifyBeforeData,
        Self::ReorderMessages,
        Self::LoseMessage,
        Self::ShortenMessage,
        Self::CutLongMessage,
        Self::RepeatMessage,
        Self::DoneBeforeData,
        Self::RepeatDone,
        Self::LoseDone,
        Self::ReorderDone,
        Self::ReadPassesWrite,
        Self::FlipBit,
        Self::WriteAfterRevoke,
        Self::UseAfterRelease,
        Self::UseAfterDeregister,
        Self::IgnoreAccess,
        Self::TrustGrants,
        Self::WidenExports,
        Self::IgnoreMismatch,
        Self::IgnoreMaxOpLen,
        Self::HideFailure,
        Self::ForgetMappings,
        Self::CloseTwice,
        Self::CloseFirst,
        Self::LoseClose,
        Self::ArmWithEvents,
        Self::LoseWake,
        Self::WakeForEver,
    ];
}
