//! A queue pair of the ibverbs crate that speaks to the verbs fabric as another implementation would.
//!
//! `with_peer(socket, |peer| peer.send(b"hello"))` connects over `socket` with the fabric at its other end. The crate fixes the first packet number that it
//! sends to 0 and knows only SEND and receive: so its attributes say 0, and one-sided operations come from the fabric alone.

pub mod wire;

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ibverbs::{
    CompletionQueue, Gid, MemoryRegion, ProtectionDomain, QueuePair, QueuePairEndpoint, ibv_qp_type, ibv_wc, ibv_wc_opcode,
};

use self::wire::{Attributes, READY, SLOT, SLOTS, frame, parse, send_frame, slot};

/// Longer than anything takes in the emulated lab on a busy host.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Messages of this side that may be on their way.
const SENDS: usize = 64;

/// Marks the name of a receive.
const RECEIVE: u64 = 1 << 63;

/// What the fabric sent.
#[derive(Debug, PartialEq, Eq)]
pub enum Got {
    Message(Vec<u8>),
    Credits,
    Goodbye,
    Revoke(u64),
    /// A write with this immediate.
    Notify(u32),
}

pub struct Peer<'a> {
    // The queue pair goes before what it uses.
    pair: QueuePair<'a>,
    completions: &'a CompletionQueue<'a>,
    domain: &'a ProtectionDomain<'a>,
    receives: MemoryRegion<u8>,
    sends: MemoryRegion<u8>,
    pub socket: UnixStream,
    /// Slots of ours that were taken and posted again.
    taken: u32,
    /// Of those, what the fabric was told.
    told: u32,
    /// Taken, and kept back while `stingy`.
    kept: Vec<u64>,
    pub stingy: bool,
    /// Slots of the fabric's that were sent into, and those that it has taken.
    sent: u32,
    returned: u32,
    done: u64,
    unread: VecDeque<Got>,
}

/// The device that the tests run on.
pub fn device() -> String {
    std::env::var("FARBUS_RDMA_DEV").expect("FARBUS_RDMA_DEV names the RDMA device: ci/softroce sets it")
}

