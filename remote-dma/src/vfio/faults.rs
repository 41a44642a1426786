//! What the kernel's log says of a device's DMA that its IOMMU refused: the only place where VFIO lets that be seen.
//!
//! `DMAR: [DMA Write NO_PASID] Request device [03:00.0] fault addr 0x7f000` counts once for 0000:03:00.0. The kernel merges and limits such
//! lines, so a count says "at least so many".

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::host::PciAddress;

/// Bytes of the longest record of the kernel's log (Linux, `PRINTKRB_RECORD_MAX` and its prefix).
const RECORD: usize = 8192;
/// Records read at one look.
const AT_MOST: usize = 1024;

/// The kernel's log from a moment on.
#[derive(Debug)]
pub(super) struct FaultLog {
    log: File,
    /// `03:00.0`, as every IOMMU driver prints it, with or without the domain before it.
    device: String,
}

impl FaultLog {
    /// From now on.
    pub(super) fn open(address: PciAddress) -> std::io::Result<Self> {
        let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        let mut log = File::options().read(true).custom_flags(flags).open("/dev/kmsg")?;
        log.seek(SeekFrom::End(0))?;
        Ok(Self { log, device: format!("{:02x}:{:02x}.{:x}", address.bus, address.device, address.function) })
    }

    /// Readable when there is something to look at.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.log.as_fd()
    }

    /// Passes over what was logged so far.
    pub(super) fn forget(&mut self) {
        if let Err(error) = self.log.seek(SeekFrom::End(0)) {
            tracing::warn!(%error, "the kernel's log cannot be passed over: an earlier fault may count for this borrower");
        }
    }

    /// Faults since the last look, with the last one's text.
    pub(super) fn look(&mut self) -> (u64, Option<String>) {
        let (mut faults, mut last) = (0, None);
        let mut record = [0; RECORD];
        for _ in 0..AT_MOST {
            match self.log.read(&mut record) {
                Ok(0) => break,
                Ok(len) => {
                    let text = String::from_utf8_lossy(record.get(..len).unwrap_or_default());
                    if is_fault(&text, &self.device) {
                        faults += 1;
                        last = text.split_once(';').map(|(_, text)| text.lines().next().unwrap_or_default().to_owned());
                    }
                }
                // Records were overwritten before they were read.
                Err(error) if error.kind() == ErrorKind::BrokenPipe || error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => {
                    tracing::warn!(%error, "the kernel's log cannot be read: faults are not counted");
                    break;
                }
            }
        }
        (faults, last)
    }
}

/// Whether a line tells of refused DMA of a device: VT-d says `fault addr`, AMD-Vi and others `PAGE_FAULT` or `page fault`.
fn is_fault(text: &str, device: &str) -> bool {
    let lower = text.to_lowercase();
    let fault = lower.contains("fault addr") || lower.contains("page_fault") || lower.contains("page fault");
    fault && lower.match_indices(device).any(|(at, _)| !lower[..at].ends_with(|before: char| before.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_known_by_its_words_and_its_device() {
        let vt_d = "4,900,1,-;DMAR: [DMA Write NO_PASID] Request device [03:00.0] fault addr 0x7f000 [fault reason 0x05] PTE Write access is not set";
        let amd =
            "4,900,1,-;vfio-pci 0000:03:00.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x000e address=0x7f000 flags=0x0020]";
        assert!(is_fault(vt_d, "03:00.0") && is_fault(amd, "03:00.0"));
        assert!(!is_fault(vt_d, "04:00.0") && !is_fault(vt_d, "3:00.0"));
        assert!(!is_fault("6,1,1,-;pci 0000:03:00.0: BAR 0 assigned", "03:00.0"));
    }
}
