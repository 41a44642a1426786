//! `farbus devices`: what can be lent here and which fabrics work, with the reason where one does not.
//!
//! On a machine without RDMA it says `shm: yes` and `verbs: no, not built into this version`; nothing is hidden because it is missing.

use farbus_transport::shm::{ShmFabric, ShmOptions};
use serde_json::json;

use crate::cli::DevicesArgs;
use crate::output::print_line;

struct Line {
    name: &'static str,
    works: bool,
    what: String,
}

/// Prints both lists.
pub fn run(args: &DevicesArgs) -> anyhow::Result<()> {
    let devices = [
        Line { name: "nvme:FILE", works: true, what: "an NVMe 1.4 controller over an image file or a block device".into() },
        Line { name: "edu", works: true, what: "the register file and DMA engine of QEMU's edu device".into() },
        Line { name: "vfio:ADDRESS", works: false, what: "not in this version: real PCIe devices".into() },
        Line { name: "vfio-user:SOCKET", works: false, what: "not in this version: devices of other vfio-user servers".into() },
    ];
    let fabrics = [
        match ShmFabric::pair(ShmOptions::default()) {
            Ok(_) => Line { name: "shm", works: true, what: "shared memory between two processes of this host".into() },
            Err(error) => Line { name: "shm", works: false, what: format!("shared memory cannot be set up: {error}") },
        },
        Line { name: "rdma", works: false, what: "not in this version: RDMA verbs".into() },
    ];
    if args.json {
        let list = |lines: &[Line]| -> Vec<_> {
            lines.iter().map(|line| json!({ "name": line.name, "works": line.works, "what": line.what })).collect()
        };
        print_line(&json!({ "devices": list(&devices), "fabrics": list(&fabrics) }).to_string());
        return Ok(());
    }
    for (title, lines) in [("devices", &devices[..]), ("fabrics", &fabrics[..])] {
        print_line(&format!("{title}:"));
        for Line { name, works, what } in lines {
            print_line(&format!("  {name:<18} {:<4} {what}", if *works { "yes" } else { "no" }));
        }
    }
    Ok(())
}
