//! How two hosts get a queue pair each and connect them: described over the control connection, brought up in step, then used.
//!
//! Each side says "queue pair 0x11, first packet 0x3a91c2, address ::ffff:192.0.2.1, MTU 4096, 16 reads"; each brings its own up with the other's
//! numbers, says that it is ready, and waits for the same word, so that no packet comes to a pair that cannot take it.

use std::collections::VecDeque;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::chain::{MAX_INLINE, Receives};
use super::context::ProtectionDomain;
use super::device::{DeviceChoice, OpenPort};
use super::error::VerbsError;
use super::inbox::Inbox;
use super::objects::{CompletionQueue, MemoryRegion, QueuePair, no_completion, zeroed};
use super::outbox::{DEPTH, MAX_PIECE, Outbox};
use super::regions::Books;
use super::silence::Silence;
use super::sleep::Bed;
use super::sys::{
    IBV_ACCESS_LOCAL_WRITE, IBV_ACCESS_REMOTE_READ, IBV_ACCESS_REMOTE_WRITE, IBV_QP_ACCESS_FLAGS, IBV_QP_AV, IBV_QP_DEST_QPN,
    IBV_QP_MAX_DEST_RD_ATOMIC, IBV_QP_MAX_QP_RD_ATOMIC, IBV_QP_MIN_RNR_TIMER, IBV_QP_PATH_MTU, IBV_QP_PKEY_INDEX, IBV_QP_PORT,
    IBV_QP_RETRY_CNT, IBV_QP_RNR_RETRY, IBV_QP_RQ_PSN, IBV_QP_SQ_PSN, IBV_QP_STATE, IBV_QP_TIMEOUT, IBV_QPS_INIT, IBV_QPS_RTR,
    IBV_QPS_RTS, ibv_gid, ibv_qp_attr, ibv_qp_cap,
};
use super::windows;
use super::wire::{Attributes, Frame, SLOT_BYTES, SLOTS};
use super::{AT_ONCE, MAX_READY, Phase, RECEIVE, VerbsFabric};
use crate::link::control::{Control, Framed, receive_by};
use crate::memory::Memory;
use crate::time::Nanos;

/// How long the peer may take to describe its queue pair and bring it up.
pub(super) const PEER_LIMIT: Duration = Duration::from_secs(5);

/// How long an acknowledgement may take: 4.096 us times 2 to this power, so 134 ms. Longer than any switch holds a packet or a busy host pauses, and short
/// enough that all retries together end within a second.
const ACK_TIMEOUT: u8 = 15;

/// How often a packet is sent again before the link is given up. Not 7: rxe takes that as for ever.
const RETRIES: u8 = 6;

/// Wait before a message that found no receive slot is sent again: code 12 is 0.64 ms (code 0 would be 655 ms). It should never be needed,
/// because credits are counted.
const RNR_TIMER: u8 = 12;

/// How often that may happen. Not 7, which is for ever.
const RNR_RETRIES: u8 = 3;

/// Reads that we ask for or serve at once; more does not help a link of one queue pair.
const MOST_READS: u8 = 16;

/// Routers that a packet may pass.
const HOP_LIMIT: u8 = 64;

