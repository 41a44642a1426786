//! The NVMe class (NVM Express 1.4, section 3.1): names registers and doorbells, follows the controller's life, remembers what never changes.
//!
//! A store of 17 to BAR0 + 0x1018 is submission queue 3's tail when CAP.DSTRD is 0. CAP and VS are asked for once between two resets;
//! nothing else is answered here, because CSTS changes by itself and the rest is the controller's to say. I/O queues are created by admin
//! commands, which are looked at in guest memory when their doorbell rings (`queues.rs`): so a controller that was reset can be brought back (`revive.rs`).

mod again;
mod ledger;
mod lost;
mod queues;
mod revive;
mod saved;
#[cfg(test)]
mod tests;

use farbus_remote_dma::{BarAddress, DeviceDescription, Iova, ResetKind, Width};

use self::lost::Lost;
use self::queues::Queues;
use self::saved::SavedQueues;
use super::{GoOn, Peek, Profile, RecoveryRule, RegisterName, ReviveError, Reviving, Verdict};
use crate::state::{ProfileState, StateError};

/// Mass storage, non-volatile memory, NVM Express.
pub const CLASS_CODE: u32 = 0x01_0802;

const CAP: u64 = 0x00;
const VS: u64 = 0x08;
const INTMS: u64 = 0x0c;
const INTMC: u64 = 0x10;
const CC: u64 = 0x14;
const CSTS: u64 = 0x1c;
const AQA: u64 = 0x24;
const ASQ: u64 = 0x28;
const ACQ: u64 = 0x30;
const DOORBELLS: u64 = 0x1000;
const CC_ENABLE: u32 = 1;
/// CC.CSS, where it is not the NVM command set (NVM Express 1.4, section 3.1.5), in the register's first byte.
const OTHER_COMMANDS: u8 = 0b111 << 4;

/// Registers below the doorbells: first byte, bytes, name (NVM Express 1.4, figure 68).
const REGISTERS: [(u64, u64, &str); 18] = [
    (CAP, 8, "CAP"),
    (VS, 4, "VS"),
    (0x0c, 4, "INTMS"),
    (0x10, 4, "INTMC"),
    (CC, 4, "CC"),
    (0x1c, 4, "CSTS"),
    (0x20, 4, "NSSR"),
    (AQA, 4, "AQA"),
    (ASQ, 8, "ASQ"),
    (ACQ, 8, "ACQ"),
    (0x38, 4, "CMBLOC"),
    (0x3c, 4, "CMBSZ"),
    (0x40, 4, "BPINFO"),
    (0x44, 4, "BPRSEL"),
    (0x48, 8, "BPMBL"),
    (0x50, 8, "CMBMSC"),
    (0x58, 4, "CMBSTS"),
    (0xe00, 0x1c, "PMR registers"),
];

/// The admin queues that a controller was enabled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdminQueues {
    /// First entry of the submission queue.
    pub submission: Iova,
    /// Entries of the submission queue, 1 to 4,096 (a driver must say at least 2).
    pub submission_entries: u16,
    /// First entry of the completion queue.
    pub completion: Iova,
    /// Entries of the completion queue, 1 to 4,096.
    pub completion_entries: u16,
}

/// Bytes of CAP (0 to 7) and VS (8 to 11), and which of them are known.
#[derive(Clone, Copy, Debug, Default)]
struct Fixed {
    bytes: [u8; 12],
    known: [bool; 12],
}

impl Fixed {
    fn learn(&mut self, offset: u64, bytes: &[u8]) {
        let places = self.bytes.iter_mut().zip(&mut self.known).skip(offset.min(12) as usize);
        for ((place, known), byte) in places.zip(bytes) {
            (*place, *known) = (*byte, true);
        }
    }

    fn read(&self, offset: u64, width: Width) -> Option<u64> {
        let end = offset.checked_add(width.bytes())? as usize;
        let range = usize::try_from(offset).ok()?..end;
        if !self.known.get(range.clone())?.iter().all(|known| *known) {
            return None;
        }
        let bytes = self.bytes.get(range)?;
        Some(bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }
}

/// What is known of one controller.
#[derive(Clone, Debug)]
pub struct Nvme {
    /// From the description: true for as long as the device is lent.
    described: Fixed,
    /// Those, and what the controller answered since its last reset.
    fixed: Fixed,
    /// What the driver wrote to CC up to and with ACQ (0x14 to 0x37), byte for byte.
    written: [u8; 0x38],
    admin: Option<AdminQueues>,
    /// INTMS as the driver made it.
    masked: u32,
    queues: Queues,
    /// As loaded from a saved state, until it goes on.
    loaded: Option<SavedQueues>,
    /// The device was reset after that state was saved, and is to be told what waits.
    revived: bool,
    /// Commands are kept, to be told again.
    remembers: bool,
    broken: Option<RecoveryRule>,
    /// The highest number of a completion queue that can have a vector of its own: what lies behind may be no doorbell.
    last_queue: u16,
}

impl Nvme {
    /// A controller that is described so; CAP and VS are taken from its constants where they are there.
    pub fn new(description: &DeviceDescription) -> Self {
        let mut described = Fixed::default();
        for constant in description.constants.iter().filter(|constant| constant.bar == 0) {
            described.learn(constant.offset, &constant.bytes);
        }
        Self {
            described,
            fixed: described,
            written: [0; 0x38],
            admin: None,
            masked: 0,
            queues: Queues::default(),
            loaded: None,
            revived: false,
            remembers: false,
            broken: None,
            last_queue: description.msix.map_or(0, |msix| msix.vectors),
        }
    }

