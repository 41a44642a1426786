//! The driver's registers over a [`Function`]: what a guest's kernel does to a PCI device before its driver runs, and BAR 0 from then on.
//!
//! `FunctionRegisters::open(attachment, sink, &memory, Iova(0x1_0000_0000))` maps the memory for the device, sets memory space and bus master
//! in the command register, and then a register read at 0x1c is `bar_read(BAR0 + 0x1c)`, wherever the device is.

use std::sync::Arc;

use farbus_pci_shim::{AccessError, Function, FunctionError, FunctionOptions, InterruptOwner, IrqSink};
use farbus_remote_dma::{Attachment, BarAddress, Iova, MapError, Width, Window, WindowMemory};
use farbus_transport::{Access, Memory, Nanos};
use thiserror::Error;

use crate::driver::Registers;

/// Configuration space: command register.
const COMMAND: u16 = 0x04;
/// Configuration space: first capability.
const CAPABILITIES: u16 = 0x34;
/// Capability identifier of MSI-X (PCIe 5.0, section 7.7.2).
const MSIX: u8 = 0x11;
/// Where an x86 guest has its interrupt controllers take messages.
const MESSAGE_ADDRESS: u64 = 0xfee0_0000;
/// A capability list is never longer than the space it lies in.
const MAX_CAPABILITIES: usize = 48;

/// Why a function could not be made ready for the driver.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The device's description is wrong.
    #[error(transparent)]
    Function(#[from] FunctionError),
    /// The memory could not be mapped for the device.
    #[error("the driver's memory cannot be mapped for the device: {0}")]
    Map(#[from] MapError),
    /// Configuration space was not as described.
    #[error("the function refused an access: {0}")]
    Access(#[from] AccessError),
    /// Interrupts by MSI-X were asked for.
    #[error("the function has no MSI-X table of {0} vectors")]
    NoMsix(u16),
}

/// BAR 0 of a function that is enabled.
pub struct FunctionRegisters<S: IrqSink> {
    function: Function<S>,
}

impl<S: IrqSink> FunctionRegisters<S> {
    /// Makes the function of `attachment`, maps `memory` for it from `base` on, and enables memory space and bus mastering.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(attachment: Box<dyn Attachment>, sink: S, memory: &Arc<Memory>, base: Iova) -> Result<Self, OpenError> {
        let options = FunctionOptions { interrupts: InterruptOwner::Function };
        let mut function = Function::new(attachment, sink, options)?;
        function.map(Window {
            iova: base,
            len: memory.len(),
            access: Access::READ_WRITE,
            // The device's host maps the very descriptor that is mapped here: there is nothing to prove.
            memory: WindowMemory::Mapped { memory: Arc::clone(memory), offset: 0, proven: true },
        })?;
        // Memory space and bus master (PCI 3.0, section 6.2.2).
        function.config_write(COMMAND, &0b110_u16.to_le_bytes())?;
        Ok(Self { function })
    }

    /// Enables MSI-X with its first `vectors` vectors unmasked; vector n carries n as its data.
    ///
    /// # Errors
    /// [`OpenError::NoMsix`], [`OpenError::Access`].
    pub fn enable_msix(&mut self, vectors: u16) -> Result<(), OpenError> {
        let location = self.function.description().msix.filter(|msix| msix.vectors >= vectors);
        let location = location.ok_or(OpenError::NoMsix(vectors))?;
        for vector in 0..vectors {
            let entry = u64::from(location.table_offset) + u64::from(vector) * 16;
            for (at, value) in [(0, MESSAGE_ADDRESS), (8, u64::from(vector)), (12, 0)] {
                let place = BarAddress { bar: location.table_bar, offset: entry + at };
                self.function.bar_write(place, Width::B4, value)?;
            }
        }
        let capability = self.capability(MSIX)?.ok_or(OpenError::NoMsix(vectors))?;
        let mut control = [0; 2];
        self.function.config_read(capability + 2, &mut control)?;
        // Enable is bit 15; bit 14 would mask all.
        let enabled = (u16::from_le_bytes(control) | 1 << 15) & !(1 << 14);
        self.function.config_write(capability + 2, &enabled.to_le_bytes())?;
        Ok(())
    }

    /// The function behind the registers.
    pub fn function_mut(&mut self) -> &mut Function<S> {
        &mut self.function
    }

    fn capability(&mut self, wanted: u8) -> Result<Option<u16>, AccessError> {
        let mut pointer = [0; 1];
        self.function.config_read(CAPABILITIES, &mut pointer)?;
        for _ in 0..MAX_CAPABILITIES {
            let at = u16::from(pointer[0] & !3);
            if at == 0 {
                return Ok(None);
            }
            let mut head = [0; 2];
            self.function.config_read(at, &mut head)?;
            if head[0] == wanted {
                return Ok(Some(at));
            }
            pointer = [head[1]];
        }
        Ok(None)
    }
}

impl<S: IrqSink> Registers for FunctionRegisters<S> {
    #[inline]
    fn read(&mut self, offset: u64, width: Width) -> u64 {
        // Refused is what a real slot answers with all ones; the function counts it.
        let at = BarAddress { bar: 0, offset };
        self.function.bar_read(at, width).unwrap_or(width.all_ones())
    }

    #[inline]
    fn write(&mut self, offset: u64, width: Width, value: u64) {
        // A store that nobody takes is lost on a bus, too; the function counts it, and the driver's deadline finds it.
        let taken = self.function.bar_write(BarAddress { bar: 0, offset }, width, value);
        debug_assert!(taken.is_ok(), "BAR 0 + {offset:#x}: {taken:?}");
    }

    #[inline]
    fn poll(&mut self) {
        self.function.poll(Nanos::now());
    }

    fn is_gone(&self) -> bool {
        self.function.gone().is_some()
    }
}
