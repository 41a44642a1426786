//! Identify data: the 4,096-byte pages in which the controller and its namespace describe themselves (NVMe 1.4, section 5.15).
//!
//! CNS 0 for namespace 1 of a 256 MiB image says 0x8_0000 blocks (NSZE) of 2^9 bytes (LBADS); CNS 1 says among other things that a command moves at
//! most 2^8 pages of 4 KiB (MDTS) and that there is one namespace.

use super::admin::PAGE_BYTES;
use super::command::{NSID_ALL, Status};
use super::engine::Flow;
use super::events::MAX_REQUESTS;
use super::features::{CRITICAL_KELVIN, WARNING_KELVIN};
use super::log_pages::ERROR_ENTRIES;
use super::media::BLOCK_BYTES;
use super::{MAX_TRANSFER_BYTES, Nvme};

const MODEL: &str = "farbus NVMe";
/// Shift of a block's bytes.
const BLOCK_SHIFT: u8 = BLOCK_BYTES.trailing_zeros() as u8;

/// The names by which a driver tells this controller and its namespace from others.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    serial: [u8; 20],
    uuid: [u8; 16],
}

impl Identity {
    /// From the image's identity: the same image has the same names wherever it is lent.
    pub(super) fn new(image: u64, serial: Option<&str>) -> Self {
        let own = format!("FB{image:016X}");
        let text = serial.filter(|serial| !serial.is_empty()).unwrap_or(&own);
        let mut bytes = [b' '; 20];
        for (to, from) in bytes.iter_mut().zip(text.bytes().filter(|byte| (0x20..0x7f).contains(byte))) {
            *to = from;
        }
        // A version 8 (vendor) UUID, RFC 9562: namespaces with different images or serials must differ.
        let mut uuid = [0; 16];
        let (high, low) = uuid.split_at_mut(8);
        high.copy_from_slice(&hash(0x6661_7262_7573_0001, &bytes, image).to_be_bytes());
        low.copy_from_slice(&hash(0x6661_7262_7573_0002, &bytes, image).to_be_bytes());
        let [_, _, _, _, _, _, version, _, variant, ..] = &mut uuid;
        *version = *version & 0x0f | 0x80;
        *variant = *variant & 0x3f | 0x80;
        Self { serial: bytes, uuid }
    }

    /// Without the blanks behind it.
    pub(super) fn serial(&self) -> String {
        String::from_utf8_lossy(&self.serial).trim_end().to_owned()
    }

    fn subsystem_name(&self) -> String {
        let hex: String = self.uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        let part = |from: usize, to: usize| hex.get(from..to).unwrap_or_default();
        let (a, b, c, d, e) = (part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32));
        format!("nqn.2014-08.org.nvmexpress:uuid:{a}-{b}-{c}-{d}-{e}")
    }
}

