//! A function from its saved state, on another attachment: another session of the device's lender, or the device itself at home.
//!
//! Where the device is at rest as the state says, only the map of its memory is made again. Where it was reset since, its profile brings it back: on memory
//! lent for that, the queues are created and moved to where they were; then the guest's memory is mapped. Nothing reaches the guest before
//! [`Function::resume`].

use farbus_remote_dma::dirty_log::DirtyLogs;
use farbus_remote_dma::{Attachment, AttachmentError, InterruptMode, Iova, MapError, ResetKind, Rest, Window};
use thiserror::Error;

use super::front::Front;
use super::lazy::Lazy;
use super::windows::{Windows, state_of};
use super::workbench::Workbench;
use super::{Function, FunctionError, FunctionOptions};
use crate::irq::IrqSink;
use crate::profile::{self, ReviveError};
use crate::routes::Routes;
use crate::state::{DeviceIdentity, FunctionState, StateError};

/// Why a saved function cannot be restored here. The attachment is dropped; the state may be restored elsewhere.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// The bytes are no state, or one of a later version.
    #[error(transparent)]
    State(#[from] StateError),
    /// It is of another device.
    #[error("the function was saved with another device: {what} of {saved:?} is not that of {here:?}")]
    Device {
        /// What differs first.
        what: &'static str,
        /// The device that it was saved with.
        saved: String,
        /// The device here.
        here: String,
    },
    /// It does not go with the function that this farbus makes for the device.
    #[error("the function was saved with {0}")]
    Function(&'static str),
    /// Guest memory lies elsewhere than it did.
    #[error("the function was saved with other guest memory: {0}")]
    Memory(String),
    /// The device is kept in another state than the one saved.
    #[error("the device is kept at another rest than the one in which the function was saved: the state is older, or newer")]
    OtherRest,
    /// The function cannot be made.
    #[error(transparent)]
    New(#[from] FunctionError),
    /// Memory cannot be mapped for the device.
    #[error("guest memory cannot be mapped for the device: {0}")]
    Map(#[from] MapError),
    /// The device does not answer.
    #[error(transparent)]
    Attachment(#[from] AttachmentError),
    /// The device was reset and cannot be brought back.
    #[error(transparent)]
    Revive(#[from] ReviveError),
}

/// How a function was restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restored {
    /// The rest in which it was saved: its mark tells the device's journal since when the guest's memory knows of nothing.
    pub rest: Rest,
    /// The device was reset since, and was brought back.
    pub revived: bool,
}

impl<S: IrqSink> Function<S> {
    /// The function, of which the device has not heard yet.
    pub(super) fn untouched(attachment: Box<dyn Attachment>, sink: S, options: FunctionOptions) -> Result<Self, FunctionError> {
        let description = attachment.description().clone();
        let front = Front::new(&description, sink, options.interrupts)?;
        let mut function = Self {
            attachment,
            routes: Routes::new(&description, front.msix.as_ref()),
            profile: profile::for_device(&description),
            description,
            front,
            lazy: Lazy::default(),
            armed: false,
            bus_master: false,
            mode: InterruptMode::Pin,
            decoded: 0,
            gone: false,
            windows: Windows::default(),
            recovery: None,
            memories: Vec::new(),
            carried: DirtyLogs::default(),
            quiesced: None,
            map_changes: 0,
            teller: None,
            polls: 0,
        };
        function.decoded = function.front.decoded();
        Ok(function)
    }

    /// The function of `state` on `attachment`, with the guest's memory in `windows`: the same addresses as it was saved with. Nothing is told to the guest, and
    /// the device begins nothing, before [`Function::resume`].
    ///
    /// # Errors
    /// [`RestoreError`]; the device was reset where it was touched at all.
    pub fn restore(
        attachment: Box<dyn Attachment>,
        sink: S,
        options: FunctionOptions,
        state: &[u8],
        mut windows: Vec<Window>,
    ) -> Result<(Self, Restored), RestoreError> {
        let state = FunctionState::parse(state)?;
        let here = DeviceIdentity::of(attachment.description());
        if let Some(what) = state.device.differs_from(&here) {
            return Err(RestoreError::Device { what, saved: state.device.name, here: here.name });
        }
        windows.sort_by_key(|window| window.iova);
        same_windows(&state, &windows)?;
        let revived = match attachment.continues() {
            Some(token) if token.matches(&state.rest.token) => false,
            Some(_) => return Err(RestoreError::OtherRest),
            None => true,
        };
        let mut function = Self::untouched(attachment, sink, options)?;
        function.front.load(&state).map_err(RestoreError::Function)?;
        function.front.hold(true);
        function.profile.load(&state.profile)?;
        if revived {
            function.revive()?;
        }
        for window in windows {
            function.map(window)?;
        }
        function.say_registers()?;
        Ok((function, Restored { rest: state.rest, revived }))
    }

    /// Tells a device that has just been put under this function what its registers say.
    pub(super) fn say_registers(&mut self) -> Result<(), AttachmentError> {
        self.mode = self.front.mode();
        self.decoded = self.front.decoded();
        self.bus_master = self.front.space.bus_master();
        self.attachment.set_interrupt_mode(self.mode, &mut self.front);
        self.attachment.set_bus_master(self.bus_master, &mut self.front);
        self.attachment.gone().map_or(Ok(()), |reason| Err(AttachmentError::Gone(reason)))
    }

    /// Resets the device, whose profile will bring it back.
    pub(super) fn reset_for_revival(&mut self) -> Result<(), AttachmentError> {
        self.attachment.set_bus_master(false, &mut self.front);
        self.attachment.reset(ResetKind::Function, &mut self.front)?;
        self.attachment.set_interrupt_mode(InterruptMode::Msix, &mut self.front);
        self.attachment.set_bus_master(true, &mut self.front);
        Ok(())
    }

    /// Brings a device that was reset to where the profile's state has it. No guest memory is mapped yet.
    fn revive(&mut self) -> Result<(), RestoreError> {
        self.reset_for_revival()?;
        let Self { attachment, front, profile, windows, .. } = self;
        let mut workbench = Workbench::new(&mut **attachment, front, windows);
        profile.revive(&mut workbench)?;
        Ok(workbench.end()?)
    }
}

/// Whether memory lies where it lay.
fn same_windows(state: &FunctionState, windows: &[Window]) -> Result<(), RestoreError> {
    let here: Vec<_> = windows.iter().map(state_of).collect();
    if here.len() != state.windows.len() {
        return Err(RestoreError::Memory(format!("{} windows, and here are {}", state.windows.len(), here.len())));
    }
    for (saved, here) in state.windows.iter().zip(&here) {
        if (saved.iova, saved.len, saved.access) != (here.iova, here.len, here.access) {
            let (saved_at, here_at) = (Iova(saved.iova), Iova(here.iova));
            let what = format!("{:#x} bytes at {saved_at}, and here are {:#x} at {here_at}", saved.len, here.len);
            return Err(RestoreError::Memory(what));
        }
    }
    Ok(())
}
