//! Log pages: errors, health, firmware, changed namespaces, command effects (NVMe 1.4, section 5.14).
//!
//! After a read past the end, log page 1 starts with an entry of queue 3, command 7, status 0x4080 and the LBA; after 1,000 reads of 4 KiB log page 2
//! counts 9 units of 512,000 bytes read.

use super::Nvme;
use super::admin::PAGE_BYTES;
use super::command::{Command, NSID_ALL, Status, admin, io};
use super::engine::Flow;
use super::identify::Page;
use crate::backend::Bus;

/// Entries of the error log (ELPE is one less).
pub(super) const ERROR_ENTRIES: usize = 64;
const ERROR_ENTRY_BYTES: usize = 64;

/// One entry (figure 193).
#[derive(Clone, Copy, Debug, Default)]
struct ErrorEntry {
    count: u64,
    queue: u16,
    identifier: u16,
    status: u16,
    lba: u64,
    namespace: u32,
}

/// The newest errors.
#[derive(Debug)]
pub(super) struct ErrorLog {
    entries: [ErrorEntry; ERROR_ENTRIES],
    count: u64,
}

impl Default for ErrorLog {
    fn default() -> Self {
        Self {
            entries: [ErrorEntry::default(); ERROR_ENTRIES],
            count: 0,
        }
    }
}

impl ErrorLog {
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    pub(super) fn record(&mut self, queue: u16, command: &Command, status: Status) {
        let place = (self.count % ERROR_ENTRIES as u64) as usize;
        self.count += 1;
        if let Some(entry) = self.entries.get_mut(place) {
            *entry = ErrorEntry {
                count: self.count,
                queue,
                identifier: command.identifier,
                status: status.bits(),
                lba: if queue == 0 { 0 } else { command.first_lba() },
                namespace: command.namespace,
            };
        }
    }

    /// Newest first (section 5.14.1.1).
    fn page(&self) -> Page {
        let mut page = Page::new();
        let filled = self.count.min(ERROR_ENTRIES as u64);
        for age in 0..filled {
            let place = ((self.count - 1 - age) % ERROR_ENTRIES as u64) as usize;
            let Some(entry) = self.entries.get(place) else { continue };
            let at = age as usize * ERROR_ENTRY_BYTES;
            page.put(at, &entry.count.to_le_bytes());
            page.put(at + 8, &entry.queue.to_le_bytes());
            page.put(at + 10, &entry.identifier.to_le_bytes());
            // The phase tag is bit 0 of the status field here too.
            page.put(at + 12, &(entry.status << 1).to_le_bytes());
            page.put(at + 14, &u16::MAX.to_le_bytes());
            page.put(at + 16, &entry.lba.to_le_bytes());
            page.put(at + 24, &entry.namespace.to_le_bytes());
        }
        page
    }
}

impl Nvme {
    pub(super) fn log_page(&mut self, index: u32, bus: &mut dyn Bus) -> Flow {
        let health = self.health();
        let Some(slot) = self.slots.get_mut(index) else {
            return Flow::Parked;
        };
        let command = slot.command;
        let identifier = command.dword10 as u8;
        let retain = command.dword10 & 1 << 15 != 0;
        // NUMD, zero-based, and the offset in bytes (LPA bit 2).
        let dwords = u64::from(command.dword10 >> 16) | u64::from(command.dword11 & 0xffff) << 16;
        let len = (dwords + 1) * 4;
        let offset = u64::from(command.dword12) | u64::from(command.dword13) << 32;
        if !matches!(command.namespace, 0 | 1 | NSID_ALL) {
            return slot.refuse(Status::INVALID_NAMESPACE);
        }
        let (page, size) = match identifier {
            0x01 => (self.errors.page(), PAGE_BYTES),
            0x02 => (health, 512),
            0x03 => (firmware(), 512),
            // No namespace ever changes.
            0x04 => (Page::new(), PAGE_BYTES),
            0x05 => (effects(), PAGE_BYTES),
            _ => return slot.refuse(Status::INVALID_LOG_PAGE),
        };
        // Past the end, or not on a dword (section 5.14).
        if offset % 4 != 0 || offset > size as u64 || len > u64::from(super::MAX_TRANSFER_BYTES) {
            return slot.refuse(Status::INVALID_FIELD);
        }
        let mut shifted = Page::new();
        shifted.put(0, page.0.get(offset as usize..size).unwrap_or_default());
        let flow = self.reply(index, &shifted.0, len as u32);
        if flow != Flow::Lacking && !retain {
            self.log_page_was_read(identifier, bus);
        }
        flow
    }

    /// SMART / health information (figure 194).
    fn health(&self) -> Page {
        let counters = &self.counters;
        let mut page = Page::new();
        page.put(0, &[self.features.critical_warning()]);
        page.put(1, &super::features::TEMPERATURE_KELVIN.to_le_bytes());
        // Available spare 100 %, threshold 10 %, used 0 %.
        page.put(3, &[100, 10, 0]);
        // Units of 1,000 blocks of 512 bytes, rounded up.
        page.put(32, &counters.bytes_to_guest.div_ceil(512_000).to_le_bytes());
        page.put(48, &counters.bytes_from_guest.div_ceil(512_000).to_le_bytes());
        page.put(64, &counters.reads.to_le_bytes());
        page.put(80, &counters.writes.to_le_bytes());
        // Power cycles; error log entries.
        page.put(112, &1_u64.to_le_bytes());
        page.put(176, &self.errors.count.to_le_bytes());
        page
    }
}

/// Firmware slot information (figure 195): slot 1 is active.
fn firmware() -> Page {
    let mut page = Page::new();
    page.put(0, &[1]);
    let mut revision = [b' '; 8];
    for (to, from) in revision.iter_mut().zip(env!("CARGO_PKG_VERSION").bytes()) {
        *to = from;
    }
    page.put(8, &revision);
    page
}

/// Commands supported and effects (figure 198): bit 0 supported, bit 1 changes logical blocks.
fn effects() -> Page {
    const SUPPORTED: u32 = 1;
    const CHANGES_BLOCKS: u32 = 1 << 1;
    let mut page = Page::new();
    let admin = [
        admin::DELETE_SUBMISSION_QUEUE,
        admin::CREATE_SUBMISSION_QUEUE,
        admin::LOG_PAGE,
        admin::DELETE_COMPLETION_QUEUE,
        admin::CREATE_COMPLETION_QUEUE,
        admin::IDENTIFY,
        admin::ABORT,
        admin::SET_FEATURES,
        admin::FEATURES,
        admin::EVENT_REQUEST,
    ];
    for opcode in admin {
        page.put(usize::from(opcode) * 4, &SUPPORTED.to_le_bytes());
    }
    for opcode in [io::FLUSH, io::READ, io::COMPARE] {
        page.put(1024 + usize::from(opcode) * 4, &SUPPORTED.to_le_bytes());
    }
    for opcode in [io::WRITE, io::WRITE_ZEROES, io::DATASET_MANAGEMENT] {
        page.put(1024 + usize::from(opcode) * 4, &(SUPPORTED | CHANGES_BLOCKS).to_le_bytes());
    }
    page
}
