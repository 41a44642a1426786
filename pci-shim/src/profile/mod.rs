//! What a class of devices means by its registers: pure knowledge, without a device or a link.
//!
//! For an NVMe controller the store of 17 to BAR0 + 0x1018 is "submission queue 3's tail", and its version at BAR0 + 0x8 needs to be asked
//! for once only. A device that can be asked to wait (a software device, or one behind vfio-user) needs no more than [`Verdict::Forward`].
//!
//! What will come with devices that cannot (VFIO): a verdict that names the guest ranges which the device is about to read, to be published
//! before the write goes on, and one that keeps a write from the device because the profile did all that it asks for.

pub mod nvme;
pub mod passthrough;

use std::fmt;

use farbus_remote_dma::{BarAddress, DeviceDescription, ResetKind, Width};

/// What to do with a BAR write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// The device gets it, in order.
    Forward,
    /// The device gets it, in order, with whatever comes next, or after some microseconds: nobody waits for what it does. A later write of the same
    /// register may take its place.
    ForwardWithNext,
}

/// What people call a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegisterName {
    /// The name that its specification gives it.
    Register(&'static str),
    /// New entries up to here are in a submission queue.
    SubmissionTail {
        /// Queue, 0 is the admin queue.
        queue: u16,
    },
    /// Entries up to here of a completion queue were consumed.
    CompletionHead {
        /// Queue, 0 is the admin queue.
        queue: u16,
    },
}

impl fmt::Display for RegisterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Register(name) => f.write_str(name),
            Self::SubmissionTail { queue } => write!(f, "submission queue {queue}'s tail"),
            Self::CompletionHead { queue } => write!(f, "completion queue {queue}'s head"),
        }
    }
}

/// Knowledge of one device's class. It sees every access that reaches the device, in order, after the function has checked it.
pub trait Profile: Send {
    /// What people call the register at `at`; `None` where the class does not say.
    fn register(&self, at: BarAddress) -> Option<RegisterName>;

    /// The guest writes: what to do.
    fn write(&mut self, at: BarAddress, width: Width, value: u64) -> Verdict;

    /// The guest reads: the value, where it is known and reading has no effect.
    fn read(&mut self, at: BarAddress, width: Width) -> Option<u64>;

    /// The device answered a read with `value`.
    fn answered(&mut self, at: BarAddress, width: Width, value: u64);

    /// The device was reset.
    fn reset(&mut self, kind: ResetKind);
}

/// The profile for a device, by its class code (PCI Code and ID Assignment 1.11, section 1.2).
pub fn for_device(description: &DeviceDescription) -> Box<dyn Profile> {
    match description.class_code {
        nvme::CLASS_CODE => Box::new(nvme::Nvme::new(description)),
        _ => Box::new(passthrough::Passthrough),
    }
}
