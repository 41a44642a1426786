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
        vfio_line(),
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
    let pci = pci_devices();
    if args.json {
        let list = |lines: &[Line]| -> Vec<_> {
            lines.iter().map(|line| json!({ "name": line.name, "works": line.works, "what": line.what })).collect()
        };
        let rdma: Vec<_> = rdma.iter().map(described).collect();
        print_line(
            &json!({ "devices": list(&lendable), "fabrics": list(&fabrics), "rdma": rdma, "pci": pci_json(&pci) }).to_string(),
        );
        return Ok(());
    }
    for (title, lines) in [("devices", &lendable[..]), ("fabrics", &fabrics[..])] {
        print_line(&format!("{title}:"));
        for Line { name, works, what } in lines {
            print_line(&format!("  {name:<18} {:<4} {what}", if *works { "yes" } else { "no" }));
        }
    }
    if !pci.is_empty() {
        print_line("PCI devices:");
    }
    for PciDevice { spec, what, missing, remedy } in &pci {
        print_line(&format!("  {spec:<18} {:<4} {what}", if missing.is_empty() { "yes" } else { "no" }));
        for (missing, remedy) in missing.iter().zip(remedy) {
            print_line(&format!("      {missing}; to change that:"));
            for line in remedy.lines() {
                print_line(&format!("        {line}"));
            }
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

/// A PCI device of this host, as it is told.
struct PciDevice {
    /// As `--device` takes it.
    spec: String,
    what: String,
    missing: Vec<String>,
    /// For each of these, what to do about it.
    remedy: Vec<String>,
}

fn pci_json(pci: &[PciDevice]) -> Vec<Value> {
    let told = pci.iter().map(|device| {
        json!({
            "name": device.spec,
            "works": device.missing.is_empty(),
            "what": device.what,
            "missing": device.missing,
            "remedy": device.remedy,
        })
    });
    told.collect()
}

#[cfg(feature = "vfio")]
fn vfio_line() -> Line {
    let (works, what) = match crate::vfio::candidates() {
        Ok(found) => {
            let ready = found.iter().filter(|candidate| candidate.obstacles.is_empty()).count();
            (ready > 0, format!("a PCI device of this host: {} of {} can be lent as they are", ready, found.len()))
        }
        Err(error) => (false, error.to_string()),
    };
    Line { name: "vfio:ADDRESS", works, what }
}

#[cfg(not(feature = "vfio"))]
fn vfio_line() -> Line {
    Line { name: "vfio:ADDRESS", works: false, what: "not in this build: PCI devices of this host".into() }
}

#[cfg(feature = "vfio")]
fn pci_devices() -> Vec<PciDevice> {
    let found = crate::vfio::candidates().unwrap_or_default();
    let told = found.iter().map(|candidate| PciDevice {
        spec: format!("vfio:{}", candidate.address),
        what: format!("{:04x}:{:04x}, class {:06x}", candidate.vendor_id, candidate.device_id, candidate.class_code),
        missing: candidate.obstacles.iter().map(ToString::to_string).collect(),
        remedy: candidate.obstacles.iter().map(farbus_remote_dma::vfio::Obstacle::remedy).collect(),
    });
    told.collect()
}

#[cfg(not(feature = "vfio"))]
fn pci_devices() -> Vec<PciDevice> {
    Vec::new()
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
