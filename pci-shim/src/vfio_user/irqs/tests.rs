//! Interrupts without a socket: what is signalled, what waits, what is refused.
//!
//! Vector 3 is raised before its eventfd comes; the set of five eventfds that brings it finds the fourth signalled once.

use farbus_remote_dma::MsixLocation;
use rustix::event::{EventfdFlags, eventfd};

use super::*;

fn interrupts() -> ClientInterrupts {
    ClientInterrupts::new(&DeviceDescription {
        name: "test".into(),
        vendor_id: 1,
        device_id: 2,
        subsystem_vendor_id: 0,
        subsystem_id: 0,
        revision: 0,
        class_code: 0,
        bars: [None; 6],
        pin: true,
        msi_vectors: 4,
        msix: Some(MsixLocation { vectors: 65, table_bar: 0, table_offset: 0, pba_bar: 0, pba_offset: 4096 }),
        dma_bits: 64,
        constants: vec![],
        serial: String::new(),
    })
}

fn fds(count: usize) -> (Vec<OwnedFd>, Vec<OwnedFd>) {
    let ours: Vec<_> = (0..count).map(|_| eventfd(0, EventfdFlags::NONBLOCK).unwrap()).collect();
    let theirs = ours.iter().map(|fd| fd.try_clone().unwrap()).collect();
    (ours, theirs)
}

