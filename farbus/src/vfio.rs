//! Real PCI devices on the command line: how one is opened, what is said where it cannot be, and the list of `farbus devices`.
//!
//! `farbus lend --device vfio:0000:03:00.0` of a drive that the host's own driver has ends with "0000:03:00.0 is bound to nvme, not to vfio-pci" and,
//! as the hint, the three commands that change it.

use farbus_remote_dma::vfio::{Candidate, Host, Obstacle, OpenError, PciAddress, Vfio};

use crate::failure::Advise;

/// Opens the device at `address`.
pub fn open(address: PciAddress) -> anyhow::Result<Vfio> {
    Vfio::open(&Host::default(), address).or_else(|error| {
        let hint = hint(&error);
        Err(error).advise(format!("cannot lend vfio:{address}"), hint)
    })
}

fn hint(error: &OpenError) -> String {
    match error {
        OpenError::Obstacles(obstacles) => obstacles.iter().map(Obstacle::remedy).collect::<Vec<_>>().join("\n"),
        OpenError::Busy(_) => "end the program that has it: another farbus lend, or a virtual machine".to_owned(),
        OpenError::NoReset { .. } => {
            "what one borrower leaves in such a device the next would find: lend another, or move this one to a slot of its own"
                .to_owned()
        }
        OpenError::Interrupts(_) => "raise the limit of open files first, as in: ulimit -n 4096".to_owned(),
        OpenError::Vfio { .. } | OpenError::Config(_) | OpenError::Host { .. } => {
            "the kernel's log may say more: dmesg | tail".to_owned()
        }
    }
}

/// The PCI devices of this host and what is missing to lend each, or why they cannot be listed.
pub fn candidates() -> Result<Vec<Candidate>, Obstacle> {
    Host::default().candidates()
}
