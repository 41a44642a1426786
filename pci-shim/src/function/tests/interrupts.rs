//! From the device's vector or level to what the guest hears. Example: vector 3 raised while masked is told once, when it is unmasked.

use super::*;
use crate::scripted::Say;

#[test]
fn an_interrupt_raised_while_its_vector_is_masked_is_neither_lost_nor_told_twice() {
    let mut bench = Bench::running();
    bench.mask(3, true);
    bench.script.say([Say::Vector(3), Say::Vector(3), Say::Vector(4)]);
    bench.poll();
    assert_eq!(bench.told(), [message(4)]);
    assert_eq!(bench.read(PENDING, Width::B8), 1 << 3);
    bench.mask(3, false);
    assert_eq!(bench.told(), [message(3)]);
    assert_eq!(bench.read(PENDING, Width::B8), 0);
    bench.mask(3, true);
    bench.mask(3, false);
    assert_eq!(bench.told(), []);
}

#[test]
fn enabling_msix_under_the_function_mask_tells_nothing_before_the_mask_is_lifted() {
    let mut bench = Bench::running();
    bench.config(MSIX_CONTROL, 0xc000);
    bench.script.say([Say::Vector(0), Say::Vector(64)]);
    bench.poll();
    assert_eq!(bench.told(), []);
    assert_eq!((bench.read(PENDING, Width::B8), bench.read(PENDING + 8, Width::B4)), (1, 1));
    bench.mask(64, true);
    bench.mask(64, false);
    bench.config(0x3c, 5);
    assert_eq!(bench.told(), [], "the function mask holds whatever else is written");
    bench.config(MSIX_CONTROL, 0x8000);
    assert_eq!(bench.told(), [message(0), message(64)]);
    assert_eq!(bench.script.calls(), [], "masking is no business of the device");
}

#[test]
fn a_function_that_may_not_send_keeps_the_message_until_it_may() {
    let mut bench = Bench::running();
    bench.config(COMMAND, 0x0003);
    bench.script.say([Say::Vector(5)]);
    bench.poll();
    bench.config(0x3c, 5);
    bench.mask(5, false);
    assert_eq!(bench.told(), []);
    bench.config(COMMAND, 0x0007);
    assert_eq!(bench.told(), [message(5)]);
    bench.config(0x44, 3);
    bench.script.say([Say::Vector(6)]);
    bench.poll();
    assert_eq!(bench.told(), []);
    bench.config(0x44, 0);
    assert_eq!(bench.told(), [message(6)]);
    let bus_master: Vec<Call> = bench.script.calls();
    let off_and_on = [Call::BusMaster(false), Call::BusMaster(true)];
    assert_eq!(bus_master, [off_and_on.clone(), off_and_on].concat());
}

#[test]
fn a_vector_that_nobody_enabled_is_counted_and_not_told() {
    let mut bench = Bench::running();
    bench.script.say([Say::Vector(65), Say::Vector(u16::MAX)]);
    bench.poll();
    bench.config(MSIX_CONTROL, 0);
    bench.script.say([Say::Vector(1)]);
    bench.poll();
    bench.config(MSIX_CONTROL, 0x8000);
    assert_eq!(bench.told(), []);
    assert_eq!(bench.function.counters().dropped, 3);
}

#[test]
fn msi_masks_one_vector_and_shows_it_pending() {
    let mut bench = Bench::new(InterruptOwner::Function);
    bench.config(COMMAND, 0x0006);
    bench.function.config_write(0x54, &0xfee0_0000u64.to_le_bytes()).unwrap();
    bench.config(0x5c, 0x4050);
    bench.config(0x60, 0b100);
    bench.config(MSI_CONTROL, 0x0021);
    let calls = [Call::BusMaster(true), Call::Mode(InterruptMode::Msi(4))];
    assert_eq!(bench.script.calls(), calls);
    bench.script.say([Say::Vector(2), Say::Vector(3)]);
    bench.poll();
    let data = |told: Vec<Told>| match told[..] {
        [Told::Message(irq)] => irq.data,
        _ => panic!("{told:?}"),
    };
    assert_eq!(data(bench.told()), 0x4053);
    assert_eq!(bench.config_read(0x64), 0b100);
    bench.config(0x60, 0);
    assert_eq!(data(bench.told()), 0x4052);
    assert_eq!(bench.config_read(0x64), 0);
    bench.config(MSI_CONTROL, 0x0020);
    assert_eq!(bench.script.calls(), [Call::Mode(InterruptMode::Pin)]);
}

#[test]
fn a_function_in_d3hot_holds_no_interrupt_line() {
    let mut bench = Bench::new(InterruptOwner::Function);
    bench.script.say([Say::Pin(true)]);
    bench.poll();
    bench.config(0x44, 3);
    bench.config(0x44, 0);
    assert_eq!(bench.told(), [true, false, true].map(Told::Pin));
}