fn count(fd: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    rustix::io::read(fd, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
}

fn set(index: u32, start: u32, count: u32, action: IrqAction, data: IrqData<'_>) -> SetIrqs<'_> {
    SetIrqs { index, start, count, action, data }
}

#[test]
fn a_vector_raised_before_its_eventfd_came_is_not_lost() {
    let mut irqs = interrupts();
    // QEMU's first message: count 1 and no descriptor.
    irqs.set(&set(MSIX, 0, 1, IrqAction::Trigger, IrqData::Eventfd), vec![]).unwrap();
    assert_eq!(irqs.mode(), InterruptMode::Msix);
    irqs.message(3);
    irqs.deliver(0, None);
    let (ours, theirs) = fds(5);
    irqs.set(&set(MSIX, 0, 5, IrqAction::Trigger, IrqData::Eventfd), theirs).unwrap();
    assert_eq!(ours.iter().map(count).collect::<Vec<_>>(), [0, 0, 0, 1, 0]);
}

#[test]
fn a_vector_raised_while_all_are_torn_down_arrives_with_the_next_set() {
    let mut irqs = interrupts();
    let (ours, theirs) = fds(2);
    irqs.set(&set(MSIX, 0, 2, IrqAction::Trigger, IrqData::Eventfd), theirs).unwrap();
    irqs.set(&set(MSIX, 0, 0, IrqAction::Trigger, IrqData::None), vec![]).unwrap();
    assert_eq!(irqs.mode(), InterruptMode::Msix);
    irqs.message(1);
    irqs.deliver(0, None);
    assert_eq!(count(&ours[1]), 0);
    let (again, theirs) = fds(3);
    irqs.set(&set(MSIX, 0, 3, IrqAction::Trigger, IrqData::Eventfd), theirs).unwrap();
    assert_eq!(again.iter().map(count).collect::<Vec<_>>(), [0, 1, 0]);
}

#[test]
fn a_masked_vector_is_pending_until_it_is_unmasked() {
    let mut irqs = interrupts();
    let (ours, theirs) = fds(4);
    irqs.set(&set(MSI, 0, 4, IrqAction::Trigger, IrqData::Eventfd), theirs).unwrap();
    assert_eq!(irqs.mode(), InterruptMode::Msi(4));
    irqs.set(&set(MSI, 0, 3, IrqAction::Mask, IrqData::Bool(&[0, 1, 0])), vec![]).unwrap();
    for vector in [0, 1, 1] {
        irqs.message(vector);
        irqs.deliver(0, None);
    }
    assert_eq!(ours.iter().map(count).collect::<Vec<_>>(), [1, 0, 0, 0]);
    irqs.set(&set(MSI, 1, 1, IrqAction::Unmask, IrqData::None), vec![]).unwrap();
    assert_eq!(count(&ours[1]), 1);
}

#[test]
fn an_interrupt_waits_for_the_stores_before_it_and_not_for_later_ones() {
    let mut irqs = interrupts();
    let (ours, theirs) = fds(2);
    irqs.set(&set(MSIX, 0, 2, IrqAction::Trigger, IrqData::Eventfd), theirs).unwrap();
    irqs.message(0);
    irqs.deliver(1, Some(1));
    irqs.message(1);
    irqs.deliver(2, Some(1));
    assert_eq!(ours.iter().map(count).collect::<Vec<_>>(), [0, 0]);
    irqs.deliver(2, Some(2));
    assert_eq!(ours.iter().map(count).collect::<Vec<_>>(), [1, 0]);
    irqs.deliver(2, None);
    assert_eq!(ours.iter().map(count).collect::<Vec<_>>(), [0, 1]);
    assert!(!irqs.has_news());
}

#[test]
fn a_level_signals_again_when_unmasked_while_still_asserted() {
    let mut irqs = interrupts();
    let (ours, theirs) = fds(1);
    irqs.pin(true);
    irqs.deliver(0, None);
    irqs.set(&set(INTX, 0, 1, IrqAction::Trigger, IrqData::Eventfd), theirs).unwrap();
    assert_eq!(count(&ours[0]), 1);
    irqs.deliver(0, None);
    assert_eq!(count(&ours[0]), 0, "automasked");
    irqs.set(&set(INTX, 0, 1, IrqAction::Unmask, IrqData::None), vec![]).unwrap();
    assert_eq!(count(&ours[0]), 1);
    irqs.pin(false);
    irqs.set(&set(INTX, 0, 1, IrqAction::Unmask, IrqData::None), vec![]).unwrap();
    irqs.deliver(0, None);
    assert_eq!(count(&ours[0]), 0);
}

#[test]
fn an_eventfd_can_unmask_the_level() {
    let mut irqs = interrupts();
    let (ours, theirs) = fds(2);
    let [trigger, unmask] = <[OwnedFd; 2]>::try_from(theirs).unwrap();
    irqs.set(&set(INTX, 0, 1, IrqAction::Trigger, IrqData::Eventfd), vec![trigger]).unwrap();
    irqs.set(&set(INTX, 0, 1, IrqAction::Unmask, IrqData::Eventfd), vec![unmask]).unwrap();
    irqs.pin(true);
    irqs.deliver(0, None);
    assert_eq!(count(&ours[0]), 1);
    rustix::io::write(&ours[1], &1_u64.to_ne_bytes()).unwrap();
    irqs.take_unmask();
    assert_eq!(count(&ours[0]), 1);
}

#[test]
fn a_descriptor_that_could_block_us_is_refused() {
    let mut irqs = interrupts();
    let (pipe, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let refused = irqs.set(&set(MSIX, 0, 1, IrqAction::Trigger, IrqData::Eventfd), vec![pipe.into()]);
    assert_eq!(refused, Err(Errno::INVAL));
    let (_ours, theirs) = fds(2);
    assert_eq!(irqs.set(&set(MSIX, 0, 3, IrqAction::Trigger, IrqData::Eventfd), theirs), Err(Errno::INVAL));
    assert_eq!(irqs.set(&set(MSIX, 64, 2, IrqAction::Mask, IrqData::None), vec![]), Err(Errno::INVAL));
    // A full counter of a blocking eventfd.
    let full = eventfd(0, EventfdFlags::empty()).unwrap();
    rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    irqs.set(&set(MSIX, 0, 1, IrqAction::Trigger, IrqData::Eventfd), vec![full.try_clone().unwrap()]).unwrap();
    irqs.message(0);
    irqs.deliver(0, None);
}