/// Connects over `socket` and plays.
pub fn with_peer<T>(mut socket: UnixStream, play: impl FnOnce(&mut Peer<'_>) -> T) -> T {
    socket.set_read_timeout(Some(PATIENCE)).expect("a time limit");
    let list = ibverbs::devices().expect("devices");
    let wanted = device();
    let found = list.iter().find(|device| device.name().is_some_and(|name| name.to_bytes() == wanted.as_bytes()));
    let context = found.unwrap_or_else(|| panic!("there is no device {wanted}")).open().expect("an open device");
    let link_local = 0xfe80_0000_0000_0000;
    let roce_v2 = 2;
    let gid = context.gid_table().iter().find(|gid| gid.gid_type == roce_v2 && gid.gid.subnet_prefix() != link_local);
    let gid = gid.expect("an address for RoCE v2").clone();

    let theirs = Attributes::of(&frame(&mut socket).expect("the fabric's attributes"));
    let completions = context.create_cq(2 * SLOTS as i32, 0).expect("a completion queue");
    let domain = context.alloc_pd().expect("a protection domain");
    let prepared = domain
        .create_qp(&completions, &completions, ibv_qp_type::IBV_QPT_RC)
        .set_gid_index(gid.gid_index)
        .allow_remote_rw()
        .set_max_send_wr(SENDS as u32)
        .set_max_recv_wr(SLOTS)
        .set_path_mtu(u32::from(theirs.mtu))
        .set_rq_psn(theirs.first_psn)
        .set_timeout(14)
        .set_min_rnr_timer(12)
        .set_max_dest_rd_atomic(16)
        .build()
        .expect("a queue pair");
    let endpoint = prepared.endpoint();
    let ours = Attributes {
        queue_pair: endpoint.num,
        first_psn: 0,
        gid: raw(endpoint.gid.expect("its address")),
        lid: endpoint.lid,
        mtu: theirs.mtu,
        reads_served: 16,
        slots: SLOTS,
    };
    send_frame(&mut socket, &ours.bytes()).expect("to say our attributes");
    let mut gid = Gid::default();
    gid.as_mut().raw = theirs.gid;
    let pair =
        prepared.handshake(QueuePairEndpoint { num: theirs.queue_pair, lid: theirs.lid, gid: Some(gid) }).expect("a connection");
    let mut peer = Peer {
        pair,
        completions: &completions,
        domain: &domain,
        receives: domain.allocate(SLOTS as usize * SLOT).expect("receive slots"),
        // A slot more for what is too long on purpose.
        sends: domain.allocate((SENDS + 1) * SLOT).expect("slots to send from"),
        socket,
        taken: 0,
        told: 0,
        kept: Vec::new(),
        stingy: false,
        sent: 0,
        returned: 0,
        done: 0,
        unread: VecDeque::new(),
    };
    for slot in 0..u64::from(SLOTS) {
        peer.post_receive(slot);
    }
    send_frame(&mut peer.socket, &READY).expect("to say that we are ready");
    assert_eq!(frame(&mut peer.socket).expect("the fabric's word"), READY);
    play(&mut peer)
}

fn raw(gid: Gid) -> [u8; 16] {
    ((u128::from(gid.subnet_prefix()) << 64) | u128::from(gid.interface_id())).to_be_bytes()
}

impl Peer<'_> {
    fn post_receive(&mut self, slot: u64) {
        let from = slot as usize * SLOT;
        // SAFETY: the region lives as long as the queue pair, and the slot is read only between its completion and the next call of this.
        unsafe { self.pair.post_receive(&mut self.receives, from..from + SLOT, RECEIVE | slot) }.expect("to post a receive");
    }

    /// Sends `bytes` as they are; false where the fabric has no slot for it or all of ours are on their way.
    pub fn send_raw(&mut self, bytes: &[u8]) -> bool {
        if self.sent.wrapping_sub(self.returned) >= SLOTS || u64::from(self.sent) - self.done >= SENDS as u64 {
            return false;
        }
        let from = self.sent as usize % SENDS * SLOT;
        self.sends[from..from + bytes.len()].copy_from_slice(bytes);
        // SAFETY: the region lives as long as the queue pair, and the slot is filled again only when SENDS later ones were completed.
        unsafe { self.pair.post_send(&mut self.sends, from..from + bytes.len(), u64::from(self.sent)) }.expect("to post a send");
        self.sent += 1;
        true
    }

    fn say(&mut self, kind: u8, body: &[u8]) -> bool {
        let sent = self.send_raw(&slot(kind, body, self.taken));
        if sent {
            self.told = self.taken;
        }
        sent
    }

    /// Sends a message, if the fabric has a slot for it.
    pub fn send(&mut self, message: &[u8]) -> bool {
        self.say(1, message)
    }

    pub fn goodbye(&mut self) -> bool {
        self.say(3, &[])
    }

    pub fn revoke(&mut self, number: u64) -> bool {
        self.say(4, &number.to_le_bytes())
    }

    /// How many slots the fabric says it has taken.
    pub fn returned(&self) -> u32 {
        self.returned
    }

    /// Takes what has come; each slot is posted again at once, or kept while `stingy`.
    pub fn take(&mut self) -> Vec<Got> {
        let mut room = [ibv_wc::default(); 32];
        let found = self.completions.poll(&mut room).expect("to poll");
        let mut got = Vec::new();
        for completion in found {
            assert_eq!(completion.error(), None, "request {:#x} of the ibverbs crate's queue pair failed", completion.wr_id());
            if completion.wr_id() & RECEIVE == 0 {
                self.done += 1;
                continue;
            }
            let slot = completion.wr_id() & !RECEIVE;
            got.push(if completion.opcode() == ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM {
                Got::Notify(u32::from_be(completion.imm_data().expect("an immediate")))
            } else {
                let from = slot as usize * SLOT;
                let (kind, body, taken) = parse(&self.receives[from..from + completion.len()]);
                assert!(taken >= self.returned && taken <= self.sent, "the fabric says it took {taken} of {}", self.sent);
                self.returned = taken;
                match (kind, body) {
                    (1, message) => Got::Message(message.to_vec()),
                    (2, []) => Got::Credits,
                    (3, []) => Got::Goodbye,
                    (4, number) => Got::Revoke(u64::from_le_bytes(number.try_into().expect("the number of a grant"))),
                    other => panic!("a slot of kind and body {other:?}"),
                }
            });
            self.kept.push(slot);
        }
        if !self.stingy {
            for slot in std::mem::take(&mut self.kept) {
                self.post_receive(slot);
                self.taken += 1;
            }
            if self.taken.wrapping_sub(self.told) >= SLOTS / 4 {
                // Where there is no room for it, the next call tells.
                self.say(2, &[]);
            }
        }
        got
    }

    /// The next that is more than credits.
    pub fn next(&mut self) -> Got {
        let started = Instant::now();
        loop {
            match self.unread.pop_front() {
                Some(Got::Credits) => continue,
                Some(got) => return got,
                None => self.unread = self.take().into(),
            }
            assert!(started.elapsed() < PATIENCE, "nothing came");
        }
    }

    /// Waits until all that was sent has been acknowledged by the fabric's device.
    pub fn settle(&mut self) {
        let started = Instant::now();
        while self.done < u64::from(self.sent) {
            let got = self.take();
            self.unread.extend(got);
            assert!(started.elapsed() < PATIENCE, "{} of {} sends are done", self.done, self.sent);
        }
    }

    /// Waits until the fabric's device refuses what was sent; the queue pair is of no use then.
    pub fn refused(&mut self) {
        let (started, mut room) = (Instant::now(), [ibv_wc::default(); 32]);
        while !self.completions.poll(&mut room).expect("to poll").iter().any(|completion| completion.error().is_some()) {
            assert!(started.elapsed() < PATIENCE, "nothing was refused");
        }
    }

    /// Takes for a while, in which nothing may come, and nothing may have come before.
    pub fn quiet(&mut self, long: Duration) {
        let started = Instant::now();
        while started.elapsed() < long {
            let got = self.take();
            self.unread.extend(got);
            assert_eq!(self.unread, []);
        }
    }

    /// Memory that the fabric's device may read and write.
    pub fn memory(&self, len: usize) -> MemoryRegion<u8> {
        self.domain.allocate(len).expect("memory")
    }
}
