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
use std::sync::Arc;

use farbus_remote_dma::{BarAddress, DeviceDescription, Iova, ResetKind, Width};
use farbus_transport::Memory;
use thiserror::Error;

use crate::state::{ProfileState, StateError};

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

    /// The guest writes: what to do. Guest memory may be looked at, as it was when the guest wrote.
    fn write(&mut self, at: BarAddress, width: Width, value: u64, guest: &dyn Peek) -> Verdict;

    /// The guest reads: the value, where it is known and reading has no effect.
    fn read(&mut self, at: BarAddress, width: Width) -> Option<u64>;

    /// The device answered a read with `value`.
    fn answered(&mut self, at: BarAddress, width: Width, value: u64);

    /// The device was reset.
    fn reset(&mut self, kind: ResetKind);

    /// What is known, to be saved while the device is at rest.
    fn save(&self, _guest: &dyn Peek) -> ProfileState {
        ProfileState { kind: 0, bytes: Vec::new() }
    }

    /// Knows what another profile of the same class knew.
    ///
    /// # Errors
    /// [`StateError`]: it is of another class, or cannot be; nothing is known then but what a new profile knows.
    fn load(&mut self, state: &ProfileState) -> Result<(), StateError> {
        if state.kind == 0 && state.bytes.is_empty() { Ok(()) } else { Err(StateError::Malformed("a profile of another class")) }
    }

    /// Brings a device that was reset to where the loaded state has it, before it sees any of the guest's memory.
    ///
    /// # Errors
    /// [`ReviveError`]: the device is in an unknown state, and must be reset.
    fn revive(&mut self, _device: &mut dyn Reviving) -> Result<(), ReviveError> {
        Err(ReviveError::Unknown("its class has no profile that could bring it back".into()))
    }

    /// Keeps from now on what the device is told and has not answered, so that it can be told again should the device be lost. False where the class
    /// cannot.
    fn remember(&mut self) -> bool {
        false
    }

    /// The device is lost, and another one, or itself after a reset, is here in its place: brings it to where the lost one was, and tells it again what that one
    /// had not answered. Answers come to guest memory while this waits for them.
    ///
    /// # Errors
    /// [`ReviveError`]: the device is in an unknown state.
    fn recover(&mut self, _device: &mut dyn Reviving) -> Result<GoOn, ReviveError> {
        Err(ReviveError::Unknown("its class has no profile that could bring it back".into()))
    }

    /// Breaks a rule of [`Profile::recover`] from now on.
    #[doc(hidden)]
    fn break_rule(&mut self, _rule: RecoveryRule) {}

    /// After a restore, when the device may go on: register writes that make it look at what the guest had told it and it had not begun, and the vectors of
    /// what the guest has perhaps not heard of.
    fn go_on(&mut self, _guest: &dyn Peek) -> GoOn {
        GoOn::default()
    }
}

/// Guest memory as a profile may look at it.
pub trait Peek {
    /// Fills `into` from `iova`; false where that cannot be looked at here, and `into` is undefined.
    fn peek(&self, iova: Iova, into: &mut [u8]) -> bool;
}

/// A device that was reset, in the hands of its profile.
pub trait Reviving {
    /// Lets the device use fresh memory at these addresses, until it is revived.
    ///
    /// # Errors
    /// [`ReviveError`].
    fn lend_memory(&mut self, iova: Iova, len: u64) -> Result<Arc<Memory>, ReviveError>;

    /// Posts a register write.
    fn write(&mut self, at: BarAddress, width: Width, value: u64);

    /// Reads a register.
    fn read(&mut self, at: BarAddress, width: Width) -> u64;

    /// Takes all lent memory back but for what was lent at `keep`, and lets the device use the guest's memory everywhere else.
    ///
    /// # Errors
    /// [`ReviveError`].
    fn give_guest_memory(&mut self, keep: &[Iova]) -> Result<(), ReviveError>;

    /// Whether the guest lets the device reach its memory now.
    fn may_reach_guest(&self) -> bool;

    /// The guest's memory, to look at.
    fn guest(&self) -> &dyn Peek;

    /// Lets the device work; an error when it is gone.
    ///
    /// # Errors
    /// [`ReviveError::Device`].
    fn work(&mut self) -> Result<(), ReviveError>;
}

/// Why a device that was reset cannot be brought back.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ReviveError {
    /// What it would have to be like is not known.
    #[error("the device was reset, and cannot be brought back: {0}")]
    Unknown(String),
    /// It does not do what it is told.
    #[error("the device was reset, and does not come back: {0}")]
    Device(String),
}

/// A rule of a recovery, to be broken on purpose by a test that must then fail.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecoveryRule {
    /// What was not answered is told again.
    TellAgain,
    /// What was answered is not, whether the guest has taken the answer or not.
    TellOnce,
    /// It is told as it was submitted, not as the guest's slots are by now.
    TellTheCopy,
    /// The guest is interrupted for what it has perhaps not heard of.
    InterruptAgain,
}

impl RecoveryRule {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::TellAgain, Self::TellOnce, Self::TellTheCopy, Self::InterruptAgain];
}

/// What a device that was restored or recovered is told when it goes on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GoOn {
    /// Register writes, in order.
    pub writes: Vec<(BarAddress, Width, u64)>,
    /// Vectors to raise once more: a guest that has heard of them finds nothing new, one that has not would wait for ever.
    pub vectors: Vec<u16>,
}

/// The profile for a device, by its class code (PCI Code and ID Assignment 1.11, section 1.2).
pub fn for_device(description: &DeviceDescription) -> Box<dyn Profile> {
    match description.class_code {
        nvme::CLASS_CODE => Box::new(nvme::Nvme::new(description)),
        _ => Box::new(passthrough::Passthrough),
    }
}
