//! `farbus devices`: what can be lent here and which fabrics work, with the reason where one does not.
//!
//! On a machine without RDMA it says `shm: yes` and `rdma: no`, and what is missing; on one with it each device, its ports, their state and
//! addresses, and the limits that matter to a link. Nothing is hidden because it is missing.

use farbus_transport::shm::{ShmFabric, ShmOptions};
use farbus_transport::verbs::{DeviceInfo, PortInfo, devices};
use serde_json::{Value, json};

use crate::cli::DevicesArgs;
use crate::output::print_line;

struct Line {
    name: &'static str,
    works: bool,
    what: String,
}

/// Prints all lists.
pub fn run(args: &DevicesArgs) -> anyhow::Result<()> {
    let rdma = devices();
    let lendable = [
        Line { name: "nvme:FILE", works: true, what: "an NVMe 1.4 controller over an image file or a block device".into() },
        Line { name: "edu", works: true, what: "the register file and DMA engine of QEMU's edu device".into() },
        Line { name: "vfio:ADDRESS", works: false, what: "not in this version: real PCIe devices".into() },
        Line { name: "vfio-user:SOCKET", works: true, what: "the device of a vfio-user server that is named with --device".into() },
    ];
    let fabrics = [
        match ShmFabric::pair(ShmOptions::default()) {
            Ok(_) => Line { name: "shm", works: true, what: "shared memory between two processes of this host".into() },
            Err(error) => Line { name: "shm", works: false, what: format!("shared memory cannot be set up: {error}") },
        },
        match &rdma {
            Ok(found) => Line { name: "rdma", works: found.iter().any(is_usable), what: "queue pairs with another host".into() },
            Err(error) => Line { name: "rdma", works: false, what: error.to_string() },
        },
    ];
    let rdma = rdma.unwrap_or_default();
    if args.json {
        let list = |lines: &[Line]| -> Vec<_> {
            lines.iter().map(|line| json!({ "name": line.name, "works": line.works, "what": line.what })).collect()
        };
        let rdma: Vec<_> = rdma.iter().map(described).collect();
        print_line(&json!({ "devices": list(&lendable), "fabrics": list(&fabrics), "rdma": rdma }).to_string());
        return Ok(());
    }
    for (title, lines) in [("devices", &lendable[..]), ("fabrics", &fabrics[..])] {
        print_line(&format!("{title}:"));
        for Line { name, works, what } in lines {
            print_line(&format!("  {name:<18} {:<4} {what}", if *works { "yes" } else { "no" }));
        }
    }
    if !rdma.is_empty() {
        print_line("RDMA devices:");
    }
    for device in &rdma {
        print_line(&format!(
            "  {:<18} {} work requests a queue, {} regions of at most {} MiB, {} reads at once, memory windows: {}",
            device.name,
            device.max_work_requests,
            device.max_regions,
            device.max_region_bytes >> 20,
            device.max_reads,
            if device.memory_windows { "yes" } else { "no" },
        ));
        for port in &device.ports {
            print_line(&format!(
                "    port {}: {}, MTU {}, operations of at most {} MiB",
                port.number,
                port.state,
                port.mtu_bytes,
                port.max_message_bytes >> 20,
            ));
            for gid in &port.gids {
                let kind = if gid.roce_v2 { "RoCE v2" } else { "not RoCE v2" };
                print_line(&format!("      gid {}: {} ({kind})", gid.index, gid.address));
            }
        }
    }
    Ok(())
}

/// Whether a link could be made over it.
fn is_usable(device: &DeviceInfo) -> bool {
    device.ports.iter().any(|port| port.state == "active" && !port.gids.is_empty())
}

fn described(device: &DeviceInfo) -> Value {
    let port = |port: &PortInfo| {
        let gids: Vec<_> = port
            .gids
            .iter()
            .map(|gid| json!({ "index": gid.index, "address": gid.address.to_string(), "roce_v2": gid.roce_v2 }))
            .collect();
        json!({ "number": port.number, "state": port.state, "mtu_bytes": port.mtu_bytes, "max_message_bytes": port.max_message_bytes, "gids": gids })
    };
    json!({
        "name": device.name,
        "usable": is_usable(device),
        "max_work_requests": device.max_work_requests,
        "max_regions": device.max_regions,
        "max_region_bytes": device.max_region_bytes,
        "max_reads": device.max_reads,
        "memory_windows": device.memory_windows,
        "ports": device.ports.iter().map(port).collect::<Vec<_>>(),
    })
}
