//! The profile of every class that has none of its own: each access goes to the device.
//!
//! A write of 7 to `edu`'s factorial register at BAR0 + 0x8 is forwarded, and so is the read of the result; nothing is remembered.

use farbus_remote_dma::{BarAddress, ResetKind, Width};

use super::{Peek, Profile, RegisterName, Verdict};

/// Knows nothing, changes nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Passthrough;

impl Profile for Passthrough {
    fn register(&self, _at: BarAddress) -> Option<RegisterName> {
        None
    }

    fn write(&mut self, _at: BarAddress, _width: Width, _value: u64, _guest: &dyn Peek) -> Verdict {
        Verdict::Forward
    }

    fn read(&mut self, _at: BarAddress, _width: Width) -> Option<u64> {
        None
    }

    fn answered(&mut self, _at: BarAddress, _width: Width, _value: u64) {}

    fn reset(&mut self, _kind: ResetKind) {}
}