#[test]
fn a_lender_that_lies_about_its_interrupts_fills_nothing_and_raises_nothing() {
    let mut plain = description();
    plain.pin = false;
    plain.msix = None;
    plain.msi_vectors = 1;
    for owner in [InterruptOwner::Function, InterruptOwner::Client] {
        let mut bench = Bench::of(plain.clone(), owner);
        let store = Say::Store(Ticket(1), farbus_remote_dma::Iova(0x1000), vec![1; 4]);
        bench.script.say([store, Say::Pin(true)]);
        bench.script.say((1..=u16::MAX).map(Say::Vector));
        bench.poll();
        bench.function.next_mediation().unwrap();
        bench.function.answer(Ticket(1), MediationAnswer::Stored);
        assert_eq!((bench.told(), bench.function.counters().dropped), (vec![], 0xffff));
        assert_eq!(bench.config_read(0x06) & 8, 0);
    }
}

#[test]
fn an_msi_vector_that_was_pending_is_forgotten_with_a_reset() {
    let mut bench = Bench::new(InterruptOwner::Function);
    for reset in [false, true] {
        bench.config(COMMAND, 0);
        bench.config(MSI_CONTROL, 0x0001);
        bench.script.say([Say::Vector(0)]);
        bench.poll();
        assert_eq!(bench.config_read(0x64), 1);
        if reset {
            bench.config(0x88, 0x8000);
            bench.config(MSI_CONTROL, 0x0001);
        }
        bench.config(COMMAND, 0x0006);
        assert_eq!(bench.told().is_empty(), reset);
    }
}

#[test]
fn a_level_waits_for_the_stores_before_it_as_a_vector_does() {
    let mut bench = Bench::new(InterruptOwner::Function);
    let store = Say::Store(Ticket(1), farbus_remote_dma::Iova(0x1000), vec![1; 4]);
    bench.script.say([store, Say::Pin(true)]);
    bench.poll();
    assert_eq!(bench.config_read(0x06) & 8, 0, "nor does the status bit say so");
    bench.function.next_mediation().unwrap();
    assert_eq!(bench.told(), []);
    bench.function.answer(Ticket(1), MediationAnswer::Stored);
    assert_eq!(bench.told(), [Told::Pin(true)]);
}

#[test]
fn a_disabled_pin_falls_but_its_status_bit_stays_so_that_the_guest_does_not_spin() {
    let mut bench = Bench::new(InterruptOwner::Function);
    bench.script.say([Say::Pin(true)]);
    bench.poll();
    assert_eq!(bench.told(), [Told::Pin(true)]);
    assert_eq!(bench.config_read(0x06) & 8, 8);
    bench.config(COMMAND, 0x0400);
    assert_eq!(bench.told(), [Told::Pin(false)]);
    assert_eq!(bench.config_read(0x06) & 8, 8);
    bench.config(COMMAND, 0);
    assert_eq!(bench.told(), [Told::Pin(true)]);
    bench.script.say([Say::Pin(true), Say::Pin(false), Say::Pin(false)]);
    bench.poll();
    assert_eq!(bench.told(), [Told::Pin(false)]);
    assert_eq!(bench.config_read(0x06) & 8, 0);
}

#[test]
fn a_pin_never_stays_up_when_the_guest_changes_to_messages() {
    let mut bench = Bench::new(InterruptOwner::Function);
    bench.script.say([Say::Pin(true)]);
    bench.poll();
    bench.config(MSIX_CONTROL, 0x8000);
    assert_eq!(bench.told(), [Told::Pin(true), Told::Pin(false)]);
    assert_eq!(bench.script.calls(), [Call::Mode(InterruptMode::Msix)]);
    bench.config(MSI_CONTROL, 0x0001);
    assert_eq!(bench.script.calls(), [], "msi-x goes before msi");
    bench.config(MSIX_CONTROL, 0);
    assert_eq!(bench.script.calls(), [Call::Mode(InterruptMode::Msi(1))]);
    bench.config(MSI_CONTROL, 0);
    assert_eq!(bench.told(), [Told::Pin(true)]);
}

#[test]
fn a_client_that_owns_the_table_hears_every_vector_of_the_device() {
    let mut bench = Bench::new(InterruptOwner::Client);
    bench.function.set_client_interrupts(InterruptMode::Msix);
    assert_eq!(bench.script.calls(), [Call::Mode(InterruptMode::Msix)]);
    // Its own registers say that nothing is enabled, and the table is all masked.
    bench.script.say([Say::Vector(64), Say::Vector(65), Say::Pin(true)]);
    bench.poll();
    let (vector, address, data) = (64, 0, 0);
    let expected = MessageInterrupt { vector, address, data };
    assert_eq!(bench.told(), [Told::Message(expected)]);
    bench.function.set_client_interrupts(InterruptMode::Pin);
    assert_eq!(bench.told(), [Told::Pin(true)]);
    bench.config(COMMAND, 0x0400);
    assert_eq!(
        bench.told(),
        [Told::Pin(false)],
        "the interrupt disable bit holds for clients too"
    );
    bench.config(MSIX_CONTROL, 0x8000);
    assert_eq!(bench.config_read(MSIX_CONTROL), 0x8040, "stored for the client to read");
    let calls = bench.script.calls();
    assert_eq!(calls, [Call::Mode(InterruptMode::Pin)], "and not acted on");
}
