//! What this process and the RDMA device have lent out: queue pairs, regions, descriptors, locked memory; so that "nothing leaks" is a comparison.
//!
//! `Resources::now()` before and after 300 links must be equal: `rdma resource show` counts the device's objects, /proc the rest.

use std::process::Command;

/// Counts of everything that a link uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resources {
    /// The device's objects by kind, as rdma(8) prints them: "pd 1 cq 1 qp 1 cm_id 0 mr 0 ctx 0 srq 0".
    pub device: String,
    pub descriptors: usize,
    /// Memory areas, so that a mapping which is never given back shows.
    pub mappings: usize,
    /// KiB pinned and locked.
    pub pinned: u64,
    pub locked: u64,
    pub threads: u64,
}

impl Resources {
    pub fn now() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("no {name} in {status}"));
            line.split_whitespace().next().unwrap().parse().unwrap()
        };
        Self {
            device: device_objects(),
            // Without the one that reads the folder.
            descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count() - 1,
            mappings: std::fs::read_to_string("/proc/self/maps").unwrap().lines().count(),
            pinned: field("VmPin:"),
            locked: field("VmLck:"),
            threads: field("Threads:"),
        }
    }
}

fn device_objects() -> String {
    let device = std::env::var("FARBUS_RDMA_DEV").unwrap_or_default();
    let output = Command::new("rdma").args(["resource", "show", &device]).output().unwrap_or_else(|error| {
        panic!("rdma(8), which counts the device's objects, cannot be run ({error}); on Debian: apt-get install iproute2")
    });
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert!(output.status.success() && text.contains(" qp "), "rdma resource show {device}: {text}");
    text
}