    /// The admin queues, while the driver has the controller enabled.
    pub fn admin_queues(&self) -> Option<AdminQueues> {
        self.admin
    }

    /// Bytes from one doorbell to the next; `None` until CAP is known.
    fn stride(&self) -> Option<u64> {
        let cap = self.fixed.read(CAP + 4, Width::B1)?;
        Some(4 << (cap & 0xf))
    }

    fn written<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut bytes = [0; N];
        for (to, from) in bytes.iter_mut().zip(self.written.iter().skip(offset as usize)) {
            *to = *from;
        }
        bytes
    }

    fn enabled_with(&self) -> AdminQueues {
        let sizes = u32::from_le_bytes(self.written(AQA));
        AdminQueues {
            submission: Iova(u64::from_le_bytes(self.written(ASQ)) & !0xfff),
            submission_entries: (sizes & 0xfff) as u16 + 1,
            completion: Iova(u64::from_le_bytes(self.written(ACQ)) & !0xfff),
            completion_entries: (sizes >> 16 & 0xfff) as u16 + 1,
        }
    }

    fn control_written(&mut self) {
        let enable = u32::from_le_bytes(self.written(CC)) & CC_ENABLE != 0;
        match (enable, self.admin) {
            (true, None) => {
                let queues = self.enabled_with();
                tracing::debug!(?queues, "the driver enables the nvme controller");
                self.queues = Queues::new(&queues, self.last_queue);
                if self.remembers {
                    self.queues.remember();
                }
                self.admin = Some(queues);
            }
            (false, Some(_)) => {
                tracing::debug!("the driver resets the nvme controller");
                self.controller_reset();
            }
            _ => {}
        }
    }

    /// All queues are gone; new firmware may have other capabilities (NVM Express 1.4, sections 7.3.2 and 8.1).
    fn controller_reset(&mut self) {
        self.admin = None;
        self.fixed = self.described;
        self.masked = 0;
        self.queues = Queues::default();
        self.loaded = None;
    }

    fn doorbell(&mut self, at: BarAddress, width: Width, value: u64, guest: &dyn Peek) -> Verdict {
        if self.admin.is_none() {
            tracing::debug!(%at, value, "a doorbell of a controller that is not enabled");
            return Verdict::Forward;
        }
        match self.register(at) {
            // Only dwords are doorbells (NVM Express 1.4, section 3.1.24).
            _ if width != Width::B4 => Verdict::Forward,
            Some(RegisterName::SubmissionTail { queue }) => {
                self.queues.submitted(queue, value as u32, guest);
                Verdict::Forward
            }
            Some(RegisterName::CompletionHead { queue }) => {
                self.queues.taken(queue, value as u32, guest);
                // A head only makes room (NVM Express 1.4, section 4.1): a controller looks for that when it has more to say.
                if queue <= self.last_queue { Verdict::ForwardWithNext } else { Verdict::Forward }
            }
            _ => {
                self.queues.unknown.get_or_insert("a doorbell rang before its controller said how far they are apart");
                Verdict::Forward
            }
        }
    }
}

impl Profile for Nvme {
    fn register(&self, at: BarAddress) -> Option<RegisterName> {
        if at.bar != 0 {
            return None;
        }
        let Some(doorbell) = at.offset.checked_sub(DOORBELLS) else {
            let mut named = REGISTERS.iter();
            let (.., name) = named.find(|(first, len, _)| (*first..first + len).contains(&at.offset))?;
            return Some(RegisterName::Register(name));
        };
        let stride = self.stride()?;
        // 16 bits of queue number are all that commands can name.
        let queue = u16::try_from(doorbell / stride / 2).ok()?;
        match (doorbell % stride, doorbell / stride % 2) {
            (0, 0) => Some(RegisterName::SubmissionTail { queue }),
            (0, _) => Some(RegisterName::CompletionHead { queue }),
            _ => None,
        }
    }