impl VerbsFabric {
    /// Makes a link with the peer at the other end of `control`, after the hellos. Both sides call this; it takes at most 5 s, and what the
    /// device takes.
    ///
    /// # Errors
    /// [`VerbsError`].
    pub fn establish(choice: &DeviceChoice, mut control: Box<dyn Control>) -> Result<Self, VerbsError> {
        let port = OpenPort::open(choice)?;
        let context = &port.context;
        let windows = windows::are_to_be_used(choice.grants, &port)?;
        let domain = ProtectionDomain::new(context)?;
        let completions = CompletionQueue::new(context, DEPTH + SLOTS)?;
        let mut pair = queue_pair(&domain, &completions)?;
        to_init(&pair, &port)?;

        // Receives are there before anybody may send.
        let slots = Memory::memfd("farbus-receive-slots", u64::from(SLOTS) * SLOT_BYTES as u64)?;
        let mut receives = Receives::new(MemoryRegion::new(&domain, &slots, IBV_ACCESS_LOCAL_WRITE)?, RECEIVE);
        pair.post_receives(&mut receives).map_err(context.refused("take receive buffers"))?;

        let ours = attributes_of(&pair, &port);
        let deadline = Instant::now() + PEER_LIMIT;
        control.send(&Frame::Attributes(ours).encode())?;
        let Frame::Attributes(theirs) = next_frame(&mut *control, deadline)? else {
            return Err(VerbsError::Attributes("something else came first"));
        };
        to_rtr(&pair, &port, &ours, &theirs)?;
        to_rts(&pair, &port, &ours, &theirs)?;
        control.send(&Frame::Ready.encode())?;
        if next_frame(&mut *control, deadline)? != Frame::Ready {
            return Err(VerbsError::Attributes("it did not say that it is ready"));
        }

        let bed = Bed::new(&[completions.fd(), context.async_fd(), control.fd()]).map_err(context.refused("wait for events"))?;
        rustix::io::ioctl_fionbio(context.async_fd(), true).map_err(|errno| context.refused("wait for events")(errno.into()))?;
        let piece = port.port.max_msg_sz.clamp(4096, MAX_PIECE);
        let now = Nanos::now();
        Ok(Self {
            inline: pair.max_inline().min(MAX_INLINE as u32),
            pair: Some(pair),
            completions,
            context: std::sync::Arc::clone(context),
            books: Books::new(domain, windows),
            outbox: Outbox::new(),
            inbox: Inbox::new(receives),
            ready: VecDeque::with_capacity(MAX_READY),
            found: vec![no_completion(); AT_ONCE].into(),
            phase: Phase::Open,
            control,
            bed,
            asleep: false,
            limits: Self::limits_for(piece),
            piece,
            silence: Silence::new(now),
            looked_at: now,
            port_down: false,
        })
    }

    /// Both ends in this process, over one device: for tests and for measuring.
    ///
    /// # Errors
    /// [`VerbsError`].
    pub fn pair(choice: &DeviceChoice) -> Result<(Self, Self), VerbsError> {
        let here = |source| VerbsError::Device { device: "of this process".to_owned(), what: "be connected to itself", source };
        let (left, right) = UnixStream::pair().map_err(here)?;
        let (left, right) = (Framed::new(left).map_err(here)?, Framed::new(right).map_err(here)?);
        let other = choice.clone();
        let right = std::thread::spawn(move || Self::establish(&other, Box::new(right)));
        let left = Self::establish(choice, Box::new(left));
        let right = right.join().map_err(|_| here(io::Error::other("its thread failed")))?;
        Ok((left?, right?))
    }
}

fn attributes_of(pair: &QueuePair, port: &OpenPort) -> Attributes {
    Attributes {
        queue_pair: pair.number(),
        first_psn: first_psn(),
        gid: port.gid,
        lid: port.port.lid,
        mtu: u8::try_from(port.port.active_mtu).unwrap_or(1),
        reads_served: u8::try_from(port.limits.max_qp_rd_atom).unwrap_or(u8::MAX).min(MOST_READS),
        slots: SLOTS,
    }
}

/// Two pairs of this process that are connected to each other, without receives.
pub(super) fn connected_pair(
    port: &OpenPort,
    domain: &std::sync::Arc<ProtectionDomain>,
    completions: &std::sync::Arc<CompletionQueue>,
) -> Result<(QueuePair, QueuePair), VerbsError> {
    let (left, right) = (queue_pair(domain, completions)?, queue_pair(domain, completions)?);
    let (of_left, of_right) = (attributes_of(&left, port), attributes_of(&right, port));
    for pair in [&left, &right] {
        to_init(pair, port)?;
    }
    for (pair, ours, theirs) in [(&left, &of_left, &of_right), (&right, &of_right, &of_left)] {
        to_rtr(pair, port, ours, theirs)?;
        to_rts(pair, port, ours, theirs)?;
    }
    Ok((left, right))
}

