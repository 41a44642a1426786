//! QEMU's `edu` device as its drivers see it: where its registers are, and what they mean.
//!
//! A driver that writes 12 to [`FACTORIAL`] reads 479,001,600 there when bit 0 of [`STATUS`] is clear again. All of it is from QEMU, docs/specs/edu.rst.

/// What the device is: `0x0100_00ed`.
pub const IDENTIFICATION: u64 = 0x00;
/// Reads as the inversion of what was written.
pub const LIVENESS: u64 = 0x04;
/// Computes the factorial of what is written.
pub const FACTORIAL: u64 = 0x08;
/// Bit 0: it computes; bit 7: it interrupts when it has.
pub const STATUS: u64 = 0x20;
/// Why it interrupts.
pub const INTERRUPT_STATUS: u64 = 0x24;
/// Raises an interrupt.
pub const RAISE: u64 = 0x60;
/// Clears what it interrupts for.
pub const ACKNOWLEDGE: u64 = 0x64;
/// Where DMA comes from.
pub const SOURCE: u64 = 0x80;
/// Where it goes.
pub const DESTINATION: u64 = 0x88;
/// Its bytes.
pub const COUNT: u64 = 0x90;
/// Its command: [`START`], with [`TO_GUEST`] and [`INTERRUPT`].
pub const COMMAND: u64 = 0x98;
/// The device's own memory, as DMA has it.
pub const BUFFER: u64 = 0x4_0000;
/// Begins.
pub const START: u64 = 1;
/// From the device to the guest.
pub const TO_GUEST: u64 = 2;
/// Interrupts at the end, with `0x100`.
pub const INTERRUPT: u64 = 4;
