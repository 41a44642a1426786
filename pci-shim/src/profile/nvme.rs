//! The NVMe class (NVM Express 1.4, section 3.1): names registers and doorbells, follows the controller's life, remembers what never changes.
//!
//! A store of 17 to BAR0 + 0x1018 is submission queue 3's tail when CAP.DSTRD is 0. CAP and VS are asked for once between two resets;
//! nothing else is answered here, because CSTS changes by itself and the rest is the controller's to say. I/O queues are created by admin
//! commands in guest memory, which registers alone do not show: what is known of them is that their doorbells rang.

use farbus_remote_dma::{BarAddress, DeviceDescription, Iova, ResetKind, Width};

use super::{Profile, RegisterName, Verdict};

/// Mass storage, non-volatile memory, NVM Express.
pub const CLASS_CODE: u32 = 0x01_0802;

const CAP: u64 = 0x00;
const VS: u64 = 0x08;
const CC: u64 = 0x14;
const AQA: u64 = 0x24;
const ASQ: u64 = 0x28;
const ACQ: u64 = 0x30;
const DOORBELLS: u64 = 0x1000;
const CC_ENABLE: u32 = 1;

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
}

impl Nvme {
    /// A controller that is described so; CAP and VS are taken from its constants where they are there.
    pub fn new(description: &DeviceDescription) -> Self {
        let mut described = Fixed::default();
        for constant in description.constants.iter().filter(|constant| constant.bar == 0) {
            described.learn(constant.offset, &constant.bytes);
        }
        Self { described, fixed: described, written: [0; 0x38], admin: None }
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

    fn write(&mut self, at: BarAddress, width: Width, value: u64) -> Verdict {
        if at.bar != 0 {
            return Verdict::Forward;
        }
        if at.offset >= DOORBELLS {
            if self.admin.is_none() {
                tracing::debug!(%at, value, "a doorbell of a controller that is not enabled");
            }
            // A head only makes room (NVM Express 1.4, section 4.1): a controller looks for that when it has more to say.
            return match self.register(at) {
                Some(RegisterName::CompletionHead { .. }) if width == Width::B4 && self.admin.is_some() => Verdict::ForwardWithNext,
                _ => Verdict::Forward,
            };
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
}

#[cfg(test)]
mod tests {
    use farbus_remote_dma::Constant;
    use proptest::prelude::*;

    use super::*;
    use crate::scripted::description;

    fn at(offset: u64) -> BarAddress {
        BarAddress { bar: 0, offset }
    }

    /// A controller whose CAP is `cap`, or is not known from the start.
    fn nvme(cap: Option<u64>) -> Nvme {
        let mut described = description();
        described.constants.clear();
        described.constants.extend(cap.map(|cap| Constant { bar: 0, offset: CAP, bytes: cap.to_le_bytes().to_vec() }));
        Nvme::new(&described)
    }

    #[test]
    fn a_doorbell_is_never_taken_for_another_queues() {
        for dstrd in 0..16u64 {
            let nvme = nvme(Some(dstrd << 32 | 0x3ff));
            for queue in [0u16, 1, 3, 64, u16::MAX] {
                let tail = DOORBELLS + 2 * u64::from(queue) * (4 << dstrd);
                let name = |offset| nvme.register(at(offset));
                assert_eq!(name(tail), Some(RegisterName::SubmissionTail { queue }));
                assert_eq!(name(tail + (4 << dstrd)), Some(RegisterName::CompletionHead { queue }));
                assert_eq!(name(tail + 2), None, "between two doorbells");
            }
        }
        let three = nvme(Some(0)).register(at(0x1018)).unwrap();
        assert_eq!(three.to_string(), "submission queue 3's tail");
        assert_eq!(nvme(Some(0)).register(BarAddress { bar: 2, offset: 0x1018 }), None);
        assert_eq!(nvme(Some(0)).register(at(0x1c)), Some(RegisterName::Register("CSTS")));
        assert_eq!(nvme(Some(0)).register(at(0xfff)), None);
        assert_eq!(nvme(Some(0)).register(at(u64::MAX)), None);
    }

    #[test]
    fn a_doorbell_has_no_name_while_the_stride_is_not_known() {
        let mut nvme = nvme(None);
        assert_eq!(nvme.register(at(0x1018)), None);
        nvme.answered(at(4), Width::B4, 0x21);
        assert_eq!(nvme.register(at(0x1018)), Some(RegisterName::CompletionHead { queue: 1 }));
    }

    #[test]
    fn what_the_device_said_is_forgotten_with_its_reset_and_all_ones_is_not_believed() {
        let mut nvme = nvme(None);
        nvme.answered(at(VS), Width::B4, u64::from(u32::MAX));
        assert_eq!(nvme.read(at(VS), Width::B4), None);
        nvme.answered(at(VS), Width::B4, 0x1_0400);
        nvme.answered(at(CAP), Width::B8, 0x20_1e01_03ff);
        assert_eq!(nvme.read(at(VS), Width::B4), Some(0x1_0400));
        assert_eq!(nvme.read(at(CAP + 4), Width::B4), Some(0x20));
        assert_eq!(nvme.read(at(VS), Width::B8), None, "INTMS is beside VS");
        nvme.write(at(CC), Width::B4, 0x46_0001);
        nvme.write(at(CC), Width::B4, 0x46_0000);
        assert_eq!((nvme.read(at(VS), Width::B4), nvme.read(at(CAP), Width::B8)), (None, None));
        let mut described = super::Nvme::new(&description());
        described.reset(ResetKind::Function);
        assert_eq!(described.read(at(CAP), Width::B8), Some(crate::scripted::CAP));
    }

    #[test]
    fn the_admin_queues_are_those_the_driver_wrote_in_halves_or_at_once() {
        let mut nvme = nvme(Some(0));
        nvme.write(at(AQA), Width::B4, 0x003f_001f);
        nvme.write(at(ASQ), Width::B4, 0x0450_0000);
        nvme.write(at(ASQ + 4), Width::B4, 1);
        nvme.write(at(ACQ), Width::B8, 0x1_0451_0000);
        assert_eq!(nvme.admin_queues(), None);
        nvme.write(at(CC), Width::B4, 0x46_0001);
        let queues = AdminQueues {
            submission: Iova(0x1_0450_0000),
            submission_entries: 32,
            completion: Iova(0x1_0451_0000),
            completion_entries: 64,
        };
        assert_eq!(nvme.admin_queues(), Some(queues));
        // Changed while enabled: without effect until the next time.
        nvme.write(at(ASQ), Width::B8, 0);
        nvme.write(at(CC), Width::B4, 0x46_4001);
        assert_eq!(nvme.admin_queues(), Some(queues));
        nvme.reset(ResetKind::Function);
        assert_eq!(nvme.admin_queues(), None);
    }

    proptest! {
        /// Whatever the guest writes is forwarded; whatever it reads, only CAP and VS are ever answered without the device.
        #[test]
        fn no_register_with_a_life_of_its_own_is_answered_from_memory(
            accesses in prop::collection::vec((0..3u8, prop_oneof![0..0x60u64, 0xff8..0x1040u64, any::<u64>()], 0..4u32, any::<u64>()), 0..80),
        ) {
            let mut nvme = nvme(None);
            for (bar, offset, log2, value) in accesses {
                let width = Width::from_bytes(1 << log2).unwrap();
                let at = BarAddress { bar, offset: offset & !(width.bytes() - 1) };
                let _ = nvme.register(at);
                match nvme.write(at, width, value) {
                    Verdict::Forward => {}
                    Verdict::ForwardWithNext => {
                        let head = matches!(nvme.register(at), Some(RegisterName::CompletionHead { .. }));
                        prop_assert!(head, "{}", at);
                    }
                }
                if nvme.read(at, width).is_some() {
                    prop_assert!(bar == 0 && at.offset + width.bytes() <= 12);
                } else {
                    nvme.answered(at, width, width.truncate(value));
                }
            }
        }
    }
}
