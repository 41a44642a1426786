//! INTx (PCI 3.0, sections 6.2.2 to 6.2.4): the level that the device asserts, and the level that the guest sees.
//!
//! The device asserts; the guest sets bit 10 of the command register: the pin falls, while bit 3 of the status register still says that an
//! interrupt is there. A guest that polls the bit (QEMU's does, to find whose line it is) spins for ever without that.

/// Level of the pin.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Intx {
    asserted: bool,
    told: bool,
}

impl Intx {
    /// The device's level.
    pub(crate) fn asserted(self) -> bool {
        self.asserted
    }

    /// The device's level, whatever the guest may see of it.
    pub(crate) fn set(&mut self, asserted: bool) {
        self.asserted = asserted;
    }

    /// What to tell the guest if `open` (INTx is how the function signals, and is not disabled); `None` where it knows.
    pub(crate) fn update(&mut self, open: bool) -> Option<bool> {
        let wanted = self.asserted && open;
        (std::mem::replace(&mut self.told, wanted) != wanted).then_some(wanted)
    }
}
