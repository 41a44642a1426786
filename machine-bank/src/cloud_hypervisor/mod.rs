//! Cloud Hypervisor's socket for saving and restoring a machine in another process: its local live migration, in which we are the other end.
//!
//! `save(&bank, "vm7", &options, &[], stream, …)` deposits what a Cloud Hypervisor hands over after `ch-remote send-migration destination_url=unix:PATH,local=on`;
//! `restore(&bank, &entry, path, …)` hands it to one that waits after `ch-remote receive-migration receiver_url=unix:PATH,memory_mode=postcopy`, and gives it
//! each page as the guest uses it.
//!
//! # The protocol
//!
//! Numbers are little-endian. A request is a command (2 bytes), 6 bytes that only `Start` uses (a version, 0), and the length of its payload (8); the answer is a
//! status (2; 1 is right, 2 an error), 6 bytes, and a length (8). In order:
//!
//! ```text
//!  1 Start
//!  7 MemoryFd         for each slot: 4 bytes of payload, its number, and beside them the descriptor of a memfd (SCM_RIGHTS)
//!  2 Config           JSON; memory_manager_data.guest_ram_mappings has slot, gpa, size and file_offset of each slot
//!  3 State            JSON
//!  8 CompletePaused   or 5 Complete: the guest runs then
//! ```
//!
//! With pages on demand the memfds are empty, and behind Config we connect once more, say that this is the connection for faults (2 bytes: 2), and answer there:
//!
//! ```text
//!  9 PageFault        16 bytes of payload: guest physical address and length. The answer comes when the page is in the memfd, and has length 0
//! ```
//!
//! until the other end closes it: it asks for every page in the end. 6 `Abandon` says that it has given up.
//!
//! Source: Cloud Hypervisor's `vm-migration/src/protocol.rs` and `offload_daemon/src/main.rs`, its pull requests 8403 (the other end in a process of its own) and
//! 8264 (page faults). No machine that runs Cloud Hypervisor (KVM) was at hand: the tests play it. Its other ways need nothing of us: `memory_restore_mode=ondemand`
//! of a snapshot folder reads a local file by a thread of the VMM, and there is a proposal (issue 8644) to hand its userfaultfd over as Firecracker does.
//!
//! # What is ours
//!
//! A slot is a section `slot0`, `slot1` …; the JSON are `config` and `state` (device state). A page is written to the memfd once, in one piece, by `pwrite` and
//! not through a mapping: another vCPU that touches it meanwhile waits in the kernel for the whole of it, and what the guest wrote is never overwritten
//! when a page is asked for again. Pages of zeros are written too, because a hole would fault again. A page that cannot be had is answered by an error, and never by another
//! byte. Memory of virtio-mem is refused.

mod restore;
mod save;
mod wire;

pub use restore::{RestoreError, RestoreOptions, RestoreReport, restore};
pub use save::{Other, SaveError, save};
pub use wire::{Refused, Slot, slots};

/// The section that has the configuration.
pub const CONFIG: &str = "config";
/// The section that has the state of vCPUs and devices.
pub const STATE: &str = "state";

/// The section that has the memory of a slot.
pub fn slot_section(slot: u32) -> String {
    format!("slot{slot}")
}
