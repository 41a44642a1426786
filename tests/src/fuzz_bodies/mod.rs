//! What each fuzz target does with its bytes, shared by the fuzzer (fuzz/fuzz_targets) and the replay of its corpora (tests/tests/corpus_replay.rs).
//!
//! `nvme_registers(bytes)` reads the bytes as a guest's register writes, commands and memory, and panics where the device does, or where one
//! of the invariants it asserts is broken; any bytes at all are a valid input.
#![expect(clippy::expect_used, clippy::missing_panics_doc, reason = "a panic is what the fuzzer looks for")]

mod bank_archive;
mod bank_formats;
mod bank_layers;
mod bank_link;
mod bank_store;
mod cloud_hypervisor_save;
mod config_writes;
mod control_frames;
mod firecracker_regions;
mod function_state;
mod input;
mod link_hello;
mod nvme_registers;
mod pci_config;
mod prp_lists;
mod qemu_mapped_ram;
mod session_messages;
mod verbs_wire;
mod vfio_user_messages;
mod vfio_user_server;

pub use bank_archive::bank_archive;
pub use bank_formats::bank_formats;
pub use bank_layers::bank_layers;
pub use bank_link::bank_link;
pub use bank_store::bank_store;
pub use cloud_hypervisor_save::cloud_hypervisor_save;
pub use config_writes::config_writes;
pub use control_frames::control_frames;
pub use firecracker_regions::firecracker_regions;
pub use function_state::function_state;
pub use link_hello::link_hello;
pub use nvme_registers::nvme_registers;
pub use pci_config::pci_config;
pub use prp_lists::prp_lists;
pub use qemu_mapped_ram::qemu_mapped_ram;
pub use session_messages::session_messages;
pub use verbs_wire::verbs_wire;
pub use vfio_user_messages::vfio_user_messages;
pub use vfio_user_server::vfio_user_server;

/// A target: its name, which is also its folder in fuzz/corpus, and its body.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 19] = [
    ("bank_archive", bank_archive),
    ("bank_formats", bank_formats),
    ("bank_layers", bank_layers),
    ("bank_link", bank_link),
    ("bank_store", bank_store),
    ("cloud_hypervisor_save", cloud_hypervisor_save),
    ("config_writes", config_writes),
    ("control_frames", control_frames),
    ("firecracker_regions", firecracker_regions),
    ("function_state", function_state),
    ("link_hello", link_hello),
    ("nvme_registers", nvme_registers),
    ("pci_config", pci_config),
    ("prp_lists", prp_lists),
    ("qemu_mapped_ram", qemu_mapped_ram),
    ("session_messages", session_messages),
    ("verbs_wire", verbs_wire),
    ("vfio_user_messages", vfio_user_messages),
    ("vfio_user_server", vfio_user_server),
];
