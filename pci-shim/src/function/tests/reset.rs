//! Reset ends everything of before. Example: a store that the owner has not taken when the guest resets is never made.

use super::*;
use crate::scripted::{CAP, Say};
use farbus_remote_dma::{AttachmentError, Iova};

fn store(ticket: u32, at: u64) -> Say {
    Say::Store(Ticket(ticket), Iova(at), vec![0xee; 16])
}

#[test]
fn nothing_of_before_a_function_level_reset_reaches_the_guest_after_it() {
    let mut bench = Bench::running();
    bench.mask(7, true);
    bench.script.say([
        Say::Vector(7),
        store(1, 0x1000),
        store(2, 0x2000),
        Say::Vector(3),
        Say::Pin(true),
    ]);
    bench.poll();
    let taken = bench.function.next_mediation().unwrap();
    assert_eq!(taken.ticket, Ticket(1));
    bench.script.say_in_reset([store(3, 0x3000), Say::Vector(4), Say::Pin(true)]);
    bench.config(0x88, 0x8000);
    let calls = bench.script.calls();
    let expected = [
        Call::BusMaster(false),
        Call::Reset(ResetKind::Function),
        Call::Mode(InterruptMode::Pin),
        Call::Fault(Ticket(2)),
        Call::Fault(Ticket(3)),
    ];
    assert_eq!(calls, expected);
    assert_eq!(bench.function.next_mediation(), None);
    bench.function.answer(Ticket(1), MediationAnswer::Stored);
    assert_eq!(bench.script.calls(), [Call::Stored(Ticket(1))]);
    // The driver sets the function up again: nothing may be pending from before.
    bench.config(COMMAND, 0x0007);
    bench.config(MSIX_CONTROL, 0x8000);
    for vector in 0..65 {
        bench.mask(vector, false);
    }
    bench.poll();
    assert_eq!(bench.told(), []);
}

#[test]
fn without_a_reset_the_same_stores_and_vectors_do_arrive() {
    // The twin of the test above: were its silence due to something else, this would be silent too.
    let mut bench = Bench::running();
    bench.mask(7, true);
    bench
        .script
        .say([Say::Vector(7), store(1, 0x1000), store(2, 0x2000), Say::Vector(3)]);
    bench.poll();
    while let Some(request) = bench.function.next_mediation() {
        bench.function.answer(request.ticket, MediationAnswer::Stored);
    }
    bench.mask(7, false);
    assert_eq!(bench.told(), [message(3), message(7)]);
}

#[test]
fn a_reset_puts_registers_masks_and_the_pin_back() {
    let mut bench = Bench::new(InterruptOwner::Function);
    bench.script.say([Say::Pin(true)]);
    bench.poll();
    bench.config(0x88, 0x28bf);
    bench.config(0x3c, 0x0b);
    bench.write_config32(0x10, 0xfe00_0000);
    bench.config(0x88, 0x8000);
    assert_eq!(bench.told(), [Told::Pin(true), Told::Pin(false)]);
    assert_eq!(bench.config_read(0x06) & 8, 0);
    assert_eq!(
        bench.config_read(0x88),
        0x2810,
        "the payload size of the resetting write holds, nothing else"
    );
    assert_eq!((bench.config_read(0x3c), bench.config_read(0x12)), (0x0100, 0));
    bench.config(COMMAND, 0x0002);
    assert_eq!(bench.read(TABLE + 12, Width::B4), 1, "all vectors are masked");
}

#[test]
fn a_reset_that_the_device_does_not_answer_still_resets_the_registers() {
    let mut bench = Bench::running();
    bench.script.go();
    let gone = AttachmentError::Gone(CloseReason::PeerClosed);
    assert_eq!(bench.function.reset(ResetKind::Conventional), Err(gone));
    assert_eq!(bench.config_read(COMMAND), 0xffff, "and it reads as an empty slot");
    assert!(!bench.function.config().bus_master());
}

#[test]
fn a_device_that_is_gone_reads_all_ones_everywhere_and_holds_no_interrupt_line() {
    let mut bench = Bench::running();
    bench.config(MSIX_CONTROL, 0);
    bench.script.say([Say::Pin(true)]);
    bench.poll();
    assert_eq!(bench.read(0, Width::B8), CAP);
    bench.script.go();
    bench.poll();
    assert_eq!(bench.told(), [Told::Pin(true), Told::Pin(false)]);
    for offset in [0, TABLE, PENDING, 0x1c] {
        assert_eq!(bench.read(offset, Width::B4), 0xffff_ffff, "{offset:#x}");
    }
    assert_eq!(bench.config_read(0x00), 0xffff);
    assert_eq!(bench.function.gone(), Some(CloseReason::PeerClosed));
}

#[test]
fn a_client_keeps_its_interrupts_over_a_reset_and_the_device_is_told_again() {
    let mut bench = Bench::new(InterruptOwner::Client);
    bench.function.set_client_interrupts(InterruptMode::Msix);
    bench.script.calls();
    bench.function.reset(ResetKind::Conventional).unwrap();
    let expected = [Call::Reset(ResetKind::Conventional), Call::Mode(InterruptMode::Msix)];
    assert_eq!(bench.script.calls(), expected);
}

impl Bench {
    fn write_config32(&mut self, offset: u16, value: u32) {
        self.function.config_write(offset, &value.to_le_bytes()).unwrap();
    }
}