    fn write(&mut self, at: BarAddress, width: Width, value: u64, guest: &dyn Peek) -> Verdict {
        if at.bar != 0 {
            return Verdict::Forward;
        }
        if at.offset >= DOORBELLS {
            return self.doorbell(at, width, value, guest);
        }
        match (at.offset, width) {
            (INTMS, Width::B4) => self.masked |= value as u32,
            (INTMC, Width::B4) => self.masked &= !(value as u32),
            _ => {}
        }
        let bytes = value.to_le_bytes();
        let places = self.written.iter_mut().skip(at.offset as usize);
        for (place, byte) in places.zip(bytes.iter().take(width.bytes() as usize)) {
            *place = *byte;
        }
        if at.offset <= CC && CC < at.offset + width.bytes() {
            self.control_written();
        }
        Verdict::Forward
    }

    fn read(&mut self, at: BarAddress, width: Width) -> Option<u64> {
        if at.bar != 0 {
            return None;
        }
        self.fixed.read(at.offset, width)
    }

    fn answered(&mut self, at: BarAddress, width: Width, value: u64) {
        // All ones is what a device that did not answer is read as; neither CAP nor VS is that.
        if at.bar == 0 && at.offset < 12 && value != width.all_ones() {
            let bytes = value.to_le_bytes();
            let count = width.bytes() as usize;
            self.fixed.learn(at.offset, bytes.get(..count).unwrap_or_default());
        }
    }

    fn reset(&mut self, _kind: ResetKind) {
        self.controller_reset();
        self.written = [0; 0x38];
    }

    fn save(&self, guest: &dyn Peek) -> ProfileState {
        ProfileState { kind: PROFILE_KIND, bytes: self.encode(guest) }
    }

    fn load(&mut self, state: &ProfileState) -> Result<(), StateError> {
        if state.kind != PROFILE_KIND {
            return Err(StateError::Malformed("a profile of another class"));
        }
        self.decode(&state.bytes)
    }

    fn revive(&mut self, device: &mut dyn Reviving) -> Result<(), ReviveError> {
        let loaded = self.loaded.clone().map(|saved| Lost { saved, again: Vec::new() });
        self.bring_back(loaded.as_ref(), device)?;
        self.revived = true;
        Ok(())
    }

    fn remember(&mut self) -> bool {
        if !std::mem::replace(&mut self.remembers, true) {
            self.queues.remember();
            if let Some(saved) = &self.loaded {
                self.queues.remember_restored(saved);
            }
        }
        true
    }

    fn recover(&mut self, device: &mut dyn Reviving) -> Result<GoOn, ReviveError> {
        if self.loaded.is_some() {
            // Restored, and lost before it went on.
            self.revive(device)?;
            return Ok(GoOn::default());
        }
        let lost = match self.admin {
            None => None,
            Some(_) => {
                let lost = Lost::of(&self.queues, device.guest(), self.broken);
                Some(lost.map_err(|why| ReviveError::Unknown(why.into()))?)
            }
        };
        let unknown = |why: &str| Err(ReviveError::Unknown(why.to_owned()));
        let io = lost.iter().flat_map(|lost| &lost.again).any(|(id, _)| *id != 0);
        if io && self.written::<4>(CC)[0] & OTHER_COMMANDS != 0 {
            return unknown("what is outstanding is of a command set that may not be carried out twice");
        }
        if lost.as_ref().is_some_and(|lost| !lost.again.is_empty()) && !device.may_reach_guest() {
            return unknown("commands are outstanding, and the guest has turned bus mastering off");
        }
        self.bring_back(lost.as_ref(), device)?;
        let vectors = if self.broken == Some(RecoveryRule::InterruptAgain) { Vec::new() } else { self.unheard(device.guest()) };
        Ok(GoOn { writes: Vec::new(), vectors })
    }

    fn break_rule(&mut self, rule: RecoveryRule) {
        self.broken = Some(rule);
    }

    fn go_on(&mut self, guest: &dyn Peek) -> GoOn {
        let revived = std::mem::take(&mut self.revived);
        let (Some(saved), Some(stride)) = (self.loaded.take(), self.stride()) else { return GoOn::default() };
        self.queues.restore_unread(guest);
        for queue in &saved.submissions {
            match queue.id {
                0 => self.queues.restore_pending(queue.head, guest),
                id => self.queues.restore_outstanding(id, queue.head, guest),
            }
        }
        let waiting = saved.submissions.iter().filter(|queue| revived && queue.head != queue.tail);
        let doorbell = |id: u16| BarAddress { bar: 0, offset: DOORBELLS + 2 * u64::from(id) * stride };
        GoOn {
            writes: waiting.map(|queue| (doorbell(queue.id), Width::B4, u64::from(queue.tail))).collect(),
            vectors: saved.completions.iter().filter(|queue| queue.unread() > 0).filter_map(|queue| queue.vector).collect(),
        }
    }
}

/// This profile's number in a saved state.
const PROFILE_KIND: u16 = 1;
