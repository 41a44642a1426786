//! What the NVMe profile makes of registers: names of doorbells, the controller's life, what it answers by itself.
//!
//! With a stride of 8 bytes BAR0 + 0x1030 is submission queue 3's tail, and BAR0 + 0x1032 has no name.

use farbus_remote_dma::Constant;
use proptest::prelude::*;

use super::*;
use crate::scripted::description;

/// Guest memory that nobody can look at.
struct Blind;

impl Peek for Blind {
    fn peek(&self, _iova: Iova, _into: &mut [u8]) -> bool {
        false
    }
}

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
    nvme.write(at(CC), Width::B4, 0x46_0001, &Blind);
    nvme.write(at(CC), Width::B4, 0x46_0000, &Blind);
    assert_eq!((nvme.read(at(VS), Width::B4), nvme.read(at(CAP), Width::B8)), (None, None));
    let mut described = super::Nvme::new(&description());
    described.reset(ResetKind::Function);
    assert_eq!(described.read(at(CAP), Width::B8), Some(crate::scripted::CAP));
}

#[test]
fn the_admin_queues_are_those_the_driver_wrote_in_halves_or_at_once() {
    let mut nvme = nvme(Some(0));
    nvme.write(at(AQA), Width::B4, 0x003f_001f, &Blind);
    nvme.write(at(ASQ), Width::B4, 0x0450_0000, &Blind);
    nvme.write(at(ASQ + 4), Width::B4, 1, &Blind);
    nvme.write(at(ACQ), Width::B8, 0x1_0451_0000, &Blind);
    assert_eq!(nvme.admin_queues(), None);
    nvme.write(at(CC), Width::B4, 0x46_0001, &Blind);
    let queues = AdminQueues {
        submission: Iova(0x1_0450_0000),
        submission_entries: 32,
        completion: Iova(0x1_0451_0000),
        completion_entries: 64,
    };
    assert_eq!(nvme.admin_queues(), Some(queues));
    // Changed while enabled: without effect until the next time.
    nvme.write(at(ASQ), Width::B8, 0, &Blind);
    nvme.write(at(CC), Width::B4, 0x46_4001, &Blind);
    assert_eq!(nvme.admin_queues(), Some(queues));
    nvme.reset(ResetKind::Function);
    assert_eq!(nvme.admin_queues(), None);
}

proptest! {
    /// Whatever the guest writes is forwarded, heads with what comes next; whatever it reads, only CAP and VS are ever answered without the device.
    #[test]
    fn no_register_with_a_life_of_its_own_is_answered_from_memory(
        accesses in prop::collection::vec((0..3u8, prop_oneof![0..0x60u64, 0xff8..0x1040u64, any::<u64>()], 0..4u32, any::<u64>()), 0..80),
    ) {
        let mut nvme = nvme(None);
        for (bar, offset, log2, value) in accesses {
            let width = Width::from_bytes(1 << log2).unwrap();
            let at = BarAddress { bar, offset: offset & !(width.bytes() - 1) };
            let _ = nvme.register(at);
            match nvme.write(at, width, value, &Blind) {
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