/// FNV-1a, 64 bits: a name, not a protection.
fn hash(seed: u64, serial: &[u8], image: u64) -> u64 {
    serial
        .iter()
        .chain(&image.to_le_bytes())
        .fold(0xcbf2_9ce4_8422_2325 ^ seed, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// A page that is filled field by field, by the offsets of the specification's figures.
pub(super) struct Page(pub(super) [u8; PAGE_BYTES]);

impl Page {
    pub(super) const fn new() -> Self {
        Self([0; PAGE_BYTES])
    }

    pub(super) fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(field) = self.0.get_mut(at..at + bytes.len()) {
            field.copy_from_slice(bytes);
        }
    }

    fn text(&mut self, at: usize, len: usize, text: &str) {
        if let Some(field) = self.0.get_mut(at..at + len) {
            field.fill(b' ');
            for (to, from) in field.iter_mut().zip(text.bytes()) {
                *to = from;
            }
        }
    }
}

impl Nvme {
    pub(super) fn identify(&mut self, index: u32) -> Flow {
        let Some(slot) = self.slots.get_mut(index) else {
            return Flow::Parked;
        };
        let namespace = slot.command.namespace;
        let page = match (slot.command.dword10 & 0xff, namespace) {
            (0x00 | 0x03, namespace) if namespace != 1 => return slot.refuse(Status::INVALID_NAMESPACE),
            (0x00, _) => self.identify_namespace(),
            (0x01, _) => self.identify_controller(),
            // Identifiers greater than the one given, in order; the two highest are no namespaces (section 5.15.2.3).
            (0x02, NSID_ALL | 0xffff_fffe) => return slot.refuse(Status::INVALID_NAMESPACE),
            (0x02, namespace) => {
                let mut page = Page::new();
                if namespace < 1 {
                    page.put(0, &1_u32.to_le_bytes());
                }
                page
            }
            (0x03, _) => {
                let mut page = Page::new();
                // Type 3: UUID, 16 bytes (figure 248).
                page.put(0, &[3, 16, 0, 0]);
                page.put(4, &self.identity.uuid);
                page
            }
            _ => return slot.refuse(Status::INVALID_FIELD),
        };
        self.reply(index, &page.0, PAGE_BYTES as u32)
    }

    /// Figure 245.
    fn identify_namespace(&self) -> Page {
        let mut page = Page::new();
        let blocks = self.blocks().to_le_bytes();
        // NSZE, NCAP, NUSE.
        page.put(0, &blocks);
        page.put(8, &blocks);
        page.put(16, &blocks);
        // NLBAF 0 and FLBAS 0: one format. DLFEAT: deallocated blocks read as zeroes, and write zeroes can deallocate.
        page.put(33, &[0b0_1001]);
        // NSATTR bit 0: write protected.
        page.put(99, &[u8::from(self.options.read_only)]);
        // LBAF0: no metadata, 512 bytes, best performance.
        page.put(128, &[0, 0, BLOCK_SHIFT, 0]);
        page
    }

    /// Figure 247.
    fn identify_controller(&self) -> Page {
        let mut page = Page::new();
        // VID and SSVID as in configuration space.
        page.put(0, &self.description.vendor_id.to_le_bytes());
        page.put(2, &self.description.subsystem_vendor_id.to_le_bytes());
        page.put(4, &self.identity.serial);
        page.text(24, 40, MODEL);
        page.text(64, 8, env!("CARGO_PKG_VERSION"));
        // RAB: 2^5 commands of a queue at once.
        page.put(72, &[5]);
        // MDTS in units of 2^12 bytes; CNTLID 0; VER.
        page.put(77, &[(MAX_TRANSFER_BYTES / 4096).trailing_zeros() as u8]);
        page.put(80, &super::registers::VS.to_le_bytes());
        // OAES bit 8: namespace attribute notices. CNTRLTYPE 1: I/O controller.
        page.put(92, &(1_u32 << 8).to_le_bytes());
        page.put(111, &[1]);
        // OACS 0; ACL 3 and AERL 3 (zero-based); FRMW: one slot, read only; LPA: effects log, extended data for Get Log Page; ELPE.
        page.put(256, &[0, 0, 3, MAX_REQUESTS as u8 - 1, 0b011, 0b110, ERROR_ENTRIES as u8 - 1, 0]);
        page.put(266, &WARNING_KELVIN.to_le_bytes());
        page.put(268, &CRITICAL_KELVIN.to_le_bytes());
        // TNVMCAP, 16 bytes.
        page.put(280, &self.media.len().to_le_bytes());
        // SQES, CQES: exactly 64 and 16 bytes. MAXCMD: what the slots hold. NN 1.
        page.put(512, &[0x66, 0x44]);
        page.put(514, &(super::registers::MAX_QUEUE_ENTRIES as u16).to_le_bytes());
        page.put(516, &1_u32.to_le_bytes());
        // ONCS: compare (0), dataset management (2), write zeroes (3), select in Get Features (4).
        page.put(520, &0b1_1101_u16.to_le_bytes());
        // VWC: present (0); flush takes NSID FFFFFFFFh (2:1 = 11b).
        page.put(525, &[u8::from(self.features.write_cache_present) | 0b110]);
        let name = self.identity.subsystem_name();
        page.put(768, name.as_bytes());
        // PSD0: 25 W in units of 10 mW.
        page.put(2048, &2500_u16.to_le_bytes());
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_images_never_share_a_name() {
        let (a, b) = (Identity::new(1, None), Identity::new(2, None));
        assert_ne!(a.serial, b.serial);
        assert_ne!(a.uuid, b.uuid);
        let named = Identity::new(1, Some("disk\u{7}-of-a-guest-with-a-long-name"));
        assert_eq!(&named.serial, b"disk-of-a-guest-with");
        let name = named.subsystem_name();
        assert!(name.starts_with("nqn.2014-08.org.nvmexpress:uuid:") && name.len() == 32 + 36, "{name}");
    }
}
