//! A folder in which a test lends and borrows: one good image, a link, and as many vfio-user sockets as it likes.
//!
//! `let mut lender = place.lend(); place.assert_served(&mut lender);` borrows the image, looks at the drive as a VMM would, and leaves in
//! order: what every test does last, to see that nothing was lost by what it did before.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::path::PathBuf;

use farbus_pci_shim::vfio_user::client::Client;
use serde_json::Value;
use tempfile::TempDir;

use crate::process::{AMPLE, End, Running, text};

/// A folder with one good image, `disk.img`, of 8 MiB.
pub struct Place(TempDir);

impl Place {
    /// A new one, removed with the value.
    #[expect(clippy::new_without_default, reason = "it makes a folder and a file")]
    pub fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        place.image("disk.img", 8 << 20);
        place
    }

    /// The path of `name` in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The same as an argument.
    pub fn name(&self, name: &str) -> String {
        text(&self.path(name)).to_owned()
    }

    /// Makes an image of zeros.
    pub fn image(&self, name: &str, bytes: u64) {
        std::fs::File::create(self.path(name)).unwrap().set_len(bytes).unwrap();
    }

    /// An image as `--device` takes it.
    pub fn device(&self, image: &str) -> String {
        format!("nvme:{}", self.name(image))
    }

    /// The link's address.
    pub fn link(&self) -> String {
        format!("shm:{}", self.name("link"))
    }

    /// Lends `disk.img`; returns when somebody can connect.
    pub fn lend(&self) -> Running {
        let mut lender = Running::farbus(&["lend", "--json", "--device", &self.device("disk.img"), "--listen", &self.link()]);
        lender.event("listening", AMPLE);
        lender
    }

    /// Borrows it; returns when a VMM can connect to `socket`.
    pub fn borrow(&self, socket: &str) -> Running {
        // No lender comes back where nobody starts one.
        self.borrow_for(socket, "100ms")
    }

    /// Lends with other options.
    pub fn lend_with(&self, options: &[&str]) -> Running {
        let (device, link) = (self.device("disk.img"), self.link());
        let mut args = vec!["lend", "--json", "--device", &device, "--listen", &link];
        args.extend(options);
        let mut lender = Running::farbus(&args);
        lender.event("listening", AMPLE);
        lender
    }

    /// As [`Place::borrow`], by a borrower that looks for its lender for so long.
    pub fn borrow_for(&self, socket: &str, reconnect: &str) -> Running {
        let (link, socket) = (self.link(), self.name(socket));
        let mut borrower =
            Running::farbus(&["borrow", "--json", "--reconnect", reconnect, "--from", &link, "--vfio-user", &socket]);
        borrower.event("serving", AMPLE);
        borrower
    }

    /// A whole round: borrow, look at the device as a VMM would, leave in order.
    #[track_caller]
    pub fn assert_served(&self, lender: &mut Running) {
        let borrower = self.borrow("next");
        lender.event("lent", AMPLE);
        assert_nvme(&mut self.vmm("next"));
        assert_end_in_order(borrower);
        lender.event("returned", AMPLE);
    }

    /// A VMM at `socket`.
    pub fn vmm(&self, socket: &str) -> Client {
        Client::open(self.path(socket), AMPLE).unwrap()
    }
}

const CONFIG_REGION: u32 = 7;

fn class_code(vmm: &mut Client) -> [u8; 3] {
    let mut class = [0; 3];
    for (byte, offset) in class.iter_mut().zip(9..) {
        vmm.region_read(CONFIG_REGION, offset, std::slice::from_mut(byte)).unwrap();
    }
    class
}

/// NVMe's version register (NVMe 1.4, section 3.1.2), through the lender.
pub fn version(vmm: &mut Client) -> u32 {
    let mut bytes = [0; 4];
    vmm.region_read(0, 8, &mut bytes).unwrap();
    u32::from_le_bytes(bytes)
}

/// Fails unless the VMM sees an NVMe 1.4 drive.
#[track_caller]
pub fn assert_nvme(vmm: &mut Client) {
    assert_eq!(class_code(vmm), [0x02, 0x08, 0x01]);
    assert_eq!(version(vmm), 0x0001_0400);
}

/// Why, as an event says it.
pub fn reason(event: &Value) -> String {
    event["reason"].as_str().unwrap().to_owned()
}

/// Asks a process to end and fails unless it does so in order.
#[track_caller]
pub fn assert_end_in_order(running: Running) {
    running.terminate();
    let end = running.wait(AMPLE);
    assert_eq!(end.code(), Some(0), "{end:?}");
    end.assert_no_panic();
}

/// A demo over RDMA with a place's image compared every byte of it.
#[track_caller]
pub fn assert_demo_verified(end: &End) {
    assert_eq!(end.code(), Some(0), "{end:?}");
    end.assert_no_panic();
    let report: Value = serde_json::from_str(&end.stdout).unwrap();
    assert_eq!((&report["fabric"], &report["verified"]), (&"rdma".into(), &true.into()), "{report}");
    // The image of 8 MiB on both sides, before and after the writes.
    assert!(report["bytes_verified"].as_u64().unwrap() >= 4 * (8 << 20), "{report}");
}
