//! What the owner of a function chooses, what it can count, and why a function cannot be made.
//!
//! A VMM that embeds the function says [`InterruptOwner::Function`]: the MSI-X table is the function's. A vfio-user server says
//! [`InterruptOwner::Client`]: QEMU keeps the table, and vector 3 goes to the eventfd that its SET_IRQS brought.

use farbus_remote_dma::device::DescriptionError;
use farbus_transport::tally::Named;
use thiserror::Error;

/// Who decides what becomes of a vector that the device raises, and who decodes addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InterruptOwner {
    /// The function: its MSI-X table, masks, pending bits and bus-master bit decide. It decodes its BARs as well: an access while its space
    /// is disabled, or in D3hot, reads all ones and writes nothing, as an unsupported request.
    #[default]
    Function,
    /// The client of a vfio-user server, which emulates table and pending bits and says what is on. Every vector goes to the sink, with
    /// address and data 0. The client decodes too: it sends no access to a BAR that is off, and one that it sends is carried out.
    Client,
}

/// How a function behaves towards its owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FunctionOptions {
    /// Who delivers interrupts and decodes addresses.
    pub interrupts: InterruptOwner,
}

/// Why a function cannot be made.
#[derive(Debug, Error)]
pub enum FunctionError {
    /// The device's side describes something that cannot be a PCI function.
    #[error(transparent)]
    Description(#[from] DescriptionError),
    /// Guest memory could not be mapped for the device.
    #[error("guest memory cannot be mapped for the device: {0}")]
    Map(#[from] farbus_remote_dma::MapError),
}

/// How often things happened since the function was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Reads of configuration space.
    pub config_reads: u64,
    /// Writes of configuration space.
    pub config_writes: u64,
    /// BAR reads answered here: MSI-X, constants, profile, not decoded.
    pub bar_reads_local: u64,
    /// BAR reads that the device was asked for.
    pub bar_reads_remote: u64,
    /// BAR writes that ended here: MSI-X, not decoded.
    pub bar_writes_local: u64,
    /// BAR writes that went to the device.
    pub bar_writes_remote: u64,
    /// Accesses that were refused as impossible.
    pub refused: u64,
    /// Messages told to the guest.
    pub messages: u64,
    /// Vectors whose pending bit was set because they were masked.
    pub pending: u64,
    /// Vectors that nobody could hear: no such vector, no message interrupts enabled, or raised in the middle of a reset.
    pub dropped: u64,
    /// Changes of the INTx level told to the guest.
    pub pin_changes: u64,
    /// Mediations handed to the owner.
    pub mediations: u64,
    /// Resets of the function, of any kind.
    pub resets: u64,
}

impl Counters {
    /// Their names, in the order of [`Counters::values`].
    pub const NAMES: &'static [Named] = &[
        ("config_reads", "Reads of configuration space."),
        ("config_writes", "Writes of configuration space."),
        ("bar_reads_local", "Register reads answered by the function itself."),
        ("bar_reads_remote", "Register reads that the device was asked for."),
        ("bar_writes_local", "Register writes that ended in the function."),
        ("bar_writes_remote", "Register writes that went to the device."),
        ("refused", "Accesses that were refused as impossible."),
        ("messages", "Message interrupts told to the guest."),
        ("pending", "Vectors whose pending bit was set because they were masked."),
        ("dropped", "Vectors that nobody could hear."),
        ("pin_changes", "Changes of the INTx level told to the guest."),
        ("mediations", "Mediations handed to the owner."),
        ("resets", "Resets of the function, of any kind."),
    ];

    /// All of them.
    pub const fn values(&self) -> [u64; 13] {
        let Self {
            config_reads,
            config_writes,
            bar_reads_local,
            bar_reads_remote,
            bar_writes_local,
            bar_writes_remote,
            refused,
            messages,
            pending,
            dropped,
            pin_changes,
            mediations,
            resets,
        } = *self;
        [
            config_reads,
            config_writes,
            bar_reads_local,
            bar_reads_remote,
            bar_writes_local,
            bar_writes_remote,
            refused,
            messages,
            pending,
            dropped,
            pin_changes,
            mediations,
            resets,
        ]
    }
}