fn queue_pair(
    domain: &std::sync::Arc<ProtectionDomain>,
    completions: &std::sync::Arc<CompletionQueue>,
) -> Result<QueuePair, VerbsError> {
    let capacity =
        |inline| ibv_qp_cap { max_send_wr: DEPTH, max_recv_wr: SLOTS, max_send_sge: 1, max_recv_sge: 1, max_inline_data: inline };
    // A device that takes less inside a request refuses the number; every device takes a slot.
    QueuePair::new(domain, completions, capacity(MAX_INLINE as u32))
        .or_else(|_| QueuePair::new(domain, completions, capacity(SLOT_BYTES as u32)))
}

fn next_frame(control: &mut dyn Control, deadline: Instant) -> Result<Frame, VerbsError> {
    let frame = receive_by(control, deadline)?.ok_or(VerbsError::Deadline { allowed: PEER_LIMIT })?;
    Frame::parse(&frame).map_err(VerbsError::Attributes)
}

fn to_init(pair: &QueuePair, port: &OpenPort) -> Result<(), VerbsError> {
    let mut attributes = zeroed!(ibv_qp_attr);
    attributes.qp_state = IBV_QPS_INIT;
    attributes.port_num = port.number;
    attributes.qp_access_flags = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE;
    let mask = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
    pair.modify(&mut attributes, mask, "prepare a queue pair")
}

/// Ready to receive: from now on the peer's packets are taken.
fn to_rtr(pair: &QueuePair, port: &OpenPort, ours: &Attributes, theirs: &Attributes) -> Result<(), VerbsError> {
    let mut attributes = zeroed!(ibv_qp_attr);
    attributes.qp_state = IBV_QPS_RTR;
    attributes.path_mtu = u32::from(ours.mtu.min(theirs.mtu));
    attributes.dest_qp_num = theirs.queue_pair;
    attributes.rq_psn = theirs.first_psn;
    attributes.max_dest_rd_atomic = ours.reads_served;
    attributes.min_rnr_timer = RNR_TIMER;
    attributes.ah_attr.port_num = port.number;
    attributes.ah_attr.dlid = theirs.lid;
    if port.is_ethernet() || theirs.lid == 0 {
        attributes.ah_attr.is_global = 1;
        attributes.ah_attr.grh.dgid = ibv_gid { raw: theirs.gid };
        attributes.ah_attr.grh.sgid_index = u8::try_from(port.gid_index).unwrap_or(u8::MAX);
        attributes.ah_attr.grh.hop_limit = HOP_LIMIT;
    }
    let mask = IBV_QP_STATE
        | IBV_QP_AV
        | IBV_QP_PATH_MTU
        | IBV_QP_DEST_QPN
        | IBV_QP_RQ_PSN
        | IBV_QP_MAX_DEST_RD_ATOMIC
        | IBV_QP_MIN_RNR_TIMER;
    pair.modify(&mut attributes, mask, "connect a queue pair to the peer's")
}

/// Ready to send.
fn to_rts(pair: &QueuePair, port: &OpenPort, ours: &Attributes, theirs: &Attributes) -> Result<(), VerbsError> {
    let able = u8::try_from(port.limits.max_qp_init_rd_atom).unwrap_or(u8::MAX);
    let mut attributes = zeroed!(ibv_qp_attr);
    attributes.qp_state = IBV_QPS_RTS;
    attributes.sq_psn = ours.first_psn;
    attributes.timeout = ACK_TIMEOUT;
    attributes.retry_cnt = RETRIES;
    attributes.rnr_retry = RNR_RETRIES;
    attributes.max_rd_atomic = theirs.reads_served.min(able).min(MOST_READS);
    let mask = IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC;
    pair.modify(&mut attributes, mask, "start a queue pair")
}

/// Where the packets of this link start to count: by chance, so that those of an earlier link on the same numbers are not taken for ours.
fn first_psn() -> u32 {
    (by_chance() & 0x00ff_ffff) as u32
}

/// A number that no peer can guess well; not for secrets.
pub(super) fn by_chance() -> u64 {
    std::hash::RandomState::new().build_hasher().finish()
}
